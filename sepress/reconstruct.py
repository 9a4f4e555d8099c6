"""Second moments -> the order in which channels go, and weights that make up for them.

Optimal Brain Surgeon (Hassibi & Stork 1993) on whole channels of the recalibrated features: what remains of a
channel once the others have been fitted to stand in for it is what its removal costs, and the same fit gives
the readers' new weights (as in Frantar & Alistarh 2022, OBC, for single weights). No labels are needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sepress.calibrate import ExcitationStats, judged_positions, reader_key
from sepress.coupling import Coupling
from sepress.moments import Form, Moments, arrange, form_of, put
from sepress.types import Reader, Removed

RIDGE = 1e-3  # of each variable's own variance: what is less than that is not told from noise
_FLOOR = 1e-9  # of the mean variance, for variables that never vary


@dataclass
class Consumer:
    """One block of a layer that reads a group, while channels go: what is left to lose, and of what.

    `weight` (O, D) in units of the loss, `inverse` (D, D) of the covariance of what is left, `variables` (U,
    M) the columns of each unit, -1 where it has fewer.
    """

    weight: Tensor
    inverse: Tensor
    variables: Tensor

    def costs(self) -> Tensor:
        """What the removal of each unit would add to the loss, (U,): tr(W_q^T W_q [H_qq]^-1)."""
        index = self.variables.clamp(min=0)
        absent = self.variables < 0
        blocks = self.inverse[index[:, :, None], index[:, None, :]]  # (U, M, M)
        blocks = blocks.masked_fill(absent[:, :, None] | absent[:, None, :], 0)
        # A variable that is gone, or never was, has an empty line: 1 on its diagonal, and no weight.
        empty = blocks.diagonal(dim1=1, dim2=2) == 0
        blocks = blocks + torch.diag_embed(empty.to(blocks.dtype))
        columns = self.weight[:, index].masked_fill(absent, 0)  # (O, U, M)
        gram = torch.einsum("oui,ouj->uij", columns, columns)
        spread: Tensor = torch.linalg.solve(blocks, gram)
        return spread.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0)

    def remove(self, unit: int) -> None:
        """Let the other variables stand in for a unit's as well as they can."""
        gone = self.variables[unit]
        gone = gone[gone >= 0]
        if not len(gone):
            return
        lines = self.inverse[gone]  # (M, D)
        spread = torch.linalg.solve(lines[:, gone], lines)
        self.weight -= self.weight[:, gone] @ spread
        self.inverse -= lines.T @ spread
        self.weight[:, gone] = 0
        self.inverse[gone, :] = 0
        self.inverse[:, gone] = 0


def removal_order(consumers: Sequence[Consumer], units: int) -> tuple[list[int], list[float]]:
    """All units, in the order in which they go, and what each step adds to the loss; consumers are used up.

    At every step the unit whose removal costs least, after the best refit of all that is left, goes.
    """
    order: list[int] = []
    costs: list[float] = []
    gone = torch.zeros(units, dtype=torch.bool)
    for _ in range(units):
        cost = torch.zeros(units, dtype=torch.float64)
        for consumer in consumers:
            cost += consumer.costs()
        unit = int(cost.masked_fill(gone, torch.inf).argmin())
        order.append(unit)
        costs.append(float(cost[unit]))
        gone[unit] = True
        for consumer in consumers:
            consumer.remove(unit)
    return order, costs


def regularised(covariance: Tensor, ridge: float = RIDGE) -> Tensor:
    """A covariance (D, D) with its diagonal raised by a share of itself, and a last little of its mean."""
    variance = covariance.diagonal()
    return covariance + torch.diag(variance * ridge + (variance.mean() * _FLOOR or 1.0))


def refit(weight: Tensor, covariance: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """The weight (O, D), zero outside `kept` (D,) bool, whose output is nearest to what it was.

    Of all weights on the kept variables the one that minimises E|(W - W') x|^2; the ridge holds the kept
    columns to where they were, so that a variable that nothing stands in for changes nothing.
    """
    new = torch.zeros_like(weight)
    solved = torch.linalg.solve(
        regularised(covariance, ridge)[kept][:, kept], covariance[kept][:, ~kept] @ weight[:, ~kept].T
    )
    new[:, kept] = weight[:, kept] + solved.T
    return new


# ---- the order of a net's groups ------------------------------------------------------------------
def order_groups(
    net: nn.Module, coupling: Coupling, stats: ExcitationStats, *, felt: bool = False
) -> dict[str, tuple[list[int], list[float], int]]:
    """For each prunable group that a measured layer reads: order, step costs, number of readers.

    A step's cost is the share of its output's variance that each reader loses, added over readers; the norm
    behind a reader takes its scale away, so shares and not variances are what can be added. With
    `felt`, variance is measured in what the loss feels of it, by the evidence `sensitivity` (the output half
    of the Kronecker-factored Fisher information, Martens & Grosse 2015).
    """
    judged = judged_positions(coupling)
    parameters = dict(net.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[list[int], list[float], int]] = {}
    for number, group in enumerate(coupling.groups):
        consumers: list[Consumer] = []
        readers = 0
        for reader in coupling.readers:
            at = judged.get(reader_key(reader))
            moments = stats.moments(reader)
            if at is None or moments is None or not (at == number).any():
                continue
            readers += 1
            weight = _felt(parameters[reader.parameter], reader, stats.sensitivity(reader) if felt else None)
            consumers += _consumers(weight, reader, moments, at == number, group.units)
        if consumers:
            order, costs = removal_order(consumers, group.units)
            found[group.name] = (order, costs, readers)
    return found


def _felt(weight: Tensor, reader: Reader, sensitivity: Tensor | None) -> tuple[Form, Tensor]:
    """A layer's weight (B, O, D), its outputs in the directions and units of what the loss feels."""
    form = form_of(weight, reader)
    blocks = arrange(weight.detach().cpu().double(), reader, form)
    if sensitivity is None:
        return form, blocks
    values, vectors = torch.linalg.eigh(sensitivity)
    root = vectors * values.clamp(min=0).sqrt()[:, None, :] @ vectors.mT  # (B, O, O)
    outputs = root.shape[-1]
    return form, (root @ blocks.reshape(form.blocks, outputs, -1)).reshape(blocks.shape)


def _consumers(
    felt: tuple[Form, Tensor], reader: Reader, moments: Moments, here: np.ndarray, units: int
) -> list[Consumer]:
    form, blocks = felt
    energy = sum(float(((w @ c) * w).sum()) for w, c in zip(blocks, moments.covariance, strict=True))
    scale = energy**-0.5 if energy > 0 else 0.0
    consumers = []
    for block, (w, c) in enumerate(zip(blocks, moments.covariance, strict=True)):
        places = slice(block * form.positions, (block + 1) * form.positions)
        variables = _variables(np.where(here[places], reader.unit[places], -1), form.taps, units)
        consumers.append(Consumer(w * scale, torch.linalg.inv(regularised(c)), variables))
    return consumers


def _variables(unit: np.ndarray, taps: int, units: int) -> Tensor:
    """The variables of each unit, (U, M), -1 where a unit has fewer than the one that has most."""
    places = np.flatnonzero(unit >= 0)
    owner = unit[places]
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner, minlength=units)
    slot = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((units, max(1, counts.max(initial=0))), -1)
    table[owner[order], slot] = places[order]
    variables = table[:, :, None] * taps + np.arange(taps)
    return torch.as_tensor(np.where(table[:, :, None] < 0, -1, variables).reshape(units, -1))


# ---- compensation -----------------------------------------------------------------------------------
def compensate(net: nn.Module, coupling: Coupling, stats: ExcitationStats, removed: Removed) -> int:
    """Refit, in place, every layer that reads a removed unit; return how many were refitted.

    The squeeze of an SE block is one of them, and the one that no batch norm could repair. A layer whose
    weight is computed from its parameter is left as it is. Where it has a bias, the mean of what goes is
    added to it; elsewhere the norm behind takes the mean away.
    """
    modules = dict(net.named_modules())
    refitted = 0
    for parameter, readers in _by_parameter(coupling).items():
        gone = [_gone(coupling, reader, removed) for reader in readers]
        moments = _together([stats.moments(reader) for reader in readers])
        if moments is None or not gone[0].any() or any((gone[0] != other).any() for other in gone):
            continue
        owner, _, name = parameter.rpartition(".")
        shift = _refit_layer(getattr(modules[owner], name), readers[0], moments, ~gone[0])
        bias = getattr(modules[owner], "bias", None)
        if isinstance(bias, Tensor) and not readers[0].transposed:
            with torch.no_grad():
                bias += shift.reshape(len(bias), -1).sum(1).to(bias)
        refitted += 1
    return refitted


@torch.no_grad()
def _refit_layer(weight: Tensor, reader: Reader, moments: Moments, kept: np.ndarray) -> Tensor:
    """Refit one weight in place; return by how much the mean of each output has fallen, (outputs,)."""
    form = form_of(weight, reader)
    old = arrange(weight.cpu().double(), reader, form)  # (B, O, D)
    keep = torch.as_tensor(kept).reshape(form.blocks, form.positions).repeat_interleave(form.taps, 1)
    new = torch.stack([refit(w, c, k) for w, c, k in zip(old, moments.covariance, keep, strict=True)])
    put(weight, reader, form, new)
    return ((old - new) @ moments.mean[:, :, None]).flatten()


def _by_parameter(coupling: Coupling) -> dict[str, list[Reader]]:
    """The readers of each weight: several where a layer is called more than once, or tied."""
    readers: dict[str, list[Reader]] = defaultdict(list)
    for reader in coupling.readers:
        readers[reader.parameter].append(reader)
    return readers


def _gone(coupling: Coupling, reader: Reader, removed: Removed) -> np.ndarray:
    """Which positions of the reader's axis go, (P,) bool."""
    gone = np.zeros(len(reader.unit), dtype=bool)
    for number, group in enumerate(coupling.groups):
        if group.name in removed:
            gone |= (reader.group == number) & np.isin(reader.unit, removed[group.name])
    return gone


def _together(parts: Sequence[Moments | None]) -> Moments | None:
    """The moments of all rows that one weight was multiplied with; None where some are not known."""
    known = [part for part in parts if part is not None and part.plain]
    if len(known) < len(parts) or not known:
        return None
    rows = sum(part.rows for part in known)
    mean = sum((part.rows / rows * part.mean for part in known), torch.zeros_like(known[0].mean))
    square = sum(
        (
            part.rows / rows * (part.covariance + part.mean[:, :, None] * part.mean[:, None, :])
            for part in known
        ),
        torch.zeros_like(known[0].covariance),
    )
    return Moments(rows, mean, square - mean[:, :, None] * mean[:, None, :], plain=True)
