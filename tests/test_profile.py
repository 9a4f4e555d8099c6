"""From timed operators to a latency table, on operators and times that are made up; and once for real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch

from sepress import profile
from sepress.costs import LatencyTable, coarse_table
from sepress.coupling import Coupling, trace
from sepress.errors import InputError, SepressError
from sepress.profile import aim_table, profile_latency, random_removal, table_for
from sepress.profile.fitting import Sample, fit_overhead, fit_table
from sepress.profile.operators import Event, assign
from sepress.types import Policy, Ranking


def traced(name: str) -> Coupling:
    return trace(*nets.build(name))


def event(op: str, ns: float, reads: tuple[int, ...], weight: tuple[int, ...], output: tuple[int, ...]):
    return Event(op, ns, reads, weight, output)


def plain_events(batch: int = 1) -> list[Event]:
    """What ONNX Runtime runs of nets.Plain: weights padded to blocks of 16, and what lies between."""
    n = batch
    return [
        event("ReorderInput", 1, (n, 3, 12, 12), (), (n, 3, 12, 12)),
        event("Conv", 100, (n, 3, 12, 12), (16, 3, 3, 3), (n, 16, 12, 12)),
        event("Conv", 200, (n, 16, 12, 12), (16, 16, 3, 3), (n, 16, 12, 12)),
        event("ReorderOutput", 30, (n, 16, 12, 12), (), (n, 6, 12, 12)),
        event("Reshape", 5, (n, 6, 12, 12), (3,), (n, 6, 144)),
        event("Gemm", 400, (n, 6), (), (n, 5)),  # its weight is packed away
        event("Softmax", 7, (n, 5), (), (n, 5)),
    ]


# ---- operators -> layers --------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 8])
def test_operators_are_known_by_their_shapes_and_the_rest_follows_what_it_works_on(batch: int) -> None:
    took = assign(plain_events(batch), traced("plain").layers({}), batch=batch)
    # What comes first has no layer before it: the first. Of 6 channels none gave: the last one, b.
    assert took.tolist() == [1 + 100, 200 + 30 + 5, 400 + 7]


def test_other_operators_go_to_the_last_layer_that_gave_as_many_channels() -> None:
    coupling = traced("residual")  # stem 8, inner 6 of 8, outer 8 of 6, head
    events = [
        event("Conv", 100, (1, 3, 12, 12), (8, 3, 3, 3), (1, 8, 12, 12)),
        event("Conv", 200, (1, 8, 12, 12), (6, 8, 3, 3), (1, 6, 12, 12)),
        event("Relu", 3, (1, 8, 12, 12), (), (1, 8, 12, 12)),  # of the stem's eight
        event("Conv", 400, (1, 6, 12, 12), (8, 6, 3, 3), (1, 8, 12, 12)),
        event("Add", 5, (1, 8, 12, 12), (1, 8, 12, 12), (1, 8, 12, 12)),
        event("Gemm", 800, (1, 8), (5, 8), (1, 5)),
    ]
    assert assign(events, coupling.layers({}), batch=1).tolist() == [103, 200, 405, 800]


def test_the_narrower_padding_decides_between_layers_that_both_would_do() -> None:
    coupling = traced("plain")
    events = plain_events()
    events[1], events[2] = replace(events[1], weight=(8, 3, 3, 3)), replace(events[2], weight=(8, 8, 3, 3))
    assert assign(events, coupling.layers({}), batch=1).tolist() == [101, 235, 407]


def test_two_layers_alike_take_one_operator_each() -> None:
    coupling = traced("tied")  # a 6 of 3, then twice 6 of 6
    conv = event("Conv", 10, (1, 6, 12, 12), (6, 6, 3, 3), (1, 6, 12, 12))
    events = [
        replace(conv, ns=100, reads=(1, 3, 12, 12), weight=(6, 3, 3, 3)),
        conv,
        replace(conv, ns=20),
        event("Gemm", 40, (1, 6), (), (1, 5)),
    ]
    took = assign(events, coupling.layers({}), batch=1)
    assert sorted(took[1:3]) == [10, 20]
    assert (took[0], took[3]) == (100, 40)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_transposed_convolution_is_known_by_its_sides_and_the_positions_that_it_reads(batch: int) -> None:
    events = [
        event("Conv", 100, (batch, 3, 12, 12), (16, 3, 3, 3), (batch, 16, 12, 12)),
        event("ConvTranspose", 200, (batch, 6, 12, 12), (8,), (batch, 8, 24, 24)),
        event("Gemm", 400, (batch, 8), (5,), (batch, 5)),
    ]
    assert assign(events, traced("transposed").layers({}), batch=batch).tolist() == [100, 200, 400]


@pytest.mark.parametrize("batch", [1, 4])
def test_products_of_attention_are_known_by_what_they_sum_over(batch: int) -> None:
    n = batch
    events = [
        event("Conv", 1, (n, 3, 12, 12), (8, 3, 4, 4), (n, 8, 3, 3)),
        event("MatMul", 2, (n, 9, 8), (8, 36), (n, 9, 36)),
        event("MatMul", 4, (n, 2, 9, 6), (n, 2, 6, 9), (n, 2, 9, 9)),
        event("MatMul", 8, (n, 2, 9, 9), (n, 2, 9, 6), (n, 2, 9, 6)),
        event("MatMul", 16, (n, 9, 12), (12, 8), (n, 9, 8)),
        event("Gemm", 32, (n, 8), (), (n, 5)),
    ]
    took = assign(events, traced("attention").layers({}), batch=batch)
    assert [took[0], took[1], took[2] + took[3], took[4], took[5]] == [1, 2, 12, 16, 32]


def test_a_net_whose_operators_are_mostly_unknown_is_not_guessed_at() -> None:
    events = plain_events()
    unknown = replace(events[1], weight=(64, 3, 3, 3))  # 56 channels are no padding
    with pytest.raises(SepressError, match="timed 3 operators with weights; only 2 are known layers"):
        assign([unknown, *events[2:]], traced("plain").layers({}), batch=1)


# ---- times -> table -------------------------------------------------------------------------------
def known_table(coupling: Coupling, block: int) -> LatencyTable:
    """Coefficients that every layer's widths can tell: a part a channel, or one for their product."""
    layers = coupling.layers({})
    count, axes = layers.lengths.shape
    sides = layers.shrinking.sum(axis=1)
    per_channel = np.zeros((count, axes))
    per_channel[:-1, 0] = 40.0  # the last one's outputs are always five: a part of what is fixed
    return replace(
        coarse_table(coupling),
        block=np.full(count, block),
        fixed=np.full(count, 5000.0),
        per_channel=per_channel,
        per_product=np.where(sides > 1, 3.0, 0.0),  # the first reads images: it has one side that can go
        per_ragged=np.zeros(count),
    )


def wide_chain() -> Coupling:
    conv = torch.nn.Conv2d
    net = torch.nn.Sequential(
        conv(3, 96, 3), torch.nn.ReLU(), conv(96, 64, 3), torch.nn.ReLU(), conv(64, 5, 1)
    )
    return trace(net, torch.zeros(1, 3, 8, 8))


def samples_of(coupling: Coupling, table: LatencyTable, speeds: list[float]) -> list[Sample]:
    random = np.random.default_rng(1)
    removals = [{}, *(random_removal(coupling, random, rounded=False) for _ in speeds[1:])]
    base = table.layer_ns(coupling.layers({}))
    return [
        Sample(gone, base * speed, table.layer_ns(coupling.layers(gone)) * speed)
        for gone, speed in zip(removals, speeds, strict=True)
    ]


@pytest.mark.parametrize("block", [1, 8, 16, 32])
def test_the_fit_finds_the_coefficients_and_the_block_that_made_the_times(block: int) -> None:
    coupling = wide_chain()
    known = known_table(coupling, block)
    fitted = fit_table(coupling, samples_of(coupling, known, [1.0] * 40))
    assert fitted.block.tolist() == [block] * 3
    for name in ("fixed", "per_channel", "per_product", "per_ragged"):
        # of the last, five outputs times what goes in is a part of what goes in
        assert getattr(fitted, name)[:2] == pytest.approx(getattr(known, name)[:2], rel=1e-6, abs=1e-6)
    assert fitted.predict_ns(coupling, {"0": tuple(range(50))}) == known.predict_ns(
        coupling, {"0": tuple(range(50))}
    )


def test_a_slow_spell_slows_the_base_beside_it_and_is_divided_out() -> None:
    coupling = wide_chain()
    known = known_table(coupling, 16)
    speeds = [1.0] * 14 + [1.7] * 7 + [0.8] * 6
    fitted = fit_table(coupling, samples_of(coupling, known, speeds))
    assert fitted.predict_ns(coupling, {}) == known.predict_ns(coupling, {})
    assert fitted.fixed == pytest.approx(known.fixed)


@pytest.mark.parametrize("overhead", [0.0, 3000.0, -400.0])
def test_what_a_call_takes_beside_its_layers_is_found_from_ratios(overhead: float) -> None:
    predicted = np.array([10_000.0, 7_000.0, 4_000.0, 1_500.0])
    measured = (predicted + overhead) / (predicted[0] + overhead)
    assert fit_overhead(predicted, measured) == pytest.approx(overhead, abs=1e-6)


def test_no_more_than_nine_tenths_of_the_smallest_net_are_taken_for_the_profilers_own_time() -> None:
    assert fit_overhead(np.array([1000.0, 900.0]), np.array([1.0, 0.1])) == -810


def test_random_widths_stay_within_limits_and_are_the_same_for_a_seed() -> None:
    coupling = wide_chain()
    for rounded in (False, True):
        for seed in range(50):
            removed = random_removal(coupling, np.random.default_rng(seed), rounded=rounded)
            assert removed == random_removal(coupling, np.random.default_rng(seed), rounded=rounded)
            coupling.check_removed(removed)
            for group in coupling.prunable():
                kept = group.units - len(removed.get(group.name, ()))
                assert kept >= 0.15 * group.units - (4.5 if rounded else 0.5)
                assert not rounded or kept % 8 == 0
    different = [random_removal(coupling, np.random.default_rng(seed), rounded=True) for seed in range(20)]
    assert len({tuple(map(len, removed.values())) for removed in different}) > 10


# ---- aiming ---------------------------------------------------------------------------------------
@pytest.fixture
def aimed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine whose calls take 20 us more than the coarse table says; a list of the plans it has timed."""
    net, inputs = nets.build("residual")  # exported and timed by fakes
    coupling = wide_chain()
    coarse = coarse_table(coupling)
    scores = {group.name: tuple(map(float, range(group.units))) for group in coupling.groups}
    timed: list[dict[str, Any]] = []

    def export(self: Any, removed: Any) -> Path:
        timed.append(removed)
        return Path(str(len(timed) - 1))

    def measure(paths: dict[str, Path], example: Any, *, threads: int) -> Any:
        base, planned = (machine(coarse.predict_ns(coupling, timed[int(str(p))])) for p in paths.values())
        return {"planned": {"ratio": planned / base}}

    def machine(ns: float) -> float:
        return ns + 20_000

    monkeypatch.setattr(profile.Variants, "export", export)
    monkeypatch.setattr(profile, "measure_onnx_latency", measure)
    # blocks of one channel: every width has a time of its own
    coarse = replace(coarse, block=np.ones_like(coarse.block))
    return net, coupling, Ranking("l2", scores, {}), inputs[:1], coarse, timed


def test_aiming_corrects_the_table_until_the_plan_that_it_leads_to_was_timed_at_the_target(
    aimed: Any,
) -> None:
    net, coupling, ranking, example, coarse, timed = aimed
    policy = Policy(target_latency=0.9, round_to=1)
    table, note = aim_table(net, coupling, ranking, policy, example, table=coarse)
    plan = profile.plan_pruning(
        ranking, coupling, policy=policy, latency=lambda gone: table.predict_ns(coupling, gone)
    )
    assert plan.removed == timed[-1]  # the same plan is made again
    assert 2 <= len(timed) <= 1 + profile.MAX_AIMS  # the base, and a net a round
    assert "asked for 0.9 of the base's latency; the plan was timed at " in note


def test_aiming_stops_after_so_many_plans(aimed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, coupling, ranking, example, coarse, timed = aimed
    measured = iter([0.5, 0.95, 0.5, 0.95, 0.5, 0.95])
    monkeypatch.setattr(
        profile, "measure_onnx_latency", lambda *_, **__: {"planned": {"ratio": next(measured)}}
    )
    _, note = aim_table(net, coupling, ranking, Policy(target_latency=0.9, round_to=1), example, table=coarse)
    assert len(timed) <= 1 + profile.MAX_AIMS
    assert "timed at " in note


def test_a_plan_that_was_no_faster_leaves_nothing_to_aim_at(
    aimed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, coupling, ranking, example, coarse, _ = aimed
    monkeypatch.setattr(profile, "measure_onnx_latency", lambda *_, **__: {"planned": {"ratio": 1.0}})
    with pytest.raises(InputError, match=r"0\.8 of the base's predicted latency .* can't be reached"):
        aim_table(net, coupling, ranking, Policy(target_latency=0.8, round_to=1), example, table=coarse)


def test_a_given_table_is_planned_by_and_without_a_target_in_latency_nothing_is_timed(aimed: Any) -> None:
    net, coupling, ranking, example, coarse, timed = aimed
    given = replace(coarse, conditions={"provider": "CPUExecutionProvider", "cpu": "a chip"})
    table, notes = table_for(net, coupling, ranking, Policy(target_latency=0.8), example, given=given)
    assert table is given
    assert notes == ("latency is planned for by a given table (CPUExecutionProvider, a chip)",)
    assert table_for(net, coupling, ranking, Policy(ratio=0.3), example, given=None) == (None, ())
    assert timed == []


# ---- for real -------------------------------------------------------------------------------------
def test_a_net_from_which_nothing_can_go_has_no_table() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3))
    with pytest.raises(InputError, match="nothing of this net can be removed"):
        profile_latency(net, trace(net, torch.zeros(1, 3, 8, 8)), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(("name", "batch"), [("inverted bottleneck", 1), ("transposed", 2), ("attention", 2)])
def test_a_table_made_on_this_machine_is_whole_and_predicts_less_time_for_fewer_channels(
    name: str, batch: int
) -> None:
    net, inputs = nets.build(name)
    coupling = trace(net, inputs)
    table = profile_latency(net, coupling, inputs[:batch], variants=4, rounds=3)
    table.check(coupling)
    removed = {group.name: tuple(range(group.units // 2)) for group in coupling.prunable()}
    assert table.predict_ns(coupling, {}) > 0
    assert table.predict_ns(coupling, removed) <= table.predict_ns(coupling, {})
    assert table.conditions["batch"] == batch
    assert len(table.validation["measured"]) == profile.VALIDATION
