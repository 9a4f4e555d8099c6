"""The engine on published SE networks, untrained, 30 % of every group removed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sepress.coupling import Coupling, apply_removal, check_removal, trace

# reference -> gates, as counted by hand in the published architectures
NETS = {
    "timm:seresnet50": 16,
    "timm:mobilenetv3_large_100": 8,
    "timm:regnety_016": 27,
    "timm:seresnext50_32x4d": 16,
}
MORE_NETS = {
    "timm:efficientnet_b0": 16,
    "torchvision:mobilenet_v3_large": 8,
    "torchvision:efficientnet_b0": 16,
    "timm:ese_vovnet19b_dw": 4,
    "timm:ghostnet_100": 7,
    "timm:nf_regnet_b0": 16,
    "timm:mixnet_s": 13,
    "timm:fbnetv3_b": 18,
}


def untrained(reference: str) -> tuple[nn.Module, Tensor]:
    """Return a net with running statistics of its own data, so that its outputs depend on the image."""
    source, name = reference.split(":")
    torch.manual_seed(0)
    net = timm.create_model(name) if source == "timm" else torchvision.models.get_model(name, weights=None)
    images = torch.randn(4, 3, 64, 64)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():
        net.train()(images)
    return net.eval(), images[:2]


def thirty_percent(coupling: Coupling) -> dict[str, tuple[int, ...]]:
    generator = np.random.default_rng(0)
    return {
        group.name: tuple(sorted(generator.permutation(group.units)[: int(0.3 * group.units)].tolist()))
        for group in coupling.prunable()
    }


def macs(net: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images[:1])
    return counter.get_total_flops() // 2


def hold(reference: str, gates: int) -> None:
    net, images = untrained(reference)
    coupling = trace(net, images)
    assert len(coupling.gates) == gates
    assert all(gate.group and (gate.units >= 0).any() for gate in coupling.gates)
    frozen = [group.frozen_because for group in coupling.groups if group.role == "frozen"]
    assert frozen == ["network output"]
    removed = thirty_percent(coupling)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, images)
    assert check.passed, (check, culprits)
    assert coupling.count_macs({}) == macs(net, images)
    assert coupling.count_macs(removed) == macs(pruned, images)
    assert coupling.count_params(removed) == sum(p.numel() for p in pruned.parameters())
    pruned.train()(images).square().sum().backward()


@pytest.mark.parametrize("reference", NETS)
def test_a_published_net_is_traced_pruned_and_checked(reference: str) -> None:
    hold(reference, NETS[reference])


@pytest.mark.slow
@pytest.mark.parametrize("reference", MORE_NETS)
def test_more_published_nets_are_traced_pruned_and_checked(reference: str) -> None:
    hold(reference, MORE_NETS[reference])
