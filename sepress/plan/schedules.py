"""One order over all steps of all ladders: every plan is a prefix of it."""

from __future__ import annotations

from collections.abc import Sequence

from sepress.plan.ladders import Ladder


def build_schedule(ladders: Sequence[Ladder], scope: str) -> list[int]:
    """The order of all steps: each entry lets that ladder (by position) take its next step."""
    steps: list[tuple[float, float, int]] = []
    for position, ladder in enumerate(ladders):
        for turn, cost in zip(ladder.turns(), ladder.costs, strict=True):
            # Division rounds correctly: equal shares stay equal as floats, and cost decides.
            steps.append((-float(turn) if scope == "per-group" else cost, cost, position))
    return [position for _, _, position in sorted(steps)]
