"""The ladder of a group: the widths it may take, and the order in which its units go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from sepress.errors import InputError
from sepress.types import CouplingGroup, Policy, Ranking


@dataclass(frozen=True)
class Ladder:
    """The widths that one group may take and the order in which its units go."""

    group: CouplingGroup
    step: int  # units
    rungs: tuple[int, ...]  # units kept: all, then multiples of step, falling
    order: tuple[int, ...]  # units, lowest score first
    costs: tuple[float, ...]  # one a step: mean score of the units that go / the group's mean; rising
    guarded: bool  # the scope's limit, not min_width, sets the last rung

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def step_width(self) -> int:
        return self.step * self.group.unit_width

    def sizes(self) -> list[int]:
        """Channels that each step removes."""
        return [(wide - narrow) * self.group.unit_width for wide, narrow in pairwise(self.rungs)]

    def turns(self) -> list[Fraction]:
        """The share kept below which rounding to the nearest multiple takes each step (half goes up)."""
        return [Fraction(2 * narrow + self.step, 2 * self.rungs[0]) for narrow in self.rungs[1:]]

    def steps_at(self, ratio: Fraction) -> int:
        """Steps from the full width to the rung nearest the exact width."""
        return sum(1 - ratio < turn for turn in self.turns())

    def removed(self, steps: int) -> tuple[int, ...]:
        """The units that are gone after so many steps, sorted."""
        return tuple(sorted(self.order[: self.rungs[0] - self.rungs[steps]]))


def build_ladder(group: CouplingGroup, ranking: Ranking, policy: Policy, limit: Fraction) -> Ladder:
    scores = _scores(group, ranking)
    step = _step(group, policy.round_to)
    floor = math.ceil(Fraction(policy.min_width, group.unit_width))
    guard = math.ceil((1 - limit) * group.units)
    lowest = math.ceil(Fraction(max(floor, guard, 1), step)) * step
    rungs = (group.units, *(n for n in range((group.units - 1) // step * step, 0, -step) if n >= lowest))
    order = sorted(range(group.units), key=lambda unit: scores[unit])  # stable
    scale = math.fsum(map(abs, scores)) / len(scores) or 1.0  # all zero: a dead group is cheap
    costs = (
        math.fsum(scores[unit] for unit in order[group.units - wide : group.units - narrow])
        / (wide - narrow)
        / scale
        for wide, narrow in pairwise(rungs)
    )
    rising = tuple(accumulate(costs, max))  # they rise already, but for the last bit of the means
    return Ladder(group, step, rungs, tuple(order), rising, guarded=guard > floor)


def _step(group: CouplingGroup, round_to: int) -> int:
    """The rounding step in units.

    `round_to` channels, or in groups narrower than four times that the largest power of two up to a
    quarter of the width. Units of several channels (one offset of every block of a grouped convolution):
    the fewest units that make a multiple of it, or one unit where that leaves no width between.
    """
    width = round_to if group.width >= 4 * round_to else _power_of_two(group.width // 4)
    units = width // math.gcd(width, group.unit_width)
    return units if units < group.units else 1


def _power_of_two(limit: int) -> int:
    """The largest power of two up to the limit, at least 1."""
    return 1 << max(0, limit.bit_length() - 1)


def _scores(group: CouplingGroup, ranking: Ranking) -> tuple[float, ...]:
    remedy = "Rank this net again."
    if group.name not in ranking.scores:
        raise InputError(
            f"The ranking by {ranking.criterion} has no scores for {group.name!r}.", remedy=remedy
        )
    scores = ranking.scores[group.name]
    if len(scores) != group.units:
        raise InputError(
            f"The ranking has {len(scores)} scores for {group.name!r}, which has {group.units} units.",
            remedy=remedy,
        )
    if not all(map(math.isfinite, scores)):
        raise InputError(
            f"The ranking by {ranking.criterion} has a score that is no finite number in {group.name!r}.",
            remedy="Does the network give finite outputs on the calibration images?",
        )
    return scores


def removal(ladders: Sequence[Ladder], steps: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return {ladder.name: ladder.removed(n) for ladder, n in zip(ladders, steps, strict=True) if n}
