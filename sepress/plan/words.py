"""Counts and lists of groups in sentences, and near names for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from sepress.types import CouplingGroup


def counted(count: int) -> str:
    """'1 group', '2 groups'."""
    return f"{count} group{'s' if count != 1 else ''}"


def listed(groups: Iterable[CouplingGroup]) -> str:
    """'name (width)' of each, by commas."""
    return ", ".join(f"{group.name} ({group.width})" for group in groups)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like a wrong one, by commas."""
    names = list(known)
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]) or "none"
