"""A run's folder: the effective recipe, each stage's artifacts with their digests, and what it found.

A finished stage is reused where its files still have the digests that were recorded; a folder of another
recipe is refused. `run.json` is replaced as a whole after each stage, so an interrupted run loses one stage
at most.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sepress.errors import InputError
from sepress.files import write_json, write_text
from sepress.types import JSON

SCHEMA = "sepress.run/1"
STATE = "run.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage left: its files by role, and its facts as JSON values."""

    stage: str
    artifacts: Mapping[str, str] = field(default_factory=dict)  # role -> file name in the folder
    facts: Mapping[str, JSON] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)  # file name -> sha256


class RunFolder:
    """The folder of one effective recipe; continues where an earlier run of the same recipe stopped."""

    def __init__(self, path: Path, *, recipe_text: str, digest: str) -> None:
        """Create the folder, or open it for the same recipe; InputError where it belongs to another one."""
        self.path = path
        self.digest = digest
        self._records: list[StageRecord] = []
        state = path / STATE
        if state.exists():
            self._records = _read_records(state, digest)
        elif path.exists() and any(path.iterdir()):
            raise InputError(
                f"the run folder {path} holds other files and no {STATE}",
                remedy="Choose another folder (out: in the recipe, or --out), or empty this one.",
            )
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._write()
        write_text(path / RECIPE, recipe_text)

    def file(self, name: str) -> Path:
        return self.path / name

    def finished(self, index: int, stage: str) -> StageRecord | None:
        """The record of stage number `index` where its files are as they were written, else None."""
        if index >= len(self._records):
            return None
        record = self._records[index]
        intact = all(
            self.file(name).is_file() and sha256(self.file(name)) == digest
            for name, digest in record.digests.items()
        )
        if record.stage == stage and intact:
            return record
        self._records = self._records[:index]  # what follows was made from it
        return None

    def finish(self, record: StageRecord) -> StageRecord:
        """Append a record, with its files' digests, and write the state."""
        digests = {name: sha256(self.file(name)) for name in record.artifacts.values()}
        record = StageRecord(record.stage, record.artifacts, record.facts, digests)
        self._records.append(record)
        self._write()
        return record

    def reject(self, pattern: str) -> None:
        """Rename what matches to NAME.rejected, so that nothing takes it for a model that passed."""
        for path in sorted(self.path.glob(pattern)):
            path.rename(path.with_name(path.name + ".rejected"))

    def _write(self) -> None:
        write_json(
            self.path / STATE,
            {"schema": SCHEMA, "recipe": self.digest, "stages": [asdict(r) for r in self._records]},
        )


def _read_records(state: Path, digest: str) -> list[StageRecord]:
    try:
        value = json.loads(state.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema is {value['schema']!r}, expected {SCHEMA!r}")
        found, records = value["recipe"], [StageRecord(**r) for r in value["stages"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"{state} can't be read: {error}", remedy="Choose another folder, or delete this one."
        ) from error
    if found != digest:
        raise InputError(
            f"the run folder {state.parent} belongs to another recipe",
            remedy=f"Compare {RECIPE} there with yours; choose another folder (out: or --out), or delete it.",
        )
    return records


def sha256(path: Path) -> str:
    """Return the file's SHA-256 as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
