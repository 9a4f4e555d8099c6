"""What a plan says about itself: roundings, floors, and why nothing goes."""

from __future__ import annotations

from collections.abc import Sequence

from sepress.plan.ladders import Ladder
from sepress.plan.policy import LIMIT_TEXT
from sepress.plan.words import listed
from sepress.types import Policy, Removed


def ratio_note(ladders: Sequence[Ladder], removed: Removed, policy: Policy) -> list[str]:
    """What a ratio came to, since widths go in steps."""
    if policy.ratio is None or not ladders:
        return []
    total = sum(ladder.group.width for ladder in ladders)
    gone = sum(ladder.group.unit_width * len(removed.get(ladder.name, ())) for ladder in ladders)
    return [
        f"Asked to remove {policy.ratio:.1%} of {total:,} prunable channels; in steps, {gone / total:.1%} go."
    ]


def ladder_notes(ladders: Sequence[Ladder], removed: Removed, policy: Policy) -> list[str]:
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
        steps = ", ".join(f"{ladder.name} ({ladder.group.width} by {ladder.step_width})" for ladder in narrow)
        notes.append(f"Narrower than {4 * policy.round_to} channels, so rounded to a smaller step: {steps}.")
    if stuck:
        groups = [ladder.group for ladder in stuck]
        notes.append(f"Too narrow to lose a step above min_width {policy.min_width}: {listed(groups)}.")
    if clamped:
        notes.append(f"At their smallest width (min_width {policy.min_width}): {listed(clamped)}.")
    if guarded:
        notes.append(
            f"Held back, as the {policy.scope} scope removes at most {LIMIT_TEXT} of a group: "
            f"{listed(guarded)}."
        )
    return notes


def why_nothing(ladders: Sequence[Ladder], policy: Policy) -> str:
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
