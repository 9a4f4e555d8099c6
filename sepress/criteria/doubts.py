"""What makes a ranking doubtful: no gates, gates that look untrained, channels that are always zero."""

from __future__ import annotations

import numpy as np

from sepress.calibrate import ExcitationStats
from sepress.coupling import Coupling
from sepress.criteria.judging import per_unit, readings, some
from sepress.types import NO_EXCITATION, Gate

UNTRAINED_WIDTH = 0.05  # gates whose means all lie this close to 0.5 have hardly learned anything
CONSTANT_DEVIATION = 1e-3  # a gate that varies less over images does not recalibrate


def doubts(coupling: Coupling, stats: ExcitationStats | None) -> list[str]:
    """The warnings of a ranking, in words."""
    gates = tuple(gate for gate in coupling.gates if gate.silent_because is None)
    found = list(filter(None, [no_excitation(coupling)]))
    if stats is None:
        return found
    if "excitation" in stats.evidence:
        found += _gate_warnings(gates, stats)
    if "contribution" in stats.evidence:
        dead = _dead_units(coupling, stats)
        if dead:
            names = some([f"{n} of {name}" for name, n in dead.items()])
            found.append(f"{sum(dead.values())} channels are zero on every calibration image: {names}")
    return found


def no_excitation(coupling: Coupling) -> str | None:
    """Why no gate tells how much a channel counts, opening with `NO_EXCITATION`; None where one does."""
    silent = dict.fromkeys(gate.silent_because for gate in coupling.gates)
    if None in silent:
        return None
    why = f"every gate {' or '.join(map(str, silent))}" if silent else "the net has no gate"
    return f"{NO_EXCITATION}, since {why}: channels are judged without it"


def _gate_warnings(gates: tuple[Gate, ...], stats: ExcitationStats) -> list[str]:
    means = {gate.name: stats.mean_excitation(gate).numpy() for gate in gates}
    flat = [
        gate.name
        for gate in gates
        if stats.images > 1 and stats.excitation_variance(gate).max().item() < CONSTANT_DEVIATION**2
    ]
    middle = [name for name, mean in means.items() if np.abs(mean - 0.5).max() < UNTRAINED_WIDTH]
    found = []
    if middle:
        found.append(
            f"{len(middle)} of {len(gates)} gates look untrained, all channel means within "
            f"{UNTRAINED_WIDTH} of 0.5: {some(middle)}"
        )
    if flat:
        found.append(f"{len(flat)} of {len(gates)} gates do not vary over images: {some(flat)}")
    return found


def _dead_units(coupling: Coupling, stats: ExcitationStats) -> dict[str, int]:
    """How many units of each group are zero wherever they are read, on every image."""
    energy: dict[str, np.ndarray] = {}
    for reader, places in readings(coupling):
        for group, here in places:
            read = per_unit(group, reader.unit[here], stats.mean_square(reader).numpy()[here])
            energy[group.name] = energy.get(group.name, 0) + read
    return {name: int((e == 0).sum()) for name, e in energy.items() if (e == 0).any()}
