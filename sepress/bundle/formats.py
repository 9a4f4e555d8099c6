"""What a file is, told by its content: refuses what holds no weights of a network, with what to pass instead.

Nothing is unpickled and no archive's member is read: first bytes, an archive's list of names, and the
outermost fields of a protobuf message tell enough. A suffix only counts where the content tells nothing.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO, NoReturn

from sepress.errors import InputError

_SAVE_WEIGHTS = (
    "In the code that built it, torch.save(net.state_dict(), 'weights.pt'), and pass weights.pt with --arch."
)
_EXPORTED = (
    "Pass the model it was exported from: .pt, .pth or .safetensors, with --arch where others wrote it."
)
_OTHER_FRAMEWORK = "sepress works on PyTorch networks: pass its weights for PyTorch with --arch."
_UNPACK = "Unpack it, and pass the file of weights inside."

# what a file is, and what to do instead
_ONNX = ("an ONNX graph can't be pruned or trained", f"{_EXPORTED} `sepress bench` times .onnx files.")
_TORCHSCRIPT = ("a TorchScript program can't be pruned or trained", _SAVE_WEIGHTS)
_EXPORT = ("an exported program (torch.export) can't be pruned or trained", _SAVE_WEIGHTS)
_KERAS = ("Keras and TensorFlow wrote this file, not PyTorch", _OTHER_FRAMEWORK)
_ENGINE = ("a TensorRT engine can't be pruned or trained", _EXPORTED)
_COREML = ("a Core ML model can't be pruned or trained", _EXPORTED)
_NUMPY = ("arrays of NumPy, not a PyTorch checkpoint", "Save them as tensors: torch.save({name: tensor}).")

SIGNATURES: tuple[tuple[int, bytes, tuple[str, str]], ...] = (  # where, what bytes, what it is
    (0, b"\x89HDF\r\n\x1a\n", ("an HDF5 file, as Keras and TensorFlow write it", _OTHER_FRAMEWORK)),
    (4, b"TFL3", ("a TensorFlow Lite model can't be pruned or trained", _EXPORTED)),
    (4, b"ORTM", ("an ONNX Runtime (.ort) graph can't be pruned or trained", _EXPORTED)),
    (4, b"ET12", ("an ExecuTorch program can't be pruned or trained", _EXPORTED)),
    (0, b"GGUF", ("a GGUF file of a language model", _OTHER_FRAMEWORK)),
    (0, b"\x93NUMPY", _NUMPY),
    (0, b"\x1f\x8b", ("a gzip archive", _UNPACK)),
    (257, b"ustar", ("a tar archive", _UNPACK)),
    (
        0,
        b"version https://git-lfs",
        ("only a pointer to a file that Git LFS holds", "Fetch it: git lfs pull."),
    ),
    (0, b"<!doctype html", ("a web page: the download led elsewhere", "Download the file itself.")),
    (0, b"<html", ("a web page: the download led elsewhere", "Download the file itself.")),
)
SUFFIXES = {  # of formats whose content no signature tells
    ".onnx": _ONNX,
    ".engine": _ENGINE,
    ".plan": _ENGINE,
    ".trt": _ENGINE,
    ".mlmodel": _COREML,
    ".pb": _KERAS,
    ".safetensors": ("the file is damaged or incomplete: it has no header", "Copy or download it again."),
}
SHARDS = (
    "a shard of a distributed checkpoint, as FSDP and torch.distributed write it",
    "Join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt; "
    "then pass weights.pt with --arch.",
)
DEEPSPEED = (
    "a shard of a DeepSpeed checkpoint, which holds no whole weights",
    "Join them with the zero_to_fp32.py that DeepSpeed wrote beside them; pass what it makes with --arch.",
)
FOLDERS = {  # a member that tells -> what the folder is
    "saved_model.pb": ("a TensorFlow SavedModel", _OTHER_FRAMEWORK),
    "Manifest.json": _COREML,
    ".metadata": SHARDS,
    "zero_to_fp32.py": DEEPSPEED,
}


def refuse(path: Path, what: tuple[str, str]) -> NoReturn:
    """Raise the InputError of a file that is `what` it is."""
    raise InputError(f"{path}: {what[0]}", remedy=what[1])


def check_folder(path: Path) -> None:
    """Refuse a folder of shards or of another framework by its name for it."""
    for member, what in FOLDERS.items():
        if (path / member).is_file():
            refuse(path, what)


def check_name(path: Path) -> None:
    """Refuse the files of a distributed checkpoint, whose content is a part of a zip archive."""
    if path.suffix == ".distcp" or path.name == ".metadata":
        refuse(path, SHARDS)


def check_archive(path: Path) -> None:
    """Refuse a zip archive, by the names in it, that torch.save did not write.

    torch puts everything into one folder named after the file, be that `code`: what lies below it counts.
    Raises zipfile's errors for a damaged one.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    members = {name.partition("/")[2] for name in names} | set(names)
    if any(name.startswith("code/") and name.endswith(".py") for name in members):
        refuse(path, _TORCHSCRIPT)
    if members & {"archive_format", "serialized_exported_program.json", "models/model.json"}:
        refuse(path, _EXPORT)
    if ".data/extern_modules" in members:
        refuse(path, ("a torch.package archive is code, which can't be pruned or trained", _SAVE_WEIGHTS))
    if "model.weights.h5" in members:
        refuse(path, _KERAS)
    if members and all(name.endswith(".npy") for name in names):
        refuse(path, _NUMPY)
    if "data.pkl" not in members:
        raise InputError(f"{path}: a zip archive, but not one that torch.save wrote", remedy=_UNPACK)


def refuse_by_content(path: Path) -> NoReturn:
    """Say what a file is that is neither a zip archive, nor safetensors, nor a pickle."""
    with path.open("rb") as file:
        head = file.read(512)
        for offset, bytes_, what in SIGNATURES:
            if head[offset : offset + len(bytes_)].lower() == bytes_.lower():
                refuse(path, what)
        if _is_onnx(file, path.stat().st_size):
            refuse(path, _ONNX)
    if path.suffix in SUFFIXES:
        refuse(path, SUFFIXES[path.suffix])
    raise InputError(f"{path}: not a model file", remedy="Expected a .pt, .pth or .safetensors file.")


# ---- protobuf -------------------------------------------------------------------------------------
def _is_onnx(file: BinaryIO, size: int) -> bool:
    """Whether the bytes are one message with the fields of onnx.proto's ModelProto, a graph (7) among them.

    Field 1 is the IR's version (a number), 7 the graph, 8 the operator sets (messages). Fields are skipped,
    not read, so that a file of any size takes no time.
    """
    file.seek(0)
    seen = set()
    while file.tell() < size:
        tag = _varint(file)
        if tag is None:
            return False
        number, wire = tag >> 3, tag & 7
        if not 1 <= number <= 64:
            return False
        length = _varint(file) if wire in (0, 2) else None
        if length is None or (wire == 2 and file.tell() + length > size):
            return False
        if wire == 2:
            file.seek(length, 1)
        seen.add((number, wire))
    return {(1, 0), (7, 2), (8, 2)} <= seen


def _varint(file: BinaryIO) -> int | None:
    """A protobuf varint; None at the end of the file or where it is longer than 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None
