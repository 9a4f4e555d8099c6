"""Pruning in steps: what goes in all, in the first net's units, and what is said where steps don't add up."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import NETS, build
from torch import Tensor, nn

from sepress import steps as module
from sepress.coupling import apply_removal, trace
from sepress.errors import InputError, SepressError
from sepress.plan import plan_pruning
from sepress.pruning import Surgery, prune_channels, rank_channels
from sepress.steps import Judged, compose, prune_in_steps
from sepress.types import Check, CouplingGroup, Policy

CPU = torch.device("cpu")
HALF = Policy(target_macs=0.4, round_to=1, min_width=1)


def judge(net: nn.Module, images: Tensor) -> Judged:
    coupling = trace(net, images[:1])
    ranking, stats = rank_channels(net, coupling, [images], criterion="l2", compensate=False, device=CPU)
    return Judged(net, coupling, ranking, stats)


def run(
    name: str, policy: Policy = HALF, *, steps: int = 3, first: Judged | None = None
) -> tuple[Judged, Surgery, list[Surgery]]:
    """Prune a net of the zoo in steps, with nothing in between but a new ranking."""
    net, example = build(name)
    images = torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    first, made = judge(net, images), []

    def cut(here: Judged, policy: Policy) -> Surgery:
        made.append(prune_channels(here.net, here.coupling, here.ranking, policy, images=images))
        return made[-1]

    whole = prune_in_steps(first, policy, steps=steps, cut=cut, recover=lambda net: judge(net, images))
    return first, whole, made


# A convolution along channels holds so many that no step reaches the target.
@pytest.mark.parametrize("name", [name for name in NETS if name != "channel conv"])
def test_the_whole_plan_applied_at_once_gives_the_net_that_the_steps_gave(name: str) -> None:
    first, whole, made = run(name)
    assert len(made) > 1
    once = copy.deepcopy(first.net)
    apply_removal(once, first.coupling, whole.plan.removed)
    theirs = whole.net.state_dict()
    assert once.state_dict().keys() == theirs.keys()
    for key, value in once.state_dict().items():
        assert torch.equal(value, theirs[key]), key
    assert whole.plan.policy == replace(HALF, scope="per-group")  # what auto is by a ranking without costs
    assert whole.plan.macs_after == made[-1].plan.macs_after <= 0.4 * whole.plan.macs_before
    assert whole.plan.params_after == sum(p.numel() for p in whole.net.parameters())
    assert whole.check.relative_error == max(surgery.check.relative_error for surgery in made)
    widths = {group.name: group.width for group in trace(whole.net, build(name)[1]).groups}
    assert whole.plan.widths_after == widths


def test_every_step_keeps_the_same_share_of_the_macs() -> None:
    first, whole, made = run("se residual", replace(HALF, target_macs=0.25), steps=2)
    base = first.coupling.count_macs({})
    assert [surgery.plan.macs_after / base for surgery in made] == pytest.approx([0.5, 0.25], abs=0.05)
    assert whole.plan.notes[0].startswith("pruned in 2 steps, ranked anew before each: ")


def test_a_target_in_parameters_is_reached_in_parameters() -> None:
    _, whole, _ = run("se residual", Policy(target_params=0.4, round_to=1, min_width=1))
    assert 0.3 < whole.plan.params_after / whole.plan.params_before <= 0.4


def test_one_step_is_the_plan_itself() -> None:
    _, whole, made = run("se residual", steps=1)
    assert whole.plan.removed == made[0].plan.removed
    assert torch.equal(
        torch.cat([p.flatten() for p in whole.net.parameters()]),
        torch.cat([p.flatten() for p in made[0].net.parameters()]),
    )


def test_a_ratio_is_no_share_that_steps_could_multiply() -> None:
    with pytest.raises(InputError, match="target_macs or target_params"):
        run("plain", Policy(ratio=0.5))


def test_a_target_out_of_reach_is_said_before_any_cut() -> None:
    net, example = build("se residual")
    with pytest.raises(InputError, match="can't be reached"):
        prune_in_steps(
            judge(net, example),
            Policy(target_macs=0.01),
            steps=3,
            cut=lambda *_: pytest.fail("cut"),
            recover=lambda _: pytest.fail("recovered"),
        )


def test_steps_go_deeper_than_the_limit_of_a_group_lets_one_cut_go() -> None:
    deep = Policy(target_macs=0.06, scope="global", round_to=1, min_width=1)
    first, whole, _ = run("se residual", deep, steps=3)
    assert whole.plan.macs_after <= 0.06 * whole.plan.macs_before
    with pytest.raises(InputError, match="can't be reached"):
        plan_pruning(first.ranking, first.coupling, policy=deep)


def group(name: str, units: int) -> CouplingGroup:
    return CouplingGroup(name, "ungated", units, units, (name,), (), ())


def test_units_of_a_later_step_are_counted_among_those_that_are_left() -> None:
    groups = (group("a", 6), group("b", 4), group("c", 2))
    first = compose(groups, {}, {"b": (1,), "a": (0, 3)})
    assert first == {"a": (0, 3), "b": (1,)}
    assert compose(groups, first, {"a": (0, 2), "c": (1,)}) == {"a": (0, 1, 3, 4), "b": (1,), "c": (1,)}


@pytest.mark.parametrize("then", [{"other": (0,)}, {"a": (5,)}])
def test_a_step_that_names_what_the_first_net_has_not_is_refused(then: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(SepressError, match=r"don't add up .*(?s:.*)--steps 1"):
        compose((group("a", 6),), {"a": (2,)}, then)


def test_steps_that_add_up_to_another_net_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = compose

    def shifted(groups: Any, gone: Any, then: Any) -> Any:
        result = plain(groups, gone, then)
        return {
            name: tuple(u - 1 if u and u - 1 not in units else u for u in units)
            for name, units in result.items()
        }

    monkeypatch.setattr(module, "compose", shifted)
    with pytest.raises(SepressError, match="don't add up"):
        run("se residual")


def test_the_check_of_the_whole_is_the_worst_of_the_steps() -> None:
    good, worse, vacuous = Check(True, 1e-7), Check(True, 1e-6), Check(None, None, "flat")
    assert module._worst([good, worse]) is worse
    assert module._worst([good, vacuous, worse]) is vacuous
