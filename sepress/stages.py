"""A recipe's list of stages -> artifacts in a run folder -> a report.

Config stops here: a stage takes its settings out of the recipe and calls plain functions. A finished stage
whose files are intact is not run again; what it found stands in the folder's records.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sepress import console
from sepress.bundle import load_bundle, new_folder
from sepress.calibrate import ExcitationStats
from sepress.compare import Comparison, Table, compare
from sepress.coupling import Coupling
from sepress.data import open_data
from sepress.device import resolve_device, seeded
from sepress.errors import CheckError, InputError
from sepress.export import check_onnx_parity, export_onnx, measure_onnx_latency
from sepress.files import replacing, write_json, write_text
from sepress.inspection import Inspection, inspect_bundle
from sepress.job import (
    Job,
    batch_size,
    data_spec,
    load_base,
    open_source,
    overrides,
    policy_of,
    train_config,
)
from sepress.models import build_net, build_spec
from sepress.plan import plan_from_json, plan_pruning, plan_to_json
from sepress.pruning import CHECK_IMAGES, group_rows, limited, prune_channels, rank_channels
from sepress.recipe import EvaluateStage, Recipe, effective_yaml, recipe_digest
from sepress.report import report_to_json, report_to_markdown
from sepress.runfolder import RunFolder, StageRecord, sha256
from sepress.summary import build_report
from sepress.train import evaluate, recalibrate_batchnorm, train
from sepress.types import JSON, Bundle, Layout, PruningPlan, Ranking, Report

PARITY_IMAGES = 32  # real ones; enough to meet every branch of a clamp
RANKING_SCHEMA = "sepress.ranking/1"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its folder, and its report; a dry run leaves a plan instead."""

    folder: Path
    report: Report | None = None
    plan: PruningPlan | None = None


# ---- the stages: each (job, settings) -> record ---------------------------------------------------
def load_stage(job: Job, settings: Any) -> StageRecord:
    spec = job.bundle("base").spec
    console.log(f"loaded {spec.reference}" + ("" if spec.trained else ", UNTRAINED (random weights)"))
    return StageRecord("load", facts={"trained": spec.trained})


def train_stage(job: Job, settings: Any) -> StageRecord:
    """Train from random weights; what the data says (classes, channels) shapes the net."""
    recipe = job.recipe
    chosen = data_spec(recipe)
    kwargs = dict(recipe.model.kwargs)
    if chosen.path == "digits":
        kwargs.setdefault("in_chans", 1)  # the embedded digits are grey
    shape = build_spec(recipe.model.source, kwargs=kwargs, overrides=overrides(recipe))
    source = open_data(chosen, preprocessing=shape.preprocessing)
    if source.num_classes is None:
        raise InputError(
            "training needs labels: the data has no class folders", remedy="Sort it into class folders."
        )
    spec = build_spec(
        recipe.model.source,
        num_classes=source.num_classes,
        kwargs=kwargs,
        overrides=overrides(recipe),
        class_names=source.class_names,
    )
    with seeded(recipe.seed):
        net = build_net(spec).to(job.device)
    job.use(source)
    data = chosen.to_json() | {"fingerprint": source.fingerprint}
    parent = Bundle(spec, Layout({}), {"data": data, "recipe": recipe.model_dump(mode="json")}, net)
    return _train(job, settings, net, parent, label="base", teacher=None)


def rank_stage(job: Job, settings: Any) -> StageRecord:
    coupling = job.coupling(job.label)
    ranking, stats = _rank(job, coupling, settings)
    write_json(job.folder.file("ranking.json"), _ranking_json(ranking))
    facts = {
        "groups": [asdict(row) for row in group_rows(coupling, ranking, None)],
        "criterion": ranking.criterion,
        "notes": [*ranking.warnings, f"calibrated on {stats.images} images from train"],
    }
    return StageRecord("rank", {"ranking": "ranking.json"}, facts)


def prune_stage(job: Job, settings: Any) -> StageRecord:
    """Rank, plan, cut, check, recalibrate: nothing is written before the check has passed."""
    parent = job.bundle(job.label)
    coupling = job.coupling(job.label)
    ranking, stats = _rank(job, coupling, settings)
    surgery = prune_channels(
        parent.net,
        coupling,
        ranking,
        policy_of(settings) if settings.plan is None else plan_from_json(_read_json(Path(settings.plan))),
        images=job.images(CHECK_IMAGES),
        allow_vacuous=settings.allow_vacuous,
    )
    images = settings.recalibration_images
    recalibrate_batchnorm(surgery.net, limited(job.calibration(images), images), device=job.device)
    plan = plan_to_json(surgery.plan)
    write_json(job.folder.file("ranking.json"), _ranking_json(ranking))
    write_json(job.folder.file("plan.json"), plan)
    plans = [*parent.lineage.get("plans", ()), plan]
    name = job.keep("pruned", surgery.net, parent=parent, plans=plans, base=_base_file(job))
    facts = {
        "groups": [asdict(row) for row in group_rows(surgery.coupling, ranking, surgery.plan)],
        "criterion": surgery.plan.criterion,
        "masked_equals_removed": asdict(surgery.check),
        "notes": [
            *ranking.warnings,
            *surgery.plan.notes,
            f"calibrated on {stats.images} images from train, batch norm recalibrated on up to {images}",
        ],
    }
    return StageRecord("prune", {"pruned": name, "plan": "plan.json", "ranking": "ranking.json"}, facts)


def finetune_stage(job: Job, settings: Any) -> StageRecord:
    """Train the newest net on, taught by its base where that is at hand."""
    if reason := job.source().labels_reason:
        raise InputError(
            f"fine-tuning needs labels: {reason}", remedy="Pass --classes FILE, or data with labels."
        )
    parent = job.bundle(job.label)
    teacher = _teacher(job) if settings.distill_weight > 0 else None
    return _train(job, settings, copy.deepcopy(parent.net), parent, label="tuned", teacher=teacher)


def evaluate_stage(job: Job, settings: Any) -> StageRecord:
    accuracies = {}
    for label in job.labels:
        accuracy = evaluate(
            job.bundle(label).net,
            job.source(),
            split=settings.split,
            device=job.device,
            batch_size=batch_size(job.recipe),
        )
        accuracies[label] = asdict(accuracy)
    return StageRecord("evaluate", facts={"accuracy": accuracies})


def export_stage(job: Job, settings: Any) -> StageRecord:
    """Export the newest net, and the base beside it for its size and latency; each must equal torch."""
    images = job.images(PARITY_IMAGES).cpu()
    label = job.label
    names = {"base": "base.onnx", label: "model.onnx"}  # a base alone is the model
    check: JSON = None
    for each, name in names.items():
        bundle = job.bundle(each)
        net = copy.deepcopy(bundle.net).cpu().eval()
        with replacing(job.folder.file(name)) as temporary:
            export_onnx(
                net,
                temporary,
                example=images[:1],
                spec=bundle.spec,
                lineage=_public_lineage(bundle),
                opset=settings.opset,
                dynamic_batch=settings.dynamic_batch,
            )
            parity = check_onnx_parity(net, temporary, images)
            if parity.passed is False:
                job.folder.reject("*.pt")
                raise CheckError(
                    f"the ONNX file of the {each} net does not equal the net: relative error "
                    f"{parity.relative_error:.2e}",
                    remedy="No ONNX file was written; the models are marked rejected. Please report it.",
                )
        check = asdict(parity)
    paths = {each: job.folder.file(name) for each, name in names.items()}
    figures = measure_onnx_latency(paths, images[:1], rounds=settings.latency_rounds)
    facts = {
        "onnx_parity": check,
        "bytes": {each: path.stat().st_size for each, path in paths.items()},
        "latency": figures,
    }
    roles = {"onnx": "model.onnx"} | ({} if label == "base" else {"base_onnx": "base.onnx"})
    return StageRecord("export", roles, facts)


STAGES: dict[str, Callable[[Job, Any], StageRecord]] = {
    "load": load_stage,
    "train": train_stage,
    "rank": rank_stage,
    "prune": prune_stage,
    "finetune": finetune_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
}


# ---- running a list of them -----------------------------------------------------------------------
def run_recipe(recipe: Recipe, *, out: Path | None = None, dry_run: bool = False) -> Outcome:
    """Run the recipe's stages in order in its folder, reuse what is finished, and write the report.

    With `dry_run`, a model is loaded, measured and planned for: plan.json is written, and no model.
    Whether the constraints are met stands in the report; `constraints.require` raises for them.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    path = out or (Path(recipe.out) if recipe.out else new_folder(_default_folder(recipe)))
    folder = RunFolder(path, recipe_text=effective_yaml(recipe), digest=_run_digest(recipe))
    job = Job(recipe, folder)
    if dry_run:
        return _dry_run(job)
    for index, (kind, settings) in enumerate(_stage_list(recipe)):
        record = folder.finished(index, kind)
        if record is None:
            console.log(f"[{kind}]")
            record = folder.finish(STAGES[kind](job, settings))
        else:
            console.log(f"[{kind}] finished before, its files are intact: reused")
        job.records.append(record)
    report = build_report(job)
    write_json(folder.file("report.json"), report_to_json(report, relative_to=folder.path))
    write_text(folder.file("report.md"), report_to_markdown(report))
    return Outcome(folder=folder.path, report=report)


def describe_run(recipe: Recipe, *, out: Path | None = None) -> list[str]:
    """What `run` would do, a line a stage; nothing is loaded and nothing is written."""
    folder = out or (Path(recipe.out) if recipe.out else _default_folder(recipe))
    lines = [f"run folder: {folder}" + (" (exists: would be continued)" if folder.exists() else "")]
    for number, (kind, settings) in enumerate(_stage_list(recipe), 1):
        options = {} if settings is None else settings.model_dump(exclude_defaults=True)
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        lines.append(f"{number}. {kind}" + (f": {shown}" if shown else ""))
    return lines + [f"require: {text}" for text in recipe.require]


def inspect_model(recipe: Recipe) -> Inspection:
    """The structure of the recipe's model; weights of a name are never fetched."""
    return inspect_bundle(load_base(recipe, weights="none"))


def compare_model(
    recipe: Recipe, *, criteria: Sequence[str], seeds: Sequence[int], out: Path | None = None
) -> Table:
    """Compare criteria on the recipe's model, data, prune settings and (where it has one) fine-tune.

    The default folder is the same each time, so that an interrupted comparison goes on.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    bundle = load_base(recipe)
    stage: dict[str, Any] = {stage.kind: stage for stage in recipe.stages}
    settings = stage["prune"]
    comparison = Comparison(
        criteria=tuple(criteria),
        seeds=tuple(seeds),
        policy=policy_of(settings),
        finetune=train_config(recipe, stage["finetune"]) if "finetune" in stage else None,
        calibration_images=settings.calibration_images,
        recalibration_images=settings.recalibration_images,
        batch_size=batch_size(recipe),
    )
    folder = out or (Path(recipe.out) if recipe.out else _default_folder(recipe))
    return compare(
        bundle, open_source(recipe, bundle), comparison, out=folder, device=resolve_device(recipe.device)
    )


def _stage_list(recipe: Recipe) -> list[tuple[str, Any]]:
    """The recipe's stages; a net is loaded unless trained, and what was made is evaluated at the end."""
    stages: list[tuple[str, Any]] = [(stage.kind, stage) for stage in recipe.stages]
    kinds = {kind for kind, _ in stages}
    if "train" not in kinds:
        stages.insert(0, ("load", None))
    if kinds & {"train", "prune", "finetune"} and "evaluate" not in kinds:
        stages.append(("evaluate", EvaluateStage()))  # after all choices: test is touched once
    return stages


def _dry_run(job: Job) -> Outcome:
    settings = next((stage for stage in job.recipe.stages if stage.kind == "prune"), None)
    if settings is None or job.recipe.stages[0].kind == "train":
        raise InputError(
            "there is no trained model to plan for", remedy="Train first, then plan on its file."
        )
    coupling = job.coupling("base")
    ranking, _ = _rank(job, coupling, settings)
    plan = plan_pruning(ranking, coupling, policy=policy_of(settings))
    write_json(job.folder.file("plan.json"), plan_to_json(plan))
    return Outcome(folder=job.folder.path, plan=plan)


# ---- what several stages share --------------------------------------------------------------------
def _rank(job: Job, coupling: Coupling, settings: Any) -> tuple[Ranking, ExcitationStats]:
    source = job.source()
    return rank_channels(
        job.bundle(job.label).net,
        coupling,
        job.calibration(settings.calibration_images),
        criterion=settings.criterion,
        device=job.device,
        seed=job.recipe.seed,
        num_classes=source.num_classes if source.labels_reason is None else None,
        data_id=source.fingerprint,
    )


def _train(
    job: Job, settings: Any, net: nn.Module, parent: Bundle, *, label: str, teacher: nn.Module | None
) -> StageRecord:
    checkpoint = job.folder.file(f"{label}.checkpoint")
    result = train(
        net,
        job.source(),
        config=train_config(job.recipe, settings),
        device=job.device,
        teacher=teacher,
        checkpoint=checkpoint,
    )
    history = {**parent.lineage.get("history", {}), label: [asdict(row) for row in result.history]}
    name = job.keep(label, net, parent=parent, history=history)
    checkpoint.unlink(missing_ok=True)  # the finished model has taken its place
    selection = {"epoch": result.best_epoch, "val_top1": result.best_val_top1}
    known = job.fact("selection") or {}
    trained = {"trained": True} if label == "base" else {}
    return StageRecord(settings.kind, {label: name}, trained | {"selection": {**known, label: selection}})


def _teacher(job: Job) -> nn.Module | None:
    """The base: of this run, or the file that the model at hand says it was pruned from."""
    if job.label != "base":
        return job.bundle("base").net
    base = job.bundle("base").lineage.get("base")
    if isinstance(base, str) and Path(base).is_file():
        console.log(f"taught by {base}")
        return load_bundle(Path(base), arch=job.recipe.model.arch).net.to(job.device)
    console.log("no base model is at hand: fine-tuning without distillation")
    return None


def _base_file(job: Job) -> str | None:
    """Where the net that was pruned lies: a later fine-tune may want it as its teacher."""
    path = job.artifact("base") or Path(job.recipe.model.source)
    return str(path.resolve()) if path.is_file() else None


def _public_lineage(bundle: Bundle) -> dict[str, JSON]:
    """The lineage without local paths, for files that travel."""
    public = {key: bundle.lineage[key] for key in ("stage", "plans", "environment") if key in bundle.lineage}
    return public | {"data": bundle.lineage.get("data", {}).get("fingerprint")}


def _ranking_json(ranking: Ranking) -> dict[str, JSON]:
    return {"schema": RANKING_SCHEMA, **asdict(ranking)}


def _read_json(path: Path) -> JSON:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} can't be read as JSON: {error}", remedy="Pass a plan.json of sepress."
        ) from error


def _run_digest(recipe: Recipe) -> str:
    """What a run's results depend on: the recipe, and the model file's content."""
    digest = hashlib.sha256(recipe_digest(recipe).encode())
    path = Path(recipe.model.source)
    if path.is_file():
        digest.update(sha256(path).encode())
    return digest.hexdigest()


def _default_folder(recipe: Recipe) -> Path:
    """Beside the model file, named for what is done to it; under runs/ for a name."""
    source = Path(recipe.model.source)
    return (
        source.with_name(f"{source.stem}-{recipe.name}") if source.is_file() else Path("runs") / recipe.name
    )
