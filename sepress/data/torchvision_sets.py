"""torchvision's classification data sets, as they lie in a folder; the network only where asked for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torchvision import datasets

from sepress import console
from sepress.data.catalog import Catalog, Samples
from sepress.data.images import Mode, to_mode
from sepress.data.registry import TORCHVISION, Arguments
from sepress.data.spec import DataSpec
from sepress.data.splits import TEST_FRACTION, cut
from sepress.errors import InputError


def open_torchvision(spec: DataSpec) -> Catalog:
    """Open a data set by name; InputError where it doesn't lie in `spec.root`, saying what would."""
    entry = TORCHVISION[spec.name]
    notes: list[str] = []
    parts: dict[str, Samples] = {}
    classes: tuple[str, ...] = ()
    for split, arguments in entry.splits.items():
        dataset = _construct(spec, arguments)
        parts[split] = _samples(dataset, split)
        classes = classes or _class_names(dataset)
    if not classes:
        classes = tuple(str(i) for i in range(1 + max(int(part.groups.max()) for part in parts.values())))
    fingerprint = _fingerprint(spec.name, parts)
    fractions = {"test": TEST_FRACTION} if "all" in parts else {}
    if "val" not in parts:
        fractions["val"] = spec.val_fraction
    if fractions:
        notes.append(f"{' and '.join(fractions)} cut by a fixed hash of each image's index")
        whole = parts.pop("all") if "all" in parts else parts["train"]
        parts |= {split: whole.subset(chosen) for split, chosen in cut(whole.names, fractions).items()}
    return Catalog(parts, classes, fingerprint, entry.augment, tuple(notes))


def _construct(spec: DataSpec, arguments: Arguments) -> Any:
    constructor = getattr(datasets, spec.name, None)
    if constructor is None:
        raise InputError(
            f"this version of torchvision has no {spec.name}", remedy="Install a newer torchvision."
        )
    known = inspect.signature(constructor).parameters
    options = dict(arguments)
    if "root" in known:
        if spec.root is None:
            raise InputError(
                f"{spec.path} needs the folder in which it lies",
                remedy="Pass it as the data's root (root: in a recipe).",
            )
        options["root"] = str(Path(spec.root).expanduser())
    if "download" in known or spec.name in _FORWARDING:
        options["download"] = spec.download  # stated always: some sets download unless told otherwise
    try:
        with redirect_stdout(sys.stderr):  # stdout belongs to results
            return constructor(**options)
    except (RuntimeError, OSError, ValueError, ModuleNotFoundError) as error:
        raise InputError(
            f"{spec.path} was not found in '{spec.root}': {' '.join(str(error).split())}",
            remedy="Name the folder that holds it as root, as torchvision lays it out, or allow a download.",
        ) from error


_FORWARDING = ("EMNIST", "QMNIST")  # take download through **kwargs


@dataclass(frozen=True)
class _DatasetReader:
    dataset: Any

    def __call__(self, index: int, mode: Mode) -> Image.Image:
        return to_mode(self.dataset[index][0], mode)


def _samples(dataset: Any, split: str) -> Samples:
    groups = _targets(dataset)
    if len(groups) == 0:
        raise InputError(f"the {split} split of {type(dataset).__name__} holds no image")
    names = [f"{split}/{index}" for index in range(len(groups))]
    return Samples(names, groups, range(len(groups)), _DatasetReader(dataset))


def _targets(dataset: Any) -> npt.NDArray[np.int64]:
    """(n,) class of each image, from the lists the sets keep, else by reading image after image."""
    pairs = getattr(dataset, "_samples", None)
    candidates = [getattr(dataset, key, None) for key in ("targets", "labels", "_labels", "y")]
    if isinstance(pairs, Sequence):
        candidates.append([pair[1] for pair in pairs])
    for values in candidates:
        if values is None or len(values) != len(dataset):
            continue
        targets = np.asarray(values)
        if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer):
            return targets.astype(np.int64)
    read = partial(console.track, description="reading labels", total=len(dataset))
    return np.array([int(dataset[index][1]) for index in read(range(len(dataset)))], dtype=np.int64)


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or ()
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _fingerprint(name: str, parts: dict[str, Samples]) -> str:
    """Over the name, the splits and every label: the sets themselves are versioned by their authors."""
    digest = sha256(name.encode())
    for split, samples in sorted(parts.items()):
        digest.update(f"\0{split}\0{len(samples)}\0".encode() + samples.groups.astype("<i8").tobytes())
    return digest.hexdigest()
