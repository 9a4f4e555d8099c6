"""Gate + flow -> what is put in place of its block, and where its constant may be multiplied in.

What is found here is a candidate: every one is held to the net's own outputs before it stands (surgery.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sepress.coupling.slots import names
from sepress.folding.flow import Cut, Flow, FlowCall
from sepress.types import Gate, GateKind, ReplacementKind

Where = Literal["before", "after", "kept"]  # the weights before, those after, or a multiplication that stays

# What passes a constant per channel on, of whatever sign; and what does so where none is negative.
LINEAR = names(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean sum"
    " flatten view reshape permute transpose movedim squeeze unsqueeze contiguous clone to float double"
    " __getitem__ dropout dropout1d dropout2d dropout3d alpha_dropout interpolate pad"
)
HOMOGENEOUS = LINEAR | names(
    "relu relu_ leaky_relu leaky_relu_ max_pool1d max_pool2d max_pool3d _max_pool1d _max_pool2d _max_pool3d"
    " adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax"
)
# Gates that no constant per channel stands for; those of every other kind fold alike.
UNFOLDABLE: Mapping[GateKind, str] = {
    "shift": "it does not multiply: what it adds depends on the image",
    "scale-shift": "it also shifts: what it adds depends on the image",
    "branch": "it weighs branches: one constant a channel can't stand for one a channel and branch",
    "local": "its values depend on the position: one constant a channel can't stand for them",
}
CONVOLUTIONS = names("conv1d conv2d conv3d")
NORMS = names("batch_norm instance_norm group_norm")  # gain and bias per channel, after all statistics


@dataclass(frozen=True)
class Block:
    """The module that gives way to a gate's constant."""

    path: str
    multiplies: bool  # gives x * s for x; else it gives s, and something else multiplies


@dataclass(frozen=True)
class Placement:
    """One way to do without a gate: factors for parameters, and what stands where its block stood."""

    where: Where
    factors: Mapping[str, Tensor]  # parameter -> what it is multiplied by, broadcastable
    kind: ReplacementKind
    scale: Tensor | None  # what the module put in holds


def find_block(net: nn.Module, flow: Flow, gate: Gate) -> Block | str:
    """Find the module to replace, or say why there is none."""
    if gate.kind in UNFOLDABLE:
        return UNFOLDABLE[gate.kind]
    call = flow.calls[gate.site.index]
    if len(call.operands) != 2 or len(call.results) != 1 or call.name == "einsum":
        return f"its multiplication is part of another call ({call.name})"
    s, x = call.operands[gate.site.operand].value, call.operands[1 - gate.site.operand].value
    (product,) = call.results
    around = [run for run in flow.runs if run.start <= call.index < run.stop and run.path]
    for run in around:
        if x is not None and run.argument == x and run.result == product:
            return _unshared(net, flow, Block(run.path, multiplies=True))
    if s is not None and flow.readers[s] == [call]:
        before = [run for run in flow.runs if run.result == s and run.path and run.stop <= call.index]
        if before:  # the last is the outermost
            return _unshared(net, flow, Block(before[-1].path, multiplies=False))
    return (
        "its excitation and its multiplication are written into the forward of "
        f"'{gate.site.module or 'the net'}', so that no module can give way to a constant"
    )


def _unshared(net: nn.Module, flow: Flow, block: Block) -> Block | str:
    if len(flow.runs_of(block.path)) > 1:
        return f"its module '{block.path}' runs several times in a forward: one constant can't stand for all"
    module = net.get_submodule(block.path)
    if sum(other is module for _, other in net.named_modules(remove_duplicate=False)) > 1:
        return f"its module '{block.path}' stands in the net under several names"
    return block


def excitation_shape(flow: Flow, gate: Gate) -> tuple[int, ...]:
    """The shape of the gate's excitation of one image: (1, C, 1, 1) for a map (N, C, H, W)."""
    value = flow.calls[gate.site.index].operands[gate.site.operand].value
    assert value is not None
    return (1, *flow.shapes[value][1:])


def placements(
    net: nn.Module, flow: Flow, gate: Gate, block: Block, constant: Tensor, cuts: list[Cut]
) -> Iterator[Placement]:
    """Yield the ways to place a gate's constant (C,), the cheapest first; `cuts` are the folded gates'."""
    call = flow.calls[gate.site.index]
    shape = excitation_shape(flow, gate)
    value = call.operands[1 - gate.site.operand].value
    alive = flow.alive(cuts)
    finder = _Finder(net, flow, constant, alive)
    folded: list[tuple[Where, dict[str, Tensor] | None]] = [
        ("before", None if value is None else finder.before(value, call)),
        ("after", finder.after(call.results[0])),
    ]
    ones = torch.ones((1,) * len(shape), dtype=constant.dtype, device=constant.device)
    for where, factors in folded:
        if factors:
            kind: ReplacementKind = "identity" if block.multiplies else "excitation"
            yield Placement(where, factors, kind, None if block.multiplies else ones)
    kept = constant.view(shape)
    if block.multiplies:  # without the axis of images, and those before the channels
        yield Placement("kept", {}, "scale", kept.view(shape[gate.site.axis :]))
    else:
        yield Placement("kept", {}, "excitation", kept)


def idle_modules(net: nn.Module, flow: Flow, cuts: list[Cut], block: str) -> list[str]:
    """The outermost modules with tensors that ran for the net's outputs, and now would run for nothing."""
    before, now = flow.alive(), flow.alive(cuts)
    inside = f"{block}."
    found: list[str] = []
    for path, module in net.named_modules():
        if path == block or path.startswith(inside) or any(path.startswith(f"{p}.") for p in found):
            continue
        runs = flow.runs_of(path)
        calls = {index for run in runs for index in range(run.start, run.stop)}
        holds = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
        if holds and calls & before and not calls & now and all(run.argument is not None for run in runs):
            found.append(path)
    return found


class _Finder:
    """Walks from a gate to the layers that can take its constant in."""

    def __init__(self, net: nn.Module, flow: Flow, constant: Tensor, alive: frozenset[int]) -> None:
        self._flow, self._alive = flow, alive
        self._constant = constant
        self._passing = HOMOGENEOUS if bool((constant >= 0).all()) else LINEAR
        self._parameters = dict(net.named_parameters())
        shared: dict[int, int] = {}
        for _, p in net.named_parameters(remove_duplicate=False):
            shared[id(p)] = shared.get(id(p), 0) + 1
        self._tied = {name for name, p in self._parameters.items() if shared[id(p)] > 1}

    def before(self, value: int, reader: FlowCall) -> dict[str, Tensor] | None:
        """Factors for the layer that makes a value, if `reader` alone reads it and all that lies between."""
        while True:
            call = self._flow.maker.get(value)
            if call is None or value in self._flow.outputs or self._readers(value) != [reader]:
                return None
            if call.name not in self._passing:
                return self._rows(call)
            source = call.operands[0].value
            if source is None:
                return None
            value, reader = source, call

    def after(self, value: int) -> dict[str, Tensor] | None:
        """Factors for the layers that read a value, if nothing else does."""
        readers = self._readers(value)
        if not readers or value in self._flow.outputs:
            return None
        factors: dict[str, Tensor] = {}
        for call in readers:
            if [place for place, x in enumerate(call.operands) if x.value == value] != [0]:
                return None
            found = self.after(call.results[0]) if call.name in self._passing else self._columns(call)
            if found is None or factors.keys() & found.keys():
                return None
            factors |= found
        return factors

    def _readers(self, value: int) -> list[FlowCall]:
        return [call for call in self._flow.readers.get(value, []) if call.index in self._alive]

    def _free(self, name: str | None) -> bool:
        """Whether a parameter can be multiplied: it is one, in one place, for one call."""
        return name is not None and name not in self._tied and self._flow.uses[name] == 1

    def _rows(self, call: FlowCall) -> dict[str, Tensor] | None:
        """Factors for gain (or weight) and bias of a layer, so that each output channel is multiplied."""
        held = [operand.parameter for operand in call.operands if operand.parameter is not None]
        known = call.name in NORMS or call.name in CONVOLUTIONS or call.name == "linear"
        weighted = call.name in NORMS or (len(call.operands) > 1 and call.operands[1].parameter is not None)
        if not (known and weighted and held and held[0].endswith("weight") and all(map(self._free, held))):
            return None
        channels = len(self._constant)
        if any(self._parameters[name].shape[0] != channels for name in held):
            return None
        return {name: self._constant.view(-1, *[1] * (self._parameters[name].dim() - 1)) for name in held}

    def _columns(self, call: FlowCall) -> dict[str, Tensor] | None:
        """Factors for a layer's weight, so that each input channel is multiplied."""
        name = call.operands[1].parameter if len(call.operands) > 1 else None
        if name is None or not self._free(name):
            return None
        weight, channels = self._parameters[name], len(self._constant)
        if call.name == "linear":
            positions, rest = divmod(weight.shape[1], channels)  # of a flattened map, several a channel
            return None if rest else {name: self._constant.repeat_interleave(positions)}
        groups, rest = divmod(channels, weight.shape[1])
        if call.name not in CONVOLUTIONS or rest or weight.shape[0] % groups:
            return None
        of_group = self._constant.view(groups, -1)  # (groups, channels that each output reads)
        factor = of_group.repeat_interleave(weight.shape[0] // groups, dim=0)
        return {name: factor.view(*factor.shape, *[1] * (weight.dim() - 2))}
