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
from collections.abc import Iterator, Mapping
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


def torch_pruning_groups(net: nn.Module, inputs: Any) -> list[frozenset[Slot]]:
    """What torch-pruning's own graph couples: for every unit the channels that go with it.

    `inputs` are an example of the forward's. Works on a copy of the net; raises what torch-pruning raises.
    """
    net = copy.deepcopy(net).eval().requires_grad_(True)
    names = {module: name for name, module in net.named_modules()}
    with _silence():
        graph = tp.DependencyGraph().build_dependency(net, example_inputs=inputs)
        groups = [
            [(item.dep, item.idxs, item.root_idxs) for item in group] for group in graph.get_all_groups()
        ]
    units: list[frozenset[Slot]] = []
    for items in groups:
        slots: dict[int, set[Slot]] = {}
        for dep, indices, roots in items:
            if dep.target.type not in _WEIGHTED | _NORMS:
                continue
            pruner = PrunerBox[dep.target.type]
            weighted = dep.target.type in _WEIGHTED - {ops.OPTYPE.DEPTHWISE_CONV}
            side: Side = "in" if weighted and dep.handler == pruner.prune_in_channels else "out"
            for index, root in zip(indices, roots, strict=True):
                slots.setdefault(root, set()).add((names[dep.target.module], side, index))
        units.extend(frozenset(unit) for unit in slots.values())
    return units


def coupled_channels(net: nn.Module, group: CouplingGroup) -> list[frozenset[Slot]]:
    """One of our groups in the terms of `torch_pruning_groups`: the channels that go with each unit."""
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
