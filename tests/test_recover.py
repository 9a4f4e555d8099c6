"""Recovery: a pruned net's layers come to give what the base's give, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sepress.calibrate import calibrate
from sepress.coupling import Coupling, apply_removal, trace
from sepress.pruning import limited
from sepress.reconstruct import compensate
from sepress.recover import recover
from sepress.train import recalibrate_batchnorm
from sepress.types import Removed
from tests import nets
from tests.test_reconstruct import duplicate, measure

CPU = torch.device("cpu")


def build(name: str, images: int = 96) -> tuple[nn.Module, Tensor, Coupling]:
    """A net whose norms hold the statistics of its inputs."""
    net, x = nets.build(name)
    x = torch.randn(images, *x.shape[1:], generator=torch.Generator().manual_seed(2))
    recalibrate_batchnorm(net, x.split(32), device=CPU)
    return net, x, trace(net, x[:1])


def recalibration(x: Tensor) -> Callable[[nn.Module], object]:
    return lambda net: recalibrate_batchnorm(net, limited(x.split(32), 96), device=CPU)


def some_units(coupling: Coupling) -> Removed:
    """Every third unit of every group that may go."""
    return {g.name: tuple(range(0, g.units, 3)) for g in coupling.prunable() if g.units > 3}


def cut(net: nn.Module, coupling: Coupling, removed: Removed, x: Tensor, *, refit: bool = True) -> nn.Module:
    small = copy.deepcopy(net)
    if refit:
        compensate(small, coupling, measure(net, coupling, x), removed)
    apply_removal(small, coupling, removed)
    return small


def restored(
    small: nn.Module, base: nn.Module, coupling: Coupling, removed: Removed, x: Tensor, passes: int
) -> nn.Module:
    net = copy.deepcopy(small)
    recover(
        net, base, coupling, removed, x.split(32), passes=passes, recalibrate=recalibration(x), device=CPU
    )
    return net


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What modules give, (places, channels), over all images."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, y: found.update({name: (y.movedim(1, -1) if y.dim() > 2 else y).flatten(0, -2)})

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    net(x)
    for hook in hooks:
        hook.remove()
    return found


def feature_error(
    small: nn.Module, base: nn.Module, coupling: Coupling, removed: Removed, x: Tensor
) -> float:
    """The share of their variance by which layers differ from the base's, added over layers."""
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and f"{name}.weight" in {reader.parameter for reader in coupling.readers}
    ]
    before, after = outputs(base, x, names), outputs(small, x, names)
    total = 0.0
    for name in names:
        left = torch.ones(before[name].shape[1], dtype=torch.bool)
        for group in coupling.groups:
            for member in group.members:
                if (member.parameter, member.dim) == (f"{name}.weight", 0):
                    gone = [int(i) for u, i in zip(member.unit, member.index, strict=True)
                            if int(u) in removed.get(group.name, ())]  # fmt: skip
                    left[gone] = False
        y = before[name][:, left]
        off = (after[name] - y) - (after[name] - y).mean(0)
        total += float(off.square().mean() / (y - y.mean(0)).square().mean())
    return total


@pytest.mark.parametrize(
    "name", ["plain", "residual", "se residual", "inverted bottleneck", "dense", "grouped"]
)
def test_every_pass_brings_the_layers_nearer_to_the_bases(name: str) -> None:
    net, x, coupling = build(name)
    removed = some_units(coupling)
    small = cut(net, coupling, removed, x, refit=False)
    plain, *errors = (
        feature_error(restored(small, net, coupling, removed, x, passes), net, coupling, removed, x)
        for passes in (0, 1, 2, 4)
    )
    assert all(after < 1.01 * before for before, after in pairwise(errors))  # all layers step at once
    assert errors[-1] < 0.9 * plain


@pytest.mark.parametrize(
    "name", ["plain", "se residual", "inverted bottleneck", "grouped", "flattened", "se 1d"]
)
def test_where_only_a_twin_went_the_logits_stay(name: str) -> None:
    net, x, coupling = build(name)
    group = next(group for group in coupling.prunable() if group.units > 3)
    duplicate(net, coupling, group, unit=2, twin=0)
    recalibrate_batchnorm(net, x.split(32), device=CPU)
    removed = {group.name: (2,)}
    small = restored(cut(net, coupling, removed, x), net, coupling, removed, x, passes=3)
    with torch.no_grad():
        a, b = net(x), small(x)
    assert (a - b).abs().max() < 1e-4 * (a - a.mean(0)).abs().max()


@pytest.mark.parametrize("name", sorted(nets.NETS))
def test_any_net_recovers_in_finite_weights_the_same_twice_and_its_base_untouched(name: str) -> None:
    """Grouped, depthwise and transposed layers, tied and computed weights, several outputs."""
    net, x, coupling = build(name, images=24)
    removed = some_units(coupling)
    small = cut(net, coupling, removed, x)
    before = copy.deepcopy(net.state_dict())
    once = restored(small, net, coupling, removed, x, passes=2)
    again = restored(small, net, coupling, removed, x, passes=2)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for key, value in once.state_dict().items():
        assert value.isfinite().all(), key
        assert torch.equal(value, again.state_dict()[key]), key


def test_no_pass_is_a_recalibration() -> None:
    net, x, coupling = build("se residual")
    removed = some_units(coupling)
    small = cut(net, coupling, removed, x)
    done = restored(small, net, coupling, removed, x, passes=0)
    recalibration(x)(small)
    assert all(torch.equal(value, done.state_dict()[key]) for key, value in small.state_dict().items())


def test_modes_and_requires_grad_are_restored() -> None:
    net, x, coupling = build("se residual")
    removed = some_units(coupling)
    small = cut(net, coupling, removed, x)
    for part in (net, small):
        part.train()
        part.stem.eval()
        part.head.fc.weight.requires_grad_(False)
    done = restored(small, net, coupling, removed, x, passes=1)
    for part in (net, done):
        assert part.inner.training
        assert not part.stem.training
        assert not part.head.fc.weight.requires_grad
        assert part.head.fc.bias.requires_grad
        assert all(p.grad is None for p in part.parameters())


def test_the_weight_of_two_modules_with_biases_of_their_own_stays() -> None:
    net, x, coupling = build("tied")
    removed = {"a.0": (1, 4)}
    small = cut(net, coupling, removed, x)
    done = restored(small, net, coupling, removed, x, passes=2)
    assert torch.equal(done.one.weight, small.one.weight)
    assert torch.equal(done.two.bias, small.two.bias)
    assert done.one.weight is done.two.weight
    assert not torch.equal(done.head.fc.weight, small.head.fc.weight)


class Twice(nn.Module):
    """One convolution that is called twice, on a stream of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.head = nets.conv_bn(3, 8), nn.Conv2d(8, 8, 3, padding=1), nets.Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(self.shared(self.shared(x).relu()).relu())


def test_a_layer_that_is_called_twice_is_fitted_to_both_calls() -> None:
    net = nets.lively(Twice())
    x = torch.randn(96, 3, 10, 10, generator=torch.Generator().manual_seed(2))
    recalibrate_batchnorm(net, x.split(32), device=CPU)
    coupling = trace(net, x[:1])
    (group,) = (group for group in coupling.prunable() if "a.0" in group.producers)
    removed = {group.name: (1, 4)}
    small = cut(net, coupling, removed, x, refit=False)
    done = restored(small, net, coupling, removed, x, passes=4)
    left = [0, 2, 3, 5, 6, 7]

    def off(part: nn.Module, kept: list[int]) -> float:
        with torch.no_grad():
            total = 0.0
            one, other = net.a(x).relu(), part.a(x).relu()
            for _ in range(2):
                one, other = net.shared(one), part.shared(other)
                total += float((one[:, left] - other[:, kept]).square().mean())
                one, other = one.relu(), other.relu()
        return total

    assert not torch.equal(done.shared.weight, small.shared.weight)
    assert off(done, list(range(6))) < off(small, list(range(6)))


def test_computed_weights_stay_and_the_layers_behind_them_are_fitted() -> None:
    net, x, coupling = build("weight norm")
    removed = {"a": (1, 4), "b": (2,)}
    small = cut(net, coupling, removed, x)
    done = restored(small, net, coupling, removed, x, passes=2)
    assert torch.equal(done.b.weight, small.b.weight)
    assert torch.equal(done.b.bias, small.b.bias)
    assert not torch.equal(done.head.fc.weight, small.head.fc.weight)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nets.conv_bn(3, 8), nets.conv_bn(2, 8)
        self.c, self.head = nets.conv_bn(8, 6), nets.Head(6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.c((self.a(x) + self.b(y)).relu()).relu())


def test_a_net_of_two_inputs_recovers() -> None:
    net = nets.lively(TwoInputs())
    generator = torch.Generator().manual_seed(2)
    batches = [
        (torch.randn(32, 3, 8, 8, generator=generator), torch.randn(32, 2, 8, 8, generator=generator))
        for _ in range(3)
    ]
    recalibrate_batchnorm(net, batches, device=CPU)
    coupling = trace(net, tuple(part[:1] for part in batches[0]))
    removed = {group.name: (0, 3) for group in coupling.prunable()}
    stats = calibrate(net, coupling, batches, evidence=frozenset({"moments"}), device=CPU)
    small = copy.deepcopy(net)
    compensate(small, coupling, stats, removed)
    apply_removal(small, coupling, removed)
    plain = copy.deepcopy(small)
    for part, passes in ((plain, 0), (small, 4)):
        recover(
            part,
            net,
            coupling,
            removed,
            batches,
            passes=passes,
            recalibrate=lambda n: recalibrate_batchnorm(n, batches, device=CPU),
            device=CPU,
        )
    with torch.no_grad():
        base, fitted, other = net(*batches[0]), small(*batches[0]), plain(*batches[0])
    assert (fitted - base).square().mean() < (other - base).square().mean()
