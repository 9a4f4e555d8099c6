"""Names -> splits and samples that stay the same on every machine: by sha256, never by a generator."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
TEST_FRACTION = 0.1  # where the data has no test split


def hash_unit(text: str) -> float:
    """A fixed number in [0, 1) for a text, evenly spread."""
    digest = sha256(text.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float, below 1


def cut(names: Sequence[str], fractions: dict[str, float]) -> dict[str, Positions]:
    """Cut the named fractions off `names` by each name's hash; the rest is 'train'.

    An image keeps its split when others come or go; but train is never empty, and a fraction that
    would be empty takes one image from train, as long as another stays there.
    """
    units = np.array([hash_unit(name) for name in names])
    split_of = np.full(len(names), "train", dtype=object)
    low = 0.0
    for split, fraction in fractions.items():
        split_of[(units >= low) & (units < low + fraction)] = split
        low += fraction
    if not (split_of == "train").any():
        split_of[units.argmax()] = "train"
    for split in fractions:
        train = np.flatnonzero(split_of == "train")
        if len(train) > 1 and not (split_of == split).any():
            split_of[train[units[train].argmin()]] = split
    parts = {split: np.flatnonzero(split_of == split) for split in ("train", *fractions)}
    return {split: part for split, part in parts.items() if len(part)}


def stratified_order(names: Sequence[str], groups: npt.NDArray[np.int64], seed: int) -> Positions:
    """An order of which every prefix holds each group in its proportion; `groups` (n,) int.

    The image of rank r among its group's m (by hash) comes at (r + 1/2) / m; hashes break ties.
    """
    hashes = np.array([hash_unit(f"{seed}/{name}") for name in names])
    place = np.empty(len(names))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        members = members[hashes[members].argsort(kind="stable")]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((hashes, place))
