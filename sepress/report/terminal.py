"""Report -> the terminal: results that a newcomer reads at a glance, in 60 columns and in pipes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sepress.report import words
from sepress.types import Report

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

COLUMNS = (words.TOP1, words.MACS, words.PARAMS, words.BYTES, words.LATENCY)
UNREADABLE = 3  # images named
VARIANTS_TOLD = "Same class: validation images with the float32 file's top class."
WHOLE_NAMES = 26  # letters of a group's name and width beside which 60 columns hold all else
_STYLES = {
    "passed": "green",
    "met": "green",
    "FAILED": "bold red",
    "NOT MET": "bold red",
    "not judged": "yellow",
    "kept": "green",
    "kept, SLOWER": "bold yellow",
    "NOT KEPT": "bold yellow",
}


def render_report(report: Report) -> RenderableType:
    """Return what the terminal shows at the end: the table, the summary, the checks, and where the files are.

    Nothing in it is taken for markup. Print it with rich's Console, which leaves colour out of pipes.
    """
    from rich.console import Group

    blocks: list[RenderableType] = []
    if any(words.has_figures(row, COLUMNS) for row in report.measurements):
        blocks.append(_results(report))
    blocks += [_text(line, style="dim") for line in _below(report)]
    if report.variants:
        blocks += [_text(""), _variants(report), _text(VARIANTS_TOLD, style="dim")]
    blocks += [_text(""), _text(words.summary(report), style="bold"), _text("")]
    blocks += _verdicts(report)
    blocks += [_text(line, style="dim") for line in _basis(report)]
    blocks += _files(report)
    return Group(*blocks)


def render_groups(report: Report) -> RenderableType:
    """Return the table of groups: role, width, mean excitation and what judged each; and the criterion.

    Nothing in it is taken for markup. Print it with rich's Console, which leaves colour out of pipes.
    """
    from rich.console import Group

    if not report.groups:
        return _text("No groups of channels were ranked.")
    names = [words.plain(row.name) for row in report.groups]
    widths = [words.widths(row) for row in report.groups]
    whole = max(map(len, names)) + max(map(len, widths)) <= WHOLE_NAMES
    table = _table(report)
    table.padding = (0, 1, 0, 0)
    table.add_column("Group", overflow="fold", no_wrap=whole)
    table.add_column("Role", no_wrap=True)
    table.add_column("Width", justify="right", no_wrap=True)
    table.add_column("Mean\nexc.", justify="right", no_wrap=True)
    table.add_column("Judged by", overflow="fold")
    for row, name, width in zip(report.groups, names, widths, strict=True):
        cells = [name, words.role(row), width, words.excitation(row), words.evidence(row)]
        table.add_row(*map(_text, cells))
    lines = [words.criterion(report), f"Role: {words.roles(report.groups)}."]
    if any(row.mean_excitation is not None for row in report.groups):
        lines.append("Mean exc.: the SE gate's mean over the group's channels and the calibration images.")
    return Group(table, *(_text(line, style="dim") for line in lines if line))


def _results(report: Report) -> RenderableType:
    table = _table(report)
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    base = words.base_of(report)
    for row in report.measurements:
        cells = ["\n".join(words.cell(column, row, base)).rstrip() for column in COLUMNS]
        table.add_row(_text(row.label), *cells)
    return table


def _variants(report: Report) -> RenderableType:
    table = _table(report)
    table.title = None  # said above
    table.add_column("")
    for title in words.variant_titles(report):
        table.add_column(title.replace(", ", "\n"), justify="right")
    for precision, cells in words.variant_rows(report):
        table.add_row(_text(precision), *("\n".join(cell).rstrip() for cell in cells))
    return table


def _table(report: Report) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = None if report.trained else _text("UNTRAINED (random weights)", style="bold yellow")
    return Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)


def _text(line: str, *, style: str = "") -> Text:
    """A line without markup or control characters; what doesn't fit goes on below."""
    from rich.text import Text

    return Text(words.plain(line), style=style, overflow="fold")


def _below(report: Report) -> Iterator[str]:
    """Say what the columns mean, and why cells are empty."""
    yield from _columns(report)
    yield from words.latency_conditions(report)
    yield from words.comparisons(report)
    yield from words.missing(report, COLUMNS)


def _columns(report: Report) -> Iterator[str]:
    places = words.accuracies(report)
    if len(places) == 1:
        yield f"Top-1: right at the first guess ({next(iter(places))})."
    elif places:
        where = "; ".join(f"{', '.join(labels)}: {place}" for place, labels in places.items())
        yield f"Top-1: right at the first guess ({where})."
    if any(row.macs is not None for row in report.measurements):
        yield "MACs: multiply-accumulates of one image."


def _verdicts(report: Report) -> Iterator[Text]:
    lines = [words.check_words(name, check) for name, check in report.checks.items()]
    lines += [words.constraint_words(constraint) for constraint in report.constraints]
    lines += words.variant_words(report)
    for title, verdict, details in lines:
        text = _text(f"{title}: ")
        text.append(verdict, style=_STYLES[verdict])
        text.append(words.plain(f" ({details})") if details else "")
        yield text


def _basis(report: Report) -> Iterator[str]:
    """Say what the figures rest on: the groups and their evidence, the data, the preprocessing."""
    yield from filter(None, [words.groups_sentence(report), words.excitation_sentence(report)])
    yield from words.data_words(report, named=UNREADABLE)
    yield from words.preprocessing_words(report, figures=False)


def _files(report: Report) -> Iterator[Text]:
    """Name the folder that most files lie in once, then each file."""
    paths = words.files(report)
    if not paths:
        return
    folder = Counter(str(Path(path).parent) for path in paths.values()).most_common(1)[0][0]
    yield _text("")
    yield _text(f"Files in {folder}:")
    width = max(map(len, paths))
    for name, path in paths.items():
        shown = os.path.relpath(path, folder) if str(Path(path).parent) == folder else path
        yield _text(f"  {name:<{width}}  {shown}")
