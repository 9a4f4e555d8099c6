"""What the weights of a group's layers say, by torch-pruning's own criteria (see `baselines`); and chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import nn

from sepress import baselines
from sepress.criteria.judging import Facts, Judgement, judged_by_l2, without
from sepress.types import CouplingGroup

Baseline = Callable[[nn.Module, CouplingGroup], baselines.BaselineScores]


def random(facts: Facts) -> dict[str, Judgement]:
    """Uniform random scores, by the seed: what any criterion has to beat."""
    generator = np.random.default_rng(facts.seed)
    return {
        group.name: Judgement(generator.random(group.units), "random") for group in facts.coupling.prunable()
    }


def l1(facts: Facts) -> dict[str, Judgement]:
    """The absolute weights of all layers of the group (GroupMagnitudeImportance)."""
    return _judged(facts, baselines.group_l1, "L1 of weights")


def l2(facts: Facts) -> dict[str, Judgement]:
    """The squared weights of all layers of the group (GroupMagnitudeImportance)."""
    return {group.name: judged_by_l2(facts, group) for group in facts.coupling.prunable()}


def lamp(facts: Facts) -> dict[str, Judgement]:
    """The L2 over the sum of all that are no smaller (LAMPImportance); orders a group as L2 does."""
    return _judged(facts, baselines.group_lamp, "LAMP of weights")


def bn_scale(facts: Facts) -> dict[str, Judgement]:
    """The scales of the group's batch norms (BNScaleImportance)."""
    return _judged(facts, baselines.group_bn_scale, "scale of batch norm", because="no batch norm covers it")


def fpgm(facts: Facts) -> dict[str, Judgement]:
    """How far a channel's weights lie from the others' (FPGMImportance)."""
    return _judged(facts, baselines.group_fpgm, "FPGM of weights")


def group_taylor(facts: Facts) -> dict[str, Judgement]:
    """|w dL/dw| over all layers of the group (GroupTaylorImportance)."""
    baseline = partial(baselines.group_taylor, gradients=facts.measured.gradients())
    return _judged(facts, baseline, "Taylor of weights")


def hessian(facts: Facts) -> dict[str, Judgement]:
    """w^2 E[(dL/dw)^2] over all layers of the group (GroupHessianImportance)."""
    baseline = partial(baselines.group_hessian, squares=facts.measured.squared_gradients())
    return _judged(facts, baseline, "Hessian of weights")


def _judged(
    facts: Facts, baseline: Baseline, said: str, *, because: str = "torch-pruning knows none of its layers"
) -> dict[str, Judgement]:
    judged = {}
    for group in facts.coupling.prunable():
        result = baseline(facts.net, group)
        if result.scores is None:
            judged[group.name] = judged_by_l2(facts, group, because=because)
        else:
            judged[group.name] = Judgement(result.scores, said + without(result.left_out))
    return judged
