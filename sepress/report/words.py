"""A report's figures as words: units, ratios to the base, and sentences that a newcomer understands.

Fractions become percent here and nowhere else. ASCII only, so that any pipe can carry it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sepress.report.as_json import UNSTATED
from sepress.types import JSON, Check, Measurement, Report

BASE = "base"
NOTHING = "-"  # what a cell shows where nothing was measured; the reason stands below the table


# ---- numbers --------------------------------------------------------------------------------------
def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f}%"


def points(difference: float) -> str:
    """A difference of two fractions in percentage points, signed."""
    return f"{100 * difference:+.2f}"


def count(number: float) -> str:
    """Three or four digits with k, M or G; small whole numbers in full."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= factor:
            return f"{number / factor:.{_decimals(number / factor)}f}{unit}"
    return f"{number:.0f}"


def size(number_of_bytes: float) -> str:
    return count(number_of_bytes) + ("B" if number_of_bytes >= 1e3 else " B")


def milliseconds(value: float) -> str:
    return f"{value:.{_decimals(value)}f} ms"


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def images(n: int | None) -> str:
    return "" if n is None else f"{n:,} image" + ("" if n == 1 else "s")


# ---- the table's columns --------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """A figure of a measurement: what it is called, how it is written, how it compares to the base."""

    title: str
    field: str
    write: Callable[[Any], str]
    compared: bool = True  # by a ratio
    in_points: bool = False  # by a difference instead


TOP1 = Column("Top-1", "top1", percent, in_points=True)
TOP5 = Column("Top-5", "top5", percent, in_points=True)
LOSS = Column("Loss", "loss", lambda value: f"{value:.4f}", compared=False)
MACS = Column("MACs", "macs", count)
FLOPS = Column("FLOPs", "macs", lambda macs: count(2 * macs))
PARAMS = Column("Params", "params", count)
BYTES = Column("ONNX", "bytes", size)
LATENCY = Column("Latency", "latency_ms", milliseconds)


def base_of(report: Report) -> Measurement | None:
    return next((row for row in report.measurements if row.label == BASE), None)


def cell(column: Column, row: Measurement, base: Measurement | None) -> tuple[str, str]:
    """Return the figure as written and how it compares to the base's ('' where it can't)."""
    value = getattr(row, column.field)
    if value is None:
        return NOTHING, ""
    written = column.write(value)
    if base is None or row is base or not column.compared:
        return written, ""
    before = getattr(base, column.field)
    if before is None:
        return written, ""
    if column.in_points:
        same_images = (row.split, row.n) == (base.split, base.n)
        return written, points(value - before) if same_images else ""
    ratio = latency_ratio(row, base) if column is LATENCY else value / before if before else None
    return written, "" if ratio is None else times(ratio)


def latency_ratio(row: Measurement, base: Measurement) -> float | None:
    """The ratio that the interleaved timer took round by round, else that of the medians."""
    if row.latency is not None and row.latency.get("ratio_to") == base.label and row.latency.get("ratio"):
        return float(row.latency["ratio"])
    if row.latency_ms is None or not base.latency_ms:
        return None
    return row.latency_ms / base.latency_ms


def missing(report: Report, columns: tuple[Column, ...]) -> list[str]:
    """Say why cells are empty, a line a reason: 'Top-1, Loss of pruned: not evaluated in this run'."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for row in report.measurements:
        for column in columns:
            if getattr(row, column.field) is None:
                reason = row.reasons.get(column.field, UNSTATED)
                by_reason.setdefault((reason, row.label), []).append(column.title)
    labels: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, label), titles in by_reason.items():
        labels.setdefault((reason, tuple(titles)), []).append(label)
    return [
        f"{', '.join(titles)} of {', '.join(rows)}: {reason}" for (reason, titles), rows in labels.items()
    ]


# ---- sentences ------------------------------------------------------------------------------------
UNTRAINED = "The network is UNTRAINED (random weights): its accuracy means nothing."


def summary(report: Report) -> str:
    """Say in a few sentences what became of the network."""
    said = [] if report.trained else [UNTRAINED]
    if not report.measurements:
        return " ".join([*said, "Nothing was measured."])
    final, base = report.measurements[-1], base_of(report)
    if base is None or final is base:
        said.append(_size_sentence(final))
        base = None
    else:
        said.append(_smaller_sentence(final, base))
    said += [_accuracy_sentence(final, base), _time_sentence(final, base)]
    return " ".join(sentence for sentence in said if sentence)


def _size_sentence(row: Measurement) -> str:
    parts = []
    if row.macs is not None:
        parts.append(f"{count(row.macs)} multiply-accumulates (MACs) an image")
    if row.params is not None:
        parts.append(f"{count(row.params)} parameters")
    return f"The network has {' and '.join(parts)}." if parts else ""


def _smaller_sentence(row: Measurement, base: Measurement) -> str:
    names = {"macs": "multiply-accumulates (MACs)", "params": "parameters"}
    parts = []
    for field, name in names.items():
        before, after = getattr(base, field), getattr(row, field)
        if before and after is not None:
            change = after / before - 1
            more = "more" if change > 0 else "fewer"
            parts.append(f"{percent(abs(change), 0)} {more} {name}")
    return f"The {row.label} network has {' and '.join(parts)} than the {base.label}." if parts else ""


def _accuracy_sentence(row: Measurement, base: Measurement | None) -> str:
    if row.top1 is None:
        return ""
    said = (
        f"It puts {percent(row.top1)} of {images(row.n) or 'the images'} ({row.split}) into the right class"
    )
    if base is None or base.top1 is None or (base.split, base.n) != (row.split, row.n):
        return f"{said}."
    change = round(100 * (row.top1 - base.top1), 2)
    if change == 0:
        return f"{said}, as many as before."
    more = "fewer" if change < 0 else "more"
    return f"{said}, {abs(change):.2f} points {more} than before ({percent(base.top1)})."


def _time_sentence(row: Measurement, base: Measurement | None) -> str:
    ratio = None if base is None else latency_ratio(row, base)
    if ratio is None or base is None:
        return ""
    if _noisy(row) or _noisy(base):
        return f"The machine was too noisy to tell how its time compares (about {times(ratio)})."
    verdict = "" if ratio < 1 else ": it is not faster"
    return f"An image takes {times(ratio)} the time on {runtime(row.latency or {})}{verdict}."


def _noisy(row: Measurement) -> bool:
    return bool(row.latency and row.latency.get("noisy"))


def runtime(latency: Mapping[str, JSON]) -> str:
    """Say under which conditions a latency was taken."""
    parts = [str(latency.get("runtime") or "an unnamed runtime")]
    if latency.get("provider"):
        parts.append(str(latency["provider"]).removesuffix("ExecutionProvider"))
    if latency.get("threads"):
        parts.append(f"{latency['threads']} thread" + ("" if latency["threads"] == 1 else "s"))
    if latency.get("batch"):
        parts.append(f"batch {latency['batch']}")
    return ", ".join(parts)


def latency_conditions(report: Report) -> list[str]:
    """One line for each set of conditions that latencies were taken under, and one where noise hid them."""
    lines: dict[str, None] = {}
    for row in report.measurements:
        if row.latency is None:
            continue
        rounds, cpu = row.latency.get("rounds"), row.latency.get("cpu")
        line = f"Latency: {runtime(row.latency)}"
        line += f", on {cpu}" if cpu else ""
        line += f"; median of {rounds} interleaved rounds" if rounds else ""
        lines[line + "."] = None
    noisy = [row.label for row in report.measurements if _noisy(row)]
    if noisy:
        lines[
            f"The machine was too noisy to tell the latency of {', '.join(noisy)}: run again on a quiet one."
        ] = None
    return list(lines)


def latency_spreads(report: Report) -> list[str]:
    """One line for each latency with the spread over its rounds, its own and that of the ratio."""
    lines = []
    for row in report.measurements:
        figures = row.latency or {}
        if row.latency_ms is None or figures.get("p10_ms") is None or figures.get("p90_ms") is None:
            continue
        line = f"Latency of {row.label}: {milliseconds(row.latency_ms)}"
        line += f" (p10 {milliseconds(figures['p10_ms'])}, p90 {milliseconds(figures['p90_ms'])})"
        if figures.get("ratio_to") not in (None, row.label):
            line += f", {times(figures['ratio'])} of {figures['ratio_to']}"
            line += f" (p10 {times(figures['ratio_p10'])}, p90 {times(figures['ratio_p90'])})"
        lines.append(f"{line}.")
    return lines


_CHECKS = {
    "masked_equals_removed": ("Masked = removed", "the pruned net gives what the masked one gives"),
    "onnx_parity": ("ONNX = torch", "ONNX Runtime gives what torch gives on real images"),
}


def check_words(name: str, check: Check) -> tuple[str, str, str]:
    """Return a check's title, its verdict (passed, FAILED or not judged) and what stands behind it."""
    title, claim = _CHECKS.get(name, (name.replace("_", " "), ""))
    verdict = {True: "passed", False: "FAILED", None: "not judged"}[check.passed]
    details = [claim] if check.passed and claim else []
    if check.relative_error is not None and math.isfinite(check.relative_error):
        details.append(f"relative error {check.relative_error:.1e}")
    if check.argmax_agreement is not None:
        details.append(f"same top class on {percent(check.argmax_agreement, 1)}")
    if check.reason:
        details.append(check.reason)
    return title, verdict, "; ".join(details)


def constraint_words(constraint: Mapping[str, JSON]) -> tuple[str, str, str]:
    """Return a constraint's text, its verdict and the figures behind it."""
    verdict = "met" if constraint.get("passed") else "NOT MET"
    if constraint.get("actual") is None:
        return str(constraint.get("constraint")), verdict, str(constraint.get("reason") or "can't be told")
    figures = constraint.get("figures")
    actual = f"{constraint['actual']:.6g}"
    return str(constraint.get("constraint")), verdict, f"{actual}: {figures}" if figures else actual


def selection_words(report: Report) -> list[str]:
    """Say what was chosen on which split, and which split the accuracies come from."""
    splits: dict[str, list[str]] = {}
    for row in report.measurements:
        if row.split is not None:
            where = f"split {row.split}" + (f" ({images(row.n)})" if row.n is not None else "")
            splits.setdefault(where, []).append(row.label)
    lines = [f"Accuracy of {', '.join(labels)}: {where}." for where, labels in splits.items()]
    for label, chosen in report.selection.items():
        top1 = chosen.get("val_top1")
        best = "" if top1 is None else f", {percent(top1)}"
        lines.append(
            f"Weights of {label}: those of epoch {chosen.get('epoch')}, by top-1 on validation{best}."
        )
    if not report.selection:
        lines.append("No weights were selected by accuracy in this run.")
    elif any(row.split == "val" for row in report.measurements):
        lines.append("Validation chose the weights, so accuracy on it flatters them.")
    return lines


def class_changes(report: Report) -> list[tuple[str, float, float]]:
    """Return (class, base top-1, final top-1), the largest loss first; empty where either is not known."""
    base = base_of(report)
    final = report.measurements[-1] if report.measurements else None
    if base is None or final is None or final is base or not base.per_class or not final.per_class:
        return []
    rows = [(k, base.per_class[k], final.per_class[k]) for k in base.per_class if k in final.per_class]
    return sorted(rows, key=lambda row: row[2] - row[1])
