"""Beside every activation's memory, an int32 shadow of the same layout: the slot that made each element.

Views, permutes and slices need no rule, since a shadow is read with the tensor's own strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

V = TypeVar("V")


class StorageMap(Generic[V]):
    """Values kept beside storages for as long as these live.

    The weak reference keeps a storage's address from being used again, not its memory.
    """

    def __init__(self) -> None:
        self._values: dict[int, tuple[StorageWeakRef, V]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._values

    def get(self, tensor: Tensor) -> V | None:
        entry = self._values.get(tensor.untyped_storage()._cdata)
        return None if entry is None else entry[1]

    def put(self, tensor: Tensor, value: V) -> None:
        storage = tensor.untyped_storage()
        self._values[storage._cdata] = (StorageWeakRef(storage), value)  # type: ignore[no-untyped-call]

    def drop(self, tensor: Tensor) -> None:
        self._values.pop(tensor.untyped_storage()._cdata, None)

    def values(self) -> list[V]:
        return [value for _, value in self._values.values()]

    def sweep(self) -> None:
        """Forget the storages that died."""
        dead = [key for key, (alive, _) in self._values.items() if alive.expired()]  # type: ignore[no-untyped-call]
        for key in dead:
            del self._values[key]


@dataclass
class _Shadow:
    layout: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset of the tensor written
    ids: Tensor  # broadcasts to that shape; unused once `full` is there
    elements: int  # of the whole storage
    full: Tensor | None = None  # one id per element of the storage, made when another view asks


class Shadows:
    """Reads and writes the shadow of any tensor; each view of a storage sees the same ids.

    `dtype` is int32 for slot ids, int64 for element numbers of parameters.
    """

    def __init__(self, dtype: torch.dtype = torch.int32) -> None:
        self._of: StorageMap[_Shadow] = StorageMap()
        self._dtype = dtype
        self.sweep, self.drop = self._of.sweep, self._of.drop

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._of

    def read(self, tensor: Tensor) -> Tensor:
        """Return the ids of a tensor, in its shape (often expanded from a few)."""
        shadow = self._of.get(tensor)
        assert shadow is not None
        if shadow.full is None:
            if shadow.layout == _layout(tensor):
                return shadow.ids.expand(tensor.shape)
            shadow.full = torch.zeros(shadow.elements, dtype=self._dtype)
            shape, strides, offset = shadow.layout
            shadow.full.as_strided(shape, strides, offset).copy_(shadow.ids.expand(shape))
        return shadow.full.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def write(self, tensor: Tensor, ids: Tensor) -> None:
        """Give a tensor that owns a new storage its ids (they broadcast to its shape)."""
        ids = compress(ids.to(self._dtype).expand(tensor.shape))
        elements = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
        self._of.put(tensor, _Shadow(_layout(tensor), ids.clone(), elements))

    def swap(self, other: Shadows, tensor: Tensor) -> None:
        """Exchange the shadow of a storage with the one that another memory has of it."""
        mine, theirs = self._of.get(tensor), other._of.get(tensor)
        assert mine is not None
        assert theirs is not None
        self._of.put(tensor, theirs)
        other._of.put(tensor, mine)

    def overwrite(self, tensor: Tensor, ids: Tensor) -> None:
        """Change the ids under a view of a storage that has a shadow; other views see the change."""
        shadow = self._of.get(tensor)
        assert shadow is not None
        if shadow.full is None and shadow.layout == _layout(tensor):
            shadow.ids = compress(ids.expand(tensor.shape)).clone()
            return
        self.read(tensor)
        if shadow.full is None:
            return
        shadow.full.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(
            ids.expand(tensor.shape)
        )


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def broadcast_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that shapes broadcast to together."""
    return np.broadcast_shapes(*shapes)


# ---- reading ids --------------------------------------------------------------------------------
def no_ids(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return the shadow of data that no slot made."""
    return torch.zeros((), dtype=torch.int32).expand(shape)


def varies(ids: Tensor, axis: int) -> bool:
    """Whether ids differ along an axis."""
    return (
        ids.size(axis) > 1
        and ids.stride(axis) != 0
        and not torch.equal(ids, ids.narrow(axis, 0, 1).expand(ids.shape))
    )


def compress(ids: Tensor, keep: tuple[int, ...] = ()) -> Tensor:
    """Narrow every axis along which nothing varies to length 1, so that the result broadcasts back."""
    lengths, steps = ids.shape, ids.stride()
    for axis in reversed(range(len(lengths))):
        if lengths[axis] > 1 and axis not in keep and (steps[axis] == 0 or not varies(ids, axis)):
            ids = ids.narrow(axis, 0, 1)
    return ids


def varying_axes(ids: Tensor) -> list[int]:
    """Return the axes along which ids differ."""
    return [axis for axis, length in enumerate(compress(ids).shape) if length > 1]


def line(ids: Tensor, axis: int) -> np.ndarray:
    """Return the ids along an axis, at the start of every other one."""
    for other in range(ids.dim()):
        if other != axis:
            ids = ids.narrow(other, 0, 1)
    return ids.flatten().numpy().astype(np.int64)


def along(ids: Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs (index on the axis, id), sorted."""
    rows = compress(ids, (axis,)).movedim(axis, 0).reshape(ids.size(axis), -1)
    if rows.size(1) == 1:
        return np.arange(ids.size(axis)), rows[:, 0].numpy().astype(np.int64)
    pairs = np.unique(rows.numpy().astype(np.int64) + (np.arange(rows.size(0))[:, None] << 32))
    return pairs >> 32, pairs & 0xFFFFFFFF


def distinct(*shadows: Tensor) -> np.ndarray:
    """Return the ids that occur in any of the shadows."""
    found = [np.unique(compress(ids).numpy()).astype(np.int64) for ids in shadows]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def from_slots(slots: np.ndarray, axis: int, dims: int) -> Tensor:
    """Return the shadow of a tensor of `dims` axes whose elements come from one slot per index."""
    return torch.from_numpy(slots.astype(np.int32)).view([-1 if a == axis else 1 for a in range(dims)])
