"""What a policy may ask for, and the groups that it leaves to prune."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Protocol, get_args

from sepress.errors import InputError
from sepress.plan.words import counted, listed, nearest
from sepress.types import TARGETS, CouplingGroup, Policy, Removed, Scope

SCOPES: tuple[str, ...] = get_args(Scope)
GLOBAL_LIMIT = Fraction(85, 100)  # of a group; a scope over groups left alone guts single layers
LIMIT_TEXT = f"{float(GLOBAL_LIMIT):.0%}"


Count = Callable[[Removed], int]


class Countable(Protocol):
    """What planning needs of a `Coupling`: its groups and exact predictions of a removal."""

    @property
    def groups(self) -> tuple[CouplingGroup, ...]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # of parameters and buffers

    def partners(self) -> Mapping[str, str]: ...  # the two sides of a grouped convolution

    def prunable(self) -> tuple[CouplingGroup, ...]: ...

    def count_macs(self, removed: Removed, /) -> int: ...

    def count_params(self, removed: Removed, /) -> int: ...


def check_policy(policy: Policy) -> None:
    """Raise InputError where a policy is wrong whatever the net: no net is needed to say so."""
    targets = policy.targets
    if len(targets) != 1:
        given = "none is set" if not targets else f"{' and '.join(targets)} are set"
        raise InputError(
            f"A policy takes exactly one of {', '.join(TARGETS[:-1])} and {TARGETS[-1]}, but {given}.",
            remedy="Pass one of them, for instance --ratio 0.3 (30 % of the prunable channels go).",
        )
    for target, value in targets.items():
        meaning = "removed" if target == "ratio" else "of the base kept"
        if not _is_number(value) or not 0 < value < 1:
            raise InputError(
                f"{target} is {value!r}; expected a fraction {meaning}, above 0 and below 1.",
                remedy=f"For 30 % write {target} 0.3.",
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


def candidates(coupling: Countable, policy: Policy) -> tuple[list[CouplingGroup], list[str]]:
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
            f"{counted(held)} can't be pruned and {'keeps its' if held == 1 else 'keep their'} width."
        )
    if frozen:
        notes.append(f"{counted(len(frozen))} frozen by pattern: {listed(frozen)}.")
    if ungated:
        notes.append(f"gated_only: {counted(len(ungated))} without a gate of their own left as they are.")
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


def own_ratios(groups: Sequence[CouplingGroup], coupling: Countable, policy: Policy) -> dict[str, Fraction]:
    """The ratio of each group that an override names; of several patterns the first that matches."""
    ratios: dict[str, Fraction] = {}
    for pattern, ratio in policy.overrides.items():
        matched = _require_match(pattern, coupling)
        hits = [group for group in groups if _matches(group, pattern)]
        if not hits:
            raise InputError(
                f"The override {pattern!r} names only groups that are not pruned: {listed(matched)}.",
                remedy="Remove the override, or what freezes these groups.",
            )
        for group in hits:
            ratios.setdefault(group.name, exact(ratio))
    return ratios


def _matches(group: CouplingGroup, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (group.name, *group.producers))


def _require_match(pattern: str, coupling: Countable) -> list[CouplingGroup]:
    matched = [group for group in coupling.groups if _matches(group, pattern)]
    if not matched:
        names = dict.fromkeys(name for group in coupling.groups for name in (group.name, *group.producers))
        near = nearest(pattern, names)
        raise InputError(
            f"The pattern {pattern!r} matches no group and no producer layer; near it: {near}.",
            remedy="`sepress inspect MODEL` lists the groups.",
        )
    return matched


def exact(fraction: float) -> Fraction:
    """The decimal that was typed: 0.9 means nine tenths, so that half a step is half a step."""
    return Fraction(str(fraction))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
