"""Turn a ranking into a plan: which units of which group go, and what that predicts. Pure functions.

Every group has a **ladder**, the widths it may take: its full width, then multiples of its rounding
step down to its floor. A **schedule** is one order over all steps of all ladders, and a plan is a
prefix of it, so that a larger ratio removes whatever a smaller one does:

- per-group scope: a step comes at the ratio at which rounding to the nearest width takes it; steps
  that come together are taken in ranking order (cheapest first);
- global scope: a step comes by its cost, the mean score of the units that go over the mean
  score of their group (scores of different layers are not comparable raw).

A ratio takes the prefix that rounds every group to its nearest width, moved along the schedule
until the total is within one step of the largest group; where a step of wide units jumps over that, smaller
steps are given back. A target in MACs or parameters takes the first prefix at or below it, then gives
back what fits, at most one step a group: at or below the target, as near as the steps allow. Of two
units with equal scores the lower index goes first.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol, cast

from sepress.errors import InputError
from sepress.types import JSON, CouplingGroup, Policy, PruningPlan, Ranking, Removed

SCHEMA = "sepress.plan/1"
SCOPES = ("per-group", "global")
GLOBAL_LIMIT = Fraction(85, 100)  # of a group; a global ranking left alone guts single layers
_LIMIT_TEXT = f"{float(GLOBAL_LIMIT):.0%}"

_MAX_ITEMS = 1_000_000  # in any list of a plan file
_MAX_TEXT = 10_000  # characters in any string of a plan file
_MAX_INT = 2**53 - 1  # what JSON readers agree on


class Countable(Protocol):
    """What planning needs of a `Coupling`: its groups and exact predictions of a removal."""

    @property
    def groups(self) -> tuple[CouplingGroup, ...]: ...

    def prunable(self) -> tuple[CouplingGroup, ...]: ...

    def count_macs(self, removed: Removed, /) -> int: ...

    def count_params(self, removed: Removed, /) -> int: ...


def plan_pruning(ranking: Ranking, coupling: Countable, *, policy: Policy) -> PruningPlan:
    """Choose the units that go.

    The ratio is the fraction of prunable channels removed: of all groups that neither the engine nor
    the policy freezes and that have no ratio of their own in `policy.overrides`. Raises InputError for
    a policy that can't be met (saying what is reachable), a pattern that matches nothing, a ranking of
    another net, and a plan that would remove nothing.
    """
    check_policy(policy)
    _check_ranking(ranking, coupling)
    groups, notes = _candidates(coupling, policy)
    ratios = _own_ratios(groups, coupling, policy)
    own = [_ladder(group, ranking, policy, Fraction(1)) for group in groups if group.name in ratios]
    limit = GLOBAL_LIMIT if policy.scope == "global" else Fraction(1)
    free = [_ladder(group, ranking, policy, limit) for group in groups if group.name not in ratios]

    fixed = _removal(own, [ladder.steps_at(ratios[ladder.name]) for ladder in own])
    schedule = _schedule(free, policy.scope)
    if policy.ratio is not None:
        removed = {**fixed, **_cut_to_ratio(free, schedule, policy)}
    elif policy.target_macs is not None:
        removed = _cut_to_size(free, schedule, fixed, coupling.count_macs, policy.target_macs, "MACs")
    else:
        target = cast(float, policy.target_params)  # check_policy: exactly one target is set
        removed = _cut_to_size(free, schedule, fixed, coupling.count_params, target, "parameters")
    if not removed:
        raise InputError(_why_nothing(free, policy), remedy="Ask for more, or lower round_to or min_width.")

    order = [group.name for group in coupling.groups if group.name in removed]
    before = {group.name: group.width for group in coupling.groups}
    after = {
        group.name: group.width - group.unit_width * len(removed.get(group.name, ()))
        for group in coupling.groups
    }
    removed = {name: removed[name] for name in order}
    return PruningPlan(
        policy=policy,
        criterion=ranking.criterion,
        removed=removed,
        widths_before=before,
        widths_after=after,
        evidence={name: ranking.evidence[name] for name in before if name in ranking.evidence},
        macs_before=coupling.count_macs({}),
        macs_after=coupling.count_macs(removed),
        params_before=coupling.count_params({}),
        params_after=coupling.count_params(removed),
        notes=(*_ratio_note(free, removed, policy), *notes, *_ladder_notes([*own, *free], removed, policy)),
    )


def check_policy(policy: Policy) -> None:
    """Raise InputError where a policy is wrong whatever the net: no net is needed to say so."""
    targets = {
        name: value
        for name in ("ratio", "target_macs", "target_params")
        if (value := getattr(policy, name)) is not None
    }
    if len(targets) != 1:
        given = "none is set" if not targets else f"{' and '.join(targets)} are set"
        raise InputError(
            f"A policy takes exactly one of ratio, target_macs and target_params, but {given}.",
            remedy="Pass one of them, for instance --ratio 0.3 (30 % of the prunable channels go).",
        )
    for name, value in targets.items():
        meaning = "removed" if name == "ratio" else "of the base kept"
        if not _is_number(value) or not 0 < value < 1:
            raise InputError(
                f"{name} is {value!r}; expected a fraction {meaning}, above 0 and below 1.",
                remedy=f"For 30 % write {name} 0.3.",
            )
    if policy.scope not in SCOPES:
        raise InputError(f"scope is {policy.scope!r}; expected one of {', '.join(SCOPES)}.")
    for name in ("round_to", "min_width"):
        value = getattr(policy, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; expected a whole number of channels, at least 1.")
    frozen: object = policy.frozen
    if isinstance(frozen, str):  # it would be read letter by letter
        raise InputError(f"frozen is the text {frozen!r}; expected a tuple of patterns.")
    for pattern in (*policy.frozen, *policy.overrides):
        if not isinstance(pattern, str) or not pattern:
            raise InputError(f"{pattern!r} is no pattern of group names; expected text such as 'layer4.*'.")
    for pattern, value in policy.overrides.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise InputError(
                f"The ratio of {pattern!r} is {value!r}; expected a fraction removed, from 0 to below 1."
            )


def check_plan(plan: PruningPlan, coupling: Countable) -> None:
    """Raise InputError where a plan (of a file, say) does not fit the net it is applied to."""
    groups = {group.name: group for group in coupling.groups}
    remedy = "A plan fits the net it was made for; make a new one with `sepress prune --dry-run`."
    for name, width in plan.widths_before.items():
        if name not in groups:
            near = _near(name, groups)
            raise InputError(
                f"The plan names group {name!r}, which this net lacks; near it: {near}.", remedy=remedy
            )
        if groups[name].width != width:
            found = groups[name].width
            raise InputError(
                f"The plan expects {width} channels in {name!r}; this net has {found}.", remedy=remedy
            )
    for name, units in plan.removed.items():
        group = groups[name] if name in plan.widths_before else None
        if group is None:
            raise InputError(f"The plan removes units of {name!r} without its width.", remedy=remedy)
        if group.role == "frozen":
            because = group.frozen_because or "unknown structure"
            raise InputError(f"The plan prunes {name!r}, which is frozen: {because}.", remedy=remedy)
        if not units or units[0] < 0 or units[-1] >= group.units or len(units) >= group.units:
            raise InputError(
                f"The plan removes units of {name!r} outside its {group.units}, or all of them.",
                remedy=remedy,
            )
        if plan.widths_after[name] != group.width - len(units) * group.unit_width:
            raise InputError(
                f"The plan removes {len(units)} units of {group.unit_width} channels from {name!r} "
                f"and yet says {group.width} -> {plan.widths_after[name]}.",
                remedy=remedy,
            )


class PlanRow(NamedTuple):
    """One group of a plan, as a table shows it."""

    group: str
    width_before: int
    width_after: int
    removed: float  # fraction of the group's channels
    evidence: str | None  # what judged the group; None for a group that nothing judged


def format_plan(plan: PruningPlan) -> tuple[PlanRow, ...]:
    """Rows for a table, one a group, frozen ones included, in the network's order."""
    return tuple(
        PlanRow(name, width, after := plan.widths_after[name], 1 - after / width, plan.evidence.get(name))
        for name, width in plan.widths_before.items()
    )


# ---- which groups -------------------------------------------------------------------------------
def _check_ranking(ranking: Ranking, coupling: Countable) -> None:
    known = {group.name for group in coupling.groups}
    for name in ranking.scores:
        if name not in known:
            raise InputError(
                f"The ranking scores group {name!r}, which this net lacks; near it: {_near(name, known)}.",
                remedy="Rank this net again.",
            )


def _candidates(coupling: Countable, policy: Policy) -> tuple[list[CouplingGroup], list[str]]:
    """The groups that the engine and the policy leave to prune, and notes on the others."""
    prunable = coupling.prunable()
    for pattern in policy.frozen:
        _require_match(pattern, coupling)
    frozen, ungated, groups = [], [], []
    for group in prunable:
        if any(_matches(group, pattern) for pattern in policy.frozen):
            frozen.append(group)
        elif policy.gated_only and group.role != "gated":
            ungated.append(group)
        else:
            groups.append(group)
    notes = []
    if held := len(coupling.groups) - len(prunable):
        notes.append(
            f"{_groups(held)} can't be pruned and {'keeps its' if held == 1 else 'keep their'} width."
        )
    if frozen:
        notes.append(f"{_groups(len(frozen))} frozen by pattern: {_names(frozen)}.")
    if ungated:
        notes.append(f"gated_only: {_groups(len(ungated))} without a gate of their own left as they are.")
    if not groups:
        if policy.gated_only and not any(group.role == "gated" for group in prunable):
            reason, remedy = (
                "gated_only is set, and no prunable group of this net is gated",
                "Drop gated_only.",
            )
        elif frozen or ungated:
            reason, remedy = "the policy freezes every prunable group", "Freeze fewer groups."
        else:
            reasons = sorted({group.frozen_because for group in coupling.groups if group.frozen_because})
            reason = "no group of this net can be pruned" + (
                f" ({'; '.join(reasons[:3])})" if reasons else ""
            )
            remedy = "`sepress inspect MODEL` lists the groups and why each is frozen."
        raise InputError(f"Nothing to prune: {reason}.", remedy=remedy)
    return groups, notes


def _own_ratios(groups: Sequence[CouplingGroup], coupling: Countable, policy: Policy) -> dict[str, Fraction]:
    """The ratio of each group that an override names; of several patterns the first that matches."""
    ratios: dict[str, Fraction] = {}
    for pattern, ratio in policy.overrides.items():
        matched = _require_match(pattern, coupling)
        hits = [group for group in groups if _matches(group, pattern)]
        if not hits:
            raise InputError(
                f"The override {pattern!r} names only groups that are not pruned: {_names(matched)}.",
                remedy="Remove the override, or what freezes these groups.",
            )
        for group in hits:
            ratios.setdefault(group.name, _exact(ratio))
    return ratios


def _matches(group: CouplingGroup, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (group.name, *group.producers))


def _require_match(pattern: str, coupling: Countable) -> list[CouplingGroup]:
    matched = [group for group in coupling.groups if _matches(group, pattern)]
    if not matched:
        names = dict.fromkeys(name for group in coupling.groups for name in (group.name, *group.producers))
        near = _near(pattern, names)
        raise InputError(
            f"The pattern {pattern!r} matches no group and no producer layer; near it: {near}.",
            remedy="`sepress inspect MODEL` lists the groups.",
        )
    return matched


# ---- ladders ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Ladder:
    """The widths that one group may take and the order in which its units go."""

    group: CouplingGroup
    step: int  # units
    rungs: tuple[int, ...]  # units kept: all, then multiples of step, falling
    order: tuple[int, ...]  # units, lowest score first
    costs: tuple[float, ...]  # one a step: mean score of the units that go / the group's mean; rising
    guarded: bool  # the global scope's limit, not min_width, sets the last rung

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


def _ladder(group: CouplingGroup, ranking: Ranking, policy: Policy, limit: Fraction) -> _Ladder:
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
    return _Ladder(group, step, rungs, tuple(order), rising, guarded=guard > floor)


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


# ---- schedules and cuts -------------------------------------------------------------------------
def _schedule(ladders: Sequence[_Ladder], scope: str) -> list[int]:
    """The order of all steps: each entry lets that ladder (by position) take its next step."""
    steps: list[tuple[float, float, int]] = []
    for position, ladder in enumerate(ladders):
        for turn, cost in zip(ladder.turns(), ladder.costs, strict=True):
            # Division rounds correctly: equal shares stay equal as floats, and cost decides.
            steps.append((-float(turn) if scope == "per-group" else cost, cost, position))
    return [position for _, _, position in sorted(steps)]


def _removal(ladders: Sequence[_Ladder], steps: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return {ladder.name: ladder.removed(n) for ladder, n in zip(ladders, steps, strict=True) if n}


def _prefix(ladders: Sequence[_Ladder], schedule: Sequence[int], length: int) -> dict[str, tuple[int, ...]]:
    taken = Counter(schedule[:length])
    return _removal(ladders, [taken[position] for position in range(len(ladders))])


def _give_back(
    ladders: Sequence[_Ladder],
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
            fewer = _removal([ladders[position]], [taken[position] - 1])
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


def _cut_to_ratio(
    ladders: Sequence[_Ladder], schedule: Sequence[int], policy: Policy
) -> dict[str, tuple[int, ...]]:
    """The prefix of nearest widths, moved until the total is within one step of the largest group."""
    if not ladders:
        return {}
    ratio = _exact(cast(float, policy.ratio))
    total = sum(ladder.group.width for ladder in ladders)
    target = ratio * total
    sizes = [iter(ladder.sizes()) for ladder in ladders]
    gone = list(accumulate((next(sizes[position]) for position in schedule), initial=0))
    widest = max(ladder.group.width for ladder in ladders)
    tolerance = min(ladder.step_width for ladder in ladders if ladder.group.width == widest)
    if gone[-1] < target - tolerance:
        most = math.floor(1000 * gone[-1] / total) / 1000
        guard = (
            f", and at most {_LIMIT_TEXT} of a group under the global scope"
            if policy.scope == "global"
            else ""
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
    # One step of wide units jumps over the target: smaller steps of other groups make up for it.
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
    under = _prefix(ladders, schedule, high)
    return min(over, under, key=lambda removed: abs(channels(removed) - target))


def _cut_to_size(
    ladders: Sequence[_Ladder],
    schedule: Sequence[int],
    fixed: Mapping[str, tuple[int, ...]],
    count: Callable[[Removed], int],
    target: float,
    unit: str,
) -> dict[str, tuple[int, ...]]:
    """The first prefix whose count is at or below the target, less what can be given back."""
    base = count({})
    budget = _exact(target) * base

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


# ---- files --------------------------------------------------------------------------------------
def plan_to_json(plan: PruningPlan) -> dict[str, JSON]:
    """The plan as JSON values, schema 'sepress.plan/1'."""
    policy = plan.policy
    return {
        "schema": SCHEMA,
        "criterion": plan.criterion,
        "policy": {
            **{name: getattr(policy, name) for name in _POLICY_KEYS},
            "frozen": list(policy.frozen),
            "overrides": dict(policy.overrides),
        },
        **{name: getattr(plan, name) for name in _COUNTS},
        "groups": [
            {
                "name": name,
                "width_before": width,
                "width_after": plan.widths_after[name],
                "removed": list(plan.removed.get(name, ())),
                "evidence": plan.evidence.get(name),
            }
            for name, width in plan.widths_before.items()
        ],
        "notes": list(plan.notes),
    }


def plan_from_json(value: JSON) -> PruningPlan:
    """Read what `plan_to_json` gave, or a file that someone edited: strict, and bounded in size.

    Raises InputError naming the key that is missing, unknown, of another type or out of range.
    """
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise InputError(f"This is no plan: schema is {str(found)[:80]!r}; expected {SCHEMA!r}.")
    plan = _fields(value, "plan", ("schema", "criterion", "policy", *_COUNTS, "groups", "notes"))
    policy = _policy(plan["policy"])
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    evidence: dict[str, str] = {}
    removed: dict[str, tuple[int, ...]] = {}
    for index, row in enumerate(_list(plan["groups"], "groups")):
        where = f"groups[{index}]"
        group = _fields(row, where, ("name", "width_before", "width_after", "removed", "evidence"))
        name = _text(group["name"], f"{where}.name")
        if name in before:
            raise InputError(f"The plan's {where}.name repeats the group {name!r}.")
        before[name] = _int(group["width_before"], f"{where}.width_before", 1, _MAX_INT)
        after[name] = _int(group["width_after"], f"{where}.width_after", 1, before[name])
        if group["evidence"] is not None:
            evidence[name] = _text(group["evidence"], f"{where}.evidence")
        if units := _units(group["removed"], f"{where}.removed", before[name]):
            removed[name] = units
        if (before[name] - after[name]) % max(1, len(units)) or bool(units) != (after[name] < before[name]):
            raise InputError(
                f"The plan's {where} removes {len(units)} units and yet says {before[name]} -> {after[name]}."
            )
    if not removed:
        raise InputError("The plan's groups remove nothing.")
    return PruningPlan(
        policy=policy,
        criterion=_text(plan["criterion"], "criterion"),
        removed=removed,
        widths_before=before,
        widths_after=after,
        evidence=evidence,
        notes=tuple(_text(note, f"notes[{i}]") for i, note in enumerate(_list(plan["notes"], "notes"))),
        **{name: _int(plan[name], name, 0, _MAX_INT) for name in _COUNTS},
    )


_COUNTS = ("macs_before", "macs_after", "params_before", "params_after")
_POLICY_KEYS = ("ratio", "target_macs", "target_params", "scope", "round_to", "min_width", "gated_only")


def _policy(value: JSON) -> Policy:
    fields = _fields(value, "policy", (*_POLICY_KEYS, "frozen", "overrides"))
    if not isinstance(fields["gated_only"], bool):
        raise _expected("policy.gated_only", "true or false", fields["gated_only"])
    if not isinstance(fields["overrides"], dict) or len(fields["overrides"]) > _MAX_ITEMS:
        raise _expected("policy.overrides", "an object of pattern: ratio", fields["overrides"])
    patterns = _list(fields["frozen"], "policy.frozen")
    frozen = tuple(_text(pattern, f"policy.frozen[{i}]") for i, pattern in enumerate(patterns))
    policy = Policy(
        **{name: fields[name] for name in _POLICY_KEYS}, frozen=frozen, overrides=dict(fields["overrides"])
    )
    try:
        check_policy(policy)
    except InputError as error:
        raise InputError(f"The plan's policy is wrong: {error.message}", remedy=error.remedy) from error
    return policy


def _fields(value: JSON, where: str, keys: Sequence[str]) -> dict[str, JSON]:
    """The value where it is an object of exactly these keys."""
    if not isinstance(value, dict):
        raise _expected(where, "an object", value)
    for key in keys:
        if key not in value:
            raise InputError(f"The plan's {where} lacks the key {key!r}.")
    for key in value:
        if key not in keys:
            raise InputError(
                f"The plan's {where} has the unknown key {key[:80]!r}; known: {', '.join(keys)}."
            )
    return value


def _list(value: JSON, where: str) -> list[JSON]:
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise _expected(where, f"a list of at most {_MAX_ITEMS:,} items", value)
    return value


def _text(value: JSON, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _expected(where, f"text of at most {_MAX_TEXT:,} characters", value)
    return value


def _int(value: JSON, where: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _expected(where, f"a whole number from {low} to {high}", value)
    return value


def _units(value: JSON, where: str, width: int) -> tuple[int, ...]:
    units = tuple(_int(unit, f"{where}[{i}]", 0, width - 1) for i, unit in enumerate(_list(value, where)))
    if any(left >= right for left, right in pairwise(units)):
        raise InputError(f"The plan's {where} is not sorted, or repeats a unit.")
    return units


def _expected(where: str, what: str, value: JSON) -> InputError:
    return InputError(f"The plan's {where} is {str(value)[:80]!r} ({type(value).__name__}); expected {what}.")


# ---- words --------------------------------------------------------------------------------------
def _ratio_note(ladders: Sequence[_Ladder], removed: Removed, policy: Policy) -> list[str]:
    """What a ratio came to, since widths go in steps."""
    if policy.ratio is None or not ladders:
        return []
    total = sum(ladder.group.width for ladder in ladders)
    gone = sum(ladder.group.unit_width * len(removed.get(ladder.name, ())) for ladder in ladders)
    return [
        f"Asked to remove {policy.ratio:.1%} of {total:,} prunable channels; in steps, {gone / total:.1%} go."
    ]


def _ladder_notes(ladders: Sequence[_Ladder], removed: Removed, policy: Policy) -> list[str]:
    narrow = [
        ladder for ladder in ladders if ladder.group.width < 4 * policy.round_to and len(ladder.rungs) > 1
    ]
    stuck = [ladder for ladder in ladders if len(ladder.rungs) == 1]
    lowest = [
        ladder
        for ladder in ladders
        if len(ladder.rungs) > 1 and len(removed.get(ladder.name, ())) == ladder.rungs[0] - ladder.rungs[-1]
    ]
    guarded = [ladder.group for ladder in lowest if ladder.guarded]
    clamped = [ladder.group for ladder in lowest if not ladder.guarded]
    notes = []
    if narrow:
        listed = ", ".join(
            f"{ladder.name} ({ladder.group.width} by {ladder.step_width})" for ladder in narrow
        )
        notes.append(f"Narrower than {4 * policy.round_to} channels, so rounded to a smaller step: {listed}.")
    if stuck:
        groups = [ladder.group for ladder in stuck]
        notes.append(f"Too narrow to lose a step above min_width {policy.min_width}: {_names(groups)}.")
    if clamped:
        notes.append(f"At their smallest width (min_width {policy.min_width}): {_names(clamped)}.")
    if guarded:
        notes.append(
            f"Held back, as the global scope removes at most {_LIMIT_TEXT} of a group: {_names(guarded)}."
        )
    return notes


def _why_nothing(ladders: Sequence[_Ladder], policy: Policy) -> str:
    if not ladders:
        return "The plan removes nothing: the overrides leave every group as it is."
    steps = [ladder.step_width for ladder in ladders if len(ladder.rungs) > 1]
    if not steps:
        return (
            f"The plan removes nothing: no group can lose a step above min_width {policy.min_width} "
            f"(the widest has {max(ladder.group.width for ladder in ladders)} channels)."
        )
    total = sum(ladder.group.width for ladder in ladders)
    return (
        f"The plan removes nothing: ratio {policy.ratio} of {total} channels is less than one step "
        f"({max(steps)} channels)."
    )


def _groups(count: int) -> str:
    return f"{count} group{'s' if count != 1 else ''}"


def _names(groups: Iterable[CouplingGroup]) -> str:
    return ", ".join(f"{group.name} ({group.width})" for group in groups)


def _near(name: str, known: Iterable[str]) -> str:
    names = list(known)
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]) or "none"


def _exact(fraction: float) -> Fraction:
    """The decimal that was typed: 0.9 means nine tenths, so that half a step is half a step."""
    return Fraction(str(fraction))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
