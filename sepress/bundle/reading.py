"""A file of unknown origin -> what it holds, without running anything in it.

torch.load is always told weights_only=True: an environment variable can flip its default.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sepress.bundle import formats
from sepress.bundle.header import FORMAT
from sepress.errors import InputError
from sepress.models import current_folder_importable


@dataclass(frozen=True)
class NativeFile:
    """A file that sepress wrote."""

    header: str  # JSON text
    digest: str
    tensors: Mapping[str, Tensor]  # empty after a peek


@dataclass(frozen=True)
class ForeignFile:
    """A file that something else wrote: whatever it held."""

    content: Any


def read_file(path: Path, *, trust_pickle: bool = False, peek: bool = False) -> NativeFile | ForeignFile:
    """Read a model file by its content, not its suffix; InputError says what it is instead.

    `peek` reads a native file's header only. `trust_pickle` lets a pickle run its code where it could not
    be read without.
    """
    try:
        head = _head(path)
        if head.startswith(b"PK\x03\x04"):
            try:
                formats.check_archive(path)
            except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
                raise _damaged(path, error) from error
            return _read_torch(path, trust_pickle=trust_pickle, peek=peek)
        if int.from_bytes(head[:8], "little") <= path.stat().st_size - 8 and head[8:9] == b"{":
            return _read_safetensors(path, peek=peek)
        if head.startswith(_LEGACY):
            return _read_torch(path, trust_pickle=trust_pickle, peek=False)
        if head.startswith(b"\x80"):  # pickle.dump(net, file), which torch can't read
            if not trust_pickle:
                raise _needs_trust(path, [])
            return ForeignFile(_run_pickle(path, pickle.load))
        formats.refuse_by_content(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error


def _head(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        formats.check_folder(path)
        raise InputError(f"{path}: it is not a file", remedy="Pass the model file inside it.")
    formats.check_name(path)
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path}: the file is empty")
    return head


def _damaged(path: Path, why: object) -> InputError:
    reason = str(why).strip().partition("\n")[0]
    return InputError(
        f"{path}: the file is damaged or incomplete: {reason}", remedy="Copy or download it again."
    )


# ---- pickles ------------------------------------------------------------------------------------
def _read_torch(path: Path, *, trust_pickle: bool, peek: bool) -> NativeFile | ForeignFile:
    try:
        # Training scripts keep their arguments in the checkpoint: plain values, and the paths among them.
        with torch.serialization.safe_globals([argparse.Namespace, *_PATHS]), path.open("rb") as file:
            # an open file has no suffix for torch to go by, but can't be mapped
            content = torch.load(path if peek else file, map_location="cpu", weights_only=True, mmap=peek)
    except OSError:
        raise
    except Exception as error:  # a reader of foreign bytes may raise anything
        needs_code = isinstance(error, pickle.UnpicklingError) and _GLOBAL.search(str(error))
        if not needs_code:
            raise _damaged(path, error) from error
        if not trust_pickle:
            first = next(group for group in needs_code.groups() if group)
            raise _needs_trust(path, _unsafe_names(path) or [first]) from error
        content = _run_pickle(path, _load_unsafely)
    if isinstance(content, dict) and str(content.get("format")).startswith("sepress.bundle/"):
        return _native(
            path, content["format"], content.get("meta"), content.get("digest"), content.get("tensors")
        )
    return ForeignFile(content)


_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+)")
_PATHS: list[Any] = [  # read as paths that touch no disk; the module depends on Python's version
    (plain, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")
    for plain, name in ((PurePosixPath, "PosixPath"), (PureWindowsPath, "WindowsPath"))
]


def _unsafe_names(path: Path) -> list[str]:
    """What a file of torch.save would import beyond tensors and plain values; nothing of it is run."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # noqa: BLE001 - a file of before torch 1.6, or a damaged one, which may raise anything
        return []


def _needs_trust(path: Path, names: list[str]) -> InputError:
    """The error for a pickle that is more than tensors and plain values."""
    shards = [name for name in names if name.startswith("torch.distributed.")]
    if shards:
        return InputError(f"{path}: {formats.SHARDS[0]} (it names {shards[0]})", remedy=formats.SHARDS[1])
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return InputError(
        f"{path}: the file is a pickle that runs code when it is read"
        + (f" (it names {listed})" if names else ""),
        remedy=f"If you trust who made it, `sepress convert {path.name} --trust-pickle` makes a file that "
        "runs nothing. If not, have net.state_dict() saved alone, and pass that with --arch.",
    )


def _load_unsafely(file: BinaryIO) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)


def _run_pickle(path: Path, load: Callable[[BinaryIO], Any]) -> Any:
    """The unsafe way in; only where the user typed --trust-pickle."""
    try:
        with current_folder_importable(), warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # of classes whose source has changed
            return load(file)
    except Exception as error:  # the pickle's own code may raise anything
        remedy = "It needs the code that it was saved with, importable from the current folder."
        if "__main__" in str(error):
            remedy = (
                "A class in it was defined in the script itself, where no other program finds it. In that "
                "script, torch.save(net.state_dict(), 'weights.pt'), and pass weights.pt with --arch."
            )
        raise InputError(
            f"{path}: the pickle failed: {type(error).__name__}: {error}", remedy=remedy
        ) from error


_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)  # how torch began files before 1.6


def _read_safetensors(path: Path, *, peek: bool) -> NativeFile | ForeignFile:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts: dict[str, str] = file.metadata() or {}
            native = str(facts.get("format")).startswith("sepress.bundle/")
            # clones: the file's own memory is not aligned, and kernels then add in another order
            names = () if native and peek else tuple(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
        raise _damaged(path, error) from error
    if native:
        return _native(path, facts["format"], facts.get("meta"), facts.get("digest"), tensors)
    return ForeignFile(tensors)


def _native(path: Path, form: object, header: object, digest: object, tensors: object) -> NativeFile:
    if form != FORMAT:
        raise InputError(
            f"{path}: written in the format {form!r}, this version reads {FORMAT}",
            remedy="Use the sepress version that wrote it.",
        )
    if not (isinstance(header, str) and isinstance(digest, str) and isinstance(tensors, dict)):
        raise _damaged(path, "its header is incomplete")
    return NativeFile(header, digest, tensors)
