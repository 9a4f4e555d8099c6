"""A penalty that drives the gates of a trained net apart, so that mean excitation tells what to prune.

The polarisation regulariser (Zhuang et al. 2020, eq. 2) is put on the batch mean of each gate's excitation,
m (C,), in place of the scale of a batch norm:

    R(m) = t |m|_1 - |m - mean(m)|_1,    -2 < t < 2

For m within 0..1 it is least with some channels at 1 and the others at 0: with a share q at 1, R / C is
t q - 2 q (1 - q), least at q = (2 - t) / 4; so t follows from the share that is to be open. The mean is the
gate's own (the paper's is over all layers): excitations of different layers are not comparable raw. R is
divided by C, and averaged over the gates. Gates that can't be driven so are left alone, and named: those
without a squash, and those whose values tell nothing of a channel (`Gate.silent_because`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sepress.coupling import Coupling
from sepress.errors import InputError
from sepress.gates import Taps
from sepress.types import JSON, Gate

UNBOUNDED = "none"  # such a gate's excitation could grow without end, and R fall with it


@dataclass(frozen=True)
class Polarisation:
    """The penalty `strength` x R for `train`; InputError for a net without a gate that has a squash.

    `coupling` is the trace of the net (or of one it is a copy of), `open_share` the share of each gate's
    channels that R would open.
    """

    coupling: Coupling
    strength: float
    open_share: float = 0.5

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise InputError(
                f"the strength of polarisation is {self.strength!r}", remedy="Expected: above 0."
            )
        if not 0 < self.open_share < 1:
            raise InputError(
                f"the share of open channels is {self.open_share!r}", remedy="Expected: between 0 and 1."
            )
        if not self.gates:
            raise InputError(
                "the net has no gate with a squash (sigmoid, hardsigmoid, ...), and so nothing to polarise"
                + "".join(f"; {note}" for note in self.left_alone),
                remedy="`sepress inspect MODEL` lists the gates. Prune by another criterion.",
            )

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates that are driven apart."""
        return tuple(gate for gate in self.coupling.gates if _why_not(gate) is None)

    @property
    def left_alone(self) -> list[str]:
        """The other gates, each with its reason."""
        return [f"{gate.name} {why}" for gate in self.coupling.gates if (why := _why_not(gate)) is not None]

    @property
    def identity(self) -> Mapping[str, JSON]:
        return {"name": "polarisation", "strength": self.strength, "open_share": self.open_share}

    @contextmanager
    def watching(self, net: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """Watch the forwards of `net`, in eval mode; what is yielded gives the penalty of the last, ()."""
        means: list[Tensor] = []

        def note(gate: Gate, s: Tensor) -> None:
            if _why_not(gate) is None:
                means.append(s.float().movedim(gate.site.axis, 0).flatten(1).mean(1))  # (C,)

        def penalty() -> Tensor:
            terms = [polarisation(m, open_share=self.open_share) for m in means]
            means.clear()
            return self.strength * torch.stack(terms).mean()

        with Taps(net, self.coupling, on_gate=note):
            yield penalty


def _why_not(gate: Gate) -> str | None:
    """Why a gate can't be driven apart; None where it can."""
    return gate.silent_because or ("has no squash" if gate.activation == UNBOUNDED else None)


def polarisation(m: Tensor, *, open_share: float) -> Tensor:
    """R(m) / C of mean excitations m (C,), with t = 2 - 4 open_share: ()."""
    t = 2 - 4 * open_share
    return (t * m.abs() - (m - m.mean()).abs()).mean()


# ---- what it did ----------------------------------------------------------------------------------
CLOSED, OPEN = 0.1, 0.9  # a mean excitation under, over these is decisive


@dataclass(frozen=True)
class Decisions:
    """How decided a net's gates are, and how accurate the net is."""

    val_top1: float
    closed: Mapping[str, float]  # gate -> the share of its channels whose mean excitation is under CLOSED
    open: Mapping[str, float]  # gate -> the share over OPEN


def decisions(val_top1: float, mean_excitation: Mapping[str, Tensor]) -> Decisions:
    """Count the decided channels of mean excitations (C,), by gate."""
    closed = {name: (m < CLOSED).double().mean().item() for name, m in mean_excitation.items()}
    opened = {name: (m > OPEN).double().mean().item() for name, m in mean_excitation.items()}
    return Decisions(val_top1, closed, opened)


def polarisation_notes(before: Decisions, after: Decisions, left_alone: Sequence[str] = ()) -> list[str]:
    """Say what polarising cost, what became of each gate, and which gates it left alone."""
    gates = [
        f"{name} {before.closed[name]:.0%} / {before.open[name]:.0%} -> "
        f"{after.closed[name]:.0%} / {after.open[name]:.0%}"
        for name in before.closed
    ]
    return [
        f"polarised: top-1 on validation {before.val_top1:.2%} -> {after.val_top1:.2%}",
        f"channels of a mean excitation under {CLOSED} / over {OPEN}, by gate: {', '.join(gates)}",
        *([f"gates left alone: {', '.join(left_alone)}"] if left_alone else []),
    ]
