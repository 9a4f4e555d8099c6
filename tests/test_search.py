"""The search for the smallest net within a constraint, on figures made up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import nn

from sepress import console
from sepress.constraints import Constraint, ConstraintResult
from sepress.errors import InputError
from sepress.pruning import Surgery
from sepress.search import PROBES, Found, search_note, smallest_within
from sepress.types import Check, Policy, PruningPlan

LIMIT = Constraint("top1_drop", "<=", 0.01)
PLAN = PruningPlan(
    policy=Policy(target_macs=0.5),
    criterion="l2",
    removed={},
    widths_before={},
    widths_after={},
    evidence={},
    macs_before=1000,
    macs_after=1000,
    params_before=10,
    params_after=10,
)


def planned(share: float, *, step: int = 1) -> PruningPlan:
    """A plan of so many MACs of 1,000, rounded down to a multiple of the step."""
    macs = int(share * 1000 / step) * step
    return replace(PLAN, macs_after=macs, removed={"conv": tuple(range(1000 - macs))})


def search(
    drop: Callable[[float], float | None], *, least: float = 0.0, step: int = 1, limit: Constraint = LIMIT
) -> tuple[Found | None, list[float], str]:
    """Search on nets whose accuracy drops by drop(share); returns what was tried, and an error's words."""
    tried: list[float] = []

    def attempt(target: float) -> tuple[Surgery, ConstraintResult]:
        plan = planned(target, step=step)
        share = plan.macs_after / 1000
        tried.append(share)
        actual = drop(share)
        passed = actual is not None and actual <= limit.value
        if limit.op == ">=":
            passed = actual is not None and actual >= limit.value
        reason = "the outputs are not finite" if actual is None else None
        result = ConstraintResult(str(limit), actual, passed, reason=reason, figures="")
        return Surgery(nn.Identity(), plan, None, Check(True, 0.0)), result  # type: ignore[arg-type]

    try:
        found = smallest_within(
            limit, least=least, plan=lambda share: planned(share, step=step), attempt=attempt
        )
    except InputError as error:
        return None, tried, str(error)
    return found, tried, ""


@pytest.mark.parametrize("edge", [0.2, 0.37, 0.5, 0.93])
def test_what_is_found_holds_and_lies_within_a_sixtyfourth_of_the_edge(edge: float) -> None:
    found, tried, _ = search(lambda share: 0.0 if share >= edge else 0.5)
    assert found is not None
    share = found.surgery.plan.macs_after / 1000
    assert edge <= share < edge + 1 / 64 + 0.002
    assert len(tried) <= PROBES
    assert [probe.share for probe in found.probes] == tried


def test_the_first_probe_halves_what_can_be_reached() -> None:
    _, tried, _ = search(lambda share: 0.0, least=0.4)
    assert tried[:3] == pytest.approx([0.7, 0.55, 0.475], abs=0.0011)


def test_no_net_is_made_twice_where_rounding_gives_the_same_widths() -> None:
    found, tried, _ = search(lambda share: 0.0 if share >= 0.8 else 0.5, step=100)
    assert len(tried) == len(set(tried))
    assert found is not None
    assert found.surgery.plan.macs_after == 800


def test_where_none_holds_the_best_that_was_reached_is_said() -> None:
    found, tried, error = search(lambda share: 0.5 - 0.4 * share)
    assert found is None
    assert f"top1_drop<=0.01 on validation; the best of {len(tried)} reached top1_drop" in error
    assert f"at {max(tried):.1%} of the MACs" in error
    assert "--finetune-epochs" in error


def test_the_best_of_an_accuracy_is_the_highest() -> None:
    _, tried, error = search(lambda share: share / 2, limit=Constraint("top1", ">=", 0.9))
    assert f"reached top1 {max(tried) / 2:.6g}" in error


def test_nets_that_can_not_be_measured_do_not_hold_and_the_reason_is_said() -> None:
    found, _, error = search(lambda share: None)
    assert found is None
    assert "the outputs are not finite" in error


def test_every_probe_is_a_line_and_the_note_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(console, "log", lines.append)
    found, tried, _ = search(lambda share: 0.0 if share >= 0.5 else 0.5)
    assert found is not None
    assert len(lines) == len(tried)
    assert lines[0].startswith("probe 1 of at most 6: 50.0% of the MACs, top1_drop<=0.01: met at 0")
    note = search_note(LIMIT, found, images=500, tuned_epochs=3)
    assert "within top1_drop<=0.01 on 500 validation images keeps 50.0% of the MACs" in note
    assert "each fine-tuned for 3 epochs: 25.0% did not, " in note
    assert note.endswith("50.0% held")
