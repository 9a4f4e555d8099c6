"""What a kind of data set finds: named images with their classes, by split; nothing is decoded yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sepress.data.images import Reader


@dataclass(frozen=True)
class Samples:
    """Images in a fixed order; `read(keys[i], mode)` decodes the i-th."""

    names: Sequence[str]  # unique in the data set, as messages show them
    groups: npt.NDArray[np.int64]  # (n,) the data's own class, -1 for none
    keys: Sequence[Any]
    read: Reader

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, positions: npt.NDArray[np.int64]) -> Samples:
        """The images at these positions, in this order."""
        chosen = positions.tolist()
        names, keys = [self.names[i] for i in chosen], [self.keys[i] for i in chosen]
        return Samples(names, self.groups[positions], keys, self.read)


@dataclass(frozen=True)
class Catalog:
    splits: Mapping[str, Samples]  # of train, val, test those that there are
    classes: tuple[str, ...]  # the data's own, in the data's order; empty where train is not labelled
    fingerprint: str  # sha256, hex
    augment: str  # 'digits' or 'natural'
    notes: tuple[str, ...] = ()
