"""Names of modules -> patterns: blocks.2.0.se, blocks.2.1.se -> blocks.2.*.se."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

Parts = tuple[str, ...]


def fold(names: Iterable[str], *, most: int) -> dict[str, list[str]]:
    """Return patterns and the names that each stands for, in the order of their first names.

    Names that differ by numbers between dots alone are counted along, stage by stage: the first number that
    differs is a stage's and stays, the later ones become `*`. Where every stage holds one name, the first
    becomes `*`. Where that leaves more than `most` patterns, all numbers that differ do.

    >>> list(fold(["stages.0.0.se", "stages.0.1.se", "stages.1.0.se", "head.se"], most=8))
    ['stages.0.*.se', 'stages.1.*.se', 'head.se']
    """
    names = list(dict.fromkeys(names))
    by_stage = _folded(names, keep_stage=True)
    return by_stage if len(by_stage) <= most else _folded(names, keep_stage=False)


def _folded(names: Sequence[str], *, keep_stage: bool) -> dict[str, list[str]]:
    alike: dict[Parts, list[Parts]] = defaultdict(list)
    for name in names:
        parts = tuple(name.split("."))
        alike[tuple("*" if part.isdigit() else part for part in parts)].append(parts)
    counted = {template: _counted(rows, keep_stage=keep_stage) for template, rows in alike.items()}
    patterns: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = tuple(name.split("."))
        star = counted[tuple("*" if part.isdigit() else part for part in parts)]
        patterns[".".join("*" if at in star else part for at, part in enumerate(parts))].append(name)
    # a pattern of one name is that name
    return {pattern if len(found) > 1 else found[0]: found for pattern, found in patterns.items()}


def _counted(rows: Sequence[Parts], *, keep_stage: bool) -> frozenset[int]:
    """Return the places whose numbers become `*`."""
    varying = [at for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    if not keep_stage or len(varying) < 2:
        return frozenset(varying)
    stages = {row[varying[0]] for row in rows}
    return frozenset(varying[1:]) if len(stages) < len(rows) else frozenset(varying[:1])
