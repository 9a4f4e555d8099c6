"""A net -> MACs and parameters; callables -> latencies from one interleaved timer; this machine -> facts."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sepress.defaults import LATENCY_ROUNDS
from sepress.modes import evaluating
from sepress.types import JSON

Inputs = Tensor | tuple[Tensor, ...]

WARMUP = 5  # rounds that are not counted: allocators and caches settle
MIN_ROUNDS = 3  # taken whatever the time budget says: fewer have no spread
TIME_BUDGET_S = 60.0
NOISY_SPREAD = 0.3  # (p90 - p10) / median above which a difference of 10 % can't be told


# ---- size and work of a net -----------------------------------------------------------------------
def count_macs(net: nn.Module, inputs: Inputs) -> int:
    """Count the multiply-accumulates of one image: convolutions and matrix products, as torch counts them.

    `inputs` are one or more tensors (N, ...) on the net's device, of which the first image is used.
    """
    images = inputs if isinstance(inputs, tuple) else (inputs,)
    with evaluating(net), FlopCounterMode(display=False) as counter:
        net(*(x[:1] for x in images))
    return int(counter.get_total_flops()) // 2  # torch counts a multiply-accumulate as two


def count_params(net: nn.Module) -> int:
    """Count the parameters; one that is used twice counts once."""
    return sum(p.numel() for p in net.parameters())


def file_bytes(path: Path) -> int:
    """Return the size of a file in bytes."""
    return path.stat().st_size


# ---- latency --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LatencyFigures:
    """What a callable took, and how that relates to the first one that was timed beside it.

    `ratio` is the median over rounds of this time by the first one's in the same round, so that a machine
    that slows down for a while slows both; `noisy` says that the spread is over NOISY_SPREAD.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    ratio_to: str  # the first label
    rounds: int
    noisy: bool

    def to_json(self) -> dict[str, JSON]:
        return asdict(self)


def measure_latency(
    runners: Mapping[str, Callable[[], object]],
    *,
    rounds: int = LATENCY_ROUNDS,
    warmup: int = WARMUP,
    time_budget_s: float = TIME_BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, LatencyFigures]:
    """Time the runners interleaved: each round calls each of them once, in an order that rotates.

    A runner returns when its work is done (one on an accelerator synchronises). `clock` gives seconds.
    Rounds stop at the time budget, but not before MIN_ROUNDS; warm-up takes at most a fifth of it.
    """
    labels = list(runners)
    if not labels:
        return {}
    started = clock()
    times_s: list[list[float]] = []  # one row a round, in the order of labels
    with _no_garbage_collection():
        for _ in range(warmup):
            _time_round(runners, labels, 0, clock)
            if clock() - started > time_budget_s / 5:
                break
        for number in range(max(rounds, MIN_ROUNDS)):
            times_s.append(_time_round(runners, labels, number, clock))
            if len(times_s) >= MIN_ROUNDS and clock() - started > time_budget_s:
                break
    return _summarise(labels, 1e3 * np.array(times_s))


def _time_round(
    runners: Mapping[str, Callable[[], object]],
    labels: Sequence[str],
    number: int,
    clock: Callable[[], float],
) -> list[float]:
    shift = number % len(labels)
    taken = dict.fromkeys(labels, 0.0)
    for label in [*labels[shift:], *labels[:shift]]:
        start = clock()
        runners[label]()
        taken[label] = clock() - start
    return [taken[label] for label in labels]


def _summarise(labels: Sequence[str], times_ms: np.ndarray) -> dict[str, LatencyFigures]:
    """Turn times (rounds, labels) in ms into figures; a clock that did not move counts as 1 ns."""
    times_ms = np.maximum(times_ms, 1e-6)
    ratios = times_ms / times_ms[:, :1]
    figures = {}
    for column, label in enumerate(labels):
        p10, median, p90 = (float(q) for q in np.percentile(times_ms[:, column], (10, 50, 90)))
        low, ratio, high = (float(q) for q in np.percentile(ratios[:, column], (10, 50, 90)))
        spread = (p90 - p10) / median if column == 0 else (high - low) / ratio
        figures[label] = LatencyFigures(
            median_ms=median,
            p10_ms=p10,
            p90_ms=p90,
            ratio=ratio,
            ratio_p10=low,
            ratio_p90=high,
            ratio_to=labels[0],
            rounds=len(times_ms),
            noisy=spread > NOISY_SPREAD,
        )
    return figures


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep the collector's pauses out of what is timed, as timeit does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# ---- the machine ----------------------------------------------------------------------------------
PACKAGES = (
    "sepress",
    "torch",
    "torchvision",
    "timm",
    "torch-pruning",
    "numpy",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
)


def environment() -> dict[str, JSON]:
    """Return what a figure depends on: versions, hardware, threads, the working directory's commit.

    No path, user or host name is in it, so that a report can be passed on.
    """
    return {
        **_installed_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
    }


@cache
def _installed_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def cpu_model() -> str:
    """Return the processor's name as its maker gives it, or the architecture where it can't be asked."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    if platform.system() == "Darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the commit checked out here, with '-dirty' where tracked files differ; None elsewhere."""
    return _output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
