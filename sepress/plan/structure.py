"""Groups of the same structure: which layers of which kind make and read their channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import prod

from sepress.types import CouplingGroup


def structure(group: CouplingGroup, shapes: Mapping[str, Sequence[int]]) -> Hashable:
    """What a group's members say without names, widths and depth; equal for isomorphic groups.

    Role, and how often each kind of axis is there and how many gates judge it: never, once or more than once.
    Once is what tells the inside of a block from a residual stream; whether a stream runs through three
    blocks or six is depth and not structure. (The code of Fang et al., ECCV 2024, lists the types of all
    layers one by one: streams of unequal depth are apart there, and 1x1 and 3x3 kernels are not.)
    """
    axes = Counter((_kind(shapes[member.parameter]), member.dim) for member in group.members)
    return group.role, _often(len(group.gates)), frozenset((axis, _often(n)) for axis, n in axes.items())


def classes(groups: Iterable[CouplingGroup], shapes: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """The positions of the groups of each structure, in order of appearance."""
    alike: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        alike.setdefault(structure(group, shapes), []).append(position)
    return list(alike.values())


def _kind(shape: Sequence[int]) -> str:
    """The kind of layer that a parameter or buffer of this shape belongs to."""
    if len(shape) <= 2:
        return ("scalar", "vector", "linear")[len(shape)]
    return "pointwise" if prod(shape[2:]) == 1 else "spatial"  # a 5x5 does what a 3x3 does


def _often(count: int) -> int:
    return min(count, 2)
