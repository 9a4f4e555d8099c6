"""Attention: its head width goes with what scales it; anything that can't be made up for stays, with why."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.recover import recover

POSITIONS = 9


class Tokens(nn.Module):
    """conv a -> tokens (N, 9, 8) -> attention, 2 heads of width 6 -> out -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 2, 6
        self.a, self.out, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        y = self.attend(x).transpose(1, 2).reshape(len(x), -1, self.heads * self.width)
        return self.head((x + self.out(y)).mean(1))

    def split(self, x: Tensor) -> Tensor:
        """(N, L, heads * width) -> (N, heads, L, width)."""
        return x.view(len(x), -1, self.heads, self.width).transpose(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Fused(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 36)

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(len(x), -1, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(*qkv.unbind(0))


class Separate(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12, bias=False), nn.Linear(8, 12), nn.Linear(8, 12)

    def attend(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.split(self.k(x)), self.split(self.v(x)))

    def query(self, x: Tensor) -> Tensor:
        return self.split(self.q(x)).contiguous()


class Normed(Separate):
    """A batch norm between the layer and the attention: its gain and bias take the factor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def query(self, x: Tensor) -> Tensor:
        return self.split(self.norm(self.q(x).transpose(1, 2)).transpose(1, 2))


class Keywords(Separate):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.split(self.k(x)), self.split(self.v(x))
        mask = torch.zeros(POSITIONS, POSITIONS)
        return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask.to(q))


class Constant(Separate):
    """A scale of its own stays what it is."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.split(self.k(x)), self.split(self.v(x))
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)


class Twice(Separate):
    """The same queries in two attentions: one factor."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.split(self.k(x)), self.split(self.v(x))
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v.relu())


class Rotated(Separate):
    """An operation between the layer and the attention."""

    def query(self, x: Tensor) -> Tensor:
        return super().query(x) * torch.linspace(0, 1, POSITIONS)[:, None].to(x)


class Same(Separate):
    """Queries are keys: a factor would be there twice."""

    def attend(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return F.scaled_dot_product_attention(q, q, self.split(self.v(x)))


class Elsewhere(Separate):
    """Something else reads the queries as well."""

    def attend(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return F.scaled_dot_product_attention(q, self.split(self.k(x)), self.split(self.v(x))) + q


class OwnWeight(Separate):
    """Something else reads the weight that makes the queries."""

    def query(self, x: Tensor) -> Tensor:
        return super().query(x * self.q.weight.square().mean())


class Computed(Separate):
    """A scale computed from a stored width."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.split(self.k(x)), self.split(self.v(x))
        return (q @ k.transpose(-2, -1) / math.sqrt(self.width)).softmax(-1) @ v


class Mixed(Separate):
    """A scale of its own in one of two attentions."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.split(self.k(x)), self.split(self.v(x))
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v, scale=0.3)


def build(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    inputs = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nets.lively(kind()).double(), inputs


def head_width(coupling: Coupling) -> str:
    return next(g.name for g in coupling.groups if g.name in ("q", "qkv"))


def cut(net: nn.Module, coupling: Coupling, removed: dict[str, tuple[int, ...]]) -> nn.Module:
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    return pruned


@pytest.mark.parametrize("kind", [Fused, Separate, Normed, Keywords, Constant, Twice])
def test_fused_attention_loses_head_channels_exactly(kind: type[nn.Module]) -> None:
    net, inputs = build(kind)
    coupling = trace(net, inputs)
    assert {group.frozen_because for group in coupling.groups} == {None, "network output"}
    removed = {g.name: (0, 2) for g in coupling.prunable()}
    pruned = cut(net, coupling, removed)
    check, _ = check_removal(net, pruned, coupling, removed, inputs)
    assert check.passed
    assert check.relative_error is not None
    assert check.relative_error < 1e-12


def test_what_makes_queries_takes_the_root_of_the_share_of_the_width_that_is_left() -> None:
    net, inputs = build(Fused)
    pruned = cut(net, trace(net, inputs), {"qkv": (1, 4)})
    kept = [0, 2, 3, 5]
    rows = [head * 6 + row for head in range(6) for row in kept]  # q, k, v, each of two heads
    factor = torch.ones(24, dtype=torch.float64)
    factor[:8] = (4 / 6) ** 0.5
    torch.testing.assert_close(pruned.qkv.weight, net.qkv.weight[rows] * factor[:, None], rtol=1e-15, atol=0)
    torch.testing.assert_close(pruned.qkv.bias, net.qkv.bias[rows] * factor, rtol=1e-15, atol=0)


def test_the_masked_attention_by_hand() -> None:
    net, inputs = build(Separate)
    coupling = trace(net, inputs)
    pruned = cut(net, coupling, {head_width(coupling): (0, 3)})
    x = net.a(inputs).flatten(2).transpose(1, 2)
    gone = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.bool)
    q, k = (net.split(layer(x)).masked_fill(gone, 0) for layer in (net.q, net.k))
    v = net.split(net.v(x))
    if len(pruned.v.weight) < 12:  # values of the same unit go with them
        v = v.masked_fill(gone, 0)
    y = (q @ k.transpose(-2, -1) / 6**0.5).softmax(-1) @ v
    y = y.transpose(1, 2).reshape(3, -1, 12)
    expected = net.head((x + net.out(y)).mean(1))
    torch.testing.assert_close(pruned(inputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Fused, Separate, Normed])
def test_two_cuts_of_a_head_width_give_what_one_gives(kind: type[nn.Module]) -> None:
    net, inputs = build(kind)
    coupling = trace(net, inputs)
    name = head_width(coupling)
    first = cut(net, coupling, {name: (0,)})
    second = cut(first, trace(first, inputs), {name: (2,)})  # of what is left
    once = cut(net, coupling, {name: (0, 3)})
    for ours, theirs in zip(second.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", [Rotated, Same, Elsewhere, OwnWeight, Mixed])
def test_queries_that_are_not_one_layer_s_alone_keep_their_width(kind: type[nn.Module]) -> None:
    net, inputs = build(kind)
    coupling = trace(net, inputs)
    group = coupling.group(head_width(coupling))
    assert group.role == "frozen"
    assert "attention scaled by its head width" in str(group.frozen_because)


def test_a_scale_computed_from_the_width_keeps_it() -> None:
    coupling = trace(*build(Computed))
    assert "computed with as a number" in str(coupling.group("q").frozen_because)


def test_torch_s_own_attention_layer_keeps_all_its_widths() -> None:
    class Torch(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.attention = nn.Linear(8, 12), nn.MultiheadAttention(12, 2, batch_first=True)

        def attend(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return self.split(self.attention(x, x, x)[0])

    coupling = trace(*build(Torch))
    reasons = {group.name: str(group.frozen_because) for group in coupling.groups}
    for name in ("inner", "attention", "attention.out_proj"):
        assert "fixed by multi_head_attention_forward" in reasons[name]


@pytest.mark.parametrize("kind", [Fused, Separate, Normed])
def test_without_the_factor_the_check_fails(kind: type[nn.Module]) -> None:
    """The negative control: all that is missing is the factor."""
    net, inputs = build(kind)
    coupling = trace(net, inputs)
    removed = {head_width(coupling): (0, 3)}
    pruned = cut(net, coupling, removed)
    for (name, dim), factors in coupling.factors(removed).items():
        parameter = pruned.get_parameter(name)
        left = factors[factors != 1]
        rows = torch.from_numpy(np.flatnonzero(factors != 1)[: 2 * len(left) // 3])
        with torch.no_grad():
            parameter.index_copy_(dim, rows, parameter.index_select(dim, rows) / left[0])
    check, culprits = check_removal(net, pruned, coupling, removed, inputs)
    assert check.passed is False
    assert culprits


def test_refitted_queries_keep_their_factor() -> None:
    """Fitted to the base's queries times the factor, they stay where surgery put them: nothing was lost."""
    net = build(Separate)[0].float()
    with torch.no_grad():  # channels 0 of both heads are 0 in queries and keys
        for layer in (net.q, net.k, net.v):
            layer.weight[[0, 6]] = 0
            if layer.bias is not None:
                layer.bias[[0, 6]] = 0
    batches = [torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(2))]
    coupling = trace(net, batches[0])
    removed = {head_width(coupling): (0,)}
    pruned = cut(net, coupling, removed)
    expected = net(batches[0])
    torch.testing.assert_close(pruned(batches[0]), expected, rtol=1e-4, atol=1e-5)
    recover(
        pruned,
        net,
        coupling,
        removed,
        batches,
        passes=4,
        recalibrate=lambda _: None,
        device=torch.device("cpu"),
    )
    torch.testing.assert_close(pruned(batches[0]), expected, rtol=1e-2, atol=1e-2)
