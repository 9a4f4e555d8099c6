"""Second moments -> the order in which channels go, and weights that make up for them.

Optimal Brain Surgeon (Hassibi & Stork 1993) on whole channels of the recalibrated features: what remains of a
channel once the others have been fitted to stand in for it is what its removal costs, and the same fit gives
the readers' new weights (as in Frantar & Alistarh 2022, OBC, for single weights). No labels are needed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sepress import console
from sepress.calibrate import ExcitationStats, judged_positions, reader_key
from sepress.coupling import Coupling
from sepress.errors import SepressError
from sepress.moments import Form, Moments, arrange, as_read, form_of, put
from sepress.types import Reader, Removed

RIDGE = 1e-3  # of each variable's own variance: what is less than that is not told from noise
LEAST_RIDGE = 1e-6  # float32's rounding in a covariance
MOST_RIDGE = 1.0
# A refit's ridge, times variables a row. With 32 and 64 images 1e-2 and more did best, with 128 and 512
# nothing from 1e-6 to 1e-3 made a difference (two small SE nets on CIFAR-10, 2,048 images of validation).
SHRINKAGE = 1e-2
# Of a change of means, where no bias makes up for it: 1 cost half a point once norms were estimated again; 0
# gained nothing then, and before it cost 3 to 20 points (the same nets at 0.5x and 0.3x MACs).
MEAN_WEIGHT = 1e-2
REFINEMENTS = 4  # bring what a ridge of 1e-3 holds back of an exact stand-in to 1e-12
_FLOOR = 1e-9  # of the mean variance, for variables that never vary


class Consumer:
    """One block of a layer that reads a group, while channels go: what is left to lose, and of what.

    `weight` (O, D) in units of the loss, `inverse` (D, D) of the regularised covariance of what is read,
    `variables` (U, M) the columns of each unit, -1 where it has fewer. The inverse of what is left is never
    written out: `inverse` less the steps taken, of which a step looks at its own lines alone.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, variables: Tensor) -> None:
        self._weight = weight.T.clone(
            memory_format=torch.contiguous_format
        )  # (D, O): a unit's lines together
        self._inverse, self._variables = inverse, variables
        self._steps = inverse.new_empty(int((variables >= 0).sum()), len(inverse))
        self._taken = 0
        present = (variables >= 0).to(inverse.dtype)
        self._absent = (1 - present)[:, :, None]
        index = variables.clamp(min=0)
        both = present[:, :, None] * present[:, None, :]
        # Of the inverse of what is left, the block of each unit; an absent variable is one by itself.
        self._blocks = inverse[index[:, :, None], index[:, None, :]] * both + torch.diag_embed(1 - present)

    def costs(self, units: Tensor) -> Tensor:
        """What the removal of each of these units would add to the loss: tr(W_q^T W_q [H_qq]^-1)."""
        lines = self._lines(self._weight, units)  # (U, M, O)
        roots = torch.linalg.cholesky(self._blocks[units])
        spread = torch.cholesky_solve(lines @ lines.mT, roots)
        return spread.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Let the other variables stand in for a unit's as well as they can."""
        gone = self._variables[unit]
        gone = gone[gone >= 0]
        if not len(gone):
            return
        past = self._steps[: self._taken]
        lines = self._inverse[gone] - past[:, gone].T @ past  # (M, D) of the inverse of what is left
        root = torch.linalg.cholesky(lines[:, gone])
        step = torch.linalg.solve_triangular(root, lines, upper=False)
        spread = torch.linalg.solve_triangular(root, self._weight[gone], upper=False)  # (M, O)
        self._weight.addmm_(step.T, spread, alpha=-1)
        columns = self._lines(step.T, torch.arange(len(self._variables)))  # (U, M, M of the unit that goes)
        self._blocks -= columns @ columns.mT
        self._blocks[unit] = torch.eye(self._variables.shape[1], dtype=root.dtype)
        self._steps[self._taken : self._taken + len(gone)] = step
        self._taken += len(gone)

    def _lines(self, table: Tensor, units: Tensor) -> Tensor:
        """The lines of the units' variables, (U, M, ...), 0 for absent ones."""
        lines = table[self._variables[units].clamp(min=0)]
        return lines.masked_fill_(self._absent[units] > 0, 0)


def removal_order(consumers: Sequence[Consumer], units: int) -> tuple[list[int], list[float]]:
    """All units, in the order in which they go, and what each step adds to the loss; consumers are used up.

    At every step the unit whose removal costs least, after the best refit of all that is left, goes. 512
    channels before a 3x3 convolution of 512 take about 25 s on one core, 256 before one of 256 take 3.
    """
    order: list[int] = []
    costs: list[float] = []
    left = torch.arange(units)
    while len(left):
        cost = torch.stack([consumer.costs(left) for consumer in consumers]).sum(0)
        unit = int(left[cost.argmin()])
        order.append(unit)
        costs.append(float(cost.min()))
        left = left[left != unit]
        for consumer in consumers:
            consumer.remove(unit)
    return order, costs


def regularised(covariance: Tensor, ridge: float = RIDGE) -> Tensor:
    """A covariance (D, D) with its diagonal raised by a share of itself, and a last little of its mean."""
    variance = covariance.diagonal()
    return covariance + torch.diag(variance * ridge + (variance.mean() * _FLOOR or 1.0))


def factorise(covariance: Tensor, ridge: float = RIDGE) -> tuple[Tensor, float]:
    """The Cholesky factor of the regularised covariance, and a lower bound of its condition.

    The bound is for variables scaled to one variance, on which the factor's accuracy depends: with the ridge
    the condition is at most D / ridge, which float64 bears. Where rounding has made a covariance indefinite
    all the same, the ridge grows tenfold until it is not.
    """
    while True:
        matrix = regularised(covariance, ridge)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            # What of a variable's variance those before it leave unexplained; the inverse of the least share.
            return factor, float((matrix.diagonal() / factor.diagonal().square()).max())
        if not ridge < MOST_RIDGE:
            raise SepressError(
                "what a layer reads has a covariance that is far from definite",
                remedy="Calibrate again, on images that the net was made for.",
            )
        ridge = min(10 * ridge, MOST_RIDGE)


def refit(
    weight: Tensor, covariance: Tensor, kept: Tensor, ridge: float = LEAST_RIDGE
) -> tuple[Tensor, float]:
    """The weight (O, D), 0 outside `kept` (D,) bool, whose output is nearest to what it was; the condition.

    Of all weights on the kept variables the one that minimises E|(W - W') x|^2. The ridge holds back what is
    not told from noise; the rest of the step, refined (iterated Tikhonov regularisation), comes to the exact
    fit, so that what others can replace is replaced to rounding.
    """
    if not kept.any():
        return torch.zeros_like(weight), 1.0
    inside = covariance[kept][:, kept]
    factor, condition = factorise(inside, ridge)
    target = covariance[kept][:, ~kept] @ weight[:, ~kept].T  # (K, O)
    stand_in = torch.zeros_like(target)
    for _ in range(REFINEMENTS):
        stand_in += torch.cholesky_solve(target - inside @ stand_in, factor)
    new = torch.zeros_like(weight)
    new[:, kept] = weight[:, kept] + stand_in.T
    return new, condition


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
    for number, group in enumerate(console.track(coupling.groups, "ordering channels")):
        consumers: list[Consumer] = []
        readers = 0
        for reader in coupling.readers:
            at = judged.get(reader_key(reader))
            if at is None or not (at == number).any():
                continue
            moments = stats.moments(reader)
            if moments is None:
                continue
            readers += 1
            bank = as_read(parameters[reader.parameter], reader)
            weight = _felt(bank, reader, stats.sensitivity(reader) if felt else None)
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
        missed = w * scale * (c.diagonal() > 0)  # what never varies is not missed at all
        consumers.append(Consumer(missed, torch.cholesky_inverse(factorise(c)[0]), variables))
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
@dataclass(frozen=True)
class Refits:
    """What compensation did: the weights it refitted, those it left with the reason, the worst condition."""

    refitted: tuple[str, ...]
    left: Mapping[str, str]
    condition: float  # a lower bound, over all refitted; see `factorise`

    def notes(self) -> tuple[str, ...]:
        """The same in words, one sentence or two."""
        if not self.refitted and not self.left:
            return ()
        if self.refitted:
            layers = (
                "1 layer that reads" if len(self.refitted) == 1 else f"{len(self.refitted)} layers that read"
            )
            said = [f"Compensation refitted {layers} what goes; condition at least {self.condition:.0f}."]
        else:
            said = ["Compensation refitted no layer that reads what goes."]
        reasons: dict[str, list[str]] = defaultdict(list)
        for parameter, why in self.left.items():
            reasons[why].append(parameter)
        said += [f"Left as they are, as {why}: {', '.join(names)}." for why, names in reasons.items()]
        return tuple(said)


def compensate(net: nn.Module, coupling: Coupling, stats: ExcitationStats, removed: Removed) -> Refits:
    """Refit, in place, every layer that reads a removed unit; return which, and what was left and why.

    The squeeze of an SE block is one of them, and the one that no batch norm could repair. Where a layer
    has a bias, the mean of what goes is added to it; elsewhere the refit keeps the mean where it is cheap.
    """
    modules = dict(net.named_modules())
    refitted: list[str] = []
    left: dict[str, str] = {}
    worst = 1.0
    for parameter, readers in console.track(readers_by_parameter(coupling).items(), "refitting"):
        gone = _gone(coupling, readers[0], removed)
        if not any(_gone(coupling, reader, removed).any() for reader in readers):
            continue
        parts = [stats.moments(reader) for reader in readers]
        known = [part for part in parts if part is not None]
        owner, _, name = parameter.rpartition(".")
        weight = getattr(modules[owner], name)
        if any(reader.mixed for reader in readers):
            left[parameter] = "they are mixed anew for each image"
        elif len({reader.dim for reader in readers}) > 1:
            left[parameter] = "they are read along both axes"
        elif len(known) < len(parts):
            left[parameter] = "what they read was not measured"
        elif not all(part.plain for part in known):
            left[parameter] = "what they multiply with is computed from the parameter"
        else:
            form = form_of(weight, readers[0])
            old = arrange(weight.detach().cpu().double(), readers[0], form)  # (B, O, D)
            keep = torch.as_tensor(~gone).reshape(form.blocks, -1).repeat_interleave(form.taps, 1)
            moments = together(known)
            # A covariance is known the worse the fewer rows there are for its variables.
            metric = moments.covariance
            added = biases(modules, parameter, readers)
            if not added:
                metric = metric + MEAN_WEIGHT * moments.mean[:, :, None] * moments.mean[:, None, :]
            ridge = max(LEAST_RIDGE, SHRINKAGE * form.variables / moments.rows)
            try:
                fits = [refit(w, c, k, ridge) for w, c, k in zip(old, metric, keep, strict=True)]
            except SepressError:
                left[parameter] = "what they read has no covariance that can be solved"
                continue
            new = torch.stack([fit for fit, _ in fits])
            put(weight, readers[0], form, new)
            worst = max(worst, *(condition for _, condition in fits))
            fallen = old - new
            # Of the taps of a transposed kernel, a place gets one in every stride's worth.
            share = math.prod(getattr(modules[owner], "stride", ())) if readers[0].transposed else 1
            for bias, calls in added.items():
                mean = together([known[call] for call in calls]).mean
                lost = (fallen @ mean[:, :, None]).reshape(len(bias), -1).sum(1) / share
                with torch.no_grad():
                    bias += lost.to(bias.dtype).to(bias.device)
            refitted.append(parameter)
    return Refits(tuple(refitted), left, worst)


def biases(
    modules: Mapping[str, nn.Module], parameter: str, readers: Sequence[Reader]
) -> dict[Tensor, list[int]]:
    """The biases that are added to what one weight gives, each with the ordinals of its calls."""
    owner, _, name = parameter.rpartition(".")
    found: dict[Tensor, list[int]] = defaultdict(list)
    for number, reader in enumerate(readers):
        caller, own = modules[reader.site.module], modules[owner]
        tied = getattr(caller, name, None) is getattr(own, name)  # or the weight is used from elsewhere
        bias = getattr(caller if tied else own, "bias", None)
        if name == "weight" and isinstance(bias, Tensor) and bias.dim() == 1:  # more: a bank of them
            found[bias].append(number)
    return found


def readers_by_parameter(coupling: Coupling) -> dict[str, list[Reader]]:
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


def together(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows of all parts, as of one layer's several calls."""
    rows = sum(part.rows for part in parts)
    mean = torch.stack([part.rows / rows * part.mean for part in parts]).sum(0)
    covariance = torch.zeros_like(parts[0].covariance)
    for part in parts:
        off = part.mean - mean
        covariance += part.rows / rows * (part.covariance + off[:, :, None] * off[:, None, :])
    return Moments(rows, mean, covariance, all(part.plain for part in parts))
