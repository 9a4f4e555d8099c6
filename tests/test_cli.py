from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import sepress
from sepress import cli
from sepress.defaults import METHOD
from sepress.errors import CheckError, ConstraintError, InputError, SepressError
from sepress.recipe import (
    CRITERIA,
    STAGES,
    DataConfig,
    EvaluateStage,
    ExportStage,
    FinetuneStage,
    ModelConfig,
    PolariseStage,
    PruneStage,
    Recipe,
)
from sepress.report import report_to_json
from sepress.types import Check, GroupRow, Measurement, Policy, PruningPlan, Report

BASE = Measurement(
    "base", "test", 100, 0.98, 1.0, 0.1, 1000, 100, None, None, None, reasons={"bytes": "not exported"}
)
REPORT = Report(
    name="model",
    measurements=(BASE, replace(BASE, label="pruned", top1=0.9, macs=500)),
    groups=(GroupRow("conv1", "gated", 4, 4, evidence="contribution", mean_excitation=0.25),),
    checks={"masked_equals_removed": Check(True, 1e-7), "onnx_parity": Check(None, None, "not exported")},
    artifacts={
        "model": "model-pruned/pruned.pt",
        "onnx": None,
        "plan": None,
        "ranking": "model-pruned/ranking.json",
        "report": None,
    },
    environment={},
    criterion="contribution",
    notes=("calibrated on 64 images",),
)
PLAN = PruningPlan(
    policy=Policy(ratio=0.5),
    criterion="l2",
    removed={"conv1": (0, 1)},
    widths_before={"conv1": 4},
    widths_after={"conv1": 2},
    evidence={"conv1": "weights"},
    macs_before=100,
    macs_after=50,
    params_before=10,
    params_after=5,
    notes=("UNTRAINED: the net has random weights",),
)

TABLE = {  # of a net of one layer
    "schema": "sepress.latency-table/1",
    "net": "0" * 64,
    "overhead_ns": 0.0,
    "layers": {
        **{name: [1.0] for name in ("block", "fixed", "per_product", "per_ragged")},
        "per_channel": [[1.0]],
    },
    "conditions": {},
    "validation": {},
}


@dataclass
class Stages:
    """Stands for sepress.stages: keeps what it is called with."""

    recipes: list[Recipe] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)
    report: Report = REPORT
    raises: BaseException | None = None

    def run_recipe(self, recipe: Recipe, *, out: Path | None = None, dry_run: bool = False) -> Any:
        self.recipes.append(recipe)
        self.arguments = {"out": out, "dry_run": dry_run}
        print("a library that talks")
        os.write(1, b"C code that talks\n")
        if self.raises is not None:
            raise self.raises
        return SimpleNamespace(
            folder=Path("model-pruned"),
            report=None if dry_run else self.report,
            plan=PLAN if dry_run else None,
        )

    def describe_run(self, recipe: Recipe, *, out: Path | None = None) -> list[str]:
        self.recipes.append(recipe)
        return ["1. load", "2. evaluate"]

    def inspect_model(self, recipe: Recipe) -> Any:
        self.recipes.append(recipe)
        return SimpleNamespace(to_json=lambda: {"gates": []}, render=lambda **_: "2 gates")

    def convert_model(self, recipe: Recipe, *, out: Path | None) -> Any:
        self.recipes.append(recipe)
        self.arguments = {"out": out}
        return SimpleNamespace(to_json=lambda: {"notes": []}, render=lambda: "timm:a\n", path=out)

    def profile_model(self, recipe: Recipe, **arguments: Any) -> Any:
        self.recipes.append(recipe)
        self.arguments = arguments
        validation = {"base_ms": 2.0, "measured": [0.5], "median_error": 0.02, "worst_error": 0.04}
        return SimpleNamespace(to_json=lambda: {"layers": {}}, fixed=[1.0], validation=validation)

    def compare_model(self, recipe: Recipe, **arguments: Any) -> Any:
        self.recipes.append(recipe)
        return self._table(arguments)

    def bench_models(self, *models: str, **arguments: Any) -> Any:
        self.arguments = {"models": models, **arguments}
        return SimpleNamespace(to_json=lambda: {"rows": []}, render=lambda: "1.00x")

    def load_benchmark(self, name: str, overrides: list[str]) -> Any:
        return name, list(overrides)

    def run_benchmark(self, loaded: Any, *, out: Path | None) -> Any:
        return {"net": self._table({"loaded": loaded, "out": out})}

    def _table(self, arguments: dict[str, Any]) -> Any:
        self.arguments = arguments
        return SimpleNamespace(to_json=lambda: {"rows": []}, to_markdown=lambda: "| criterion |\n")


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    """The pipeline replaced, in a folder that holds the files which the examples name."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "model.pt",
        "weights.pth",
        "model_best.pth.tar",
        "whole.pt",
        "model-pruned/plan.json",
        "model-pruned/pruned.pt",
        "s0.pt",
        "photos/a.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "table.json").write_text(json.dumps(TABLE))
    recipe = "model: model.pt\nstages:\n  - prune: {ratio: 0.3}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    run = tmp_path / "runs/quickstart"
    run.mkdir(parents=True)
    (run / "report.json").write_text(json.dumps(report_to_json(REPORT, relative_to=run)))
    fake = Stages()
    module = ModuleType("sepress.stages")
    models = [f"{what}_model" for what in ("inspect", "convert", "compare", "profile")]
    for name in ("run_recipe", "describe_run", *models):
        setattr(module, name, getattr(fake, name))
    monkeypatch.setitem(sys.modules, "sepress.stages", module)
    monkeypatch.setattr(sepress, "stages", module, raising=False)
    bench: Any = ModuleType("sepress.bench")
    bench.bench_models = fake.bench_models
    monkeypatch.setitem(sys.modules, "sepress.bench", bench)
    benchmark: Any = ModuleType("sepress.benchmark")
    benchmark.load_benchmark, benchmark.run_benchmark = fake.load_benchmark, fake.run_benchmark
    monkeypatch.setitem(sys.modules, "sepress.benchmark", benchmark)
    return fake


def call(line: str) -> Any:
    return CliRunner().invoke(cli.app, shlex.split(line), prog_name="sepress", terminal_width=200)


def examples() -> list[str]:
    found = []
    for command in get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        lines = command.epilog.replace("\\[", "[").split("\n\n")
        assert lines[0] == "[bold]Examples[/bold]"
        assert all(line.startswith(f"sepress {command.name} ") for line in lines[1:])
        found += lines[1:]
    return found


# ---- options -> Recipe ----------------------------------------------------------------------------
@pytest.mark.parametrize("line", examples())
def test_every_example_of_the_help_is_understood(line: str, stages: Stages) -> None:
    done = call(line.removeprefix("sepress "))
    assert done.exit_code == 0, done.output
    assert done.stdout
    assert stages.recipes or stages.arguments or "report" in line


def test_prune_is_a_recipe_of_stages(stages: Stages) -> None:
    done = call(
        "prune model.pt --ratio 0.3 --criterion l2 --scope global --round-to 4 --min-width 2 --gated-only "
        "--eca-neighbours --freeze 'a.*' --freeze b --override 'c=0.1' --override 'd=e=0' "
        "--finetune-epochs 2 --data photos --allow-corrupt 0.1 --arch timm:resnet18 --trust-pickle "
        "--input-size 3,64,32 --mean 0.5 --std 1,2,3 --interpolation bicubic "
        "--device cpu --seed 3 --threads 2 --require 'top1_drop<=1%' --out there"
    )
    assert done.exit_code == 0, done.output
    (recipe,) = stages.recipes
    assert recipe.model == ModelConfig(
        source="model.pt",
        arch="timm:resnet18",
        trust_pickle=True,
        input_size=(3, 64, 32),
        mean=(0.5,),
        std=(1, 2, 3),
        interpolation="bicubic",
    )
    assert recipe.data == DataConfig(path="photos", allow_corrupt=0.1)
    assert recipe.stages[0] == PruneStage(
        ratio=0.3,
        criterion="l2",
        scope="global",
        round_to=4,
        min_width=2,
        gated_only=True,
        eca_neighbours=True,
        frozen=("a.*", "b"),
        overrides={"c": 0.1, "d=e": 0},
    )
    assert [stage.kind for stage in recipe.stages] == ["prune", "finetune", "evaluate", "export"]
    assert recipe.stages[1].epochs == 2  # type: ignore[union-attr]
    assert (recipe.name, recipe.seed, recipe.device, recipe.threads) == ("pruned", 3, "cpu", 2)
    assert recipe.require == ("top1_drop<=1%",)
    assert stages.arguments == {"out": Path("there"), "dry_run": False}


def test_the_options_of_export_are_those_of_its_stage(stages: Stages) -> None:
    typed = "--exporter torchscript --opset 20 --batch 4 --with-preprocessing"
    assert call(f"export model.pt {typed}").exit_code == 0
    (exporting,) = stages.recipes[0].stages[:1]
    wanted = {"exporter": "torchscript", "opset": 20, "batch": 4, "with_preprocessing": True}
    assert wanted.items() <= exporting.model_dump().items()


def test_what_is_not_typed_is_the_recipes_default(stages: Stages) -> None:
    assert call("prune model.pt --ratio 0.3").exit_code == 0
    (recipe,) = stages.recipes
    assert recipe.data is None
    assert recipe.stages[0] == PruneStage(ratio=0.3)
    assert [stage.kind for stage in recipe.stages] == ["prune", "evaluate", "export"]


def test_a_loading_option_alone_leaves_the_data_to_the_model_file(stages: Stages) -> None:
    assert call("prune model.pt --ratio 0.3 --batch-size 32").exit_code == 0
    assert stages.recipes[0].data == DataConfig(path=None, batch_size=32)


def test_checks_that_can_not_tell_are_accepted_by_every_stage_that_checks(stages: Stages) -> None:
    assert call("prune model.pt --ratio 0.3 --allow-vacuous").exit_code == 0
    assert call("export model.pt --allow-vacuous").exit_code == 0
    pruning, exporting = stages.recipes
    assert pruning.stages[0] == PruneStage(ratio=0.3, allow_vacuous=True)
    assert pruning.stages[-1] == exporting.stages[0] == ExportStage(allow_vacuous=True)


def test_prune_searches_within_a_constraint_or_goes_in_steps(stages: Stages) -> None:
    assert call("prune model.pt --within 'top1_drop<=1%'").exit_code == 0
    assert call("prune model.pt --target-macs 0.3 --steps 3 --step-epochs 1").exit_code == 0
    searching, stepping = stages.recipes
    assert searching.stages[0] == PruneStage(within="top1_drop<=1%")
    assert stepping.stages[0] == PruneStage(target_macs=0.3, steps=3, step_epochs=1)


def test_prune_takes_a_target_in_latency_and_the_table_to_plan_it_by(stages: Stages) -> None:
    done = call("prune model.pt --target-latency 0.6 --latency-table table.json")
    assert done.exit_code == 0, done.output
    cut = stages.recipes[0].stages[0]
    assert (cut.target_latency, cut.latency_table) == (0.6, "table.json")  # type: ignore[union-attr]


def test_profile_of_a_name_asks_for_no_weights_and_no_images_and_says_its_error(stages: Stages) -> None:
    done = call("profile timm:seresnet50 --batch 2 --threads 3 --out t.json")
    assert done.exit_code == 0, done.output
    assert stages.recipes[0].model.random_weights
    assert stages.arguments == {"batch": 2, "threads": 3, "out": Path("t.json")}
    assert "2.0%" in done.stdout
    assert call("profile model.pt --batch 0 --out t.json").exit_code == 2


def test_compensation_can_be_switched_off(stages: Stages) -> None:
    assert call("prune model.pt --ratio 0.3 --no-compensate").exit_code == 0
    assert call("prune model.pt --ratio 0.3 --compensate").exit_code == 0
    assert [recipe.stages[0].compensate for recipe in stages.recipes] == [False, True]


def test_polarise_is_a_stage_of_its_own(stages: Stages) -> None:
    line = "polarise model.pt --epochs 2 --strength 0.3 --open-share 0.6 --lr 0.01 --data photos"
    assert call(line).exit_code == 0
    (recipe,) = stages.recipes
    assert recipe.stages[0] == PolariseStage(epochs=2, strength=0.3, open_share=0.6, lr=0.01)
    assert [stage.kind for stage in recipe.stages] == ["polarise", "evaluate"]
    assert recipe.name == "polarised"


def test_a_plan_is_applied_as_it_stands(stages: Stages) -> None:
    line = "prune model.pt --plan model-pruned/plan.json --calibration-images 64"
    assert call(line).exit_code == 0
    assert stages.recipes[0].stages[0] == PruneStage(plan="model-pruned/plan.json", calibration_images=64)


def test_a_run_on_a_name_is_named_after_it(stages: Stages) -> None:
    assert call("rank timm:seresnet50 --data digits").exit_code == 0
    assert stages.recipes[0].name == "seresnet50-ranked"


def test_inspect_of_a_name_asks_for_no_weights_and_no_images(stages: Stages) -> None:
    assert call("inspect sepress:se_resnet8").stdout == "2 gates\n"
    assert stages.recipes[0].model.random_weights
    assert json.loads(call("inspect model.pt --json").stdout) == {"gates": []}
    assert not stages.recipes[1].model.random_weights


def test_convert_takes_a_file_what_builds_it_and_a_name(stages: Stages) -> None:
    line = "convert whole.pt --trust-pickle --arch mynets:Net --input-size 3,64,64"
    assert call(f"{line} --out net.safetensors").stdout == "timm:a\n"
    assert json.loads(call(f"{line} --json").stdout) == {"notes": []}
    assert stages.arguments == {"out": None}
    wanted = ModelConfig(source="whole.pt", arch="mynets:Net", trust_pickle=True, input_size=(3, 64, 64))
    assert stages.recipes[0].model == stages.recipes[1].model == wanted


def test_compare_takes_methods_points_seeds_and_their_models(stages: Stages) -> None:
    line = (
        "compare model.pt weights.pth --methods random,l2+refit --target-macs 0.5,0.25 --seeds 0,1 "
        "--finetune-epochs 2 --calibration-images 64 --split val --set stages.finetune.lr=0.5 --out there"
    )
    assert call(line).stdout == "| criterion |\n"
    assert stages.arguments == {
        "methods": ["random", "l2+refit"],
        "seeds": [0, 1],
        "values": [0.5, 0.25],
        "models": ["weights.pth"],
        "against": "random",
        "out": Path("there"),
    }
    prune, finetune, evaluate = stages.recipes[0].stages
    assert prune == PruneStage(target_macs=0.5, calibration_images=64)
    assert finetune == FinetuneStage(epochs=2, lr=0.5)
    assert evaluate == EvaluateStage(split="val")


def test_a_comparisons_target_may_be_set_as_a_key(stages: Stages) -> None:
    assert call("compare model.pt --methods l2 --set stages.prune.target_macs=0.4").exit_code == 0
    assert stages.recipes[0].stages[0] == PruneStage(target_macs=0.4)
    assert stages.arguments["values"] == []


def test_methods_are_held_against_the_default_where_it_is_among_them(stages: Stages) -> None:
    call(f"compare model.pt --methods l2,{METHOD} --ratio 0.3")
    assert stages.arguments["against"] == METHOD
    call(f"compare model.pt --methods l2,{METHOD} --ratio 0.3 --against l2")
    assert stages.arguments["against"] == "l2"


@pytest.mark.parametrize("verb", ["rank", "prune"])
def test_help_lists_every_criterion(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = re.split(r"[\s,.│()]+", call(f"{verb} --help").stdout)
    assert set(CRITERIA) <= set(words)


def test_compare_takes_every_criterion_where_none_is_named(stages: Stages) -> None:
    assert call("compare model.pt --ratio 0.3").exit_code == 0
    assert stages.arguments["methods"] == [METHOD, *CRITERIA[1:]]


def test_benchmark_takes_a_file_settings_and_a_folder_and_prints_every_table(stages: Stages) -> None:
    line = "benchmark mine.yaml --set 'seeds=[0]' --set split=val --out there"
    assert call(line).stdout == "## net\n\n| criterion |\n"
    assert stages.arguments == {"loaded": ("mine.yaml", ["seeds=[0]", "split=val"]), "out": Path("there")}
    tables = {"net": {"rows": []}}
    assert json.loads(call(line + " --json").stdout) == {"schema": "sepress.benchmark/1", "tables": tables}


def test_every_option_sets_a_key_that_recipes_have() -> None:
    keys = {"": Recipe.model_fields, "model": ModelConfig.model_fields, "data": DataConfig.model_fields}
    keys["stage"] = {key: value for stage in STAGES.values() for key, value in stage.model_fields.items()}
    for group in cli.OptionGroup.__subclasses__():
        assert group.options().keys() <= keys[group.section].keys(), group


def test_defaults_in_the_help_are_the_recipes() -> None:
    shown = 0
    for group in cli.OptionGroup.__subclasses__():
        homes = {"": [Recipe], "model": [ModelConfig], "data": [DataConfig], "stage": list(STAGES.values())}
        for name, hint in group.options().items():
            found = re.search(r"(\S+) \(default\)|\((\d+)\)", hint.__metadata__[0].help or "")
            for home in homes[group.section]:
                if found and name in home.model_fields:
                    shown += 1
                    assert (found[1] or found[2]) == str(home.model_fields[name].default), (home, name)
    assert shown >= 6


# ---- errors and exit codes ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prune gone.pt --ratio 0.3", "there is no model file gone.pt"),
        ("prune seresnet50 --ratio 0.3", "timm:seresnet50"),
        ("prune timm:seresnet50 --ratio 0.3", "Pass --data"),
        ("prune model.pt", "--target-params, --target-latency, --within, --plan: exactly one of"),
        ("prune model.pt --ratio 0.3 --target-macs 0.5", "given: ratio and target_macs"),
        ("prune model.pt --ratio 3", "--ratio: should be less than 1, not 3.0"),
        ("prune model.pt --ratio nan", "--ratio: should be a finite number"),
        (
            "prune model.pt --ratio 0.3 --round-to 0",
            "--round-to: should be greater than or equal to 1, not 0",
        ),
        ("prune model.pt --ratio 0.3 --criterion magic", "--criterion: should be 'auto'"),
        (
            "prune model.pt --ratio 0.3 --scope all",
            "--scope: should be 'auto', 'per-group', 'global', 'isomorphic' or 'knapsack', not 'all'",
        ),
        ("prune model.pt --ratio 0.3 --override a", "--override a: expected PATTERN=RATIO"),
        ("prune model.pt --ratio 0.3 --override a=b", "--override"),
        ("prune model.pt --ratio 0.3 --require 'top1>2'", "--require: "),
        ("prune model.pt --ratio 0.3 --data gone", "there is no image folder gone"),
        (
            "prune model.pt --ratio 0.3 --classes gone.txt --data photos",
            "--classes: there is no file gone.txt",
        ),
        ("prune model.pt --ratio 0.3 --batch-size 1", "--batch-size: should be greater than or equal to 2"),
        ("prune model.pt --ratio 0.3 --arch resnet18", "--arch: 'resnet18' alone does not say"),
        ("prune model.pt --ratio 0.3 --input-size 3,x", "--input-size: expected a number"),
        ("prune model.pt --ratio 0.3 --device tpu", "--device: "),
        ("prune model.pt --plan gone.json", "there is no plan gone.json"),
        ("prune model.pt --target-latency 0.5 --latency-table gone.json", "there is no latency table gone"),
        (
            "prune model.pt --target-latency 0.5 --latency-table recipe.yaml",
            "recipe.yaml can't be read",
        ),
        ("prune model.pt --plan model-pruned/plan.json --ratio 0.3", "it takes no ratio"),
        ("prune model.pt --plan model-pruned/plan.json --criterion contribution", "it takes no criterion"),
        (
            "prune model.pt --plan model-pruned/plan.json --round-to 8 --min-width 8 --scope global",
            "it takes no scope, round_to, min_width",
        ),
        (
            "prune model.pt --plan model-pruned/plan.json --dry-run",
            "--dry-run makes a plan, and --plan gives",
        ),
        ("prune model.pt --within latency_ms<5", "--within: latency_ms can't be held by a search"),
        ("prune model.pt --ratio 0.3 --dry-run --require 'top1>=0.9'", "--require needs a pruned model"),
        ("train model.pt --data digits", "training starts from random weights: model.pt is a model file"),
        ("train sepress:se_resnet8", "training needs data"),
        ("train sepress:se_resnet8 --data digits --epochs 0", "--epochs: should be greater than"),
        ("evaluate sepress:se_resnet8 --data digits", "has no pretrained weights"),
        ("evaluate model.pt --split all", "--split: should be 'test', 'val' or 'train'"),
        ("export model.pt --opset 3", "--opset: should be greater than or equal to 18"),
        ("export model.pt --exporter jit", "--exporter: should be 'dynamo' or 'torchscript'"),
        ("export model.pt --batch 0", "--batch: should be greater than or equal to 1"),
        ("compare model.pt --methods l2", "exactly one of ratio, target_macs"),
        ("compare model.pt --methods l2 --ratio 0.3 --seeds a", "--seeds a: expected whole numbers"),
        ("compare model.pt --methods l2 --ratio 0.3,b", "--ratio 0.3,b: expected fractions"),
        ("run gone.yaml", "there is no file 'gone.yaml'"),
        ("run recipe.yaml --set stages.prune.ratio=2", "--set stages.prune.ratio: should be less than 1"),
        ("run recipe.yaml --require 'top1>2'", "--require: top1 is a fraction"),
        ("run recipe.yaml --set require.a=1", "--set require.a: should be a list"),
        ("report gone", "there is no report gone"),
        ("report recipe.yaml", "recipe.yaml can't be read as a report"),
        ("report runs/quickstart --format html", "--format html: expected terminal, markdown, junit, github"),
        ("report runs/quickstart --format markdown --json", "--json and --format markdown exclude"),
    ],
)
def test_a_wrong_argument_is_explained_before_anything_runs(line: str, message: str, stages: Stages) -> None:
    done = call(line)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert stages.recipes == []


@pytest.mark.parametrize(
    "line", ["prune", "prune model.pt --nonsense", "prune model.pt --ratio x", "nonsense"]
)
def test_usage_errors_exit_with_2(line: str, stages: Stages) -> None:
    done = call(line)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage" in done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (SepressError("a fault", remedy="do this"), 1, "error: a fault\ndo this\n"),
        (InputError("your file"), 2, "error: your file\n"),
        (ConstraintError("not met"), 3, "error: not met\n"),
        (CheckError("[not] equal"), 4, "error: [not] equal\n"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero\nSEPRESS_DEBUG=1"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
@pytest.mark.parametrize("as_json", ["", "--json"])
def test_the_exit_code_is_the_class_of_the_error(
    raised: BaseException, code: int, message: str, as_json: str, stages: Stages
) -> None:
    stages.raises = raised
    done = call(f"prune model.pt --ratio 0.3 {as_json}")
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_debugging_shows_the_traceback(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPRESS_DEBUG", "1")
    stages.raises = ZeroDivisionError("by zero")
    assert isinstance(call("prune model.pt --ratio 0.3").exception, ZeroDivisionError)


def test_an_unmet_constraint_exits_with_3_after_the_report(stages: Stages) -> None:
    row = {
        "constraint": "top1_drop<=0.01",
        "actual": 0.08,
        "passed": False,
        "reason": None,
        "figures": "0.98, 0.9",
    }
    stages.report = replace(REPORT, constraints=(row,))
    done = call("prune model.pt --ratio 0.3 --json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["schema"] == "sepress.report/1"
    assert "top1_drop<=0.01: not met at 0.08" in done.stderr
    assert done.stderr.index("written to model-pruned") < done.stderr.index("not met")


# ---- stdout ---------------------------------------------------------------------------------------
def test_json_is_one_object_on_stdout_whatever_libraries_print(
    stages: Stages, capfd: pytest.CaptureFixture[str]
) -> None:
    done = call("prune model.pt --ratio 0.3 --json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert [row["label"] for row in value["measurements"]] == ["base", "pruned"]
    assert "a library that talks" in done.stderr
    assert "written to model-pruned" in done.stderr
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "C code that talks\n")


def test_json_is_ascii_whatever_the_encoding_of_stdout(stages: Stages) -> None:
    stages.report = replace(REPORT, name="modèle")
    done = call("prune model.pt --ratio 0.3 --json")
    assert done.stdout.isascii()
    assert json.loads(done.stdout)["name"] == "modèle"


def test_rank_prints_the_groups_and_where_the_scores_are(stages: Stages) -> None:
    stdout = call("rank model.pt").stdout
    assert re.search(r"conv1 +gated +4 +0\.25\d* +contribution", stdout)
    assert "calibrated on 64 images" in stdout
    assert "model-pruned/ranking.json" in stdout
    assert "Top-1" not in stdout
    assert json.loads(call("rank model.pt --json").stdout)["schema"] == "sepress.report/1"


def test_a_person_gets_a_table(stages: Stages) -> None:
    stdout = call("prune model.pt --ratio 0.3").stdout
    assert "base" in stdout
    assert "pruned" in stdout
    assert "98.0" in stdout


def test_a_dry_run_of_prune_shows_widths_predictions_and_evidence(stages: Stages) -> None:
    done = call("prune model.pt --ratio 0.5 --dry-run")
    assert stages.arguments["dry_run"]
    assert re.search(r"conv1 +4 +2 +50% +weights", done.stdout)
    assert "MACs 100 -> 50 (50.0%), params 10 -> 5 (50.0%)" in done.stdout
    assert "UNTRAINED" in done.stdout
    value = json.loads(call("prune model.pt --ratio 0.5 --dry-run --json").stdout)
    assert value["groups"][0]["removed"] == [0, 1]


def test_a_dry_run_of_a_recipe_says_what_would_run(stages: Stages) -> None:
    assert call("run recipe.yaml --dry-run").stdout == "1. load\n2. evaluate\n"
    value = json.loads(call("run recipe.yaml --dry-run --json --set seed=4").stdout)
    assert value["steps"] == ["1. load", "2. evaluate"]
    assert value["recipe"]["seed"] == 4
    assert not stages.arguments


def test_run_adds_constraints_to_the_recipes_own(stages: Stages) -> None:
    line = "run recipe.yaml --set 'require=[top1>=0.5]' --require 'top1_drop<=1%' --require 'macs<=1e9'"
    assert call(line).exit_code == 0
    assert stages.recipes[0].require == ("top1>=0.5", "top1_drop<=1%", "macs<=1e9")


def test_run_prints_the_same_object_as_prune(stages: Stages) -> None:
    assert call("run recipe.yaml --json").stdout == call("prune model.pt --ratio 0.3 --json").stdout


def test_a_report_is_shown_again_with_absolute_paths(stages: Stages) -> None:
    value = json.loads(call("report runs/quickstart --json").stdout)
    assert value["artifacts"]["model"] == str(Path.cwd() / "model-pruned/pruned.pt")
    assert call("report runs/quickstart/report.json --format markdown").stdout.startswith("#")


def test_version_is_printed() -> None:
    assert call("--version").stdout == f"sepress {sepress.__version__}\n"


def test_the_module_runs_and_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "sepress", "--version"], stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# ---- for real -------------------------------------------------------------------------------------
def test_a_trained_file_is_pruned_by_two_short_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("train sepress:se_resnet8 --data digits --epochs 1 --device cpu --threads 1 --out trained")
    assert done.exit_code == 0, done.output
    done = call("prune --ratio 0.3 trained/base.pt --device cpu --threads 1 --json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    base, pruned = value["measurements"]
    assert (base["label"], pruned["label"]) == ("base", "pruned")
    assert (base["split"], base["n"]) == ("test", 1000)
    assert pruned["macs"] < 0.7 * base["macs"]
    assert value["checks"]["masked_equals_removed"]["passed"] is True
    assert value["checks"]["onnx_parity"]["passed"] is True
    assert {Path(path).parent for path in value["artifacts"].values() if path} == {
        tmp_path / "trained/base-pruned"
    }
    assert all(Path(path).is_file() for path in value["artifacts"].values() if path)
    assert call("prune --ratio 0.3 trained/base.pt --dry-run --device cpu").exit_code == 0
    assert (tmp_path / "trained/base-pruned-2/plan.json").is_file()
    again = json.loads(call("report trained/base-pruned --json").stdout)
    assert again == value


def test_a_table_that_profile_wrote_is_what_prune_plans_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sepress import profile

    for name in ("ADJUSTMENT", "VALIDATION"):
        monkeypatch.setattr(profile, name, 2)
    few = {**profile.profile_latency.__kwdefaults__, "variants": 3, "rounds": 2}
    monkeypatch.setattr(profile.profile_latency, "__kwdefaults__", few)
    monkeypatch.chdir(tmp_path)
    size = "--input-size 3,32,32"
    done = call(f"profile sepress:se_mobile {size} --out table.json")
    assert done.exit_code == 0, done.output
    assert "layers; the base takes" in done.stdout
    assert call(f"profile sepress:se_mobile {size} --out table.json").exit_code == 2  # it exists
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(16):
        Image.effect_noise((32, 32), 50 + i).convert("RGB").save(folder / f"{i}.png")
    prune = f"--random-weights {size} --data photos --dry-run --target-latency 0.9 --latency-table table.json"
    done = call(f"prune sepress:se_mobile {prune} --calibration-images 8 --round-to 1 --min-width 1 --json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["latency_ratio"] <= 0.9
    done = call(f"prune sepress:se_resnet8 {prune}")
    assert done.exit_code == 2
    assert "the latency table is of another net" in done.stderr
