"""Constraints a user states: text `metric op value` -> Constraint -> whether the measurements meet it.

One grammar for every feature that takes one: `top1_drop<=0.01`, `macs_ratio <= 50%`, `latency_ms<5`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

from sepress.errors import ConstraintError, InputError
from sepress.types import JSON, Check, Measurement, Report

Op = Literal["<=", "<", ">=", ">", "=="]
OPS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}
BASE = "base"


# ---- metrics ------------------------------------------------------------------------------------
class _Unmeasured(Exception):
    """Why a metric has no value; never leaves this module."""


@dataclass(frozen=True)
class Evidence:
    """What a metric is computed from: the last net measured, the base beside it, and the checks."""

    final: Measurement | None
    base: Measurement | None
    checks: Mapping[str, Check]


@dataclass(frozen=True)
class Reading:
    """A metric's value, and the figures it comes from in words."""

    actual: float
    figures: str


@dataclass(frozen=True)
class Metric:
    """A name that constraints may use."""

    description: str
    compute: Callable[[Evidence], Reading]
    unit: Literal[
        "accuracy", "share", "number"
    ]  # accuracies lie within 0..1; 1 % reads as 0.01 but for numbers


def _field(measurement: Measurement, name: str) -> float:
    value = getattr(measurement, name)
    if value is None:
        reason = measurement.reasons.get(name, "it was not measured")
        raise _Unmeasured(f"{name} of {measurement.label} is unknown: {reason}")
    return cast(float, value)


def _last(evidence: Evidence) -> Measurement:
    if evidence.final is None:
        raise _Unmeasured("nothing was measured")
    return evidence.final


def _both(evidence: Evidence) -> tuple[Measurement, Measurement]:
    """Base and last net."""
    final = _last(evidence)
    if evidence.base is None:
        raise _Unmeasured("there is nothing to compare: a base and a net after it must both be measured")
    return evidence.base, final


def _final(name: str) -> Callable[[Evidence], Reading]:
    """The last net's own figure."""

    def compute(evidence: Evidence) -> Reading:
        final = _last(evidence)
        actual = _field(final, name)
        return Reading(actual, f"{final.label} {_short(actual)}")

    return compute


def _ratio(name: str) -> Callable[[Evidence], Reading]:
    """The last net's figure over the base's."""

    def compute(evidence: Evidence) -> Reading:
        base, final = _both(evidence)
        before, after = _field(base, name), _field(final, name)
        if before == 0:
            raise _Unmeasured(f"{name} of {base.label} is 0")
        return Reading(after / before, _two(base, before, final, after))

    return compute


def _latency_ratio(evidence: Evidence) -> Reading:
    """The ratio timed round by round beside the base, where there is one: a machine's moods cancel in it."""
    base, final = _both(evidence)
    timed = final.latency or {}
    if timed.get("ratio_to") == base.label and isinstance(timed.get("ratio"), float):
        return Reading(timed["ratio"], f"{final.label} {_short(timed['ratio'])} of {base.label}, interleaved")
    return _ratio("latency_ms")(evidence)


def _change(name: str, way: Literal["drop", "rise"]) -> Callable[[Evidence], Reading]:
    """How far the last net fell below the base or rose above it, on the same images."""

    def compute(evidence: Evidence) -> Reading:
        base, final = _same_images(evidence)
        before, after = _field(base, name), _field(final, name)
        change = _difference(before, after) if way == "drop" else _difference(after, before)
        return Reading(change, _two(base, before, final, after))

    return compute


def _worst_class_drop(evidence: Evidence) -> Reading:
    base, final = _same_images(evidence)
    for measurement in (base, final):
        if not measurement.per_class:
            reason = measurement.reasons.get("per_class", "it was not measured")
            raise _Unmeasured(f"accuracy per class of {measurement.label} is unknown: {reason}")
    before, after = base.per_class or {}, final.per_class or {}
    if before.keys() != after.keys():
        raise _Unmeasured(f"{base.label} and {final.label} were measured on other classes")
    drops = {name: _difference(before[name], after[name]) for name in before}
    worst = max(drops, key=drops.__getitem__)
    figures = f"class {worst}: {_two(base, before[worst], final, after[worst])}"
    return Reading(drops[worst], figures)


def _check_error(name: str) -> Callable[[Evidence], Reading]:
    def compute(evidence: Evidence) -> Reading:
        check = evidence.checks.get(name)
        if check is None or check.passed is None or check.relative_error is None:
            reason = "it was not run" if check is None else check.reason or "it was vacuous"
            raise _Unmeasured(f"the check {name} has no result: {reason}")
        return Reading(check.relative_error, f"{name} {_short(check.relative_error)}")

    return compute


def _same_images(evidence: Evidence) -> tuple[Measurement, Measurement]:
    base, final = _both(evidence)
    if (base.split, base.n) != (final.split, final.n):
        other = f"{final.label} on {final.split} ({final.n})"
        raise _Unmeasured(f"{base.label} was measured on {base.split} ({base.n}), {other}")
    return base, final


def _difference(a: float, b: float) -> float:
    """a - b as decimals: a drop from 0.98 to 0.97 is 0.01, not 0.010000000000000009."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a - b
    return float(Decimal(str(a)) - Decimal(str(b)))


METRICS: dict[str, Metric] = {
    "top1_drop": Metric("base top-1 minus final top-1", _change("top1", "drop"), "accuracy"),
    "top5_drop": Metric("base top-5 minus final top-5", _change("top5", "drop"), "accuracy"),
    "worst_class_drop": Metric("largest top-1 drop of a single class", _worst_class_drop, "accuracy"),
    "loss_rise": Metric("final loss minus base loss", _change("loss", "rise"), "number"),
    "top1": Metric("final top-1", _final("top1"), "accuracy"),
    "top5": Metric("final top-5", _final("top5"), "accuracy"),
    "macs_ratio": Metric("final MACs over base MACs", _ratio("macs"), "share"),
    "params_ratio": Metric("final parameters over base parameters", _ratio("params"), "share"),
    "bytes_ratio": Metric("size of the final ONNX file over the base's", _ratio("bytes"), "share"),
    "latency_ratio": Metric("final latency over base latency", _latency_ratio, "share"),
    "macs": Metric("final MACs of one image", _final("macs"), "number"),
    "params": Metric("final parameters", _final("params"), "number"),
    "bytes": Metric("bytes of the final ONNX file", _final("bytes"), "number"),
    "latency_ms": Metric("final latency in milliseconds", _final("latency_ms"), "number"),
    "parity_error": Metric("relative error of ONNX against torch", _check_error("onnx_parity"), "share"),
    "masked_error": Metric(
        "relative error of masked against removed", _check_error("masked_equals_removed"), "share"
    ),
}


# What accuracy on one split tells of a net, and the operators by which a larger net holds it more easily.
_LESS: tuple[Op, ...] = ("<=", "<")
_MORE: tuple[Op, ...] = (">=", ">")
HELD: Mapping[str, tuple[Op, ...]] = {
    "top1_drop": _LESS,
    "top5_drop": _LESS,
    "worst_class_drop": _LESS,
    "loss_rise": _LESS,
    "top1": _MORE,
    "top5": _MORE,
}


# ---- the type and its grammar -------------------------------------------------------------------
@dataclass(frozen=True)
class Constraint:
    """`metric op value`; `str()` gives the text that `parse_constraint` reads back.

    Raises InputError for an unknown metric or operator and for a value no measurement could take.
    """

    metric: str
    op: Op
    value: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"Unknown metric {self.metric!r}; known: {', '.join(METRICS)}.")
        if self.op not in OPS:
            raise InputError(f"Unknown operator {self.op!r}; known: {', '.join(OPS)}.")
        if not math.isfinite(self.value):
            raise InputError(
                f"The constraint on {self.metric} compares with {self.value}; expected a finite number."
            )
        if METRICS[self.metric].unit == "accuracy" and abs(self.value) >= 1:
            raise InputError(
                f"{self.metric} is a fraction between 0 and 1, and {_number(self.value)} lies outside.",
                remedy=f"For {_number(self.value)} % write {self.metric}{self.op}{_number(self.value)}%.",
            )

    def __str__(self) -> str:
        return f"{self.metric}{self.op}{_number(self.value)}"


_NAME = re.compile(r"\s*([A-Za-z_]\w*)")
_OP = re.compile(r"\s*(<=|>=|==|<|>)")
_VALUE = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)(\s*%)?\s*$", re.ASCII)


def parse_constraint(text: str) -> Constraint:
    """Read `metric op value`; a value may be a percentage, `top1_drop<=1%` meaning 0.01.

    Raises InputError that shows the text and the position where it stops making sense.
    """
    name = _NAME.match(text)
    if name is None:
        raise _syntax(text, 0, f"a metric ({', '.join(METRICS)})")
    if name[1] not in METRICS:
        raise _syntax(text, name.start(1), f"a known metric ({', '.join(METRICS)})")
    op = _OP.match(text, name.end())
    if op is None:
        raise _syntax(text, name.end(), f"an operator ({' '.join(OPS)})")
    value = _VALUE.match(text, op.end())
    if value is None or len(value[1]) > 40:
        raise _syntax(text, op.end(), "a number, such as 0.01 or 1%")
    if value[2] and METRICS[name[1]].unit == "number":
        raise _syntax(text, value.start(2), f"a plain number, since {name[1]} is no fraction")
    number = Decimal(value[1]) / 100 if value[2] else Decimal(value[1])
    return Constraint(name[1], cast(Op, op[1]), float(number))


def parse_held(text: str) -> Constraint:
    """Read a constraint within which a smaller net can be searched; InputError where it makes no sense."""
    constraint = parse_constraint(text)
    operators = HELD.get(constraint.metric)
    if operators is None:
        raise InputError(
            f"{constraint.metric} can't be held by a search: it is not told by accuracy on validation",
            remedy=f"Hold one of {', '.join(HELD)}, such as top1_drop<=0.01; or require it of the result.",
        )
    if constraint.op not in operators:
        raise InputError(
            f"{constraint} is no limit that a smaller net comes to: expected {constraint.metric} "
            f"{' or '.join(operators)} a value"
        )
    return constraint


def _syntax(text: str, position: int, expected: str) -> InputError:
    position += len(text[position:]) - len(text[position:].lstrip())
    return InputError(
        f"Constraint {text[:200]!r}, position {position + 1}: expected {expected}.",
        remedy="A constraint is `metric op value`, for instance top1_drop<=0.01 or macs_ratio<=50%.",
    )


# ---- the evaluator ------------------------------------------------------------------------------
@dataclass(frozen=True)
class ConstraintResult:
    """Whether a constraint is met; what can't be measured is not met, and `reason` says why."""

    constraint: str
    actual: float | None
    passed: bool
    reason: str | None = None  # why actual is None
    figures: str | None = None  # what actual comes from

    def to_json(self) -> dict[str, JSON]:
        """As the report holds it."""
        return {
            "constraint": self.constraint,
            "actual": self.actual,
            "passed": self.passed,
            "reason": self.reason,
            "figures": self.figures,
        }

    def __str__(self) -> str:
        if self.actual is None:
            return f"{self.constraint}: can't be told, {self.reason}"
        verdict = "met" if self.passed else "not met"
        return f"{self.constraint}: {verdict} at {_short(self.actual)} ({self.figures})"


def evaluate(
    constraint: Constraint,
    subject: Report | Sequence[Measurement],
    *,
    checks: Mapping[str, Check] | None = None,
    base: str = BASE,
) -> ConstraintResult:
    """Compare a report, or measurements in the order they were made, with one constraint.

    The final net is the last measurement that is not labelled `base` (the base itself where it stands
    alone: then only metrics that compare nothing can be met). The base beside it is the one measured
    on the same split, where there are several.
    """
    measurements = subject.measurements if isinstance(subject, Report) else subject
    if checks is None:
        checks = subject.checks if isinstance(subject, Report) else {}
    try:
        reading = METRICS[constraint.metric].compute(_evidence(measurements, checks, base))
        if not math.isfinite(reading.actual):
            raise _Unmeasured(f"the result is {reading.actual} ({reading.figures})")
    except _Unmeasured as why:
        return ConstraintResult(str(constraint), None, passed=False, reason=str(why))
    passed = OPS[constraint.op](reading.actual, constraint.value)
    return ConstraintResult(str(constraint), reading.actual, passed, figures=reading.figures)


def _evidence(measurements: Sequence[Measurement], checks: Mapping[str, Check], label: str) -> Evidence:
    if not measurements:
        return Evidence(None, None, checks)
    others = [measurement for measurement in measurements if measurement.label != label]
    final = (others or list(measurements))[-1]
    bases = [measurement for measurement in measurements if measurement.label == label]
    beside = [base for base in bases if base.split == final.split] or bases
    return Evidence(final, beside[-1] if others and beside else None, checks)


def require(results: Iterable[ConstraintResult]) -> None:
    """Raise ConstraintError (exit code 3) listing every constraint that is not met, with its figures."""
    failed = [result for result in results if not result.passed]
    if failed:
        lines = "\n".join(f"  {result}" for result in failed)
        raise ConstraintError(f"{len(failed)} constraint{'s' if len(failed) > 1 else ''} not met:\n{lines}")


def _two(base: Measurement, before: float, final: Measurement, after: float) -> str:
    return f"{base.label} {_short(before)}, {final.label} {_short(after)}"


def _short(value: float) -> str:
    """For reading: six digits, whole numbers in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _number(value: float) -> str:
    """The shortest text that reads back as the same number, whole ones without '.0'."""
    return repr(value).removesuffix(".0")
