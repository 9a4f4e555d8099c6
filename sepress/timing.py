"""Callables -> latencies from one interleaved timer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from sepress.defaults import LATENCY_ROUNDS
from sepress.types import JSON

WARMUP = 5  # rounds that are not counted: allocators and caches settle
MIN_ROUNDS = 3  # taken whatever the time budget says: fewer have no spread
TIME_BUDGET_S = 60.0
NOISY_SPREAD = 0.3  # (p90 - p10) / median above which a difference of 10 % can't be told


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
