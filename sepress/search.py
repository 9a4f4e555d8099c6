"""A constraint on accuracy -> the smallest net that holds it, by bisection over the share of MACs kept.

Bisection takes for granted that of two nets the smaller one holds no better. Accuracy on a few hundred images
wavers by a point, so what is found is a net that holds, and not the only one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sepress import console
from sepress.constraints import Constraint, ConstraintResult
from sepress.errors import InputError
from sepress.pruning import Surgery
from sepress.types import PruningPlan

PROBES = 6  # leave 1/64 of what could go undecided
RESOLUTION = (
    0.01  # of the MACs: widths are multiples of 8, so plans lie further apart than that on small nets
)


@dataclass(frozen=True)
class Probe:
    """One net that was made and measured."""

    share: float  # of the MACs kept
    result: ConstraintResult


@dataclass(frozen=True)
class Found:
    """The smallest net that held, and all that were tried, in order."""

    surgery: Surgery
    probes: tuple[Probe, ...]


def smallest_within(
    constraint: Constraint,
    *,
    least: float,
    plan: Callable[[float], PruningPlan],
    attempt: Callable[[float], tuple[Surgery, ConstraintResult]],
) -> Found:
    """Try shares of the MACs between `least`, the smallest reachable, and the whole net.

    `plan` says what a share would remove, so that nothing is tried twice; `attempt` makes that net and holds
    it to the constraint. Logs a line a probe. Raises InputError where none holds, with the best reached.
    """
    low, high = least, 1.0
    surgery: Surgery | None = None
    probes: list[Probe] = []
    failed: list[PruningPlan] = []
    while len(probes) < PROBES and high - low > RESOLUTION:
        target = (low + high) / 2
        planned = plan(target)
        if any(planned.removed == other.removed for other in failed):  # rounding: the same widths again
            low = target
            continue
        made, result = attempt(target)
        share = made.plan.macs_after / made.plan.macs_before
        probes.append(Probe(share, result))
        console.log(f"probe {len(probes)} of at most {PROBES}: {share:.1%} of the MACs, {result}")
        if result.passed:
            surgery, high = made, share
        else:
            failed.append(planned)
            low = target
    if surgery is None:
        raise InputError(_why_none(constraint, probes), remedy=_LOOSEN)
    return Found(surgery, tuple(probes))


def search_note(constraint: Constraint, found: Found, *, images: int, tuned_epochs: int) -> str:
    """Say what was searched, and found."""
    tried = sorted(found.probes, key=lambda probe: probe.share)
    listed = ", ".join(f"{p.share:.1%} {'held' if p.result.passed else 'did not'}" for p in tried)
    tuned = (
        f", each fine-tuned for {tuned_epochs} epoch{'s' if tuned_epochs > 1 else ''}" if tuned_epochs else ""
    )
    share = found.surgery.plan.macs_after / found.surgery.plan.macs_before
    return (
        f"the smallest net found within {constraint} on {images:,} validation images keeps {share:.1%} "
        f"of the MACs; shares tried{tuned}: {listed}"
    )


_LOOSEN = "Loosen the constraint, fine-tune (--finetune-epochs 3), or choose another criterion."


def _why_none(constraint: Constraint, probes: list[Probe]) -> str:
    known = [probe for probe in probes if probe.result.actual is not None]
    if not known:
        why = probes[0].result.reason if probes else "nothing can be removed"
        return f"no smaller net holds {constraint}: {why}"
    upwards = constraint.op in (">=", ">")

    def goodness(probe: Probe) -> float:
        actual = probe.result.actual or 0.0
        return actual if upwards else -actual

    best = max(known, key=goodness)
    return (
        f"no smaller net was found that holds {constraint} on validation; the best of {len(probes)} "
        f"reached {constraint.metric} {best.result.actual:.6g} at {best.share:.1%} of the MACs"
    )
