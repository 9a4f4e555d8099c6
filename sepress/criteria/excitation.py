"""What the SE gates say of the channels they scale (Hu et al. 2018, sec. 6.4).

A gate gives a figure for each of its channels; one that has a value for each position or branch gives their
mean. A unit's is the mean over its channels, then over the group's gates. Gates whose values tell nothing
of a channel (`Gate.silent_because`: one that only shifts, a softmax over branches) are left out. Where the
others don't cover every unit of a group (the inner channels of a bottleneck, the hidden channels of an SE
block), it is judged by L2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from sepress.calibrate import ExcitationStats
from sepress.coupling import Coupling
from sepress.criteria.judging import Facts, Judgement, count, judged_by_l2, per_unit
from sepress.types import CouplingGroup, Gate


def mean_excitation(facts: Facts) -> dict[str, Judgement]:
    """The plain mean of the gate over images."""
    return _by_gates(facts, facts.measured.mean_excitation, "mean of {}")


def class_excitation(facts: Facts) -> dict[str, Judgement]:
    """The mean of the gate over the images of the class that excites it most.

    A channel that one class alone needs is as important as one that all do; the plain mean would drown it.
    """

    def most_excited(gate: Gate) -> Tensor:
        by_class = facts.measured.class_mean_excitation(gate)  # (K, C), NaN for a class without images
        return by_class.nan_to_num(nan=-np.inf).amax(0)

    return _by_gates(facts, most_excited, "largest class mean of {}")


def excitation_spread(facts: Facts) -> dict[str, Judgement]:
    """The standard deviation of the gate over images.

    A gate that never varies is a constant, which could be folded into the weights; one that varies tells
    images apart. The mean is left out, being a criterion of its own: their product would let an open gate
    that hardly varies pass for one that discriminates.
    """
    return _by_gates(facts, lambda gate: facts.measured.excitation_variance(gate).sqrt(), "spread of {}")


def group_means(coupling: Coupling, stats: ExcitationStats, group: CouplingGroup) -> np.ndarray | None:
    """The mean excitation of each unit (U,); None unless gates cover every unit."""
    return _over_gates(coupling, group, stats.mean_excitation)


def _by_gates(facts: Facts, measured: Callable[[Gate], Tensor], said: str) -> dict[str, Judgement]:
    judged = {}
    for group in facts.coupling.prunable():
        scores = _over_gates(facts.coupling, group, measured)
        if scores is not None:
            telling = [gate for gate in _gates_of(facts.coupling, group) if gate.silent_because is None]
            judged[group.name] = Judgement(scores, count(said, len(telling), "gate"))
        else:
            judged[group.name] = judged_by_l2(facts, group, because=_unsaid(facts.coupling, group))
    return judged


def _gates_of(coupling: Coupling, group: CouplingGroup) -> list[Gate]:
    return [gate for gate in coupling.gates if gate.name in group.gates]


def _unsaid(coupling: Coupling, group: CouplingGroup) -> str:
    """Why no figure of gates judges a group."""
    reasons = [gate.silent_because for gate in _gates_of(coupling, group)]
    if not reasons:
        return "no gate"
    silent = list(dict.fromkeys(why for why in reasons if why is not None))
    if None in reasons:
        return "its gates cover a part only"
    return f"its gate {' or '.join(silent)}"


def _over_gates(
    coupling: Coupling, group: CouplingGroup, measured: Callable[[Gate], Tensor]
) -> np.ndarray | None:
    """The mean over a unit's channels and a group's gates, (U,); None unless gates cover every unit."""
    total, gates = np.zeros(group.units), np.zeros(group.units)
    for gate in _gates_of(coupling, group):
        if gate.silent_because is not None:
            continue
        covered = gate.units >= 0
        units = gate.units[covered]
        slots = np.bincount(units, minlength=group.units)
        total += per_unit(group, units, measured(gate).numpy()[covered]) / np.maximum(slots, 1)
        gates += slots > 0
    return total / gates if gates.all() else None
