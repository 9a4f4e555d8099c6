"""How much of what its readers compute a recalibrated channel varies."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from sepress.criteria.judging import Facts, Judgement, count, judged_by_l2, per_unit, readings
from sepress.errors import SepressError
from sepress.moments import as_read
from sepress.types import Reader


def contribution(facts: Facts) -> dict[str, Judgement]:
    """std(x_c) * ||w_c||: how much of what its readers compute a unit varies, x after gate, norm and add.

    At every conv or linear layer that reads the group, Var[x_c] ||w_c||^2 of each position is divided by the
    layer's total: the share of the output's variance, were the inputs uncorrelated. The mean of x_c is left
    out, since the batch norm that follows takes it away once it is recalibrated: a channel that is constant,
    however large, carries nothing. The norm takes away the layer's absolute scale as well, so only shares
    can be added over readers. A unit's score is the root of the sum of its shares, over its positions and
    all readers.
    """
    prunable = facts.coupling.prunable()
    totals = {group.name: np.zeros(group.units) for group in prunable}
    readers = dict.fromkeys(totals, 0)
    weights = dict(facts.net.named_parameters(remove_duplicate=False))
    for reader, places in readings(facts.coupling):
        power = weight_energy(weights[reader.parameter], reader) * facts.measured.variance(reader).numpy()
        share = power / (power.sum() or 1)
        for group, here in places:
            totals[group.name] += per_unit(group, reader.unit[here], share[here])
            readers[group.name] += 1
    return {
        group.name: Judgement(
            np.sqrt(totals[group.name]), count("contribution at {}", readers[group.name], "reader")
        )
        if readers[group.name]
        else judged_by_l2(facts, group, because="nothing reads it")
        for group in prunable
    }


def weight_energy(weight: Tensor, reader: Reader) -> np.ndarray:
    """The summed squares of the weights that multiply each position of what a layer reads, (P,)."""
    w = as_read(weight, reader).detach().cpu().double().square()
    if reader.groups > 1 and not reader.transposed:
        # (O, I/g, ...): block b of the outputs reads block b of the inputs
        blocks = w.reshape(reader.groups, w.shape[0] // reader.groups, w.shape[1], -1)
        energy = blocks.sum((1, 3)).flatten()
    else:
        energy = w.movedim(reader.dim, 0).flatten(1).sum(1)
    if len(energy) != len(reader.unit):
        raise SepressError(f"'{reader.parameter}' reads {len(reader.unit)} positions and has {len(energy)}")
    return energy.numpy()
