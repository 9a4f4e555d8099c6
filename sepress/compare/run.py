"""The cells of a comparison: each prunes a base by one method at one point for one seed, and measures it.

A cell is measured right after surgery, after batch-norm recalibration and after the fine-tune that all have.
Its figures do not depend on which other cells ran before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sepress import console
from sepress.calibrate import ExcitationStats, calibrate
from sepress.compare.folder import BaseFigures, Cell, CompareFolder, Comparison, Point, pack
from sepress.compare.methods import Method
from sepress.compare.plot import draw_pareto
from sepress.compare.table import Table
from sepress.coupling import Coupling, trace
from sepress.criteria import criterion_for, rank
from sepress.data import DataSource, Loader, make_loader
from sepress.device import seeded
from sepress.digests import tensor_digest
from sepress.errors import InputError
from sepress.files import replacing, write_json, write_text
from sepress.measure import count_macs, count_params, environment
from sepress.pruning import CHECK_IMAGES, Surgery, first_images, prune_channels, restore
from sepress.train import TrainConfig, train
from sepress.train.evaluate import find_right
from sepress.train.timing import time_epoch
from sepress.types import Bundle, ModelSpec, Ranking

UNIFORM = Method("l2", scope="per-group")  # the widths of the net trained from scratch


@dataclass(frozen=True)
class Bench:
    """What all cells are measured with."""

    source: DataSource
    comparison: Comparison
    device: torch.device
    checkpoints: Path  # the folder for trainings under way

    def right(self, net: nn.Module, split: str | None = None) -> np.ndarray:
        """The images of the split that the net is right on, (n,) bool."""
        c = self.comparison
        return find_right(
            net,
            self.source,
            split=split or c.split,
            device=self.device,
            batch_size=c.batch_size,
            workers=c.workers,
        )

    def calibration(self, seed: int, images: int | None = None) -> Loader:
        """The seed's calibration images, so many as the comparison says or `images`, the same each time."""
        c = self.comparison
        dataset = self.source.calibration(images or c.calibration_images, seed=seed)
        return make_loader(dataset, batch_size=c.batch_size, workers=c.workers)

    def images(self, seed: int) -> torch.Tensor:
        """The first calibration images, on the device."""
        return first_images(self.calibration(seed), CHECK_IMAGES).to(self.device)


@dataclass(frozen=True)
class Start:
    """What a seed's cells start from: its base net, and the evidence that judges its channels."""

    seed: int
    net: nn.Module
    coupling: Coupling
    stats: ExcitationStats
    _rankings: dict[str, Ranking] = field(default_factory=dict, init=False, repr=False)

    def ranking(self, criterion: str) -> Ranking:
        """The channels by this criterion, scored once."""
        if criterion not in self._rankings:
            self._rankings[criterion] = rank(
                self.coupling, self.stats, criterion=criterion, net=self.net, seed=self.seed
            )
        return self._rankings[criterion]


def compare(
    bundles: Sequence[Bundle],
    source: DataSource,
    comparison: Comparison,
    *,
    out: Path,
    device: torch.device,
) -> Table:
    """Run every cell that `out` does not hold yet; write compare.json, compare.md and pareto.svg there.

    `bundles` is one base for all seeds, or one for each, of one architecture. The table holds every cell of
    the folder, also of earlier calls. Raises InputError where `out` holds another comparison, the bases
    do not fit each other, or the data has no labels for them.
    """
    if source.labels_reason is not None:
        raise InputError(f"comparing needs labels: {source.labels_reason}", remedy="Pass --classes FILE.")
    bases = _match(bundles, comparison.seeds)
    folder = CompareFolder(out, comparison, data=source.fingerprint)
    comparison = _completed(comparison, folder)
    with folder.keep_settings():
        _fill(folder, bases, Bench(source, comparison, device, out))
        table = _written(folder, comparison, bundles[0].spec)
    console.log(f"written to {out}")
    return table


def _fill(folder: CompareFolder, bases: dict[int, Bundle], bench: Bench) -> None:
    """Measure the bases and the cells that the folder does not hold yet."""
    comparison = bench.comparison
    _measure_bases(folder, bases, bench)
    done = {cell.key for cell in folder.cells.rows}
    cells = [(m, p, s) for p in comparison.points for s in comparison.seeds for m in comparison.methods]
    missing = [(m, p, s) for m, p, s in cells if (m.name, p, s) not in done]
    progress = Progress(total=len(cells), left=missing)
    for seed, run in groupby(missing, key=_seed):
        ours = list(run)
        start = _start(bases[seed].net, bench, seed, [method for method, _, _ in ours])
        if not progress.estimated:
            progress.estimate(start, bench)
        for method, point, _ in ours:
            with console.quiet():
                cell = run_cell(start, bench, method, point)
            folder.cells.add(cell)
            progress.report(cell)
        del start  # before the next is made: the evidence of a large net takes gigabytes


def _written(folder: CompareFolder, comparison: Comparison, spec: ModelSpec) -> Table:
    """The table of all cells of the folder, written there."""
    table = Table(
        comparison=comparison,
        model=spec.reference,
        trained=spec.trained,
        bases=tuple(sorted(folder.bases.rows, key=lambda base: base.seed)),
        cells=tuple(folder.cells.rows),
        environment=environment(),
    )
    write_json(folder.path / "compare.json", table.to_json())
    write_text(folder.path / "compare.md", table.to_markdown())
    with replacing(folder.path / "pareto.svg") as temporary:
        draw_pareto(table, temporary)
    return table


def _completed(comparison: Comparison, folder: CompareFolder) -> Comparison:
    """With what earlier calls settled for the whole folder; InputError without anything to test against."""
    known = {*(method.name for method in comparison.methods), *(cell.method for cell in folder.cells.rows)}
    if comparison.reference not in known:
        raise InputError(
            f"{comparison.reference}, which the others are held against, is not compared",
            remedy=f"Choose one of: {', '.join(sorted(known))}.",
        )
    if comparison.scratch is None and folder.settings["scratch"] is not None:
        return replace(comparison, scratch=TrainConfig(**folder.settings["scratch"]))
    return comparison


# ---- bases ----------------------------------------------------------------------------------------
def _match(bundles: Sequence[Bundle], seeds: Sequence[int]) -> dict[int, Bundle]:
    """Seed -> its base."""
    if len(bundles) not in (1, len(seeds)):
        raise InputError(
            f"{len(bundles)} models and {len(seeds)} seeds do not go together",
            remedy="Pass one model, or one for each seed in the same order.",
        )
    first = bundles[0]
    for bundle in bundles[1:]:
        if bundle.spec != first.spec or bundle.layout.shapes != first.layout.shapes:
            raise InputError(
                "the models are not of one architecture, size, classes and preprocessing",
                remedy="Compare nets that differ in the seed of their training only.",
            )
    return dict(zip(seeds, bundles if len(bundles) > 1 else [first] * len(seeds), strict=True))


def _measure_bases(folder: CompareFolder, bases: dict[int, Bundle], bench: Bench) -> None:
    """Enter each seed's base that the folder does not have; one net is measured once."""
    weights = {id(bundle): tensor_digest(bundle.net.state_dict()) for bundle in bases.values()}
    for seed, bundle in bases.items():
        digest = weights[id(bundle)]
        bundle.net.to(bench.device).eval()
        if folder.check_base(seed, digest):
            continue
        same = next((base for base in folder.bases.rows if base.weights == digest), None)
        folder.bases.add(replace(same, seed=seed) if same else _base_figures(bundle.net, bench, seed, digest))


def _base_figures(net: nn.Module, bench: Bench, seed: int, digest: str) -> BaseFigures:
    right = bench.right(net)
    macs = count_macs(net, bench.images(seed)[:1])
    console.log(f"base of seed {seed}: {100 * right.mean():.2f} % on {bench.comparison.split}")
    return BaseFigures(seed, digest, macs, count_params(net), pack(right), len(right))


def _start(net: nn.Module, bench: Bench, seed: int, methods: Sequence[Method]) -> Start:
    """Trace the base, and measure once all that the methods of this seed need."""
    policy = bench.comparison.policy
    coupling = trace(net, bench.images(seed)[:1], eca_neighbours=policy.eca_neighbours)
    for method in methods:
        if not method.from_scratch:
            criterion_for(coupling, method.criterion)
    stats = calibrate(
        net,
        coupling,
        bench.calibration(seed),
        evidence=frozenset().union(*(method.needs for method in methods)),
        device=bench.device,
        data_id=bench.source.fingerprint,
    )
    return Start(seed, net, coupling, stats)


# ---- one cell -------------------------------------------------------------------------------------
def run_cell(start: Start, bench: Bench, method: Method, point: Point) -> Cell:
    """Make and measure one smaller net."""
    started = time.monotonic()
    cut = cut_net(start, bench, UNIFORM if method.from_scratch else method, point)
    key = f"{method.name}-{point.target}-{point.value:g}-{start.seed}"
    checkpoint = bench.checkpoints / f"{key}.checkpoint"
    right = {}
    one_shot = None
    with seeded(start.seed):
        if method.from_scratch:
            config, teacher = bench.comparison.scratch, None
            reset_parameters(cut.net)
        else:
            config, teacher = bench.comparison.finetune, start.net
            one_shot = float(bench.right(cut.net).mean())
            images = bench.comparison.recalibration_images
            restore(
                cut,
                start.net,
                bench.calibration(start.seed, max(bench.comparison.calibration_images, images)),
                compensate=method.refit,
                images=images,
                device=bench.device,
            )
            right["recalibrated"] = bench.right(cut.net)
        if config is not None:
            _train(cut.net, bench, config, seed=start.seed, teacher=teacher, checkpoint=checkpoint)
            right["tuned"] = bench.right(cut.net)
    checkpoint.unlink(missing_ok=True)
    means = {phase: float(values.mean()) for phase, values in right.items()}
    return Cell(
        method=method.name,
        target=point.target,
        value=point.value,
        seed=start.seed,
        macs_ratio=cut.plan.macs_after / cut.plan.macs_before,
        params_ratio=cut.plan.params_after / cut.plan.params_before,
        one_shot=one_shot,
        recalibrated=means.get("recalibrated"),
        tuned=means.get("tuned"),
        right={phase: pack(values) for phase, values in right.items()},
        seconds=time.monotonic() - started,
        unchecked=None if cut.check.passed else cut.check.reason,
    )


def cut_net(start: Start, bench: Bench, method: Method, point: Point) -> Surgery:
    """The base, cut by the method to the point's size."""
    policy = point.policy(method.policy(bench.comparison.policy))
    with seeded(start.seed):
        return prune_channels(
            start.net,
            start.coupling,
            start.ranking(method.criterion),
            policy,
            images=bench.images(start.seed),
            moments=start.stats if method.refit else None,
            allow_vacuous=True,  # a net that is cut to nothing is a result; its cell says so
        )


def reset_parameters(net: nn.Module) -> None:
    """Draw first weights again, as each layer draws its own and then the architecture its nets'."""
    for name, module in reversed(list(net.named_modules())):  # what is inside first
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif own := [key for key, _ in module.named_parameters(recurse=False)]:
            raise InputError(
                f"'scratch': {name or 'the net'} can't draw {', '.join(own)} again",
                remedy="Leave 'scratch' out, or give that module a reset_parameters().",
            )


def _train(
    net: nn.Module,
    bench: Bench,
    config: TrainConfig,
    *,
    seed: int,
    teacher: nn.Module | None,
    checkpoint: Path,
) -> None:
    train(
        net,
        bench.source,
        config=replace(config, seed=seed),
        device=bench.device,
        teacher=teacher if config.distill_weight > 0 else None,
        checkpoint=checkpoint,
    )


# ---- how long it takes ----------------------------------------------------------------------------
Key = tuple[Method, Point, int]


def _seed(key: Key) -> int:
    return key[2]


class Progress:
    """Says before the first cell how long all take, and after each how long the rest will."""

    def __init__(self, *, total: int, left: Sequence[Key]) -> None:
        self.total = total
        self.left = list(left)
        self.estimated = False
        self.began = time.monotonic()
        self._evidence = 0.0  # seconds, of a start
        self._costs: dict[tuple[bool, Point], float] = {}  # (from scratch, point) -> seconds of a cell
        self._predicted = 0.0  # seconds, of the finished cells

    def estimate(self, start: Start, bench: Bench) -> None:
        """Time an evaluation and a few training steps at each point, with a first start at hand."""
        self.estimated = True
        self._evidence = time.monotonic() - self.began
        for method, point, _ in self.left:
            if (method.from_scratch, point) not in self._costs:
                cost = _cell_seconds(start, bench, point, from_scratch=method.from_scratch)
                self._costs[method.from_scratch, point] = cost
        starts = len(list(groupby(self.left, key=_seed)))
        seconds = sum(map(self._cost, self.left)) + (starts - 1) * self._evidence
        console.log(f"about {duration(seconds)} for {len(self.left)} cells")
        self.began = time.monotonic()

    def report(self, cell: Cell) -> None:
        """One line for a finished cell."""
        self._predicted += self._cost(self.left.pop(0))
        gone = time.monotonic() - self.began
        rest = sum(map(self._cost, self.left)) * gone / max(self._predicted, 1e-9)
        figures = {"one-shot": cell.one_shot, "recalibrated": cell.recalibrated, "tuned": cell.tuned}
        shown = ", ".join(f"{name} {100 * top1:.2f}" for name, top1 in figures.items() if top1 is not None)
        console.log(
            f"[{self.total - len(self.left)}/{self.total}] {cell.method}, {cell.point}, seed {cell.seed}: "
            f"{shown} % ({duration(cell.seconds)}; {duration(gone)} gone, about {duration(rest)} to go)"
        )

    def _cost(self, key: Key) -> float:
        method, point, _ = key
        return self._costs[method.from_scratch, point]


def _cell_seconds(start: Start, bench: Bench, point: Point, *, from_scratch: bool) -> float:
    """What a cell would take, from the uniform net of the point."""
    started = time.perf_counter()
    net = cut_net(start, bench, UNIFORM, point).net
    cutting = time.perf_counter() - started
    started = time.perf_counter()
    n = len(bench.right(net))
    evaluating = time.perf_counter() - started
    config = bench.comparison.scratch if from_scratch else bench.comparison.finetune
    if config is None:
        return cutting + 2 * evaluating
    teacher = None if from_scratch or config.distill_weight == 0 else start.net
    epoch = time_epoch(net, bench.source, config=config, device=bench.device, teacher=teacher)
    validating = evaluating * bench.source.splits.get("val", 0) / max(n, 1)
    return cutting + 3 * evaluating + config.epochs * (epoch + validating)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
