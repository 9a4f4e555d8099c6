"""The timer on a clock that the test turns."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from sepress.timing import MIN_ROUNDS, judge, measure_latency, measure_rows, median_interval


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
    assert (pruned.ratio_low, pruned.ratio_high) == (pytest.approx(0.4), pytest.approx(0.4))
    assert (base.verdict, pruned.verdict) == (None, "faster")
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


def test_what_jumps_around_the_first_is_too_noisy_to_tell_and_what_jumps_below_it_is_faster():
    clock = Clock()
    runners = {"base": clock.runner(10), "either": clock.runner(8, 13), "below": clock.runner(5, 9)}
    figures = measure_latency(runners, rounds=20, warmup=0, clock=clock)
    assert not figures["base"].noisy
    assert (figures["either"].verdict, figures["either"].noisy) == ("unclear", True)
    assert (figures["either"].ratio_low, figures["either"].ratio_high) == (
        pytest.approx(0.8),
        pytest.approx(1.3),
    )
    assert (figures["below"].verdict, figures["below"].noisy) == ("faster", False)


# the sign test's ranks in any table of it: at 95 %, the 10th of 30, the 2nd of 9 to 11, the 1st of 6 to 8
@pytest.mark.parametrize(("n", "rank"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (30, 10), (100, 40)])
def test_the_interval_of_a_median_is_the_sign_tests(n: int, rank: int):
    values = np.random.default_rng(0).permutation(np.arange(1, n + 1, dtype=float))
    assert median_interval(values) == (rank, n + 1 - rank)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(2000, 30))
    held = np.mean([low <= np.log(2) <= high for low, high in map(median_interval, draws)])
    assert 0.945 < held < 0.97  # 95.7 % is what ranks 10 and 21 of 30 give


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.5, 0.9, "faster"),
        (1.1, 1.2, "slower"),
        (0.98, 1.02, "same"),
        (1.0, 1.0, "same"),
        (0.9, 1.1, "unclear"),
        (0.95, 0.99, "unclear"),  # faster, but by less than two sessions of one file may differ
        (0.99, 1.5, "unclear"),
    ],
)
def test_an_interval_is_judged_by_what_it_leaves_out(low: float, high: float, verdict: str):
    assert judge(low, high) == verdict


def test_rows_carry_the_state_of_the_machine_and_why_it_is_not_known():
    rows = measure_rows(
        {"a": lambda: None, "b": lambda: None},
        {"a": {"threads": 1}, "b": {"threads": 1}},
        on_gpu=False,
        rounds=6,
        warmup=0,
    )
    for row in rows.values():
        assert row["threads"] == 1
        assert row["cpu"]
        assert row["cores"] >= 1
        for name in ("cpu_mhz", "load_average"):
            assert row[name] is None or len(row[name]) == 2
        names = ("gpu", "gpu_mhz", "governor", "cpu_mhz", "load_average")
        assert set(row["reasons"]) == {name for name in names if row[name] is None}
    json.dumps(rows, allow_nan=False)


def test_runners_are_interleaved_and_take_turns_to_be_first():
    calls: list[str] = []
    runners = {label: (lambda label=label: calls.append(label)) for label in "abc"}
    measure_latency(runners, rounds=6, warmup=1)
    assert "".join(calls) == "abc" + 2 * ("abc" + "bca" + "cab")


def test_the_time_budget_ends_the_rounds_but_leaves_a_spread():
    clock = Clock()
    slow = measure_latency({"a": clock.runner(5_000)}, rounds=50, warmup=5, time_budget_s=42, clock=clock)
    assert slow["a"].rounds == 7  # two to warm up, then over 42 s at the seventh
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
