"""A report's figures as words: units, ratios to the base, and sentences that a newcomer understands.

Fractions become percent here and nowhere else. The words are ASCII, so that any pipe can carry them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sepress.report.as_json import UNSTATED
from sepress.types import JSON, NO_EXCITATION, Check, GroupRow, Measurement, Report, Variant

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


def plain(text: str) -> str:
    """One line that moves no cursor: line breaks become spaces, what else doesn't print is escaped."""
    text = "".join(" " if char in "\t\n\r" else char for char in text)
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def listed(names: Sequence[str], most: int, *, total: int = 0, between: str = ", ") -> str:
    """The first `most` names, and how many more there are (of `total` where not all are known by name)."""
    more = max(total, len(names)) - len(names[:most])
    return between.join(names[:most]) + (f" and {more:,} more" if more else "")


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


def has_figures(row: Measurement, columns: tuple[Column, ...]) -> bool:
    return any(getattr(row, column.field) is not None for column in columns)


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


def comparisons(report: Report) -> list[str]:
    """Say that there is nothing to compare with, where that is so."""
    if not report.measurements or base_of(report) is not None:
        return []
    return ["No ratios and no differences: there is no base in this report to compare with."]


# ---- sentences ------------------------------------------------------------------------------------
UNTRAINED = "The network is UNTRAINED (random weights): its accuracy means nothing."


def summary(report: Report) -> str:
    """Say in a few sentences what became of the network."""
    said = [] if report.trained else [UNTRAINED]
    found: list[str] = []
    if report.measurements:
        final, base = report.measurements[-1], base_of(report)
        if base is None or final is base:
            base = None
            found.append(_size_sentence(final))
        else:
            found.append(_smaller_sentence(final, base))
        found += [_accuracy_sentence(final, base), _time_sentence(final, base)]
    return " ".join([*said, *(list(filter(None, found)) or ["Nothing was measured."])])


def _size_sentence(row: Measurement) -> str:
    name = "The network" if row.label == BASE else f"The {row.label} network"
    parts = []
    if row.macs is not None:
        parts.append(f"{count(row.macs)} multiply-accumulates (MACs) an image")
    if row.params is not None:
        parts.append(f"{count(row.params)} parameters")
    return f"{name} has {' and '.join(parts)}." if parts else ""


def _smaller_sentence(row: Measurement, base: Measurement) -> str:
    names = {"macs": "multiply-accumulates (MACs)", "params": "parameters"}
    if row.macs is not None and (row.macs, row.params) == (base.macs, base.params):
        return f"The {row.label} network is as large as the {base.label}."
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
    where = f" ({row.split})" if row.split else ""
    said = f"It puts {percent(row.top1)} of {images(row.n) or 'the images'}{where} into the right class"
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
    if _noisy(row):
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
    "folded_equals_constant": ("Folded = constant", "the folded net gives what constant gates give"),
    "onnx_parity": ("ONNX = torch", "ONNX Runtime gives what torch gives on real images"),
    "image_parity": ("Bytes in = torch", "the file that takes bytes gives torch's probabilities"),
    "saved_equals_loaded": ("Saved = loaded", "the model's file gives back the same net, bit for bit"),
}


def check_words(name: str, check: Check) -> tuple[str, str, str]:
    """Return a check's title, its verdict (passed, FAILED or not judged) and what stands behind it."""
    title, claim = _CHECKS.get(name, (name.replace("_", " "), ""))
    verdict = {True: "passed", False: "FAILED", None: "not judged"}[check.passed]
    details = [claim] if check.passed and claim else []
    if check.relative_error is not None and math.isfinite(check.relative_error):
        error = f"{check.relative_error:.1e}" if check.relative_error else "0"
        details.append(f"relative error {error}")
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


# ---- variants of the ONNX file --------------------------------------------------------------------
def variant_titles(report: Report) -> list[str]:
    """The columns of `variant_rows`; the split of the last accuracy is named where one was measured."""
    split = next((v.final.split for v in report.variants if v.final is not None and v.final.split), None)
    return ["Top-1, val", *([f"Top-1, {split}"] if split else []), "Same class", "Size", "Latency"]


def variant_rows(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each precision, and its cells as `cell` gives them, compared to those of the float file."""
    rows: list[tuple[str, list[tuple[str, str]]]] = []
    exported = report.variants[0] if report.variants else None
    for row in report.variants:
        assert exported is not None
        cells = [cell(TOP1, row.validation, exported.validation)]
        if len(variant_titles(report)) > 4:
            known = row.final is not None
            cells.append(cell(TOP1, row.final, exported.final) if row.final and known else (NOTHING, ""))
        same = NOTHING if row.agreement is None else percent(row.agreement)
        sizes = [cell(column, row.validation, exported.validation) for column in (BYTES, LATENCY)]
        rows.append((row.precision, [*cells, (same, ""), *sizes]))
    return rows


def variant_words(report: Report) -> list[tuple[str, str, str]]:
    """For each precision its name, its verdict, and what is behind it: how, why, and the time it takes."""
    said = []
    for row in report.variants[1:]:
        timed = row.validation.latency or {}
        verdict = "NOT KEPT" if not row.kept else "kept, SLOWER" if _slower(row) else "kept"
        parts = [row.how, row.reason]
        if timed.get("noisy"):
            parts.append(f"the machine was too noisy to tell its time (about {times(timed['ratio'])})")
        elif timed.get("ratio"):
            slower = f": slower than {timed['ratio_to']}" if _slower(row) else ""
            parts.append(f"{times(timed['ratio'])} the time on {runtime(timed)}{slower}")
        said.append((row.precision, verdict, "; ".join(parts)))
    return said


def _slower(row: Variant) -> bool:
    return (row.validation.latency or {}).get("verdict") == "slower"


def accuracies(report: Report) -> dict[str, list[str]]:
    """Where accuracies come from, and whose: {'test, 1,000 images': ['base', 'tuned']}."""
    places: dict[str, list[str]] = {}
    for row in report.measurements:
        if row.top1 is not None:
            place = ", ".join(filter(None, [row.split, images(row.n)]))
            places.setdefault(place or "on unnamed images", []).append(row.label)
    return places


def selection_words(report: Report) -> list[str]:
    """Say what was chosen on which split, and which split the accuracies come from."""
    lines = [f"Accuracy of {', '.join(labels)}: {place}." for place, labels in accuracies(report).items()]
    for label, chosen in report.selection.items():
        top1 = chosen.get("val_top1")
        best = "" if top1 is None else f", {percent(top1)}"
        lines.append(
            f"Weights of {label}: those of epoch {chosen.get('epoch')}, by top-1 on validation{best}."
        )
    if not report.selection:
        lines.append("No weights were selected by accuracy in this run.")
    elif any(row.split == "val" and row.top1 is not None for row in report.measurements):
        lines.append("Validation chose the weights, so accuracy on it flatters them.")
    return lines


def data_words(report: Report, *, named: int) -> list[str]:
    """Say where the images lie, how many there are, which could not be read, and how classes were matched.

    At most `named` unreadable images are named; all are counted.
    """
    data, lines = report.data, []
    if data.get("path"):
        splits = ", ".join(f"{n:,} {split}" for split, n in (data.get("splits") or {}).items())
        lines.append(f"Data: {data['path']}" + (f" ({splits} images)." if splits else "."))
    corrupt = data.get("corrupt") or {}
    names = corrupt.get("names") or ()
    if unreadable := max(corrupt.get("count") or 0, len(names)):
        line = f"{images(unreadable)} could not be read and {'was' if unreadable == 1 else 'were'} left out"
        lines.append(f"{line}: {listed(names, named, total=unreadable)}." if names else f"{line}.")
    reason = data.get("labels_reason")
    if reason and not any(reason in row.reasons.values() for row in report.measurements):
        lines.append(f"The data's labels are not used: {reason}.")
    return lines + [f"Note: {note}" for note in data.get("notes") or ()]


def preprocessing_words(report: Report, *, figures: bool) -> list[str]:
    """Say what an image becomes and whose figures those are; with all figures where they are asked for."""
    found = report.preprocessing
    parts = []
    if found.get("input_size"):
        parts.append(f"input {' x '.join(map(str, found['input_size']))}")
    if figures:
        for key in ("mean", "std"):
            if found.get(key):
                parts.append(f"{key} {' '.join(f'{value:.4g}' for value in found[key])}")
        if found.get("interpolation"):
            parts.append(f"{found['interpolation']} resizing")
        if found.get("crop_pct"):
            parts.append(f"centre crop {percent(found['crop_pct'], 1)}")
    if found.get("origin"):
        parts.append(f"taken from '{found['origin']}'")
    return [f"Preprocessing: {', '.join(parts)}."] if parts else []


# ---- groups ---------------------------------------------------------------------------------------
_CRITERIA = {
    "fisher-reconstruction": "what the loss feels of what a channel's readers lose once others stand in",
    "reconstruction": "what a channel's readers lose once the other channels stand in for it",
    "mean-excitation": "the mean of a channel's SE gate over the calibration images",
    "contribution": "how much a channel varies (behind its gate) times the weights that read it",
    "fisher": "how strongly the loss reacts to a gate on the channel (squared gradients)",
    "gate-taylor": "how strongly the loss reacts to a gate on the channel (absolute gradients)",
    "class-excitation": "the mean of a channel's SE gate over the images of the class that excites it most",
    "excitation-spread": "how much a channel's SE gate varies over the calibration images",
    "random": "random numbers by the seed, which any criterion has to beat",
    "l1": "the absolute weights of the group's layers",
    "l2": "the squared weights of the group's layers",
    "lamp": "the squared weights of the group's layers over those of all channels that have no less",
    "bn-scale": "the scales of the group's batch norms",
    "fpgm": "how far a channel's weights lie from those of the group's others",
    "group-taylor": "weight times gradient over the group's layers",
    "hessian": "squared weight times squared gradient over the group's layers",
}
_ROLES = {
    "gated": "scaled by an SE gate",
    "ungated": "no SE gate of its own",
    "se_hidden": "inside an SE block",
    "frozen": "kept whole",
}


def role(row: GroupRow) -> str:
    return row.role.replace("_", "-")


def roles(groups: Sequence[GroupRow]) -> str:
    """Explain the roles that occur: 'gated = scaled by an SE gate; frozen = kept whole'."""
    found = {row.role: role(row) for row in groups}
    return "; ".join(f"{found[name]} = {meaning}" for name, meaning in _ROLES.items() if name in found)


def criterion(report: Report) -> str:
    """Say what the criterion is, '' where nothing was ranked."""
    if not report.criterion:
        return ""
    meaning = _CRITERIA.get(report.criterion)
    return f"Criterion: {report.criterion}" + (f", {meaning}; the lowest go first." if meaning else ".")


def widths(row: GroupRow) -> str:
    """The group's channels, before and after where they differ."""
    after = "" if row.width_after == row.width_before else f" -> {row.width_after}"
    return f"{row.width_before}{after}"


def excitation(row: GroupRow) -> str:
    return NOTHING if row.mean_excitation is None else f"{row.mean_excitation:.3f}"


def evidence(row: GroupRow) -> str:
    """What judged the group, and why it is frozen where it is."""
    if not row.frozen_because:
        return row.evidence
    why = f"frozen: {row.frozen_because}"
    return why if row.evidence == row.frozen_because else f"{row.evidence}; {why}"


def pruned(report: Report) -> bool:
    """Whether the groups' widths are those of a plan, and not only of a ranking."""
    narrower = any(row.width_after != row.width_before for row in report.groups)
    return narrower or report.artifacts.get("plan") is not None


def groups_sentence(report: Report, *, most: int = 3) -> str:
    """How many groups there are and got narrower, and what judged them, the commonest evidence first."""
    if not report.groups:
        return ""
    cut, total = sum(row.width_after < row.width_before for row in report.groups), len(report.groups)
    said = f"{cut} of {total} groups of channels got narrower"
    if not pruned(report):
        said = f"{total} group{'' if total == 1 else 's'} of channels, none pruned"
    counted = [row for row in report.groups if row.width_after < row.width_before or not pruned(report)]
    judges = Counter(row.evidence for row in counted if row.role != "frozen")
    judged = [f"{judge} ({n})" for judge, n in judges.most_common()]
    return (
        f"{said}; judged by: {listed(judged, most, between='; ')}."
        if judged
        else f"{said}, all of them frozen."
    )


def excitation_sentence(report: Report) -> str:
    """Say that no gate told of channels, '' where one did or nothing was ranked."""
    return next((sentence(note) for note in report.notes if note.startswith(NO_EXCITATION)), "")


def sentence(clause: str) -> str:
    """The clause with a capital and a full stop."""
    return f"{clause[0].upper()}{clause[1:]}."


# ---- files ----------------------------------------------------------------------------------------
_FILES = {
    "onnx": "ONNX",
    "base_onnx": "ONNX of the base",
    "onnx_fp16": "ONNX in fp16",
    "onnx_int8": "ONNX in int8",
    "image_onnx": "ONNX with preprocessing inside",
    "example": "example program",
    "plan": "pruning plan",
    "latency_table": "latency table",
    "report": "report (JSON)",
    "report_md": "report (Markdown)",
}


def files(report: Report) -> dict[str, str]:
    """What the files are called in plain words, and where those that were written lie."""
    return {
        _FILES.get(name, name.replace("_", " ")): path
        for name, path in report.artifacts.items()
        if path is not None
    }


# ---- classes --------------------------------------------------------------------------------------
def class_changes(report: Report) -> list[tuple[str, float, float]]:
    """Return (class, base top-1, final top-1), the largest loss first; empty where either is not known."""
    base = base_of(report)
    final = report.measurements[-1] if report.measurements else None
    if base is None or final is None or final is base or not base.per_class or not final.per_class:
        return []
    rows = [(k, base.per_class[k], final.per_class[k]) for k in base.per_class if k in final.per_class]
    return sorted(rows, key=lambda row: row[2] - row[1])
