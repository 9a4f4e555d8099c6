"""The three ways in which a prune stage comes to its net: one cut, a search within a constraint, steps."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from typing import Any

from torch import nn

from sepress import console
from sepress.constraints import ConstraintResult, parse_constraint
from sepress.constraints import evaluate as hold
from sepress.costs import LatencyTable, predictor
from sepress.coupling import Coupling, trace
from sepress.errors import InputError
from sepress.job import Job, policy_of, train_config
from sepress.plan import plan_pruning, smallest_macs
from sepress.pruning import (
    CHECK_IMAGES,
    Surgery,
    not_measured,
    prune_channels,
    rank_channels,
    restore,
)
from sepress.recipe import FinetuneStage
from sepress.search import search_note, smallest_within
from sepress.steps import Judged, prune_in_steps
from sepress.train import train
from sepress.types import Measurement, Policy, PruningPlan


def judge(
    job: Job, net: nn.Module, coupling: Coupling, criterion: str, images: int, *, compensate: bool = False
) -> Judged:
    """Score the net's channels on calibration images; measure what compensation needs as well."""
    ranking, stats = rank_channels(
        net,
        coupling,
        job.calibration(images),
        criterion=criterion,
        compensate=compensate,
        device=job.device,
        seed=job.recipe.seed,
        data_id=job.source.fingerprint,
    )
    return Judged(net, coupling, ranking, stats)


def cut(
    job: Job,
    settings: Any,
    judged: Judged,
    how: Policy | PruningPlan,
    *,
    table: LatencyTable | None = None,
) -> Surgery:
    """Plan, cut, check, refit, and re-estimate batch norm."""
    surgery = prune_channels(
        judged.net,
        judged.coupling,
        judged.ranking,
        how,
        images=job.images(CHECK_IMAGES),
        latency=predictor(judged.coupling, table),
        moments=judged.stats if settings.compensate else None,
        allow_vacuous=settings.allow_vacuous,
    )
    restore(
        surgery,
        judged.net,
        job.calibration(max(settings.calibration_images, settings.recalibration_images)),
        compensate=settings.compensate,
        images=settings.recalibration_images,
        device=job.device,
    )
    return surgery


def cut_within(job: Job, settings: Any, judged: Judged, *, table: LatencyTable | None = None) -> Surgery:
    """Find the smallest net that holds the stage's constraint on validation, fine-tuned as the recipe says.

    Channels are ranked once; every probe is cut from the same net.
    """
    constraint = parse_constraint(settings.within)
    policy = policy_of(settings)
    tuning = next((stage for stage in job.recipe.stages if stage.kind == "finetune"), None)
    base = on_validation(job, job.bundle("base").net, "base")
    if base.top1 is None:
        raise InputError(
            f"accuracy on validation can't be measured: {base.reasons['top1']}",
            remedy="Pass labelled data; without a val split, one is cut from train.",
        )

    known = hold(constraint, [base, replace(base, label="pruned")])
    if known.actual is None:  # before a net is made and tuned for it
        raise InputError(f"{constraint} can't be told on validation: {known.reason}")

    def of_share(share: float) -> Policy:
        return replace(policy, target_macs=share)

    latency = predictor(judged.coupling, table)

    def plan(share: float) -> PruningPlan:
        return plan_pruning(judged.ranking, judged.coupling, policy=of_share(share), latency=latency)

    def attempt(share: float) -> tuple[Surgery, ConstraintResult]:
        surgery = cut(job, settings, judged, of_share(share), table=table)
        net = surgery.net
        if tuning is not None:
            net = copy.deepcopy(net)
            _tune(job, net, tuning)
        return surgery, hold(constraint, [base, on_validation(job, net, "pruned")])

    whole = judged.coupling.count_macs({})
    least = smallest_macs(judged.ranking, judged.coupling, policy=of_share(0.5)) / whole
    found = smallest_within(constraint, least=least, plan=plan, attempt=attempt)
    note = search_note(
        constraint, found, images=base.n or 0, tuned_epochs=0 if tuning is None else tuning.epochs
    )
    console.log(note)
    plan_found = found.surgery.plan
    return replace(found.surgery, plan=replace(plan_found, notes=(note, *plan_found.notes)))


def cut_in_steps(job: Job, settings: Any, judged: Judged) -> Surgery:
    """Prune in the stage's steps; between them, fine-tune for its epochs, and judge the channels anew."""
    stage = next((stage for stage in job.recipe.stages if stage.kind == "finetune"), FinetuneStage())
    example = job.images(1)

    def recover(net: nn.Module) -> Judged:
        if settings.step_epochs:
            _tune(job, net, stage, epochs=settings.step_epochs)
        with console.working("tracing"):
            coupling = trace(net, example, eca_neighbours=settings.eca_neighbours)
        return judge(
            job,
            net,
            coupling,
            settings.criterion,
            settings.calibration_images,
            compensate=settings.compensate,
        )

    return prune_in_steps(
        judged,
        policy_of(settings),
        steps=settings.steps,
        cut=lambda here, policy: cut(job, settings, here, policy),
        recover=recover,
    )


def _tune(job: Job, net: nn.Module, stage: Any, *, epochs: int | None = None) -> None:
    """Train a pruned net on in place, as the recipe's fine-tune would, taught by the base."""
    config = train_config(job.recipe, stage)
    if epochs is not None:
        config = replace(config, epochs=epochs, warmup_epochs=min(config.warmup_epochs, epochs / 2))
    teacher = job.bundle("base").net if config.distill_weight > 0 else None
    with console.quiet():
        train(net, job.source, config=config, device=job.device, teacher=teacher)


def on_validation(job: Job, net: nn.Module, label: str) -> Measurement:
    """A net's accuracy on validation, as constraints read it; what is missing carries its reason."""
    figures = dataclasses.asdict(job.accuracy(net, "val"))
    reason = figures.pop("reason")
    missing = dict.fromkeys(figures, reason or "not measured")
    return not_measured(label, missing, **figures)
