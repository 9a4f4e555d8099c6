"""Plans on chains of convolutions whose MACs and parameters have a formula of their own."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sepress
from sepress.coupling import apply_removal, trace
from sepress.errors import InputError
from sepress.plan import (
    SCOPES,
    check_plan,
    check_policy,
    format_plan,
    plan_from_json,
    plan_pruning,
    plan_to_json,
    smallest_macs,
)
from sepress.plan.structure import classes, structure
from sepress.types import CouplingGroup, Member, Policy, PruningPlan, Ranking, Reason

SEEDS = range(12)
OVER_GROUPS = [scope for scope in SCOPES if scope not in ("auto", "per-group")]


def group(name: str, width: int, *, units: int | None = None, role: str = "ungated") -> CouplingGroup:
    count = width if units is None else units
    member = Member(
        f"{name}.weight", 0, np.arange(count), np.arange(count)
    )  # arrays: groups can't be compared
    because = (Reason("the output"),) if role == "frozen" else ()
    gates = (f"{name}.gate",) if role == "gated" else ()
    return CouplingGroup(name, role, width, count, (name, f"{name}.twin"), gates, (member,), because)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Chain:
    """conv 1x1 after conv 1x1, without bias: layer i reads group i - 1 (3 channels first) at positions[i]."""

    groups: tuple[CouplingGroup, ...]
    positions: tuple[int, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        inputs = (3, *(g.width for g in self.groups))
        return {f"{g.name}.weight": (g.width, n, 1, 1) for g, n in zip(self.groups, inputs, strict=False)}

    def partners(self) -> dict[str, str]:
        return {}

    def prunable(self) -> tuple[CouplingGroup, ...]:
        return tuple(g for g in self.groups if g.role != "frozen" and g.units > 1)

    def kept(self, removed: Mapping[str, tuple[int, ...]]) -> list[int]:
        return [g.width - len(removed.get(g.name, ())) * (g.width // g.units) for g in self.groups]

    def count_params(self, removed: Mapping[str, tuple[int, ...]]) -> int:
        return sum(a * b for a, b in itertools.pairwise([3, *self.kept(removed)]))

    def count_macs(self, removed: Mapping[str, tuple[int, ...]]) -> int:
        products = itertools.pairwise([3, *self.kept(removed)])
        return sum(a * b * p for (a, b), p in zip(products, self.positions, strict=True))


def chain(*groups: CouplingGroup) -> Chain:
    return Chain(groups, tuple(4 ** (len(groups) - i) for i in range(len(groups))))


def ranking(net: Chain, *, seed: int = 0, scores: Mapping[str, tuple[float, ...]] | None = None) -> Ranking:
    generator = random.Random(seed)
    drawn = {
        g.name: tuple(generator.random() * (1 + len(g.name)) for _ in range(g.units)) for g in net.groups
    }
    scores = {**drawn, **(scores or {})}
    # Each unit costs its score, so that the units that go cost their sum.
    costs = {
        name: tuple(itertools.accumulate(sorted(values), initial=0.0)) for name, values in scores.items()
    }
    return Ranking("contribution", scores, {g.name: "its readers" for g in net.groups}, costs=costs)


def plan(
    net: Chain, *, seed: int = 0, scores: Mapping[str, tuple[float, ...]] | None = None, **policy: object
) -> PruningPlan:
    return plan_pruning(
        ranking(net, seed=seed, scores=scores), net, policy=Policy(**{"scope": "per-group", **policy})
    )  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bank(Chain):
    """Groups that share no layer: each channel has a price of its own, whatever else goes."""

    prices: Mapping[str, int] = field(default_factory=dict)  # MACs a channel; a parameter each

    def count_params(self, removed: Mapping[str, tuple[int, ...]]) -> int:
        return sum(self.kept(removed))

    def count_macs(self, removed: Mapping[str, tuple[int, ...]]) -> int:
        return sum(n * self.prices[g.name] for g, n in zip(self.groups, self.kept(removed), strict=True))


def random_bank(seed: int, groups: int, width: int, prices: tuple[int, ...]) -> Bank:
    generator = random.Random(seed)
    names = [f"g{i}" for i in range(groups)]
    return Bank(
        tuple(group(name, width) for name in names), (), {name: generator.choice(prices) for name in names}
    )


def loss(made: Ranking, result: PruningPlan) -> float:
    return sum(made.costs[name][len(units)] for name, units in result.removed.items())


def random_chain(seed: int, *, wide_units: bool = False) -> Chain:
    generator = random.Random(seed)
    groups = []
    for i in range(generator.randint(3, 12)):
        width = generator.choice([12, 16, 20, 24, 36, 48, 64, 72, 96, 128, 160, 256])
        units = width // 4 if wide_units and generator.random() < 0.3 else width
        groups.append(
            group(f"g{i}", width, units=units, role=generator.choice(["gated", "ungated", "se_hidden"]))
        )
    return chain(*groups, group("head", 10, role="frozen"))


def share_removed(result: PruningPlan, net: Chain) -> float:
    names = [g.name for g in net.prunable()]
    before = sum(result.widths_before[name] for name in names)
    return 1 - sum(result.widths_after[name] for name in names) / before


def step_of_largest(net: Chain, round_to: int = 8) -> int:
    largest = max(net.prunable(), key=lambda g: g.width)
    if largest.width >= 4 * round_to:
        return round_to
    return max(2**k for k in range(5) if 2**k <= largest.width / 4)


# ---- widths by hand -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("width", "ratio", "after"),
    [
        (64, 0.3, 48),  # 44.8: 48 is nearer than 40
        (64, 0.5, 32),
        (64, 0.3125, 48),  # exactly 44: half goes up
        (64, 0.32, 40),  # 43.52
        (40, 0.3, 32),  # exactly 28 goes up
        (40, 0.9, 8),  # 4 goes up to 8
        (36, 0.05, 32),  # 34.2: 32 is the nearest multiple of 8
        (20, 0.5, 12),  # narrow: step 4, exactly 10, half goes up
        (20, 0.3, 16),  # 14: half goes up
        (12, 0.34, 8),  # narrow: step 2 gives 7.92
        (31, 0.5, 16),  # narrow: step 4, 15.5
        (32, 0.5, 16),  # not narrow: step 8
        (100, 0.3, 72),  # exactly 70: 72 (9 steps; 8.75)
    ],
)
def test_a_group_takes_the_multiple_nearest_its_exact_width(width: int, ratio: float, after: int) -> None:
    net = chain(group("a", width), group("head", 10, role="frozen"))
    assert plan(net, ratio=ratio).widths_after["a"] == after


def test_rounding_to_one_takes_the_exact_count() -> None:
    net = chain(group("a", 50))
    assert plan(net, ratio=0.3, round_to=1, min_width=1).widths_after == {"a": 35}


def test_the_ratio_means_the_decimal_that_was_typed() -> None:
    # 40 * (1 - 0.9) is 3.9999999999999991 in binary; nine tenths of 40 leave exactly half a step.
    assert plan(chain(group("a", 40)), ratio=0.9, min_width=1).widths_after == {"a": 8}


@pytest.mark.parametrize(
    ("width", "units", "round_to", "after"),
    [
        (128, 4, 8, 96),  # one offset of 32 blocks: a unit is 32 channels; 2.8 units -> 3
        (64, 32, 8, 48),  # units of 2: four of them make a step; 44.8 -> 48
        (96, 32, 8, 72),  # units of 3: eight of them make 24; 67.2 -> 72
        (24, 8, 8, 12),  # units of 3, narrow: a step of 4 makes it 12; 16.8 is nearer 12 than 24
        (60, 2, 8, 30),  # no number of units between fits: one unit; 1.4 -> 1
    ],
)
def test_wide_units_go_in_the_fewest_units_that_make_a_multiple(
    width: int, units: int, round_to: int, after: int
) -> None:
    result = plan(chain(group("a", width, units=units)), ratio=0.3, round_to=round_to)
    assert result.widths_after == {"a": after}


def test_no_group_goes_below_min_width_and_the_note_says_so() -> None:
    net = chain(group("a", 64), group("b", 256))
    result = plan(net, ratio=0.5, min_width=48)
    assert result.widths_after == {"a": 48, "b": 120}  # a gives 16, so b gives 136, not 128: 160 less a step
    assert any("min_width 48" in note and "a (64)" in note for note in result.notes)


@pytest.mark.parametrize("scope", ["per-group", "global"])
def test_the_smallest_net_is_the_least_target_that_can_be_reached(scope: str) -> None:
    net = chain(group("a", 64), group("b", 32))
    policy = Policy(target_macs=0.5, scope=scope)  # type: ignore[arg-type]
    smallest = smallest_macs(ranking(net), net, policy=policy)
    least = smallest / net.count_macs({})
    plan = plan_pruning(ranking(net), net, policy=replace(policy, target_macs=1.001 * least))
    assert plan.macs_after == smallest
    assert plan.widths_after == ({"a": 8, "b": 8} if scope == "per-group" else {"a": 16, "b": 8})
    with pytest.raises(InputError, match="can't be reached"):
        plan_pruning(ranking(net), net, policy=replace(policy, target_macs=0.99 * least))


def test_narrow_groups_are_listed_with_their_step() -> None:
    net = chain(group("a", 20), group("b", 64), group("c", 8))
    notes = "\n".join(plan(net, ratio=0.5).notes)
    assert "a (20 by 4)" in notes
    assert "b (64" not in notes
    assert "Too narrow to lose a step above min_width 8: c (8)" in notes


# ---- order --------------------------------------------------------------------------------------
def test_the_lowest_scores_go_and_of_equal_scores_the_lower_index() -> None:
    net = chain(group("a", 8))
    scores = {"a": (5.0, 1.0, 1.0, 0.0, 1.0, 9.0, 9.0, 9.0)}
    assert plan(net, scores=scores, ratio=0.375, round_to=1, min_width=1).removed == {"a": (1, 2, 3)}


def test_the_remaining_error_falls_on_the_groups_that_rank_lowest() -> None:
    # Five groups of 64 at 0.3: 48 each removes 80 of 96; two more steps bring 96 (within 8: one step, 88).
    net = chain(*(group(name, 64) for name in "abcde"))
    flat = dict.fromkeys("abce", (1.0,) * 64)
    cheap = {"d": tuple(range(1, 65))}  # the cheapest next 8 channels, relative to the group's mean
    after = plan(net, scores={**flat, **cheap}, ratio=0.3).widths_after
    assert after == {"a": 48, "b": 48, "c": 48, "d": 40, "e": 48}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_lowest_ranked_units_of_each_group_go(seed: int, scope: str) -> None:
    net = random_chain(seed, wide_units=True)
    scores = ranking(net, seed=seed).scores
    for name, units in plan(net, seed=seed, ratio=0.4, scope=scope).removed.items():
        gone = [scores[name][unit] for unit in units]
        kept = [score for unit, score in enumerate(scores[name]) if unit not in units]
        assert max(gone) <= min(kept)
        assert list(units) == sorted(set(units))


def test_global_scope_removes_the_lowest_scores_over_their_group_mean() -> None:
    net = chain(group("a", 4), group("b", 4))
    scores = {"a": (100.0, 300.0, 200.0, 200.0), "b": (1.0, 1.0, 3.0, 3.0)}  # means 200 and 2
    result = plan(net, scores=scores, ratio=0.375, scope="global", round_to=1, min_width=1)
    assert result.removed == {"a": (0,), "b": (0, 1)}  # 0.5, and 0.5 twice; the next would be 1.0


@pytest.mark.parametrize("seed", SEEDS)
def test_global_scope_without_rounding_keeps_the_highest_scores(seed: int) -> None:
    net = chain(group("a", 40), group("b", 60), group("c", 25))
    scores = ranking(net, seed=seed).scores
    share = {
        (name, unit): score / (sum(values) / len(values))
        for name, values in scores.items()
        for unit, score in enumerate(values)
    }
    lowest = sorted(share, key=lambda key: share[key])[:50]  # 0.4 of 125
    result = plan(net, seed=seed, ratio=0.4, scope="global", round_to=1, min_width=1)
    assert {(name, unit) for name, units in result.removed.items() for unit in units} == set(lowest)


@pytest.mark.parametrize("scope", OVER_GROUPS)
def test_scopes_over_groups_never_remove_more_than_85_percent_of_one_and_say_so(scope: str) -> None:
    net = chain(group("a", 64), group("b", 64), group("c", 64))
    scores = {"a": (1e-9,) * 63 + (1.0,), "b": (1.0,) * 64, "c": (1.0,) * 64}
    result = plan(net, scores=scores, ratio=0.4, scope=scope, min_width=1)
    assert result.widths_after["a"] == 16  # 15 % of 64 is 9.6: the next multiple of 8
    assert f"Held back, as the {scope} scope removes at most 85% of a group: a (64)." in result.notes


def test_a_group_of_zero_scores_is_cheap_and_not_an_error() -> None:
    net = chain(group("a", 32), group("b", 32))
    result = plan(net, scores={"a": (0.0,) * 32}, ratio=0.2, scope="global")
    assert result.widths_after == {"a": 16, "b": 32}


@pytest.mark.parametrize("scope", SCOPES)
def test_the_same_ranking_gives_the_same_plan(scope: str) -> None:
    net = random_chain(3)
    assert plan(net, seed=3, target_macs=0.5, scope=scope) == plan(net, seed=3, target_macs=0.5, scope=scope)


@pytest.mark.parametrize("scope", OVER_GROUPS)
def test_of_equal_groups_the_first_in_the_net_goes_first(scope: str) -> None:
    net = Bank((group("b", 8), group("a", 8)), (), {"b": 3, "a": 3})
    flat = {"a": (1.0,) * 8, "b": (1.0,) * 8}
    result = plan(net, scores=flat, ratio=0.1875, scope=scope, round_to=1, min_width=1)
    assert result.removed == {"b": (0, 1, 2)}


# ---- isomorphic ---------------------------------------------------------------------------------
def test_groups_of_one_structure_compete_and_every_structure_loses_the_same_share() -> None:
    net = chain(group("a", 4), group("b", 4), group("c", 8, role="gated"))
    scores = {"a": (100.0, 300.0, 200.0, 200.0), "b": (1.0, 1.0, 3.0, 3.0), "c": (9.0,) * 8}
    result = plan(net, scores=scores, ratio=0.375, scope="isomorphic", round_to=1, min_width=1)
    # 3 of 8 from a and b together: 0.5 of the mean, and 0.5 twice; and 3 of 8 from c, equal throughout.
    assert result.removed == {"a": (0,), "b": (0, 1), "c": (0, 1, 2)}


@pytest.mark.parametrize("policy", [{"ratio": 0.2}, {"ratio": 0.4}, {"target_macs": 0.5}])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_share_rounds_to_what_every_class_loses(seed: int, policy: dict[str, float]) -> None:
    net = random_chain(seed)
    result = plan(net, seed=seed, scope="isomorphic", min_width=1, **policy)
    least, most = [], []  # shares that round to what a class lost
    for role in {g.role for g in net.prunable()}:
        alike = [g for g in net.prunable() if g.role == role]
        width = sum(g.width for g in alike)
        gone = width - sum(result.widths_after[g.name] for g in alike)
        step = 8 if any(g.width >= 32 for g in alike) else 4
        # A size target gives back up to one step a group.
        spare = 0 if "ratio" in policy else step * len(alike)
        least.append((gone - step / 2) / width)
        most.append((gone + step / 2 + spare) / width)
    assert max(least) <= min(most)


@pytest.mark.parametrize("target", [{"target_macs": 0.5}, {"target_params": 0.7}])
def test_groups_that_are_like_no_other_keep_the_widths_of_the_per_group_scope(
    target: dict[str, float],
) -> None:
    net = chain(group("a", 64), group("b", 128, role="gated"), group("c", 32, role="se_hidden"))
    own = plan(net, scope="per-group", **target)
    assert plan(net, scope="isomorphic", **target).removed == own.removed


def test_the_structures_of_an_se_resnet_are_its_streams_its_inner_layers_and_its_gates() -> None:
    net = sepress.build("sepress:se_resnet20").eval()
    coupling = trace(net, torch.zeros(1, 3, 32, 32))
    groups = coupling.prunable()
    assert [[groups[i].name for i in alike] for alike in classes(groups, coupling.shapes)] == [
        ["conv1", "stages.1.0.conv2"],  # streams, of 3 blocks and of 3 and a shortcut
        [f"stages.{stage}.{block}.conv1" for stage in range(3) for block in range(3)],
        [f"stages.{stage}.{block}.se.reduce" for stage in range(3) for block in range(3)],
        ["stages.2.0.conv2"],  # the stream that the classifier reads
    ]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ([(64, 3, 3, 3)], [(8, 16, 5, 5)], True),  # widths and the size of a kernel
        ([(64, 3, 3, 3)], [(64, 3, 1, 1)], False),
        ([(64, 3, 1, 1)], [(64, 3, 1)], True),  # images or sequences
        ([(64, 3, 1, 1)], [(64, 3)], False),
        ([(64, 3)], [(64,)], False),
        ([(8, 8, 3, 3)] * 2, [(8, 8, 3, 3)] * 5, True),  # depth
        ([(8, 8, 3, 3)], [(8, 8, 3, 3)] * 2, False),  # one layer, or a stream
    ],
)
def test_a_structure_says_kinds_of_layers_and_whether_they_repeat(
    left: list[tuple[int, ...]], right: list[tuple[int, ...]], same: bool
) -> None:
    def made(shapes: list[tuple[int, ...]]) -> object:
        members = tuple(Member(str(i), 0, np.arange(4), np.arange(4)) for i in range(len(shapes)))
        stream = replace(group("a", 4), members=members)
        return structure(stream, {str(i): shape for i, shape in enumerate(shapes)})

    assert (made(left) == made(right)) is same


def test_reading_and_making_roles_and_gates_are_structure() -> None:
    net = chain(group("a", 4))
    maker = net.groups[0]
    reader = replace(maker, members=(replace(maker.members[0], dim=1),))
    others = [
        reader,
        replace(maker, role="se_hidden"),
        replace(maker, gates=("g",)),
        replace(maker, gates=("g", "h")),
    ]
    assert len({structure(g, net.shapes) for g in [maker, *others]}) == 5
    assert structure(replace(maker, gates=("g", "h", "i")), net.shapes) == structure(others[-1], net.shapes)


# ---- knapsack -----------------------------------------------------------------------------------
def knapsack(net: Chain, costs: Mapping[str, tuple[float, ...]], **policy: float) -> dict[str, int]:
    """How many units go where; a unit's score is its number."""
    scores = {g.name: tuple(map(float, range(g.units))) for g in net.groups}
    made = plan_pruning(
        Ranking("reconstruction", scores, {}, costs=costs),
        net,
        policy=Policy(scope="knapsack", round_to=1, min_width=1, **policy),  # type: ignore[arg-type]
    )
    assert all(units == tuple(range(len(units))) for units in made.removed.values())
    return {name: len(units) for name, units in made.removed.items()}


def test_knapsack_spends_where_the_target_costs_least() -> None:
    net = Bank((group("a", 4), group("b", 4)), (), {"a": 1, "b": 10})
    costs = {"a": (0, 1, 2, 3, 4), "b": (0, 5, 10, 15, 20)}
    # A MAC costs 1 in a and 0.5 in b; a channel (here, a parameter) 1 in a and 5 in b.
    assert knapsack(net, costs, target_macs=0.5) == {"b": 3}  # 22 of 44 go: 30
    assert knapsack(net, costs, target_params=0.5) == {"a": 3, "b": 1}  # 15 % of a stay
    assert knapsack(net, costs, ratio=0.5) == {"a": 3, "b": 1}


def test_knapsack_takes_a_dear_step_for_the_cheap_ones_behind_it() -> None:
    net = Bank((group("a", 4), group("b", 4)), (), {"a": 1, "b": 1})
    # The hull of a: 3 units for 7, then 13 for one; b: 3 each. A greedy choice would begin with b.
    costs = {"a": (0, 5, 6, 7, 20), "b": (0, 3, 6, 9, 12)}
    assert knapsack(net, costs, ratio=0.375) == {"a": 3}
    assert knapsack(net, costs, ratio=0.5) == {"a": 3, "b": 1}


def test_knapsack_counts_the_units_of_a_rounded_step() -> None:
    net = Bank((group("a", 64), group("b", 64)), (), {"a": 1, "b": 1})
    # One unit of a costs less than one of b, eight of them more.
    steep, flat = tuple(k * k / 10 for k in range(65)), tuple(k * 0.7 for k in range(65))
    made = Ranking("reconstruction", {"a": (1.0,) * 64, "b": (1.0,) * 64}, {}, costs={"a": steep, "b": flat})
    result = plan_pruning(made, net, policy=Policy(ratio=0.0625, scope="knapsack"))
    assert result.removed == {"b": tuple(range(8))}


def test_what_saves_nothing_goes_last() -> None:
    net = Bank((group("a", 4), group("b", 4)), (), {"a": 0, "b": 1})
    costs = {"a": (0, 0.1, 0.2, 0.3, 0.4), "b": (0, 1, 2, 3, 4)}
    assert knapsack(net, costs, target_macs=0.25) == {"b": 3}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("prices", [(1,), (1, 2, 3, 7)])
def test_knapsack_is_within_a_step_of_the_best_of_all_plans(seed: int, prices: tuple[int, ...]) -> None:
    net = random_bank(seed, 4, 5, prices)
    made = ranking(net, seed=seed)
    base = net.count_macs({})
    for target in (0.3, 0.5, 0.75):
        result = plan_pruning(
            made, net, policy=Policy(target_macs=target, scope="knapsack", round_to=1, min_width=1)
        )
        best, steps = math.inf, [b - a for c in made.costs.values() for a, b in itertools.pairwise(c)]
        for gone in itertools.product(range(5), repeat=4):  # 85 % of five: four
            saved = sum(k * net.prices[g.name] for g, k in zip(net.groups, gone, strict=True))
            if base - saved <= target * base:
                best = min(best, sum(made.costs[g.name][k] for g, k in zip(net.groups, gone, strict=True)))
        spare = 0 if len(prices) == 1 else max(steps)
        assert best - 1e-9 <= loss(made, result) <= best + spare + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_knapsack_loses_no_more_than_uniform_widths_at_the_same_macs(seed: int) -> None:
    net = random_bank(seed, 10, 64, (1, 3, 9))
    made = ranking(net, seed=seed)
    for ratio in (0.25, 0.5, 0.625):
        uniform = plan_pruning(made, net, policy=Policy(ratio=ratio, scope="per-group"))
        share = uniform.macs_after / uniform.macs_before
        ours = plan_pruning(made, net, policy=Policy(target_macs=share, scope="knapsack"))
        assert ours.macs_after <= uniform.macs_after
        assert loss(made, ours) <= loss(made, uniform)


@pytest.mark.parametrize("costs", [{}, {"a": (0.0,) * 5}, {"a": (0.0,) * 5, "b": (0.0, 1.0, 2.0)}])
def test_knapsack_without_the_cost_of_every_step_names_a_criterion_that_has_it(
    costs: dict[str, tuple[float, ...]],
) -> None:
    net = chain(group("a", 4), group("b", 4))
    with pytest.raises(InputError, match=r"does not say it for '[ab]'") as error:
        knapsack(net, costs, ratio=0.5)
    assert "reconstruction" in str(error.value.remedy)


def test_costs_may_end_where_the_limit_of_the_scope_does() -> None:
    net = Bank((group("a", 4), group("b", 4)), (), {"a": 1, "b": 1})
    assert knapsack(net, {"a": (0, 1, 2, 3), "b": (0, 9, 18, 27)}, ratio=0.25) == {"a": 2}


def test_an_override_needs_no_costs() -> None:
    net = Bank((group("a", 4), group("b", 4)), (), {"a": 1, "b": 1})
    scores = {"a": (1.0,) * 4, "b": (1.0,) * 4}
    made = Ranking("reconstruction", scores, {}, costs={"a": (0.0, 1.0, 2.0, 3.0, 4.0)})
    policy = Policy(ratio=0.5, scope="knapsack", round_to=1, min_width=1, overrides={"b": 0.25})
    assert plan_pruning(made, net, policy=policy).removed == {"a": (0, 1), "b": (0,)}


@pytest.mark.parametrize(
    ("policy", "scope"),
    [({}, "per-group"), ({"frozen": ("b",)}, "knapsack"), ({"overrides": {"b": 0.5}}, "knapsack")],
)
def test_auto_is_the_knapsack_where_costs_are_known_of_all_groups_that_it_chooses_for(
    policy: dict[str, Any], scope: str
) -> None:
    net = chain(group("a", 4), group("b", 4))
    scores = {"a": (1.0, 2.0, 3.0, 4.0), "b": (1.0, 2.0, 3.0, 4.0)}
    made = Ranking("reconstruction", scores, {}, costs={"a": (0.0, 1.0, 2.0, 3.0, 4.0)})
    result = plan_pruning(made, net, policy=Policy(target_macs=0.75, round_to=1, min_width=1, **policy))
    assert result.policy.scope == scope
    said = "Widths by group and not by knapsack: what removal costs is not known of b (4)."
    assert (said in result.notes) == (scope == "per-group")
    without = replace(made, costs={})
    result = plan_pruning(without, net, policy=Policy(target_macs=0.75, round_to=1, min_width=1, **policy))
    assert result.policy.scope == "per-group"
    assert said not in result.notes


def test_auto_takes_a_ratio_of_every_group() -> None:
    net = chain(group("a", 4), group("b", 4))
    scores = {"a": (1.0, 2.0, 3.0, 4.0), "b": (1.0, 2.0, 3.0, 4.0)}
    costs = {"a": (0.0, 1.0, 2.0, 3.0, 4.0), "b": (0.0, 9.0, 18.0, 27.0, 36.0)}
    made = Ranking("reconstruction", scores, {}, costs=costs)
    result = plan_pruning(made, net, policy=Policy(ratio=0.5, round_to=1, min_width=1))
    assert result.policy.scope == "per-group"
    assert result.widths_after == {"a": 2, "b": 2}


# ---- latency ------------------------------------------------------------------------------------
def in_blocks(net: Chain, block: int, price: int = 1) -> Callable[[Mapping[str, tuple[int, ...]]], int]:
    """A runtime that fills the last block of every group with zeros."""
    return lambda removed: sum(price * block * -(-kept // block) for kept in net.kept(removed))


def flat_bank(*widths: int) -> tuple[Bank, Ranking]:
    """Groups of which every channel costs a MAC, and each loses as much as any other: of the first least."""
    names = [f"g{i}" for i in range(len(widths))]
    groups = tuple(group(name, width) for name, width in zip(names, widths, strict=True))
    net = Bank(groups, (), dict.fromkeys(names, 1))
    scores = {g.name: (1.0 + i / 100,) * g.units for i, g in enumerate(groups)}
    return net, ranking(net, scores=scores)


def test_of_plans_that_lose_the_same_the_knapsack_ends_on_whole_blocks() -> None:
    net, made = flat_bank(64, 64, 64)
    policy = Policy(target_macs=0.75, scope="knapsack")
    result = plan_pruning(made, net, policy=policy, latency=in_blocks(net, 16))
    assert sum(result.widths_after.values()) == 0.75 * 192
    assert all(width % 16 == 0 for width in result.widths_after.values())
    assert result.latency_ratio == 0.75


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("target", [0.35, 0.5, 0.8])
def test_a_latency_target_is_met_from_below_within_a_step_of_each_group(seed: int, target: float) -> None:
    net = random_bank(seed, 6, 64, (1, 2, 3))

    def time_of(removed: Mapping[str, tuple[int, ...]]) -> int:
        return 5000 + 100 * net.count_macs(removed)

    made = ranking(net, seed=seed)
    result = plan_pruning(made, net, policy=Policy(target_latency=target), latency=time_of)
    assert result.policy.scope == "knapsack"
    assert result.latency_ratio == time_of(result.removed) / time_of({})
    one_step = 100 * 8 * max(net.prices.values()) / time_of({})
    assert target - one_step < result.latency_ratio <= target


def test_a_latency_that_can_not_be_reached_says_what_can() -> None:
    net, made = flat_bank(64)
    with pytest.raises(
        InputError, match=r"0\.2 of the base's predicted latency .* reachable is 0\.625 of them"
    ):
        # 48 of 64 channels can go, and 64 units of time are beside them
        plan_pruning(
            made,
            net,
            policy=Policy(target_latency=0.2, scope="per-group", min_width=16),
            latency=lambda removed: 64 + net.count_macs(removed),
        )


def test_a_latency_is_not_planned_for_without_a_predictor() -> None:
    net, made = flat_bank(64)
    for scope in ("auto", "per-group"):
        with pytest.raises(InputError, match="nothing predicts it"):
            plan_pruning(made, net, policy=Policy(target_latency=0.5, scope=scope))  # type: ignore[arg-type]


def test_latency_weighs_as_much_as_what_is_counted() -> None:
    # A channel of either is a MAC and costs the same; only those of b take time.
    net, _ = flat_bank(64, 64)
    made = ranking(net, scores={"g0": (1.0,) * 64, "g1": (1.0,) * 64})
    result = plan_pruning(
        made,
        net,
        policy=Policy(target_macs=0.75, scope="knapsack"),
        latency=lambda removed: 10 + net.kept(removed)[1],
    )
    assert result.widths_after == {"g0": 64, "g1": 32}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_smaller_share_removes_whatever_a_larger_does_but_for_the_step_that_is_given_back(
    seed: int,
) -> None:
    net = random_bank(seed, 5, 64, (1, 2, 3))
    made, latency = ranking(net, seed=seed), in_blocks(net, 16, 100)
    plans = [
        plan_pruning(made, net, policy=Policy(target_latency=share / 20), latency=latency).removed
        for share in range(18, 6, -1)
    ]
    for more, less in itertools.pairwise(plans):
        assert all(len(units) <= len(less.get(name, ())) + 8 for name, units in more.items())


@dataclass(frozen=True)
class Sides(Bank):
    """A bank whose first two groups are the sides of a grouped convolution."""

    def partners(self) -> dict[str, str]:
        return {"g0": "g1", "g1": "g0"}


@pytest.mark.parametrize("target", [{"target_macs": 0.6}, {"target_macs": 0.4}, {"target_latency": 0.5}])
@pytest.mark.parametrize("dear", ["g0", "g1"])
def test_the_two_sides_of_a_grouped_convolution_step_together(dear: str, target: dict[str, float]) -> None:
    bank, _ = flat_bank(64, 64, 64)
    net = Sides(bank.groups, (), bank.prices)
    scores = dict.fromkeys(("g0", "g1", "g2"), (1.0,) * 64)
    made = ranking(net, scores={**scores, dear: (5.0,) * 64})

    def ragged(removed: Mapping[str, tuple[int, ...]]) -> int:
        g0, g1, g2 = net.kept(removed)
        whole = g0 % 16 == g1 % 16 == 0
        return g0 * g1 * (1 if whole else 2) + 16 * g2

    result = plan_pruning(made, net, policy=Policy(scope="knapsack", **target), latency=ragged)  # type: ignore[arg-type]
    assert abs(result.widths_after["g0"] - result.widths_after["g1"]) <= 8
    alone = plan_pruning(made, bank, policy=Policy(scope="knapsack", **target), latency=in_blocks(bank, 1))  # type: ignore[arg-type]
    assert abs(alone.widths_after["g0"] - alone.widths_after["g1"]) > 8


# ---- targets ------------------------------------------------------------------------------------
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_the_total_is_within_one_step_of_the_largest_group(seed: int, ratio: float, scope: str) -> None:
    net = random_chain(seed)
    result = plan(net, seed=seed, ratio=ratio, scope=scope)
    total = sum(g.width for g in net.prunable())
    assert abs(share_removed(result, net) * total - ratio * total) <= step_of_largest(net) + 1e-9


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
def test_small_steps_make_up_for_groups_of_wide_units(ratio: float, scope: str) -> None:
    net = chain(group("a", 256), *(group(f"w{i}", 128, units=2) for i in range(4)), group("b", 64))
    result = plan(net, ratio=ratio, scope=scope)
    assert abs(share_removed(result, net) * 832 - ratio * 832) <= 8


def test_of_the_widest_groups_the_finest_step_bounds_the_error() -> None:
    # Units of 37 channels: eight make a step of 296, and both groups would round 30 % up to a third.
    net = chain(group("conv", 888, units=24), group("conv2", 888, units=24), group("stream", 888))
    result = plan(net, ratio=0.3)
    assert result.widths_after["conv"] in (888, 592)
    assert abs(share_removed(result, net) * 2664 - 0.3 * 2664) <= 8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "policy", [{"ratio": 0.6}, {"target_macs": 0.4}, {"target_params": 0.4, "scope": "global"}]
)
def test_widths_stay_on_their_steps_and_above_min_width(seed: int, policy: dict[str, object]) -> None:
    net = random_chain(seed)
    result = plan(net, seed=seed, min_width=10, **policy)
    for g in net.prunable():
        after = result.widths_after[g.name]
        step = 8 if g.width >= 32 else 4 if g.width >= 16 else 2
        assert after == g.width or (after % step == 0 and after >= 10)
        assert after == g.width - len(result.removed.get(g.name, ()))
    assert result.widths_after["head"] == 10


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_larger_ratio_removes_whatever_a_smaller_one_does(seed: int, scope: str) -> None:
    net = random_chain(seed)
    plans = [plan(net, seed=seed, ratio=ratio / 40, scope=scope).removed for ratio in range(4, 24)]
    for smaller, larger in itertools.pairwise(plans):
        assert all(set(units) <= set(larger.get(name, ())) for name, units in smaller.items())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("target", [0.45, 0.6, 0.8])
def test_a_size_target_is_met_within_one_step(seed: int, scope: str, target: float) -> None:
    net = random_chain(seed, wide_units=True)
    for key, count in (("target_macs", net.count_macs), ("target_params", net.count_params)):
        result = plan(net, seed=seed, scope=scope, **{key: target})
        budget = target * count({})
        assert count(result.removed) <= budget
        scores = ranking(net, seed=seed).scores
        one_step_less = []
        for g in net.groups:
            units = sorted(result.removed.get(g.name, ()), key=lambda unit: scores[g.name][unit])
            step = max(1, (8 if g.width >= 32 else 4 if g.width >= 16 else 2) * g.units // g.width)
            ragged = g.units % step if len(units) == g.units % step else 0
            one_step_less.append(count({**result.removed, g.name: tuple(units[: -(ragged or step)])}))
        assert max(one_step_less) > budget


def test_predictions_are_the_counts_before_and_after() -> None:
    net = chain(group("a", 64), group("b", 64), group("head", 10, role="frozen"))
    result = plan(net, ratio=0.5)
    assert result.widths_after == {"a": 32, "b": 32, "head": 10}
    assert (result.params_before, result.params_after) == (
        3 * 64 + 64 * 64 + 64 * 10,
        3 * 32 + 32 * 32 + 32 * 10,
    )
    assert (result.macs_before, result.macs_after) == (
        64 * 3 * 64 + 16 * 64 * 64 + 4 * 64 * 10,
        64 * 3 * 32 + 16 * 32 * 32 + 4 * 32 * 10,
    )


def test_an_unreachable_target_says_what_is_reachable() -> None:
    net = chain(group("a", 64))  # only 3 * 64 weights: 8 of 64 channels is the least
    with pytest.raises(InputError, match=r"0\.1 of the base's MACs .* smallest reachable is 0\.125"):
        plan(net, target_macs=0.1)
    with pytest.raises(InputError, match=r"ratio 0\.95 .* at most 0\.75 of the 64 prunable"):
        plan(net, ratio=0.95, min_width=16)
    for scope in OVER_GROUPS:
        with pytest.raises(
            InputError, match=rf"at most 0\.75 .* at most 85% of a group under the {scope} scope"
        ):
            plan(chain(group("a", 64)), ratio=0.99, scope=scope, min_width=1)


@pytest.mark.parametrize("target", [{"target_macs": 0.125}, {"target_params": 0.125}])
def test_the_smallest_reachable_target_is_reached(target: dict[str, object]) -> None:
    assert plan(chain(group("a", 64)), **target).widths_after == {"a": 8}


def test_a_plan_that_removes_nothing_says_why() -> None:
    with pytest.raises(InputError, match=r"ratio 0\.01 of 24 channels is less than one step \(4 channels\)"):
        plan(chain(group("a", 24)), ratio=0.01)
    with pytest.raises(InputError, match="no group can lose a step above min_width 8"):
        plan(chain(group("a", 8)), ratio=0.1)
    with pytest.raises(InputError, match="the overrides leave every group"):
        plan(chain(group("a", 64)), ratio=0.5, overrides={"*": 0})


def test_a_large_net_is_planned_with_few_counts_of_its_macs() -> None:
    net = chain(*(group(f"layers.{i}.conv", 2048) for i in range(100)))
    scores = ranking(net)
    calls = 0

    class Slow(Chain):
        def count_macs(self, removed: Mapping[str, tuple[int, ...]]) -> int:
            nonlocal calls
            calls += 1
            return super().count_macs(removed)

    slow = Slow(net.groups, net.positions)
    plan_pruning(scores, slow, policy=Policy(target_macs=0.5, scope="per-group"))
    assert calls < 200  # of 25,500 steps


# ---- which groups -------------------------------------------------------------------------------
def test_frozen_patterns_match_names_and_producers() -> None:
    net = chain(group("a", 64), group("b", 64), group("c", 64))
    result = plan(net, ratio=0.5, frozen=("a", "b.tw*"))
    assert result.widths_after == {"a": 64, "b": 64, "c": 32}
    assert "2 groups frozen by pattern: a (64), b (64)." in result.notes


def test_frozen_channels_do_not_count_in_the_ratio() -> None:
    net = chain(group("a", 640), group("b", 64))
    assert plan(net, ratio=0.25, frozen=("a",)).widths_after == {"a": 640, "b": 48}


def test_an_override_sets_the_ratio_of_its_groups_and_the_first_match_wins() -> None:
    net = chain(group("stem", 64), group("body.0", 64), group("body.1", 64), group("body.2", 64))
    result = plan(net, ratio=0.5, overrides={"stem": 0, "body.1": 0.125, "body.[12]": 0.75})
    assert result.widths_after == {"stem": 64, "body.0": 32, "body.1": 56, "body.2": 16}


def test_a_size_target_is_met_around_the_overrides() -> None:
    net = chain(*(group(name, 64) for name in "abcd"))
    result = plan(net, target_macs=0.8, overrides={"a": 0.0, "b": 0.25})
    assert (result.widths_after["a"], result.widths_after["b"]) == (64, 48)
    assert 0.75 * result.macs_before < result.macs_after <= 0.8 * result.macs_before


def test_a_pattern_that_matches_nothing_lists_near_names() -> None:
    net = chain(group("layer1.conv1", 64), group("layer2.conv1", 64))
    with pytest.raises(InputError, match=r"'layer3\.conv1' matches no group .* near it: layer"):
        plan(net, ratio=0.5, frozen=("layer3.conv1",))
    with pytest.raises(InputError, match=r"'stem\*' matches no group"):
        plan(net, ratio=0.5, overrides={"stem*": 0.1})


def test_an_override_of_groups_that_are_not_pruned_is_an_error() -> None:
    net = chain(group("a", 64), group("head", 10, role="frozen"))
    with pytest.raises(InputError, match=r"'head' names only groups that are not pruned: head \(10\)"):
        plan(net, ratio=0.5, overrides={"head": 0.5})


def test_gated_only_leaves_groups_without_a_gate_alone() -> None:
    net = chain(group("a", 64, role="gated"), group("b", 64), group("se", 64, role="se_hidden"))
    result = plan(net, ratio=0.5, gated_only=True)
    assert result.widths_after == {"a": 32, "b": 64, "se": 64}
    assert "gated_only: 2 groups without a gate of their own left as they are." in result.notes


def test_se_hidden_groups_are_pruned_like_others() -> None:
    assert plan(chain(group("se", 64, role="se_hidden")), ratio=0.5).widths_after == {"se": 32}


def test_nothing_to_prune_says_why() -> None:
    with pytest.raises(InputError, match="no prunable group of this net is gated"):
        plan(chain(group("a", 64)), ratio=0.5, gated_only=True)
    with pytest.raises(InputError, match="the policy freezes every prunable group"):
        plan(chain(group("a", 64)), ratio=0.5, frozen=("*",))
    with pytest.raises(InputError, match=r"no group of this net can be pruned \(the output\)"):
        plan(chain(group("a", 64, role="frozen")), ratio=0.5)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"z": (1.0,)}, "scores group 'z', which this net lacks"),
        ({"a": (1.0,) * 63}, "63 scores for 'a', which has 64 units"),
        ({"a": (float("nan"),) * 64}, "no finite number in 'a'"),
    ],
)
def test_a_ranking_that_does_not_fit_the_net_is_refused(
    scores: dict[str, tuple[float, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        plan(chain(group("a", 64)), scores=scores, ratio=0.5)


def test_the_channels_of_a_traced_net_are_planned_and_counted_as_it_is_then() -> None:
    # conv 3 -> 32, conv 32 -> 64, linear 64 -> 5 (frozen): at half, 16 and 32 channels are left.
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    coupling = trace(net, torch.zeros(1, 3, 8, 8))
    scores = {g.name: tuple(range(g.units)) for g in coupling.groups}
    made = plan_pruning(Ranking("l2", scores, {}), coupling, policy=Policy(ratio=0.5))
    assert made.removed == {"0": tuple(range(16)), "2": tuple(range(32))}
    assert made.macs_after == 64 * 9 * (3 * 16 + 16 * 32) + 32 * 5
    assert made.params_after == 9 * (3 * 16 + 16 * 32) + 32 * 5 + 5
    check_plan(made, coupling)
    again = plan_pruning(Ranking("l2", scores, {}), coupling, policy=Policy(target_macs=0.27))
    assert again.macs_after <= 0.27 * again.macs_before
    apply_removal(net, coupling, again.removed)
    left = trace(net, torch.zeros(1, 3, 8, 8))
    assert (left.count_macs({}), left.count_params({})) == (again.macs_after, again.params_after)


def test_a_group_without_scores_is_refused() -> None:
    net = chain(group("a", 64))
    with pytest.raises(InputError, match="no scores for 'a'"):
        plan_pruning(Ranking("fisher", {}, {}), net, policy=Policy(ratio=0.5))


# ---- policy -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({}, "but none is set"),
        ({"ratio": 0.3, "target_macs": 0.5}, "ratio and target_macs are set"),
        ({"ratio": 0}, "ratio is 0; expected a fraction removed"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": 30}, "ratio is 30"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": "0.3"}, "ratio is '0.3'"),
        ({"ratio": True}, "ratio is True"),
        ({"target_macs": 1.0}, "target_macs is 1.0; expected a fraction of the base kept"),
        ({"target_params": float("inf")}, "target_params is inf"),
        ({"target_latency": 1.5}, "target_latency is 1.5; expected a fraction of the base kept"),
        ({"target_latency": 0.5, "target_macs": 0.5}, "target_macs and target_latency are set"),
        (
            {"ratio": 0.3, "scope": "layer"},
            "scope is 'layer'; expected one of auto, per-group, global, isomorphic, knapsack",
        ),
        ({"ratio": 0.3, "round_to": 0}, "round_to is 0"),
        ({"ratio": 0.3, "round_to": 2.5}, "round_to is 2.5"),
        ({"ratio": 0.3, "min_width": 0}, "min_width is 0"),
        ({"ratio": 0.3, "frozen": ("",)}, "no pattern"),
        ({"ratio": 0.3, "frozen": "layer1.*"}, "expected a tuple of patterns"),
        ({"ratio": 0.3, "overrides": {"a": 1.0}}, "ratio of 'a' is 1.0"),
        ({"ratio": 0.3, "overrides": {"a": -0.5}}, "ratio of 'a' is -0.5"),
    ],
)
def test_a_wrong_policy_is_refused_before_any_net_is_seen(policy: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_policy(Policy(**policy))  # type: ignore[arg-type]


# ---- files --------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", SEEDS)
def test_a_plan_survives_json(seed: int) -> None:
    net = random_chain(seed, wide_units=True)
    made = plan(net, seed=seed, target_macs=0.6, scope="global", frozen=("head",), overrides={"g0": 0.25})
    for ratio in (None, 0.625):
        made = replace(made, latency_ratio=ratio)
        read = plan_from_json(json.loads(json.dumps(plan_to_json(made), allow_nan=False)))
        assert read == made
        check_plan(read, net)


def some_json() -> dict[str, object]:
    net = chain(group("a", 64), group("w", 64, units=16), group("head", 10, role="frozen"))
    return json.loads(json.dumps(plan_to_json(plan(net, ratio=0.5))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "sepress.plan/1", "expected 'sepress.plan/2'"),
        (("colour",), 1, "unknown key 'colour'"),
        (("macs_after",), 1.5, "macs_after is '1.5'"),
        (("macs_after",), -1, "macs_after is '-1'"),
        (("params_before",), True, "params_before is 'True'"),
        (("params_before",), 10**400, "params_before is"),
        (("criterion",), "x" * 10_001, "criterion is"),
        (("latency_ratio",), -0.5, "latency_ratio is '-0.5'"),
        (("latency_ratio",), float("nan"), "latency_ratio is 'nan'"),
        (("latency_ratio",), "0.5", "latency_ratio is '0.5'"),
        (("policy", "target_latency"), 0.5, "policy is wrong: .* ratio and target_latency are set"),
        (("notes",), "text", "notes is 'text'"),
        (("notes",), [1], r"notes\[0\] is '1'"),
        (("groups",), {}, "groups is"),
        (("groups", 0, "name"), "w", r"groups\[1\].name repeats the group 'w'"),
        (("groups", 0, "removed"), [1, 0], r"groups\[0\].removed is not sorted"),
        (("groups", 0, "removed"), [1, 1], r"groups\[0\].removed is not sorted, or repeats"),
        (("groups", 0, "removed"), [64], r"groups\[0\].removed\[0\] is '64'"),
        (("groups", 0, "removed"), [0.0], r"groups\[0\].removed\[0\] is '0.0'"),
        (("groups", 0, "removed"), [], r"groups\[0\] removes 0 units and yet says 64 -> 32"),
        (("groups", 0, "width_after"), 65, r"groups\[0\].width_after is '65'"),
        (("groups", 0, "width_after"), 0, r"groups\[0\].width_after is '0'"),
        (("groups", 0, "evidence"), 3, r"groups\[0\].evidence is '3'"),
        (("policy", "ratio"), 2, "policy is wrong: ratio is 2"),
        (("policy", "gated_only"), 1, "policy.gated_only is '1'"),
        (("policy", "eca_neighbours"), 1, "policy.eca_neighbours is '1'"),
        (("policy", "scope"), ["global"], "policy is wrong: scope is"),
        (("policy", "frozen"), [7], r"policy.frozen\[0\] is '7'"),
        (("policy", "overrides"), [], "policy.overrides is"),
        (("policy", "overrides"), {"a": "0.5"}, "policy is wrong: The ratio of 'a' is '0.5'"),
    ],
)
def test_a_damaged_plan_file_names_the_key(path: tuple[str | int, ...], value: object, message: str) -> None:
    damaged = some_json()
    place: object = damaged
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    with pytest.raises(InputError, match=message):
        plan_from_json(damaged)


@pytest.mark.parametrize("value", [None, [], "plan", {}, {"schema": "sepress.report/1"}])
def test_what_is_no_plan_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="This is no plan"):
        plan_from_json(value)


@pytest.mark.parametrize("key", ["criterion", "policy", "groups", "macs_before", "notes", "latency_ratio"])
def test_a_missing_key_is_named(key: str) -> None:
    damaged = some_json()
    del damaged[key]
    with pytest.raises(InputError, match=f"lacks the key '{key}'"):
        plan_from_json(damaged)


def test_a_plan_of_another_net_does_not_fit() -> None:
    made = plan(chain(group("a", 64), group("w", 64, units=16)), ratio=0.5)
    with pytest.raises(InputError, match=r"names group 'a', which this net lacks; near it"):
        check_plan(made, chain(group("b", 64), group("w", 64, units=16)))
    with pytest.raises(InputError, match="expects 64 channels in 'a'; this net has 32"):
        check_plan(made, chain(group("a", 32), group("w", 64, units=16)))
    with pytest.raises(InputError, match=r"removes units of 'w' outside its 4"):
        check_plan(made, chain(group("a", 64), group("w", 64, units=4)))
    with pytest.raises(InputError, match=r"8 units of 1 channels from 'w' and yet says 64 -> 32"):
        check_plan(made, chain(group("a", 64), group("w", 64)))
    with pytest.raises(InputError, match="prunes 'a', which is frozen: the output"):
        check_plan(made, chain(group("a", 64, role="frozen"), group("w", 64, units=16)))
    with pytest.raises(InputError, match="or all of them"):
        check_plan(
            replace(made, removed={"a": tuple(range(64))}), chain(group("a", 64), group("w", 64, units=16))
        )


def test_rows_show_every_group_with_its_share() -> None:
    net = chain(group("a", 64), group("head", 10, role="frozen"))
    rows = format_plan(plan(net, ratio=0.25))
    assert rows == (("a", 64, 48, 0.25, "its readers"), ("head", 10, 10, 0.0, "its readers"))
