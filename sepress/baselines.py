"""torch-pruning's criteria on our groups, and its dependency graph as a second opinion; its only import.

They are called, not written again (Fang et al., DepGraph, CVPR 2023): a baseline must be its authors'. What
they have in common, as version 1.6 has it: a layer gives a figure for every channel of the group, from its
weights alone (no bias); a unit's figures are added over its channels and divided by the number of layers.
Conv and linear layers count on the side where the group lies, affine norms by their scale where said so;
a depthwise convolution counts nowhere.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency import Dependency, Group, Node
from torch_pruning.pruner.function import PrunerBox

from sepress.types import CouplingGroup, Member

Side = Literal["in", "out"]
Slot = tuple[str, Side, int]  # module, side, channel
_WEIGHTED = {ops.OPTYPE.CONV, ops.OPTYPE.DEPTHWISE_CONV, ops.OPTYPE.LINEAR}
_NORMS = {ops.OPTYPE.BN, ops.OPTYPE.LN, ops.OPTYPE.GN, ops.OPTYPE.IN, ops.OPTYPE.PRELU}


@dataclass(frozen=True)
class BaselineScores:
    """Scores per unit (U,), mean 1; None where torch-pruning can't judge the group by its layers."""

    scores: np.ndarray | None
    left_out: tuple[str, ...]  # parameters that it has no notion of


def group_l1(net: nn.Module, group: CouplingGroup) -> BaselineScores:
    """Absolute weights (Li et al., ICLR 2017); batch and layer norms count."""
    return _judge(net, group, tp.importance.GroupMagnitudeImportance(p=1, normalizer=None))


def group_l2(net: nn.Module, group: CouplingGroup) -> BaselineScores:
    """Squared weights (p = 2, without a root); batch and layer norms count."""
    return _judge(net, group, tp.importance.GroupMagnitudeImportance(p=2, normalizer=None))


def group_lamp(net: nn.Module, group: CouplingGroup) -> BaselineScores:
    """LAMP (Lee et al., ICLR 2021) of the group's L2: each score over the sum of those that are no smaller.

    This rises with the L2, so within a group LAMP's order is that of `group_l2`; it differs between groups.
    """
    lamp = tp.importance.LAMPImportance()
    lamp.normalizer = lambda scores: lamp._lamp(scores) if scores.any() else scores  # it would give 0 / 0
    return _judge(net, group, lamp)


def group_bn_scale(net: nn.Module, group: CouplingGroup) -> BaselineScores:
    """|gamma| of the group's batch norms (Liu et al., Network Slimming, ICCV 2017)."""
    return _judge(net, group, tp.importance.BNScaleImportance(normalizer=None))


def group_fpgm(net: nn.Module, group: CouplingGroup) -> BaselineScores:
    """The sum of a channel's distances to the group's others (He et al., FPGM, CVPR 2019); norms don't count.

    torch-pruning measures them between squared weights (its p = 2), where the paper has the weights.
    """
    return _judge(net, group, tp.importance.FPGMImportance(normalizer=None))


def group_taylor(net: nn.Module, group: CouplingGroup, *, gradients: Mapping[str, Tensor]) -> BaselineScores:
    """|w dL/dw| (Molchanov et al., CVPR 2019); layer norms count, batch norms don't.

    `gradients` are dL/dw by state-dict name (ExcitationStats.gradients); a parameter without one counts as 0.
    """
    with _lent_gradients(net, group, gradients):
        return _judge(net, group, tp.importance.GroupTaylorImportance(normalizer=None))


def group_hessian(net: nn.Module, group: CouplingGroup, *, squares: Mapping[str, Tensor]) -> BaselineScores:
    """w^2 h, h a diagonal of the Hessian (LeCun et al., Optimal Brain Damage, NIPS 1989); norms count.

    `squares` are E[(dL/dw)^2] over images by state-dict name (ExcitationStats.squared_gradients), which stand
    for h. torch-pruning takes h from `.grad`, so they are lent to it there: its own `accumulate_grad` looks
    for names where it keeps parameters, and so forgets all images but the last.
    """
    with _lent_gradients(net, group, squares):
        return _judge(net, group, tp.importance.GroupHessianImportance(normalizer=None))


@dataclass(frozen=True)
class PeerGroup:
    """A group of torch-pruning's: its first layer, and for outputs of it that are a unit what goes along."""

    root: str
    units: Mapping[tuple[int, ...], frozenset[Slot]]


class SecondOpinion:
    """torch-pruning's own graph of a copy of a net, in our terms: what it couples, and what it removes.

    `inputs` are an example of the forward's; `kept` are layers of which nothing may go, as its users name
    those that make the outputs. `ratio` is of every group. Raises what torch-pruning raises.
    """

    def __init__(self, net: nn.Module, inputs: Any, *, kept: Iterable[str] = (), ratio: float = 0.3) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(True)
        self._names = {module: name for name, module in self.net.named_modules()}
        self._left: dict[tuple[str, Side], list[int]] = {}  # by place what channel it was
        with _silence():
            self._pruner = tp.pruner.BasePruner(
                self.net,
                inputs,
                importance=tp.importance.RandomImportance(),
                pruning_ratio=ratio,
                ignored_layers=[self.net.get_submodule(name) for name in kept],
                in_channel_groups={},  # its defaults are one dict for all pruners
                out_channel_groups={},
            )

    def groups(self) -> list[PeerGroup]:
        """Return all groups, with a unit for what its pruner removes together.

        In a group with grouped convolutions or group norms that is the same offset of every block.
        """
        pruner = self._pruner
        with _silence():
            groups = list(pruner.DG.get_all_groups(pruner.ignored_layers, tuple(pruner.root_module_types)))
        return [self._in_our_terms(group) for group in groups]

    def goes_with(self, root: str, outputs: Iterable[int]) -> frozenset[Slot]:
        """Return what would go if these outputs of a layer did.

        A unit of `groups` may be less: where a channel of another layer goes with two of the root's, the
        full group keeps it for the first.
        """
        return frozenset(slot for _, slot in self._slots(self._group(root, outputs)))

    def cut(self, root: str, outputs: Iterable[int]) -> frozenset[Slot]:
        """Remove these outputs of a layer from `net`, and all that goes with them; returns what went."""
        with _silence():
            return self._cut(self._group(root, outputs))

    def prune(self) -> frozenset[Slot]:
        """Let its pruner remove the ratio of every group from `net`, at random; returns what went."""
        with _silence():
            return frozenset().union(*(self._cut(group) for group in self._pruner.step(interactive=True)))

    def _group(self, root: str, outputs: Iterable[int]) -> Group:
        module, graph = self.net.get_submodule(root), self._pruner.DG
        function = graph.get_pruner_of_module(module).prune_out_channels
        with _silence():
            return graph.get_pruning_group(module, function, list(outputs))

    def _cut(self, group: Group) -> frozenset[Slot]:
        gone: dict[tuple[str, Side], set[int]] = {}
        for _, (name, side, place) in self._slots(group):
            gone.setdefault((name, side), set()).add(place)
        group.prune()
        every: set[Slot] = set()
        for (name, side), places in gone.items():
            left = self._left.setdefault((name, side), list(range(self._width(name, side) + len(places))))
            every |= {(name, side, left[place]) for place in places if place < len(left)}  # they may miss
            self._left[name, side] = [channel for place, channel in enumerate(left) if place not in places]
        return frozenset(every)

    def _width(self, name: str, side: Side) -> int:
        module = self.net.get_submodule(name)
        pruner = PrunerBox[ops.module2type(module)]
        width: int = pruner.get_in_channels(module) if side == "in" else pruner.get_out_channels(module)
        return width

    def _in_our_terms(self, group: Group) -> PeerGroup:
        width = len(group[0].idxs)
        size = width // self._pruner._get_channel_groups(group)
        root = self._names[group[0].dep.target.module]
        outputs = [tuple(range(unit, width, size)) for unit in range(size)]
        slots = list(self._slots(group))
        if any(channel is None for channel, _ in slots):  # it loses track over parameters of no layer
            return PeerGroup(root, {unit: self.goes_with(root, unit) for unit in outputs})
        units: list[set[Slot]] = [set() for _ in outputs]
        for channel, slot in slots:
            units[channel % size].add(slot)
        return PeerGroup(root, dict(zip(outputs, map(frozenset, units), strict=True)))

    def _slots(self, group: Group) -> Iterator[tuple[int | None, Slot]]:
        """Yield the channels of layers in a group, each with the root's that it goes with, if known."""
        for item in group:
            dep = item.dep
            if dep.target.type not in _WEIGHTED | _NORMS:
                continue
            pruner = PrunerBox[dep.target.type]
            weighted = dep.target.type in _WEIGHTED - {ops.OPTYPE.DEPTHWISE_CONV}
            side: Side = "in" if weighted and dep.handler == pruner.prune_in_channels else "out"
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                yield root, (self._names[dep.target.module], side, index)


def coupled_channels(net: nn.Module, group: CouplingGroup) -> list[frozenset[Slot]]:
    """One of our groups in the terms of `SecondOpinion`: the channels that go with each unit."""
    units: list[set[Slot]] = [set() for _ in range(group.units)]
    for layer in _layers(net, group)[0]:
        for unit, index in zip(layer.unit.tolist(), layer.index.tolist(), strict=True):
            units[unit].add((layer.name, layer.side, index))
    return [frozenset(unit) for unit in units]


@dataclass(frozen=True)
class _Layer:
    """The channels of one side of one layer that belong to a group, in ascending order of index."""

    name: str
    module: nn.Module
    side: Side
    unit: np.ndarray
    index: np.ndarray

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """torch-pruning sizes its result by the first layer, which must hold every unit: a producer first."""
        return (not self.is_multiplying, self.side != "out", -len(self.index))

    @property
    def is_multiplying(self) -> bool:
        return ops.module2type(self.module) in {ops.OPTYPE.CONV, ops.OPTYPE.LINEAR}

    @property
    def is_scaling(self) -> bool:
        """A norm with a scale; torch-pruning passes over one without."""
        return ops.module2type(self.module) in _NORMS and getattr(self.module, "weight", None) is not None


def _layers(net: nn.Module, group: CouplingGroup) -> tuple[list[_Layer], tuple[str, ...]]:
    """The group's layers as torch-pruning knows layers, and the parameters for which it has none."""
    modules = dict(net.named_modules(remove_duplicate=False))
    layers: dict[tuple[str, Side], _Layer] = {}
    left_out = []
    for member in group.members:
        name, _, attribute = member.parameter.rpartition(".")
        module = modules[name]
        side = _side(module, attribute, member.dim)
        if side is None:
            left_out.append(member.parameter)
        elif (name, side) not in layers or attribute == "weight":
            unit, index = _channels(module, attribute, side, member)
            order = np.argsort(
                index, kind="stable"
            )  # torch-pruning sorts indices in place, but not their roots
            layers[name, side] = _Layer(name, module, side, unit[order], index[order])
    return sorted(layers.values(), key=lambda layer: layer.rank), tuple(left_out)


def _side(module: nn.Module, attribute: str, dim: int) -> Side | None:
    """Which side of a layer the axis of its parameter is; None for what torch-pruning has no layer for."""
    kind = ops.module2type(module)
    if kind in _NORMS or (kind in _WEIGHTED and attribute == "bias") or kind == ops.OPTYPE.DEPTHWISE_CONV:
        return "out"
    if kind in _WEIGHTED and attribute == "weight":
        return "in" if dim == (0 if getattr(module, "transposed", False) else 1) else "out"
    return None


def _channels(module: nn.Module, attribute: str, side: Side, member: Member) -> tuple[np.ndarray, np.ndarray]:
    """The member's units and indices; a grouped conv's input axis stands for an offset in every block."""
    blocks = getattr(module, "groups", 1)
    if side == "out" or blocks == 1 or getattr(module, "transposed", False):
        return member.unit, member.index
    assert isinstance(module.weight, Tensor)
    width = module.weight.shape[1]
    index = member.index[None, :] + width * np.arange(blocks)[:, None]
    return np.tile(member.unit, blocks), index.ravel()


def _judge(
    net: nn.Module, group: CouplingGroup, importance: tp.importance.GroupMagnitudeImportance
) -> BaselineScores:
    every, left_out = _layers(net, group)
    looks_at = tuple(importance.target_types)
    layers = [
        layer
        for layer in every
        if isinstance(layer.module, looks_at) and (layer.is_multiplying or layer.is_scaling)
    ]
    judged = Group()
    for layer in layers:
        node = Node(layer.module, None, layer.name)
        pruner = PrunerBox[node.type]
        function = pruner.prune_out_channels if layer.side == "out" else pruner.prune_in_channels
        item = GroupItem(Dependency(function, function, node, node), layer.index.tolist())
        item.root_idxs = layer.unit.tolist()
        judged._group.append(item)
    if not layers or len(layers[0].index) < group.units:
        return BaselineScores(None, left_out)
    with _silence():
        result = importance(judged)
    if result is None:
        return BaselineScores(None, left_out)
    scores = result[: group.units].cpu().double().numpy()
    mean = scores.mean()  # torch-pruning would divide by 0, and by slots where a unit is several
    return BaselineScores(scores / mean if mean > 0 else scores, left_out)


@contextlib.contextmanager
def _lent_gradients(net: nn.Module, group: CouplingGroup, gradients: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters of the group's layers have these gradients inside; their own .grad comes back."""
    names = {p: name for name, p in reversed(list(net.named_parameters(remove_duplicate=False)))}
    kept = {p: p.grad for layer in _layers(net, group)[0] for p in layer.module.parameters(recurse=False)}
    try:
        for p in kept:
            gradient = gradients.get(names[p])
            p.grad = torch.zeros_like(p) if gradient is None else gradient.to(p.dtype).to(p.device)
        yield
    finally:
        for p, grad in kept.items():
            p.grad = grad


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """torch-pruning prints and warns; what it has to say is in what it returns."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
