"""A data spec and a model's input and outputs -> datasets for training, evaluation and calibration."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sepress.data.catalog import Catalog, Samples
from sepress.data.digits import open_digits
from sepress.data.folders import open_folder
from sepress.data.labels import Labels, match_classes
from sepress.data.loading import ImageDataset, ImageStore, Ledger
from sepress.data.spec import DataSpec
from sepress.data.splits import stratified_order
from sepress.data.torchvision_sets import open_torchvision
from sepress.data.transforms import (
    SMALL,
    BatchAugment,
    Prepare,
    RandomView,
    build_prepare,
    shift_and_mirror,
    shift_and_turn,
)
from sepress.errors import InputError
from sepress.types import JSON, Preprocessing

_NAMED = 20  # unreadable images that a report names; all are counted


def open_data(
    spec: DataSpec,
    *,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] | None = None,
    num_classes: int | None = None,
) -> DataSource:
    """Open a data set for a model's input and outputs; nothing is decoded before it is asked for.

    class_names and num_classes are the model's; with neither, the data's classes are the outputs.
    InputError says what is missing, or doesn't fit.
    """
    prepare = build_prepare(preprocessing)
    openers = {"digits": lambda _: open_digits(), "torchvision": open_torchvision, "folder": open_folder}
    catalog = openers[spec.kind](spec)
    labels = match_classes(
        catalog.classes, typed=spec.classes, class_names=class_names, num_classes=num_classes
    )
    return DataSource(spec, catalog, labels, preprocessing, prepare)


class DataSource:
    """An opened data set: its splits as datasets, and everything a report says about it.

    Images once decoded are shared by the datasets of a split (see `loading.KEPT_BYTES`).
    """

    def __init__(
        self, spec: DataSpec, catalog: Catalog, labels: Labels, preprocessing: Preprocessing, prepare: Prepare
    ) -> None:
        self.spec = spec
        self.preprocessing = preprocessing
        self.class_names = labels.class_names  # of the model's outputs, None where unknown
        self.num_classes = labels.num_classes
        self.labels_reason = labels.reason
        self.fingerprint = catalog.fingerprint
        self.splits: Mapping[str, int] = {
            split: len(catalog.splits[split]) for split in ("train", "val", "test") if split in catalog.splits
        }
        self._catalog = catalog
        self._outputs = labels.outputs
        self._prepare = prepare
        self._notes = [*catalog.notes, *([labels.note] if labels.note else [])]
        self._ledgers = {
            split: Ledger(split, count, spec.allow_corrupt) for split, count in self.splits.items()
        }
        self._stores: dict[str, ImageStore] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know: how splits and classes came about, what was left out."""
        return tuple(self._notes)

    @property
    def corrupt(self) -> tuple[str, ...]:
        """The names of the unreadable images met so far."""
        return tuple(name for ledger in self._ledgers.values() for name in ledger.found)

    def dataset(self, split: str, *, train: bool = False) -> ImageDataset:
        """The images of a split with the model's targets, augmented where they train it."""
        samples = self._samples(split)
        return self._dataset(split, self._store(split), np.arange(len(samples)), train=train)

    def calibration(self, images: int, seed: int) -> ImageDataset:
        """Training images, as in evaluation: classes in proportion, the first `images` of a fixed order.

        A smaller set is a prefix of a larger one of the same seed. Where there are fewer images, all
        are taken and a note says so. Unless training has decoded them already, they are decoded in each
        pass and not kept: memory does not depend on their number.
        """
        if images < 1:
            raise InputError(f"calibration needs at least 1 image, not {images}")
        samples = self._samples("train")
        if images > len(samples):
            self._note(f"calibration: {images} images were asked for, the train split has {len(samples)}")
        order = stratified_order(samples.names, samples.groups, seed)[:images]
        store = self._stores.get("train")
        if store is None or not store.holds(order):
            store = ImageStore(samples, self._prepare, keep=False)
        return self._dataset("train", store, order)

    def describe(self) -> dict[str, JSON]:
        """Plain values for the report: where the images come from, how many there are, what was said."""
        return {
            **self.spec.to_json(),
            "fingerprint": self.fingerprint,
            "splits": dict(self.splits),
            "num_classes": self.num_classes,
            "labels_reason": self.labels_reason,
            "notes": list(self.notes),
            "corrupt": {"count": len(self.corrupt), "names": list(self.corrupt[:_NAMED])},
        }

    def _dataset(
        self, split: str, store: ImageStore, positions: np.ndarray, *, train: bool = False
    ) -> ImageDataset:
        return ImageDataset(
            store,
            positions=positions.tolist(),
            targets=self._targets(store.samples.groups[positions]),
            preprocessing=self.preprocessing,
            ledger=self._ledgers[split],
            augment=self._augment() if train else None,
        )

    def _samples(self, split: str) -> Samples:
        if split not in self._catalog.splits:
            raise InputError(
                f"the data '{self.spec.path}' has no {split} split",
                remedy=f"It has: {', '.join(f'{name} ({count})' for name, count in self.splits.items())}.",
            )
        return self._catalog.splits[split]

    def _store(self, split: str) -> ImageStore:
        if split not in self._stores:
            self._stores[split] = ImageStore(self._samples(split), self._prepare)
        return self._stores[split]

    def _targets(self, groups: np.ndarray) -> Tensor:
        table = np.array([*self._outputs, -1], dtype=np.int64)  # group -1 reads the last
        return torch.from_numpy(table[groups] if self.labels_reason is None else np.full(len(groups), -1))

    def _augment(self) -> BatchAugment | RandomView | None:
        kind = self._catalog.augment if self.spec.augment == "auto" else self.spec.augment
        if kind == "none":
            return None
        if kind == "digits":
            return shift_and_turn
        small = max(self._prepare.height, self._prepare.width) <= SMALL
        return shift_and_mirror if small else RandomView(self._prepare)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)
