"""A file of unknown origin -> what it holds, without running anything in it.

torch.load is always told weights_only=True: an environment variable can flip its default.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
            _check_archive(path)
            return _read_torch(path, trust_pickle=trust_pickle, peek=peek)
        if int.from_bytes(head[:8], "little") <= path.stat().st_size - 8 and head[8:9] == b"{":
            return _read_safetensors(path, peek=peek)
        if path.suffix == ".safetensors":
            raise _damaged(path, "it does not begin like a safetensors file")
        if head[:1] == b"\x80":  # a pickle, as torch wrote files before 1.6
            return _read_torch(path, trust_pickle=trust_pickle, peek=False)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}") from error
    if path.suffix == ".onnx":
        raise InputError(
            f"{path}: an ONNX graph can't be pruned or trained",
            remedy="Pass the model it was exported from.",
        )
    raise InputError(f"{path}: not a model file", remedy="Expected a .pt, .pth or .safetensors file.")


def _head(path: Path) -> bytes:
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: it is not a file", remedy="Pass the model file inside it.")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise InputError(f"{path}: the file is empty")
    return head


def _damaged(path: Path, why: object) -> InputError:
    reason = str(why).strip().partition("\n")[0]
    return InputError(
        f"{path}: the file is damaged or incomplete: {reason}", remedy="Copy or download it again."
    )


def _check_archive(path: Path) -> None:
    """Tell torch's own zip files from its siblings, which hold programs."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    if any(re.search(r"(^|/)code/", name) for name in names):
        raise InputError(
            f"{path}: a TorchScript program can't be pruned or trained",
            remedy="In the code that built it, save net.state_dict() and pass that file with --arch.",
        )
    if path.suffix == ".pt2" or any(
        name.endswith(("archive_format", "serialized_exported_program.json", "models/model.json"))
        for name in names
    ):
        raise InputError(
            f"{path}: an exported program (torch.export) can't be pruned or trained",
            remedy="In the code that built it, save net.state_dict() and pass that file with --arch.",
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise InputError(f"{path}: a zip archive, but not one that torch.save wrote")


def _read_torch(path: Path, *, trust_pickle: bool, peek: bool) -> NativeFile | ForeignFile:
    try:
        # timm's and torchvision's training scripts keep their arguments in the checkpoint: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=peek)
    except OSError:
        raise
    except Exception as error:  # a reader of foreign bytes may raise anything
        needs_code = isinstance(error, pickle.UnpicklingError) and re.search(
            r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+)", str(error)
        )
        if not needs_code:
            raise _damaged(path, error) from error
        if trust_pickle:
            content = _run_pickle(path)
        else:
            name = next(group for group in needs_code.groups() if group)
            raise InputError(
                f"{path}: the file is a pickle that runs code when it is read (it names {name})",
                remedy="In the code that built it, save net.state_dict() and pass that file with --arch; "
                "--trust-pickle runs the code, for files of your own.",
            ) from error
    if isinstance(content, dict) and str(content.get("format")).startswith("sepress.bundle/"):
        return _native(
            path, content["format"], content.get("meta"), content.get("digest"), content.get("tensors")
        )
    return ForeignFile(content)


def _run_pickle(path: Path) -> Any:
    """The unsafe way in; only where the user typed --trust-pickle."""
    try:
        with current_folder_importable():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # the pickle's own code may raise anything
        raise InputError(
            f"{path}: the pickle failed: {type(error).__name__}: {error}",
            remedy="It needs the code that it was saved with, importable from the current folder.",
        ) from error


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
