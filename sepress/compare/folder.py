"""The facts of a comparison, and the folder in which finished cells are kept.

    settings.json   what all cells share; another comparison is refused
    bases.jsonl     a line a seed: the base it starts from
    cells.jsonl     a line a cell: method, point and seed, and what they gave

Methods, points and seeds may be added to the same folder; an interruption loses the cell it meets.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from sepress.compare.methods import Method
from sepress.defaults import BATCH_SIZE, CALIBRATION_IMAGES, RECALIBRATION_IMAGES, REFIT_PASSES
from sepress.errors import InputError
from sepress.files import sweep_partial, write_json, write_text
from sepress.lock import FolderLock
from sepress.plan import check_policy
from sepress.schedule import TrainConfig
from sepress.types import JSON, Policy, Target

SCHEMA = "sepress.compare/2"
_WORDS: dict[Target, str] = {
    "ratio": "ratio",
    "target_macs": "MACs",
    "target_params": "params",
    "target_latency": "latency",
}


class Point(NamedTuple):
    """An operating point: one of a policy's targets, and its value."""

    target: Target
    value: float

    def __str__(self) -> str:
        return f"{_WORDS[self.target]} {self.value:g}"

    def policy(self, common: Policy) -> Policy:
        """The policy with this target."""
        target: dict[str, Any] = {self.target: self.value}
        return replace(common, **target)


def split_policy(policy: Policy) -> tuple[Point, Policy]:
    """A policy's operating point, and what is left of it without one."""
    ((target, value),) = policy.targets.items()
    return Point(target, value), replace(
        policy, ratio=None, target_macs=None, target_params=None, target_latency=None
    )


@dataclass(frozen=True)
class Comparison:
    """What is compared with what; everything that a cell's figures depend on.

    A seed draws the calibration set, a random ranking and the order of the fine-tune; with a base net for
    each seed, its base too.
    """

    methods: tuple[Method, ...]
    points: tuple[Point, ...]  # the most wanted first
    seeds: tuple[int, ...]
    policy: Policy  # without a target: each point has its own
    finetune: TrainConfig | None  # None: no fine-tuning
    scratch: TrainConfig | None = None  # of the method 'scratch': all the training that others had
    against: Method | None = None  # what the others are compared with in pairs; None: the first method
    split: str = "test"
    calibration_images: int = CALIBRATION_IMAGES
    recalibration_images: int = RECALIBRATION_IMAGES
    batch_size: int = BATCH_SIZE
    workers: int = 0

    def __post_init__(self) -> None:
        for what in ("methods", "points", "seeds"):
            named = getattr(self, what)
            if not named or len(set(named)) < len(named):
                raise InputError(f"a comparison needs {what}, each once")
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise InputError("a seed is a whole number from 0 to 4294967295")
        for point in self.points:
            check_policy(point.policy(self.policy))
        for method in (*self.methods, *([self.against] if self.against else [])):
            method.policy(self.policy)  # its criterion suits its scope, or that is said now
        if self.scratch is None and any(method.from_scratch for method in self.methods):
            raise InputError("how a net is trained from scratch is not known", remedy="Leave 'scratch' out.")

    @property
    def reference(self) -> str:
        """The name of the method that the others are compared with."""
        return (self.against or self.methods[0]).name

    def settings(self) -> dict[str, JSON]:
        """What all cells share, as plain values; seeds and what changes no result are left out."""
        grows = {"methods", "points", "seeds", "against", "workers"}
        values = {name: value for name, value in asdict(self).items() if name not in grows}
        for name in ("finetune", "scratch"):
            if values[name] is not None:
                values[name] = {k: v for k, v in values[name].items() if k not in ("seed", "workers")}
        return _plain(values | {"refit_passes": REFIT_PASSES})


def _plain(values: Mapping[str, Any]) -> dict[str, JSON]:
    """As a file gives them back: lists for tuples."""
    plain: dict[str, JSON] = json.loads(json.dumps(values))
    return plain


@dataclass(frozen=True)
class BaseFigures:
    """The net that a seed's cells start from."""

    seed: int
    weights: str  # digest
    macs: int
    params: int
    right: str  # the images it is right on, packed
    n: int  # how many images the split has

    @property
    def top1(self) -> float:
        return float(unpack(self.right, self.n).mean())


@dataclass(frozen=True)
class Cell:
    """What one method gave at one point for one seed; a phase that a method does not have is None.

    `right` holds the images of the split that the net is right on, after 'recalibrated' and 'tuned', as
    `pack` writes them: two methods can be compared image by image.
    """

    method: str
    target: Target
    value: float
    seed: int
    macs_ratio: float
    params_ratio: float
    one_shot: float | None
    recalibrated: float | None
    tuned: float | None
    right: Mapping[str, str] = field(repr=False)
    seconds: float
    unchecked: str | None = None  # why it can't be told whether masked = removed holds; None: it holds

    @property
    def point(self) -> Point:
        return Point(self.target, self.value)

    @property
    def key(self) -> tuple[str, Point, int]:
        return self.method, self.point, self.seed


def pack(right: np.ndarray) -> str:
    """Booleans (n,) as base64 text of their bits, the first in the highest bit of the first byte."""
    return base64.b64encode(np.packbits(right).tobytes()).decode("ascii")


def unpack(text: str, n: int) -> np.ndarray:
    """The (n,) booleans that `pack` wrote."""
    bits = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(bits, count=n).astype(bool)


# ---- the folder -----------------------------------------------------------------------------------
Row = TypeVar("Row", BaseFigures, Cell)


class Rows(Generic[Row]):
    """A file of one kind of fact, a JSON line each, which grows."""

    def __init__(self, path: Path, kind: type[Row]) -> None:
        """Read it; a last line cut short by an interruption is taken away."""
        self.path = path
        self.rows: list[Row] = []
        if not path.exists():
            return
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines[-1]:
            write_text(path, "".join(line + "\n" for line in lines[:-1]))
        try:
            self.rows = [kind(**json.loads(line)) for line in lines[:-1]]
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path} is damaged: {error}", remedy="Delete the line, or the folder."
            ) from error

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


class CompareFolder:
    """The folder of one comparison, made or opened again."""

    def __init__(self, path: Path, comparison: Comparison, *, data: str) -> None:
        """InputError where it holds another comparison, or other files; `data` is the images' fingerprint.

        Nothing is made before `keep_settings`.
        """
        self.path = path
        self._marker = path / "settings.json"
        self.settings = {"schema": SCHEMA, "data": data, **comparison.settings()}
        with self._usable():
            if self._marker.exists():
                held = json.loads(self._marker.read_text(encoding="utf-8"))
                self.settings = _agreed(held, self.settings, path)
            elif path.exists() and any(path.iterdir()):
                raise InputError(f"{path} holds other files", remedy="Choose another folder with --out.")
            self._read_rows()

    def _read_rows(self) -> None:
        self.bases = Rows(self.path / "bases.jsonl", BaseFigures)
        self.cells = Rows(self.path / "cells.jsonl", Cell)

    def keep_settings(self) -> FolderLock:
        """Make the folder that of this comparison, and let no other run into it until that lock goes."""
        with self._usable():
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.path)
            sweep_partial(self.path)
            write_json(self._marker, self.settings)
            self._read_rows()  # again: another run may have been at work until now
        return lock

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"the folder {self.path} can't be used: {reason}", remedy="Choose another with --out."
            ) from error

    def check_base(self, seed: int, weights: str) -> bool:
        """Whether this seed's base was measured before; InputError where that was another one."""
        known = next((base for base in self.bases.rows if base.seed == seed), None)
        if known is not None and known.weights != weights:
            raise InputError(
                f"{self.path} holds cells of another base for seed {seed}",
                remedy="Pass the same models and seeds in the same order, or choose another --out.",
            )
        return known is not None


def _agreed(held: Any, given: dict[str, JSON], path: Path) -> dict[str, JSON]:
    """The settings of both; InputError where they differ.

    A setting that the file does not have is younger than it: its cells were made as the default makes them,
    or, where the setting has none, as they are made now.
    How nets are trained from scratch may come later, since it touches no other cell.
    """
    if not isinstance(held, dict):
        raise InputError(f"{path / 'settings.json'} is damaged", remedy="Choose another with --out.")
    if held.get("scratch") is None or given["scratch"] is None:
        both = held.get("scratch") or given["scratch"]
        held, given = held | {"scratch": both}, given | {"scratch": both}
    if different := list(_differences(held, given)):
        raise InputError(
            f"{path} holds a comparison of another {' and another '.join(different)}",
            remedy="Choose another with --out; only methods, points and seeds may be added to the same one.",
        )
    return given


def _differences(held: dict[str, JSON], given: dict[str, JSON]) -> list[str]:
    """The settings, and those within a group of settings, that are not equal."""
    held, found = _DEFAULTS | held, []
    for name in sorted(held.keys() & given.keys()):
        a, b = held[name], given[name]
        if name in _GROUPS and isinstance(a, dict) and isinstance(b, dict):
            a = _GROUPS[name] | a
            found += [f"{name}.{key}" for key in sorted(a.keys() & b.keys()) if a[key] != b[key]]
        elif a != b:
            found.append(name)
    return found


_DEFAULTS = _plain({f.name: f.default for f in fields(Comparison) if f.default is not MISSING})
_TRAINING = _plain(asdict(TrainConfig()))
_GROUPS = {"policy": _plain(asdict(Policy())), "finetune": _TRAINING, "scratch": _TRAINING}
