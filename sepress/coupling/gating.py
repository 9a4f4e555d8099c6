"""Find gates: a map multiplied by a signal that descends only from a global pooling of activations.

Class names never decide. Marks travel with storages: a mark says 'this came only from poolings';
where a marked signal with one value per channel multiplies a larger unmarked map, that is a gate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sepress.coupling.shadows import StorageMap, line, varying_axes
from sepress.coupling.slots import names
from sepress.types import CallSite

if TYPE_CHECKING:
    from sepress.coupling.rules import Op
    from sepress.coupling.trace import Tracer

POOLINGS = names(
    "mean sum amax max adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    " _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d avg_pool1d avg_pool2d avg_pool3d"
    " max_pool2d_with_indices max_pool3d_with_indices"
)
SQUASHES = {
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "hardsigmoid": "hardsigmoid",
    "hardsigmoid_": "hardsigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
    "_softmax": "softmax",
    "clamp": "clamp",
    "clamp_": "clamp",
}
LAYERS = names("convolution mm addmm bmm")


@dataclass(eq=False)
class Mark:
    """Descent of one signal from poolings."""

    parents: tuple[Mark, ...] = ()
    squash: str = "none"  # the last one since a layer with weights
    in_gate: bool = False  # whether it flows into a gate

    def lead_into_gate(self) -> None:
        todo: list[Mark] = [self]
        while todo:
            mark = todo.pop()
            if not mark.in_gate:
                mark.in_gate = True
                todo.extend(mark.parents)


@dataclass
class FoundGate:
    """A gate as the trace met it; groups.py names its group and units."""

    module: str
    channels: int
    activation: str
    site: CallSite
    gated: np.ndarray  # ids of the gated map along its channel axis
    shifts: bool = False


@dataclass
class GateFinder:
    """Follows marks through the operations of one forward."""

    found: list[FoundGate] = field(default_factory=list)
    marks: StorageMap[Mark] = field(default_factory=StorageMap)
    _scaled: StorageMap[FoundGate] = field(default_factory=StorageMap)

    def sweep(self) -> None:
        self.marks.sweep()
        self._scaled.sweep()

    def observe(self, t: Tracer, op: Op) -> None:
        """Mark what an operation with activations made, and note a gate if it multiplies one in."""
        signals = [x for x in op.inputs if x in t.shadows]
        marks = [mark for x in signals if (mark := self.marks.get(x)) is not None]
        if op.name in ("mul", "mul_"):
            self._multiply(t, op)
        elif op.name in ("add", "add_"):
            self._shift(op)
        if signals and len(marks) == len(signals):
            mark = Mark(tuple(dict.fromkeys(marks)), self._squash(op, marks))
            for output in op.outputs:
                if output not in self.marks or op.func._schema.is_mutable:
                    self.marks.put(output, mark)
        elif op.func._schema.is_mutable:
            self.marks.drop(op.outputs[0]) if op.outputs else None
        elif op.name in POOLINGS and _is_global(t, op):
            for output in op.outputs:
                self.marks.put(output, Mark())

    def _squash(self, op: Op, marks: list[Mark]) -> str:
        if op.name in ("hardtanh", "hardtanh_"):
            return "relu6" if op.arg(2) == 6 else "clamp"
        if op.name in LAYERS:
            return "none"
        inherited = next((mark.squash for mark in marks if mark.squash != "none"), "none")
        return SQUASHES.get(op.name, inherited)

    def _multiply(self, t: Tracer, op: Op) -> None:
        if len(op.inputs) != 2:
            return
        for gated, signal in (op.inputs, reversed(op.inputs)):
            mark = self.marks.get(signal)
            axes = _own_axes(signal)
            if mark is None or gated in self.marks or gated not in t.shadows or len(axes) != 1:
                continue
            axis, channels = axes[0], signal.size(axes[0])
            at = axis - signal.dim()  # counted from the end, as broadcasting does
            if gated.dim() < -at or gated.size(at) != channels or gated.numel() < channels:
                continue
            site = t.call_site(signal, axis)
            if site is None:
                continue
            mark.lead_into_gate()
            ids = line(t.ids(gated), gated.dim() + at)
            gate = FoundGate(t.module, channels, mark.squash, site, ids)
            self.found.append(gate)
            self._scaled.put(op.outputs[0], gate)
            return

    def _shift(self, op: Op) -> None:
        """A pooled signal added to what a gate scaled: the gate also shifts."""
        gates = [gate for x in op.inputs if (gate := self._scaled.get(x)) is not None]
        shifts = [x for x in op.inputs if x in self.marks and len(_own_axes(x)) == 1]
        if gates and shifts:
            gates[0].shifts = True


def _own_axes(x: Tensor) -> list[int]:
    """Return the axes that hold values of their own (not length 1, not expanded)."""
    return [
        axis for axis, (n, stride) in enumerate(zip(x.shape, x.stride(), strict=True)) if n > 1 and stride
    ]


def _is_global(t: Tracer, op: Op) -> bool:
    """Whether a pooling leaves one value per channel (and not one per position, over the channels)."""
    output, source = op.outputs[0], op.inputs[0]
    one_axis = sum(length > 1 for length in output.shape) == 1
    if not one_axis or output.numel() == source.numel() == 1:
        return False
    return bool(varying_axes(t.ids(output))) or not varying_axes(t.ids(source))
