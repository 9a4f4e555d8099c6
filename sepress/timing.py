"""Callables -> latencies from one interleaved timer, and whether a difference can be told from noise."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sepress.defaults import LATENCY_ROUNDS, LATENCY_WARMUP
from sepress.types import JSON

MIN_ROUNDS = 6  # taken whatever the time budget says: of fewer, no interval holds the median at 95 %
TIME_BUDGET_S = 60.0
CONFIDENCE = 0.95
SAME = 0.03  # two sessions of one file were up to this apart: where their memory happens to lie
NOISY = 0.1  # width of the interval of a median, over the median, above which the time itself is not known

Verdict = Literal["faster", "slower", "same", "unclear"]


@dataclass(frozen=True)
class LatencyFigures:
    """What a callable took, and how that relates to the first one that was timed beside it.

    `ratio` is the median over rounds of this time by the first one's in the same round, so that a machine
    that slows down for a while slows both; `ratio_low` to `ratio_high` holds its true value at CONFIDENCE
    (see `median_interval`). The verdict follows from that interval: 'same' where it lies within SAME of 1,
    'faster' or 'slower' where it lies outside, 'unclear' where it does neither; the first one has none.
    `noisy` says that the verdict is unclear; of the first one, that the interval of its own median is wider
    than NOISY.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    ratio_low: float
    ratio_high: float
    ratio_to: str  # the first label
    verdict: Verdict | None
    rounds: int
    noisy: bool

    def to_json(self) -> dict[str, JSON]:
        return asdict(self)


def measure_latency(
    runners: Mapping[str, Callable[[], object]],
    *,
    rounds: int = LATENCY_ROUNDS,
    warmup: int = LATENCY_WARMUP,
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
    first_low, first_high = median_interval(times_ms[:, 0])
    noisy_first = first_high - first_low > NOISY * float(np.median(times_ms[:, 0]))
    figures = {}
    for column, label in enumerate(labels):
        p10, median, p90 = (float(q) for q in np.percentile(times_ms[:, column], (10, 50, 90)))
        ratio_p10, ratio, ratio_p90 = (float(q) for q in np.percentile(ratios[:, column], (10, 50, 90)))
        low, high = median_interval(ratios[:, column])
        verdict = judge(low, high) if column else None
        figures[label] = LatencyFigures(
            median_ms=median,
            p10_ms=p10,
            p90_ms=p90,
            ratio=ratio,
            ratio_p10=ratio_p10,
            ratio_p90=ratio_p90,
            ratio_low=low,
            ratio_high=high,
            ratio_to=labels[0],
            verdict=verdict,
            rounds=len(times_ms),
            noisy=verdict == "unclear" if column else noisy_first,
        )
    return figures


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return what holds the median of the distribution that the values (n,) are drawn from, at CONFIDENCE.

    Two order statistics, the sign test turned round: no shape of the distribution is assumed, only that
    rounds are alike. From fewer than MIN_ROUNDS values it is their whole range, which holds less.
    """
    ordered, n = np.sort(values), len(values)
    rank, below = 0, 0.0  # below: the chance that at most `rank` of n values lie under the median
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if below > (1 - CONFIDENCE) / 2:
            break
        rank = k
    return float(ordered[rank]), float(ordered[n - 1 - rank])


def judge(low: float, high: float) -> Verdict:
    """Say what an interval of a ratio of times tells."""
    if max(1 - low, high - 1) <= SAME:
        return "same"
    return "faster" if high < 1 - SAME else "slower" if low > 1 + SAME else "unclear"


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


# ---- the conditions that a latency holds under -----------------------------------------------------
def measure_rows(
    runners: Mapping[str, Callable[[], object]],
    facts: Mapping[str, Mapping[str, JSON]],
    *,
    on_gpu: bool,
    rounds: int,
    warmup: int,
    time_budget_s: float = TIME_BUDGET_S,
) -> dict[str, dict[str, JSON]]:
    """Time the runners interleaved; {label: figures, that label's facts, and the state of the machine}.

    `cpu_mhz`, `gpu_mhz` and `load_average` are [before, after] the timed rounds, or None where the machine
    does not tell; `reasons` says why.
    """
    from sepress.measure import cpu_model  # here: with it comes torch, which runtime's own process spares

    before = _state(on_gpu)
    figures = measure_latency(runners, rounds=rounds, warmup=warmup, time_budget_s=time_budget_s)
    after = _state(on_gpu)
    both = {
        name: None if before[name] is None or after[name] is None else [before[name], after[name]]
        for name in before
    }
    machine: dict[str, JSON] = {"cpu": cpu_model(), "gpu": _gpu_name() if on_gpu else None}
    machine |= {"cores": len(_cpus()), "governor": _governor(), **both}
    why = _UNTOLD if on_gpu else _UNTOLD | {"gpu": "not used", "gpu_mhz": "not used"}
    reasons = {name: reason for name, reason in why.items() if machine[name] is None}
    return {
        label: {**row.to_json(), **facts[label], **machine, "reasons": reasons}
        for label, row in figures.items()
    }


_UNTOLD = {
    "gpu": "torch sees no CUDA device",
    "governor": "the system does not tell it (a virtual machine, or not Linux)",
    "cpu_mhz": "the system does not tell it",
    "gpu_mhz": "torch.cuda.clock_rate can't read it (it needs nvidia-ml-py)",
    "load_average": "the system keeps none",
}


def _state(on_gpu: bool) -> dict[str, float | None]:
    return {
        "cpu_mhz": _cpu_mhz(),
        "gpu_mhz": _gpu_mhz() if on_gpu else None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpus() -> list[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _governor() -> str | None:
    """What sets the CPUs' clock, such as 'performance' or 'powersave'."""
    files = (Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in _cpus())
    found = {file.read_text(encoding="utf-8").strip() for file in files if file.is_file()}
    return ", ".join(sorted(found)) or None


def _cpu_mhz() -> float | None:
    """The median clock of the CPUs that this process may run on, in MHz; in a virtual machine its nominal."""
    files = (Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in _cpus())
    found = [int(file.read_text(encoding="utf-8")) / 1e3 for file in files if file.is_file()]
    info = Path("/proc/cpuinfo")
    if not found and info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return round(statistics.median(found), 1) if found else None


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _gpu_mhz() -> float | None:
    import torch

    try:
        return float(torch.cuda.clock_rate())
    except Exception:  # noqa: BLE001 - no NVML package, no driver, no right to ask
        return None
