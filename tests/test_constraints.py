"""Constraints: one grammar, one evaluator, figures worked out by hand."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from sepress.constraints import METRICS, OPS, Constraint, evaluate, parse_constraint, require
from sepress.errors import ConstraintError, InputError
from sepress.types import Check, Measurement, Report

BASE = Measurement(
    label="base",
    split="test",
    n=1000,
    top1=0.98,
    top5=0.999,
    loss=0.1,
    macs=2_000_000,
    params=100_000,
    bytes=400_000,
    latency_ms=4.0,
    latency=None,
    per_class={"cat": 0.97, "dog": 0.99},
)
PRUNED = replace(BASE, label="pruned", top1=0.5)
TUNED = replace(
    BASE,
    label="tuned",
    top1=0.97,
    top5=0.998,
    loss=0.25,
    macs=1_000_000,
    params=40_000,
    bytes=180_000,
    latency_ms=3.0,
    per_class={"cat": 0.97, "dog": 0.94},
)
CHECKS = {
    "onnx_parity": Check(True, 2e-6, argmax_agreement=1.0),
    "masked_equals_removed": Check(True, 3e-7),
}
RUN = (BASE, PRUNED, TUNED)


def report(*measurements: Measurement) -> Report:
    return Report(
        name="run",
        measurements=measurements,
        groups=(),
        checks=CHECKS,
        artifacts={},
        environment={},
        criterion="contribution",
    )


# ---- grammar ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("top1_drop<=0.01", Constraint("top1_drop", "<=", 0.01)),
        ("top1_drop<=1%", Constraint("top1_drop", "<=", 0.01)),
        ("  macs_ratio  <  50 %  ", Constraint("macs_ratio", "<", 0.5)),
        ("top1>=.97", Constraint("top1", ">=", 0.97)),
        ("top1_drop<=-0.5%", Constraint("top1_drop", "<=", -0.005)),
        ("parity_error<1e-4", Constraint("parity_error", "<", 1e-4)),
        ("macs==2000000", Constraint("macs", "==", 2e6)),
        ("latency_ms>+2.", Constraint("latency_ms", ">", 2.0)),
        ("top1_drop<=0.7%", Constraint("top1_drop", "<=", 0.007)),  # 0.7 / 100 is 0.006999999999999999
    ],
)
def test_the_grammar_is_metric_op_value(text: str, constraint: Constraint) -> None:
    assert parse_constraint(text) == constraint


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("", 1, "a metric"),
        ("<=0.1", 1, "a metric"),
        ("top2_drop<=0.1", 1, "a known metric .*top1_drop, top5_drop"),
        ("  speed<1", 3, "a known metric"),
        ("top1_drop", 10, "an operator"),
        ("top1_drop 0.01", 11, "an operator"),
        ("top1_drop=0.01", 10, "an operator"),
        ("top1_drop!=0.01", 10, "an operator"),
        ("top1_drop=<0.01", 10, "an operator"),
        ("top1_drop<=", 12, "a number"),
        ("top1_drop <= one", 14, "a number"),
        ("top1_drop<=nan", 12, "a number"),
        ("top1_drop<=inf", 12, "a number"),
        ("top1_drop<=0.01 and more", 12, "a number"),
        ("top1_drop<=0,01", 12, "a number"),
        ("top1_drop<=1%%", 12, "a number"),
        ("top1_drop<=" + "1" * 50, 12, "a number"),
        ("macs<=50%", 9, "a plain number, since macs is no fraction"),
        ("loss_rise<=5 %", 14, "a plain number"),
    ],
)
def test_a_text_outside_the_grammar_is_refused_at_its_position(
    text: str, position: int, expected: str
) -> None:
    with pytest.raises(InputError, match=rf"position {position}: expected {expected}"):
        parse_constraint(text)


@pytest.mark.parametrize("text", ["top1_drop<=1", "top1>=97", "worst_class_drop<5", "top1_drop<=100%"])
def test_an_accuracy_in_whole_percent_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(InputError, match=r"is a fraction between 0 and 1(.|\n)*For .*%\."):
        parse_constraint(text)


def test_a_constraint_built_in_code_is_held_to_the_same_rules() -> None:
    with pytest.raises(InputError, match="Unknown metric 'speed'; known: top1_drop"):
        Constraint("speed", "<=", 1.0)
    with pytest.raises(InputError, match="Unknown operator '!='"):
        Constraint("macs", "!=", 1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected a finite number"):
        Constraint("macs", "<=", float("nan"))


@pytest.mark.parametrize("seed", range(20))
def test_the_text_of_a_constraint_parses_back_to_it(seed: int) -> None:
    generator = random.Random(seed)
    for metric in METRICS:
        value = generator.choice([generator.uniform(-1, 1), 10 ** generator.uniform(-12, -1), 0.0, 0.5])
        constraint = Constraint(metric, generator.choice(list(OPS)), value)  # type: ignore[arg-type]
        assert parse_constraint(str(constraint)) == constraint


def test_the_text_of_whole_numbers_has_no_point() -> None:
    assert str(parse_constraint("macs <= 2000000.0")) == "macs<=2000000"


# ---- values -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("metric", "actual"),
    [
        ("top1_drop", 0.01),
        ("top5_drop", 0.001),
        ("worst_class_drop", 0.05),
        ("loss_rise", 0.15),
        ("top1", 0.97),
        ("top5", 0.998),
        ("macs_ratio", 0.5),
        ("params_ratio", 0.4),
        ("bytes_ratio", 0.45),
        ("latency_ratio", 0.75),
        ("macs", 1_000_000),
        ("params", 40_000),
        ("bytes", 180_000),
        ("latency_ms", 3.0),
        ("parity_error", 2e-6),
        ("masked_error", 3e-7),
    ],
)
def test_each_metric_compares_the_last_net_with_the_base(metric: str, actual: float) -> None:
    constraint = Constraint(metric, "==", actual)
    for result in (
        evaluate(constraint, report(*RUN)),
        evaluate(constraint, RUN, checks=CHECKS),
        evaluate(constraint, (TUNED, BASE), checks=CHECKS),
    ):
        assert (result.actual, result.passed, result.reason) == (actual, True, None)


def test_every_metric_is_tested_by_hand_and_described() -> None:
    assert all(metric.description for metric in METRICS.values())
    assert len(METRICS) == 16


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("top1_drop<=0.01", True),  # 0.98 - 0.97 is 0.010000000000000009 in binary
        ("top1_drop<0.01", False),
        ("top1_drop>=0.01", True),
        ("top1_drop>0.01", False),
        ("top1_drop==0.01", True),
        ("top1_drop<=0.009", False),
        ("macs_ratio<=50%", True),
        ("macs_ratio<=0.49", False),
    ],
)
def test_operators_hold_exactly_at_the_limit(text: str, passed: bool) -> None:
    assert evaluate(parse_constraint(text), RUN).passed is passed


def test_a_ratio_timed_beside_the_base_counts_before_one_of_medians() -> None:
    timed = replace(TUNED, latency={"ratio": 0.8, "ratio_to": "base"})
    other = replace(TUNED, latency={"ratio": 0.8, "ratio_to": "folded"})
    limit = parse_constraint("latency_ratio<=0.76")
    assert [evaluate(limit, (BASE, last)).actual for last in (timed, other)] == [0.8, 0.75]


def test_a_gain_is_a_negative_drop() -> None:
    better = replace(TUNED, top1=0.985)
    assert evaluate(parse_constraint("top1_drop<=0"), (BASE, better)).actual == -0.005


@pytest.mark.parametrize("metric", ["top1_drop", "loss_rise", "worst_class_drop"])
def test_no_change_is_a_zero_without_a_sign(metric: str) -> None:
    same = replace(BASE, label="tuned")
    assert f"{metric}<=0: met at 0 (" in str(evaluate(parse_constraint(f"{metric}<=0"), (BASE, same)))


@pytest.mark.parametrize(
    ("text", "measurements", "reason"),
    [
        ("top1>=0.9", (), "nothing was measured"),
        ("macs_ratio<=0.5", (BASE,), "nothing to compare"),
        ("macs_ratio<=0.5", (TUNED,), "nothing to compare"),
        (
            "top1_drop<=0.1",
            (BASE, replace(TUNED, top1=None)),
            "top1 of tuned is unknown: it was not measured",
        ),
        (
            "top1_drop<=0.1",
            (replace(BASE, top1=None, reasons={"top1": "no labels"}), TUNED),
            "top1 of base is unknown: no labels",
        ),
        (
            "top1_drop<=0.1",
            (BASE, replace(TUNED, split="val", n=500)),
            "base was measured on test \\(1000\\), tuned on val",
        ),
        ("bytes_ratio<=0.5", (replace(BASE, bytes=0), TUNED), "bytes of base is 0"),
        ("loss_rise<=0.5", (BASE, replace(TUNED, loss=float("nan"))), "the result is nan"),
        ("worst_class_drop<=0.1", (BASE, replace(TUNED, per_class=None)), "per class of tuned is unknown"),
        ("worst_class_drop<=0.1", (BASE, replace(TUNED, per_class={"cat": 1.0})), "on other classes"),
        ("parity_error<=0.1", RUN, "the check onnx_parity has no result: it was not run"),
    ],
)
def test_what_cannot_be_measured_is_not_met_and_says_why(
    text: str, measurements: tuple[Measurement, ...], reason: str
) -> None:
    result = evaluate(parse_constraint(text), measurements)
    assert (result.actual, result.passed) == (None, False)
    assert result.reason is not None
    with pytest.raises(ConstraintError, match=reason):
        require([result])


def test_a_vacuous_check_meets_nothing() -> None:
    checks = {"onnx_parity": Check(None, 0.0, reason="the outputs do not depend on the image")}
    result = evaluate(parse_constraint("parity_error<=1e-4"), RUN, checks=checks)
    assert not result.passed
    assert "do not depend on the image" in str(result)


def test_checks_need_no_measurement() -> None:
    assert evaluate(parse_constraint("parity_error<=1e-4"), (), checks=CHECKS).passed


def test_a_base_alone_can_meet_what_compares_nothing() -> None:
    assert evaluate(parse_constraint("top1>=0.97"), (BASE,)).actual == 0.98


def test_the_base_beside_the_last_net_is_the_one_on_its_split() -> None:
    on_val = replace(BASE, split="val", n=500, top1=0.6)
    result = evaluate(parse_constraint("top1_drop<=0.02"), (BASE, on_val, TUNED))
    assert result.actual == 0.01


# ---- results ------------------------------------------------------------------------------------
def test_require_lists_every_failure_with_its_figures() -> None:
    texts = ("top1_drop<=0.001", "macs_ratio<=0.5", "worst_class_drop<=1%", "macs<=5e5")
    with pytest.raises(ConstraintError) as caught:
        require(evaluate(parse_constraint(text), RUN) for text in texts)
    assert str(caught.value) == (
        "3 constraints not met:\n"
        "  top1_drop<=0.001: not met at 0.01 (base 0.98, tuned 0.97)\n"
        "  worst_class_drop<=0.01: not met at 0.05 (class dog: base 0.99, tuned 0.94)\n"
        "  macs<=500000: not met at 1,000,000 (tuned 1,000,000)"
    )
    assert caught.value.exit_code == 3


def test_require_is_silent_when_all_are_met() -> None:
    met = evaluate(parse_constraint("macs_ratio<=0.5"), RUN)
    assert met.passed
    require([])
    require([met])


def test_a_result_is_strict_json() -> None:
    result = evaluate(parse_constraint("top1_drop<=2%"), RUN)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False)) == {
        "constraint": "top1_drop<=0.02",
        "actual": 0.01,
        "passed": True,
        "reason": None,
        "figures": "base 0.98, tuned 0.97",
    }


def test_constraints_and_plans_import_nothing_heavy() -> None:
    code = (
        "import sys, sepress.constraints, sepress.plan; print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
