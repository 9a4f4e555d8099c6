"""Layers that run only in training follow what they read; what runs in neither mode stays, and is named."""

from __future__ import annotations

import copy
import io

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sepress
from sepress.coupling import Coupling, apply_removal, check_removal, trace

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Auxiliary(nn.Module):
    """A trunk with a gate; in training a head reads its middle, behind a depthwise layer and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.se = nets.conv_bn(3, 8), nets.conv_bn(8, 12), nets.SqueezeExcite(12, 6)
        self.head = nets.Head(12)
        self.depthwise, self.aux = nets.conv_bn(8, 8, groups=8), nn.Linear(8, 6)
        self.norm, self.aux_head = nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        middle = self.stem(x).relu()
        out = self.head(self.se(self.body(middle)).relu())
        if self.training:
            pooled = self.depthwise(middle).relu().mean((2, 3))
            return out, self.aux_head(F.dropout(self.norm(self.aux(pooled)).relu(), 0.5, self.training))
        return out


class Unused(nn.Module):
    """A classifier of the backbone that nothing calls, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nets.Plain()
        self.backbone.classifier = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        self.spare = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class NeedsTargets(Auxiliary):
    """Its forward in training asks for targets: before anything runs, or after all did."""

    def __init__(self, *, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and self.at_once and targets is None:
            raise ValueError("targets are needed in training")
        outputs = super().forward(x)
        if isinstance(outputs, Tensor):
            return outputs
        assert targets is not None, "targets are needed for the loss"
        return sum(F.cross_entropy(out, targets) for out in outputs)


def remove_third(net: nn.Module, coupling: Coupling) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    removed = {g.name: tuple(range(0, g.units, 3))[: g.units - 1] for g in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, IMAGES)
    assert check.passed
    assert culprits == {}
    return pruned, removed


def test_a_head_that_runs_only_in_training_shrinks_with_the_trunk() -> None:
    net = nets.lively(Auxiliary())
    coupling = trace(net, IMAGES)
    assert coupling.idle.training == ("depthwise", "aux", "norm", "aux_head")
    assert coupling.idle.unused == ()
    stem = coupling.group("stem.0")
    assert {m.parameter for m in stem.members} >= {"depthwise.0.weight", "depthwise.1.bias", "aux.weight"}
    assert coupling.group("aux").role == "ungated"
    assert coupling.group("aux_head").frozen_because == "network output"
    pruned, removed = remove_third(net, coupling)
    assert pruned.depthwise[0].groups == pruned.aux.in_features == 8 - len(removed["stem.0"])


def test_the_pruned_net_with_its_auxiliary_head_trains_and_loads_again() -> None:
    net = nets.lively(Auxiliary())
    pruned, _ = remove_third(net, trace(net, IMAGES))
    before = pruned.aux.weight.detach().clone()
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.1)
    out, aux = pruned.train()(IMAGES)
    (F.cross_entropy(out, torch.arange(4)) + F.cross_entropy(aux, torch.arange(4))).backward()
    optimiser.step()
    assert not torch.equal(before, pruned.aux.weight)
    file = io.BytesIO()
    torch.save(pruned.state_dict(), file)
    again, _ = remove_third(net, trace(net, IMAGES))
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again.eval()(IMAGES), pruned.eval()(IMAGES))


def test_masked_and_removed_are_equal_in_training_mode_too() -> None:
    """By hand: the removed channels' filters and gains are zero, dropout is off."""
    net = nets.lively(Auxiliary())
    coupling = trace(net, IMAGES)
    pruned, removed = remove_third(net, coupling)
    masked = copy.deepcopy(net)
    with torch.no_grad():
        for name, units in removed.items():
            for member in coupling.group(name).members:
                gone = [i for i, unit in zip(member.index, member.unit, strict=True) if unit in units]
                if member.dim == 0 and member.parameter.endswith(("weight", "bias")):
                    masked.get_parameter(member.parameter)[gone] = 0
    F_dropout, F.dropout = F.dropout, lambda x, *_: x
    try:
        expected, found = masked.train()(IMAGES), pruned.train()(IMAGES)
    finally:
        F.dropout = F_dropout
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_the_trace_in_training_mode_touches_comes_back_as_it_was() -> None:
    net = nets.lively(Auxiliary())
    net.norm.train()
    before = {name: x.clone() for name, x in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    trace(net, IMAGES[:1])
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_net_without_such_layers_is_traced_once() -> None:
    net, inputs = nets.build("plain")
    modes: list[bool] = []
    net.register_forward_hook(lambda module, *_: modes.append(module.training))
    assert trace(net, inputs).idle.training == ()
    assert modes == [False]


def test_the_trace_in_training_mode_leaves_gates_sites_and_costs_alone() -> None:
    with_head = trace(nets.lively(Auxiliary()), IMAGES)
    net = Auxiliary()
    net.depthwise = net.aux = net.norm = net.aux_head = nn.Identity()
    net.forward = lambda x: Auxiliary.forward(net.eval(), x)  # type: ignore[method-assign]
    without = trace(nets.lively(net), IMAGES)
    assert with_head.calls == without.calls
    assert [gate.site for gate in with_head.gates] == [gate.site for gate in without.gates]
    assert with_head.count_macs({}) == without.count_macs({})
    assert len(with_head.readers) == len(without.readers)


def test_modules_that_run_in_neither_mode_stay_and_are_named() -> None:
    net = nets.lively(Unused())
    coupling = trace(net, IMAGES)
    assert coupling.idle.unused == ("backbone.classifier", "")
    assert coupling.idle.training == ()
    pruned, _ = remove_third(net, coupling)
    assert pruned.backbone.classifier[0].weight.shape == (4, 6)


def test_a_plan_says_what_runs_in_training_only_and_what_never_runs() -> None:
    result = sepress.prune(nets.lively(Auxiliary()), calibration=IMAGES, ratio=0.3, min_width=2)
    assert "Runs in training only, and was cut with what it reads: depthwise, aux, norm, aux_head." in (
        result.plan.notes
    )
    result = sepress.prune(nets.lively(Unused()), calibration=IMAGES, ratio=0.3, min_width=2)
    assert (
        "No forward uses these parameters, so they stay as they are: backbone.classifier, the net itself."
        in (result.plan.notes)
    )


def test_a_loss_inside_the_forward_hides_no_layer_before_it() -> None:
    net = nets.lively(NeedsTargets(at_once=False))
    coupling = trace(net, IMAGES)
    assert coupling.idle.training == ("depthwise", "aux", "norm", "aux_head")
    pruned, _ = remove_third(net, coupling)
    pruned.train()(IMAGES, torch.arange(4)).backward()


def test_where_training_mode_fails_at_once_what_unseen_layers_may_read_is_frozen() -> None:
    net = nets.lively(NeedsTargets(at_once=True))
    coupling = trace(net, IMAGES)
    assert "aux" in coupling.idle.unused
    stem = coupling.group("stem.0")  # as wide as what the depthwise layer and the linear one read
    assert stem.frozen_because is not None
    assert "'depthwise.1' may read it in training" in stem.frozen_because
    assert "targets are needed in training" in stem.frozen_because
    pruned, removed = remove_third(net, coupling)
    assert removed
    pruned.train()(IMAGES, torch.arange(4)).backward()


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_auxiliary_heads_follow(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    net = nets.lively(
        models.get_model(name, weights=None, aux_logits=True, init_weights=False, num_classes=5)
    )
    size = 64 if name == "googlenet" else 299
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    coupling = trace(net, images)
    assert coupling.idle.training == (("aux1", "aux2") if name == "googlenet" else ("AuxLogits",))
    removed = {g.name: tuple(range(0, g.units, 4)) for g in coupling.prunable()}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    outputs = pruned.train()(images)
    sum(x.square().mean() for x in outputs).backward()
    assert all(p.grad is not None for p in pruned.parameters())
