"""Numbers that code computes from attributes follow the channels that they count."""

from __future__ import annotations

import copy
from fractions import Fraction

import nets
import pytest
import torch
from torch import Tensor, nn

from sepress.coupling import apply_removal, check_removal, trace
from sepress.coupling.tags import AttributeSource, TaggedInt

A, B = AttributeSource("m", "a", None), AttributeSource("m", "b", 1)


def test_tags_go_through_sums_differences_products_and_exact_quotients() -> None:
    a, b = TaggedInt(12, {A: 1}), TaggedInt(4, {B: 1})
    for result, value, terms in (
        (a + b, 16, {A: 1, B: 1}),
        (a - b, 8, {A: 1, B: -1}),
        (sum([a, a, b]), 28, {A: 2, B: 1}),
        ((a - b) * 3, 24, {A: 3, B: -3}),
        (2 * a, 24, {A: 2}),
        (a // 4, 3, {A: Fraction(1, 4)}),
        (b * a, 48, {A: 4}),  # four heads: the width is what shrinks
        (a + b - b, 12, {A: 1}),
    ):
        assert type(result) is TaggedInt
        assert (result, result.terms) == (value, terms)
    for plain in (a - a, a + 1, 1 + a, a - 1, 20 - a, a // 5, a * 0.5, a / 2, -a):
        assert not isinstance(plain, TaggedInt)
    assert (a - a, a + 1, 1 + a, a - 1, 20 - a, a // 5, a / 2) == (0, 13, 13, 11, 8, 2, 6)


class Parted(nn.Module):
    """conv a -> some channels through conv b, the others beside -> conv c -> head."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.width, self.inner, self.rest = 8, 3, 5
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(8, 6, 1)
        self.function, self.head = function, nets.Head(6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.function(self, self.a(x))  # type: ignore[operator]
        return self.head(self.c(torch.cat([self.b(first), second], 1)))


def build(function: object) -> tuple[nn.Module, Tensor]:
    inputs = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return nets.lively(Parted(function)).double(), inputs


def cut(function: object, removed: dict[str, tuple[int, ...]]) -> nn.Module:
    net, inputs = build(function)
    coupling = trace(net, inputs)
    pruned = copy.deepcopy(net)
    apply_removal(pruned, coupling, removed)
    check, _ = check_removal(net, pruned, coupling, removed, inputs)
    assert check.passed
    assert check.relative_error is not None
    assert check.relative_error < 1e-12
    return pruned


@pytest.mark.parametrize(
    ("function", "stored"),  # width, inner, rest; those that the forward doesn't ask for stay
    [
        (lambda m, x: x.split([m.inner, m.width - m.inner], 1), (5, 2, 5)),
        (lambda m, x: x.split([m.width - m.rest, m.rest], 1), (5, 3, 3)),
        (lambda m, x: (x[:, : m.inner], x[:, m.inner : m.inner + m.rest]), (8, 2, 5)),  # the end bounds it
        (lambda m, x: (x[:, : x.size(1) - m.rest], x[:, x.size(1) - m.rest :]), (8, 3, 3)),
        (lambda m, x: x.view(-1, m.inner + m.rest, 10, 10).split([2 * m.inner // 2, m.rest], 1), (8, 2, 3)),
    ],
)
def test_differences_and_sums_of_stored_widths_follow_what_they_count(
    function: object, stored: tuple[int, int, int]
) -> None:
    pruned = cut(function, {"a": (1, 4, 7), "b": (0,), "c": (0,)})
    assert (pruned.width, pruned.inner, pruned.rest) == stored
    assert pruned.a.weight.shape[0] == 5


def test_of_a_difference_of_two_unknown_widths_what_it_counts_stays() -> None:
    def halves(m: Parted, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : m.width - m.rest], x[:, m.width - m.rest :]

    coupling = trace(*build(halves))
    frozen = next(group for group in coupling.groups if group.role == "frozen")
    assert (frozen.width, frozen.producers) == (3, ("a",))
    assert "a size computed in the code" in str(frozen.frozen_because)
    pruned = cut(halves, {"a": (1, 4)})
    assert (pruned.width, pruned.rest) == (8, 5)


def test_a_sum_with_a_number_written_in_the_code_stays() -> None:
    coupling = trace(*build(lambda m, x: x.split([m.rest - 2, m.width - m.inner], 1)))
    assert "split at sizes written in the code" in str(coupling.group("a").frozen_because)
