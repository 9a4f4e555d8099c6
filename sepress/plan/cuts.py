"""How much of a schedule is taken: the prefix that meets a target, less what can be given back."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import cast

from sepress.errors import InputError
from sepress.plan.ladders import Ladder, removal
from sepress.plan.policy import LIMIT_TEXT, exact
from sepress.types import Policy, Removed


def _prefix(ladders: Sequence[Ladder], schedule: Sequence[int], length: int) -> dict[str, tuple[int, ...]]:
    taken = Counter(schedule[:length])
    return removal(ladders, [taken[position] for position in range(len(ladders))])


def _give_back(
    ladders: Sequence[Ladder],
    schedule: Sequence[int],
    removed: Mapping[str, tuple[int, ...]],
    holds: Callable[[Removed], bool],
    *,
    rounds: int,
) -> dict[str, tuple[int, ...]]:
    """Give back steps while the target holds: in each round one a group, latest in the schedule first."""
    result = dict(removed)
    taken = Counter(schedule)
    candidates = list(dict.fromkeys(reversed(schedule)))
    for _ in range(rounds):
        given = []
        for position in candidates:
            name = ladders[position].name
            fewer = removal([ladders[position]], [taken[position] - 1])
            trial = {**{other: units for other, units in result.items() if other != name}, **fewer}
            if holds(trial):
                result = trial
                taken[position] -= 1
                given.append(position)
        # What does not fit now never will: giving back only makes a net larger.
        candidates = [position for position in given if taken[position]]
        if not candidates:
            break
    return result


def _fill_up(
    ladders: Sequence[Ladder], schedule: Sequence[int], length: int, room: Fraction
) -> dict[str, tuple[int, ...]]:
    """A prefix, and of the later steps, in their order, those that fit into so many channels."""
    taken = Counter(schedule[:length])
    stuck = set()
    for position in schedule[length:]:
        size = ladders[position].sizes()[taken[position]]
        if position not in stuck and size <= room:
            taken[position] += 1
            room -= size
        else:
            stuck.add(position)
    return removal(ladders, [taken[position] for position in range(len(ladders))])


def cut_to_ratio(
    ladders: Sequence[Ladder], schedule: Sequence[int], policy: Policy
) -> dict[str, tuple[int, ...]]:
    """The prefix of nearest widths, moved until the total is within one step of the largest group."""
    if not ladders:
        return {}
    ratio = exact(cast(float, policy.ratio))
    total = sum(ladder.group.width for ladder in ladders)
    target = ratio * total
    sizes = [iter(ladder.sizes()) for ladder in ladders]
    gone = list(accumulate((next(sizes[position]) for position in schedule), initial=0))
    widest = max(ladder.group.width for ladder in ladders)
    tolerance = min(ladder.step_width for ladder in ladders if ladder.group.width == widest)
    if gone[-1] < target - tolerance:
        most = math.floor(1000 * gone[-1] / total) / 1000
        guard = (
            ""
            if policy.scope == "per-group"
            else f", and at most {LIMIT_TEXT} of a group under the {policy.scope} scope"
        )
        raise InputError(
            f"ratio {policy.ratio} can't be reached: at most {most} of the {total} prunable channels can go "
            f"with min_width {policy.min_width}{guard}.",
            remedy="Ask for a smaller ratio, or lower min_width.",
        )
    if policy.scope == "per-group":
        nearest = sum(ladder.steps_at(ratio) for ladder in ladders)
    else:
        nearest = min(range(len(gone)), key=lambda length: abs(gone[length] - target))
    low = bisect_left(gone, target - tolerance)
    high = bisect_right(gone, target + tolerance) - 1
    if low <= high:
        return _prefix(ladders, schedule, min(max(nearest, low), high))
    # One step of wide units jumps over the target: smaller steps of other groups make up for it,
    # those taken before it that can be given back, or those that come after it.
    widths = {ladder.name: ladder.group.unit_width for ladder in ladders}

    def channels(removed: Removed) -> int:
        return sum(len(units) * widths[name] for name, units in removed.items())

    over = _give_back(
        ladders,
        schedule[:low],
        _prefix(ladders, schedule, low),
        lambda removed: channels(removed) >= target,
        rounds=len(schedule),
    )
    under = _fill_up(ladders, schedule, high, target - gone[high])
    return min(over, under, key=lambda removed: abs(channels(removed) - target))


def cut_to_size(
    ladders: Sequence[Ladder],
    schedule: Sequence[int],
    fixed: Mapping[str, tuple[int, ...]],
    count: Callable[[Removed], int],
    target: float,
    unit: str,
) -> dict[str, tuple[int, ...]]:
    """The first prefix whose count is at or below the target, less what can be given back."""
    base = count({})
    budget = exact(target) * base

    def holds(removed: Removed) -> bool:
        return count(removed) <= budget

    def prefix(length: int) -> dict[str, tuple[int, ...]]:
        return {**fixed, **_prefix(ladders, schedule, length)}

    smallest = count(prefix(len(schedule)))
    if smallest > budget:
        raise InputError(
            f"{target} of the base's {unit} can't be reached: the smallest reachable is "
            f"{math.ceil(1000 * smallest / base) / 1000} of them ({smallest:,} of {base:,}).",
            remedy="Ask for a larger target, lower min_width, or freeze fewer groups.",
        )
    length = bisect_left(range(len(schedule)), True, key=lambda n: holds(prefix(n)))
    # One round: more would undo the cheap layers, whose steps fit whatever is left.
    return _give_back(ladders, schedule[:length], prefix(length), holds, rounds=1)
