"""Exact counts by hand, and the timer on a clock that the test turns."""

from __future__ import annotations

import gc
import json
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from sepress.measure import (
    MIN_ROUNDS,
    count_macs,
    count_params,
    environment,
    file_bytes,
    measure_latency,
)


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


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def test_macs_are_those_of_one_image_by_hand():
    by_hand = 10 * 10 * 3 * 8 * 9 + 5 * 5 * 8 * 9 + 8 * 10
    assert count_macs(small_net(), torch.zeros(4, 3, 10, 10)) == by_hand


def test_macs_of_a_net_with_two_inputs_take_one_image_of_each():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 7)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.fc(x + y)

    assert count_macs(Sum(), (torch.zeros(5, 6), torch.zeros(5, 6))) == 42


def test_counting_leaves_modes_statistics_and_gradients_alone():
    net = small_net().train()
    net[2].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    count_macs(net, torch.randn(4, 3, 10, 10))
    assert [m.training for m in net] == [True, True, False, True, True, True]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_tied_parameter_counts_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    assert count_params(net) == 16 + 4 + 4


def test_bytes_are_those_of_the_file(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12345")
    assert file_bytes(tmp_path / "a") == 5


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


def test_environment_names_versions_and_hardware_but_no_path_or_host():
    found = environment()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["cores"] >= 1
    assert found["threads"] == torch.get_num_threads()
    assert any(name.startswith("onnxruntime") for name in found)
    text = json.dumps({key: value for key, value in found.items() if key not in ("platform", "cpu")})
    for private in (str(Path.home()), str(Path.cwd()), socket.gethostname()):
        assert f'"{private}' not in text
    assert "/" not in json.dumps({key: found[key] for key in ("platform", "python", "cores")})


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git_commit"] is None
