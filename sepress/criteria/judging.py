"""What a criterion looks at and what it says, and the judge of last resort: the group's L2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from sepress import baselines
from sepress.calibrate import ExcitationStats, judged_positions, reader_key
from sepress.coupling import Coupling
from sepress.types import CouplingGroup, Reader


@dataclass(frozen=True)
class Facts:
    """What a criterion may look at."""

    coupling: Coupling
    net: nn.Module  # its weights; nothing is run
    seed: int
    stats: ExcitationStats | None

    @property
    def measured(self) -> ExcitationStats:
        """The statistics, by a criterion that stated its need of them."""
        assert self.stats is not None
        return self.stats


@dataclass(frozen=True)
class Judgement:
    """The scores of one group's units (U,), higher = keep, and what judged them, in words.

    `costs` are the predicted loss once 0, 1, 2, ... units are gone (U + 1,), comparable over groups, where
    the criterion predicts one (Ranking.costs).
    """

    scores: np.ndarray
    evidence: str
    costs: np.ndarray | None = None


@dataclass(frozen=True)
class Criterion:
    """A named way to score: `needs` is the evidence that calibration has to collect.

    With `predicts` it says what removal costs (`Judgement.costs`), as the knapsack scope needs it.
    """

    name: str
    needs: frozenset[str]
    score: Callable[[Facts], dict[str, Judgement]]
    summary: str
    predicts: bool = False

    @property
    def judges_gates(self) -> bool:
        """Whether it looks at gates and nothing else, so that a net without any gives it nothing to see."""
        return bool(self.needs & {"excitation", "class-excitation"})


def judged_by_l2(facts: Facts, group: CouplingGroup, *, because: str | None = None) -> Judgement:
    """torch-pruning's group L2, or the plain mean over members where it knows no layer of the group."""
    result = baselines.group_l2(facts.net, group)
    scores = _plain_l2(facts.net, group) if result.scores is None else result.scores
    note = f" ({because})" if because else ""
    return Judgement(scores, "L2 of weights" + without(result.left_out) + note)


def _plain_l2(net: nn.Module, group: CouplingGroup) -> np.ndarray:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    total = np.zeros(group.units)
    for member in group.members:
        if member.parameter in parameters:
            w = parameters[member.parameter].detach().cpu().double().square()
            energy = w.movedim(member.dim, 0).reshape(w.size(member.dim), -1).sum(1).numpy()
            total += per_unit(group, member.unit, energy[member.index])
    return total / total.mean() if total.mean() > 0 else total


def readings(coupling: Coupling) -> Iterator[tuple[Reader, list[tuple[CouplingGroup, np.ndarray]]]]:
    """Every reader that judges, with the groups that it judges and where they lie on its axis, (P,) bool."""
    judged = judged_positions(coupling)
    for reader in coupling.readers:
        at = judged.get(reader_key(reader))
        if at is not None:
            yield reader, [(coupling.groups[i], at == i) for i in np.unique(at[at >= 0])]


def per_unit(group: CouplingGroup, unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Add values that lie on units (n,) up to figures of the group's units (U,)."""
    return np.bincount(unit, weights=values, minlength=group.units)


def count(template: str, n: int, noun: str) -> str:
    return template.format(f"{n} {noun}" + ("" if n == 1 else "s"))


def without(left_out: tuple[str, ...]) -> str:
    return f", without {some(list(left_out))}" if left_out else ""


def some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
