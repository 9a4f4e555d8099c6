"""Convolution weights that a net mixes anew for each image from a bank (CondConv, dynamic convolution).

That a parameter is such a bank shows only where what came of it is used as a weight. So a trace follows
parameters through what descends from poolings, and where one ends as a weight, the net is traced again with
that known: the bank's elements then pass through the mixing as a parameter's do through a view, and its
output and input axes are found, flat on one dim or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor

from sepress.coupling.shadows import StorageMap
from sepress.coupling.slots import names

if TYPE_CHECKING:
    from sepress.coupling.rules import Op
    from sepress.coupling.trace import Tracer

PRODUCTS = names("mm addmm bmm baddbmm convolution")
Layout = dict[int, tuple[int, ...]]  # dim -> the axes that lie flat on it


@dataclass
class BankFinder:
    """Which parameters are banks (`known`, with their layouts), and which a trace found to be (`found`)."""

    known: Mapping[str, Layout] = field(default_factory=dict)
    found: dict[str, Layout] = field(default_factory=dict)
    _sources: StorageMap[frozenset[int]] = field(default_factory=StorageMap)  # parameters by number

    def sweep(self) -> None:
        self._sources.sweep()

    def follow(self, t: Tracer, op: Op) -> None:
        """Remember which parameters went into what descends from poolings; a product starts anew."""
        if not op.outputs or t.gates.marks.get(op.outputs[0]) is None:
            return
        met = {number for x in op.inputs if x.dim() > 1 and (number := t.slots.find(x)) is not None}
        if op.name not in PRODUCTS or not met:
            met = met.union(*(self._sources.get(x) or () for x in op.inputs))
        for output in op.outputs:
            self._sources.put(output, frozenset(met))

    def note(self, t: Tracer, weight: Tensor) -> None:
        """A convolution multiplies with what was computed from activations: whose bank was that?"""
        for number in self._sources.get(weight) or ():
            name, layout = t.slots.names[number], flat_dims(t.slots.stored[number], weight.shape)
            if layout is not None and name not in self.known:
                self.found[name] = layout

    def is_bank(self, t: Tracer, x: Tensor) -> bool:
        """Whether x is (a view of) a bank, or was mixed from one."""
        if not self.known or not t.is_parametric(x) or not x.numel():
            return False
        number = t.slots.find(x)
        if number is None:
            number = t.slots.parameter_of(int(t.elements(x)[(0,) * x.dim()]))
        return number is not None and t.slots.names[number] in self.known

    def mixed_shape(self, t: Tracer, weight: Tensor) -> tuple[int, ...] | None:
        """Return (experts, *weight) for a weight mixed from a bank that holds its elements in that order.

        () for any other parameter, None for a mixed weight of another order.
        """
        if t.slots.find(weight) is not None or not self.is_bank(t, weight):
            return ()
        elements = t.elements(weight).flatten()
        number = t.slots.parameter_of(int(elements[0]))
        assert number is not None
        experts = prod(t.slots.stored[number]) // weight.numel()
        in_order = bool((elements.diff() == 1).all())
        return (experts, *weight.shape) if in_order else None


def flat_dims(stored: Sequence[int], read: Sequence[int]) -> Layout | None:
    """Return on which dims of a bank the axes of a weight lie flat; leading dims are experts; None: nowhere.

    >>> flat_dims((4, 1800), (20, 10, 3, 3)), flat_dims((4, 20, 90), (20, 10, 3, 3))
    ({1: (20, 10, 3, 3)}, {2: (10, 3, 3)})
    >>> flat_dims((4, 20, 10, 3, 3), (20, 10, 3, 3)), flat_dims((4, 7), (20, 10, 3, 3))
    ({}, None)
    """
    left, layout = list(read), {}
    for dim in reversed(range(len(stored))):
        if prod(left) == 1:
            break
        axes: list[int] = []
        while left and prod(axes) < stored[dim] and stored[dim] % (prod(axes) * left[-1]) == 0:
            axes.insert(0, left.pop())
        if prod(axes) != stored[dim]:
            return None
        if sum(length > 1 for length in axes) > 1:
            layout[dim] = tuple(axes)
    return layout if prod(left) == 1 else None
