"""Every index of every axis of every parameter and buffer is a slot: a node of one union-find.

A channel is a connected set of slots: the filters that make it, the gains that scale it, the
columns that read it. Rules (rules.py) state which slots are one; the components are the channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from sepress.types import Reason

NONE = 0  # an element that no slot made: images and constants
PADDING = 1  # zeros that a pad put beside channels; their number is written in the code
FIRST_SLOT = 2

Ids = np.ndarray  # int64 slot ids
Layouts = Mapping[tuple[str, int], tuple[int, ...]]  # (parameter, dim) -> the axes that lie flat on that dim


def names(text: str) -> frozenset[str]:
    """Return the words of a text: how the tables of operations are written."""
    return frozenset(text.split())


def named_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, then buffers, under every name they have (tied ones several times)."""
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


class SlotTable:
    """The slots of a net, and which of them an axis of a (view of a) parameter holds.

    Parameters are known by where they lie in memory, so tied ones are one and views need no names. A dim on
    which `layouts` says that several axes lie flat counts as these: a bank of weights (experts, out x in x k)
    has an output and an input axis, and an index of its second dim lies on both.
    """

    def __init__(self, net: nn.Module, layouts: Layouts | None = None) -> None:
        self.names: list[str] = []  # first name where tied
        self.shapes: list[tuple[int, ...]] = []  # with flat dims taken apart, as all that follows
        self.stored: list[tuple[int, ...]] = []  # as the net holds them
        self.parameters: set[str] = set()
        self.axes: list[tuple[int, int]] = []  # axis number -> (parameter, dim)
        self.first_slot: list[list[int]] = []  # [parameter][dim] -> id of index 0
        self.clashing: set[int] = set()  # parameters that share memory in another layout
        self._layouts = layouts or {}
        self._strides: list[tuple[int, ...]] = []
        self._memory: dict[int, list[tuple[int, int, int]]] = {}  # storage -> (start, stop, parameter)
        self._first_element = [1]  # of each parameter, in a count over all; 0 means 'unclear'
        lengths: list[int] = []  # of the axes
        self.size = FIRST_SLOT
        trained = {id(p) for p in net.parameters()}
        for name, tensor in named_tensors(net):
            if self._is_known(tensor):
                continue
            number = len(self.names)
            shape, strides = self._taken_apart(name, tensor)
            self.names.append(name)
            self.stored.append(tuple(tensor.shape))
            self.shapes.append(shape)
            self._strides.append(strides)
            self._first_element.append(self._first_element[-1] + tensor.numel())
            if id(tensor) in trained:
                self.parameters.add(name)
            self.first_slot.append([])
            for dim, length in enumerate(shape):
                self.first_slot[-1].append(self.size)
                lengths.append(length)
                self.axes.append((number, dim))
                self.size += length
        self.axis_of = np.repeat(np.arange(-1, len(lengths)), [FIRST_SLOT, *lengths])

    def _taken_apart(self, name: str, tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shape and strides of a tensor whose flat dims count as several."""
        shape: list[int] = []
        strides: list[int] = []
        for dim, (length, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            parts = self._layouts.get((name, dim), (length,))
            shape += parts
            strides += [stride * prod(parts[at + 1 :]) for at in range(len(parts))]
        return tuple(shape), tuple(strides)

    def places(self, axis: int, indices: Ids) -> tuple[int, Ids, Ids]:
        """Return the dim of the parameter as held that an axis lies on, and where indices of the axis lie.

        The latter as two arrays: positions in `indices`, and for each an index of the dim (on a flat dim
        several for one).
        """
        number, axis_dim = self.axes[axis]
        first = 0
        for dim, length in enumerate(self.stored[number]):
            parts = self._layouts.get((self.names[number], dim), (length,))
            if axis_dim < first + len(parts):
                break
            first += len(parts)
        if len(parts) == 1:
            return dim, np.arange(len(indices)), indices
        flat = np.arange(length).reshape(parts)
        rows = np.moveaxis(flat, axis_dim - first, 0)[indices].reshape(len(indices), -1)
        return dim, np.repeat(np.arange(len(indices)), rows.shape[1]), rows.ravel()

    def _is_known(self, tensor: Tensor) -> bool:
        """Whether these elements were met before; if not, note where they lie."""
        start, number = int(tensor.storage_offset()), len(self.names)
        stop = start + max(1, tensor.numel())
        places = self._memory.setdefault(tensor.untyped_storage()._cdata, [])
        for other_start, other_stop, other in places:
            if (other_start, other_stop) == (start, stop):
                mine = self._taken_apart(self.names[other], tensor)
                if self.stored[other] != tuple(tensor.shape) or self._strides[other] != mine[1]:
                    self.clashing.add(other)
                return True
            if start < other_stop and other_start < stop:
                self.clashing |= {other, number}
        places.append((start, stop, number))
        return False

    def find(self, tensor: Tensor) -> int | None:
        """Return the number of the parameter or buffer that this tensor is a view of."""
        offset = tensor.storage_offset()
        for start, stop, number in self._memory.get(tensor.untyped_storage()._cdata, ()):
            if start <= offset < stop:
                return number
        return None

    def parameter_of(self, element: int) -> int | None:
        """Return the number of the parameter that an element number is of; 0 is of none."""
        number = int(np.searchsorted(self._first_element, element, "right")) - 1
        return number if 0 <= number < len(self.names) else None

    def elements(self, tensor: Tensor) -> Tensor:
        """Return the number of the parameter element that each element of a view is."""
        start, number = self._place(tensor)
        count = self._first_element[number + 1] - self._first_element[number]
        numbers = torch.arange(count) + self._first_element[number]
        return numbers.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset()) - start)

    def along(self, tensor: Tensor, axis: int) -> Ids | None:
        """Return the slots along one axis of a view of a parameter, or None where they are not one axis."""
        start, number = self._place(tensor)
        offset = int(tensor.storage_offset()) - start
        if offset == 0 and tensor.shape == self.shapes[number] and tensor.stride() == self._strides[number]:
            first = self.first_slot[number][axis]  # the parameter itself
            return np.arange(first, first + tensor.size(axis))
        first = offset + self._first_element[number]
        return self.of_elements(first + np.arange(tensor.size(axis), dtype=np.int64) * tensor.stride(axis))

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """Return where in its storage a view's parameter starts, and the parameter's number."""
        places = self._memory[tensor.untyped_storage()._cdata]
        return next(
            (start, number) for start, stop, number in places if start <= tensor.storage_offset() < stop
        )

    def of_elements(self, elements: Ids) -> Ids | None:
        """Return the slots that a row of element numbers walks along, if it walks along one axis."""
        walked = self.axes_of_elements(elements)
        if len(walked) != 1:
            return None
        once = (np.diff(walked[0]) > 0).all() or len(np.unique(walked[0])) == len(elements)
        return walked[0] if once else None

    def axes_of_elements(self, elements: Ids) -> list[Ids]:
        """Return the slots of every axis that a row of element numbers walks along, repeats included."""
        if len(elements) < 2 or (elements < 1).any():
            return []
        numbers = np.searchsorted(self._first_element, elements, "right") - 1
        number = int(numbers[0])
        if (numbers != number).any() or number >= len(self.names):
            return []
        indices = self._indices(number, elements - self._first_element[number])
        first = self.first_slot[number]
        return [f + index for f, index in zip(first, indices, strict=True) if (index != index[0]).any()]

    def _indices(self, number: int, memory: Ids) -> list[Ids]:
        """Turn offsets in a parameter's memory into an index for each dim (any dense layout)."""
        shape, strides = self.shapes[number], self._strides[number]
        indices = [np.zeros_like(memory) for _ in shape]
        for dim in sorted(range(len(shape)), key=lambda d: -strides[d]):
            if shape[dim] > 1:
                indices[dim], memory = np.divmod(memory, strides[dim])
        return indices

    def touched(self, elements: Tensor) -> Ids:
        """Return the slots, on every axis, of these elements of parameters."""
        known = np.unique(elements[elements > 0].numpy())
        numbers = np.searchsorted(self._first_element, known, "right") - 1
        slots = [np.zeros(0, np.int64)]
        for number in np.unique(numbers).tolist():
            indices = self._indices(number, known[numbers == number] - self._first_element[number])
            slots += [first + np.unique(i) for first, i in zip(self.first_slot[number], indices, strict=True)]
        return np.concatenate(slots)

    def every_slot(self, number: int) -> Ids:
        """Return all slots of one parameter."""
        first = self.first_slot[number]
        return np.arange(first[0], first[-1] + self.shapes[number][-1]) if first else np.zeros(0, np.int64)

    def owner(self, slot: int) -> str:
        """Return the module that holds a slot's parameter (through torch's parametrizations)."""
        return owner_of(self.names[self.axes[self.axis_of[slot]][0]])


def owner_of(name: str) -> str:
    """Return the module that a state-dict name belongs to: `a.parametrizations.weight.original` is a's."""
    if "parametrizations." in name:
        return name.split("parametrizations.")[0].rstrip(".")
    return name.rpartition(".")[0]


class Facts:
    """What the rules found: which ids are one channel, and which can't be removed and why."""

    def __init__(self) -> None:
        self._left: list[Ids] = []
        self._right: list[Ids] = []
        self._counts: list[tuple[Ids, Ids, int, int]] = []
        self.frozen: list[tuple[Ids, Reason]] = []
        self.fixed = {PADDING}  # ids known not to go while the trace runs

    def unify(self, a: Ids, b: Ids) -> None:
        """State that a[i] and b[i] are one channel, for every i; elements without an id say nothing."""
        a, b = (np.asarray(ids).ravel().astype(np.int64) for ids in (a, b))
        differ = (a != b) & (a != NONE) & (b != NONE)
        if differ.any():
            self._left.append(a[differ])
            self._right.append(b[differ])

    def align(self, rows: Ids) -> None:
        """State that blocks (rows) must keep equal counts: the same offset of every block is one unit."""
        for row in rows[1:]:
            self.unify(rows[0], row)

    def freeze(self, ids: Ids | Iterable[int], why: Reason) -> None:
        """State that none of these ids can be removed."""
        ids = np.unique(np.asarray(ids))
        ids = ids[ids >= FIRST_SLOT].astype(np.int64)
        if len(ids):
            self.frozen.append((ids, why))

    def same_count(self, source: Ids, ids: Ids, *, parts: int = 1, times: int = 1) -> None:
        """State that len(source) / parts * times must stay len(ids), whatever is removed."""
        self._counts.append((np.asarray(source), np.asarray(ids), parts, times))

    def components(self, size: int) -> np.ndarray:
        """Return the component that each of `size` ids belongs to."""
        labels = self._connected(size)
        for source, ids, parts, times in self._counts:
            if _counts_follow(labels[source], labels[ids], parts, times):
                continue
            self._unify_counts(source, ids, parts, times)
            labels = self._connected(size)
            if not _counts_follow(labels[source], labels[ids], parts, times):
                self.freeze(np.concatenate([source, ids]), Reason("a size computed in the code"))
        return labels

    def _unify_counts(self, source: Ids, ids: Ids, parts: int, times: int) -> None:
        """Hold two counts together by making them the same channels, position by position."""
        if parts == 1 and not (np.unique(ids, return_counts=True)[1] % times).any():
            self.unify(np.repeat(source, times), ids)  # flattened: every channel `times` times in a row
        elif len(source) * times == len(ids) * parts and len(source) % parts == len(ids) % times == 0:
            blocks = source.reshape(parts, -1)
            self.align(np.concatenate([blocks, ids.reshape(times, -1)]))

    def _connected(self, size: int) -> np.ndarray:
        left = np.concatenate([np.zeros(0, np.int64), *self._left])
        right = np.concatenate([np.zeros(0, np.int64), *self._right])
        edges = coo_matrix((np.ones(len(left), np.int8), (left, right)), shape=(size, size))
        labels: np.ndarray = connected_components(edges, directed=False)[1]
        return labels


def _counts_follow(source: np.ndarray, ids: np.ndarray, parts: int, times: int) -> bool:
    """Whether each channel counts on both sides in the same proportion, so that the sizes follow."""
    source_counts = dict(zip(*np.unique(source, return_counts=True), strict=True))
    counts = dict(zip(*np.unique(ids, return_counts=True), strict=True))
    return source_counts.keys() == counts.keys() and all(
        counts[label] * parts == source_counts[label] * times for label in counts
    )
