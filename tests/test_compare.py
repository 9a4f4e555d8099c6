"""Criteria side by side: one base, one calibration set, one schedule, resumable cells."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from sepress import compare as module
from sepress.bundle import make_bundle
from sepress.compare import Cell, Comparison, Table, compare
from sepress.data import DataSource, DataSpec, open_data
from sepress.device import seeded
from sepress.errors import InputError
from sepress.models import build_net, build_spec
from sepress.train import evaluate
from sepress.types import Bundle, Policy

CPU = torch.device("cpu")
COMPARISON = Comparison(
    criteria=("contribution", "random"),
    seeds=(0, 1),
    policy=Policy(target_macs=0.5, round_to=4, min_width=4),
    finetune=None,
    split="val",
    calibration_images=64,
    recalibration_images=64,
)


@pytest.fixture(scope="module")
def digits() -> tuple[Bundle, DataSource]:
    kwargs = {"in_chans": 1, "width": 8}
    spec = build_spec("sepress:se_resnet8", num_classes=10, kwargs=kwargs, trained=False)
    with seeded(0):
        net = build_net(spec)
    return make_bundle(net, spec, lineage={}), open_data(DataSpec("digits"), preprocessing=spec.preprocessing)


def test_every_cell_is_measured_at_the_target_and_the_base_is_left_alone(
    digits: tuple[Bundle, DataSource], tmp_path: Path
) -> None:
    bundle, source = digits
    before = {name: value.clone() for name, value in bundle.net.state_dict().items()}
    table = compare(bundle, source, COMPARISON, out=tmp_path, device=CPU)
    assert [(cell.criterion, cell.seed) for cell in table.cells] == [
        ("contribution", 0),
        ("contribution", 1),
        ("random", 0),
        ("random", 1),
    ]
    assert all(0.3 < cell.macs_ratio <= 0.5 and cell.tuned is None for cell in table.cells)
    assert table.base_top1 == evaluate(bundle.net, source, split="val", device=CPU).top1
    assert all(torch.equal(value, before[name]) for name, value in bundle.net.state_dict().items())
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["schema"] == "sepress.compare/1"
    assert written["cells"] == [asdict(cell) for cell in table.cells]
    text = (tmp_path / "compare.md").read_text()
    assert "UNTRAINED" in text
    assert "val (n = 500)" in text


def test_finished_cells_are_not_run_again_and_a_line_cut_short_is(
    digits: tuple[Bundle, DataSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, source = digits
    first = compare(bundle, source, replace(COMPARISON, seeds=(0,)), out=tmp_path, device=CPU)
    cells = tmp_path / "cells.jsonl"
    cells.write_text(cells.read_text()[:-20])  # as an interruption leaves it
    run: list[tuple[str, int]] = []
    plain = module._run_cell
    monkeypatch.setattr(
        module,
        "_run_cell",
        lambda *a, seed, device: run.append((a[-1], seed)) or plain(*a, seed=seed, device=device),
    )
    grown = compare(bundle, source, COMPARISON, out=tmp_path, device=CPU)
    assert run == [("random", 0), ("contribution", 1), ("random", 1)]
    again = {(c.criterion, c.seed): replace(c, seconds=0) for c in grown.cells}
    for cell in first.cells:
        assert again[cell.criterion, cell.seed] == replace(cell, seconds=0)


def test_other_settings_other_files_and_a_file_in_place_of_the_folder_are_refused(
    digits: tuple[Bundle, DataSource], tmp_path: Path
) -> None:
    bundle, source = digits
    one = replace(COMPARISON, criteria=("random",), seeds=(0,))
    compare(bundle, source, one, out=tmp_path / "run", device=CPU)
    with pytest.raises(InputError, match="other settings"):
        compare(bundle, source, replace(one, calibration_images=32), out=tmp_path / "run", device=CPU)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        compare(bundle, source, one, out=tmp_path / "other", device=CPU)
    with pytest.raises(InputError, match="can't be used"):
        compare(bundle, source, one, out=tmp_path / "other" / "notes.txt", device=CPU)


def test_rows_hold_means_and_sample_deviations_and_the_best_comes_first() -> None:
    cells = tuple(
        Cell(criterion, seed, one_shot=0.1, recalibrated=top1, tuned=top1 + 0.1, macs_ratio=0.5, seconds=1)
        for criterion, values in (("random", (0.4, 0.5)), ("contribution", (0.6, 0.8)))
        for seed, top1 in enumerate(values)
    )
    comparison = replace(COMPARISON, criteria=("random", "contribution"))
    table = Table(comparison, "sepress:x", True, 0.9, 10**6, 1000, cells, {"cpu": "a processor"})
    best, worst = table.rows()
    assert (best["criterion"], worst["criterion"]) == ("contribution", "random")
    assert best["recalibrated"] == pytest.approx(0.7)
    assert best["recalibrated_std"] == pytest.approx(0.1414, abs=1e-4)
    assert worst["tuned"] == pytest.approx(0.55)
    assert "| contribution | 0.500 | 10.00 ± 0.00 | 70.00 ± 14.14 | 80.00 ± 14.14 |" in table.to_markdown()
