"""Report <-> the JSON object that `--json` prints and report.json holds (schema sepress.report/1).

Keys may be added within a schema number, and readers ignore those they don't know.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from sepress.errors import InputError
from sepress.types import JSON, Check, GroupRow, Measurement, Report, Role, Variant

SCHEMA = "sepress.report/1"
# the figures of a measurement that may be null, and then carry a reason
FIGURES = ("split", "n", "top1", "top5", "loss", "macs", "params", "bytes", "latency_ms", "latency")
UNSTATED = "not measured"

T = TypeVar("T")


# ---- writing --------------------------------------------------------------------------------------
def report_to_json(report: Report, *, relative_to: Path | None = None) -> dict[str, JSON]:
    """Return the report as strict JSON values, the keys of the contract first.

    Paths of artifacts are absolute, or relative to the folder `relative_to`; that of the data stays as it was
    given. A null in a measurement always has its reason; a number that is not finite becomes such a null.
    """
    value = {
        "schema": SCHEMA,
        "name": report.name,
        "measurements": [_measurement_to_json(row) for row in report.measurements],
        "groups": [_group_to_json(row) for row in report.groups],
        "checks": {name: asdict(check) for name, check in report.checks.items()},
        "artifacts": {role: relative_path(path, relative_to) for role, path in report.artifacts.items()},
        "environment": dict(report.environment),
        "criterion": report.criterion,
        "constraints": [dict(constraint) for constraint in report.constraints],
        "variants": [_variant_to_json(row) for row in report.variants],
        "trained": report.trained,
        "selection": dict(report.selection),
        "notes": list(report.notes),
        "recipe": dict(report.recipe),
        "data": dict(report.data),
        "preprocessing": dict(report.preprocessing),
    }
    return cast(dict[str, JSON], _strict(value))


def _strict(value: JSON) -> JSON:
    """Only what strict JSON in UTF-8 carries: no infinities, and file names that are no text escaped."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_strict(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def _measurement_to_json(row: Measurement) -> dict[str, JSON]:
    values: dict[str, JSON] = {name: getattr(row, name) for name in FIGURES}
    reasons = {}
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            values[name] = None
            reasons[name] = f"not a finite number: {value}"
        elif value is None:
            reasons[name] = row.reasons.get(name, UNSTATED)
    if row.latency is not None:
        values["latency"] = dict(row.latency)
    if row.per_class is not None:
        values["per_class"] = dict(row.per_class)
    return {"label": row.label, **values, "reasons": reasons}


def _variant_to_json(row: Variant) -> dict[str, JSON]:
    said: dict[str, JSON] = {name: getattr(row, name) for name in ("precision", "kept", "how", "reason")}
    final = None if row.final is None else _measurement_to_json(row.final)
    measured = {"validation": _measurement_to_json(row.validation), "final": final}
    return said | {"agreement": row.agreement} | measured


def _group_to_json(row: GroupRow) -> dict[str, JSON]:
    # without asdict's copy of every channel
    return asdict(replace(row, excitation=None)) | {"excitation": row.excitation}


def relative_path(path: str | None, folder: Path | None) -> str | None:
    """Return the path relative to the folder where one is given, else absolute."""
    if path is None:
        return None
    if folder is not None:
        try:
            return Path(os.path.relpath(path, folder)).as_posix()
        except ValueError:  # another drive of Windows
            pass
    return str(Path(path).absolute())


# ---- reading --------------------------------------------------------------------------------------
def report_from_json(value: JSON, *, relative_to: Path | None = None) -> Report:
    """Return the report that `report_to_json` gave; paths are resolved against the folder `relative_to`.

    Keys that are not known are ignored. Raises InputError, naming the key, for what is no such report.
    """
    if not isinstance(value, Mapping) or value.get("schema") != SCHEMA:
        found = value.get("schema") if isinstance(value, Mapping) else type(value).__name__
        raise InputError(
            f"this is not a report of sepress: schema {found!r}, expected {SCHEMA!r}",
            remedy="Pass the report.json that a run wrote into its folder.",
        )
    node = _Node(value, "")
    return Report(
        name=node.get("name", str),
        measurements=tuple(_measurement_from(child) for child in node.children("measurements")),
        groups=tuple(_group_from(child) for child in node.children("groups")),
        checks={key: _check_from(child) for key, child in node.mapping("checks").items()},
        artifacts={
            role: path if path is None or relative_to is None else os.path.normpath(relative_to / path)
            for role, path in node.optional_strings("artifacts").items()
        },
        environment=node.get("environment", dict),
        criterion=node.get("criterion", str, ""),
        recipe=node.get("recipe", dict, {}),
        constraints=tuple(child.value for child in node.children("constraints", optional=True)),
        variants=tuple(_variant_from(child) for child in node.children("variants", optional=True)),
        notes=tuple(node.items("notes", str)),
        trained=node.get("trained", bool, True),
        selection={label: child.value for label, child in node.mapping("selection", optional=True).items()},
        data=_data_from(node.child("data")),
        preprocessing=_preprocessing_from(node.child("preprocessing")),
    )


class _Node:
    """A JSON object and where it stands, for errors that name the key."""

    def __init__(self, value: JSON, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _wrong(where, "an object", value)
        self.value = value
        self.where = where

    def path(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        if key not in self.value and default is not None:
            return default
        found = self.optional(key, kind)
        if found is None:
            raise _wrong(self.path(key), kind.__name__, None)
        return found

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value, or None where it is null or missing; an int passes for a float, a bool for no number."""
        found = self.value.get(key)
        return None if found is None else _checked(found, kind, self.path(key))

    def items(self, key: str, kind: type[T]) -> list[T]:
        """The values of a list, none where it is null or missing."""
        found = self.optional(key, list) or []
        return [_checked(item, kind, f"{self.path(key)}[{i}]") for i, item in enumerate(found)]

    def child(self, key: str) -> _Node:
        """The object under the key, an empty one where it is null or missing."""
        return _Node(self.optional(key, dict) or {}, self.path(key))

    def children(self, key: str, *, optional: bool = False) -> list[_Node]:
        found: list[JSON] = self.get(key, list, [] if optional else None)
        return [_Node(child, f"{self.path(key)}[{i}]") for i, child in enumerate(found)]

    def mapping(self, key: str, *, optional: bool = False) -> dict[str, _Node]:
        found: dict[str, JSON] = self.get(key, dict, {} if optional else None)
        return {name: _Node(child, f"{self.path(key)}.{name}") for name, child in found.items()}

    def optional_strings(self, key: str) -> dict[str, str | None]:
        inner = _Node(self.get(key, dict), self.path(key))
        return {name: inner.optional(name, str) for name in inner.value}


def _checked(found: JSON, kind: type[T], where: str) -> T:
    if kind is float and type(found) is int:
        found = float(found)
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
        raise _wrong(where, kind.__name__, found)
    return found


def _wrong(where: str, expected: str, found: JSON) -> InputError:
    shown = "nothing" if found is None else repr(found)[:60]
    return InputError(
        f"the report's '{where or 'top level'}' is {shown}, expected {expected}",
        remedy="The file was changed or cut; write the report again.",
    )


_MEASURED: dict[str, type] = {field.name: float for field in fields(Measurement)} | {
    "split": str,
    "n": int,
    "macs": int,
    "params": int,
    "bytes": int,
    "latency": dict,
    "per_class": dict,
}


def _measurement_from(node: _Node) -> Measurement:
    values: dict[str, Any] = {
        name: node.optional(name, kind)
        for name, kind in _MEASURED.items()
        if name not in ("label", "reasons")
    }
    return Measurement(label=node.get("label", str), reasons=node.get("reasons", dict, {}), **values)


def _variant_from(node: _Node) -> Variant:
    return Variant(
        precision=node.get("precision", str),
        kept=node.get("kept", bool),
        how=node.get("how", str),
        reason=node.get("reason", str),
        agreement=node.optional("agreement", float),
        validation=_measurement_from(node.child("validation")),
        final=None if node.optional("final", dict) is None else _measurement_from(node.child("final")),
    )


def _group_from(node: _Node) -> GroupRow:
    excitation: list[float] | None = node.optional("excitation", list)
    return GroupRow(
        name=node.get("name", str),
        role=cast(Role, node.get("role", str)),
        width_before=node.get("width_before", int),
        width_after=node.get("width_after", int),
        evidence=node.get("evidence", str),
        mean_excitation=node.optional("mean_excitation", float),
        excitation=None if excitation is None else tuple(excitation),
        frozen_because=node.optional("frozen_because", str),
    )


def _check_from(node: _Node) -> Check:
    return Check(
        passed=node.optional("passed", bool),
        relative_error=node.optional("relative_error", float),
        reason=node.optional("reason", str),
        argmax_agreement=node.optional("argmax_agreement", float),
    )


def _data_from(node: _Node) -> dict[str, JSON]:
    """Check what the renderers read of DataSource.describe(), and keep the rest as it is."""
    for key in ("path", "fingerprint", "labels_reason"):
        node.optional(key, str)
    node.optional("num_classes", int)
    node.items("notes", str)
    splits, corrupt = node.child("splits"), node.child("corrupt")
    for split in splits.value:
        splits.get(split, int)
    corrupt.optional("count", int)
    corrupt.items("names", str)
    return dict(node.value)


def _preprocessing_from(node: _Node) -> dict[str, JSON]:
    for key, kind in {"input_size": int, "mean": float, "std": float}.items():
        node.items(key, kind)
    node.optional("crop_pct", float)
    for key in ("interpolation", "origin"):
        node.optional(key, str)
    return dict(node.value)
