"""One report, three renderings; every figure is the reader's check of another."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from sepress.criteria import CRITERIA
from sepress.errors import InputError
from sepress.report import (
    SCHEMA,
    render_groups,
    render_report,
    report_from_json,
    report_to_annotations,
    report_to_json,
    report_to_junit,
    report_to_markdown,
)
from sepress.report.words import (
    _CRITERIA,
    BYTES,
    LATENCY,
    MACS,
    TOP1,
    cell,
    check_words,
    class_changes,
    comparisons,
    count,
    data_words,
    milliseconds,
    missing,
    percent,
    plain,
    points,
    selection_words,
    size,
    summary,
)
from sepress.types import Check, GroupRow, Measurement, Preprocessing, Report

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
    data = {
        "path": "photos/digits",
        "fingerprint": "5eed",
        "splits": {"train": 3500, "val": 500, "test": 1000},
        "labels_reason": None,
        "notes": ["classes are taken in the data's order"],
        "corrupt": {"count": 0, "names": []},
    }
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
        notes=("classes are taken in the data's order", "digits: a fixed stratified split"),
        selection={"base": {"epoch": 7, "val_top1": 0.984}},
        data=data,
        preprocessing={
            "input_size": [1, 28, 28],
            "mean": [0.1307],
            "std": [0.3081],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "origin": "sepress: MNIST's training images",
        },
    )


def unmeasured(report: Report) -> Report:
    """The report of a ranking: nothing evaluated, nothing exported, no plan."""
    reasons = dict.fromkeys(("split", "n", "top1", "top5", "loss"), "not evaluated in this run")
    figures = dict.fromkeys(reasons | NOT_EXPORTED)
    base = dataclasses.replace(
        report.measurements[0], **figures, per_class=None, reasons=reasons | NOT_EXPORTED
    )
    return dataclasses.replace(
        report,
        measurements=(base,),
        groups=tuple(dataclasses.replace(row, width_after=row.width_before) for row in report.groups),
        artifacts={"ranking": "/runs/r/ranking.json", "plan": None},
        constraints=(),
        selection={},
    )


def shown(renderable: object, *, width: int = 60) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def printed(report: Report, *, width: int = 60) -> str:
    return shown(render_report(report), width=width)


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
    later = ("criterion", "constraints", "notes", "recipe", "trained", "selection", "data", "preprocessing")
    for key in later:
        del found[key]
    found["measurements"][0]["later"] = 2
    read = report_from_json(found)
    assert read.measurements == full_report().measurements
    assert (read.criterion, read.constraints, read.trained) == ("", (), True)
    assert (read.data, read.preprocessing) == ({}, {})
    assert "photos" not in printed(read) + report_to_markdown(read)


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
        (lambda d: d.update(data=[]), "'data'"),
        (lambda d: d["data"].update(path=5), r"data\.path"),
        (lambda d: d["data"]["splits"].update(val="ten"), r"data\.splits\.val"),
        (lambda d: d["data"]["notes"].append(5), r"data\.notes\[1\]"),
        (lambda d: d["data"]["corrupt"].update(count=True), r"data\.corrupt\.count"),
        (lambda d: d["data"]["corrupt"].update(names="a.png"), r"data\.corrupt\.names"),
        (lambda d: d["preprocessing"].update(mean=[None]), r"preprocessing\.mean\[0\]"),
        (lambda d: d["preprocessing"].update(input_size=[1.5]), r"preprocessing\.input_size\[0\]"),
        (lambda d: d["preprocessing"].update(origin=5), r"preprocessing\.origin"),
        (lambda d: d["selection"].update(base=7), r"selection\.base"),
        (lambda d: d["notes"].append({}), r"notes\[2\]"),
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


def test_data_and_preprocessing_keep_their_values_and_the_given_path(tmp_path: Path):
    preprocessing = Preprocessing((3, 8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), origin="typed: mean")
    report = dataclasses.replace(full_report(), preprocessing=dataclasses.asdict(preprocessing))
    found = json.loads(json.dumps(report_to_json(report, relative_to=tmp_path), allow_nan=False))
    assert found["data"] == report.data
    assert found["data"]["path"] == "photos/digits"
    assert found["preprocessing"] == {
        "input_size": [3, 8, 8],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "origin": "typed: mean",
    }


def test_what_json_cannot_carry_is_escaped_or_null():
    corrupt = {"count": 1, "names": ["rose/\udcff.jpg"]}  # a file name that is not UTF-8
    report = dataclasses.replace(full_report(), data={"corrupt": corrupt}, environment={"x": float("inf")})
    found = report_to_json(report)
    assert json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    assert found["data"]["corrupt"]["names"] == ["rose/\\udcff.jpg"]
    assert found["environment"] == {"x": None}
    assert "rose/\\\\udcff.jpg" in report_to_markdown(report)  # a backslash of Markdown each
    assert report_to_markdown(dataclasses.replace(report, recipe={"a": "\udcff"})).encode()


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


def test_a_saved_file_that_loads_equal_is_explained():
    assert check_words("saved_equals_loaded", Check(True, 0.0)) == (
        "Saved = loaded",
        "passed",
        "the model's file gives back the same net, bit for bit; relative error 0",
    )


def test_rows_without_accuracy_are_on_no_split_and_the_reason_is_said_once():
    report = full_report()
    base, pruned, tuned = report.measurements
    nothing = dict.fromkeys(("top1", "top5", "loss"))
    reasons = dict.fromkeys(nothing, "no labels") | NOT_EXPORTED
    pruned = dataclasses.replace(pruned, split="test", n=0, **nothing, reasons=reasons)
    report = dataclasses.replace(report, measurements=(base, pruned, tuned))
    assert selection_words(report)[0] == "Accuracy of base, tuned: test, 1,000 images."
    text = report_to_markdown(report)
    assert text.count("no labels") == printed(report).count("no labels") == 1
    assert " 0 images" not in text + printed(report)
    ranked = unmeasured(report)
    assert selection_words(ranked) == ["No weights were selected by accuracy in this run."]
    assert "Top-1: right" not in printed(ranked)
    assert "Top-1 of base: not evaluated in this run" in printed(ranked)


def test_accuracies_on_different_images_each_name_theirs():
    report = full_report()
    base, pruned, tuned = report.measurements
    pruned = dataclasses.replace(pruned, n=10)
    tuned = dataclasses.replace(tuned, split="val", n=500)
    report = dataclasses.replace(report, measurements=(base, pruned, tuned))
    assert (
        "Top-1: right at the first guess (base: test, 1,000 images; pruned: test, 10 images; "
        "tuned: val, 500 images)." in printed(report, width=200)
    )
    text = report_to_markdown(report)
    assert "- Accuracy of pruned: test, 10 images.\n- Accuracy of tuned: val, 500 images." in text


def test_without_a_base_nothing_is_compared_and_that_is_said():
    report = full_report()
    base, pruned, tuned = report.measurements
    alone = dataclasses.replace(report, measurements=(tuned,))
    said = "No ratios and no differences: there is no base in this report to compare with."
    assert comparisons(alone) == [said]
    assert f"- {said}" in report_to_markdown(alone)
    assert said in printed(alone, width=100)
    assert summary(alone).startswith("The tuned network has 6.00 M multiply-accumulates (MACs) an image")
    assert "ratio to the base" not in report_to_markdown(alone)
    for rows in ((base,), (base, pruned), ()):
        assert comparisons(dataclasses.replace(report, measurements=rows)) == []
    only = report_to_markdown(dataclasses.replace(report, measurements=(base,)))
    assert "ratio to the base" not in only
    assert "## Classes" not in only


def test_a_tuned_net_of_the_base_size_is_not_called_smaller():
    report = full_report()
    base, _, tuned = report.measurements
    tuned = dataclasses.replace(tuned, macs=base.macs, params=base.params)
    said = summary(dataclasses.replace(report, measurements=(base, tuned)))
    assert said.startswith("The tuned network is as large as the base. It puts")


def test_unreadable_images_are_counted_and_named_only_where_there_are_any():
    report = full_report()
    assert "could not be read" not in printed(report) + report_to_markdown(report)
    names = [f"rose/{i}.jpg" for i in range(5)]
    report = dataclasses.replace(report, data=report.data | {"corrupt": {"count": 7, "names": names}})
    said = "7 images could not be read and were left out: rose/0.jpg, rose/1.jpg, rose/2.jpg and 4 more."
    assert said in printed(report, width=200)
    assert f"left out: {', '.join(names)} and 2 more." in report_to_markdown(report)
    one = dataclasses.replace(report, data={"corrupt": {"count": 1, "names": ["a.jpg"]}})
    assert data_words(one, named=3) == ["1 image could not be read and was left out: a.jpg."]


def test_labels_that_are_not_used_are_explained_once():
    report = full_report()
    data = report.data | {"labels_reason": "3 classes, 10 outputs", "notes": []}
    report = dataclasses.replace(report, data=data)
    assert "The data's labels are not used: 3 classes, 10 outputs." in data_words(report, named=3)
    reasons = {"top1": "3 classes, 10 outputs"}
    row = dataclasses.replace(report.measurements[0], top1=None, reasons=reasons)
    report = dataclasses.replace(report, measurements=(row,))
    assert printed(report, width=200).count("3 classes, 10 outputs") == 1


def test_every_criterion_is_explained():
    assert set(_CRITERIA) == set(CRITERIA)


def test_plain_text_moves_no_cursor():
    assert plain("a\nb\tc\x1b[31md\u202e\udcff \u00fc") == "a b c\\x1b[31md\\u202e\\udcff \u00fc"


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
        "- Accuracy of base, pruned, tuned: test, 1,000 images.",
        "- Data: photos/digits (3,500 train, 500 val, 1,000 test images).\n"
        "- Note: classes are taken in the data's order\n"
        "- Preprocessing: input 1 x 28 x 28, mean 0.1307, std 0.3081, bilinear resizing, centre crop 100.0%, "
        "taken from 'sepress: MNIST's training images'.\n",
        "Criterion: contribution, how much a channel varies",
        "- Weights of base: those of epoch 7, by top-1 on validation, 98.40%.",
        "- Latency: onnxruntime 1.20.0, CPU, 1 thread, batch 1, on A Processor; median of 30 inter",
        "- Latency of tuned: 0.750 ms (p10 0.675 ms, p90 0.825 ms), 0.48x of base (p10 0.47x, p90 0.49x).",
        "- digits: a fixed stratified split",
        "| model | `tuned.pt` |",
        "| report (JSON) | `report.json` |",
        "| torch | 2.9 |",
    ):
        assert expected in text
    assert "/runs" not in text
    assert text.count("classes are taken in the data's order") == 1


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
    assert "| a\\|b | gated | x\\|y | 2 | 2 | 100% | - |" in table


def test_hostile_names_break_no_table_and_no_line():
    name = "a|b`c\\|\n\r\x1b[2J\u202e[x](y) _z_ se_hidden <i>"
    report = full_report()
    rows = tuple(
        dataclasses.replace(row, label=name, reasons={"bytes": name}) for row in report.measurements[1:]
    )
    report = dataclasses.replace(
        report,
        name=name,
        measurements=(report.measurements[0], *rows),
        groups=(GroupRow(name, "gated", 4, 2, name, 0.5, (0.5,) * 4, name),),
        checks={name: Check(False, None, reason=name)},
        constraints=({"constraint": name, "actual": None, "passed": False, "reason": name},),
        artifacts={name: f"/runs/{name}", "report": "/runs/report.json"},
        environment={name: name},
        notes=(name,),
        data={"path": name, "notes": [name], "corrupt": {"count": 1, "names": [name]}},
        preprocessing={"origin": name},
        selection={name: {"epoch": 1}},
    )
    text = report_to_markdown(report)
    escaped = "a{}b\\`c\\\\{}  \\\\x1b[2J\\\\u202e[x\\](y) \\_z\\_ se_hidden &lt;i&gt;"
    assert text.startswith(f"# {escaped.format('|', '|')}\n")
    assert f"| {escaped.format(*2 * [chr(92) + '|'])} | gated |" in text
    tables = [line.replace("\\\\", "").replace("\\|", "") for line in text.splitlines() if line[:1] == "|"]
    columns = {line.count("|") - 1 for line in tables}
    assert columns == {9, 3, 7, 4, 2}  # results, checks and constraints, groups, classes, files
    assert "[x](y)" not in text.split("<details><summary>Recipe")[0]
    for output in (text, printed(report), shown(render_groups(report))):
        assert not {"\x1b", "\r", "\u202e"} & set(output)


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
    assert "1 of 3 groups of channels got narrower; judged by: contribution (1)." in text
    assert "Data: photos/digits (3,500 train, 500 val, 1,000 test images).\n" in text.replace(" \n", "\n")
    assert "Preprocessing: input 1 x 28 x 28, taken from 'sepress: MNIST's training images'." in text
    assert "Note: classes are taken in the data's order" in text
    assert text.index("Masked") < text.index("Files in /runs/quickstart:") < text.index("model.onnx")


def test_files_have_plain_names_and_only_those_elsewhere_a_whole_path():
    roles = ("onnx", "base_onnx", "plan", "ranking", "report", "report_md", "recipe", "some_picture")
    artifacts = {role: f"/runs/q/{role}.x" for role in roles} | {"model": "/models/m.pt", "none": None}
    lines = printed(dataclasses.replace(full_report(), artifacts=artifacts)).splitlines()
    files = [line.strip() for line in lines[lines.index("Files in /runs/q:") + 1 :]]
    assert files == [
        "ONNX               onnx.x",
        "ONNX of the base   base_onnx.x",
        "pruning plan       plan.x",
        "ranking            ranking.x",
        "report (JSON)      report.x",
        "report (Markdown)  report_md.x",
        "recipe             recipe.x",
        "some picture       some_picture.x",
        "model              /models/m.pt",
    ]


def test_a_ranking_is_not_described_as_a_pruning():
    ranked = unmeasured(full_report())
    text = printed(ranked, width=200)
    assert "3 groups of channels, none pruned; judged by: contribution (2)." in text
    assert "narrower" not in text
    assert "| `stem` | gated | contribution | 8 | 0.438 |" in report_to_markdown(ranked)
    planned = dataclasses.replace(ranked, artifacts={"plan": "/runs/r/plan.json"})
    assert "0 of 3 groups of channels got narrower" in printed(planned, width=200)


def test_a_report_without_figures_has_no_empty_table():
    bare = Measurement("base", *([None] * 10), reasons={})
    ranked = unmeasured(full_report())
    for rows in ((), (bare,)):
        report = dataclasses.replace(ranked, measurements=rows)
        text = printed(report, width=200)
        assert "Latency  " not in text
        assert "Nothing was measured." in text
        assert "3 groups of channels, none pruned" in text
    assert "Top-1, MACs, Params, ONNX, Latency of base: not measured" in text


def test_the_table_of_groups_fits_sixty_columns_with_every_name_whole():
    text = shown(render_groups(full_report()))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60
    cells = [line.split() for line in lines[:8]]
    assert ["stem", "gated", "8", "->", "4", "0.438", "contribution"] in cells
    assert ["block.se.fc1", "se-hidden", "4", "-", "contribution"] in cells
    said = " ".join(text.split())
    assert "Criterion: contribution, how much a channel varies" in said
    assert "gated = scaled by an SE gate; se-hidden = inside an SE block; frozen = kept whole." in said
    assert "ungated" not in said
    assert "UNTRAINED" not in said


def test_long_groups_and_evidence_fold_and_nothing_is_lost():
    name, evidence = "features.12.block.3.0.conv_pointwise", "[b]L2[/b] of weights, since nothing reads it"
    row = GroupRow(name, "ungated", 2048, 1024, evidence, None, frozen_because=None)
    report = dataclasses.replace(full_report(), groups=(row,), criterion="mine", trained=False)
    text = shown(render_groups(report))
    assert max(map(len, text.splitlines())) <= 60
    assert "UNTRAINED (random weights)" in text.splitlines()[0]
    assert "Criterion: mine." in text
    assert "Mean exc." not in text
    wide = shown(render_groups(report), width=120)
    assert name in wide
    assert evidence in wide
    body = text.split("Criterion")[0].splitlines()[4:]
    assert "".join(line[:16].strip() for line in body).startswith("features.12")
    letters = sorted("".join(body).replace(" ", ""))
    assert letters == sorted((name + "ungated2048->1024-" + evidence).replace(" ", ""))


def test_groups_keep_their_order_and_none_are_called_none():
    report = full_report()
    text = shown(render_groups(report), width=120)
    assert text.index("stem") < text.index("block.se.fc1") < text.index("not judged; frozen: it is")
    assert shown(render_groups(dataclasses.replace(report, groups=()))) == (
        "No groups of channels were ranked.\n"
    )


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


# ---- for continuous integration -------------------------------------------------------------------
def held_report() -> Report:
    """One constraint met and one missed, one check passed, one failed and one not made."""
    missed = {
        "constraint": "worst_class_drop<=0.02",
        "actual": 0.05,
        "passed": False,
        "reason": None,
        "figures": "class one: 98 %, 93 %\nof <b>&\x00",
    }
    report = full_report()
    checks = {
        "masked_equals_removed": Check(True, 3.1e-7),
        "onnx_parity": Check(False, 0.5),
        "saved_equals_loaded": Check(None, None, reason="no model was saved in this run"),
    }
    return dataclasses.replace(report, constraints=(*report.constraints, missed), checks=checks)


def test_junit_has_a_case_for_every_constraint_and_check() -> None:
    suite = ElementTree.fromstring(report_to_junit(held_report())).find("testsuite")
    assert suite is not None
    assert suite.attrib == {
        "name": "sepress.quickstart", "tests": "5", "failures": "2", "errors": "0", "skipped": "1"
    }  # fmt: skip
    found = {
        (case.get("classname"), case.get("name")): [(child.tag, child.get("message")) for child in case]
        for case in suite
    }
    assert found == {
        ("sepress.quickstart.require", "top1_drop<=0.01"): [("system-out", None)],
        ("sepress.quickstart.require", "worst_class_drop<=0.02"): [
            ("failure", "0.05: class one: 98 %, 93 %\nof <b>&?")
        ],
        ("sepress.quickstart.check", "masked_equals_removed"): [("system-out", None)],
        ("sepress.quickstart.check", "onnx_parity"): [("failure", "relative error 0.5")],
        ("sepress.quickstart.check", "saved_equals_loaded"): [("skipped", "no model was saved in this run")],
    }


def test_annotations_are_workflow_commands_of_one_line_each() -> None:
    assert report_to_annotations(held_report()) == (
        "::notice title=quickstart%3A top1_drop<=0.01 met::0.007: base 0.986, tuned 0.979\n"
        "::error title=quickstart%3A worst_class_drop<=0.02 not met::"
        "0.05: class one: 98 %25, 93 %25%0Aof <b>&\x00\n"
        "::error title=quickstart%3A onnx_parity failed::relative error 0.5\n"
    )
