"""The folder of one run: run.json says which stages finished, on what basis, with which files and findings.

A finished stage is reused where its basis (see basis.py) is the same and its files still have the digests
that were recorded; what depends on a change is run again, and says so. `run.json` is replaced as a whole
after each stage, so an interrupted run loses one stage at most, and of a training one epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path

from pydantic import TypeAdapter

from sepress import console
from sepress.basis import Basis, differences
from sepress.digests import file_digest
from sepress.errors import InputError
from sepress.files import read_json, sweep_partial, write_json, write_text
from sepress.lock import NAME as LOCK
from sepress.lock import FolderLock
from sepress.types import JSON

SCHEMA = "sepress.run/2"
STATE = "run.json"
RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class StageRecord:
    """What a finished stage left: its files by role, and its facts as JSON values."""

    stage: str
    artifacts: Mapping[str, str] = field(default_factory=dict)  # role -> file name in the folder
    facts: Mapping[str, JSON] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)  # file name -> sha256
    basis: Basis = field(default_factory=dict)  # all that these depend on


class RunFolder:
    """The folder of one run at a time; goes on where an earlier run of the folder stopped.

    Nothing that an earlier recipe made is lost: what is made anew is first moved to `earlier/N`.
    """

    def __init__(self, path: Path, *, recipe_text: str, claimed: bool = False) -> None:
        """Create the folder, or open and lock it; InputError where another run is at work, or it is no run's.

        `claimed` says that the folder was made empty for this run, to hold its name.
        """
        self.path = path
        self._records: dict[str, StageRecord] = {}
        self._begun: JSON = None  # the stage that an earlier run was in when it stopped, and its basis
        self._earlier: Path | None = None
        self._new = claimed or not path.exists()
        try:
            if path.exists() and not (path / STATE).exists() and any(p.name != LOCK for p in path.iterdir()):
                raise InputError(
                    f"the run folder {path} holds other files and no {STATE}",
                    remedy="Choose another folder (out: in the recipe, or --out), or empty this one.",
                )
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(path)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            sweep_partial(path)
            self._old_recipe = _read(path / RECIPE)
            if (path / STATE).exists():
                self._read_state()
            else:
                self._write()
            write_text(path / RECIPE, recipe_text)
        except OSError as error:
            self.close()
            raise _unusable(path, error) from error
        except InputError:
            self.close()
            raise

    def close(self) -> None:
        """Let other runs into the folder."""
        self._lock.release()

    def file(self, name: str) -> Path:
        return self.path / name

    def finished(self, kind: str, basis: Basis) -> StageRecord | None:
        """The record of a stage of that basis whose files are as they were written, else None: run it again.

        Says why where it was finished before, and sets the files aside that are still good.
        """
        record = self._records.get(kind)
        if record is None:
            return None
        changed = differences(record.basis, basis)
        damaged = [name for name, digest in record.digests.items() if not self._is_intact(name, digest)]
        if not changed and not damaged:
            return record
        if changed:
            console.log(f"[{kind}] again, since it depends on what has changed: {', '.join(changed)}")
            self._set_aside(record)
        else:
            console.log(f"[{kind}] again: {', '.join(damaged)} is damaged or missing")
        del self._records[kind]
        self._write()
        return None

    def begin(self, kind: str, basis: Basis) -> None:
        """Note which stage runs now; a training checkpoint of another basis goes."""
        begun = {"stage": kind, "basis": dict(basis)}
        if self._begun != begun:
            for path in self.path.glob("*.checkpoint"):
                path.unlink()
        self._begun = begun
        self._write()

    def finish(self, record: StageRecord) -> StageRecord:
        """Keep a record, with its files' digests, and write the state.

        A file that an earlier stage wrote as well is from now on this stage's to vouch for.
        """
        digests = {name: file_digest(self.file(name)) for name in record.artifacts.values()}
        for name in digests:
            _rejected(self.file(name)).unlink(missing_ok=True)  # of an earlier attempt
        for kind, r in self._records.items():
            theirs = {name: digest for name, digest in r.digests.items() if name not in digests}
            self._records[kind] = replace(r, digests=theirs)
        record = replace(record, digests=digests)
        self._records[record.stage] = record
        self._begun = None
        self._write()
        return record

    def keep_only(self, kinds: Collection[str]) -> None:
        """Set aside what stages left that the recipe does not have any more."""
        for kind in [kind for kind in self._records if kind not in kinds]:
            console.log(f"[{kind}] is not in the recipe any more")
            self._set_aside(self._records.pop(kind))
            self._write()

    def abandon(self) -> None:
        """Take a folder away again that was made for a run which was refused before it left anything."""
        ours = {STATE, RECIPE, LOCK}
        made = any(record.artifacts for record in self._records.values())
        if self._new and not made and {path.name for path in self.path.iterdir()} <= ours:
            for name in (STATE, RECIPE):
                self.file(name).unlink(missing_ok=True)
            self._lock.release(remove=True)
            self.path.rmdir()

    def reject(self, name: str) -> None:
        """Rename a file to NAME.rejected, so that nothing takes it for one that passed."""
        path = self.file(name)
        if path.exists():
            path.replace(_rejected(path))

    def _is_intact(self, name: str, digest: str) -> bool:
        """Whether a file is as it was written; one that was rejected has its name again, to be held anew."""
        path = self.file(name)
        if not path.exists() and _rejected(path).is_file() and file_digest(_rejected(path)) == digest:
            _rejected(path).replace(path)
        return path.is_file() and file_digest(path) == digest

    def _set_aside(self, record: StageRecord) -> None:
        """Move a record's files, and once the report and the recipe they were made by, to earlier/N."""
        if self._earlier is None:
            self._earlier = self._next_earlier()
            console.log(f"what was made before is kept in {self._earlier}")
            if self._old_recipe is not None:
                write_text(self._earlier / RECIPE, self._old_recipe)
            self._move("report.json", "report.md")
        self._move(*record.digests)

    def _next_earlier(self) -> Path:
        taken = {path.name for path in self.file("earlier").glob("*")}
        folder = self.file("earlier") / next(str(n) for n in count(1) if str(n) not in taken)
        folder.mkdir(parents=True)
        return folder

    def _move(self, *names: str) -> None:
        assert self._earlier is not None
        for name in names:
            if self.file(name).is_file():
                self.file(name).replace(self._earlier / name)

    def _write(self) -> None:
        records = [asdict(record) for record in self._records.values()]
        write_json(self.path / STATE, {"schema": SCHEMA, "stages": records, "begun": self._begun})

    def _read_state(self) -> None:
        remedy = "Choose another folder, or delete this one."
        value = read_json(self.path / STATE, what="run's state", remedy=remedy)
        try:
            if value["schema"] != SCHEMA:
                raise ValueError(f"schema is {value['schema']!r}, expected {SCHEMA!r}")
            records = _RECORDS.validate_python(value["stages"])
            for name in (n for r in records for n in (*r.artifacts.values(), *r.digests)):
                if name in ("", "..") or Path(name).name != name:  # it is read, and may be moved
                    raise ValueError(f"{name!r} is not the name of a file in the folder")
            self._records = {record.stage: record for record in records}
            self._begun = value["begun"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path / STATE} can't be read: {error}", remedy=remedy) from error


_RECORDS = TypeAdapter(list[StageRecord])


def _rejected(path: Path) -> Path:
    return path.with_name(f"{path.name}.rejected")


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"the run folder {path} can't be used: {error.strerror or error}",
        remedy="Choose a folder that can be written (out: in the recipe, or --out).",
    )
