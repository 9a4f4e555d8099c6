"""A folder of images -> a catalog: class folders, with or without train/val/test above them, or none.

Whatever the layout, the order is that of the relative paths (POSIX, case-sensitive), hidden files
and folders are left out, and symbolic links are followed once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from sepress.data.catalog import Catalog, Samples
from sepress.data.images import SUFFIXES, Mode, load_file
from sepress.data.spec import DataSpec
from sepress.data.splits import TEST_FRACTION, cut
from sepress.errors import InputError

_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass
class _Found:
    """The images under one folder whose subfolders are classes; paths relative to the data's root."""

    paths: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # bytes
    classes: list[str | None] = field(default_factory=list)
    loose: int = 0  # images beside class folders
    others: Counter[str] = field(default_factory=Counter)  # what else lay there, by suffix

    @property
    def labelled(self) -> bool:
        return any(name is not None for name in self.classes)


def open_folder(spec: DataSpec) -> Catalog:
    """Find the images under a folder; InputError for none, a class without any, a name not in UTF-8."""
    _check_name(spec.path)
    root = Path(spec.path).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(
            f"data folder '{spec.path}' {what}",
            remedy="Pass a folder of class folders, a folder of images, 'digits' or 'torchvision:NAME'.",
        )
    split_folders = _find_splits(root)
    found = {split: _scan(root, folder) for split, folder in split_folders.items()} or {
        "all": _scan(root, "")
    }
    notes = _remarks(found)
    if sum(len(part.paths) for part in found.values()) == 0:
        raise InputError(
            f"data folder '{spec.path}' holds no image",
            remedy=f"Expected files ending in {', '.join(sorted(SUFFIXES))}.",
        )
    fingerprint = _fingerprint(found)
    found = _choose(found, notes)
    classes = sorted({name for part in found.values() for name in part.classes if name is not None})
    if "train" in found and not found["train"].labelled:
        classes, found = [], {"train": found["train"]}
    reader = partial(_read, root)
    samples = {split: _samples(part, classes, reader) for split, part in found.items()}
    parts = _cut(samples, split_folders, spec.val_fraction, notes, labelled=bool(classes))
    return Catalog(parts, tuple(classes), fingerprint, "natural", tuple(notes))


def _read(root: Path, name: str, mode: Mode) -> Image.Image:
    return load_file(root / name, mode)


def _find_splits(root: Path) -> dict[str, str]:
    """Our split -> the folder's name, where the folder has a train folder or split folders alone."""
    folders = [entry.name for entry in _entries(root) if _is_folder(entry)]
    known = {name: _SPLITS[name.casefold()] for name in folders if name.casefold() in _SPLITS}
    if "train" not in known.values() and len(known) < len(folders):
        return {}
    twice = [split for split, times in Counter(known.values()).items() if times > 1]
    if twice:
        names = ", ".join(f"'{name}'" for name, split in known.items() if split in twice)
        raise InputError(f"several folders for one split: {names}", remedy="Keep one of them.")
    return {split: name for name, split in known.items()}


def _scan(root: Path, folder: str) -> _Found:
    """Collect images: first-level folders are classes, whatever lies below belongs to its class."""
    base, prefix = root / folder, f"{folder}/" if folder else ""
    inside, loose = _Found(), _Found()
    for entry in _entries(base):
        path = prefix + entry.name
        if not _is_folder(entry):
            _add(loose, entry, path, None)
            continue
        before = len(inside.paths)
        _walk(inside, entry, path, entry.name, seen={os.path.realpath(root), os.path.realpath(base)})
        if len(inside.paths) == before:
            raise InputError(f"class folder '{path}' holds no image", remedy="Fill it or remove it.")
    if not inside.paths:
        return loose
    inside.others += loose.others
    inside.loose = len(loose.paths)
    return inside


def _walk(found: _Found, folder: os.DirEntry[str], path: str, label: str, seen: set[str]) -> None:
    real = os.path.realpath(folder)
    if real in seen:  # a link back to a folder that is walked already
        return
    seen.add(real)
    for entry in _entries(folder):
        if _is_folder(entry):
            _walk(found, entry, f"{path}/{entry.name}", label, seen)
        else:
            _add(found, entry, f"{path}/{entry.name}", label)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add(found: _Found, entry: os.DirEntry[str], path: str, label: str | None) -> None:
    suffix = Path(entry.name).suffix.lower()
    if suffix not in SUFFIXES or not Path(entry).is_file():
        found.others[suffix or "no suffix"] += 1
        return
    found.paths.append(path)
    found.sizes.append(entry.stat().st_size)
    found.classes.append(label)


def _entries(folder: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name, without hidden entries and archive leftovers."""
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise InputError(f"folder '{os.fspath(folder)}' can't be read: {error.strerror}") from error
    for entry in visible:
        _check_name(entry.path)
    return sorted(visible, key=lambda entry: entry.name)


def _check_name(path: str) -> None:
    """Names end up in reports and model files, which are UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the name {path!a} is not valid UTF-8", remedy="Rename it, or take it out of the data."
        ) from error


def _choose(found: dict[str, _Found], notes: list[str]) -> dict[str, _Found]:
    """Leave out empty splits, and unlabelled val and test folders: nothing can be measured on them."""
    chosen = {}
    for split, part in found.items():
        if not part.paths:
            notes.append(f"the {split} folder holds no image")
        elif split in ("val", "test") and not part.labelled:
            notes.append(
                f"the {split} folder has no class folders: its {len(part.paths)} images are not used"
            )
        else:
            chosen[split] = part
    if not chosen:
        raise InputError(
            "no split with class folders, and no train images",
            remedy="Expected train, val and test folders that hold class folders.",
        )
    return chosen


def _samples(part: _Found, classes: Sequence[str], reader: partial[Image.Image]) -> Samples:
    order = sorted(range(len(part.paths)), key=part.paths.__getitem__)
    index = {name: i for i, name in enumerate(classes)}
    names = [part.paths[i] for i in order]
    groups = [-1 if (label := part.classes[i]) is None else index[label] for i in order]
    return Samples(names, np.array(groups, dtype=np.int64), names, reader)


def _cut(
    samples: dict[str, Samples],
    folders: dict[str, str],
    val_fraction: float,
    notes: list[str],
    *,
    labelled: bool,
) -> dict[str, Samples]:
    """Make train, val and test of what the folders give."""
    if not labelled:
        return {"train": samples.get("train") or samples["all"]}
    fractions = {"test": TEST_FRACTION} if "all" in samples else {}
    parts = {"train": samples["all"]} if "all" in samples else dict(samples)
    if "train" not in parts:
        return parts
    if "val" in parts and "test" not in parts:
        notes.append(f"no test folder: '{folders['val']}' is the test split, and val is cut from train")
        parts["test"] = parts.pop("val")
    if "val" not in parts:
        fractions["val"] = val_fraction
    if fractions:
        train = parts["train"]
        notes.append(f"{' and '.join(fractions)} cut from the images by a fixed hash of each file's path")
        skip = len(folders["train"]) + 1 if "train" in folders else 0
        names = [name[skip:] for name in train.names]  # below the folder that holds the classes
        parts |= {split: train.subset(chosen) for split, chosen in cut(names, fractions).items()}
    return parts


def _remarks(found: dict[str, _Found]) -> list[str]:
    notes = []
    others = sum((part.others for part in found.values()), Counter[str]())
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"{others.total()} files that are not images are left out ({kinds})")
    loose = sum(part.loose for part in found.values())
    if loose:
        notes.append(f"{loose} images outside the class folders are left out")
    return notes


def _fingerprint(found: dict[str, _Found]) -> str:
    pairs = sorted(
        (path, size) for part in found.values() for path, size in zip(part.paths, part.sizes, strict=True)
    )
    digest = sha256()
    for path, size in pairs:
        digest.update(f"{path}\0{size}\n".encode())
    return digest.hexdigest()
