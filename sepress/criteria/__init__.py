"""Statistics and weights -> a score per channel: which channels a net can do without.

The excitation of Squeeze-and-Excitation (Hu et al. 2018, sec. 6.4) gives `mean-excitation`; what the readers
of the recalibrated channel lose without it, `reconstruction`, is the default. Every group is judged, and says
by what.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from sepress.calibrate import ExcitationStats
from sepress.coupling import Coupling
from sepress.criteria.contribution import contribution
from sepress.criteria.doubts import doubts
from sepress.criteria.excitation import class_excitation, excitation_spread, group_means, mean_excitation
from sepress.criteria.gradients import fisher, gate_taylor
from sepress.criteria.judging import Criterion, Facts
from sepress.criteria.reconstruction import fisher_reconstruction, reconstruction
from sepress.criteria.weights import bn_scale, fpgm, group_taylor, hessian, l1, l2, lamp, random
from sepress.defaults import AUTO, CRITERION
from sepress.errors import InputError
from sepress.types import Ranking

__all__ = ["CRITERIA", "Criterion", "criterion_for", "get_criterion", "rank"]

# fmt: off
CRITERIA: dict[str, Criterion] = {c.name: c for c in (
    Criterion("fisher-reconstruction", frozenset({"moments", "sensitivity"}),
              fisher_reconstruction,
              "what the loss feels of what its readers lose once the others stand in; needs labels",
              predicts=True),
    Criterion("reconstruction", frozenset({"moments"}), reconstruction,
              "what the layers that read a channel lose once the others stand in for it", predicts=True),
    Criterion("contribution", frozenset({"contribution"}), contribution,
              "spread of the recalibrated channel times the weights that read it"),
    Criterion("fisher", frozenset({"fisher"}), fisher,
              "squared gradient of a gate on the channel; needs labels", predicts=True),
    Criterion("gate-taylor", frozenset({"gate-taylor"}), gate_taylor,
              "absolute gradient of a gate on the channel; needs labels", predicts=True),
    Criterion("mean-excitation", frozenset({"excitation"}), mean_excitation,
              "mean of the SE gate over images"),
    Criterion("class-excitation", frozenset({"class-excitation"}), class_excitation,
              "mean of the SE gate over the class that excites it most; needs labels"),
    Criterion("excitation-spread", frozenset({"excitation"}), excitation_spread,
              "standard deviation of the SE gate over images"),
    Criterion("l1", frozenset(), l1, "absolute weights of the group's layers (torch-pruning)"),
    Criterion("l2", frozenset(), l2, "squared weights of the group's layers (torch-pruning)"),
    Criterion("lamp", frozenset(), lamp, "squared weights over all that are no smaller (torch-pruning)"),
    Criterion("bn-scale", frozenset(), bn_scale, "scale of the group's batch norms (torch-pruning)"),
    Criterion("fpgm", frozenset(), fpgm, "distance of the weights to the other channels' (torch-pruning)"),
    Criterion("group-taylor", frozenset({"taylor"}), group_taylor,
              "|w dL/dw| (torch-pruning); needs labels"),
    Criterion("hessian", frozenset({"hessian"}), hessian,
              "w^2 E[(dL/dw)^2] (torch-pruning); needs labels, and a backward an image"),
    Criterion("random", frozenset(), random, "random, by the seed: the floor"),
)}
# fmt: on


def get_criterion(name: str) -> Criterion:
    """Return the criterion of that name, or raise an InputError that lists all; auto is one of them."""
    known = AUTO if name == "auto" else name
    if known not in CRITERIA:
        names = ", ".join(("auto", *CRITERIA))
        raise InputError(f"unknown criterion '{name}'", remedy=f"Choose one of: {names}.")
    return CRITERIA[known]


def criterion_for(coupling: Coupling, name: str) -> Criterion:
    """Return the criterion of that name; raises InputError where it looks at gates and the net has none."""
    chosen = get_criterion(name)
    if chosen.judges_gates and not coupling.gates:
        others = ", ".join(other for other, known in CRITERIA.items() if not known.judges_gates)
        raise InputError(
            f"criterion '{chosen.name}' judges channels by their gates, and this net has none",
            remedy=f"Choose auto, or one of: {others}.",
        )
    return chosen


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
    judged it. Raises InputError where statistics lack what the criterion needs, where it judges by gates and
    the net has none, or where a score is not finite.
    """
    chosen = criterion_for(coupling, criterion)
    missing = chosen.needs - (stats.evidence if stats else frozenset())
    if missing:
        raise InputError(
            f"criterion '{chosen.name}' needs statistics that were not collected: "
            f"{', '.join(sorted(missing))}",
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
            mean = group_means(coupling, stats, group)
            if mean is not None:
                excitation[group.name] = tuple(mean.tolist())
    return Ranking(
        criterion=chosen.name,
        scores={name: tuple(j.scores.tolist()) for name, j in judged.items()},
        evidence={name: j.evidence for name, j in judged.items()},
        mean_excitation=excitation,
        warnings=tuple(doubts(coupling, stats)),
        costs={name: tuple(j.costs.tolist()) for name, j in judged.items() if j.costs is not None},
    )
