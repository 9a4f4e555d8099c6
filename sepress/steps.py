"""Prune in steps, each on a net that recovered from the one before; one plan, in the first net's units."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sepress import console
from sepress.calibrate import ExcitationStats
from sepress.coupling import Coupling, take_out
from sepress.errors import InputError, SepressError
from sepress.plan import plan_pruning
from sepress.pruning import Surgery
from sepress.types import Check, CouplingGroup, Policy, PruningPlan, Ranking, Removed

_EXACT = 2**23  # whole numbers below it are exact in float32


@dataclass(frozen=True)
class Judged:
    """A net, its structure, and what its channels were found to do."""

    net: nn.Module
    coupling: Coupling
    ranking: Ranking
    stats: ExcitationStats


def prune_in_steps(
    first: Judged,
    policy: Policy,
    *,
    steps: int,
    cut: Callable[[Judged, Policy], Surgery],
    recover: Callable[[nn.Module], Judged],
) -> Surgery:
    """Reach the policy's target in `steps` that keep equal shares of the MACs (or parameters).

    `cut` prunes one net and checks it; `recover` makes a pruned net fit for the next cut, and judges it
    anew. The limit of 85 % of a group, where the scope has it, is that of each step. The surgery that is
    returned is of the first net as a whole; its check is the worst of the steps'. Raises InputError for a
    target that is not a share, or not in reach, and SepressError where the steps don't add up to one
    removal from the first net's groups.
    """
    target, share = _target(policy)
    whole = first.coupling
    size = whole.count_macs if target == "target_macs" else whole.count_params
    # Out of reach? Said before anything is trained. Of all steps together, no group has a limit of 85 %.
    plan_pruning(first.ranking, whole, policy=replace(policy, scope="per-group"))
    ledger = _numbered(first.net)
    removed: dict[str, tuple[int, ...]] = {}
    surgeries: list[Surgery] = []
    here = first
    for step in range(1, steps + 1):
        asked = share ** (step / steps) * size({}) / size(removed)
        if asked >= 1:
            continue  # widths are rounded: the step before went as far
        if surgeries:
            here = recover(surgeries[-1].net)
            here = replace(here, coupling=here.coupling.with_frozen(_frozen_since(whole, surgeries)))
        surgery = cut(here, replace(policy, **{target: asked}))
        surgeries.append(surgery)
        removed = compose(whole.groups, removed, surgery.plan.removed)
        take_out(ledger, here.coupling, surgery.plan.removed)
        console.log(
            f"step {step} of {steps}: {whole.count_macs(removed) / whole.count_macs({}):.1%} of the MACs"
        )
    _check_sum(first, removed, ledger)
    return Surgery(
        net=surgeries[-1].net,
        plan=_whole_plan(whole, policy, removed, surgeries),
        coupling=whole.with_frozen(_frozen_since(whole, surgeries)),
        check=_worst([surgery.check for surgery in surgeries]),
    )


def compose(groups: Sequence[CouplingGroup], gone: Removed, then: Removed) -> dict[str, tuple[int, ...]]:
    """All that is removed, in units of the first net: `then` counts the units that `gone` has left.

    Raises SepressError where `then` names what the first net has not.
    """
    units = {group.name: group.units for group in groups}
    result = {name: tuple(numbers) for name, numbers in gone.items()}
    for name, numbers in then.items():
        before = set(gone.get(name, ()))
        left = [unit for unit in range(units.get(name, 0)) if unit not in before]
        if numbers and max(numbers) >= len(left):
            raise _no_sum(f"'{name}' has other units after a step")
        result[name] = tuple(sorted((*before, *(left[number] for number in numbers))))
    return {group.name: result[group.name] for group in groups if result.get(group.name)}


def _target(policy: Policy) -> tuple[str, float]:
    for name, value in policy.targets.items():
        if name != "ratio":
            return name, value
    raise InputError(
        "steps lead to a share of the multiply-adds or parameters",
        remedy="Pass target_macs or target_params.",
    )


# ---- the sum of the steps -------------------------------------------------------------------------
@torch.no_grad()
def _numbered(net: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers hold the number of each element: cuts show what they took."""
    numbered = copy.deepcopy(net)
    for t in (*numbered.parameters(), *numbered.buffers()):
        t.copy_((torch.arange(t.numel(), device=t.device) % _EXACT).view(t.shape))
    return numbered


def _check_sum(first: Judged, removed: Removed, ledger: nn.Module) -> None:
    """Hold one cut of `removed` to what the steps' cuts left of the numbered copy, element by element."""
    once = _numbered(first.net)
    take_out(once, first.coupling, removed)
    ours, theirs = once.state_dict(), ledger.state_dict()
    for name, t in ours.items():
        if not torch.equal(t, theirs[name]):
            raise _no_sum(f"{name} is left {tuple(theirs[name].shape)} by them, and {tuple(t.shape)} by one")


def _no_sum(why: str) -> SepressError:
    return SepressError(
        f"the steps don't add up to one removal from the first net: {why}",
        remedy="No model was written. Prune in one step (--steps 1), and please report it.",
    )


def _frozen_since(whole: Coupling, surgeries: Sequence[Surgery]) -> Mapping[str, str]:
    """What failed checks froze: group -> why."""
    free = {group.name for group in whole.groups if group.role != "frozen"}
    return {
        group.name: group.frozen_because or ""
        for surgery in surgeries
        for group in surgery.coupling.groups
        if group.role == "frozen" and group.name in free
    }


def _whole_plan(
    whole: Coupling, policy: Policy, removed: Removed, surgeries: Sequence[Surgery]
) -> PruningPlan:
    before = {group.name: group.width for group in whole.groups}
    after = {
        group.name: group.width - group.unit_width * len(removed.get(group.name, ()))
        for group in whole.groups
    }
    base = whole.count_macs({})
    shares = ", ".join(f"{surgery.plan.macs_after / base:.1%}" for surgery in surgeries)
    notes = (
        f"pruned in {len(surgeries)} steps, ranked anew before each: {shares} of the MACs",
        *(note for surgery in surgeries for note in surgery.plan.notes),
    )
    return PruningPlan(
        policy=replace(policy, scope=surgeries[0].plan.policy.scope),  # what 'auto' came to
        criterion=surgeries[0].plan.criterion,
        removed=removed,
        widths_before=before,
        widths_after=after,
        evidence=surgeries[0].plan.evidence,
        macs_before=base,
        macs_after=whole.count_macs(removed),
        params_before=whole.count_params({}),
        params_after=whole.count_params(removed),
        notes=tuple(dict.fromkeys(notes)),
    )


def _worst(checks: Sequence[Check]) -> Check:
    """One that can't tell, else the largest error."""
    untold = [check for check in checks if check.passed is not True]
    return untold[0] if untold else max(checks, key=lambda check: check.relative_error or 0.0)
