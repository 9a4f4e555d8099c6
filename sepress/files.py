"""Write files whole or not at all: a temporary name beside the target, synced, then renamed; read JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sepress.errors import InputError, SepressError
from sepress.types import JSON

# What a killed process may leave behind: never a target's name, and known by its own.
_PARTIAL = re.compile(r"\..{1,40}\.partial-[a-z0-9_]{8}(\.[^.]+)?")
NO_SPACE = 1 << 20  # free bytes under which a failed write is told as a full disk


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; rename it to the target when all went well.

    Raises InputError where the folder can't be written or its disk is full; the target is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name[:40]}.partial-"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; outputs are ordinary files
        temporary.replace(path)
        _sync_folder(path.parent)
    except SepressError:
        raise
    except Exception as error:  # torch, safetensors and onnx raise errors of their own for a full disk
        if isinstance(error, OSError) or shutil.disk_usage(path.parent).free < NO_SPACE:
            raise _unwritable(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: Exception) -> InputError:
    full = path.parent.is_dir() and shutil.disk_usage(path.parent).free < NO_SPACE
    why = "no space is left on the disk" if full else getattr(error, "strerror", None) or str(error)
    remedy = "Make room, and start again." if full else "Choose a folder that can be written."
    return InputError(f"{path} can't be written: {why}", remedy=remedy)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system lets folders be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems sync no folders
            pass
        finally:
            os.close(handle)


def sweep_partial(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that no one else writes to."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_json(path: Path, *, what: str, remedy: str | None = None) -> JSON:
    """Read a JSON file, `what` it should be; InputError where it is none, or nested beyond reason."""
    try:
        value: JSON = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a character, as \\ud800 is, can't be shown
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} can't be read as a {what}: {reason}", remedy=remedy) from error
    return value


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: JSON) -> None:
    """Write strict JSON (no NaN) atomically, indented."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
