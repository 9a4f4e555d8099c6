"""The Python API: prune a net in memory."""

from __future__ import annotations

import copy
import doctest
import json
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sepress
from sepress import pruning
from sepress.costs import coarse_table, predictor
from sepress.coupling import trace
from sepress.errors import CheckError, InputError
from sepress.models import build_net, build_spec


def small_net(seed: int = 0, **kwargs: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_net(build_spec("sepress:se_resnet8", num_classes=10, kwargs={"in_chans": 1, **kwargs}))


def images(n: int = 16, *, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_the_given_net_its_mode_hooks_gradients_and_the_random_state_are_left_as_they_were() -> None:
    net = small_net().train()
    net.fc.register_forward_hook(lambda *_: None)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, hooks = copy.deepcopy(net.state_dict()), len(net.fc._forward_hooks)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    result = sepress.prune(net, calibration=images(), ratio=0.3)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert result.net.training
    assert len(net.fc._forward_hooks) == hooks
    assert all(p.requires_grad and p.grad is not None and bool((p.grad == 1).all()) for p in net.parameters())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_a_ratio_removes_that_share_of_the_channels_and_the_report_counts_what_is_left() -> None:
    result = sepress.prune(
        small_net(), calibration=images(), ratio=0.5, round_to=1, min_width=1, scope="per-group"
    )
    groups = [row for row in result.report.groups if row.role != "frozen"]
    before, after = (sum(getattr(row, name) for row in groups) for name in ("width_before", "width_after"))
    assert abs(after / before - 0.5) < 0.03
    base, pruned = result.report.measurements
    assert pruned.macs < 0.4 * base.macs
    assert pruned.params == sum(p.numel() for p in result.net.parameters())
    assert result.report.checks["masked_equals_removed"].passed is True


def test_eca_channels_go_by_a_flag_and_a_note_says_what_that_changes() -> None:
    net, inputs = nets.build("channel conv")
    asked = {"calibration": inputs, "ratio": 0.5, "round_to": 1, "min_width": 1, "criterion": "l2"}
    without = sepress.prune(net, **asked)
    assert "a.0" not in without.plan.removed
    result = sepress.prune(net, eca_neighbours=True, **asked)
    assert len(result.plan.removed["a.0"]) == 4
    assert result.report.checks["masked_equals_removed"].passed is True
    said = [note for note in result.report.notes if note.startswith("eca_neighbours: 1 convolution ")]
    assert len(said) == 1
    assert not any(note.startswith("eca_neighbours") for note in without.report.notes)


def test_a_macs_target_is_a_share_of_the_base() -> None:
    result = sepress.prune(small_net(), calibration=images(), target_macs=0.5)
    base, pruned = result.report.measurements
    assert 0.35 < pruned.macs / base.macs <= 0.5
    assert pruned.macs == result.plan.macs_after


def test_the_pruned_net_trains_on_and_can_be_pruned_again() -> None:
    first = sepress.prune(small_net(), calibration=images(), ratio=0.3)
    net = first.net.train()
    loss = nn.functional.cross_entropy(net(images(4)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    second = sepress.prune(net, calibration=images(), ratio=0.3)
    assert second.report.measurements[-1].macs < first.report.measurements[-1].macs


def test_the_same_call_gives_the_same_plan_whatever_the_global_random_state() -> None:
    net = small_net()
    plans = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        plans.append(sepress.prune(net, calibration=images(), ratio=0.3, criterion="random", seed=5).plan)
    assert plans[0] == plans[1]
    other = sepress.prune(net, calibration=images(), ratio=0.3, criterion="random", seed=6).plan
    assert other.removed != plans[0].removed


def test_batches_with_targets_serve_criteria_that_need_labels_and_batches_without_are_refused() -> None:
    x = images()
    pairs = [(x[:8], torch.arange(8)), (x[8:], torch.arange(8))]
    assert (
        sepress.prune(small_net(), calibration=pairs, ratio=0.3, criterion="fisher").plan.criterion
        == "fisher"
    )
    with pytest.raises(InputError, match="target"):
        sepress.prune(small_net(), calibration=x, ratio=0.3, criterion="fisher")


def test_batches_of_single_images_serve_as_well_as_one_large_batch() -> None:
    x = images(40)
    whole = sepress.prune(small_net(), calibration=x, ratio=0.3, batch_size=40)
    single = sepress.prune(small_net(), calibration=list(x.split(1)), ratio=0.3)
    assert single.plan == whole.plan
    torch.testing.assert_close(single.net(x[:4]), whole.net(x[:4]), rtol=0.2, atol=0.2)


def test_limited_batches_hold_exactly_the_first_images() -> None:
    x = torch.arange(100).float().view(100, 1)
    got = list(pruning.limited(list(x.split(3)), 70))
    assert torch.equal(torch.cat(got), x[:70])
    assert [len(batch) for batch in got] == [33, 33, 4]


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (iter([images()]), "read only once"),
        ([], "no image"),
        ([{"image": 1}], "not a tensor"),
        (torch.zeros(3, 28), "dimensions"),
    ],
)
def test_calibration_that_can_not_be_used_is_refused_with_what_to_pass(
    calibration: object, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        sepress.prune(small_net(), calibration=calibration, ratio=0.3)


def test_arguments_are_checked_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "trace", lambda *_: pytest.fail("traced"))
    for wrong in (
        {},
        {"ratio": 1.5},
        {"ratio": 0.3, "target_macs": 0.5},
        {"ratio": 0.3, "criterion": "luck"},
    ):
        with pytest.raises(InputError):
            sepress.prune(small_net(), calibration=images(), **wrong)


def test_a_surgery_that_cuts_other_channels_than_planned_raises_a_check_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = pruning.apply_removal

    def shifted(net: nn.Module, coupling: object, removed: dict[str, tuple[int, ...]]) -> None:
        cut(net, coupling, removed)
        with torch.no_grad():
            net.stages[0][0].conv2.weight.copy_(net.stages[0][0].conv2.weight.roll(1, dims=1))

    monkeypatch.setattr(pruning, "apply_removal", shifted)
    with pytest.raises(CheckError, match="masked = removed"):
        sepress.prune(small_net(), calibration=images(), ratio=0.3)


def test_equal_images_can_not_decide_the_check_and_it_says_so() -> None:
    same = images(1).repeat(4, 1, 1, 1)
    with pytest.raises(CheckError, match="can't be told"):
        sepress.prune(small_net(), calibration=same, ratio=0.3)
    result = sepress.prune(small_net(), calibration=same, ratio=0.3, allow_vacuous=True)
    check = result.report.checks["masked_equals_removed"]
    assert check.passed is None
    assert check.reason


class Signals(nn.Module):
    """A net over (N, C, L), (N, C, H, W) or (N, C, D, H, W) with SE written inline, and outputs in a dict."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](32)
        self.stem, self.body = conv(2, 32, 3, padding=1), conv(32, 48, 3, padding=1)
        self.squeeze, self.excite = nn.Linear(32, 8), nn.Linear(8, 32)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor]]:
        x = self.norm(self.stem(x)).relu()
        s = self.excite(self.squeeze(x.flatten(2).mean(2)).relu())
        s = ((s + 3).clamp(0, 6) / 6).view(*s.shape, *[1] * (x.dim() - 2))
        x = self.body(x * s.expand_as(x)).relu().flatten(2).mean(2)
        return {"logits": self.head(x), "all": (x.sum(1),)}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_inline_gates_in_one_two_and_three_dimensions_are_found_pruned_and_exact(dims: int) -> None:
    torch.manual_seed(0)
    net = Signals(dims)
    x = torch.randn(12, 2, *[9] * dims)
    assert [gate.channels for gate in sepress.find_gates(net, x[:1])] == [32]
    result = sepress.prune(net, calibration=x, ratio=0.3, scope="per-group")
    assert result.report.checks["masked_equals_removed"].passed is True
    assert result.net.stem.weight.shape[0] == 24
    assert result.net(x)["logits"].shape == (12, 5)


@pytest.mark.parametrize(
    "name", ["prune", "load", "save", "build", "find_gates", "find_groups", "export_onnx"]
)
def test_the_example_in_every_public_docstring_runs(
    name: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    function = getattr(sepress, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert test.examples, f"sepress.{name} has no example"
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


# ---- latency ------------------------------------------------------------------------------------
def test_a_target_in_latency_is_met_by_a_given_table_whether_in_memory_or_in_a_file(tmp_path: Path) -> None:
    net = small_net()
    coupling = trace(net, images(1))
    table = replace(coarse_table(coupling), block=np.ones(len(coupling.layers({}).kinds), int))
    (tmp_path / "table.json").write_text(json.dumps(table.to_json()))
    plans = []
    for given in (table, tmp_path / "table.json", str(tmp_path / "table.json")):
        result = sepress.prune(
            net, calibration=images(), target_latency=0.8, latency_table=given, round_to=1, min_width=1
        )
        assert any("by a given table" in note for note in result.report.notes)
        plans.append(result.plan)
    assert plans[0] == plans[1] == plans[2]
    times = [table.predict_ns(coupling, removed) for removed in ({}, plans[0].removed)]
    assert plans[0].latency_ratio == times[1] / times[0]
    assert 0.7 < plans[0].latency_ratio <= 0.8


def test_a_table_of_another_net_is_refused() -> None:
    other = small_net(width=8)
    table = coarse_table(trace(other, images(1)))
    with pytest.raises(InputError, match="the latency table is of another net"):
        sepress.prune(small_net(), calibration=images(), target_latency=0.8, latency_table=table)


def test_without_a_table_plans_are_weighed_by_the_coarse_one() -> None:
    net = small_net()
    plan = sepress.prune(net, calibration=images(), target_macs=0.5).plan
    predict = predictor(trace(net, images(1)))
    assert plan.latency_ratio == predict(plan.removed) / predict({})
