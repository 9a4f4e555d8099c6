"""A plan as JSON values and back: strict and bounded, for files that someone edited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from sepress.errors import InputError
from sepress.plan.policy import check_policy
from sepress.types import JSON, TARGETS, Policy, PruningPlan

SCHEMA = "sepress.plan/2"

_MAX_ITEMS = 1_000_000  # in any list of a plan file
_MAX_TEXT = 10_000  # characters in any string of a plan file
_MAX_INT = 2**53 - 1  # what JSON readers agree on


def plan_to_json(plan: PruningPlan) -> dict[str, JSON]:
    """The plan as JSON values, schema 'sepress.plan/2'."""
    policy = plan.policy
    return {
        "schema": SCHEMA,
        "criterion": plan.criterion,
        "policy": {
            **{name: getattr(policy, name) for name in _POLICY_KEYS},
            "frozen": list(policy.frozen),
            "overrides": dict(policy.overrides),
        },
        **{name: getattr(plan, name) for name in _COUNTS},
        "latency_ratio": plan.latency_ratio,
        "groups": [
            {
                "name": name,
                "width_before": width,
                "width_after": plan.widths_after[name],
                "removed": list(plan.removed.get(name, ())),
                "evidence": plan.evidence.get(name),
            }
            for name, width in plan.widths_before.items()
        ],
        "notes": list(plan.notes),
    }


def plan_from_json(value: JSON) -> PruningPlan:
    """Read what `plan_to_json` gave, or a file that someone edited: strict, and bounded in size.

    Raises InputError naming the key that is missing, unknown, of another type or out of range.
    """
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise InputError(f"This is no plan: schema is {str(found)[:80]!r}; expected {SCHEMA!r}.")
    plan = _fields(
        value, "plan", ("schema", "criterion", "policy", *_COUNTS, "latency_ratio", "groups", "notes")
    )
    policy = _policy(plan["policy"])
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    evidence: dict[str, str] = {}
    removed: dict[str, tuple[int, ...]] = {}
    for index, row in enumerate(_list(plan["groups"], "groups")):
        where = f"groups[{index}]"
        group = _fields(row, where, ("name", "width_before", "width_after", "removed", "evidence"))
        name = _text(group["name"], f"{where}.name")
        if name in before:
            raise InputError(f"The plan's {where}.name repeats the group {name!r}.")
        before[name] = _int(group["width_before"], f"{where}.width_before", 1, _MAX_INT)
        after[name] = _int(group["width_after"], f"{where}.width_after", 1, before[name])
        if group["evidence"] is not None:
            evidence[name] = _text(group["evidence"], f"{where}.evidence")
        if units := _units(group["removed"], f"{where}.removed", before[name]):
            removed[name] = units
        if (before[name] - after[name]) % max(1, len(units)) or bool(units) != (after[name] < before[name]):
            raise InputError(
                f"The plan's {where} removes {len(units)} units and yet says {before[name]} -> {after[name]}."
            )
    if not removed:
        raise InputError("The plan's groups remove nothing.")
    return PruningPlan(
        policy=policy,
        criterion=_text(plan["criterion"], "criterion"),
        removed=removed,
        widths_before=before,
        widths_after=after,
        evidence=evidence,
        notes=tuple(_text(note, f"notes[{i}]") for i, note in enumerate(_list(plan["notes"], "notes"))),
        **{name: _int(plan[name], name, 0, _MAX_INT) for name in _COUNTS},
        latency_ratio=_ratio(plan["latency_ratio"], "latency_ratio"),
    )


_COUNTS = ("macs_before", "macs_after", "params_before", "params_after")
_POLICY_KEYS = (*TARGETS, "scope", "round_to", "min_width", "gated_only", "eca_neighbours")


def _policy(value: JSON) -> Policy:
    fields = _fields(value, "policy", (*_POLICY_KEYS, "frozen", "overrides"))
    for name in ("gated_only", "eca_neighbours"):
        if not isinstance(fields[name], bool):
            raise _expected(f"policy.{name}", "true or false", fields[name])
    if not isinstance(fields["overrides"], dict) or len(fields["overrides"]) > _MAX_ITEMS:
        raise _expected("policy.overrides", "an object of pattern: ratio", fields["overrides"])
    patterns = _list(fields["frozen"], "policy.frozen")
    frozen = tuple(_text(pattern, f"policy.frozen[{i}]") for i, pattern in enumerate(patterns))
    policy = Policy(
        **{name: fields[name] for name in _POLICY_KEYS}, frozen=frozen, overrides=dict(fields["overrides"])
    )
    try:
        check_policy(policy)
    except InputError as error:
        raise InputError(f"The plan's policy is wrong: {error.message}", remedy=error.remedy) from error
    return policy


def _fields(value: JSON, where: str, keys: Sequence[str]) -> dict[str, JSON]:
    """The value where it is an object of exactly these keys."""
    if not isinstance(value, dict):
        raise _expected(where, "an object", value)
    for key in keys:
        if key not in value:
            raise InputError(f"The plan's {where} lacks the key {key!r}.")
    for key in value:
        if key not in keys:
            raise InputError(
                f"The plan's {where} has the unknown key {key[:80]!r}; known: {', '.join(keys)}."
            )
    return value


def _list(value: JSON, where: str) -> list[JSON]:
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise _expected(where, f"a list of at most {_MAX_ITEMS:,} items", value)
    return value


def _text(value: JSON, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _expected(where, f"text of at most {_MAX_TEXT:,} characters", value)
    return value


def _int(value: JSON, where: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _expected(where, f"a whole number from {low} to {high}", value)
    return value


def _ratio(value: JSON, where: str) -> float | None:
    if value is None or (isinstance(value, float) and 0 <= value < math.inf):
        return value
    raise _expected(where, "a ratio, or null", value)


def _units(value: JSON, where: str, width: int) -> tuple[int, ...]:
    units = tuple(_int(unit, f"{where}[{i}]", 0, width - 1) for i, unit in enumerate(_list(value, where)))
    if any(left >= right for left, right in pairwise(units)):
        raise InputError(f"The plan's {where} is not sorted, or repeats a unit.")
    return units


def _expected(where: str, what: str, value: JSON) -> InputError:
    return InputError(f"The plan's {where} is {str(value)[:80]!r} ({type(value).__name__}); expected {what}.")
