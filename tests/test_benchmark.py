"""The whole proof in small: nets trained from seeds, methods compared on them, one folder that grows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from photos import make_photos

from sepress import stages
from sepress.benchmark import Benchmark, Net, Part, base_recipe, load_benchmark, run_benchmark
from sepress.compare import read_method
from sepress.criteria import CRITERIA
from sepress.defaults import METHOD
from sepress.errors import InputError
from sepress.recipe import load_recipe, packaged_recipes

TINY = """
data: {path: photos, batch_size: 16, augment: none}
seeds: [0, 1]
nets:
  - {name: plain, model: {source: "sepress:se_resnet8", kwargs: {width: 8}, input_size: 8},
     train: {epochs: 1, warmup_epochs: 0, ema_decay: null, amp: bfloat16}}
  - {name: mobile, model: {source: "sepress:se_mobile", kwargs: {width_mult: 0.5}, input_size: 8},
     train: {epochs: 1, warmup_epochs: 0, ema_decay: null}}
split: val
calibration_images: 32
recalibration_images: 32
round_to: 4
min_width: 4
finetune: {epochs: 1, warmup_epochs: 0, lr: 0.01, ema_decay: null}
against: l2
compare:
  - {methods: [l2, contribution+refit, scratch], target_macs: [0.6]}
  - {methods: [random], target_macs: [0.8], nets: [plain]}
  - {name: bare, finetune: null, methods: [l2], target_macs: [0.6], nets: [plain]}
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the benchmark and its images."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos", train=16, val=8, test=4)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def test_a_benchmark_trains_compares_and_goes_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_benchmark("tiny.yaml", ["out=made"])
    tables = run_benchmark(benchmark)
    assert set(tables) == {"plain", "mobile", "plain-bare"}
    plain = tables["plain"]
    assert (plain.rows[0].method, plain.rows[0].point.value) == ("random", 0.8)
    assert {row.method for row in plain.rows[1:]} == {"l2", "contribution+refit", "scratch"}
    assert all(row.seeds == (0, 1) for row in plain.rows)
    assert len({base.weights for base in plain.bases}) == 2
    assert plain.comparison.finetune is not None
    assert plain.comparison.finetune.amp == "bfloat16"  # as the net was trained
    assert plain.comparison.scratch is not None
    assert (plain.comparison.scratch.epochs, plain.comparison.scratch.batch_size) == (2, 16)
    assert tables["plain-bare"].rows[0].mean["tuned"] is None
    assert (tiny / "made/mobile-1/base.pt").is_file()
    text = (tiny / "made/plain/compare.md").read_text()
    assert "difference from l2" in text
    assert "scratch: random weights, 2 epochs of training" in text

    def untouched(*_: Any, **__: Any) -> Any:
        raise AssertionError("made again")

    monkeypatch.setattr(stages, "train", untouched)
    monkeypatch.setattr("sepress.compare.run.run_cell", untouched)
    again = run_benchmark(benchmark)
    assert {name: table.cells for name, table in again.items()} == {n: t.cells for n, t in tables.items()}


def test_a_base_is_the_run_of_the_plain_recipe(tiny: Path) -> None:
    """So that a base trained by `sepress run` is taken as it is."""
    (tiny / "one.yaml").write_text(
        'model: {source: "sepress:se_resnet8", kwargs: {width: 8}, input_size: [8, 8]}\n'
        "data: {path: photos, batch_size: 16, augment: none}\n"
        "stages: [{train: {epochs: 1, warmup_epochs: 0, ema_decay: null, amp: bfloat16}}]\n"
    )
    benchmark = load_benchmark("tiny.yaml", ["nets.0.model.input_size=[8, 8]"])
    ours = base_recipe(benchmark, benchmark.nets[0], seed=1)
    theirs = load_recipe("one.yaml", ["seed=1"])
    assert ours.model_copy(update={"name": theirs.name, "out": theirs.out}) == theirs


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=1", "--set seed: unknown key (did you mean 'seeds'?)"),
        ("nets.0.train.epoch=1", "--set nets.0.train.epoch: unknown key (did you mean 'epochs'?"),
        ("nets.0.model.pth=1", "unknown key; known: source, arch"),
        ("nets.0.name=plain-0", "nets.0.name"),
        ("nets.0.name=mobile", "two nets have one name"),
        ("compare.0.methods=[magic]", "unknown criterion 'magic'"),
        ("compare.0.ratio=[0.3]", "exactly one of target_macs, target_params, ratio is needed"),
        ("compare.0.target_macs=[1.5]", "should be less than 1"),
        ("compare.0.name=long", "a fine-tune of its own and a name"),
        ("compare.1.nets=[other]", "no net is named other; there are: plain, mobile"),
        ("split=train", "should be 'test' or 'val'"),
        ("device=tpu", "device: "),
        ("data={batch_size: 16}", "training needs data: set data.path"),
        ("seeds=[0, 0]", "seeds are named once each"),
        ("compare.0.methods=[l2, auto, reconstruction]", "methods are named once each"),
        ("compare.0.target_macs=[0.5, 0.5]", "target_macs are named once each"),
        ("against=random", "random, which the others are held against, is not compared first on mobile"),
    ],
)
def test_a_mistake_is_named_with_its_key(tiny: Path, setting: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_benchmark("tiny.yaml", [setting])
    assert message in str(caught.value)


def test_a_benchmark_and_a_recipe_are_told_apart_and_each_names_its_verb() -> None:
    with pytest.raises(
        InputError, match=r"benchmark\.yaml is a benchmark, no recipe\s+Run it by `sepress be"
    ):
        load_recipe("benchmark")
    with pytest.raises(
        InputError, match=r"quickstart\.yaml is a recipe, no benchmark\s+Run it by `sepress ru"
    ):
        load_benchmark("quickstart")


def test_the_packaged_benchmark_is_the_acceptance() -> None:
    benchmark = load_benchmark(str(packaged_recipes() / "benchmark.yaml"))
    assert len(benchmark.nets) == 2
    assert len(benchmark.seeds) == 3
    assert benchmark.split == "test"
    assert benchmark.compare[0].target_macs == (0.5,)
    assert {value for part in benchmark.compare for value in part.target_macs} == {0.7, 0.5, 0.35, 0.25}
    at = {
        value: {method for part in benchmark.compare if value in part.target_macs for method in part.methods}
        for value in (0.7, 0.5, 0.35, 0.25)
    }
    assert all({METHOD, "random"} <= methods and len(methods) >= 5 for methods in at.values())
    assert {read_method(method).criterion for method in at[0.5]} == {*CRITERIA, "scratch"}


def test_the_readme_documents_every_key_and_its_default() -> None:
    text = (packaged_recipes() / "README.md").read_text(encoding="utf-8").partition("## Benchmark files")[2]
    for body, settings in zip(re.split(r"^### .*$", text, flags=re.M), (Benchmark, Net, Part), strict=True):
        documented = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", body, flags=re.M))
        assert documented.keys() == settings.model_fields.keys()
        for key, default in documented.items():
            field = settings.model_fields[key]
            shown = {None: "null", (): "[]"}.get(field.default, str(field.default))
            assert default == ("required" if field.is_required() else shown), key
