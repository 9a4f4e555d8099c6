"""What a channel's readers lose once all others have been fitted to stand in for it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sepress.criteria.judging import Facts, Judgement, count, judged_by_l2
from sepress.reconstruct import order_groups


def reconstruction(facts: Facts) -> dict[str, Judgement]:
    """The order of removal by Optimal Brain Surgeon on what layers read; see `reconstruct`.

    A unit's score is the loss predicted once it and all before it are gone: the shares of its output's
    variance that each reader loses after the best refit of its weights, added over readers.
    """
    return _by_order(facts, order_groups(facts.net, facts.coupling, facts.measured), "reconstruction")


def fisher_reconstruction(facts: Facts) -> dict[str, Judgement]:
    """The same, of variance in the directions that the loss feels: output gradients weigh it."""
    return _by_order(
        facts, order_groups(facts.net, facts.coupling, facts.measured, felt=True), "felt reconstruction"
    )


def _by_order(
    facts: Facts, orders: Mapping[str, tuple[list[int], list[float], int]], said: str
) -> dict[str, Judgement]:
    judged = {}
    for group in facts.coupling.prunable():
        if group.name not in orders:
            judged[group.name] = judged_by_l2(facts, group, because="no measured layer reads it")
            continue
        order, steps, readers = orders[group.name]
        lost = np.cumsum(steps)
        scores = np.empty(group.units)
        scores[order] = lost
        words = count(said + " at {}", readers, "reader")
        judged[group.name] = Judgement(scores, words, np.concatenate([[0.0], lost]))
    return judged
