from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from sepress.errors import InputError
from sepress.recipe import (
    CRITERIA,
    STAGES,
    DataConfig,
    FinetuneStage,
    ModelConfig,
    PruneStage,
    Recipe,
    TrainStage,
    check_inputs,
    effective_yaml,
    load_recipe,
    packaged_recipes,
)
from sepress.safe_yaml import MAX_BYTES, dump_yaml, read_yaml

RECIPES = sorted({*packaged_recipes().glob("*.yaml")} - {packaged_recipes() / "benchmark.yaml"})
SMALL = "model: timm:seresnet50\ndata: photos\nstages:\n  - prune: {ratio: 0.3}\n  - evaluate\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(name, overrides)
    return caught.value.message


# ---- what is read ---------------------------------------------------------------------------------
def test_short_forms_and_defaults_are_spelled_out(write: Any) -> None:
    recipe = load_recipe(write(SMALL))
    assert recipe.name == "mine"
    assert recipe.model == ModelConfig(source="timm:seresnet50")
    assert recipe.data == DataConfig(path="photos")
    assert [stage.kind for stage in recipe.stages] == ["prune", "evaluate"]
    assert recipe.stages[0] == PruneStage(ratio=0.3)
    assert (recipe.seed, recipe.device, recipe.out, recipe.require) == (0, "auto", None, ())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_packaged_recipes_are_valid_and_open_with_purpose_and_command(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Purpose:")
    assert f"# Command:  sepress run recipes/{path.name}" in re.sub(r"Command: +", "Command:  ", text)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_packaged_recipes_are_found_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "quickstart"


def test_a_file_goes_before_a_packaged_recipe_of_its_name(write: Any) -> None:
    assert load_recipe(write(SMALL, "recipes/quickstart.yaml")).model.source == "timm:seresnet50"


def test_an_unknown_name_lists_the_packaged_recipes() -> None:
    assert "did you mean 'quickstart'" in refusal("quikstart")


@pytest.mark.parametrize("source", [None, *RECIPES], ids=str)
def test_the_effective_recipe_loads_to_an_equal_recipe(source: Path | None, write: Any) -> None:
    recipe = load_recipe(source or write(SMALL), ["require=[top1_drop<=1%]", "model.input_size=[3, 64, 64]"])
    text = effective_yaml(recipe)
    assert load_recipe(write(text, "again.yaml")) == recipe
    assert yaml.safe_load(text)["stages"][0].keys() <= STAGES.keys()


def test_class_names_may_stand_in_a_file(write: Any) -> None:
    write("cat\n\nsea lion\n", "names.txt")
    recipe = load_recipe(write(SMALL), ["data.classes=names.txt"])
    assert recipe.data is not None
    assert recipe.data.classes == ("cat", "sea lion")


def test_the_wheel_holds_the_recipes_by_build_configuration(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), "."]
    root = packaged_recipes().parent
    subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        held = {
            name.removeprefix("sepress/_recipes/"): archive.read(name)
            for name in names
            if "_recipes/" in name
        }
    assert held == {path.name: path.read_bytes() for path in packaged_recipes().iterdir()}
    assert "sepress/py.typed" in names
    assert not any(name.startswith(("tests/", "recipes/")) for name in names)
    for need in (
        "timm",
        "torchvision",
        "onnxruntime-gpu",
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
    ):
        assert need in metadata


# ---- extends and --set ----------------------------------------------------------------------------
def test_extends_merges_mappings_and_replaces_lists(write: Any) -> None:
    write(SMALL + "seed: 3\nout: runs/base\n", "sub/base.yaml")
    recipe = load_recipe(
        write("extends: base.yaml\ndata: {batch_size: 7}\nstages: [evaluate]\n", "sub/top.yaml")
    )
    assert recipe.data == DataConfig(path="photos", batch_size=7)
    assert [stage.kind for stage in recipe.stages] == ["evaluate"]
    assert recipe.seed == 3
    assert (recipe.name, recipe.out) == ("top", None)  # another recipe has another folder


def test_extends_finds_packaged_recipes(write: Any) -> None:
    assert load_recipe(write("extends: recipes/quickstart.yaml\nseed: 5\n")).stages[0].kind == "train"


def test_extends_in_a_circle_is_refused(write: Any) -> None:
    write("extends: b.yaml\n", "a.yaml")
    write("\nextends: a.yaml\n", "b.yaml")
    assert refusal("a.yaml") == "b.yaml:2: extends: no end to what extends what: a.yaml -> b.yaml -> a.yaml"


def test_faults_of_an_extended_file_name_that_file(write: Any) -> None:
    write(SMALL + "seed: x\n", "base.yaml")
    assert refusal(write("extends: base.yaml\nthreads: 0\n")).splitlines()[1:] == [
        "  base.yaml:6: seed: should be a valid integer, not 'x'",
        "  mine.yaml:2: threads: should be greater than or equal to 1, not 0",
    ]


@pytest.mark.parametrize(
    ("override", "ratio", "seed"),
    [
        ("stages.prune.ratio=0.4", 0.4, 0),
        ("stages.0.ratio=0.4", 0.4, 0),
        ("stages.0.prune.ratio=4e-1", 0.4, 0),
        ("stages.prune={ratio: 0.4}", 0.4, 0),
        ("seed=7", 0.3, 7),
    ],
)
def test_set_addresses_a_key_and_a_stage_by_kind_or_position(
    override: str, ratio: float, seed: int, write: Any
) -> None:
    recipe = load_recipe(write(SMALL), [override])
    assert (recipe.stages[0], recipe.seed) == (PruneStage(ratio=ratio), seed)


def test_set_reaches_into_short_forms_and_makes_what_is_not_there(write: Any) -> None:
    recipe = load_recipe(
        write(SMALL),
        [
            "data.batch_size=9",
            "model.kwargs.drop_rate=0.5",
            "stages.1.split=val",
            "stages.prune.overrides={a.b: 0.1}",
        ],
    )
    assert recipe.data == DataConfig(path="photos", batch_size=9)
    assert recipe.model.kwargs == {"drop_rate": 0.5}
    assert recipe.stages[1].model_dump() == {"kind": "evaluate", "split": "val"}
    assert recipe.stages[0] == PruneStage(ratio=0.3, overrides={"a.b": 0.1})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected key.path=value, such as stages.prune.target_macs=0.4"),
        ("a..b=1", "--set a..b=1: expected key.path=value, such as stages.prune.target_macs=0.4"),
        ("stages.train.lr=1", "--set stages.train.lr: no stage is 'train'"),
        ("stages.2.lr=1", "--set stages.2.lr: no stage is '2'"),
        ("model.source.x=1", "--set model.source.x: model.source holds no keys"),
        ("stages.prune.ratio=2", "--set stages.prune.ratio: should be less than 1, not 2"),
        ("seed=[1", "--set seed: this is no YAML: "),
        ("seed=!!int 3", "--set seed: tags (tag:yaml.org,2002:int) are not read"),
        ("sed=1", "--set sed: unknown key (did you mean 'seed'?)"),
        ("require.0=top1>=0.9", "--set require.0: require is a list of 0, and '0' is no position in it"),
        ("stages.prune.frozen.a=b", "--set stages.prune.frozen.a: stages.0.prune.frozen is a list of 2"),
        ("stages.prune.frozen.0.x=b", "--set stages.prune.frozen.0.x: stages.0.prune.frozen.0 holds no keys"),
    ],
)
def test_set_says_what_is_wrong_with_it(override: str, message: str, write: Any) -> None:
    name = write(SMALL.replace("0.3}", "0.3, frozen: [a, b]}") + "require: []\n")
    assert refusal(name, override).startswith(message)


@pytest.mark.parametrize("stages", ["3", "word", "{prune: {ratio: 0.3}}"])
def test_set_explains_stages_that_are_no_list(stages: str, write: Any) -> None:
    name = write(f"model: timm:seresnet50\nstages: {stages}\n")
    assert refusal(name, "stages.prune.ratio=0.1") == "--set stages.prune.ratio: no stage is 'prune'"


def test_set_replaces_an_item_of_a_list(write: Any) -> None:
    name = write(SMALL + "require: [top1_drop<=1%, macs_ratio<=50%]\n")
    recipe = load_recipe(name, ["require.1=params_ratio<=40%"])
    assert recipe.require == ("top1_drop<=1%", "params_ratio<=40%")
    assert refusal(name, "require.1=top2>1").startswith("--set require.1: ")


def test_required_constraints_are_added_to_the_recipes_own(write: Any) -> None:
    write(SMALL + "require: [top1_drop<=1%]\n")
    assert load_recipe("mine.yaml", require=["top1>=0.9"]).require == ("top1_drop<=1%", "top1>=0.9")
    with pytest.raises(InputError, match=r"^--require: "):
        load_recipe("mine.yaml", require=["top1>=0.9", "top1>=9"])


def test_set_refuses_a_kind_that_several_stages_are(write: Any) -> None:
    name = write(SMALL.replace("evaluate", "prune: {ratio: 0.2}"))
    assert refusal(name, "stages.prune.ratio=0.1") == "--set stages.prune.ratio: several stages are 'prune'"


# ---- what is refused ------------------------------------------------------------------------------
def test_all_faults_of_a_file_are_listed_with_line_and_key(write: Any) -> None:
    text = """
seed: x
sed: 3
model: timm:seresnet50
data: {pth: a, batch_size: 0, batch_size: 64}
stages:
  - train: {epoch: 3}
  - prune
  - evaluat
  - export: {opset: 3}
require: [top1<=2, top1_drop<=0.01]
"""
    found = [re.sub(r"; known: .*|\. .*|, given: .*", "", line) for line in refusal(write(text)).splitlines()]
    assert found[0] == "10 errors:"
    assert sorted(found[1:], key=lambda line: int(line.split(":")[1])) == [
        "  mine.yaml:2: seed: should be a valid integer, not 'x'",
        "  mine.yaml:3: sed: unknown key (did you mean 'seed'?)",
        "  mine.yaml:5: data.batch_size: this key is written twice",
        "  mine.yaml:5: data.batch_size: should be greater than or equal to 2, not 0",
        "  mine.yaml:5: data.pth: unknown key (did you mean 'path'?)",
        "  mine.yaml:7: stages.0.train.epoch: unknown key (did you mean 'epochs'?)",
        "  mine.yaml:8: stages.1.prune: exactly one of ratio, target_macs, target_params, "
        "target_latency, within is needed",
        "  mine.yaml:9: stages.2: unknown stage 'evaluat' (did you mean 'evaluate'?)",
        "  mine.yaml:10: stages.3.export.opset: should be greater than or equal to 18, not 3",
        "  mine.yaml:11: require.0: top1 is a fraction between 0 and 1, and 2 lies outside",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stages=[]", "stages: a run needs a stage"),
        ("stages=[evaluate, train]", "stages: 'train' can't follow 'evaluate'; the order is train, polarise"),
        ("stages=[export, {prune: {ratio: 0.3}}]", "stages: 'prune' can't follow 'export'"),
        ("stages=[finetune, {prune: {ratio: 0.3}}]", "stages: 'prune' can't follow 'finetune'"),
        ("stages=[{prune: {ratio: 0.3}}, rank]", "stages: 'rank' can't follow 'prune'"),
        ("stages=[{prune: {ratio: 0.3}}, {prune: {ratio: 0.2}}]", "stages: 'prune' stands twice"),
        ("stages=[evaluate, export, {evaluate: {split: val}}]", "stages: 'evaluate' stands twice"),
        ("stages=[{prune: {ratio: 0.3}, evaluate: {}}]", "stages.0: a stage is its name, or one key"),
        ("stages=[{prune: {ratio: 0.3, kind: rank}}]", "stages.0: unknown key 'kind' in 'prune'"),
        ("stages=[{evaluate: 3}]", "stages.0: the options of 'evaluate' are a mapping, not 3"),
        ("stages.prune.target_macs=0.5", "stages.0.prune: exactly one of"),
        ("stages.prune.plan=p.json", "stages.0.prune: a plan says what is removed: it takes no ratio"),
        ("stages=[{prune: {plan: p, criterion: contribution, scope: global}}]", "no criterion, scope"),
        ("stages=[{prune: {ratio: 0.3, within: top1>=0.9}}]", "given: ratio and within"),
        ("stages=[{prune: {within: macs_ratio<=0.5}}]", "macs_ratio can't be held by a search"),
        ("stages=[{prune: {within: top1_drop>=0.5}}]", "expected top1_drop <= or < a value"),
        ("stages=[{prune: {within: top1_drop}}]", "expected an operator"),
        ("stages=[{prune: {ratio: 0.3, steps: 2}}]", "steps lead to target_macs or target_params"),
        ("stages=[{prune: {within: top1>=0.9, steps: 2}}]", "steps lead to target_macs or target_params"),
        ("stages=[{prune: {target_macs: 0.3, step_epochs: 1}}]", "step_epochs lie between steps"),
        ("stages=[{prune: {target_latency: 0.5, steps: 2}}]", "steps lead to target_macs or target_params"),
        ("stages=[{prune: {ratio: 0.3, target_latency: 0.5}}]", "given: ratio and target_latency"),
        ("stages=[{prune: {target_latency: 1.2}}]", "target_latency: should be less than 1"),
        (
            "stages=[{prune: {target_macs: 0.5, latency_table: t.json, steps: 2}}]",
            "a latency table is of one net, and steps plan on several",
        ),
        ("stages=[{prune: {plan: p, latency_table: t.json}}]", "it takes no latency_table"),
        ("stages=[{prune: {plan: p, steps: 2}}]", "a plan says what is removed: it takes no steps"),
        ("stages.prune.ratio=.nan", "should be a finite number"),
        ("stages.prune.criterion=magic", "should be 'auto', 'fisher-reconstruction'"),
        (
            "stages=[{finetune: {epochs: 1, warmup_epochs: 1}}]",
            "warmup_epochs (1) must be fewer than epochs (1)",
        ),
        ("model.source=sepress:se_resnet8", "sepress:se_resnet8 has no pretrained weights"),
        ("model.arch=resnet50", "'resnet50' alone does not say where the architecture comes from"),
        ("model.kwargs={pretrained_cfg: x}", "'pretrained_cfg' is not an argument that sepress passes on"),
        ("model.input_size=[3, x]", "expected a number for a square, H W, or C H W"),
        ("device=tpu", "device: "),
        ("name=../up", "name: "),
        ("data.classes=nowhere.txt", "there is no file nowhere.txt"),
    ],
)
def test_what_can_not_be_meant_is_refused(change: str, message: str, write: Any) -> None:
    assert message in refusal(write(SMALL), change)


@pytest.mark.parametrize("data", ["data=null", "data={batch_size: 32}"])
def test_training_without_data_is_refused(data: str, write: Any) -> None:
    assert "training needs data" in refusal(write(SMALL), data, "stages=[train]")


def test_evaluate_and_export_come_last_in_either_order(write: Any) -> None:
    making = "train, rank, {prune: {ratio: 0.3}}, finetune"
    for looking in ("evaluate, export", "export, evaluate"):
        recipe = load_recipe(write(SMALL), [f"stages=[{making}, {looking}]"])
        assert [stage.kind for stage in recipe.stages][4:] == looking.split(", ")


def test_a_plan_takes_the_place_of_a_target_that_is_taken_back(write: Any) -> None:
    plan = ["stages.prune.plan=p.json", "stages.prune.calibration_images=64"]
    recipe = load_recipe(write(SMALL), ["stages.prune.ratio=null", *plan])
    assert recipe.stages[0] == PruneStage(plan="p.json", calibration_images=64)
    text = effective_yaml(recipe)
    assert "criterion" not in text
    assert load_recipe(write(text, "again.yaml")) == recipe
    with pytest.raises(InputError, match="it takes no round_to"):
        load_recipe("again.yaml", ["stages.prune.round_to=8"])


def test_without_a_path_only_what_is_set_of_the_data_is_written(write: Any) -> None:
    recipe = load_recipe(write(SMALL), ["data={batch_size: 32}"])
    assert recipe.data == DataConfig(path=None, batch_size=32)
    text = effective_yaml(recipe)
    assert yaml.safe_load(text)["data"] == {"batch_size": 32}  # val_fraction, say, is the model file's
    again = load_recipe(write(text, "again.yaml"))
    assert again.data is not None
    assert again.data.model_fields_set == {"batch_size"}
    assert again == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: !!python/object/apply:os.system [echo]\n",
            "tags (tag:yaml.org,2002:python/object/apply:os.system)",
        ),
        ("a: &x [1]\n", "anchors and aliases"),
        ("\na: &a [*a]\n", "mine.yaml:2: anchors and aliases"),
        ("a: " + "[" * 5000 + "]" * 5000, "more than 20 nested levels"),
        ("a: [1\nb: 2\n", "this is no YAML"),
        ("a: 1\n---\nb: 2\n", "this is no YAML"),
        ("- 1\n", "a recipe is a mapping of keys to values"),
        ("", "a recipe is a mapping of keys to values"),
        ("<<: {seed: 1}\n" + SMALL, "<<: unknown key"),
        ("? [a]\n: 1\n" + SMALL, "a key is a word"),
        ("a: \x07\n", "this is no YAML"),
        ("a" * (MAX_BYTES + 1), "too large"),
    ],
)
def test_files_that_run_code_explode_or_are_no_recipe_are_refused(
    text: str, message: str, write: Any
) -> None:
    assert message in refusal(write(text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\x80\x02}q")
    assert "can't be read as text" in refusal(str(path))


def test_scalars_follow_yaml_1_2() -> None:
    text = "[off, no, 1e-4, 012, 12:30, 2020-01-01, true, null, ~, 3, -0.5, .inf, '3', 1_000]"
    values = read_yaml(text, "x").values
    assert values[:6] == ["off", "no", 1e-4, "012", "12:30", "2020-01-01"]
    assert values[6:] == [True, None, None, 3, -0.5, float("inf"), "3", "1_000"]
    assert read_yaml(dump_yaml(values), "x").values == values


def test_amp_off_is_the_word(write: Any) -> None:
    recipe = load_recipe(write(SMALL), ["stages=[{finetune: {amp: off}}]"])
    assert recipe.stages == (FinetuneStage(amp="off"),)


# ---- missing files --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model=gone.pt"], "there is no model file gone.pt"),
        (["model=seresnet50"], "there is no model file seresnet50"),
        (["model=tmim:seresnet50"], None),
        (["model=pk.net:make"], None),
        (["model=timm:seresnet50.ra2_in1k"], None),
        (["model=timm:folder/seresnet50"], "'timm:folder/seresnet50' does not name an architecture"),
        (["model=folder/a:b.pt"], "there is no model file folder/a:b.pt"),
        (
            ["model=model.pt", "stages=[train]"],
            "training starts from random weights: model.pt is a model file",
        ),
        (["model=model.pt", "data={batch_size: 8}"], None),
        (["data={batch_size: 8}"], "there are no images: timm:seresnet50 is a name"),
        (["data=gone"], "there is no image folder gone"),
        (["data=torchvision:CIFAR11"], "'CIFAR11' is not a classification data set of torchvision"),
        (["data=null"], "there are no images: timm:seresnet50 is a name"),
        (["stages=[{prune: {plan: gone.json}}]"], "there is no plan gone.json"),
        (
            ["stages=[{prune: {target_latency: 0.5, latency_table: gone.json}}]"],
            "there is no latency table gone.json",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(
    changes: list[str], message: str | None, write: Any
) -> None:
    Path("photos").mkdir(exist_ok=True)
    write("", "photos/a.png")
    write("", "model.pt")
    recipe = load_recipe(write(SMALL), changes)
    if message is None:
        check_inputs(recipe)  # whether a registry or a user's module has it is for later
    else:
        with pytest.raises(InputError, match=re.escape(message)):
            check_inputs(recipe)


# ---- what stands in two places --------------------------------------------------------------------
def test_the_criteria_are_the_known_ones() -> None:
    from sepress.criteria import CRITERIA as KNOWN

    assert set(CRITERIA) == {"auto", *KNOWN}


def test_training_defaults_are_those_of_the_training_loop() -> None:
    from sepress.train import TrainConfig

    config = TrainConfig()
    own = {"kind", "epochs", "lr"}
    for name in TrainStage.model_fields.keys() - {"kind"}:
        assert getattr(TrainStage(), name) == getattr(config, name), name
    for name in FinetuneStage.model_fields.keys() - own:
        assert getattr(FinetuneStage(), name) == getattr(config, name), name
    covered = (
        TrainStage.model_fields.keys() | FinetuneStage.model_fields.keys() | {"batch_size", "seed", "workers"}
    )
    assert {field.name for field in fields(TrainConfig)} <= covered


def test_data_defaults_are_those_of_the_data_module() -> None:
    from sepress.data import DataSpec

    for field in fields(DataSpec):
        assert getattr(DataConfig(path="x"), field.name) == getattr(DataSpec(path="./x"), field.name) or (
            field.name == "path"
        )


def test_the_readme_documents_every_key_and_its_default() -> None:
    text = (packaged_recipes() / "README.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.M | re.S))
    documented = {
        name: dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", body, flags=re.M))
        for name, body in sections.items()
    }
    settings: dict[str, type[BaseModel]] = {
        "recipe": Recipe,
        "data": DataConfig,
        "model": ModelConfig,
        **STAGES,
    }
    assert documented.keys() == settings.keys()
    assert documented["recipe"].pop("extends") == ""
    assert documented["recipe"].pop("name") == "the file's"
    inherited = {"polarise": "train", "finetune": "train", "prune": "rank"}
    for name, model in settings.items():
        keys = documented[name] | {
            key: default
            for key, default in documented.get(inherited.get(name, ""), {}).items()
            if key not in documented[name]
        }
        assert keys.keys() == model.model_fields.keys() - {"kind"} - (
            {"name"} if name == "recipe" else set()
        ), name
        for key, default in keys.items():
            field = model.model_fields[key]
            shown = (
                "required" if field.is_required() else dump_yaml(field.get_default(call_default_factory=True))
            )
            assert default == shown.removesuffix("\n...\n").strip().replace("()", "[]"), (name, key)
