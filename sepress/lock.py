"""One run in a folder at a time: a lock that the system frees when its process ends, however it ends.

A POSIX record lock belongs to the process that took it and is not inherited by fork, so loader workers that
outlive a killed run do not hold it (an flock would be theirs as well).
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Self

from sepress import console
from sepress.errors import InputError

NAME = ".sepress.lock"
_held: set[Path] = set()  # a process's own record locks do not exclude each other


class FolderLock:
    """The right to write to a folder; InputError at once where another run has it."""

    def __init__(self, folder: Path) -> None:
        """Take the lock of an existing folder."""
        self._path = folder.resolve() / NAME
        if self._path in _held:
            raise self._taken("this process")
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(self._handle)
        except (BlockingIOError, PermissionError):
            holder = self._holder()
            os.close(self._handle)
            raise self._taken(holder) from None
        except OSError as error:  # a file system without locks
            console.log(f"{folder} can't be locked ({error.strerror}): start no second run in it")
        _held.add(self._path)
        os.truncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)

    def release(self, *, remove: bool = False) -> None:
        """Give the folder free; `remove` takes the lock's file away as well."""
        if self._path in _held:
            if remove:
                self._path.unlink(missing_ok=True)
            _held.discard(self._path)
            os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _holder(self) -> str:
        try:
            who = json.loads(os.pread(self._handle, 1000, 0))
            return f"process {int(who['pid'])} on {who['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def _taken(self, holder: str) -> InputError:
        return InputError(
            f"another run is at work in {self._path.parent} ({holder})",
            remedy="Wait until it ends, or choose another folder (out: in the recipe, or --out).",
        )


if os.name == "posix":
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

else:
    import msvcrt

    def _lock(handle: int) -> None:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
