"""A net and calibration inputs -> a ranking, a plan, and the pruned net that passed its checks.

The one place where evidence, plan, surgery and verification meet; the Python API, the stages of a recipe
and the comparison of criteria all call these functions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepress import console
from sepress.calibrate import ExcitationStats, calibrate, split_batch
from sepress.costs import LatencyTable, as_table, predictor
from sepress.coupling import Coupling, apply_removal, check_removal, trace
from sepress.criteria import criterion_for, get_criterion, rank
from sepress.defaults import CRITERION, RECALIBRATION_IMAGES, REFIT_PASSES
from sepress.device import home_of, resolve_device, seeded
from sepress.errors import CheckError, InputError
from sepress.measure import Inputs, count_macs, count_params, environment
from sepress.modes import take_modes
from sepress.plan import Count, check_plan, check_policy, plan_pruning
from sepress.profile import table_for
from sepress.reconstruct import compensate as refit_readers
from sepress.recover import recover
from sepress.train import recalibrate_batchnorm
from sepress.types import (
    Check,
    GroupRow,
    Measurement,
    Policy,
    PruningPlan,
    Ranking,
    Report,
    Scope,
)

CHECK_IMAGES = 8  # enough for a spread over images; the check runs them one by one
JOINED_BATCH = 32  # what batches of single images are joined to for batch-norm statistics
MAX_REPLANS = 8  # each freezes what a failed check named; nets met so far need none

Batch = Any  # a tensor of inputs, several of them, or (inputs, targets): see calibrate.split_batch


@dataclass(frozen=True)
class Surgery:
    """A pruned net that equals the masked one, and what was done to get it."""

    net: nn.Module
    plan: PruningPlan
    coupling: Coupling  # of the net before; with what a failed check froze
    check: Check


@dataclass(frozen=True)
class PruneResult:
    """What `sepress.prune` returns: the pruned net, and why it looks as it does."""

    net: nn.Module
    plan: PruningPlan
    ranking: Ranking
    report: Report


def first_inputs(batches: Iterable[Batch], count: int) -> tuple[Tensor, ...]:
    """Return the first `count` inputs of the batches, a tensor (n, ...) for each argument that the net takes.

    n <= count; InputError on none.
    """
    taken: list[tuple[Tensor, ...]] = []
    missing = count
    for batch in batches:
        arguments = tuple(x[:missing] for x in arguments_of(batch))
        taken.append(arguments)
        missing -= len(arguments[0])
        if missing <= 0:
            break
    if not taken or not len(taken[0][0]):
        raise InputError(
            "the calibration set holds no image", remedy="Pass at least one batch; 256 to 1,024 are usual."
        )
    return tuple(torch.cat(parts) for parts in zip(*taken, strict=True))


def first_images(batches: Iterable[Batch], count: int) -> Tensor:
    """As `first_inputs`, where only nets of one input will do: (n, ...); InputError for several."""
    arguments = first_inputs(batches, count)
    if len(arguments) > 1:
        raise InputError(
            f"the calibration set holds {len(arguments)} inputs for each image; only one can be used here",
            remedy="Nets of several inputs can be traced, pruned (sepress.prune) and exported.",
        )
    return arguments[0]


def arguments_of(batch: Batch) -> tuple[Tensor, ...]:
    """Return what a batch calls the net with, tensors (N, ...); see calibrate.split_batch."""
    inputs, _ = split_batch(batch)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    for x in arguments:
        if not isinstance(x, Tensor):
            raise InputError(
                f"a calibration batch is a {type(x).__name__}, not a tensor",
                remedy="Pass a tensor (N, C, H, W), or an iterable of tensors or (inputs, targets) pairs.",
            )
    return arguments


def rank_channels(
    net: nn.Module,
    coupling: Coupling,
    batches: Iterable[Batch],
    *,
    criterion: str,
    compensate: bool,
    device: torch.device,
    seed: int = 0,
    data_id: str = "",
) -> tuple[Ranking, ExcitationStats]:
    """Measure what the criterion and compensation need, gates and dead channels always; score all groups."""
    evidence = (
        criterion_for(coupling, criterion).needs
        | {"excitation", "contribution"}
        | ({"moments"} if compensate else frozenset())
    )
    stats = calibrate(net, coupling, batches, evidence=evidence, device=device, data_id=data_id)
    return rank(coupling, stats, criterion=criterion, net=net, seed=seed), stats


def prune_channels(
    net: nn.Module,
    coupling: Coupling,
    ranking: Ranking,
    how: Policy | PruningPlan,
    *,
    images: Inputs,
    latency: Count | None = None,
    moments: ExcitationStats | None = None,
    allow_vacuous: bool = False,
) -> Surgery:
    """Plan, cut and verify on a copy of the net; what a failed check names is frozen and planned around.

    `images` (n, ...) are real inputs, on the net's device. `latency` predicts the time of a removal; without
    it the coarse table does. With `moments`, statistics that hold that evidence, the layers that read what
    goes are refitted before the cut, and the check is of the refitted net. A plan in place of a policy is
    applied as it stands, or not at all. Raises CheckError where masked = removed does not hold, or can't be
    told.
    """
    if isinstance(how, PruningPlan):
        check_plan(how, coupling)
    time = latency or predictor(coupling)
    plan = how if isinstance(how, PruningPlan) else plan_pruning(ranking, coupling, policy=how, latency=time)
    for _ in range(MAX_REPLANS):
        whole = net if moments is None else copy.deepcopy(net)
        refits = None if moments is None else refit_readers(whole, coupling, moments, plan.removed)
        pruned = copy.deepcopy(whole)
        apply_removal(pruned, coupling, plan.removed)
        with console.working("checking that masked = removed"):
            check, culprits = check_removal(whole, pruned, coupling, plan.removed, images)
        if check.passed is not False:
            break
        failed = CheckError(
            f"masked = removed does not hold: relative error {check.relative_error} ({check.reason})",
            remedy="No model was written. Freeze the groups named (--freeze PATTERN) and please report it.",
        )
        if not culprits or isinstance(how, PruningPlan):
            raise failed
        for name, why in culprits.items():
            console.log(f"freezing {name}: {why}")
        coupling = coupling.with_frozen(culprits)
        try:
            plan = plan_pruning(ranking, coupling, policy=how, latency=time)
        except InputError:  # what is left can't meet the policy: the check is what went wrong
            raise failed from None
    else:
        raise failed
    if check.passed is None and not allow_vacuous:
        raise CheckError(
            f"masked = removed can't be told: {check.reason}",
            remedy="Calibrate on real, different images and a trained net, or pass --allow-vacuous.",
        )
    if refits is not None:
        plan = replace(plan, notes=(*plan.notes, *refits.notes()))
    plan = replace(plan, notes=(*plan.notes, *_neighbour_notes(coupling, plan)))
    plan = replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *coupling.idle.notes()))))
    return Surgery(pruned, plan, coupling, check)


def _neighbour_notes(coupling: Coupling, plan: PruningPlan) -> tuple[str, ...]:
    """Say where convolutions along channels (ECA) got other neighbours, if any did."""
    touched = {
        module
        for name, along in coupling.along_channels.items()
        if plan.removed.get(name)
        for module in along
    }
    if not touched:
        return ()
    count = "1 convolution" if len(touched) == 1 else f"{len(touched)} convolutions"
    return (
        f"eca_neighbours: {count} along channels met other neighbours, so gates are not those of the masked"
        " net; the check took them from the pruned one. Fine-tune.",
    )


def restore(
    surgery: Surgery,
    base: nn.Module,
    batches: Iterable[Batch],
    *,
    compensate: bool,
    images: int,
    device: torch.device,
) -> None:
    """Estimate the norms of a surgery's net again, on so many images; with `compensate`, refit its layers."""
    recover(
        surgery.net,
        base,
        surgery.coupling,
        surgery.plan.removed,
        batches,
        passes=REFIT_PASSES if compensate else 0,
        recalibrate=lambda net: recalibrate_batchnorm(net, limited(batches, images), device=device),
        device=device,
    )


def group_rows(coupling: Coupling, ranking: Ranking, plan: PruningPlan | None) -> tuple[GroupRow, ...]:
    """The report's table of groups: widths before and after, and the evidence that judged each."""
    rows = []
    for group in coupling.groups:
        excitation = ranking.mean_excitation.get(group.name)
        after = group.width if plan is None else plan.widths_after.get(group.name, group.width)
        rows.append(
            GroupRow(
                name=group.name,
                role=group.role,
                width_before=group.width,
                width_after=after,
                evidence=ranking.evidence.get(group.name, group.frozen_because or "not judged"),
                mean_excitation=None if not excitation else sum(excitation) / len(excitation),
                excitation=excitation,
                frozen_because=group.frozen_because,
            )
        )
    return tuple(rows)


def not_measured(label: str, reasons: Mapping[str, str], **figures: Any) -> Measurement:
    """A measurement whose missing figures carry their reasons; `figures` are the ones that exist."""
    fields = ("split", "n", "top1", "top5", "loss", "macs", "params", "bytes", "latency_ms", "latency")
    values = dict.fromkeys(fields) | figures
    return Measurement(label=label, reasons={k: v for k, v in reasons.items() if values[k] is None}, **values)


def prune(
    net: nn.Module,
    *,
    calibration: Tensor | Iterable[Batch],
    ratio: float | None = None,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    latency_table: LatencyTable | str | Path | None = None,
    criterion: str = CRITERION,
    scope: Scope = Policy.scope,
    round_to: int = Policy.round_to,
    min_width: int = Policy.min_width,
    gated_only: bool = False,
    eca_neighbours: bool = False,
    frozen: Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    compensate: bool = True,
    recalibration_images: int = RECALIBRATION_IMAGES,
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
    allow_vacuous: bool = False,
) -> PruneResult:
    """Prune a net by what its channels do on calibration inputs; the net given is left as it was.

    `calibration` is a tensor of inputs (N, C, H, W; also 3- or 5-dimensional), (inputs, targets), a tuple of
    several inputs, or an iterable of such (see `as_batches`). Exactly one target is given: `ratio` of
    prunable channels removed, or the share of the base's MACs, parameters or latency to keep, the latter by
    `latency_table` (or a file of one that `sepress profile` wrote), or else timed here. With `compensate`,
    layers that read what goes are refitted on the same inputs; batch norm always is. With `eca_neighbours`,
    channels that an ECA gate convolves along go too, and those left become neighbours. Fine-tuning is yours.
    Raises InputError for what can't be used, CheckError where pruned and masked nets are not equal.

    >>> import sepress, torch
    >>> net = sepress.build("sepress:se_resnet8", in_chans=1)
    >>> result = sepress.prune(net, calibration=torch.randn(32, 1, 28, 28), ratio=0.3)
    >>> result.report.checks["masked_equals_removed"].passed
    True
    """
    policy = Policy(
        ratio=ratio,
        target_macs=target_macs,
        target_params=target_params,
        target_latency=target_latency,
        scope=scope,
        round_to=round_to,
        min_width=min_width,
        gated_only=gated_only,
        eca_neighbours=eca_neighbours,
        frozen=tuple(frozen),
        overrides=dict(overrides or {}),
    )
    check_policy(policy)
    get_criterion(criterion)
    given, batches = as_table(latency_table), as_batches(calibration, batch_size)
    place = resolve_device(device)
    with seeded(seed):
        base = copy.deepcopy(net).to(place).eval()
        images = tuple(x.to(place) for x in first_inputs(batches, CHECK_IMAGES))
        coupling = trace(base, images, eca_neighbours=eca_neighbours)
        ranking, stats = rank_channels(
            base, coupling, batches, criterion=criterion, compensate=compensate, device=place, seed=seed
        )
        table, notes = table_for(base, coupling, ranking, policy, images, given=given)
        surgery = prune_channels(
            base,
            coupling,
            ranking,
            policy,
            images=images,
            latency=predictor(coupling, table),
            moments=stats if compensate else None,
            allow_vacuous=allow_vacuous,
        )
        restore(surgery, base, batches, compensate=compensate, images=recalibration_images, device=place)
    report = _api_report(base, surgery, ranking, images, notes=notes, calibrated=stats.images)
    take_modes(surgery.net, net)
    return PruneResult(net=surgery.net.to(home_of(net)), plan=surgery.plan, ranking=ranking, report=report)


def as_batches(calibration: Tensor | Iterable[Batch], batch_size: int) -> Iterable[Batch]:
    """Return something that yields batches each time it is iterated over.

    `calibration` is a tensor of inputs; a tuple of tensors of one length, (inputs, targets) or several
    inputs; or an iterable that can be read more than once (a DataLoader, a list) of such batches. Only
    criteria that use labels need targets. Where a forward goes through its images one by one (torchvision's
    detectors), batches must hold one.
    """
    if isinstance(calibration, tuple) and len({len(x) for x in calibration if isinstance(x, Tensor)}) == 1:
        return list(zip(*(torch.split(x, batch_size) for x in calibration), strict=True))
    if isinstance(calibration, Tensor):
        if not 3 <= calibration.dim() <= 5:
            raise InputError(
                f"the calibration tensor has {calibration.dim()} dimensions",
                remedy="Expected (N, C, L), (N, C, H, W) or (N, C, D, H, W): a batch of inputs.",
            )
        return list(torch.split(calibration, batch_size))
    if isinstance(calibration, Iterator):
        raise InputError(
            "calibration is an iterator, which can be read only once",
            remedy="Pass a tensor, a list of batches or a DataLoader.",
        )
    return calibration


def limited(batches: Iterable[Batch], images: int) -> Iterator[Batch]:
    """Yield the first `images` inputs, small batches of one shape joined: norms need more than one image.

    A batch is a tensor, or a tuple of them where the net takes several.
    """
    held: list[tuple[Tensor, ...]] = []
    left = images
    for batch in batches:
        arguments = tuple(x[:left] for x in arguments_of(batch))
        left -= len(arguments[0])
        if held and (_shapes(held[0]) != _shapes(arguments) or sum(len(h[0]) for h in held) >= JOINED_BATCH):
            yield _joined(held)
            held = []
        held.append(arguments)
        if left <= 0:
            break
    if held:
        yield _joined(held)


def _shapes(arguments: tuple[Tensor, ...]) -> list[torch.Size]:
    return [x.shape[1:] for x in arguments]


def _joined(batches: list[tuple[Tensor, ...]]) -> Batch:
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    return joined[0] if len(joined) == 1 else (joined, None)


def _api_report(
    base: nn.Module,
    surgery: Surgery,
    ranking: Ranking,
    example: Inputs,
    *,
    notes: Sequence[str],
    calibrated: int,
) -> Report:
    missing = dict.fromkeys(("split", "n", "top1", "top5", "loss"), "no evaluation data in this call")
    missing |= dict.fromkeys(("bytes", "latency_ms", "latency"), "not exported: see sepress.export_onnx")
    nets = {"base": base, "pruned": surgery.net}
    rows = tuple(
        not_measured(label, missing, macs=count_macs(net, example), params=count_params(net))
        for label, net in nets.items()
    )
    return Report(
        name=type(base).__name__,
        measurements=rows,
        groups=group_rows(surgery.coupling, ranking, surgery.plan),
        checks={
            "masked_equals_removed": surgery.check,
            "onnx_parity": Check(None, None, reason="not exported in this call"),
        },
        artifacts=dict.fromkeys(("model", "onnx", "plan", "report")),
        environment=environment(),
        criterion=ranking.criterion,
        notes=(*ranking.warnings, *surgery.plan.notes, *notes, f"calibrated on {calibrated} inputs"),
    )
