"""Report -> report.md: what a reader needs to trust the figures (Blalock et al. 2020, sec. 4)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sepress.report import words
from sepress.report.as_json import relative_path
from sepress.types import GroupRow, Measurement, Report

COLUMNS = (
    words.TOP1,
    words.TOP5,
    words.LOSS,
    words.MACS,
    words.FLOPS,
    words.PARAMS,
    words.BYTES,
    words.LATENCY,
)
WORST_CLASSES = 5
UNREADABLE = 20  # images named
CHANNELS_A_LINE = 10


def report_to_markdown(report: Report) -> str:
    """Return the whole report as Markdown; paths are relative to the folder that the report lies in."""
    sections = [
        f"# {_escape(report.name)}\n\n{_escape(words.summary(report))}",
        _results(report),
        _checks(report),
        _constraints(report),
        _variants(report),
        _groups(report),
        _excitations(report.groups),
        _classes(report),
        _data(report),
        _method(report),
        _files(report),
        _environment(report),
        _recipe(report),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # file names that are no text are escaped


def _results(report: Report) -> str:
    base = words.base_of(report)
    header = ["", *(column.title for column in COLUMNS)]
    untrained = "" if report.trained else " (untrained)"
    rows = [[f"**{_escape(row.label)}**{untrained}", *_figures(row, base)] for row in report.measurements]
    if not rows:
        return ""
    text = "## Result\n\n" + _table(header, rows, numbers=len(COLUMNS))
    note = (
        "MACs are those of one image in convolutions and matrix products; FLOPs are 2 x MACs; ONNX is the "
        "file's size."
    )
    if base is not None and len(rows) > 1:
        note = f"Top-1 and top-5 change in points, the others as a ratio to the base. {note}"
    return "\n\n".join([text, note, *_bullets([*words.comparisons(report), *words.missing(report, COLUMNS)])])


def _figures(row: Measurement, base: Measurement | None) -> list[str]:
    cells = []
    for column in COLUMNS:
        value, compared = words.cell(column, row, base)
        cells.append(f"{value} ({compared})" if compared else value)
    return cells


def _checks(report: Report) -> str:
    rows = [[_escape(text) for text in words.check_words(*item)] for item in report.checks.items()]
    return "## Checks\n\n" + _table(["Check", "Verdict", "Details"], rows) if rows else ""


def _constraints(report: Report) -> str:
    rows = []
    for constraint in report.constraints:
        text, verdict, figures = words.constraint_words(constraint)
        rows.append([_code(text), verdict, _escape(figures)])
    return "## Constraints\n\n" + _table(["Constraint", "Verdict", "Measured"], rows) if rows else ""


def _variants(report: Report) -> str:
    if not report.variants:
        return ""
    titles = words.variant_titles(report)
    rows = [
        [f"**{name}**", *(f"{value} ({compared})" if compared else value for value, compared in cells)]
        for name, cells in words.variant_rows(report)
    ]
    said = [f"{name} {verdict}: {details}." for name, verdict, details in words.variant_words(report)]
    note = (
        "Validation decided what is kept; each file is compared with the float32 one, whose top class it "
        "gives for the share of validation images under 'Same class'."
    )
    table = _table(["Precision", *titles], rows, numbers=len(titles))
    return "\n\n".join(["## Precision", table, note, *_bullets(said)])


def _groups(report: Report) -> str:
    if not report.groups:
        return ""
    planned = words.pruned(report)
    rows = []
    for row in report.groups:
        kept = words.percent(row.width_after / row.width_before, 0) if row.width_before else words.NOTHING
        widths = [str(row.width_before), *([str(row.width_after), kept] if planned else [])]
        cells = [_code(row.name), words.role(row), _escape(words.evidence(row))]
        rows.append([*cells, *widths, words.excitation(row)])
    widths = ["Width", *(["After", "Kept"] if planned else [])]
    header = ["Group", "Role", "Judged by", *widths, "Mean excitation"]
    told = [
        "Channels that can only go together form a group, named after its first layer.",
        f"Roles: {words.roles(report.groups)}.",
        words.criterion(report),
        "" if planned else "Nothing was pruned.",
    ]
    text = "## Channels\n\n" + _escape(" ".join(filter(None, told)))
    return f"{text}\n\n{_table(header, rows, numbers=len(widths) + 1)}"


def _excitations(groups: Sequence[GroupRow]) -> str:
    """List the mean excitation of each channel of the gated groups, folded."""
    parts = []
    for row in groups:
        if not row.excitation:
            continue
        lines = []
        for start in range(0, len(row.excitation), CHANNELS_A_LINE):
            values = row.excitation[start : start + CHANNELS_A_LINE]
            lines.append(f"{start:>5}  " + " ".join(f"{value:.3f}" for value in values))
        parts.append(f"{_code(row.name)}\n\n```text\n" + "\n".join(lines) + "\n```")
    if not parts:
        return ""
    title = "Mean excitation of each channel over the calibration images, before pruning"
    return f"<details><summary>{title}</summary>\n\n" + "\n\n".join(parts) + "\n\n</details>"


def _classes(report: Report) -> str:
    changes = words.class_changes(report)
    if not changes:
        return ""
    rows = [
        [_escape(name), words.percent(before), words.percent(after), words.points(after - before)]
        for name, before, after in changes[:WORST_CLASSES]
    ]
    final = report.measurements[-1].label
    text = f"## Classes\n\nTop-1 by class, the largest losses of {len(changes)} classes first."
    return f"{text}\n\n" + _table(["Class", words.BASE, _escape(final), "Points"], rows, numbers=3)


def _data(report: Report) -> str:
    lines = [
        *words.data_words(report, named=UNREADABLE),
        *words.preprocessing_words(report, figures=True),
    ]
    return "\n\n".join(["## Data", *_bullets(lines)]) if lines else ""


def _method(report: Report) -> str:
    said = report.data.get("notes") or ()
    lines = [
        *words.selection_words(report),
        *words.latency_conditions(report),
        *words.latency_spreads(report),
        *(note for note in report.notes if note not in said),
    ]
    return "\n\n".join(["## How it was measured", *_bullets(lines)])


def _files(report: Report) -> str:
    place = report.artifacts.get("report")
    folder = Path(place).parent if place else None
    rows = [
        [_escape(name), _code((relative_path(path, folder) if folder else path) or "")]
        for name, path in words.files(report).items()
    ]
    return "## Files\n\n" + _table(["What", "Where"], rows) if rows else ""


def _environment(report: Report) -> str:
    rows = [
        [_escape(key), _escape(str(value))] for key, value in report.environment.items() if value is not None
    ]
    return "## Environment\n\n" + _table(["What", "Value"], rows) if rows else ""


def _recipe(report: Report) -> str:
    if not report.recipe:
        return ""
    text = json.dumps(report.recipe, indent=1, ensure_ascii=False)
    return f"<details><summary>Recipe</summary>\n\n```json\n{text}\n```\n\n</details>"


# ---- Markdown -------------------------------------------------------------------------------------
def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """Return a table whose last `numbers` columns are right-aligned; its cells are Markdown of one line."""
    rule = ["---"] * (len(header) - numbers) + ["--:"] * numbers
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bullets(lines: Iterable[str]) -> list[str]:
    text = "\n".join(f"- {_escape(line)}" for line in lines)
    return [text] if text else []


def _code(text: str) -> str:
    """A name as code, or escaped where a code span can't hold it."""
    text = words.plain(text)
    return _escape(text) if not text.strip() or set(text) & set("`|") else f"`{text}`"


def _escape(text: str) -> str:
    """Keep names and messages from being read as HTML, emphasis, links or a new line."""
    text = words.plain(text)
    for old, new in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(old, new)
    # an underscore inside a word is only that
    return re.sub(r"[\\*`~]|\](?=\()|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
