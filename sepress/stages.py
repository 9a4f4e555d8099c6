"""A recipe's list of stages -> artifacts in a run folder -> a report.

Config stops here: a stage takes its settings out of the recipe and calls plain functions. A finished stage
whose files are intact is not run again; what it found stands in the folder's records.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import save_file
from torch import nn

from sepress import console
from sepress.basis import stage_basis
from sepress.bundle import new_folder
from sepress.calibrate import ExcitationStats, calibrate
from sepress.compare import Comparison, Point, Table, compare, read_method, split_policy
from sepress.constraints import evaluate as hold
from sepress.constraints import parse_constraint
from sepress.conversion import Conversion, convert_bundle, default_path
from sepress.costs import LatencyTable, as_table, predictor
from sepress.coupling import Coupling, trace
from sepress.cutting import cut, cut_in_steps, cut_within, judge, on_validation
from sepress.data import DataSource
from sepress.data.transforms import to_levels
from sepress.defaults import CALIBRATION_IMAGES
from sepress.device import resolve_device, seeded
from sepress.errors import CheckError, InputError, SepressError
from sepress.example import example_code
from sepress.export import export_onnx, repeated
from sepress.files import read_json, replacing, write_json, write_text
from sepress.folding import FoldResult, fold_gates
from sepress.imagefile import FromBytes, why_no_classifier, write_image_file
from sepress.inspection import Inspection, inspect_bundle
from sepress.job import (
    SAVED_CHECK,
    Job,
    batch_size,
    load_base,
    open_source,
    policy_of,
    train_config,
    workers,
)
from sepress.models import build_net
from sepress.parity import check_onnx_parity
from sepress.plan import check_plan, plan_from_json, plan_pruning, plan_to_json
from sepress.profile import profile_latency, table_for
from sepress.pruning import CHECK_IMAGES, group_rows
from sepress.recipe import EvaluateStage, Recipe, TrainStage, check_inputs, effective_yaml
from sepress.report import report_to_json, report_to_markdown
from sepress.runfolder import RunFolder, StageRecord
from sepress.runtime import measure_onnx_latency
from sepress.schedule import TrainConfig
from sepress.steps import Judged
from sepress.summary import build_report
from sepress.train import (
    Decisions,
    Penalty,
    Polarisation,
    decisions,
    polarisation_notes,
    train,
)
from sepress.types import JSON, Bundle, Check, PruningPlan, Ranking, Report
from sepress.variants import make_variants

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
    """Say what was loaded; a net that has no file of its own and is changed is kept, as a later teacher."""
    spec = job.spec
    console.log(f"loaded {spec.reference}" + ("" if spec.trained else ", UNTRAINED (random weights)"))
    kept = {}
    if not Path(job.recipe.model.source).is_file() and any(
        stage.kind in ("polarise", "fold", "prune") for stage in job.recipe.stages
    ):
        bundle = job.newest
        kept["base"], _ = job.keep("base", bundle.net, lineage=dict(bundle.lineage), trained=spec.trained)
    return StageRecord("load", kept, {"trained": spec.trained})


def train_stage(job: Job, settings: Any) -> StageRecord:
    """Train from random weights."""
    with seeded(job.recipe.seed):
        net = build_net(job.spec).to(job.device)
    return _train(job, settings, net, lineage={}, label="base")


def polarise_stage(job: Job, settings: Any) -> StageRecord:
    """Train the newest net on with its gates driven apart; say what that did to them, and what it cost."""
    parent = job.newest
    coupling = job.coupling()
    penalty = Polarisation(coupling, strength=settings.strength, open_share=settings.open_share)
    net = copy.deepcopy(parent.net)
    lineage = {**parent.lineage, "base": job.origin()}
    record = _train(job, settings, net, lineage=lineage, label="polarised", penalty=penalty)
    before, after = (_decisions(job, each, coupling) for each in (parent.net, net))
    notes = polarisation_notes(before, after, penalty.left_alone)
    for note in notes:
        console.log(note)
    found = {"before": asdict(before), "after": asdict(after)}
    return replace(record, facts={**record.facts, "polarisation": found, "notes": notes})


def rank_stage(job: Job, settings: Any) -> StageRecord:
    coupling = job.coupling()
    judged = judge(job, job.newest.net, coupling, settings.criterion, settings.calibration_images)
    ranking, stats = judged.ranking, judged.stats
    write_json(job.folder.file("ranking.json"), _ranking_json(job, ranking))
    facts = {
        "groups": [asdict(row) for row in group_rows(coupling, ranking, None)],
        "criterion": ranking.criterion,
        "notes": [*ranking.warnings, f"calibrated on {stats.images} images from train"],
    }
    files = {"ranking": "ranking.json", "excitation": _write_statistics(job, stats)}
    return StageRecord("rank", files, facts)


def prune_stage(job: Job, settings: Any) -> StageRecord:
    """Rank, plan, cut, check, recalibrate: nothing is written before the check has passed."""
    parent = job.newest
    coupling, given = _coupling_and_plan(job, settings)
    table = _given_table(settings, coupling)
    criterion = settings.criterion if given is None else "random"  # a plan was judged before: no score counts
    judged = judge(
        job, parent.net, coupling, criterion, settings.calibration_images, compensate=settings.compensate
    )
    if given is not None:
        known = replace(judged.ranking, criterion=given.criterion, scores={}, evidence=given.evidence)
        judged = replace(judged, ranking=known)
    aimed: tuple[str, ...] = ()
    if given is None:
        table, aimed = _table_for(job, settings, judged, table)
    if settings.within is not None:
        surgery = cut_within(job, settings, judged, table=table)
    elif settings.steps > 1:
        surgery = cut_in_steps(job, settings, judged)
    else:
        surgery = cut(job, settings, judged, given or policy_of(settings), table=table)
    ranking, stats, images = judged.ranking, judged.stats, settings.recalibration_images
    plan = plan_to_json(surgery.plan)
    write_json(job.folder.file("plan.json"), plan)
    lineage = {**parent.lineage, "plans": [*parent.lineage.get("plans", ()), plan], "base": job.origin()}
    name, saved = job.keep("pruned", surgery.net, lineage=lineage, trained=parent.spec.trained)
    facts = {
        "groups": [asdict(row) for row in group_rows(surgery.coupling, ranking, surgery.plan)],
        "criterion": surgery.plan.criterion,
        "masked_equals_removed": asdict(surgery.check),
        SAVED_CHECK: saved,
        "notes": [
            *ranking.warnings,
            *surgery.plan.notes,
            *aimed,
            f"calibrated on {stats.images} images from train, batch norm recalibrated on up to {images}",
        ],
    }
    files = {"pruned": name, "plan": "plan.json", "excitation": _write_statistics(job, stats)}
    if given is None:
        write_json(job.folder.file("ranking.json"), _ranking_json(job, ranking))
        files["ranking"] = "ranking.json"
    if table is not None:  # to plan by again: what is timed is never the same twice
        write_json(job.folder.file("latency.json"), table.to_json())
        files["latency_table"] = "latency.json"
    return StageRecord("prune", files, facts)


def fold_stage(job: Job, settings: Any) -> StageRecord:
    """Fold gates of the newest net, say of each what became of it, and keep what is left."""
    parent = job.newest
    found = _fold(job, settings, parent.net)
    lineage = {
        **parent.lineage,
        "folded": [*parent.lineage.get("folded", ()), *found.folded],
        "base": job.origin() if job.label == "base" else parent.lineage.get("base"),
    }
    name, saved = job.keep("folded", found.net, lineage=lineage, trained=parent.spec.trained)
    notes = found.notes()
    for line in (notes[0], *map(str, found.gates)):
        console.log(line)
    facts = {
        "folding": [asdict(outcome) for outcome in found.gates],
        "folded_equals_constant": asdict(found.check),
        SAVED_CHECK: saved,
        "notes": notes,
    }
    return StageRecord("fold", {"folded": name}, facts)


def finetune_stage(job: Job, settings: Any) -> StageRecord:
    """Train the newest net on, taught by its base where that is at hand."""
    parent = job.newest
    teacher = None
    if settings.distill_weight > 0:
        if "base" in job.labels and job.label != "base":
            teacher = job.bundle("base").net
        else:
            console.log("no base model is at hand: fine-tuning without distillation")
    net = copy.deepcopy(parent.net)
    return _train(job, settings, net, lineage=dict(parent.lineage), label="tuned", teacher=teacher)


def evaluate_stage(job: Job, settings: Any) -> StageRecord:
    accuracies = {label: asdict(job.accuracy(job.bundle(label).net, settings.split)) for label in job.labels}
    return StageRecord("evaluate", facts={"accuracy": accuracies})


def export_stage(job: Job, settings: Any) -> StageRecord:
    """Export the newest net, and the base beside it for its size and latency; each must equal torch.

    Beside a classifier goes a program that uses it and, where asked for, a file that holds its preprocessing.
    The files get their names together, when all have passed.
    """
    batch = settings.batch or 1
    images = job.images(max(PARITY_IMAGES, batch)).cpu()
    label = job.label
    names = {"base": "base.onnx", label: "model.onnx"} if "base" in job.labels else {label: "model.onnx"}
    checks = {}
    with ExitStack() as files:

        def new(name: str) -> Path:
            return files.enter_context(replacing(job.folder.file(name)))

        for each, name in names.items():
            temporary = new(name)
            with console.working(f"exporting the {each} net and holding it to torch"):
                checks[each] = _export(job, each, temporary, images, settings)
        with console.working("writing what goes beside it"):
            beside, image_check = _write_beside(job, label, temporary, images, settings, new)
    console.log("timing on ONNX Runtime")
    paths = {each: job.folder.file(name) for each, name in names.items()}
    facts = {
        "onnx_parity": asdict(checks[label]),
        "bytes": {each: path.stat().st_size for each, path in paths.items()},
        "latency": measure_onnx_latency(paths, repeated(images, batch), rounds=settings.latency_rounds),
    }
    if image_check is not None:
        facts["image_parity"] = asdict(image_check)
    roles = {"onnx": "model.onnx", **beside}
    if "base.onnx" in names.values():
        roles["base_onnx"] = "base.onnx"
    return StageRecord("export", roles, facts)


def precision_stage(job: Job, settings: Any) -> StageRecord:
    """Write the exported file in other precisions; those that hold the constraint get their names."""
    made = make_variants(job, settings)
    for variant in made.variants[1:]:
        console.log(f"{variant.precision} {'kept' if variant.kept else 'REJECTED'}: {variant.reason}")
    facts = {"variants": [asdict(variant) for variant in made.variants], "notes": list(made.notes)}
    return StageRecord("precision", {f"onnx_{name}": path.name for name, path in made.files.items()}, facts)


STAGES: dict[str, Callable[[Job, Any], StageRecord]] = {
    "load": load_stage,
    "train": train_stage,
    "polarise": polarise_stage,
    "fold": fold_stage,
    "rank": rank_stage,
    "prune": prune_stage,
    "finetune": finetune_stage,
    "evaluate": evaluate_stage,
    "export": export_stage,
    "precision": precision_stage,
}


# ---- running a list of them -----------------------------------------------------------------------
def run_recipe(recipe: Recipe, *, out: Path | None = None, dry_run: bool = False) -> Outcome:
    """Run the recipe's stages in order in its folder, reuse what is finished, and write the report.

    With `dry_run`, a model is loaded, measured and planned for: plan.json is written, and no model.
    Whether the constraints are met stands in the report; `constraints.require` raises for them.
    """
    check_inputs(recipe)
    if dry_run:
        _check_plannable(recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    job = Job(recipe)
    named = out or (Path(recipe.out) if recipe.out else None)
    path = named or new_folder(_default_folder(recipe))
    _check_folder(job, path, dry_run=dry_run)
    text = effective_yaml(recipe)
    job.folder = RunFolder(path, recipe_text=text, claimed=named is None)
    console.log(f"run folder: {path}")
    try:
        return _dry_run(job) if dry_run else _run_stages(job)
    except SepressError:
        job.folder.abandon()
        raise
    finally:
        job.folder.close()


def _check_folder(job: Job, path: Path, *, dry_run: bool) -> None:
    """Raise InputError where this run would take away what it reads, or what a finished run wrote."""
    for file in job.input_files.values():
        if file.resolve().parent == path.resolve():
            raise InputError(
                f"{file} lies in the run folder {path}, where this run puts its own files in such places",
                remedy="Choose another folder (out: in the recipe, or --out).",
            )
    if dry_run and (path / "report.json").exists():
        raise InputError(
            f"{path} holds a finished run, whose plan a dry run would replace",
            remedy="Choose another folder for the dry run.",
        )


def _run_stages(job: Job) -> Outcome:
    recipe, path = job.recipe, job.folder.path
    stages, inputs = _stage_list(recipe), job.inputs
    job.folder.keep_only([kind for kind, _ in stages])
    for kind, settings in stages:
        basis = stage_basis(
            recipe, kind, settings, device=job.device.type, inputs=inputs, made=job.made_for(kind)
        )
        record = job.folder.finished(kind, basis)
        if record is None:
            job.folder.begin(kind, basis)
            console.log(f"[{kind}]")
            record = STAGES[kind](job, settings)
            facts = {**record.facts, "data": job.source.describe()}
            record = job.folder.finish(replace(record, facts=facts, basis=basis))
        else:
            console.log(f"[{kind}] finished before, its files are intact: reused")
        job.records.append(record)
    report = _held_to_constraints(job, build_report(job))
    write_json(job.folder.file("report.json"), report_to_json(report, relative_to=path))
    write_text(job.folder.file("report.md"), report_to_markdown(report))
    return Outcome(folder=path, report=report)


_SHIPPED = ("onnx", "onnx_fp16", "onnx_int8", "image_onnx")  # roles of files that are deployed


def _held_to_constraints(job: Job, report: Report) -> Report:
    """Rename what would be shipped, where the run's constraints are not met; the report names it so."""
    if all(row["passed"] for row in report.constraints):
        return report
    artifacts = dict(report.artifacts)
    for role in (job.label, *_SHIPPED):
        path = job.artifact(role)
        if path is not None:
            job.folder.reject(path.name)
            console.log(f"{path.name} is kept as {path.name}.rejected: a constraint is not met")
            artifacts["model" if role == job.label else role] = f"{path.resolve()}.rejected"
    return replace(report, artifacts=artifacts)


def describe_run(recipe: Recipe, *, out: Path | None = None) -> list[str]:
    """What `run` would do, a line a stage; nothing is loaded and nothing is written."""
    named = out or (Path(recipe.out) if recipe.out else None)
    if named is None:
        lines = [f"run folder: {_default_folder(recipe)} (or the first free name after it)"]
    else:
        lines = [
            f"run folder: {named}" + (" (exists: continued if it is this run's)" if named.exists() else "")
        ]
    for number, (kind, settings) in enumerate(_stage_list(recipe), 1):
        options = {} if settings is None else settings.model_dump(exclude_defaults=True)
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        lines.append(f"{number}. {kind}" + (f": {shown}" if shown else ""))
    return lines + [f"require: {text}" for text in recipe.require]


def inspect_model(recipe: Recipe) -> Inspection:
    """The structure of the recipe's model; weights of a name are never fetched."""
    return inspect_bundle(load_base(recipe, weights="none"))


def convert_model(recipe: Recipe, *, out: Path | None) -> Conversion:
    """Write the recipe's model as a file of ours, to `out` or into the current folder."""
    path = out or default_path(recipe.model.source)
    if path.exists():  # before a pickle is run or a large file is read
        raise InputError(f"{path}: it exists already", remedy="Choose another name with --out.")
    with console.working(f"converting {recipe.model.source}"), console.quiet():  # the result has the notes
        return convert_bundle(load_base(recipe), path)


def profile_model(recipe: Recipe, *, batch: int, threads: int, out: Path) -> LatencyTable:
    """Time the layers of the recipe's model at many widths, and write the table to `out`.

    Weights of a name are never fetched: latency needs none.
    """
    if out.exists():
        raise InputError(f"{out}: it exists already", remedy="Choose another name.")
    bundle = load_base(recipe, weights="none")
    image = torch.zeros(1, *bundle.spec.preprocessing.input_size)
    with seeded(recipe.seed):
        coupling = trace(bundle.net, image, eca_neighbours=True)  # whatever may go
        example = image.expand(batch, *image.shape[1:]).contiguous()
        table = profile_latency(bundle.net, coupling, example, threads=threads, seed=recipe.seed)
    write_json(out, table.to_json())
    return table


def compare_model(
    recipe: Recipe,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    values: Sequence[float] = (),
    models: Sequence[str] = (),
    against: str | None = None,
    out: Path | None = None,
) -> Table:
    """Compare methods on the recipe's model, data, prune settings and (where it has one) fine-tune.

    `values` are those of the target that the prune stage names, the most wanted first; none: its own.
    `models` are the bases of the seeds after the first, where each seed has its own. The default folder is
    the same each time, so that an interrupted comparison goes on.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    chosen = tuple(read_method(text) for text in methods)
    bundles = [load_base(_with_model(recipe, source)) for source in (recipe.model.source, *models)]
    source = _common_source(recipe, bundles)
    stage: dict[str, Any] = {stage.kind: stage for stage in recipe.stages}
    settings, evaluation = stage["prune"], stage.get("evaluate", EvaluateStage())
    typed = settings.model_fields_set & _OF_METHODS
    if idle := sorted(name for name in typed if getattr(settings, name) is not None):
        raise InputError(
            f"a comparison cuts each net once, to a given size and as its method says: it takes no "
            f"{', '.join(idle)}",
            remedy="Name a target_macs, and methods such as l2+refit@global.",
        )
    point, policy = split_policy(policy_of(settings))
    if policy.scope == "auto":  # rows without a scope of their own share one
        policy = replace(policy, scope="per-group")
    finetune = train_config(recipe, stage["finetune"]) if "finetune" in stage else None
    from_scratch = any(method.from_scratch for method in chosen)
    comparison = Comparison(
        methods=chosen,
        points=tuple(Point(point.target, value) for value in values or (point.value,)),
        seeds=tuple(seeds),
        policy=policy,
        finetune=finetune,
        scratch=_scratch_config(recipe, bundles[0], finetune) if from_scratch else None,
        against=None if against is None else read_method(against),
        split=evaluation.split,
        calibration_images=settings.calibration_images,
        recalibration_images=settings.recalibration_images,
        batch_size=batch_size(recipe),
        workers=workers(recipe),
    )
    folder = out or (Path(recipe.out) if recipe.out else _default_folder(recipe))
    return compare(bundles, source, comparison, out=folder, device=resolve_device(recipe.device))


# of a prune stage, what a comparison would pass over
_OF_METHODS = {
    "criterion", "compensate", "plan", "target_latency", "latency_table", "within", "steps", "step_epochs",
    "allow_vacuous",
}  # fmt: skip


def _with_model(recipe: Recipe, source: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": source})})


def _common_source(recipe: Recipe, bundles: Sequence[Bundle]) -> DataSource:
    """The data of all the bases; InputError where they are not the same."""
    source = open_source(recipe, bundles[0])
    for bundle in bundles[1:]:
        other = open_source(recipe, bundle)
        if (other.fingerprint, other.class_names) != (source.fingerprint, source.class_names):
            raise InputError(
                "the models were trained on different data", remedy="Name the data of all of them: --data."
            )
    return source


def _scratch_config(recipe: Recipe, bundle: Bundle, finetune: TrainConfig | None) -> TrainConfig:
    """The training that the base had, as long as it and the fine-tune together."""
    known = bundle.lineage.get("recipe") or {}
    trainings = [stage["train"] for stage in known.get("stages", ()) if "train" in stage]
    if not trainings:
        raise InputError(
            "how the base was trained is not known: 'scratch' can't train in the same way",
            remedy="Compare a model that sepress trained, or leave 'scratch' out.",
        )
    if bundle.lineage.get("plans"):
        raise InputError(
            "the base was pruned after its training: 'scratch' can't train in the same way",
            remedy="Compare the model that was pruned, or leave 'scratch' out.",
        )
    config = train_config(recipe, TrainStage.model_validate(trainings[0]))
    epochs = config.epochs + (finetune.epochs if finetune else 0)
    return replace(config, epochs=epochs, batch_size=known["data"]["batch_size"])


def _stage_list(recipe: Recipe) -> list[tuple[str, Any]]:
    """The recipe's stages; a net is loaded unless trained, and what was made is evaluated at the end."""
    stages: list[tuple[str, Any]] = [(stage.kind, stage) for stage in recipe.stages]
    kinds = {kind for kind, _ in stages}
    if "train" not in kinds:
        stages.insert(0, ("load", None))
    if kinds & {"train", "polarise", "fold", "prune", "finetune"} and "evaluate" not in kinds:
        stages.append(("evaluate", EvaluateStage()))  # after all choices: test is touched once
    return stages


def _check_plannable(recipe: Recipe) -> None:
    """Raise InputError where there is nothing to plan for before a net is made."""
    settings = next((stage for stage in recipe.stages if stage.kind == "prune"), None)
    if settings is None or recipe.stages[0].kind in ("train", "polarise"):
        raise InputError("there is no trained model to plan for", remedy="Train first; plan on its file.")
    if settings.within is not None or settings.steps > 1:
        raise InputError(
            "a dry run makes no net, and 'within' and 'steps' plan by those they make",
            remedy="Leave out the dry run, or plan for a target_macs.",
        )


def _dry_run(job: Job) -> Outcome:
    settings = next(stage for stage in job.recipe.stages if stage.kind == "prune")
    coupling = job.coupling(eca_neighbours=settings.eca_neighbours)
    table = _given_table(settings, coupling)
    judged = judge(job, job.newest.net, coupling, settings.criterion, settings.calibration_images)
    table, aimed = _table_for(job, settings, judged, table)
    latency = predictor(coupling, table)
    plan = plan_pruning(judged.ranking, coupling, policy=policy_of(settings), latency=latency)
    plan = replace(plan, notes=(*plan.notes, *aimed))
    if not job.spec.trained:
        plan = replace(plan, notes=("UNTRAINED: the net has random weights", *plan.notes))
    write_json(job.folder.file("plan.json"), plan_to_json(plan))
    return Outcome(folder=job.folder.path, plan=plan)


# ---- what several stages share --------------------------------------------------------------------
def _train(
    job: Job,
    settings: Any,
    net: nn.Module,
    *,
    lineage: dict[str, JSON],
    label: str,
    teacher: nn.Module | None = None,
    penalty: Penalty | None = None,
) -> StageRecord:
    checkpoint = job.folder.file(f"{label}.checkpoint")
    result = train(
        net,
        job.source,
        config=train_config(job.recipe, settings),
        device=job.device,
        teacher=teacher,
        penalty=penalty,
        checkpoint=checkpoint,
    )
    chosen = {"epoch": result.best_epoch, "val_top1": result.best_val_top1}
    lineage["history"] = {**lineage.get("history", {}), label: [asdict(row) for row in result.history]}
    if penalty is None:  # else the last epoch's weights are taken
        lineage["selection"] = {**lineage.get("selection", {}), label: chosen}
    name, saved = job.keep(label, net, lineage=lineage, trained=True)
    checkpoint.unlink(missing_ok=True)  # the finished model has taken its place
    return StageRecord(settings.kind, {label: name}, {"trained": True, SAVED_CHECK: saved})


def _fold(job: Job, settings: Any, net: nn.Module) -> FoldResult:
    """Fold the gates named, or the most that hold the constraint on validation, where `net` is the base."""
    accept = None
    if settings.constraint is not None:
        constraint = parse_constraint(settings.constraint)
        base = on_validation(job, net, "base")
        known = hold(constraint, [base, replace(base, label="folded")])
        if known.actual is None:  # before anything is measured for it
            raise InputError(f"{constraint} can't be told on validation: {known.reason}")

        def accept(folded: nn.Module) -> tuple[bool, str]:
            result = hold(constraint, [base, on_validation(job, folded, "folded")])
            return result.passed, str(result)

    return fold_gates(
        net,
        job.coupling(),
        job.calibration(settings.calibration_images),
        job.images(CHECK_IMAGES),
        patterns=settings.gates or ("*",),
        accept=accept,
        device=job.device,
        allow_vacuous=settings.allow_vacuous,
    )


def _decisions(job: Job, net: nn.Module, coupling: Coupling) -> Decisions:
    """Measure accuracy on validation, and the gates on calibration images."""
    images = job.calibration(CALIBRATION_IMAGES)
    stats = calibrate(net, coupling, images, evidence=frozenset({"excitation"}), device=job.device)
    accuracy = job.accuracy(net, "val")
    if accuracy.top1 is None:
        raise InputError(f"accuracy on validation can't be measured: {accuracy.reason}")
    telling = [gate for gate in coupling.gates if gate.silent_because is None]
    return decisions(accuracy.top1, {gate.name: stats.mean_excitation(gate) for gate in telling})


def _export(job: Job, label: str, path: Path, images: torch.Tensor, settings: Any) -> Check:
    """Export one net and hold it to torch; CheckError where it differs, or can't be told."""
    bundle = job.bundle(label)
    net = copy.deepcopy(bundle.net).cpu().eval()
    export_onnx(
        net,
        path,
        example=images[:1],
        spec=bundle.spec,
        lineage=_public_lineage(bundle),
        opset=settings.opset,
        batch=settings.batch,
        exporter=settings.exporter,
    )
    return _held(job, f"ONNX file of the {label} net", check_onnx_parity(net, path, images), settings)


def _write_beside(
    job: Job,
    label: str,
    model: Path,
    images: torch.Tensor,
    settings: Any,
    new: Callable[[str], Path],
) -> tuple[dict[str, str], Check | None]:
    """What goes with a classifier's ONNX file: artifacts, and the check of the one with preprocessing."""
    bundle, check, made = job.bundle(label), None, {}
    figures = bundle.spec.preprocessing
    if settings.with_preprocessing:
        made["image_onnx"] = "model.image.onnx"
        path = new(made["image_onnx"])
        write_image_file(model, path, figures)
        pixels = to_levels(images, mean=figures.mean, std=figures.std).permute(0, 2, 3, 1)
        net = FromBytes(copy.deepcopy(bundle.net).cpu().eval(), figures)
        check = _held(
            job, "ONNX file with preprocessing inside", check_onnx_parity(net, path, pixels), settings
        )
    if why_no_classifier(onnx.load(model)) is None:
        made["example"] = "example.py"
        code = example_code(inside=settings.with_preprocessing, batch=settings.batch)
        new(made["example"]).write_text(code, encoding="utf-8")
    return made, check


def _held(job: Job, what: str, check: Check, settings: Any) -> Check:
    """The check; CheckError where it failed, or can't tell and has to."""
    if check.passed is False:
        if job.artifact(job.label) is not None:
            job.folder.reject(f"{job.label}.pt")
        raise CheckError(
            f"the {what} does not give what torch gives: relative error {check.relative_error}",
            remedy="No ONNX file was written; a model of this run is marked rejected. Please report it.",
        )
    if check.passed is None and not settings.allow_vacuous:
        raise CheckError(
            f"whether the {what} gives what torch gives can't be told: {check.reason}",
            remedy="Use real, different images and a trained net, or pass --allow-vacuous.",
        )
    return check


def _public_lineage(bundle: Bundle) -> dict[str, JSON]:
    """The lineage without local paths, for files that travel."""
    public = {key: bundle.lineage[key] for key in ("stage", "plans", "environment") if key in bundle.lineage}
    return public | {"data": bundle.lineage.get("data", {}).get("fingerprint")}


def _write_statistics(job: Job, stats: ExcitationStats) -> str:
    tensors, metadata = stats.to_tensors()
    name = "excitation.safetensors"
    with replacing(job.folder.file(name)) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return name


def _ranking_json(job: Job, ranking: Ranking) -> dict[str, JSON]:
    return {"schema": RANKING_SCHEMA, "trained": job.spec.trained, **asdict(ranking)}


def _coupling_and_plan(job: Job, settings: Any) -> tuple[Coupling, PruningPlan | None]:
    """Trace as the stage's policy says, or that of the plan it names, which is held to the net at once."""
    if settings.plan is None:
        return job.coupling(eca_neighbours=settings.eca_neighbours), None
    plan = _read_plan(Path(settings.plan))
    coupling = job.coupling(eca_neighbours=plan.policy.eca_neighbours)
    check_plan(plan, coupling)
    return coupling, plan


def _read_plan(path: Path) -> PruningPlan:
    return plan_from_json(read_json(path, what="plan", remedy="Pass a plan.json of sepress."))


def _given_table(settings: Any, coupling: Coupling) -> LatencyTable | None:
    """The latency table that a prune stage names, held to the net before anything is measured for it."""
    table = as_table(settings.latency_table)
    if table is not None:
        table.check(coupling)
    return table


def _table_for(
    job: Job, settings: Any, judged: Judged, given: LatencyTable | None
) -> tuple[LatencyTable | None, tuple[str, ...]]:
    policy, image = policy_of(settings), job.images(1)
    return table_for(judged.net, judged.coupling, judged.ranking, policy, image, given=given)


def _default_folder(recipe: Recipe) -> Path:
    """Beside the model file, named for what is done to it; under runs/ for a name."""
    source = Path(recipe.model.source)
    return (
        source.with_name(f"{source.stem}-{recipe.name}") if source.is_file() else Path("runs") / recipe.name
    )
