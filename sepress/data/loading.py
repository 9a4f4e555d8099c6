"""Samples -> normalised batches: decoded once where they fit in memory, augmented batch by batch.

A batch is the unit of work and of randomness: its order and its augmentation follow from (seed,
epoch, rank, number of the batch), so that no number of workers changes what a network sees.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sepress.data.catalog import Samples
from sepress.data.images import UnreadableImage, decode, decoding
from sepress.data.transforms import BatchAugment, Prepare, RandomView, normalise
from sepress.errors import InputError
from sepress.types import Preprocessing

KEPT_BYTES = 512 * 2**20  # decoded images of up to this size stay in memory, split by split


class Order(NamedTuple):
    """What makes one batch."""

    positions: list[int]
    seed: int


class Batch(NamedTuple):
    """One batch; unreadable images are missing from it, so it can be smaller than its order."""

    images: Tensor  # (n, C, H, W) float32, normalised
    targets: Tensor  # (n,) int64, -1 unlabelled
    unreadable: Mapping[str, str]  # name -> why


@dataclass
class Ledger:
    """The unreadable images of one split, and how many there may be."""

    split: str
    total: int
    allowed: float
    found: dict[str, str] = field(default_factory=dict)  # name -> why

    def add(self, unreadable: Mapping[str, str]) -> None:
        """Enter names; InputError naming them when there are more than the allowed fraction."""
        self.found.update(unreadable)
        if not self.found or len(self.found) <= self.allowed * self.total:
            return
        named = [f"{_printable(name)} ({why})" for name, why in list(self.found.items())[:5]]
        least = math.ceil(1000 * len(self.found) / self.total) / 1000
        raise InputError(
            f"{len(self.found)} of {self.total} {self.split} images can't be read: {'; '.join(named)}",
            remedy=f"Repair or remove them, or allow a fraction of at least {least:g} (allow_corrupt).",
        )


def _printable(name: str) -> str:
    return f"'{name}'" if name.isprintable() else ascii(name)


def _derive(*parts: int) -> int:
    """A seed below 2**63 for a place in the run; neighbouring places get unrelated seeds."""
    digest = sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def _torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator alone, and restore it: workers must not touch an accelerator's."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class ImageStore:
    """The images of some samples at the input's size, uint8; kept in memory where they fit and may be."""

    def __init__(self, samples: Samples, prepare: Prepare, *, keep: bool = True) -> None:
        self.samples = samples
        self.prepare = prepare
        channels = 1 if prepare.mode == "L" else 3
        self._shape = (channels, prepare.height, prepare.width)
        self.in_memory = keep and len(samples) * int(np.prod(self._shape)) <= KEPT_BYTES
        self._kept = torch.empty((len(samples) if self.in_memory else 0, *self._shape), dtype=torch.uint8)
        self._known = torch.zeros(len(samples) if self.in_memory else 0, dtype=torch.bool)
        self._unreadable: dict[int, str] = {}  # position -> why

    def holds(self, positions: np.ndarray) -> bool:
        """Whether these images are in memory already."""
        return self.in_memory and bool(self._known[torch.from_numpy(positions)].all())

    def fetch(self, positions: list[int], *, threads: int = 1) -> tuple[Tensor, list[int]]:
        """Images (n, C, H, W) uint8 and the positions they are at, unreadable ones left out."""
        index = torch.tensor(positions, dtype=torch.int64)
        if not self.in_memory:
            return self._decode_all(positions, threads)
        new = torch.unique(index[~self._known[index]])
        if len(new):
            images, read = self._decode_all(new.tolist(), threads)
            self._kept[torch.tensor(read, dtype=torch.int64)] = images
            self._known[new] = True
        if self._unreadable:
            positions = [position for position in positions if position not in self._unreadable]
            index = torch.tensor(positions, dtype=torch.int64)
        return self._kept[index], positions

    def view(self, positions: list[int], view: RandomView) -> tuple[Tensor, list[int]]:
        """As `fetch`, but each image anew through a random view of the whole picture."""
        with decoding():
            images = [self._decode(position, view) for position in positions]
        return self._stack(images, positions)

    def why(self, position: int) -> str:
        """Why the image at this position could not be read."""
        return self._unreadable[position]

    def _decode_all(self, positions: list[int], threads: int) -> tuple[Tensor, list[int]]:
        with decoding():
            if threads < 2:
                images = [self._decode(position, self.prepare) for position in positions]
            else:
                with ThreadPoolExecutor(threads) as pool:  # decoders release the interpreter's lock
                    images = list(pool.map(lambda position: self._decode(position, self.prepare), positions))
        return self._stack(images, positions)

    def _decode(self, position: int, transform: Prepare | RandomView) -> Tensor | None:
        try:
            image = decode(self.samples.read, self.samples.keys[position], self.prepare.mode)
        except UnreadableImage as error:
            self._unreadable[position] = str(error)
            return None
        return transform(image)

    def _stack(self, images: Sequence[Tensor | None], positions: list[int]) -> tuple[Tensor, list[int]]:
        read = [(image, at) for image, at in zip(images, positions, strict=True) if image is not None]
        if not read:
            return torch.empty((0, *self._shape), dtype=torch.uint8), []
        return torch.stack([image for image, _ in read]), [at for _, at in read]


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Some images of a store, normalised and, for training, augmented: (float (C, H, W), target)."""

    def __init__(
        self,
        store: ImageStore,
        *,
        positions: Sequence[int],
        targets: Tensor,
        preprocessing: Preprocessing,
        ledger: Ledger,
        augment: BatchAugment | RandomView | None = None,
    ) -> None:
        self.targets = targets  # (n,) int64, -1 unlabelled
        self.preprocessing = preprocessing
        self.ledger = ledger
        self._store = store
        self._positions = list(positions)
        self._augment = augment

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def names(self) -> list[str]:
        return [self._store.samples.names[position] for position in self._positions]

    @property
    def in_memory(self) -> bool:
        """Whether batches are made from kept images, so that worker processes would be a loss."""
        return self._store.in_memory and not isinstance(self._augment, RandomView)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image (augmented by torch's global generator when training); InputError if unreadable."""
        seed = 0 if self._augment is None else int(torch.randint(2**62, ()))
        batch = self.batch(Order([range(len(self))[index]], seed))
        if not len(batch.targets):
            ((name, why),) = batch.unreadable.items()
            raise InputError(f"image {_printable(name)} can't be read: {why}", remedy="Repair or remove it.")
        return batch.images[0], int(batch.targets[0])

    def batch(self, order: Order, *, threads: int = 1) -> Batch:
        """Make a batch; its augmentation depends on the order alone."""
        asked = [self._positions[position] for position in order.positions]
        if isinstance(self._augment, RandomView):
            with _torch_seeded(order.seed):
                images, read = self._store.view(asked, self._augment)
        else:
            images, read = self._store.fetch(asked, threads=threads)
            if self._augment is not None and len(read):
                images = self._augment(images, torch.Generator().manual_seed(order.seed))
        unreadable = {}
        targets = self.targets[torch.tensor(order.positions, dtype=torch.int64)]
        if len(read) < len(asked):
            kept = set(read)
            targets = targets[torch.tensor([position in kept for position in asked])]
            names = self._store.samples.names
            unreadable = {names[at]: self._store.why(at) for at in asked if at not in kept}
        mean, std = self.preprocessing.mean, self.preprocessing.std
        return Batch(normalise(images, mean=mean, std=std), targets, unreadable)


class Batches(Sampler[Order]):
    """The batches of an epoch for one of `world_size` processes.

    Training shuffles by (seed, epoch), gives every process as many images, and drops an incomplete
    last batch where there is a full one. Otherwise every image comes once, in order, and nowhere twice.
    """

    def __init__(
        self, count: int, *, batch_size: int, train: bool, seed: int, rank: int, world_size: int
    ) -> None:
        self.epoch = 0
        self._count, self._batch_size, self._train = count, batch_size, train
        self._seed, self._rank, self._world_size = seed, rank, world_size

    def __len__(self) -> int:
        share = self._count // self._world_size if self._train else len(self._fixed())
        full, rest = divmod(share, self._batch_size)
        return full + (rest > 0 and not (self._train and full > 0))

    def __iter__(self) -> Iterator[Order]:
        mine: Sequence[int] = self._shuffled() if self._train else self._fixed()
        for number in range(len(self)):
            start = number * self._batch_size
            seed = _derive(self._seed, self.epoch, self._rank, number)
            yield Order(list(mine[start : start + self._batch_size]), seed)

    def _fixed(self) -> range:
        return range(self._rank, self._count, self._world_size)

    def _shuffled(self) -> list[int]:
        generator = torch.Generator().manual_seed(_derive(self._seed, self.epoch))
        order: list[int] = torch.randperm(self._count, generator=generator).tolist()
        whole = self._count // self._world_size * self._world_size
        return order[self._rank : whole : self._world_size]


class Loader:
    """Iterates (images (n, C, H, W), targets (n,)) of an epoch; call `set_epoch` before each when training.

    Unreadable images are entered in the dataset's ledger, which stops the run (InputError) beyond
    the allowed fraction; otherwise their batch is smaller, and a batch without any image is skipped.
    """

    def __init__(self, dataset: ImageDataset, batches: Batches, *, workers: int) -> None:
        self.dataset = dataset
        self._batches = batches
        processes = 0 if dataset.in_memory else min(workers, os.cpu_count() or 1)
        threads = max(1, workers) if dataset.in_memory else 1
        self._loader: DataLoader[Any] = DataLoader(
            _Orders(dataset, threads),
            batch_size=None,  # the sampler's items are whole batches
            sampler=batches,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own: iterating leaves the caller's random state alone
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets, unreadable in self._loader:
            if unreadable:
                self.dataset.ledger.add(unreadable)
            if len(targets):
                yield images, targets

    def set_epoch(self, epoch: int) -> None:
        self._batches.epoch = epoch


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    train: bool = False,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Batches of this process's share: shuffled when training, else in order and each image once.

    `workers` decode: threads where the images are kept in memory, processes where they are not.
    """
    if batch_size < 1 or workers < 0 or not 0 <= rank < world_size:
        raise InputError(
            f"can't make batches of {batch_size} with {workers} workers for rank {rank} of {world_size}",
            remedy="Expected a batch size from 1, workers from 0 and a rank below the number of processes.",
        )
    if train and len(dataset) < world_size:
        raise InputError(f"{len(dataset)} training images can't feed {world_size} processes")
    batches = Batches(
        len(dataset), batch_size=batch_size, train=train, seed=seed, rank=rank, world_size=world_size
    )
    return Loader(dataset, batches, workers=workers)


class _Orders(Dataset[Batch]):
    """A dataset of whole batches, indexed by their orders."""

    def __init__(self, dataset: ImageDataset, threads: int) -> None:
        self._dataset, self._threads = dataset, threads

    def __getitem__(self, order: Order) -> Batch:
        return self._dataset.batch(order, threads=self._threads)
