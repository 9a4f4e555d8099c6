"""Cells -> means, deviations and paired differences; as Markdown and JSON. Pure, but for scipy's tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from sepress.compare.folder import SCHEMA, BaseFigures, Cell, Comparison, Point, unpack
from sepress.schedule import TrainConfig
from sepress.types import JSON

PHASES = ("one_shot", "recalibrated", "tuned")
PAIRED = ("recalibrated", "tuned")  # the phases after which a cell keeps which images were right
BEYOND = 2  # standard errors, from which on a difference is marked


@dataclass(frozen=True)
class Difference:
    """A method's top-1 less the reference's, over the seeds that both have: the same base and images.

    `se_seeds` is the standard deviation of the seeds' differences over sqrt(seeds); `se_images` what the
    choice of test images alone gives: of one seed sqrt(b + c - (b - c)^2 / n) / n, b images being right with
    the method only, c with the reference only. A few seeds may agree by chance, so `se` is the larger.
    `mcnemar` is each seed's p that b and c are even (exact, two-sided; McNemar 1947).
    """

    mean: float
    se_seeds: float | None  # None of one seed
    se_images: float
    mcnemar: Mapping[int, float]

    @property
    def se(self) -> float:
        return max(self.se_images, self.se_seeds or 0.0)

    @property
    def sign(self) -> int:
        """1 or -1 where the difference is beyond two standard errors, else 0."""
        return 0 if abs(self.mean) <= BEYOND * self.se else (1 if self.mean > 0 else -1)

    def to_json(self) -> dict[str, JSON]:
        return {**asdict(self), "se": self.se, "beyond_two_se": self.sign}


def paired_difference(pairs: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Difference:
    """Seed -> the images (n,) that the method and the reference are right on -> their difference."""
    from scipy.stats import binomtest

    means, variances, mcnemar = [], [], {}
    for seed, (ours, theirs) in pairs.items():
        n, b, c = len(ours), int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        means.append((b - c) / n)
        variances.append((b + c - (b - c) ** 2 / n) / n**2)
        mcnemar[seed] = float(binomtest(b, b + c).pvalue) if b + c else 1.0
    k = len(means)
    return Difference(
        mean=statistics.fmean(means),
        se_seeds=statistics.stdev(means) / math.sqrt(k) if k > 1 else None,
        se_images=math.sqrt(sum(variances)) / k,
        mcnemar=mcnemar,
    )


@dataclass(frozen=True)
class Row:
    """One method at one point, over its seeds."""

    method: str
    point: Point
    seeds: tuple[int, ...]
    macs_ratio: float
    params_ratio: float
    mean: Mapping[str, float | None]  # phase -> top-1
    std: Mapping[str, float | None]  # sample standard deviation; None of one seed
    drop: float | None  # after the last phase, below each seed's own base
    against: Mapping[str, Difference]  # phase -> difference from the reference; none of itself

    @property
    def final(self) -> float:
        """The mean after the last phase there is."""
        return next(v for phase in reversed(PHASES) if (v := self.mean[phase]) is not None)

    def to_json(self) -> dict[str, JSON]:
        return {
            "method": self.method,
            "target": self.point.target,
            "value": self.point.value,
            "seeds": list(self.seeds),
            "macs_ratio": self.macs_ratio,
            "params_ratio": self.params_ratio,
            **self.mean,
            **{f"{phase}_std": value for phase, value in self.std.items()},
            "drop": self.drop,
            "against": {phase: difference.to_json() for phase, difference in self.against.items()},
        }


@dataclass(frozen=True)
class Table:
    """All cells of a folder, and the bases they are measured against."""

    comparison: Comparison
    model: str
    trained: bool
    bases: tuple[BaseFigures, ...]
    cells: tuple[Cell, ...]
    environment: Mapping[str, JSON]

    @property
    def points(self) -> tuple[Point, ...]:
        """All that the folder holds, from the largest share to the smallest."""
        return tuple(
            sorted({cell.point for cell in self.cells}, key=lambda point: (point.target, -point.value))
        )

    @property
    def methods(self) -> tuple[str, ...]:
        named = (method.name for method in self.comparison.methods)
        return tuple(dict.fromkeys((*named, *(cell.method for cell in self.cells))))

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A row a method and point, point after point, the best first."""
        rows = []
        for point in self.points:
            here = [self._row(method, point) for method in self.methods]
            rows += sorted((row for row in here if row is not None), key=lambda row: -row.final)
        return tuple(rows)

    def _cells(self, method: str, point: Point) -> dict[int, Cell]:
        return {cell.seed: cell for cell in self.cells if (cell.method, cell.point) == (method, point)}

    def _row(self, method: str, point: Point) -> Row | None:
        cells = self._cells(method, point)
        if not cells:
            return None
        values = {p: [v for c in cells.values() if (v := getattr(c, p)) is not None] for p in PHASES}
        bases = {base.seed: base.top1 for base in self.bases}
        last = [next(v for p in reversed(PHASES) if (v := getattr(c, p)) is not None) for c in cells.values()]
        return Row(
            method=method,
            point=point,
            seeds=tuple(sorted(cells)),
            macs_ratio=statistics.fmean(cell.macs_ratio for cell in cells.values()),
            params_ratio=statistics.fmean(cell.params_ratio for cell in cells.values()),
            mean={phase: statistics.fmean(found) if found else None for phase, found in values.items()},
            std={p: statistics.stdev(found) if len(found) > 1 else None for p, found in values.items()},
            drop=statistics.fmean(bases[seed] - top1 for seed, top1 in zip(cells, last, strict=True)),
            against={} if method == self.comparison.reference else self._against(cells, point),
        )

    def _against(self, cells: Mapping[int, Cell], point: Point) -> dict[str, Difference]:
        reference = self._cells(self.comparison.reference, point)
        n = {base.seed: base.n for base in self.bases}
        found = {}
        for phase in PAIRED:
            pairs = {
                seed: (unpack(cell.right[phase], n[seed]), unpack(reference[seed].right[phase], n[seed]))
                for seed, cell in cells.items()
                if seed in reference and phase in cell.right and phase in reference[seed].right
            }
            if pairs:
                found[phase] = paired_difference(pairs)
        return found

    # ---- as text ----------------------------------------------------------------------------------
    def to_json(self) -> dict[str, JSON]:
        """Plain values; which images were right stays in the folder's files."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "trained": self.trained,
            "settings": self.comparison.settings(),
            "reference": self.comparison.reference,
            "bases": [{**_without_images(base), "top1": base.top1} for base in self.bases],
            "rows": [row.to_json() for row in self.rows],
            "cells": [_without_images(cell) for cell in self.cells],
            "environment": dict(self.environment),
        }

    def to_markdown(self) -> str:
        """The tables as Markdown, one for each point, with what ran, on what, and with which seeds."""
        lines = [] if self.trained else ["**UNTRAINED: the net has random weights.**", ""]
        lines += self._what_ran()
        for point in self.points:
            lines += ["", f"**{point}**", "", *self._table(point)]
        machine = {k: self.environment.get(k) for k in ("cpu", "threads", "torch", "sepress")}
        lines += ["", "Machine: " + ", ".join(f"{k} {v}" for k, v in machine.items() if v is not None) + "."]
        return "\n".join(lines) + "\n"

    def _what_ran(self) -> list[str]:
        c, base = self.comparison, self.bases[0]
        seeds = f"seed{'s' if len(self.bases) > 1 else ''} {', '.join(str(b.seed) for b in self.bases)}"
        if len(self.bases) > 1:
            seeds += ", a base net for each" if self._several_bases else ", one base net"
            seeds += " (mean ± sample standard deviation)"
        return [
            f"Top-1 (%) of {self.model} on {c.split} (n = {base.n:,}); base {base.macs / 1e6:.2f} MMACs, "
            f"{base.params / 1e3:,.1f} k parameters.",
            f"{c.calibration_images} calibration images, BN recalibrated on {c.recalibration_images}, "
            f"{_schedule(c.finetune)}; {seeds}; {c.policy.scope} widths where no @scope is named, "
            f"rounded to {c.policy.round_to}.",
            *([f"scratch: random weights, {_schedule(c.scratch, taught=False)}."] if self._scratch else []),
            "One-shot is right after surgery, before anything is recalibrated: its order misleads. "
            "With +refit, readers were refitted before the cut, "
            "and recalibrated is after the passes that refit all layers.",
            f"Δ: difference from {c.reference} in points ± standard error, over the same images of the same "
            "seeds: the larger of what the spread over seeds and what the choice of images gives. "
            f"▲ and ▼: beyond {BEYOND} standard errors.",
            *(
                f"Not verified: {cell.method}, {cell.point}, seed {cell.seed}: {cell.unchecked}."
                for cell in self.cells
                if cell.unchecked
            ),
        ]

    @property
    def _several_bases(self) -> bool:
        return len({base.weights for base in self.bases}) > 1

    @property
    def _scratch(self) -> bool:
        return self.comparison.scratch is not None and "scratch" in self.methods

    def _table(self, point: Point) -> list[str]:
        rows = [row for row in self.rows if row.point == point]
        tuned = any(row.mean["tuned"] is not None for row in rows)
        phases = PHASES if tuned else PHASES[:2]
        names = {"one_shot": "one-shot", "recalibrated": "recalibrated", "tuned": "fine-tuned"}
        header = ["method", "MACs kept"]
        for phase in phases:
            header += [names[phase], *(["Δ"] if phase in PAIRED else [])]
        header += ["drop"] if self._several_bases else []
        lines = [_line(header), "|---|" + "---:|" * (len(header) - 1), _line(self._base_cells(len(header)))]
        for row in rows:
            few = "" if len(row.seeds) == len(self.bases) else f" (seeds {', '.join(map(str, row.seeds))})"
            cells = [row.method + few, f"{row.macs_ratio:.3f}"]
            for phase in phases:
                cells.append(_percent(row.mean[phase], row.std[phase]))
                cells += [_difference(row.against.get(phase))] if phase in PAIRED else []
            cells += [_percent(row.drop, None)] if self._several_bases else []
            lines.append(_line(cells))
        return lines

    def _base_cells(self, columns: int) -> list[str]:
        """The bases' row: their top-1 stands where the table's last figure stands."""
        top1 = [base.top1 for base in self.bases]
        cells = ["base", "1.000", *[""] * (columns - 2)]
        place = columns - 3 if self._several_bases else columns - 2
        cells[place] = _percent(
            statistics.fmean(top1), statistics.stdev(top1) if self._several_bases else None
        )
        return cells


def _without_images(fact: BaseFigures | Cell) -> dict[str, JSON]:
    return {name: value for name, value in asdict(fact).items() if name != "right"}


def _schedule(config: TrainConfig | None, *, taught: bool = True) -> str:
    if config is None:
        return "no fine-tuning"
    distilled = (
        f", distilled with weight {config.distill_weight:g}" if taught and config.distill_weight else ""
    )
    what = "fine-tuning" if taught else "training"
    epochs = f"{config.epochs} epoch" + ("" if config.epochs == 1 else "s")
    return f"{epochs} of {what} ({config.optimizer}, lr {config.lr:g}{distilled})"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _difference(found: Difference | None) -> str:
    if found is None:
        return ""
    mark = {1: " ▲", -1: " ▼", 0: ""}[found.sign]
    return f"{100 * found.mean:+.2f} ± {100 * found.se:.2f}{mark}"
