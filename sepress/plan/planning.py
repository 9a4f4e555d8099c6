"""A ranking and a policy to a plan; whether a plan fits a net; a plan as rows."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, cast

from sepress.errors import InputError
from sepress.plan.cuts import cut_to_ratio, cut_to_size
from sepress.plan.ladders import Ladder, build_ladder, removal
from sepress.plan.notes import ladder_notes, ratio_note, why_nothing
from sepress.plan.policy import GLOBAL_LIMIT, Count, Countable, candidates, check_policy, own_ratios
from sepress.plan.schedules import build_schedule
from sepress.plan.words import listed, nearest
from sepress.types import Policy, PruningPlan, Ranking


def plan_pruning(
    ranking: Ranking, coupling: Countable, *, policy: Policy, latency: Count | None = None
) -> PruningPlan:
    """Choose the units that go.

    `latency` predicts the time of a net with units removed, in ns (see costs.py): what target_latency is met
    by, and what the knapsack weighs beside MACs or parameters. The ratio is the fraction of prunable channels
    removed: of all groups that neither the engine nor the policy freezes and that have no ratio of their own
    in `policy.overrides`. Raises InputError for a policy that can't be met (saying what is reachable), a
    pattern that matches nothing, a ranking of another net, a ranking without costs under the knapsack scope,
    and a plan that would remove nothing.
    """
    asked, policy = policy, resolve_scope(policy, ranking, coupling)
    own, fixed, free, notes = _ladders(ranking, coupling, policy)
    if asked.scope == "auto" and policy.scope == "per-group" and policy.ratio is None and ranking.costs:
        unknown = listed(ladder.group for ladder in free if ladder.name not in ranking.costs)
        notes.append(f"Widths by group and not by knapsack: what removal costs is not known of {unknown}.")
    schedule = build_schedule(free, ranking, coupling, policy, latency)
    if policy.ratio is not None:
        removed = {**fixed, **cut_to_ratio(free, schedule, policy)}
    elif policy.target_macs is not None:
        removed = cut_to_size(free, schedule, fixed, coupling.count_macs, policy.target_macs, "MACs")
    elif policy.target_latency is not None:
        if latency is None:
            raise InputError(
                "a latency can't be planned for: nothing predicts it",
                remedy="Pass a latency table, or a target in MACs.",
            )
        removed = cut_to_size(free, schedule, fixed, latency, policy.target_latency, "predicted latency (ns)")
    else:
        target = cast(float, policy.target_params)  # check_policy: exactly one target is set
        removed = cut_to_size(free, schedule, fixed, coupling.count_params, target, "parameters")
    if not removed:
        raise InputError(why_nothing(free, policy), remedy="Ask for more, or lower round_to or min_width.")

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
        latency_ratio=None if latency is None else latency(removed) / latency({}),
        notes=(*ratio_note(free, removed, policy), *notes, *ladder_notes([*own, *free], removed, policy)),
    )


def resolve_scope(policy: Policy, ranking: Ranking, coupling: Countable) -> Policy:
    """The policy, with what 'auto' stands for.

    A ratio is of every group: channels priced alike would mostly go from wide layers that save little. A size
    is met by the knapsack, which needs the cost of removal in every group whose width it chooses.
    """
    check_policy(policy)
    if policy.scope != "auto":
        return policy
    groups, _ = candidates(coupling, policy)
    own = own_ratios(groups, coupling, policy)
    known = policy.ratio is None and all(
        group.name in ranking.costs for group in groups if group.name not in own
    )
    return replace(policy, scope="knapsack" if known else "per-group")


def smallest_macs(ranking: Ranking, coupling: Countable, *, policy: Policy) -> int:
    """The MACs of the smallest net that the policy allows, whatever its target; InputErrors as above."""
    _, fixed, free, _ = _ladders(ranking, coupling, resolve_scope(policy, ranking, coupling))
    return coupling.count_macs({**fixed, **removal(free, [len(ladder.sizes()) for ladder in free])})


def _ladders(
    ranking: Ranking, coupling: Countable, policy: Policy
) -> tuple[list[Ladder], dict[str, tuple[int, ...]], list[Ladder], list[str]]:
    """The groups with a ratio of their own and what it removes of them, the others, and notes on the rest."""
    _check_ranking(ranking, coupling)
    groups, notes = candidates(coupling, policy)
    ratios = own_ratios(groups, coupling, policy)
    own = [build_ladder(group, ranking, policy, Fraction(1)) for group in groups if group.name in ratios]
    limit = Fraction(1) if policy.scope == "per-group" else GLOBAL_LIMIT
    free = [build_ladder(group, ranking, policy, limit) for group in groups if group.name not in ratios]
    fixed = removal(own, [ladder.steps_at(ratios[ladder.name]) for ladder in own])
    return own, fixed, free, notes


def check_plan(plan: PruningPlan, coupling: Countable) -> None:
    """Raise InputError where a plan (of a file, say) does not fit the net it is applied to."""
    groups = {group.name: group for group in coupling.groups}
    remedy = "A plan fits the net it was made for; make a new one with `sepress prune --dry-run`."
    for name, width in plan.widths_before.items():
        if name not in groups:
            near = nearest(name, groups)
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


def _check_ranking(ranking: Ranking, coupling: Countable) -> None:
    known = {group.name for group in coupling.groups}
    for name in ranking.scores:
        if name not in known:
            raise InputError(
                f"The ranking scores group {name!r}, which this net lacks; near it: {nearest(name, known)}.",
                remedy="Rank this net again.",
            )
