"""How the loss reacts to a unit gate: u = 1, a factor on a unit wherever it is read.

Such a gate can be put on any unit, gated or not, so that one definition judges all groups. Per image, the
gradients of all tied positions and readers are summed first. What they give is in units of the loss, and so
comparable over groups as it stands: the sums over the units that go are the costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from torch import Tensor

from sepress.criteria.judging import Facts, Judgement, count, judged_by_l2, readings


def fisher(facts: Facts) -> dict[str, Judgement]:
    """E[(dL/du)^2]: the Fisher information of switching a unit off (Theis et al. 2018).

    Where the gate is what its one reader reads, s x, this is E[(s dL/ds)^2], the SE gate taken as the mask it
    is. Half of it is the second-order loss (LeCun et al. 1989, with the Fisher information for the Hessian).
    """
    return _by_unit_gates(facts, facts.measured.fisher, "Fisher")


def gate_taylor(facts: Facts) -> dict[str, Judgement]:
    """E[|dL/du|]: the first-order loss of switching a unit off, image by image (Molchanov et al. 2017).

    Where the gate is what its one reader reads, this is E[|s dL/ds|].
    """
    return _by_unit_gates(facts, facts.measured.gate_taylor, "Taylor of a unit gate")


def _by_unit_gates(facts: Facts, measured: Callable[[str, int], Tensor], said: str) -> dict[str, Judgement]:
    readers = Counter(group.name for _, places in readings(facts.coupling) for group, _ in places)
    judged = {}
    for group in facts.coupling.prunable():
        if not readers[group.name]:
            judged[group.name] = judged_by_l2(facts, group, because="nothing reads it")
            continue
        scores = measured(group.name, group.units).numpy()
        costs = np.concatenate([[0.0], np.sort(scores).cumsum()])
        judged[group.name] = Judgement(scores, count(said + " at {}", readers[group.name], "reader"), costs)
    return judged
