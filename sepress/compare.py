"""Criteria x seeds at one operating point, under one graph, calibration set and schedule -> one table.

Every cell prunes the same base by one criterion and measures it right after surgery, after batch-norm
recalibration and after the same fine-tune. A finished cell is a line of `cells.jsonl`, so an interrupted
comparison goes on where it stopped.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sepress import console
from sepress.calibrate import ExcitationStats, calibrate
from sepress.coupling import Coupling, trace
from sepress.criteria import get_criterion, rank
from sepress.data import DataSource, Loader, make_loader
from sepress.defaults import BATCH_SIZE, CALIBRATION_IMAGES, RECALIBRATION_IMAGES
from sepress.device import seeded
from sepress.digests import tensor_digest
from sepress.errors import InputError
from sepress.files import write_json, write_text
from sepress.measure import count_macs, environment
from sepress.pruning import CHECK_IMAGES, first_images, limited, prune_channels
from sepress.train import Accuracy, TrainConfig, evaluate, recalibrate_batchnorm, train
from sepress.types import JSON, Bundle, Policy

SCHEMA = "sepress.compare/1"
PHASES = ("one_shot", "recalibrated", "tuned")


@dataclass(frozen=True)
class Comparison:
    """What is compared with what; everything that a cell's figures depend on."""

    criteria: tuple[str, ...]
    seeds: tuple[int, ...]
    policy: Policy
    finetune: TrainConfig | None  # None: no fine-tuning
    split: str = "test"
    calibration_images: int = CALIBRATION_IMAGES
    recalibration_images: int = RECALIBRATION_IMAGES
    batch_size: int = BATCH_SIZE
    workers: int = 0


@dataclass(frozen=True)
class Cell:
    """The figures of one criterion and seed; a seed draws calibration images and the fine-tune's order."""

    criterion: str
    seed: int
    one_shot: float
    recalibrated: float
    tuned: float | None
    macs_ratio: float
    seconds: float


@dataclass(frozen=True)
class Table:
    """All cells, and the base they are measured against."""

    comparison: Comparison
    model: str
    trained: bool
    base_top1: float
    base_macs: int
    n: int
    cells: tuple[Cell, ...]
    environment: dict[str, JSON]

    def to_json(self) -> dict[str, JSON]:
        return {"schema": SCHEMA, **asdict(self), "rows": self.rows()}

    def rows(self) -> list[dict[str, JSON]]:
        """A row a criterion, best first: mean and sample standard deviation over seeds, per phase."""
        rows: list[dict[str, JSON]] = []
        for criterion in self.comparison.criteria:
            cells = [cell for cell in self.cells if cell.criterion == criterion]
            row: dict[str, JSON] = {"criterion": criterion, "seeds": len(cells)}
            for phase in PHASES:
                values = [value for cell in cells if (value := getattr(cell, phase)) is not None]
                row[phase] = statistics.fmean(values) if values else None
                row[f"{phase}_std"] = statistics.stdev(values) if len(values) > 1 else None
            row["macs_ratio"] = statistics.fmean(cell.macs_ratio for cell in cells)
            rows.append(row)
        return sorted(rows, key=lambda row: -(row["tuned"] or row["recalibrated"]))

    def to_markdown(self) -> str:
        """The table as Markdown, with what ran, on what, and with which seeds."""
        c = self.comparison
        tuning = "no fine-tuning" if c.finetune is None else _schedule(c.finetune)
        lines = [] if self.trained else ["**UNTRAINED: the net has random weights.**", ""]
        lines += [
            f"Top-1 (%) of {self.model} on {c.split} (n = {self.n:,}); "
            f"base {100 * self.base_top1:.2f} %, {self.base_macs / 1e6:.2f} MMACs.",
            f"{c.calibration_images} calibration images, BN recalibrated on {c.recalibration_images}, "
            f"{tuning}; seeds {', '.join(map(str, c.seeds))} (mean ± sample standard deviation); "
            f"{c.policy.scope} widths, rounded to {c.policy.round_to}.",
            "One-shot is right after surgery, before anything is recalibrated: its order misleads.",
            "",
            "| criterion | MACs kept | one-shot | BN recalibrated | fine-tuned |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in self.rows():
            cells = [_percent(row[phase], row[f"{phase}_std"]) for phase in PHASES]
            lines.append(f"| {row['criterion']} | {row['macs_ratio']:.3f} | " + " | ".join(cells) + " |")
        machine = {k: self.environment.get(k) for k in ("cpu", "threads", "torch", "sepress")}
        lines += ["", "Machine: " + ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None) + "."]
        return "\n".join(lines) + "\n"


def compare(
    bundle: Bundle, source: DataSource, comparison: Comparison, *, out: Path, device: torch.device
) -> Table:
    """Run every cell that `out` does not hold yet, and write compare.json and compare.md there.

    Raises InputError where `out` holds another comparison, or the data has no labels for the model.
    """
    if source.labels_reason is not None:
        raise InputError(f"comparing needs labels: {source.labels_reason}", remedy="Pass --classes FILE.")
    for name in comparison.criteria:
        get_criterion(name)
    net = bundle.net.to(device).eval()
    cells_file = _open(out, bundle, source, comparison)
    done = {(cell.criterion, cell.seed): cell for cell in _read_cells(cells_file)}
    base = _accuracy(net, source, comparison, device)
    images = _images(source, comparison, seed=comparison.seeds[0], device=device)
    coupling = trace(net, images[:1])
    total = len(comparison.seeds) * len(comparison.criteria)
    for seed in comparison.seeds:
        missing = [name for name in comparison.criteria if (name, seed) not in done]
        if not missing:
            continue
        stats = _statistics(net, coupling, source, comparison, missing, seed=seed, device=device)
        for name in missing:
            cell = _run_cell(net, coupling, stats, source, comparison, name, seed=seed, device=device)
            done[name, seed] = cell
            with cells_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
            tuned = "" if cell.tuned is None else f", tuned {100 * cell.tuned:.2f}"
            console.log(
                f"[{len(done)}/{total}] {name}, seed {seed}: one-shot {100 * cell.one_shot:.2f}, "
                f"recalibrated {100 * cell.recalibrated:.2f}{tuned} % ({cell.seconds:.0f} s)"
            )
    assert base.top1 is not None  # labels were checked above
    assert base.n is not None
    table = Table(
        comparison=comparison,
        model=bundle.spec.reference,
        trained=bundle.spec.trained,
        base_top1=base.top1,
        base_macs=count_macs(net, images[:1]),
        n=base.n,
        cells=tuple(done[name, seed] for name in comparison.criteria for seed in comparison.seeds),
        environment=environment(),
    )
    write_json(out / "compare.json", table.to_json())
    write_text(out / "compare.md", table.to_markdown())
    console.log(f"written to {out}")
    return table


def _run_cell(
    net: nn.Module,
    coupling: Coupling,
    stats: ExcitationStats,
    source: DataSource,
    comparison: Comparison,
    criterion: str,
    *,
    seed: int,
    device: torch.device,
) -> Cell:
    started = time.monotonic()
    ranking = rank(coupling, stats, criterion=criterion, net=net, seed=seed)
    images = _images(source, comparison, seed=seed, device=device)
    with seeded(seed):
        surgery = prune_channels(net, coupling, ranking, comparison.policy, images=images)
        one_shot = _top1(surgery.net, source, comparison, device)
        loader = _calibration(source, comparison, seed=seed)
        recalibrate_batchnorm(surgery.net, limited(loader, comparison.recalibration_images), device=device)
        recalibrated = _top1(surgery.net, source, comparison, device)
        tuned = None
        if comparison.finetune is not None:
            config = replace(comparison.finetune, seed=seed)
            teacher = net if config.distill_weight > 0 else None
            student = copy.deepcopy(surgery.net)
            train(student, source, config=config, device=device, teacher=teacher)
            tuned = _top1(student, source, comparison, device)
    return Cell(
        criterion=criterion,
        seed=seed,
        one_shot=one_shot,
        recalibrated=recalibrated,
        tuned=tuned,
        macs_ratio=surgery.plan.macs_after / surgery.plan.macs_before,
        seconds=time.monotonic() - started,
    )


def _statistics(
    net: nn.Module,
    coupling: Coupling,
    source: DataSource,
    comparison: Comparison,
    criteria: Sequence[str],
    *,
    seed: int,
    device: torch.device,
) -> ExcitationStats:
    evidence = frozenset({"excitation"}).union(*(get_criterion(name).needs for name in criteria))
    loader = _calibration(source, comparison, seed=seed)
    return calibrate(net, coupling, loader, evidence=evidence, device=device, data_id=source.fingerprint)


def _calibration(source: DataSource, comparison: Comparison, *, seed: int) -> Loader:
    dataset = source.calibration(comparison.calibration_images, seed=seed)
    return make_loader(dataset, batch_size=comparison.batch_size, workers=comparison.workers)


def _images(source: DataSource, comparison: Comparison, *, seed: int, device: torch.device) -> torch.Tensor:
    return first_images(_calibration(source, comparison, seed=seed), CHECK_IMAGES).to(device)


def _accuracy(net: nn.Module, source: DataSource, comparison: Comparison, device: torch.device) -> Accuracy:
    return evaluate(
        net,
        source,
        split=comparison.split,
        device=device,
        batch_size=comparison.batch_size,
        workers=comparison.workers,
    )


def _top1(net: nn.Module, source: DataSource, comparison: Comparison, device: torch.device) -> float:
    accuracy = _accuracy(net, source, comparison, device)
    assert accuracy.top1 is not None  # labels were checked before the first cell
    return accuracy.top1


def _open(out: Path, bundle: Bundle, source: DataSource, comparison: Comparison) -> Path:
    """Create the folder, or open it for the same comparison; returns the file of cells."""
    may_change = ("criteria", "seeds", "workers")
    facts = {name: value for name, value in asdict(comparison).items() if name not in may_change}
    weights = tensor_digest(bundle.net.state_dict())
    described = {"settings": facts, "data": source.fingerprint, "weights": weights}
    identity = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    marker = out / "settings.json"
    try:
        if marker.exists():
            if json.loads(marker.read_text(encoding="utf-8")).get("identity") != identity:
                raise InputError(
                    f"{out} holds a comparison with other settings, data or weights",
                    remedy="Choose another with --out; only criteria and seeds may be added to the same one.",
                )
        elif out.exists() and any(out.iterdir()):
            raise InputError(f"{out} holds other files", remedy="Choose another folder with --out.")
        else:
            write_json(marker, {"schema": SCHEMA, "identity": identity, **described})
    except OSError as error:
        raise InputError(
            f"the folder {out} can't be used: {error.strerror or error}", remedy="Choose another with --out."
        ) from error
    return out / "cells.jsonl"


def _read_cells(path: Path) -> list[Cell]:
    """The finished cells; a last line cut short by an interruption is left out and done again."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[-1]:
        write_text(path, "".join(line + "\n" for line in lines[:-1]))
    try:
        return [Cell(**json.loads(line)) for line in lines[:-1]]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}", remedy="Delete the line, or the folder.") from error


def _schedule(config: TrainConfig) -> str:
    distilled = f", distilled with weight {config.distill_weight:g}" if config.distill_weight > 0 else ""
    return f"{config.epochs:g} epochs of fine-tuning ({config.optimizer}, lr {config.lr:g}{distilled})"


def _percent(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
