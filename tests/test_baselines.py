"""Baselines: torch-pruning's criteria judge exactly our units, and its graph couples what ours does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from sepress.baselines import (
    BaselineScores,
    SecondOpinion,
    Slot,
    coupled_channels,
    group_bn_scale,
    group_fpgm,
    group_hessian,
    group_l1,
    group_l2,
    group_lamp,
    group_taylor,
)
from sepress.coupling import trace
from sepress.types import CouplingGroup, Member


class Excite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def layer(into: int, out: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class ResidualNet(nn.Module):
    """Two SE-ResNet blocks on one shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = layer(3, 8)
        self.inner = nn.ModuleList(layer(8, 12) for _ in range(2))
        self.outer = nn.ModuleList(layer(12, 8) for _ in range(2))
        self.se = nn.ModuleList(Excite(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for inner, outer, se in zip(self.inner, self.outer, self.se, strict=True):
            x = (x + se(outer(inner(x).relu()))).relu()
        return self.head(x.mean((2, 3)))


class InvertedNet(nn.Module):
    """An inverted bottleneck: widen, depthwise, gate, project, shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = layer(3, 8)
        self.widen = layer(8, 16, 1)
        self.depthwise = layer(16, 16, 3, groups=16)
        self.se = Excite(16)
        self.project = layer(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        h = self.depthwise(self.widen(x).relu()).relu()
        x = x + self.project(self.se(h))
        return self.head(x.mean((2, 3)))


def member(parameter: str, dim: int, n: int) -> Member:
    return Member(parameter, dim, np.arange(n), np.arange(n))


def group_of(members: tuple[Member, ...], units: int, producer: str) -> CouplingGroup:
    return CouplingGroup(producer, "ungated", units, units, (producer,), (), members)


def squares(weight: Tensor, dim: int) -> Tensor:
    return weight.detach().square().movedim(dim, 0).flatten(1).sum(1)


@pytest.mark.parametrize("kind", [ResidualNet, InvertedNet])
def test_torch_pruning_couples_the_channels_that_we_couple(kind: type[nn.Module]) -> None:
    net, x = kind().eval(), torch.randn(1, 3, 8, 8)
    theirs = {unit for group in SecondOpinion(net, x).groups() for unit in group.units.values()}
    ours = [unit for group in trace(net, x).prunable() for unit in coupled_channels(net, group)]
    assert len(ours) >= 2 * 8 + 2 * 4
    assert theirs - set(ours) == {frozenset({("head", "out", i)}) for i in range(5)}  # the classes stay
    assert set(ours) <= theirs


def units_of(net: nn.Module, group: tp.dependency.Group) -> dict[int, frozenset[Slot]]:
    """A group of torch-pruning's own graph in the terms of `coupled_channels`, by its root's channel."""
    names = {module: name for name, module in net.named_modules()}
    slots: dict[int, set[Slot]] = {}
    for item in group:
        module, handler = item.dep.target.module, item.dep.handler.__name__
        if module in names and next(module.parameters(recurse=False), None) is not None:
            depthwise = getattr(module, "groups", 1) > 1
            into = isinstance(module, nn.Conv2d | nn.Linear) and handler == "prune_in_channels"
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                slots.setdefault(root, set()).add(
                    (names[module], "in" if into and not depthwise else "out", index)
                )
    return {root: frozenset(unit) for root, unit in slots.items()}


@pytest.mark.parametrize("kind", [ResidualNet, InvertedNet])
@pytest.mark.parametrize(
    ("judge", "importance"),
    [
        (group_l1, tp.importance.GroupMagnitudeImportance(p=1)),
        (group_l2, tp.importance.GroupMagnitudeImportance(p=2)),
        (group_lamp, tp.importance.LAMPImportance()),
        (group_bn_scale, tp.importance.BNScaleImportance()),
        (group_fpgm, tp.importance.FPGMImportance()),
        (group_taylor, tp.importance.GroupTaylorImportance()),
        (group_hessian, tp.importance.GroupHessianImportance()),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_scores_are_those_of_torch_pruning_on_its_own_graph(
    kind: type[nn.Module], judge: Callable[..., BaselineScores], importance: Callable[..., Tensor]
) -> None:
    net, x = kind().eval(), torch.randn(1, 3, 8, 8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    ours = {}
    gradients = {name: torch.rand_like(p) for name, p in net.named_parameters()}
    lent = {group_taylor: {"gradients": gradients}, group_hessian: {"squares": gradients}}.get(judge, {})
    for group in trace(net, x).prunable():
        result = judge(net, group, **lent)
        if result.scores is not None:
            ours.update(zip(coupled_channels(net, group), result.scores.tolist(), strict=True))
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=x)
    for name, p in net.named_parameters():
        p.grad = gradients[name]
    met = set()
    for group in graph.get_all_groups():
        units = units_of(net, group)
        if all(unit in ours for unit in units.values()):
            theirs = importance(group)
            theirs = (theirs / theirs.mean()).tolist()
            assert [ours[units[root]] for root in range(len(theirs))] == pytest.approx(theirs, rel=1e-4)
            met.update(units.values())
    assert met == ours.keys()
    assert len(met) >= 2 * 8


def test_torch_prunings_own_accumulation_keeps_the_last_image_alone() -> None:
    """Why squared gradients are lent instead; once this fails, its own way is as good."""
    net, hessian = nn.Linear(2, 2), tp.importance.GroupHessianImportance()
    for gradient in (3.0, 2.0):
        net.weight.grad = torch.full((2, 2), gradient)
        hessian.accumulate_grad(net)
    assert hessian._accu_grad[net.weight].unique().tolist() == [4.0]
    assert hessian._counter[net.weight] == 1


def test_lamp_of_weights_that_are_all_zero_is_zero() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for p in net.parameters():
        nn.init.zeros_(p)
    result = group_lamp(net, group_of((member("0.weight", 0, 4), member("1.weight", 1, 4)), 4, "0"))
    assert result.scores.tolist() == [0, 0, 0, 0]


def test_bn_scale_passes_over_a_norm_without_a_scale() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1))
    members = (member("0.weight", 0, 4), member("1.running_mean", 0, 4), member("2.weight", 1, 4))
    assert group_bn_scale(net, group_of(members, 4, "0")).scores is None


def test_group_l2_is_the_mean_over_layers_of_squared_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    nn.init.uniform_(net[1].weight)
    members = (
        member("3.weight", 1, 6),  # in any order
        member("1.running_mean", 0, 6),
        member("1.weight", 0, 6),
        member("0.weight", 0, 6),
        member("0.bias", 0, 6),
    )
    result = group_l2(net, group_of(members, 6, "0"))
    energy = (squares(net[0].weight, 0) + net[1].weight.detach().square() + squares(net[3].weight, 1)) / 3
    np.testing.assert_allclose(result.scores, (energy / energy.mean()).numpy(), rtol=1e-6)
    assert result.left_out == ()


def test_group_taylor_is_the_mean_over_layers_of_weight_times_gradient() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))
    kept = torch.ones_like(net[0].weight)
    net[0].weight.grad = kept
    generator = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(p.shape, generator=generator).double() for n, p in net.named_parameters()}
    members = (member("0.weight", 0, 6), member("0.bias", 0, 6), member("2.weight", 1, 6))
    result = group_taylor(net, group_of(members, 6, "0"), gradients=gradients)
    first = (net[0].weight.detach() * gradients["0.weight"]).abs().sum(1)
    second = (net[2].weight.detach() * gradients["2.weight"]).abs().sum(0)
    total = (first + second) / 2
    np.testing.assert_allclose(result.scores, (total / total.mean()).numpy(), rtol=1e-5)
    assert net[0].weight.grad is kept
    assert net[2].weight.grad is None


def test_a_unit_of_a_grouped_convolution_is_the_same_offset_of_every_block() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, groups=2))
    offset = np.arange(6) % 3  # 2 blocks of 3 inputs: unit u is channels u and u + 3
    members = (
        Member("0.weight", 0, offset, np.arange(6)),
        Member("0.bias", 0, offset, np.arange(6)),
        Member("1.weight", 1, np.arange(3), np.arange(3)),
    )
    result = group_l2(net, CouplingGroup("0", "ungated", 6, 3, ("0",), (), members))
    out = squares(net[0].weight, 0).view(2, 3).sum(0)
    into = 2 * squares(net[1].weight, 1)  # torch-pruning counts a grouped layer's inputs once a block
    np.testing.assert_allclose(result.scores, ((out + into) / (out + into).mean()).numpy(), rtol=1e-5)


def test_permuted_slots_are_scored_at_their_units() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    order = np.array([2, 0, 3, 1])  # unit u lies at index order[u] of the reader
    members = (member("0.weight", 0, 4), Member("1.weight", 1, np.arange(4), order))
    result = group_l2(net, group_of(members, 4, "0"))
    energy = squares(net[0].weight, 0) + squares(net[1].weight, 1)[torch.as_tensor(order)]
    np.testing.assert_allclose(result.scores, (energy / energy.mean()).numpy(), rtol=1e-6)


def test_parameters_without_a_layer_are_named_and_left_out() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.gain = nn.Parameter(torch.full((4,), 9.0))

    net = Scaled()
    with_gain = group_l2(net, group_of((member("gain", 0, 4), member("conv.weight", 0, 4)), 4, "conv"))
    assert with_gain.left_out == ("gain",)
    energy = squares(net.conv.weight, 0)
    np.testing.assert_allclose(with_gain.scores, (energy / energy.mean()).numpy(), rtol=1e-6)
    assert group_l2(net, group_of((member("gain", 0, 4),), 4, "gain")).scores is None


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    net = ResidualNet()
    SecondOpinion(net, torch.randn(1, 3, 8, 8)).groups()
    group_l2(net, group_of((member("stem.0.weight", 0, 8),), 8, "stem.0"))
    assert capfd.readouterr() == ("", "")
