"""Elements that two channels make: both can go, or stay with the reason."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.recover import recover


class Mixer(nn.Module):
    """conv a -> y (N, 8, L); states b and c (N, 6, L); h = y b^T (N, 8, 6) -> function -> h c (N, 8, L)."""

    def __init__(self, function: object = None, inner: int = 8) -> None:
        super().__init__()
        self.a, self.states = nn.Conv2d(3, 8, 4, stride=4), nn.Conv1d(8, 12, 1)
        self.state_width, self.inner = 6, inner
        self.layer, self.linear, self.wide = (
            nn.Conv1d(8, 8, 1),
            nn.Linear(8, 8),
            nn.Conv1d(8, 8, 3, padding=1),
        )
        self.norm, self.batch_norm = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.gain, self.state_gain = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.ones(6))
        self.function, self.head = function, nn.Linear(inner, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2)
        b, c = self.states(y).split([self.state_width, self.state_width], 1)
        h = y @ b.softmax(-1).transpose(1, 2)
        h = self.function(self, h) if self.function else h  # type: ignore[operator]
        return self.head((h @ c).mean(2))


def build(function: object = None) -> tuple[nn.Module, Tensor]:
    inputs = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nets.lively(Mixer(function)).double(), inputs


def pruned_and_checked(net: nn.Module, inputs: Tensor, coupling: Coupling, removed: dict) -> nn.Module:  # type: ignore[type-arg]
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    assert culprits == {}
    assert check.passed
    assert check.relative_error is not None
    assert check.relative_error < 1e-10
    return pruned


@pytest.mark.parametrize(
    "function",
    [
        None,
        lambda m, h: m.layer(h),
        lambda m, h: m.linear(h.transpose(1, 2)).transpose(1, 2),
        lambda m, h: m.norm(h.transpose(1, 2)).transpose(1, 2),
        lambda m, h: m.batch_norm(h).relu(),
        lambda m, h: h * m.gain + m.state_gain,
        lambda m, h: h * h.mean(2, keepdim=True),
        lambda m, h: torch.stack(torch.var_mean(h, 2, keepdim=True)).sum(0) * h,
        lambda m, h: h - h.sum(1, keepdim=True),
        lambda m, h: m.layer(h).sigmoid() * h.permute(0, 2, 1).contiguous().permute(0, 2, 1),
        lambda m, h: h[:, :, None].flatten(2) * 2,
        lambda m, h: h.new_zeros(h.shape) + h,
        lambda m, h: h @ (h.transpose(1, 2) @ h),  # states x states between
    ],
)
def test_rows_and_columns_of_a_product_go_exactly(function: object) -> None:
    net, inputs = build(function)
    coupling = trace(net, inputs)
    names = {group.name: group for group in coupling.prunable()}
    assert {"a", "states"} <= set(names)
    assert names["states"].width == 12
    assert names["states"].units <= 6
    for units in ((0,), (1,)):
        removed = dict.fromkeys(names, units)
        pruned = pruned_and_checked(net, inputs, coupling, removed)
    assert len(pruned.a.weight) == 7
    assert len(pruned.states.weight) in (10, 8)  # 8 where states are taken two by two
    with FlopCounterMode(display=False) as counter:
        pruned(inputs[:1])
    assert (
        coupling.count_macs(removed) == counter.get_total_flops() // 2 == coupling.layers(removed).macs.sum()
    )


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, h: h.softmax(2), "softmax over channels"),
        (lambda m, h: h.softmax(1), "softmax over channels"),
        (lambda m, h: m.wide(h), "channels on two axes in 'convolution'"),
        (lambda m, h: F.pad(h, (1, 0))[:, :, 1:], "channels on two axes in 'constant_pad_nd'"),
        (lambda m, h: torch.cat([h[:, :, :3], h[:, :, 3:]], 2), "channels on two axes in 'slice'"),
        (lambda m, h: h.flatten(1).view(len(h), -1, m.state_width), "channels on two axes in 'view'"),
        (lambda m, h: h.unflatten(2, (2, -1)).flatten(2) * 2, "channels on two axes in 'view'"),
        (lambda m, h: h.clone().add_(h), "channels on two axes in 'add_'"),
        (lambda m, h: h.cumsum(2), "'cumsum'"),
    ],
)
def test_what_can_t_follow_both_stays_with_the_reason(function: object, reason: str) -> None:
    net, inputs = build(function)
    coupling = trace(net, inputs)
    frozen = [g for g in coupling.groups if g.role == "frozen" and g.producers != ("head",)]
    assert any(reason in str(group.frozen_because) for group in frozen)
    free = {group.name: (1,) for group in coupling.prunable()}
    if free:
        pruned_and_checked(net, inputs, coupling, free)


def test_heads_on_one_side_of_a_product_stay() -> None:
    """Talking heads: a layer over heads makes them, and values know nothing of it."""

    class Talking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.scale = 3, 0.4
            self.a, self.qkv, self.out = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 36), nn.Linear(12, 8)
            self.before, self.after, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).flatten(2).transpose(1, 2)
            n, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-2, -1) * self.scale).permute(0, 2, 3, 1)
            scores = self.before(scores).permute(0, 3, 1, 2).softmax(-1).permute(0, 2, 3, 1)
            y = self.after(scores).permute(0, 3, 1, 2) @ v
            return self.head((x + self.out(y.transpose(1, 2).reshape(n, length, -1))).mean(1))

    inputs = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    net = nets.lively(Talking()).double()
    coupling = trace(net, inputs)
    assert "heads that no layer made" in str(coupling.group("after").frozen_because)
    removed = {group.name: (0,) for group in coupling.prunable()}
    assert set(removed) == {"a", "qkv", "before"}
    pruned_and_checked(net, inputs, coupling, removed)


def test_embedded_positions_are_channels_of_what_they_are_added_to() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.embed, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 8, 1), nets.Head(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            rows = torch.linspace(-1, 1, x.size(-1)).to(x)
            grid = torch.stack(torch.meshgrid(rows, rows, indexing="ij"))[None]
            return self.head((x + self.embed(grid)).relu())

    inputs = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    net = nets.lively(Positions()).double()
    coupling = trace(net, inputs)
    assert coupling.group("a").producers == ("a", "embed")
    pruned_and_checked(net, inputs, coupling, {"a": (2, 5)})


def test_a_layer_whose_rows_are_channels_is_not_refitted_from_others() -> None:
    net, _ = build(lambda m, h: m.layer(h))
    net.float()
    batches = [torch.randn(16, 3, 12, 12)]
    coupling = trace(net, batches[0])
    removed = {"states": (1, 3)}
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    before = pruned.layer.weight.clone()
    device = torch.device("cpu")
    recover(pruned, net, coupling, removed, batches, passes=1, recalibrate=lambda _: None, device=device)
    assert torch.equal(pruned.layer.weight, before)
