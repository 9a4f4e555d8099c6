"""The timer on a clock that the test turns."""

from __future__ import annotations

import gc
import json

import pytest

from sepress.timing import MIN_ROUNDS, measure_latency


class Clock:
    """A clock in seconds that stands still unless a runner turns it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def runner(self, *taken_ms: float):
        """A callable that takes these times in turn, round and round."""
        calls = iter(range(10**9))

        def run() -> None:
            self.now += taken_ms[next(calls) % len(taken_ms)] / 1e3

        return run


def test_latency_is_the_median_and_its_ratio_is_taken_round_by_round():
    clock = Clock()
    # the machine is twice as slow in every second round: the times spread, the ratio does not
    runners = {"base": clock.runner(10, 20), "pruned": clock.runner(4, 8)}
    figures = measure_latency(runners, rounds=8, warmup=0, clock=clock)
    base, pruned = figures["base"], figures["pruned"]
    assert base.median_ms == pytest.approx(15)
    assert (base.p10_ms, base.p90_ms) == (pytest.approx(10), pytest.approx(20))
    assert (base.ratio, base.ratio_p10, base.ratio_p90) == (1, 1, 1)
    assert pruned.median_ms == pytest.approx(6)
    assert pruned.ratio == pytest.approx(0.4)
    assert (pruned.ratio_p10, pruned.ratio_p90) == (pytest.approx(0.4), pytest.approx(0.4))
    assert (pruned.ratio_to, pruned.rounds) == ("base", 8)
    assert base.noisy
    assert not pruned.noisy
    json.dumps({label: row.to_json() for label, row in figures.items()}, allow_nan=False)


def test_percentiles_are_those_of_the_rounds():
    clock = Clock()
    figures = measure_latency({"a": clock.runner(*range(1, 12))}, rounds=11, warmup=0, clock=clock)["a"]
    assert (figures.p10_ms, figures.median_ms, figures.p90_ms) == (
        pytest.approx(2),
        pytest.approx(6),
        pytest.approx(10),
    )


def test_a_ratio_that_jumps_from_round_to_round_is_called_noisy():
    clock = Clock()
    runners = {"base": clock.runner(10), "pruned": clock.runner(5, 9)}
    figures = measure_latency(runners, rounds=10, warmup=0, clock=clock)
    assert not figures["base"].noisy
    assert figures["pruned"].noisy


def test_runners_are_interleaved_and_take_turns_to_be_first():
    calls: list[str] = []
    runners = {label: (lambda label=label: calls.append(label)) for label in "abc"}
    measure_latency(runners, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_the_time_budget_ends_the_rounds_but_leaves_a_spread():
    clock = Clock()
    slow = measure_latency({"a": clock.runner(9_000)}, rounds=50, warmup=5, time_budget_s=40, clock=clock)
    assert slow["a"].rounds == 4  # one to warm up, then over 40 s at the fourth
    assert clock.now == pytest.approx(45)
    very_slow = measure_latency({"a": clock.runner(1e6)}, rounds=50, time_budget_s=40, clock=clock)
    assert very_slow["a"].rounds == MIN_ROUNDS


def test_garbage_collection_pauses_while_timing_and_is_back_after_a_failure():
    seen: list[bool] = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise ValueError("broken runner")

    with pytest.raises(ValueError, match="broken runner"):
        measure_latency({"a": fail})
    assert seen == [False]
    assert gc.isenabled()


def test_nothing_to_time_is_no_figures():
    assert measure_latency({}) == {}
