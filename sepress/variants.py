"""The float file of a run -> fp16 and int8 files beside it, each kept only where it holds a constraint.

Validation decides, against the float file of the same net: what is told is what the precision costs.
Whatever is kept is measured once more, on the split that no choice has touched.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepress import console
from sepress.constraints import Constraint, ConstraintResult, parse_constraint
from sepress.constraints import evaluate as hold
from sepress.errors import InputError
from sepress.job import Job, batch_size, workers
from sepress.precision import (
    METHODS,
    CalibrationMethod,
    Ranges,
    answering,
    find_gate_nodes,
    fixed_batch,
    kernels_saturate,
    load_named,
    measure_ranges,
    to_fp16,
    to_int8,
)
from sepress.pruning import not_measured
from sepress.runtime import measure_onnx_latency, open_session
from sepress.train import Accuracy, count_right
from sepress.types import JSON, Measurement, Variant

FLOAT = "float32"
GATE_IMAGES = 32  # that each gate's share of the error is measured on: the shares lie decades apart
LOUD = 0.9  # of the error that quantised gates add: those that add it can stay float


@dataclass(frozen=True)
class Candidate:
    """One file that may be kept, and what it does on validation."""

    precision: str
    how: str
    path: Path
    accuracy: Accuracy
    agreement: float | None


@dataclass(frozen=True)
class Made:
    """The variants of a file, the float one first, and where those that are kept lie."""

    variants: tuple[Variant, ...]
    files: Mapping[str, Path]  # precision -> file
    notes: tuple[str, ...]


def make_variants(job: Job, settings: Any) -> Made:
    """Make and judge the formats of a precision stage; what is not kept leaves no file behind.

    Raises InputError where the constraint can't be told of a file on validation.
    """
    source = job.artifact("onnx")
    assert source is not None  # the recipe's order
    constraint = parse_constraint(settings.within)
    judge = _Judge(job, source)
    with tempfile.TemporaryDirectory(prefix=".precision.partial-", dir=job.folder.path) as name:
        folder = Path(name)
        candidates = [c for form in settings.formats for c in _FORMATS[form](judge, settings, folder)]
        rows = _timed(judge, candidates, settings.latency_rounds, constraint)
        results = [hold(constraint, [rows[0], row], base=FLOAT) for row in rows[1:]]
        variants, files = (
            [Variant(FLOAT, True, "as exported", "what the others are held to", None, rows[0])],
            {},
        )
        notes = [_note(*each) for each in zip(candidates, rows[1:], results, strict=True)]
        for precision in settings.formats:
            tried = [i for i, c in enumerate(candidates) if c.precision == precision]
            best = _best(tried, candidates, rows[1:], results)
            chosen, result = candidates[best], results[best]
            final = job.folder.file(f"{source.stem}.{precision}.onnx")
            if result.passed:
                files[precision] = chosen.path.replace(final)
            else:
                final.unlink(missing_ok=True)
            variants.append(
                Variant(precision, result.passed, chosen.how, str(result), chosen.agreement, rows[1 + best])
            )
    kept = {FLOAT: source, **files} if files else {}
    finals = {precision: judge.finally_(precision, path) for precision, path in kept.items()}
    return Made(tuple(replace(v, final=finals.get(v.precision)) for v in variants), files, tuple(notes))


def _best(
    tried: Sequence[int],
    candidates: Sequence[Candidate],
    rows: Sequence[Measurement],
    results: Sequence[ConstraintResult],
) -> int:
    """Of the fastest that hold, and where none does of all, the one nearest to the float file."""
    holding = [i for i in tried if results[i].passed]
    if holding:
        fastest = min(holding, key=lambda i: _time(rows[i], "ratio"))
        tried = [i for i in holding if _time(rows[i], "ratio_low") <= _time(rows[fastest], "ratio_high")]
    return max(tried, key=lambda i: candidates[i].agreement or 0.0)


def _time(row: Measurement, figure: str) -> float:
    return float((row.latency or {})[figure])


def _note(candidate: Candidate, row: Measurement, result: ConstraintResult) -> str:
    """One line for each file that was tried."""
    same = "" if candidate.agreement is None else f", same top class on {candidate.agreement:.2%}"
    time = f", {_time(row, 'ratio'):.2f}x the time of {FLOAT}"
    return f"{candidate.precision} tried, {candidate.how}: {result}{same}{time}"


# ---- measuring ------------------------------------------------------------------------------------
class _Judge:
    """The float file, and how other files compare with it on the job's images."""

    def __init__(self, job: Job, source: Path) -> None:
        self.job = job
        self.source = source
        self.accuracy, self._top = self._classify(source, "val")

    def judge(self, precision: str, how: str, path: Path) -> Candidate:
        accuracy, top = self._classify(path, "val")
        known = len(top) and len(top) == len(self._top)
        agreement = (top == self._top).double().mean().item() if known else None
        top1 = "unknown" if accuracy.top1 is None else f"{accuracy.top1:.2%}"
        same = "" if agreement is None else f", same top class as {FLOAT} on {agreement:.2%}"
        console.log(f"{precision}, {how}: top-1 on validation {top1}{same}")
        return Candidate(precision, how, path, accuracy, agreement)

    def finally_(self, precision: str, path: Path) -> Measurement | None:
        """The accuracy on the split that the recipe evaluates on; None where that is validation."""
        stages = {stage.kind: stage for stage in self.job.recipe.stages}
        split = getattr(stages.get("evaluate"), "split", "test")
        return None if split == "val" else _row(precision, path, self._classify(path, split)[0])

    def _classify(self, path: Path, split: str) -> tuple[Accuracy, Tensor]:
        """The file's accuracy on a split, and its top class for each image (N,), -1 where not finite."""
        job = self.job
        tops: list[Tensor] = []
        answer = answering(open_session(path, providers="cpu", threads=job.recipe.threads))

        def remembering(images: Tensor) -> list[Tensor]:
            outputs = answer(images)
            first = outputs[0].flatten(1)
            tops.append(first.argmax(1).where(first.isfinite().all(1), -1))
            return outputs

        accuracy = count_right(
            remembering,
            job.source,
            split=split,
            device=torch.device("cpu"),
            batch_size=batch_size(job.recipe),
            workers=workers(job.recipe),
        )
        return accuracy, torch.cat(tops) if tops else torch.empty(0)


def _row(
    precision: str, path: Path, accuracy: Accuracy, latency: Mapping[str, JSON] | None = None
) -> Measurement:
    figures = asdict(accuracy)
    reason = figures.pop("reason") or "not measured"
    missing = dict.fromkeys(("split", "n", "top1", "top5", "loss"), reason)
    missing |= dict.fromkeys(("macs", "params"), "the same in every precision")
    missing |= dict.fromkeys(("latency", "latency_ms"), "timed with validation's figures")
    timed = {} if latency is None else {"latency": latency, "latency_ms": latency["median_ms"]}
    return not_measured(precision, missing, bytes=path.stat().st_size, **figures, **timed)


def _timed(
    judge: _Judge, candidates: Sequence[Candidate], rounds: int, constraint: Constraint
) -> list[Measurement]:
    """The float file and the candidates as measured on validation, timed beside each other."""
    example = judge.job.images(fixed_batch(judge.source) or 1).cpu()
    paths = {FLOAT: judge.source} | {c.path.stem: c.path for c in candidates}
    console.log("timing on ONNX Runtime")
    timings = measure_onnx_latency(paths, example, rounds=rounds)
    rows = [_row(FLOAT, judge.source, judge.accuracy, timings[FLOAT])]
    known = hold(constraint, [rows[0], replace(rows[0], label="itself")], base=FLOAT)
    if known.actual is None:
        raise InputError(
            f"{constraint} can't be told of a file on validation: {known.reason}",
            remedy="Hold accuracy, size or latency: top1_drop<=0.01, bytes_ratio<=0.5, latency_ratio<=1.",
        )
    return rows + [_row(c.precision, c.path, c.accuracy, timings[c.path.stem]) for c in candidates]


# ---- the formats ----------------------------------------------------------------------------------
def _fp16(judge: _Judge, settings: Any, folder: Path) -> Iterator[Candidate]:
    path = folder / "fp16.onnx"
    kept = to_fp16(judge.source, path, calibration=judge.job.calibration(settings.range_images))
    how = f"{len(kept)} operators stay {FLOAT}, beyond float16's range" if kept else "all of it"
    yield judge.judge("fp16", how, path)


def _int8(judge: _Judge, settings: Any, folder: Path) -> Iterator[Candidate]:
    """All quantised, by each method; by the best of these also with gates in float."""
    methods = METHODS if settings.calibration == "auto" else (settings.calibration,)
    ranges: dict[CalibrationMethod, Ranges] = {}
    found: dict[CalibrationMethod, Candidate] = {}
    weights = ", 7-bit weights (8 saturate on this machine)" if kernels_saturate() else ""
    for method in methods:
        images = judge.job.calibration(settings.range_images)
        ranges[method] = measure_ranges(judge.source, images, method=method)
        path = folder / f"int8-{method}.onnx"
        to_int8(judge.source, path, ranges=ranges[method])
        found[method] = judge.judge("int8", f"{method} calibration{weights}, all quantised", path)
    yield from found.values()
    best = max(methods, key=lambda method: found[method].agreement or 0.0)
    for name, gates in _float_gates(judge, ranges[best], folder):
        path = folder / f"int8-{best}-{len(gates)}.onnx"
        to_int8(judge.source, path, ranges=ranges[best], in_float=[node for gate in gates for node in gate])
        yield judge.judge("int8", f"{best} calibration{weights}, {name} in float", path)


_FORMATS = {"fp16": _fp16, "int8": _int8}


def _float_gates(
    judge: _Judge, ranges: Ranges, folder: Path
) -> Iterator[tuple[str, Sequence[Sequence[str]]]]:
    """Choices of gates to leave in float, by name: the fewest that add LOUD of the error, and all.

    A gate's error is that of the outputs where it alone is quantised, squared, over calibration images.
    """
    gates = list(find_gate_nodes(load_named(judge.source)).values())
    if not gates:
        return
    images = judge.job.images(GATE_IMAGES).cpu()
    expected = _first_output(judge.source, images)
    errors, alone = [], folder / "alone.onnx"
    for gate in console.track(gates, "quantising each gate alone"):
        to_int8(judge.source, alone, ranges=ranges, only=gate)
        errors.append((_first_output(alone, images) - expected).double().square().mean().item())
    loudest = fewest_loud(errors)
    if 0 < len(loudest) < len(gates):
        yield f"the {len(loudest)} of {len(gates)} gates that add most error", [gates[i] for i in loudest]
    yield f"all {len(gates)} gates", gates


def fewest_loud(errors: Sequence[float]) -> list[int]:
    """The fewest positions whose errors add up to LOUD of all, the largest first."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    total, found, so_far = sum(errors), [], 0.0
    for position in order:
        if so_far >= LOUD * total:
            break
        found.append(position)
        so_far += errors[position]
    return found


def _first_output(path: Path, images: Tensor) -> Tensor:
    return answering(open_session(path, providers="cpu", threads=1))(images)[0]
