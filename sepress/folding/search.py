"""Which gates to fold: each by what it alone costs on calibration images, together by what accuracy allows.

The order of gates by their own cost says roughly which go well together; whether so many may go is told by
the folded nets themselves, from the one with most gates folded down to the first that is accepted.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sepress import console
from sepress.coupling import Coupling
from sepress.errors import InputError
from sepress.folding.constants import Loss, measure_constants, measure_losses
from sepress.folding.places import Where
from sepress.folding.surgery import Folding, Structure, find_structure, fold_constants
from sepress.measure import count_params
from sepress.types import Check

PLACES: dict[Where, str] = {
    "before": "its constant multiplies the layer before it",
    "after": "its constant multiplies what reads it",
    "kept": "one multiplication by a constant stays",
}


@dataclass(frozen=True)
class GateOutcome:
    """What became of one gate."""

    gate: str
    folded: bool
    loss: Loss | None  # of folding it alone, on calibration images; None where it was not tried
    where: Where | None = None
    parameters: tuple[str, ...] = ()  # that hold its constant now
    reason: str | None = None  # why it stays

    def __str__(self) -> str:
        cost = "" if self.loss is None else f"; alone it costs {self.loss} on calibration images"
        if self.where is None:
            return f"{self.gate} stays: {self.reason}{cost}"
        into = f" ({', '.join(self.parameters)})" if self.parameters else ""
        return f"{self.gate} folded: {PLACES[self.where]}{into}{cost}"


@dataclass(frozen=True)
class FoldResult:
    """What `sepress.fold` returns: the folded net, and what became of each gate, the cheapest first."""

    net: nn.Module
    gates: tuple[GateOutcome, ...]
    check: Check  # the folded net against the given one with those gates held constant
    params_before: int
    params_after: int
    tried: tuple[str, ...] = ()  # the numbers of gates that were tried, most first, and what was said of them

    @property
    def folded(self) -> tuple[str, ...]:
        """The names of the gates that are gone."""
        return tuple(outcome.gate for outcome in self.gates if outcome.folded)

    def notes(self) -> list[str]:
        """What happened, in words: the whole first, then gate by gate."""
        saved = self.params_before - self.params_after
        whole = (
            f"{len(self.folded)} of {_gates(len(self.gates))} folded; {saved:,} parameters fewer "
            f"({saved / self.params_before:.1%})"
        )
        tried = [f"tried: {'; '.join(self.tried)}"] if self.tried else []
        return [whole, *tried, *map(str, self.gates)]


def fold_gates(
    net: nn.Module,
    coupling: Coupling,
    batches: Iterable[Any],
    images: Tensor,
    *,
    patterns: Sequence[str],
    accept: Callable[[nn.Module], tuple[bool, str]] | None,
    device: torch.device,
    allow_vacuous: bool = False,
) -> FoldResult:
    """Fold the gates that match a pattern: all of them, or the most in order of cost that `accept` takes.

    `net` is traced, on `device`, and stays as it is; `images` (n, ...) there are real inputs for the check.
    `accept` looks at a folded net and says whether it will do, and in words why. Batch norm is left alone:
    the statistics of training fit a folded net better than those of a few hundred images. Raises InputError
    where no gate matches, or none of those can be folded.
    """
    structure = find_structure(net, coupling, images[:1])
    chosen = _chosen(structure, patterns)
    named = replace(coupling, gates=tuple(gate for gate in coupling.gates if gate.name in chosen))
    constants = measure_constants(net, named, batches, device=device)
    losses = measure_losses(net, coupling, batches, constants, device=device)
    order = sorted(chosen, key=lambda name: losses[name].figure)
    tried: list[str] = []
    for count in range(len(order), 0, -1):
        some = {name: constants[name] for name in order[:count]}
        folding = fold_constants(structure, some, images, allow_vacuous=allow_vacuous)
        if accept is None:
            break
        accepted, words = accept(folding.net)
        tried.append(f"{_gates(len(folding.folded))}, {words}")
        console.log(tried[-1])
        if accepted:
            break
    else:
        folding = fold_constants(structure, {}, images)
    outcomes = _outcomes(structure, folding, order, losses)
    return FoldResult(
        folding.net, outcomes, folding.check, count_params(net), count_params(folding.net), tuple(tried)
    )


def _gates(count: int) -> str:
    return f"{count} gate" + ("" if count == 1 else "s")


def _chosen(structure: Structure, patterns: Sequence[str]) -> list[str]:
    """The gates that are named and can be folded."""
    gates = [gate.name for gate in structure.coupling.gates]
    if not gates:
        raise InputError("this net has no gate to fold", remedy="sepress inspect MODEL shows what is gated.")
    for pattern in patterns:
        if not fnmatch.filter(gates, pattern):
            raise InputError(f"no gate matches '{pattern}'", remedy=f"Gates: {', '.join(gates)}.")
    named = [gate for gate in gates if any(fnmatch.fnmatchcase(gate, pattern) for pattern in patterns)]
    chosen = [gate for gate in named if gate in structure.blocks]
    if not chosen:
        reasons = "; ".join(f"{gate}: {structure.unfoldable[gate]}" for gate in named)
        raise InputError(f"none of {len(named)} gates can be folded: {reasons}")
    return chosen


def _outcomes(
    structure: Structure, folding: Folding, order: Sequence[str], losses: dict[str, Loss]
) -> tuple[GateOutcome, ...]:
    """What became of each gate: the folded ones in order, those left by the search, then the others."""
    done = {step.gate: step for step in folding.folded}
    rest = [gate.name for gate in structure.coupling.gates if gate.name not in order]
    outcomes = []
    for name in (*order, *rest):
        loss = losses.get(name)
        if name in done:
            step = done[name]
            outcomes.append(GateOutcome(name, True, loss, step.where, step.parameters))
        else:
            reason = folding.refused.get(name) or structure.unfoldable.get(name)
            reason = reason or ("the constraint" if name in order else "it is not among the gates named")
            outcomes.append(GateOutcome(name, False, loss, reason=reason))
    return tuple(outcomes)
