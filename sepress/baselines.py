"""torch-pruning's criteria on our groups, and its dependency graph as a second opinion; its only import.

Group magnitude and group Taylor (Fang et al., DepGraph, CVPR 2023; Molchanov et al., CVPR 2019) are called,
not written again: a baseline must be its authors'.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
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
    """Scores per unit (U,), mean 1; None where torch-pruning knows no layer of the group."""

    scores: np.ndarray | None
    left_out: tuple[str, ...]  # parameters that it has no notion of


def group_l2(net: nn.Module, group: CouplingGroup) -> BaselineScores:
    """The group's magnitude by torch-pruning: squared weights, mean over the layers (p = 2)."""
    return _judge(net, group, tp.importance.GroupMagnitudeImportance(p=2, normalizer=None))


def group_taylor(net: nn.Module, group: CouplingGroup, *, gradients: Mapping[str, Tensor]) -> BaselineScores:
    """The group's first-order Taylor importance by torch-pruning: |w dL/dw|, mean over the layers.

    `gradients` are dL/dw by state-dict name (ExcitationStats.gradients); a parameter without one counts as 0.
    """
    with _lent_gradients(net, group, gradients):
        return _judge(net, group, tp.importance.GroupTaylorImportance(normalizer=None))


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
        return (
            ops.module2type(self.module) not in {ops.OPTYPE.CONV, ops.OPTYPE.LINEAR},
            self.side != "out",
            -len(self.index),
        )


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
    net: nn.Module, group: CouplingGroup, importance: Callable[[Group], Tensor | None]
) -> BaselineScores:
    layers, left_out = _layers(net, group)
    judged = Group()
    for layer in layers:
        node = Node(layer.module, None, layer.name)
        pruner = PrunerBox[node.type]
        function = pruner.prune_out_channels if layer.side == "out" else pruner.prune_in_channels
        item = GroupItem(Dependency(function, function, node, node), layer.index.tolist())
        item.root_idxs = layer.unit.tolist()
        judged._group.append(item)
    if not layers or len(layers[0].index) < group.units or layers[0].rank[0]:
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
