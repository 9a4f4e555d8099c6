"""One order over all steps of all ladders: every plan is a prefix of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from sepress.errors import InputError
from sepress.plan.ladders import Ladder
from sepress.plan.policy import Count, Countable
from sepress.plan.structure import classes
from sepress.types import Policy, Ranking

Key = tuple[float, ...]
Keys = Sequence[Sequence[Key]]  # of every ladder, one a step, never falling along a ladder


def build_schedule(
    ladders: Sequence[Ladder],
    ranking: Ranking,
    coupling: Countable,
    policy: Policy,
    latency: Count | None = None,
) -> list[int]:
    """The order of all steps: each entry lets that ladder (by position) take its next step.

    Raises InputError where the scope is knapsack and the ranking does not say what removal costs.
    """
    keys: Keys
    if policy.scope == "per-group":
        keys = [[_share_and_cost(t, c) for t, c in zip(x.turns(), x.costs, strict=True)] for x in ladders]
    elif policy.scope == "global":
        keys = [[(cost,) for cost in ladder.costs] for ladder in ladders]
    elif policy.scope == "isomorphic":
        keys = _isomorphic(ladders, coupling)
    else:
        counts = _counts(coupling, policy, latency)
        together = _together(ladders, coupling if latency else None)
        place = {ladder.name: position for position, ladder in enumerate(ladders)}
        keys = [  # steps of one price go ladder by ladder; of ladders that step together, step by step
            [
                (price, min(place[ladder.name] for ladder in alike), step)
                for step, price in enumerate(_prices(alike, ranking, counts))
            ]
            for alike in together
        ]
    return _in_order(keys, range(len(ladders)))


def _in_order(keys: Keys, positions: Sequence[int]) -> list[int]:
    steps = [(key, position) for position in positions for key in keys[position]]
    return [position for _, position in sorted(steps)]


def _share_and_cost(kept: Fraction, cost: float) -> tuple[float, float]:
    # Division rounds correctly: equal shares stay equal as floats, and cost decides.
    return -float(kept), cost


def _isomorphic(ladders: Sequence[Ladder], coupling: Countable) -> Keys:
    """A global order within each class; over classes, a step comes when its class has lost that share."""
    by_cost = [[(cost,) for cost in ladder.costs] for ladder in ladders]
    keys: list[list[Key]] = [[] for _ in ladders]
    for alike in classes([ladder.group for ladder in ladders], coupling.shapes):
        width, gone = sum(ladders[position].group.width for position in alike), 0
        for position in _in_order(by_cost, alike):
            ladder, step = ladders[position], len(keys[position])
            size = ladder.sizes()[step]
            middle = Fraction(2 * (width - gone) - size, 2 * width)  # a step comes when half of it is due
            keys[position].append(_share_and_cost(middle, ladder.costs[step]))
            gone += size
    return keys


def _counts(coupling: Countable, policy: Policy, latency: Count | None) -> list[Count]:
    """What a step can save, each as good as another: of the target's own size, and of time."""
    size: dict[str, Count | None] = {
        "target_macs": coupling.count_macs,
        "target_params": coupling.count_params,
        "target_latency": latency,
    }
    (target,) = policy.targets
    if target == "ratio":
        return []
    return list(dict.fromkeys(count for count in (size[target], latency) if count is not None))


def _together(ladders: Sequence[Ladder], coupling: Countable | None) -> list[list[Ladder]]:
    """Each ladder with the one that steps with it: the other side of a grouped convolution, where alike.

    A runtime is fast at a grouped convolution where both sides of its groups are whole blocks: what one side
    saves depends on the other.
    """
    partners = coupling.partners() if coupling else {}
    by_name = {ladder.name: ladder for ladder in ladders}
    pairs = [(ladder, by_name.get(partners.get(ladder.name, ""))) for ladder in ladders]
    return [[own] if other is None or other.rungs != own.rungs else [own, other] for own, other in pairs]


def _prices(ladders: Sequence[Ladder], ranking: Ranking, counts: Sequence[Count]) -> list[float]:
    """The predicted loss of each step, of all these ladders together, for what it saves, on the lower convex
    hull of their rungs.

    The order by price is the Lagrangian relaxation of the multiple-choice knapsack, one rung a group
    (Sinha & Zoltners 1979): every prefix that ends at corners of the hulls costs least for what it saves, as
    long as savings add up. They are counted with the other groups at full width. Steps between two corners
    share a price.
    """
    losses = [
        sum(together) for together in zip(*(_losses(ladder, ranking) for ladder in ladders), strict=True)
    ]
    steps = zip(pairwise(losses), pairwise(_saved(ladders, counts)), strict=True)
    hull: list[tuple[float, float, int]] = []  # loss, saving and steps of each segment, prices rising
    for (before, after), (less, more) in steps:
        segment = after - before, more - less, 1
        while hull and _price(*hull[-1]) >= _price(*segment):
            last = hull.pop()
            segment = last[0] + segment[0], last[1] + segment[1], last[2] + segment[2]
        hull.append(segment)
    return [_price(*segment) for segment in hull for _ in range(segment[2])]


def _price(loss: float, saving: float, _: int) -> float:
    return loss / saving if saving > 0 else math.inf  # some widths take longer than larger ones


def _saved(ladders: Sequence[Ladder], counts: Sequence[Count]) -> list[float]:
    """What each rung saves, all else at full width: the sum of its shares of the counts, or channels."""
    if not counts:
        return [float(gone) for gone in accumulate(ladders[0].sizes(), initial=0)]
    steps = range(len(ladders[0].rungs))
    removals = [{ladder.name: ladder.removed(step) for ladder in ladders} for step in steps]
    wholes = [count({}) for count in counts]
    return [
        sum(1 - count(removed) / whole for count, whole in zip(counts, wholes, strict=True))
        for removed in removals
    ]


def _losses(ladder: Ladder, ranking: Ranking) -> list[float]:
    """The predicted loss at each rung."""
    costs, gone = ranking.costs.get(ladder.name, ()), [ladder.rungs[0] - kept for kept in ladder.rungs]
    if gone[-1] >= len(costs) or not all(math.isfinite(costs[units]) for units in gone):
        raise InputError(
            f"The knapsack scope needs what the removal of units costs, and the ranking by "
            f"{ranking.criterion} does not say it for {ladder.name!r}.",
            remedy="Criteria reconstruction, fisher and gate-taylor say it; the other scopes take any.",
        )
    return [costs[units] for units in gone]
