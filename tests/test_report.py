"""One report, three renderings; every figure is the reader's check of another."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sepress.errors import InputError
from sepress.report import SCHEMA, render_report, report_from_json, report_to_json, report_to_markdown
from sepress.report.words import (
    BYTES,
    LATENCY,
    MACS,
    TOP1,
    cell,
    check_words,
    class_changes,
    count,
    milliseconds,
    missing,
    percent,
    points,
    size,
    summary,
)
from sepress.types import Check, GroupRow, Measurement, Report

FIGURES = {"split", "n", "top1", "top5", "loss", "macs", "params", "bytes", "latency_ms", "latency"}
NOT_EXPORTED = dict.fromkeys(("bytes", "latency_ms", "latency"), "not exported in this run")


def latency(median_ms: float, ratio: float, *, noisy: bool = False) -> dict[str, object]:
    return {
        "median_ms": median_ms,
        "p10_ms": 0.9 * median_ms,
        "p90_ms": 1.1 * median_ms,
        "ratio": ratio,
        "ratio_p10": 0.98 * ratio,
        "ratio_p90": 1.02 * ratio,
        "ratio_to": "base",
        "rounds": 30,
        "noisy": noisy,
        "runtime": "onnxruntime 1.20.0",
        "provider": "CPUExecutionProvider",
        "threads": 1,
        "batch": 1,
        "input_shape": [1, 1, 28, 28],
        "cpu": "A Processor",
    }


def full_report(folder: str = "/runs/quickstart") -> Report:
    classes = {"zero": 1.0, "one": 0.98, "two": 0.97}
    base = Measurement(
        label="base",
        split="test",
        n=1000,
        top1=0.986,
        top5=1.0,
        loss=0.05,
        macs=12_000_000,
        params=400_000,
        bytes=1_600_000,
        latency_ms=1.5,
        latency=latency(1.5, 1.0),
        per_class=classes,
    )
    pruned = dataclasses.replace(
        base,
        label="pruned",
        top1=0.9,
        top5=0.999,
        loss=0.3,
        macs=6_000_000,
        params=100_000,
        bytes=None,
        latency_ms=None,
        latency=None,
        per_class=None,
        reasons=NOT_EXPORTED,
    )
    tuned = dataclasses.replace(
        pruned,
        label="tuned",
        top1=0.979,
        loss=0.07,
        bytes=400_000,
        latency_ms=0.75,
        latency=latency(0.75, 0.48),
        per_class=classes | {"one": 0.93},
        reasons={},
    )
    groups = (
        GroupRow("stem", "gated", 8, 4, "contribution", 0.4375, tuple(i / 8 for i in range(8))),
        GroupRow("block.se.fc1", "se_hidden", 4, 4, "contribution", None),
        GroupRow("fc", "frozen", 3, 3, "not judged", None, frozen_because="it is the net's output"),
    )
    checks = {
        "masked_equals_removed": Check(True, 3.1e-7),
        "onnx_parity": Check(True, 2.2e-6, argmax_agreement=1.0),
    }
    constraint = {
        "constraint": "top1_drop<=0.01",
        "actual": 0.007,
        "passed": True,
        "reason": None,
        "figures": "base 0.986, tuned 0.979",
    }
    names = {"model": "tuned.pt", "onnx": "model.onnx", "plan": "plan.json", "report": "report.json"}
    return Report(
        name="quickstart",
        measurements=(base, pruned, tuned),
        groups=groups,
        checks=checks,
        artifacts={role: f"{folder}/{name}" for role, name in names.items()},
        environment={"torch": "2.9", "gpu": None},
        criterion="contribution",
        recipe={"seed": 0},
        constraints=(constraint,),
        notes=("digits: a fixed stratified split",),
        selection={"base": {"epoch": 7, "val_top1": 0.984}},
    )


def printed(report: Report, *, width: int = 60) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(render_report(report))
    return console.file.getvalue()


# ---- JSON -----------------------------------------------------------------------------------------
def test_json_holds_the_keys_of_the_contract():
    found = report_to_json(full_report())
    assert found["schema"] == SCHEMA == "sepress.report/1"
    assert list(found)[:1] == ["schema"]
    assert {"measurements", "groups", "checks", "artifacts", "environment"} < set(found)
    for row in found["measurements"]:
        assert {"label", "reasons"} | FIGURES <= set(row)
    for row in found["groups"]:
        assert {"name", "role", "width_before", "width_after", "evidence", "mean_excitation"} <= set(row)
    assert found["checks"]["masked_equals_removed"]["passed"] is True
    assert found["checks"]["masked_equals_removed"]["relative_error"] == 3.1e-7
    assert found["checks"]["onnx_parity"]["argmax_agreement"] == 1.0
    assert set(found["artifacts"]) == {"model", "onnx", "plan", "report"}
    assert found["measurements"][2]["top1"] == 0.979  # a fraction
    json.dumps(found, allow_nan=False)


def test_every_null_of_a_measurement_carries_its_reason_and_nothing_else_does():
    report = full_report()
    bare = Measurement("bare", *([None] * 10), reasons={"top1": "no labels"})
    odd = dataclasses.replace(
        report.measurements[0], label="odd", loss=float("nan"), reasons={"top1": "stale"}
    )
    found = report_to_json(dataclasses.replace(report, measurements=(*report.measurements, bare, odd)))
    for row in found["measurements"]:
        assert {name for name in FIGURES if row[name] is None} == set(row["reasons"])
        assert all(row["reasons"].values())
    assert found["measurements"][3]["reasons"]["top1"] == "no labels"
    assert found["measurements"][4]["reasons"] == {"loss": "not a finite number: nan"}


def test_paths_are_absolute_or_relative_to_the_report(tmp_path: Path):
    report = full_report(str(tmp_path / "run"))
    found = report_to_json(report)["artifacts"]
    assert found["model"] == str(tmp_path / "run" / "tuned.pt")
    inside = report_to_json(report, relative_to=tmp_path / "run")["artifacts"]
    assert inside == {"model": "tuned.pt", "onnx": "model.onnx", "plan": "plan.json", "report": "report.json"}
    beside = report_to_json(report, relative_to=tmp_path / "other")["artifacts"]
    assert beside["model"] == "../run/tuned.pt"
    without = dataclasses.replace(report, artifacts={"onnx": None})
    assert report_to_json(without, relative_to=tmp_path)["artifacts"] == {"onnx": None}


def test_a_report_comes_back_from_its_json(tmp_path: Path):
    report = full_report(str(tmp_path / "run"))
    text = json.dumps(report_to_json(report))
    assert report_from_json(json.loads(text)) == report
    moved = report_to_json(report, relative_to=tmp_path / "run")
    assert report_from_json(moved, relative_to=tmp_path / "run") == report


def test_unknown_keys_are_ignored_and_extra_ones_may_be_missing():
    found = report_to_json(full_report()) | {"later": 1}
    for key in ("criterion", "constraints", "notes", "recipe", "trained", "selection"):
        del found[key]
    found["measurements"][0]["later"] = 2
    read = report_from_json(found)
    assert read.measurements == full_report().measurements
    assert (read.criterion, read.constraints, read.trained) == ("", (), True)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda d: d["measurements"][1].update(macs="many"), r"measurements\[1\]\.macs"),
        (lambda d: d["measurements"][0].update(n=True), r"measurements\[0\]\.n"),
        (lambda d: d["measurements"][2].pop("label"), r"measurements\[2\]\.label"),
        (lambda d: d["groups"].append(3), r"groups\[3\]"),
        (lambda d: d["checks"]["onnx_parity"].update(passed="yes"), r"checks\.onnx_parity\.passed"),
        (lambda d: d.pop("environment"), "environment"),
        (lambda d: d["artifacts"].update(model=5), r"artifacts\.model"),
    ],
)
def test_what_is_no_report_is_refused_with_the_key(change, key: str):
    value = report_to_json(full_report())
    change(value)
    with pytest.raises(InputError, match=key):
        report_from_json(value)


@pytest.mark.parametrize("value", [None, [], {}, {"schema": "sepress.report/2"}])
def test_another_schema_is_refused(value: object):
    with pytest.raises(InputError, match=r"expected 'sepress\.report/1'"):
        report_from_json(value)


# ---- words ----------------------------------------------------------------------------------------
def test_numbers_are_written_with_their_units():
    assert [count(n) for n in (0, 999, 1234, 12_345_678, 3.86e9)] == [
        "0",
        "999",
        "1.23 k",
        "12.35 M",
        "3.86 G",
    ]
    assert [size(n) for n in (12, 1_834_000)] == ["12 B", "1.83 MB"]
    assert [milliseconds(t) for t in (0.3043, 1.5, 123.45, 2000)] == [
        "0.304 ms",
        "1.50 ms",
        "123.5 ms",
        "2000 ms",
    ]
    assert (percent(0.979), points(-0.007), points(0.002)) == ("97.90%", "-0.70", "+0.20")


def test_cells_compare_with_the_base_and_latency_uses_the_interleaved_ratio():
    base, pruned, tuned = full_report().measurements
    assert cell(TOP1, tuned, base) == ("97.90%", "-0.70")
    assert cell(MACS, tuned, base) == ("6.00 M", "0.50x")
    assert cell(LATENCY, tuned, base) == ("0.750 ms", "0.48x")
    assert cell(BYTES, pruned, base) == ("-", "")
    assert cell(MACS, base, base) == ("12.00 M", "")
    other_split = dataclasses.replace(tuned, split="val")
    assert cell(TOP1, other_split, base) == ("97.90%", "")
    plain = dataclasses.replace(tuned, latency=None)
    assert cell(LATENCY, plain, base) == ("0.750 ms", "0.50x")


def test_empty_cells_are_explained_once():
    assert missing(full_report(), (TOP1, BYTES, LATENCY)) == [
        "ONNX, Latency of pruned: not exported in this run"
    ]


def test_the_summary_says_what_became_of_the_network():
    assert summary(full_report()) == (
        "The tuned network has 50% fewer multiply-accumulates (MACs) and 75% fewer parameters than the base. "
        "It puts 97.90% of 1,000 images (test) into the right class, 0.70 points fewer than before (98.60%). "
        "An image takes 0.48x the time on onnxruntime 1.20.0, CPU, 1 thread, batch 1."
    )


def test_the_summary_of_one_net_alone_compares_nothing():
    base = dataclasses.replace(full_report(), measurements=full_report().measurements[:1])
    assert summary(base) == (
        "The network has 12.00 M multiply-accumulates (MACs) an image and 400.0 k parameters. "
        "It puts 98.60% of 1,000 images (test) into the right class."
    )
    assert summary(dataclasses.replace(base, measurements=())) == "Nothing was measured."


def test_noise_and_slowness_are_said():
    report = full_report()
    base, _, tuned = report.measurements
    noisy = dataclasses.replace(tuned, latency=latency(0.75, 0.48, noisy=True))
    assert "too noisy to tell" in summary(dataclasses.replace(report, measurements=(base, noisy)))
    slow = dataclasses.replace(tuned, latency=latency(1.8, 1.2))
    assert "1.20x the time" in summary(dataclasses.replace(report, measurements=(base, slow)))
    assert "it is not faster" in summary(dataclasses.replace(report, measurements=(base, slow)))


def test_checks_are_passed_failed_or_not_judged():
    assert check_words("onnx_parity", Check(True, 2e-6, argmax_agreement=1.0)) == (
        "ONNX = torch",
        "passed",
        "ONNX Runtime gives what torch gives on real images; "
        "relative error 2.0e-06; same top class on 100.0%",
    )
    assert check_words("onnx_parity", Check(False, 0.3, reason="off"))[1:] == (
        "FAILED",
        "relative error 3.0e-01; off",
    )
    assert check_words("some_check", Check(None, None, reason="not run")) == (
        "some check",
        "not judged",
        "not run",
    )


def test_the_worst_class_comes_first():
    assert class_changes(full_report())[0] == ("one", 0.98, 0.93)
    assert class_changes(dataclasses.replace(full_report(), measurements=())) == []


# ---- Markdown -------------------------------------------------------------------------------------
def test_markdown_tells_everything_that_a_report_must_have():
    text = report_to_markdown(full_report())
    for expected in (
        "# quickstart\n\nThe tuned network has 50% fewer",
        "| **base** | 98.60% | 100.00% | 0.0500 | 12.00 M | 24.00 M | 400.0 k | 1.60 MB | 1.50 ms |",
        "| **tuned** | 97.90% (-0.70) | 99.90% (-0.10) | 0.0700 | 6.00 M (0.50x) | 12.00 M (0.50x) "
        "| 100.0 k (0.25x) | 400.0 kB (0.25x) | 0.750 ms (0.48x) |",
        "- ONNX, Latency of pruned: not exported in this run",
        "| `top1_drop<=0.01` | met | 0.007: base 0.986, tuned 0.979 |",
        "| `stem` | gated | contribution | 8 | 4 | 50% | 0.438 |",
        "| `fc` | frozen | not judged; frozen: it is the net's output | 3 | 3 | 100% | - |",
        "    0  0.000 0.125 0.250 0.375 0.500 0.625 0.750 0.875",
        "| one | 98.00% | 93.00% | -5.00 |",
        "- Accuracy of base, pruned, tuned: split test (1,000 images).",
        "- Weights of base: those of epoch 7, by top-1 on validation, 98.40%.",
        "- Latency: onnxruntime 1.20.0, CPU, 1 thread, batch 1, on A Processor; median of 30 inter",
        "- Latency of tuned: 0.750 ms (p10 0.675 ms, p90 0.825 ms), 0.48x of base (p10 0.47x, p90 0.49x).",
        "- digits: a fixed stratified split",
        "| model | `tuned.pt` |",
        "| torch | 2.9 |",
    ):
        assert expected in text
    assert "/runs" not in text


def test_accuracy_on_the_split_that_chose_the_weights_is_called_flattering():
    report = full_report()
    rows = tuple(dataclasses.replace(row, split="val") for row in report.measurements)
    assert "flatters" in report_to_markdown(dataclasses.replace(report, measurements=rows))
    assert "flatters" not in report_to_markdown(report)
    assert "No weights were selected" in report_to_markdown(dataclasses.replace(report, selection={}))


def test_markdown_of_names_with_markup_keeps_its_tables():
    report = dataclasses.replace(full_report(), name="<b>a|b</b>", notes=("see *this*\nline",))
    text = report_to_markdown(report)
    assert text.startswith("# &lt;b&gt;a|b&lt;/b&gt;\n")
    assert "- see \\*this\\* line" in text
    row = GroupRow("a|b", "gated", 2, 2, "x|y", None)
    table = report_to_markdown(dataclasses.replace(report, groups=(row,)))
    assert "| `a\\|b` | gated | x\\|y | 2 | 2 | 100% | - |" in table


def test_untrained_nets_are_called_untrained_everywhere():
    report = dataclasses.replace(full_report(), trained=False)
    assert "| **base** (untrained) |" in report_to_markdown(report)
    assert "UNTRAINED (random weights)" in report_to_markdown(report)
    assert "UNTRAINED (random weights)" in printed(report).splitlines()[0]
    assert report_to_json(report)["trained"] is False
    assert "UNTRAINED" not in report_to_markdown(full_report()) + printed(full_report())


# ---- terminal -------------------------------------------------------------------------------------
def test_the_closing_table_fits_sixty_columns_with_every_figure_whole():
    lines = printed(full_report(), width=60).splitlines()
    assert max(map(len, lines)) <= 60
    table = {line.split()[0]: " ".join(line.split()) for line in lines[:8] if line.split()}
    assert lines[0].split() == ["Top-1", "MACs", "Params", "ONNX", "Latency"]
    assert table["base"] == "base 98.60% 12.00 M 400.0 k 1.60 MB 1.50 ms"
    assert table["pruned"] == "pruned 90.00% 6.00 M 100.0 k - -"
    assert table["tuned"] == "tuned 97.90% 6.00 M 100.0 k 400.0 kB 0.750 ms"
    assert table["-0.70"] == "-0.70 0.50x 0.25x 0.25x 0.48x"


def test_checks_and_files_follow_the_table():
    text = printed(full_report(), width=200)
    assert (
        "Masked = removed: passed (the pruned net gives what the masked one gives; relative error 3.1e-07)"
        in text
    )
    assert "top1_drop<=0.01: met (0.007: base 0.986, tuned 0.979)" in text
    assert "1 of 3 groups of channels got narrower; judged by: contribution (2)." in text
    assert text.index("Masked") < text.index("Files in /runs/quickstart:") < text.index("model.onnx")


def test_a_pipe_gets_neither_colour_nor_interpreted_markup():
    report = dataclasses.replace(
        full_report(), checks={"[bold]x[/bold]": Check(False, None, reason="[red]no[/red]")}
    )
    text = printed(report)
    assert "\x1b" not in text
    assert "[bold]x[/bold]: FAILED ([red]no[/red])" in text


def test_an_empty_report_renders():
    empty = Report("nothing", (), (), {}, {}, {}, "")
    assert "Nothing was measured." in printed(empty)
    assert report_to_markdown(empty).startswith("# nothing\n\nNothing was measured.")
    assert report_from_json(report_to_json(empty)) == empty


def test_the_package_imports_neither_torch_nor_rich():
    code = "import sys, sepress.report; print(sorted({'torch', 'rich', 'numpy', 'onnx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
