"""Random small SE nets, each from a drawn description, through the whole chain.

Depths, widths, groups, kinds of gates, residuals and concatenations vary; what must hold does not: what is
masked equals what is removed, the plan keeps its promise, and a saved net comes back bit for bit.
"""

from __future__ import annotations

import copy
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sepress
from sepress.coupling import apply_removal, check_removal, trace
from sepress.errors import InputError
from sepress.plan import plan_from_json, plan_to_json
from sepress.types import PruningPlan

# The same examples on every machine; shrinking is what finds the smallest net that fails.
COMMON = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
FAST = settings(COMMON, max_examples=40)
SLOW = settings(COMMON, max_examples=300)


@dataclass(frozen=True)
class Layer:
    """One step of a net: its convolution, what gates it, and how it meets what was before."""

    width: int  # in groups: a layer has groups * width channels
    groups: int
    depthwise: bool
    act: str
    gate: str
    join: str


@dataclass(frozen=True)
class Description:
    layers: tuple[Layer, ...]
    ending: str
    seed: int


ACTS = {"relu": F.relu, "hardswish": F.hardswish, "silu": F.silu, "none": lambda x: x}
GATES = ("none", "none", "se", "linear", "hard", "max", "tanh")

layers = st.builds(
    Layer,
    width=st.integers(1, 6),
    groups=st.sampled_from([1, 1, 1, 2, 3]),
    depthwise=st.booleans(),
    act=st.sampled_from(sorted(ACTS)),
    gate=st.sampled_from(GATES),
    join=st.sampled_from(["none", "none", "add", "cat"]),
)
descriptions = st.builds(
    Description,
    layers=st.lists(layers, min_size=1, max_size=4).map(tuple),
    ending=st.sampled_from(["mean", "flatten"]),
    seed=st.integers(0, 2**16),
)


class Gate(nn.Module):
    """Squeeze and excitation written as people write it."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind, hidden = kind, max(1, channels // 2)
        layer = nn.Linear if kind == "linear" else lambda i, o: nn.Conv2d(i, o, 1)
        self.reduce, self.expand = layer(channels, hidden), layer(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.amax((2, 3), keepdim=True) if self.kind == "max" else x.mean((2, 3), keepdim=True)
        if self.kind == "linear":
            pooled = pooled.flatten(1)
        gate = self.expand(self.reduce(pooled).relu())
        if self.kind == "linear":
            gate = gate[:, :, None, None]
        if self.kind == "hard":
            return x * F.hardsigmoid(gate)
        return x * (1 + gate.tanh() if self.kind == "tanh" else gate.sigmoid())


class Block(nn.Module):
    def __init__(self, inputs: int, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.width = layer.groups * layer.width
        groups = layer.groups if inputs % layer.groups == 0 else 1
        self.conv = nn.Conv2d(inputs, self.width, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(self.width)
        self.depthwise = nn.Conv2d(self.width, self.width, 3, padding=1, groups=self.width)
        self.gate = Gate(self.width, layer.gate) if layer.gate != "none" else nn.Identity()
        self.short = (
            nn.Conv2d(inputs, self.width, 1) if layer.join == "add" and inputs != self.width else None
        )
        self.outputs = self.width + (inputs if layer.join == "cat" else 0)
        if not layer.depthwise:
            self.depthwise = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate(self.depthwise(ACTS[self.layer.act](self.norm(self.conv(x)))))
        if self.layer.join == "add":
            return h + (x if self.short is None else self.short(x))
        return torch.cat([x, h], 1) if self.layer.join == "cat" else h


class Drawn(nn.Module):
    """The net of a description, for images (N, 3, 6, 6)."""

    def __init__(self, description: Description, num_classes: int = 3) -> None:
        super().__init__()
        self.ending, channels = description.ending, 3
        blocks = []
        for layer in description.layers:
            blocks.append(Block(channels, layer))
            channels = blocks[-1].outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels * (9 if self.ending == "flatten" else 1), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        x = F.avg_pool2d(x, 2).flatten(1) if self.ending == "flatten" else x.mean((2, 3))
        logits: Tensor = self.fc(x)
        return logits


def build(description: Description) -> tuple[nn.Module, Tensor]:
    net = nets.lively(Drawn(description), seed=description.seed)
    images = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(description.seed))
    return net, images


def planned(net: nn.Module, images: Tensor, target: dict[str, float]) -> sepress.PruneResult | None:
    """The net pruned by the whole chain; None where the plan says that the target is out of its reach."""
    how = {"criterion": "l2", "compensate": False, "round_to": 1, "min_width": 1}
    try:
        return sepress.prune(net, calibration=images, allow_vacuous=True, **how, **target)
    except InputError as error:
        if re.search("can't be reached|Nothing to prune|removes nothing", error.message):
            return None
        raise


def holds(plan: PruningPlan, target: dict[str, float]) -> bool:
    if "target_macs" in target:
        return plan.macs_after <= target["target_macs"] * plan.macs_before
    if "target_params" in target:
        return plan.params_after <= target["target_params"] * plan.params_before
    return True


def follow(description: Description, target: dict[str, float]) -> bool:
    """Prune the drawn net to the target, and hold every promise on the way; False where nothing can go."""
    net, images = build(description)
    weights = copy.deepcopy(net.state_dict())
    result = planned(net, images, target)
    assert all(torch.equal(weights[name], tensor) for name, tensor in net.state_dict().items())
    if result is None:
        return False
    plan, pruned = result.plan, result.net.eval()
    assert holds(plan, target)
    assert plan_from_json(plan_to_json(plan)) == plan
    assert result.report.checks["masked_equals_removed"].passed is not False
    # once more by hand, from nothing but the plan
    coupling = trace(net, images[:2])
    again = copy.deepcopy(net)
    apply_removal(again, coupling, plan.removed)
    check, culprits = check_removal(net, again, coupling, plan.removed, images)
    assert check.passed is not False, (check, culprits)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in pruned.state_dict().items()
    }
    assert plan.params_after == sum(p.numel() for p in pruned.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pruned(images[:1])
    assert plan.macs_after == counter.get_total_flops() // 2
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".pt", ".safetensors"):
            path = Path(folder, f"net{suffix}")
            sepress.save(pruned, path, arch=lambda **kwargs: Drawn(description, **kwargs))
            loaded = sepress.load(path, arch=lambda **kwargs: Drawn(description, **kwargs)).net.eval()
            assert list(loaded.state_dict()) == list(pruned.state_dict())
            assert all(torch.equal(loaded.state_dict()[n], t) for n, t in pruned.state_dict().items())
            with torch.no_grad():
                assert torch.equal(loaded(images), pruned(images))
    return True


targets = st.one_of(
    st.floats(0.1, 0.9).map(lambda share: {"ratio": share}),
    st.floats(0.2, 0.95).map(lambda share: {"target_macs": share}),
    st.floats(0.2, 0.95).map(lambda share: {"target_params": share}),
)


def run(profile: settings) -> tuple[int, int]:
    """Draw nets and targets as the profile says; returns how many were pruned, and how many drawn."""
    outcomes = []

    @profile
    @given(descriptions, targets)
    def drawn(description: Description, target: dict[str, float]) -> None:
        outcomes.append(follow(description, target))

    drawn()
    return sum(outcomes), len(outcomes)


def test_random_nets_are_pruned_as_planned_and_come_back_bit_for_bit() -> None:
    pruned, drawn = run(FAST)
    assert pruned > drawn // 2  # or the targets ask for what small nets can't give


@pytest.mark.slow
def test_many_random_nets_are_pruned_and_saved() -> None:
    pruned, drawn = run(SLOW)
    print(f"{pruned} of {drawn} drawn nets were pruned")
    assert pruned > drawn // 2
