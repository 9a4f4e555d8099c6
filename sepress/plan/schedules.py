"""One order over all steps of all ladders: every plan is a prefix of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from sepress.errors import InputError
from sepress.plan.ladders import Ladder
from sepress.plan.policy import Countable
from sepress.plan.structure import classes
from sepress.types import Policy, Ranking

Key = tuple[float, ...]
Keys = Sequence[Sequence[Key]]  # of every ladder, one a step, never falling along a ladder


def build_schedule(
    ladders: Sequence[Ladder], ranking: Ranking, coupling: Countable, policy: Policy
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
        keys = [[(price,) for price in _prices(ladder, ranking, coupling, policy)] for ladder in ladders]
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


def _prices(ladder: Ladder, ranking: Ranking, coupling: Countable, policy: Policy) -> list[float]:
    """The predicted loss of each step for what it saves, on the lower convex hull of the ladder's rungs.

    The order by price is the Lagrangian relaxation of the multiple-choice knapsack, one rung a group
    (Sinha & Zoltners 1979): every prefix that ends at corners of the hulls costs least for what it saves, as
    long as savings add up. They are counted with the other groups at full width. Steps between two corners
    share a price.
    """
    losses, saved = _losses(ladder, ranking), _saved(ladder, coupling, policy)
    steps = zip(pairwise(losses), pairwise(saved), strict=True)
    hull: list[tuple[float, int, int]] = []  # loss, saving and steps of each segment, prices rising
    for (before, after), (less, more) in steps:
        segment = after - before, more - less, 1
        while hull and _price(*hull[-1]) >= _price(*segment):
            last = hull.pop()
            segment = last[0] + segment[0], last[1] + segment[1], last[2] + segment[2]
        hull.append(segment)
    return [_price(*segment) for segment in hull for _ in range(segment[2])]


def _price(loss: float, saving: int, _: int) -> float:
    return loss / saving if saving else math.inf


def _saved(ladder: Ladder, coupling: Countable, policy: Policy) -> list[int]:
    """What each rung saves of what the policy's target counts, all else at full width."""
    if policy.ratio is not None:
        return list(accumulate(ladder.sizes(), initial=0))
    count = coupling.count_macs if policy.target_macs is not None else coupling.count_params
    base = count({})
    return [base - count({ladder.name: ladder.removed(step)}) for step in range(len(ladder.rungs))]


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
