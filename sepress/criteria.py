"""Statistics and weights -> a score per channel: which channels a net can do without.

The excitation of Squeeze-and-Excitation (Hu et al. 2018, sec. 6.4) gives `mean-excitation`; the contribution
of the recalibrated channel to what reads it is the default. Every group is judged, and says by what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from sepress import baselines
from sepress.calibrate import ExcitationStats, judged_positions, reader_key
from sepress.coupling import Coupling
from sepress.defaults import CRITERION
from sepress.errors import InputError, SepressError
from sepress.types import CouplingGroup, Gate, Ranking, Reader

UNTRAINED_WIDTH = 0.05  # gates whose means all lie this close to 0.5 have hardly learned anything
CONSTANT_DEVIATION = 1e-3  # a gate that varies less over images does not recalibrate


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
    """The scores of one group's units (U,), higher = keep, and what judged them, in words."""

    scores: np.ndarray
    evidence: str


@dataclass(frozen=True)
class Criterion:
    """A named way to score: `needs` is the evidence that calibration has to collect."""

    name: str
    needs: frozenset[str]
    score: Callable[[Facts], dict[str, Judgement]]
    summary: str


def mean_excitation(facts: Facts) -> dict[str, Judgement]:
    """The plain mean of the gate over images; over a group's gates, where it has several.

    Groups without a gate, and the hidden channels of SE blocks, are judged by L2.
    """
    judged = {}
    for group in facts.coupling.prunable():
        excitation = _group_excitation(facts, group)
        if excitation is not None:
            judged[group.name] = Judgement(excitation, _count("mean of {}", len(group.gates), "gate"))
        else:
            covered = "no gate" if not group.gates else "its gates cover a part only"
            judged[group.name] = _l2(facts, group, because=covered)
    return judged


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
    for reader, places in _readings(facts.coupling):
        power = weight_energy(weights[reader.parameter], reader) * facts.measured.variance(reader).numpy()
        share = power / (power.sum() or 1)
        for group, here in places:
            totals[group.name] += _per_unit(group, reader.unit[here], share[here])
            readers[group.name] += 1
    return {
        group.name: Judgement(
            np.sqrt(totals[group.name]), _count("contribution at {}", readers[group.name], "reader")
        )
        if readers[group.name]
        else _l2(facts, group, because="nothing reads it")
        for group in prunable
    }


def fisher(facts: Facts) -> dict[str, Judgement]:
    """E[(dL/du)^2], u = 1 a factor on a unit wherever it is read: the Fisher information of switching it off.

    Per image, the gradients of all tied positions and readers are summed before squaring. Where the gate is
    what its one reader reads, s x, this is E[(s dL/ds)^2], the SE gate taken as the mask it is.
    """
    readers = Counter(group.name for _, places in _readings(facts.coupling) for group, _ in places)
    return {
        group.name: Judgement(
            facts.measured.fisher(group.name, group.units).numpy(),
            _count("Fisher at {}", readers[group.name], "reader"),
        )
        if readers[group.name]
        else _l2(facts, group, because="nothing reads it")
        for group in facts.coupling.prunable()
    }


def random(facts: Facts) -> dict[str, Judgement]:
    """Uniform random scores, by the seed: what any criterion has to beat."""
    generator = np.random.default_rng(facts.seed)
    return {
        group.name: Judgement(generator.random(group.units), "random") for group in facts.coupling.prunable()
    }


def l2(facts: Facts) -> dict[str, Judgement]:
    """The squared weights of all layers of the group (torch-pruning's GroupMagnitudeImportance)."""
    return {group.name: _l2(facts, group) for group in facts.coupling.prunable()}


def group_taylor(facts: Facts) -> dict[str, Judgement]:
    """|w dL/dw| over all layers of the group (torch-pruning's GroupTaylorImportance)."""
    gradients = facts.measured.gradients()
    judged = {}
    for group in facts.coupling.prunable():
        result = baselines.group_taylor(facts.net, group, gradients=gradients)
        if result.scores is None:
            judged[group.name] = _l2(facts, group, because="torch-pruning knows none of its layers")
        else:
            judged[group.name] = Judgement(result.scores, "Taylor of weights" + _without(result.left_out))
    return judged


CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        Criterion(
            "mean-excitation", frozenset({"excitation"}), mean_excitation, "mean of the SE gate over images"
        ),
        Criterion(
            "contribution",
            frozenset({"contribution"}),
            contribution,
            "spread of the recalibrated channel times the weights that read it",
        ),
        Criterion(
            "fisher", frozenset({"fisher"}), fisher, "squared gradient of a gate on the channel; needs labels"
        ),
        Criterion("random", frozenset(), random, "random, by the seed: the floor"),
        Criterion("l2", frozenset(), l2, "squared weights of the group's layers (torch-pruning)"),
        Criterion(
            "group-taylor", frozenset({"taylor"}), group_taylor, "|w dL/dw| (torch-pruning); needs labels"
        ),
    )
}


def get_criterion(name: str) -> Criterion:
    """Return the criterion of that name, or raise an InputError that lists the known ones."""
    if name not in CRITERIA:
        raise InputError(f"unknown criterion '{name}'", remedy=f"Choose one of: {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def rank(
    coupling: Coupling,
    stats: ExcitationStats | None,
    *,
    criterion: str = CRITERION,
    net: nn.Module,
    seed: int = 0,
) -> Ranking:
    """Score every prunable group; the weights are read from `net`, and nothing is run.

    With excitation among the statistics, the mean excitation of every gated group comes along, whatever
    judged it. Raises InputError where statistics lack what the criterion needs, or a score is not finite.
    """
    chosen = get_criterion(criterion)
    missing = chosen.needs - (stats.evidence if stats else frozenset())
    if missing:
        raise InputError(
            f"criterion '{criterion}' needs statistics that were not collected: {', '.join(sorted(missing))}",
            remedy="Calibrate for this criterion.",
        )
    facts = Facts(coupling, net, seed, stats)
    judged = chosen.score(facts)
    for name, judgement in judged.items():
        if not np.isfinite(judgement.scores).all():
            raise InputError(
                f"the scores of '{name}' ({judgement.evidence}) are not finite",
                remedy="Check the model's weights for NaN and infinity.",
            )
    excitation: dict[str, tuple[float, ...]] = {}
    if stats and "excitation" in stats.evidence:
        for group in coupling.groups:
            mean = _group_excitation(facts, group)
            if mean is not None:
                excitation[group.name] = tuple(mean.tolist())
    return Ranking(
        criterion=criterion,
        scores={name: tuple(j.scores.tolist()) for name, j in judged.items()},
        evidence={name: j.evidence for name, j in judged.items()},
        mean_excitation=excitation,
        warnings=tuple(_warnings(facts)),
    )


def weight_energy(weight: Tensor, reader: Reader) -> np.ndarray:
    """The summed squares of the weights that multiply each position of what a layer reads, (P,)."""
    w = weight.detach().cpu().double().square()
    if reader.groups > 1 and not reader.transposed:
        # (O, I/g, ...): block b of the outputs reads block b of the inputs
        blocks = w.reshape(reader.groups, w.shape[0] // reader.groups, w.shape[1], -1)
        energy = blocks.sum((1, 3)).flatten()
    else:
        energy = w.movedim(reader.dim, 0).flatten(1).sum(1)
    if len(energy) != len(reader.unit):
        raise SepressError(f"'{reader.parameter}' reads {len(reader.unit)} positions and has {len(energy)}")
    return energy.numpy()


def _group_excitation(facts: Facts, group: CouplingGroup) -> np.ndarray | None:
    """The mean excitation of each unit (U,) over its slots and gates; None unless gates cover every unit."""
    total, count = np.zeros(group.units), np.zeros(group.units)
    for gate in facts.coupling.gates:
        if gate.name not in group.gates:
            continue
        covered = gate.units >= 0
        units = gate.units[covered]
        mean = facts.measured.mean_excitation(gate).numpy()[covered]
        slots = np.bincount(units, minlength=group.units)
        total += _per_unit(group, units, mean) / np.maximum(slots, 1)
        count += slots > 0
    return total / count if count.all() else None


def _l2(facts: Facts, group: CouplingGroup, *, because: str | None = None) -> Judgement:
    """torch-pruning's group L2, or the plain mean over members where it knows no layer of the group."""
    result = baselines.group_l2(facts.net, group)
    scores = _plain_l2(facts.net, group) if result.scores is None else result.scores
    note = f" ({because})" if because else ""
    return Judgement(scores, "L2 of weights" + _without(result.left_out) + note)


def _plain_l2(net: nn.Module, group: CouplingGroup) -> np.ndarray:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    total = np.zeros(group.units)
    for member in group.members:
        if member.parameter in parameters:
            w = parameters[member.parameter].detach().cpu().double().square()
            energy = w.movedim(member.dim, 0).flatten(1).sum(1).numpy()
            total += _per_unit(group, member.unit, energy[member.index])
    return total / total.mean() if total.mean() > 0 else total


def _warnings(facts: Facts) -> list[str]:
    """What makes a ranking doubtful: no gates, gates that look untrained, channels that are always zero."""
    found = [] if facts.coupling.gates else ["no SE gate was found: channels are judged without excitation"]
    stats = facts.stats
    if stats is None:
        return found
    if "excitation" in stats.evidence:
        found += _gate_warnings(facts.coupling.gates, stats)
    if "contribution" in stats.evidence:
        dead = _dead_units(facts.coupling, stats)
        if dead:
            names = _some([f"{n} of {name}" for name, n in dead.items()])
            found.append(f"{sum(dead.values())} channels are zero on every calibration image: {names}")
    return found


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
            f"{UNTRAINED_WIDTH} of 0.5: {_some(middle)}"
        )
    if flat:
        found.append(f"{len(flat)} of {len(gates)} gates do not vary over images: {_some(flat)}")
    return found


def _dead_units(coupling: Coupling, stats: ExcitationStats) -> dict[str, int]:
    """How many units of each group are zero wherever they are read, on every image."""
    energy: dict[str, np.ndarray] = {}
    for reader, places in _readings(coupling):
        for group, here in places:
            read = _per_unit(group, reader.unit[here], stats.mean_square(reader).numpy()[here])
            energy[group.name] = energy.get(group.name, 0) + read
    return {name: int((e == 0).sum()) for name, e in energy.items() if (e == 0).any()}


def _readings(coupling: Coupling) -> Iterator[tuple[Reader, list[tuple[CouplingGroup, np.ndarray]]]]:
    """Every reader that judges, with the groups that it judges and where they lie on its axis, (P,) bool."""
    judged = judged_positions(coupling)
    for reader in coupling.readers:
        at = judged.get(reader_key(reader))
        if at is not None:
            yield reader, [(coupling.groups[i], at == i) for i in np.unique(at[at >= 0])]


def _per_unit(group: CouplingGroup, unit: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(unit, weights=values, minlength=group.units)


def _count(template: str, n: int, noun: str) -> str:
    return template.format(f"{n} {noun}" + ("" if n == 1 else "s"))


def _without(left_out: tuple[str, ...]) -> str:
    return f", without {_some(list(left_out))}" if left_out else ""


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
