"""Attention that scales by its head width: what makes up for it when that width shrinks.

`F.scaled_dot_product_attention` without `scale=` divides by the root of the width D of its queries. With d
of D left it divides by less, so what makes the queries is multiplied by sqrt(d / D): the rows of a linear
layer or a convolution and its bias, or a norm's gain and bias. That is exact where the queries come straight
from that layer and nothing else reads them; elsewhere the width stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sepress.coupling.shadows import Shadows, compress, distinct, from_slots, line, varying_axes
from sepress.coupling.slots import FIRST_SLOT, names
from sepress.types import Reason

if TYPE_CHECKING:
    from sepress.coupling.rules import Op
    from sepress.coupling.trace import Tracer

COPIES = names("clone _to_copy contiguous")
ATTENTION = "scaled_dot_product_attention"
WHY = "attention scaled by its head width, and its queries are not one layer's alone"


@dataclass(frozen=True, eq=False)
class Rescaling:
    """Slots whose entries are multiplied by the root of the share of `width` that is left."""

    slots: np.ndarray  # of the axis along which a weight or gain makes channels, and of the bias added
    width: np.ndarray  # ids along the head width


@dataclass(frozen=True, eq=False)
class _Queries:
    made: np.ndarray  # slots of the layer that makes them; an id below FIRST_SLOT: not all come from one
    width: np.ndarray
    ids: np.ndarray  # all that a change of the width concerns
    module: str


class Scales:
    """Knows the affine layer that each element of an activation comes from, with no operation between.

    Views and copies keep it; the gain's slots name the layer.
    """

    def __init__(self) -> None:
        self._made = Shadows()
        self._shifts: list[tuple[np.ndarray, np.ndarray]] = []  # slots of a gain, of the bias beside it
        self._read: list[Tensor] = []  # gains of what operations read
        self._shared: set[int] = set()  # parameters that other operations use
        self._queries: list[_Queries] = []
        self.sweep = self._made.sweep

    def made_by(
        self, t: Tracer, output: Tensor, axis: int, gain: np.ndarray, weight: Tensor, bias: Tensor | None
    ) -> None:
        """Note an affine layer: `gain` are slots of its weight along an axis of its output.

        A weight that is computed from parameters is none: what computes it could undo a factor.
        """
        if t.slots.find(weight) is None:
            return
        if bias is not None and not self._beside(t, gain, bias):
            return
        self._made.write(output, from_slots(gain, axis % output.dim(), output.dim()))

    def _beside(self, t: Tracer, gain: np.ndarray, bias: Tensor) -> bool:
        """Note that a factor on the gain is one on the bias as well; False where the bias is computed."""
        shift = t.slots_along(bias, 0) if bias.dim() == 1 and t.slots.find(bias) is not None else None
        if shift is not None:
            self._shifts.append((gain, shift))
        return shift is not None

    def observe(self, t: Tracer, op: Op) -> None:
        """Keep what copies copy; note what any other operation reads."""
        if op.name in COPIES and op.args[0] in self._made:
            for output, made in zip(op.outputs, t.rearranged(op, self._made.read), strict=True):
                self._made.write(output, made)
            return
        if op.name == "add" and self._shifted(t, op):
            return
        writes_in_place = op.func._schema.is_mutable
        affine = not writes_in_place and any(x in self._made for x in op.outputs)
        for x in op.inputs:
            if x in self._made and t.call_name() != ATTENTION:
                self._read.append(compress(self._made.read(x)))
            elif not affine and (number := t.slots.find(x)) is not None:
                self._shared.add(number)
        if writes_in_place and op.outputs:
            self._made.drop(op.outputs[0])

    def _shifted(self, t: Tracer, op: Op) -> bool:
        """A bias added by itself, as torch's linear layer does where its input isn't contiguous."""
        x, bias = op.args
        last = x.dim() - 1 if isinstance(x, Tensor) and x in self._made else 0
        if not last or not isinstance(bias, Tensor) or op.kwargs:
            return False
        made = self._made.read(x)
        if varying_axes(made) != [last] or not self._beside(t, line(made, last), bias):
            return False
        self._made.write(op.outputs[0], from_slots(line(made, last), last, x.dim()))
        return True

    def note_attention(self, t: Tracer, operands: list[Tensor], *, own_scale: bool) -> None:
        """Note an attention's query, key, ...; without a scale of its own it divides by its width's root."""
        query, key = operands[:2]
        read = operands if own_scale else operands[1:]
        self._read += [compress(self._made.read(x)) for x in read if x in self._made]
        ids = t.ids(query)
        last = ids.dim() - 1
        axes = varying_axes(ids)
        if own_scale or last not in axes:
            return
        known = axes == [last] and query in self._made
        made = distinct(self._made.read(query)) if known else np.zeros(1, np.int64)
        self._queries.append(_Queries(made, line(ids, last), distinct(ids, t.ids(key)), t.module))

    def settle(self, t: Tracer) -> list[Rescaling]:
        """Return what is rescaled; the widths of the other attentions are frozen."""
        read = distinct(*self._read) if self._queries else np.zeros(0, np.int64)
        found: dict[bytes, Rescaling] = {}
        for queries in self._queries:
            made = queries.made
            beside = [shift[np.isin(gain, made)] for gain, shift in self._shifts]
            slots = np.unique(np.concatenate([made, *beside]))
            owners = {t.slots.axes[axis][0] for axis in np.unique(t.slots.axis_of[slots]) if axis >= 0}
            same = found.get(made.tobytes())
            others = [r.slots for r in found.values() if r is not same]
            if (
                (made < FIRST_SLOT).any()
                or np.isin(made, read).any()
                or owners & self._shared
                or any(np.isin(slots, other).any() for other in others)
                or (same is not None and not np.array_equal(same.width, queries.width))
            ):
                t.facts.freeze(
                    np.concatenate([queries.ids, *([same.width] if same else [])]),
                    Reason(WHY, queries.module),
                )
            else:
                found.setdefault(made.tobytes(), Rescaling(slots, queries.width))
        return list(found.values())
