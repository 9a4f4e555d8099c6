"""Time a net's layers on ONNX Runtime at many widths -> a latency table (costs.LatencyTable).

Nets of random widths are cut from the given one, exported and run with the runtime's own profiler, in turn
with the whole net, so that a machine that slows down for a while slows both. What a layer took, with the
norm, activation and data movement that follow it, is fitted by non-negative least squares over the widths
that it had (features as in costs). Weights don't matter for that, so none are trained. Then whole nets that
the fit has not seen are timed, and the error of their predicted ratios is kept with the table.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from sepress import console
from sepress.costs import LatencyTable, predictor
from sepress.coupling import Coupling, apply_removal
from sepress.errors import InputError, SepressError
from sepress.export import Exporter, export_onnx
from sepress.measure import Inputs, cpu_model
from sepress.plan import plan_pruning
from sepress.profile.fitting import Sample, fit_overhead, fit_table
from sepress.profile.operators import assign, profile_files
from sepress.runtime import measure_onnx_latency
from sepress.types import Policy, Ranking, Removed

__all__ = ["aim_table", "profile_latency", "random_removal", "table_for"]

VARIANTS = 27  # a layer's time has up to four unknowns: six samples each
ADJUSTMENT = 5  # nets timed whole, by which the profiler's own time is taken off
VALIDATION = 6  # nets timed whole, by which the error is told
ROUNDS = 12  # profiled runs of a net and of the base, in turn
LEAST_KEPT = 0.15  # of a group: the planner removes up to 85 %
NEAR = 0.02  # of a target in latency: nearer can't be told on a machine that is not quiet
MAX_AIMS = 4  # plans that are timed for it


def profile_latency(
    net: nn.Module,
    coupling: Coupling,
    example: Tensor,
    *,
    threads: int = 1,
    variants: int = VARIANTS,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> LatencyTable:
    """Measure a latency table of the net on ONNX Runtime's CPU provider.

    `example` is (N, C, H, W): the batch and size that will be deployed. Raises InputError for a net from
    which nothing can be removed, and SepressError where the profiler's operators can't be matched to layers.
    """
    if not coupling.prunable():
        raise InputError("nothing of this net can be removed: there is no width to time")
    random = np.random.default_rng(seed)
    removals = [random_removal(coupling, random, rounded=bool(i % 3)) for i in range(variants)]
    with tempfile.TemporaryDirectory(prefix="sepress-") as folder:
        files = Variants(net, coupling, example, Path(folder))
        base, samples = files.export({}), []
        for removed in console.track([{}, *removals], "timing layers at many widths"):
            pair = [base, files.export(removed)]
            whole, own = profile_files(pair, example, threads=threads, rounds=rounds)
            took = [
                assign(events, coupling.layers(gone), batch=len(example))
                for events, gone in ((whole, {}), (own, removed))
            ]
            samples.append(Sample(removed, *took))
        table = fit_table(coupling, samples)
        nets: dict[str, Removed] = {"base": {}}
        nets |= {
            str(i): random_removal(coupling, random, rounded=True) for i in range(ADJUSTMENT + VALIDATION)
        }
        paths = {label: files.export(removed) for label, removed in nets.items()}
        timed = measure_onnx_latency(paths, example, threads=threads)
    predicted = np.array([table.predict_ns(coupling, removed) for removed in nets.values()])
    measured = np.array([float(timed[label]["ratio"]) for label in nets])
    overhead = fit_overhead(predicted[: ADJUSTMENT + 1], measured[: ADJUSTMENT + 1])
    ratios = (predicted + overhead) / (predicted[0] + overhead)
    errors = np.abs(ratios / measured - 1)[ADJUSTMENT + 1 :]
    kept = ("runtime", "provider", "threads", "batch", "input_shape")
    return replace(
        table,
        overhead=overhead,
        conditions={key: timed["base"][key] for key in kept} | {"cpu": cpu_model()},
        validation={
            "predicted": ratios[ADJUSTMENT + 1 :].tolist(),
            "measured": measured[ADJUSTMENT + 1 :].tolist(),
            "median_error": float(np.median(errors)),
            "worst_error": float(errors.max()),
            "base_ms": timed["base"]["median_ms"],
        },
    )


def random_removal(coupling: Coupling, random: np.random.Generator, *, rounded: bool) -> Removed:
    """Widths around one random level, so that small and large nets are seen; `rounded` to eight units."""
    level = random.uniform(0.2, 1.0)
    removed = {}
    for group in coupling.prunable():
        share = np.clip(level + random.uniform(-0.35, 0.35), LEAST_KEPT, 1.0)
        keep = max(1, round(share * group.units))
        if rounded and group.units >= 16:
            keep = max(8, round(keep / 8) * 8)
        if keep < group.units:
            removed[group.name] = tuple(range(keep, group.units))
    return removed


class Variants:
    """Nets with units removed, as ONNX files in a folder."""

    def __init__(self, net: nn.Module, coupling: Coupling, example: Tensor, folder: Path) -> None:
        self._net = copy.deepcopy(net).cpu().eval()
        self._coupling, self._example, self._folder = coupling, example.cpu(), folder
        self._exporter: Exporter = "torchscript"  # the same time when run, and several times faster to write
        self._count = 0

    def export(self, removed: Removed) -> Path:
        net = copy.deepcopy(self._net)
        apply_removal(net, self._coupling, removed)
        self._count += 1
        path = self._folder / f"{self._count}.onnx"
        try:
            self._write(net, path)
        except SepressError:
            if self._exporter == "dynamo":
                raise
            self._exporter = "dynamo"
            self._write(net, path)
        return path

    def _write(self, net: nn.Module, path: Path) -> None:
        batch = len(self._example)
        export_onnx(net, path, example=self._example, batch=batch, exporter=self._exporter)


# ---- a target in latency --------------------------------------------------------------------------
def aim_table(
    net: nn.Module,
    coupling: Coupling,
    ranking: Ranking,
    policy: Policy,
    example: Tensor,
    *,
    table: LatencyTable,
    threads: int = 1,
) -> tuple[LatencyTable, str]:
    """Correct a table until the plan that it leads to was measured to meet the policy's target_latency.

    Each round plans, times the planned net whole beside the base, and moves the table's overhead to what was
    measured. Returns the table, by which the same plan is made again, and a note of what was measured.
    """
    target = policy.target_latency
    assert target is not None
    with tempfile.TemporaryDirectory(prefix="sepress-") as folder:
        files = Variants(net, coupling, example, Path(folder))
        base = files.export({})
        for aim in console.track(range(MAX_AIMS), "timing planned nets"):
            plan = plan_pruning(ranking, coupling, policy=policy, latency=predictor(coupling, table))
            paths = {"base": base, "planned": files.export(plan.removed)}
            measured = float(measure_onnx_latency(paths, example, threads=threads)["planned"]["ratio"])
            if abs(measured / target - 1) <= NEAR or aim == MAX_AIMS - 1:
                break
            table = _corrected(table, coupling, plan.removed, measured)
    return table, f"asked for {target:.3g} of the base's latency; the plan was timed at {measured:.3f} of it"


def _corrected(table: LatencyTable, coupling: Coupling, removed: Removed, measured: float) -> LatencyTable:
    """The table whose prediction for that removal is what was measured.

    No constant makes a net that was no faster out of one that should have been: all but all of the time is
    then beside the layers.
    """
    sums = np.array([table.predict_ns(coupling, gone) - table.overhead for gone in ({}, removed)])
    return replace(table, overhead=fit_overhead(sums, np.array([1.0, min(measured, 0.99)])))


def table_for(
    net: nn.Module,
    coupling: Coupling,
    ranking: Ranking,
    policy: Policy,
    inputs: Inputs,
    *,
    given: LatencyTable | None,
) -> tuple[LatencyTable | None, tuple[str, ...]]:
    """The table that a policy is planned by, and notes of it: the given one; else, for a target in latency,
    one timed on this machine and aimed at it (`aim_table`); else None, for the coarse one. Of `inputs`, what
    the net takes, the first image is timed; InputError where it takes several.
    """
    if given is not None:
        on = ", ".join(str(given.conditions[key]) for key in ("provider", "cpu") if key in given.conditions)
        return given, (f"latency is planned for by a given table ({on})",)
    if policy.target_latency is None:
        return None, ()
    if isinstance(inputs, tuple) and len(inputs) > 1:
        raise InputError(
            f"the net takes {len(inputs)} inputs, and layers are timed on nets of one",
            remedy="Pass a latency table, or a target in MACs or parameters.",
        )
    example = (inputs[0] if isinstance(inputs, tuple) else inputs)[:1]
    console.log("no latency table is given: timing this net's layers on this machine")
    table = profile_latency(net, coupling, example)
    table, note = aim_table(net, coupling, ranking, policy, example, table=table)
    console.log(note)
    return table, (note,)
