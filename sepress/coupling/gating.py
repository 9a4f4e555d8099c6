"""Find gates: maps multiplied by (or added to) a signal that says how much each channel counts.

Class names never decide. Marks travel with storages and say what a signal descends from. A product is a gate
where the signal comes only from global poolings of activations (Hu et al. 2018, sec. 3); or where it is
squashed, and holds fewer values than the map or was spread over it from fewer positions (GatherExcite, Hu et
al. 2018b, sec. 3; GhostNetV2's DFC, Tang et al. 2022, sec. 3.2). `types.GateKind` lists the kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sepress.coupling.shadows import StorageMap, broadcast_shape, line, varies, varying_axes
from sepress.coupling.slots import names
from sepress.types import CallSite, GateKind

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
    "hardsigmoid": "hardsigmoid",
    "tanh": "tanh",
    "_softmax": "softmax",
    "clamp": "clamp",
    "clamp_max": "clamp",
    "hardtanh": "clamp",
}
CONVOLUTIONS = names("convolution _convolution cudnn_convolution mkldnn_convolution")
LAYERS = CONVOLUTIONS | names("mm addmm bmm baddbmm")
SPREADS = names("repeat repeat_interleave")  # beside those that resize


@dataclass(eq=False)
class Mark:
    """What is known of one signal, of all of its storage."""

    pooled: bool  # it descends only from global poolings
    parents: tuple[Mark, ...] = ()  # those that are pooled
    squash: str = "none"  # the last one since a layer with weights
    spread: bool = False  # computed at fewer positions than it is held for
    resized: bool = False  # spread by interpolation
    shares: bool = False  # after a softmax over an axis without channels: branches if pooled, else positions
    weighted: bool = False  # pooled with such shares as weights; before the pooling: multiplied by them
    along: bool = False  # a convolution ran along its channels
    layered: bool = False  # a layer with weights made it from what was pooled
    in_gate: bool = False  # whether it flows into a gate

    def lead_into_gate(self) -> None:
        todo: list[Mark] = [self] if self.pooled else []
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
    kind: GateKind
    site: CallSite
    gated: np.ndarray  # ids of the gated map along its channel axis


@dataclass
class GateFinder:
    """Follows marks through the operations of one forward."""

    found: list[FoundGate] = field(default_factory=list)
    marks: StorageMap[Mark] = field(default_factory=StorageMap)
    _scaled: StorageMap[FoundGate] = field(default_factory=StorageMap)

    def sweep(self) -> None:
        self.marks.sweep()
        self._scaled.sweep()

    # ---- marks ----------------------------------------------------------------------------------
    def observe(self, t: Tracer, op: Op) -> None:
        """Mark what an operation with activations made, and note a gate if it multiplies or adds one in."""
        if op.name in ("mul", "mul_") and len(op.inputs) == 2:
            self._multiply(t, op, op.inputs)
        elif op.name in ("addcmul", "addcmul_"):  # a + x * s
            self._multiply(t, op, op.inputs[1:])
            self._add(t, op, [op.outputs[0], op.inputs[0]])
        elif op.name in ("add", "add_") and len(op.inputs) == 2:
            self._add(t, op, op.inputs)
        mark = self._marked(t, op)
        mutable = op.func._schema.is_mutable
        if mark is not None:
            for output in op.outputs:
                if output not in self.marks or mutable:
                    self.marks.put(output, mark)
        elif mutable and op.outputs:
            self.marks.drop(op.outputs[0])

    def _marked(self, t: Tracer, op: Op) -> Mark | None:
        """What is to be known of the outputs."""
        marks = [mark for x in op.signals if (mark := self.marks.get(x)) is not None]
        complete = len(marks) == len(op.signals)
        mutable = op.func._schema.is_mutable
        if not (complete and all(mark.pooled for mark in marks)) and not mutable:
            if op.name in POOLINGS and _is_global(t, op):
                return Mark(pooled=True, weighted=any(mark.weighted for mark in marks))
            weights = [mark for mark in marks if mark.shares and not mark.pooled]
            if weights and len(op.signals) == 2 and op.name in ("bmm", "mul"):
                if op.name == "mul":
                    return Mark(pooled=False, weighted=True)
                if _one_axis(op.outputs[0]) and varying_axes(t.ids(op.outputs[0])):
                    return Mark(pooled=True, weighted=True)
        if complete or len(op.signals) == 1:
            mark = _descendant(t, op, marks)
            told = mark.pooled or mark.spread or mark.weighted or mark.squash != "none"
            return mark if told else None
        return None

    # ---- gates ----------------------------------------------------------------------------------
    def _multiply(self, t: Tracer, op: Op, factors: Sequence[Tensor]) -> None:
        for gated, signal in (factors, reversed(factors)):
            mark = self.marks.get(signal)
            if mark is None or gated not in t.shadows:
                continue
            axis = _channel_axis(t, mark, signal)
            kind = None if axis is None else self._kind(mark, gated, signal, axis)
            if axis is None or kind is None:
                continue
            gate = self._note(t, mark, kind, gated, signal, axis)
            if gate is not None:
                self._scaled.put(op.outputs[0], gate)
                return

    def _kind(self, mark: Mark, gated: Tensor, signal: Tensor, axis: int) -> GateKind | None:
        """Which kind of gate a product is, if it is one."""
        if not _fits(gated, signal, axis):
            return None
        around = self.marks.get(gated)
        others = [other for other in _own_axes(signal) if other != axis]
        if not mark.pooled:
            fewer = prod(signal.size(own) for own in (axis, *others)) < gated.numel()
            spread = mark.spread and not (around is not None and around.spread)
            covered = broadcast_shape(gated.shape, signal.shape) == gated.shape
            if not covered or not (fewer or spread):
                return None
            return "local" if others else "scale"
        if (around is not None and around.pooled) or (mark.weighted and mark.squash == "none"):
            return None
        if others and mark.resized:
            return "local"  # at this input size one position was left to pool to
        if others and not mark.spread:
            return "branch" if all(_fits(gated, signal, other) for other in others) else None
        if mark.shares:
            return "branch"
        if mark.along:
            return "channel-conv"
        return "context" if mark.weighted else "scale"

    def _add(self, t: Tracer, op: Op, addends: Sequence[Tensor]) -> None:
        """A pooled signal added to what a gate scaled: the gate shifts too. To another map: it only does."""
        for shifted, signal in (addends, reversed(addends)):
            mark, around = self.marks.get(signal), self.marks.get(shifted)
            own = _own_axes(signal)
            if mark is None or not mark.pooled or len(own) != 1:
                continue
            gate = self._scaled.get(shifted)
            if gate is not None:
                gate.kind = "scale-shift"
                return
            larger = shifted.numel() > signal.size(own[0])
            unmarked = shifted in t.shadows and (around is None or not around.pooled)
            if mark.layered and unmarked and larger and _fits(shifted, signal, own[0]):
                self._note(t, mark, "shift", shifted, signal, own[0])
                return

    def _note(
        self, t: Tracer, mark: Mark, kind: GateKind, gated: Tensor, signal: Tensor, axis: int
    ) -> FoundGate | None:
        """Note a gate, if the call that runs it is one where a tap can see the signal."""
        site = t.call_site(signal, axis)
        if site is None:
            return None
        mark.lead_into_gate()
        ids = line(t.ids(gated), gated.dim() + axis - signal.dim())
        gate = FoundGate(t.module, signal.size(axis), mark.squash, kind, site, ids)
        self.found.append(gate)
        return gate


def _descendant(t: Tracer, op: Op, marks: list[Mark]) -> Mark:
    """The mark of what an operation made of marked signals, or of one signal without a mark."""
    layer = op.name in LAYERS
    pooled = bool(marks) and all(mark.pooled for mark in marks)
    return Mark(
        pooled=pooled,
        parents=tuple(dict.fromkeys(mark for mark in marks if mark.pooled)),
        squash="none" if layer else _squash(op, marks),
        spread=any(mark.spread for mark in marks) or _spreads(op),
        resized=any(mark.resized for mark in marks) or (_resizes(op) and _spreads(op)),
        shares=not layer and (any(mark.shares for mark in marks) or _is_softmax_over_others(t, op)),
        weighted=any(mark.weighted for mark in marks if mark.pooled or not layer),
        along=pooled and (any(mark.along for mark in marks) or _is_along_channels(t, op)),
        layered=layer or any(mark.layered for mark in marks),
    )


def _squash(op: Op, marks: list[Mark]) -> str:
    """The last squash: this operation's, or what came before; a bound on one side is none."""
    name = op.name.removesuffix("_") if op.name != "_softmax" else op.name
    if name == "hardtanh" and op.arg(2) == 6:
        return "relu6"
    if name in SQUASHES and not (name == "clamp" and op.kwargs.get("max", op.arg(2)) is None):
        return SQUASHES[name]
    return next((mark.squash for mark in marks if mark.squash != "none"), "none")


def _spreads(op: Op) -> bool:
    """Whether an operation copies values to more positions."""
    most = max((x.numel() for x in op.inputs if x.numel()), default=0)
    grows = bool(op.outputs) and op.outputs[0].numel() > most
    return grows and (op.pointwise or op.name in SPREADS or _resizes(op))


def _resizes(op: Op) -> bool:
    return op.name.lstrip("_").startswith("upsample")


def _is_softmax_over_others(t: Tracer, op: Op) -> bool:
    x = op.inputs[0]
    return op.name == "_softmax" and x.size(op.args[1]) > 1 and not varies(t.ids(op.outputs[0]), op.args[1])


def _is_along_channels(t: Tracer, op: Op) -> bool:
    """Whether a convolution takes channels for positions (Wang et al. 2020, ECA-Net, sec. 3.2)."""
    if op.name not in CONVOLUTIONS:
        return False
    axes = varying_axes(t.ids(op.inputs[0]))
    return bool(axes) and min(axes) > 1


def _channel_axis(t: Tracer, mark: Mark, signal: Tensor) -> int | None:
    """Return the axis on which a signal holds one value a channel, or None where it can't be a gate's.

    A pooled signal of one axis needs nothing else, any other must be squashed: the product of two
    unbounded signals weighs nothing. Where channels and branches both have ids, channels are the longer
    axis (as in rules.py).
    """
    own = _own_axes(signal)
    if mark.pooled and len(own) == 1:
        return own[0]
    if mark.squash == "none" or (mark.squash == "softmax" and not mark.pooled):
        return None
    axes = [axis for axis in varying_axes(t.ids(signal)) if axis in own]
    return max(axes, key=lambda axis: (signal.size(axis), axis), default=None)


def _fits(gated: Tensor, signal: Tensor, axis: int) -> bool:
    """Whether a map has values of its own for each of a signal's on an axis.

    Axes count from the end, as broadcasting does; a spatial map expanded over channels has none of its own.
    """
    at = axis - signal.dim()
    return gated.dim() >= -at and gated.size(at) == signal.size(axis) and gated.stride(at) != 0


def _own_axes(x: Tensor) -> list[int]:
    """Return the axes that hold values of their own (not length 1, not expanded)."""
    return [
        axis for axis, (n, stride) in enumerate(zip(x.shape, x.stride(), strict=True)) if n > 1 and stride
    ]


def _one_axis(x: Tensor) -> bool:
    return sum(length > 1 for length in x.shape) == 1


def _is_global(t: Tracer, op: Op) -> bool:
    """Whether a pooling leaves one value per channel (and not one per position, over the channels)."""
    output, source = op.outputs[0], op.inputs[0]
    if not _one_axis(output) or output.numel() == source.numel() == 1:
        return False
    return bool(varying_axes(t.ids(output))) or not varying_axes(t.ids(source))
