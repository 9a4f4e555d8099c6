"""Ids that meet at one position of tensors that are broadcast together are one channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sepress.coupling.shadows import (
    along,
    broadcast_shape,
    compress,
    distinct,
    from_slots,
    no_ids,
    varying_axes,
)
from sepress.coupling.slots import NONE

if TYPE_CHECKING:
    from sepress.coupling.trace import Tracer


def meet(t: Tracer, inputs: list[Tensor], read: Callable[[Tensor], Tensor]) -> Tensor:
    """Unify what lies at one position of element-wise inputs; `read` gives the ids of activations."""
    shadows = _apart_from_fixed(t, [read(x) for x in inputs if not t.is_parametric(x)])
    shape = broadcast_shape(*[x.shape for x in inputs])
    ids = join(t, shadows).expand(shape)
    axes = varying_axes(ids)
    for x in inputs:
        if not t.is_parametric(x):
            continue
        for axis in range(x.dim()):
            target = axis + ids.dim() - x.dim()
            slots = t.slots_along(x, axis) if x.size(axis) > 1 else None
            if target in axes:
                if slots is not None:
                    tie(t, slots, ids, target)
                elif x.size(axis) > 1:
                    t.freeze(distinct(ids), "meets a parameter whose layout is unclear")
            elif slots is not None:
                if not axes and _alone_on_axis(inputs, x, target - ids.dim()):
                    return from_slots(slots, target, ids.dim()).expand(shape)
                t.freeze(slots, "a parameter along an axis without channels")
    return ids


def _apart_from_fixed(t: Tracer, shadows: list[Tensor]) -> list[Tensor]:
    """Leave out one channel that is spread over others and can't go: it says nothing about them."""
    along = {axis - ids.dim() for ids in shadows for axis in varying_axes(ids)}

    def spread(ids: Tensor) -> bool:
        one = not varying_axes(ids) and ids.numel() > 0 and int(ids[(0,) * ids.dim()]) in t.facts.fixed
        return one and all(ids.dim() < -axis or ids.size(axis) == 1 for axis in along)

    return [no_ids(ids.shape) if along and spread(ids) else ids for ids in shadows]


def _alone_on_axis(inputs: list[Tensor], x: Tensor, axis: int) -> bool:
    """Whether only x has a length on this (negative) axis, so that x alone gives its ids."""
    return all(other is x or other.dim() < -axis or other.size(axis) == 1 for other in inputs)


def join(t: Tracer, shadows: list[Tensor]) -> Tensor:
    """Unify shadows position by position over their broadcast shape; returns the joint shadow."""
    if not shadows:
        return no_ids(())
    shape = broadcast_shape(*[s.shape for s in shadows])
    small = [compress(s.reshape((1,) * (len(shape) - s.dim()) + tuple(s.shape))) for s in shadows]
    joint = small[0]
    for ids in small[1:]:
        if ids.shape == joint.shape and torch.equal(ids, joint):
            continue
        meeting = broadcast_shape(joint.shape, ids.shape)
        a, b = joint.expand(meeting), ids.expand(meeting)
        both = (a != b) & (a != NONE) & (b != NONE)
        if both.any():
            pairs = np.unique((a[both].to(torch.int64) * (1 << 32) + b[both]).numpy())
            t.facts.unify(pairs >> 32, pairs & 0xFFFFFFFF)
        joint = torch.where(a != NONE, a, b)
    return joint.expand(shape)


def tie(t: Tracer, slots: np.ndarray, ids: Tensor, axis: int) -> None:
    """State that slots[i] belongs to whatever ids lie at index i of an axis."""
    index, found = along(ids, axis)
    t.facts.unify(slots[index], found)
    t.freeze(slots[index[found == NONE]], "meets data that no layer made")
