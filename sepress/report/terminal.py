"""Report -> the closing table: a result that a newcomer reads at a glance, at 60 columns and in pipes."""

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
    from rich.text import Text

COLUMNS = (words.TOP1, words.MACS, words.PARAMS, words.BYTES, words.LATENCY)
_STYLES = {
    "passed": "green",
    "met": "green",
    "FAILED": "bold red",
    "NOT MET": "bold red",
    "not judged": "yellow",
}


def render_report(report: Report) -> RenderableType:
    """Return what the terminal shows at the end: the summary, the table, the checks, and where the files are.

    Nothing in it is taken for markup. Print it with rich's Console, which leaves colour out of pipes.
    """
    from rich.console import Group
    from rich.text import Text

    blocks: list[RenderableType] = []
    if report.measurements:
        blocks += [_table(report), Text("\n".join(_below(report)), style="dim")]
    blocks += [Text(""), Text(words.summary(report), style="bold"), Text("")]
    blocks += _verdicts(report)
    blocks += _files(report)
    return Group(*blocks)


def _table(report: Report) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = None if report.trained else Text("UNTRAINED (random weights)", style="bold yellow")
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    base = words.base_of(report)
    for row in report.measurements:
        cells = [Text("\n".join(words.cell(column, row, base)).rstrip()) for column in COLUMNS]
        table.add_row(Text(row.label), *cells)
    return table


def _below(report: Report) -> list[str]:
    """Say what the columns mean, why cells are empty, and what the pruning rests on."""
    splits = {row.split: row.n for row in report.measurements if row.top1 is not None}
    where = "".join(f" ({split}, {words.images(n)})" for split, n in splits.items())
    lines = [
        f"Top-1: right at the first guess{where}; MACs: multiply-accumulates of one image.",
        *words.latency_conditions(report),
        *words.missing(report, COLUMNS),
    ]
    if report.groups:
        cut = sum(row.width_after < row.width_before for row in report.groups)
        judges = Counter(row.evidence for row in report.groups if row.role != "frozen")
        judged = ", ".join(f"{evidence} ({n})" for evidence, n in judges.most_common())
        lines.append(f"{cut} of {len(report.groups)} groups of channels got narrower; judged by: {judged}.")
    return lines


def _verdicts(report: Report) -> Iterator[Text]:
    from rich.text import Text

    lines = [words.check_words(name, check) for name, check in report.checks.items()]
    lines += [words.constraint_words(constraint) for constraint in report.constraints]
    for title, verdict, details in lines:
        text = Text(f"{title}: ")
        text.append(verdict, style=_STYLES[verdict])
        text.append(f" ({details})" if details else "")
        yield text


def _files(report: Report) -> Iterator[Text]:
    """Name the folder once, then the files in it."""
    from rich.text import Text

    paths = {role: path for role, path in report.artifacts.items() if path is not None}
    if not paths:
        return
    folders = {str(Path(path).parent) for path in paths.values()}
    folder = folders.pop() if len(folders) == 1 else None
    yield Text("")
    yield Text(f"Files in {folder}:" if folder else "Files:", overflow="fold")
    width = max(len(role) for role in paths)
    for role, path in paths.items():
        shown = os.path.relpath(path, folder) if folder else path
        yield Text(f"  {role:<{width}}  {shown}", overflow="fold")
