"""A run's folder: the effective recipe, each stage's artifacts with their digests, and what it found.

A finished stage is reused where its files still have the digests that were recorded; a folder of another
recipe, or of the same recipe on another model or other data, is refused. `run.json` is replaced as a whole
after each stage, so an interrupted run loses one stage at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sepress.digests import file_digest
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
    """The folder of one run; continues where an earlier run of the same recipe and inputs stopped."""

    def __init__(
        self, path: Path, *, recipe_text: str, inputs: Mapping[str, str], claimed: bool = False
    ) -> None:
        """Create the folder, or open it for the same inputs; InputError where it belongs to others.

        `inputs` are digests of all that results depend on, by what they are ('recipe', 'data', ...).
        `claimed` says that the folder was made empty for this run, to hold its name.
        """
        self.path = path
        self.inputs = dict(inputs)
        self._records: list[StageRecord] = []
        self._new = claimed or not path.exists()
        try:
            if (path / STATE).exists():
                self._records = _read_records(path / STATE, self.inputs)
            elif path.exists() and any(path.iterdir()):
                raise InputError(
                    f"the run folder {path} holds other files and no {STATE}",
                    remedy="Choose another folder (out: in the recipe, or --out), or empty this one.",
                )
            else:
                path.mkdir(parents=True, exist_ok=True)
                self._write()
            write_text(path / RECIPE, recipe_text)
        except OSError as error:
            raise InputError(
                f"the run folder {path} can't be used: {error.strerror or error}",
                remedy="Choose a folder that can be written (out: in the recipe, or --out).",
            ) from error

    def file(self, name: str) -> Path:
        return self.path / name

    def finished(self, index: int, stage: str) -> StageRecord | None:
        """The record of stage number `index` where its files are as they were written, else None."""
        if index >= len(self._records):
            return None
        record = self._records[index]
        intact = all(
            self.file(name).is_file() and file_digest(self.file(name)) == digest
            for name, digest in record.digests.items()
        )
        if record.stage == stage and intact:
            return record
        self._records = self._records[:index]  # what follows was made from it
        return None

    def finish(self, record: StageRecord) -> StageRecord:
        """Append a record, with its files' digests, and write the state.

        A file that an earlier stage wrote as well is from now on this stage's to vouch for.
        """
        digests = {name: file_digest(self.file(name)) for name in record.artifacts.values()}
        self._records = [
            replace(r, digests={name: d for name, d in r.digests.items() if name not in digests})
            for r in self._records
        ]
        record = StageRecord(record.stage, record.artifacts, record.facts, digests)
        self._records.append(record)
        self._write()
        return record

    def abandon(self) -> None:
        """Take a folder away again that was made for a run which was refused before it left anything."""
        ours = {STATE, RECIPE}
        made = any(record.artifacts for record in self._records)
        if self._new and not made and {path.name for path in self.path.iterdir()} <= ours:
            for name in ours:
                self.file(name).unlink(missing_ok=True)
            self.path.rmdir()

    def reject(self, name: str) -> None:
        """Rename a file to NAME.rejected, so that nothing takes it for one that passed its checks."""
        path = self.file(name)
        if path.exists():
            path.rename(path.with_name(f"{name}.rejected"))

    def _write(self) -> None:
        write_json(
            self.path / STATE,
            {"schema": SCHEMA, "inputs": self.inputs, "stages": [asdict(r) for r in self._records]},
        )


def _read_records(state: Path, inputs: Mapping[str, str]) -> list[StageRecord]:
    try:
        value = json.loads(state.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema is {value['schema']!r}, expected {SCHEMA!r}")
        found, records = dict(value["inputs"]), [StageRecord(**r) for r in value["stages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{state} can't be read: {error}", remedy="Choose another folder, or delete this one."
        ) from error
    other = [what for what in {**found, **inputs} if found.get(what) != inputs.get(what)]
    if other:
        raise InputError(
            f"the run folder {state.parent} belongs to another run, of another {' and another '.join(other)}",
            remedy=f"See {RECIPE} there; choose another folder (out: or --out), or delete it.",
        )
    return records
