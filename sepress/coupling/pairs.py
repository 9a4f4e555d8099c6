"""Elements that two channels make: a product of activations with channels on its rows and on its columns.

Such a tensor has two layers of ids, each along axes of its own; an element goes when either of its ids does.
State-space mixing and attention over channels are made of these. Rules know the first layer; what happens
to the second is said here, for the operations of the table, and any other freezes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sepress.coupling.meeting import join, meet
from sepress.coupling.shadows import distinct, line, no_ids, varies, varying_axes
from sepress.coupling.slots import names

if TYPE_CHECKING:
    from sepress.coupling.rules import Op
    from sepress.coupling.trace import Tracer

CONVOLUTIONS = names("convolution _convolution mkldnn_convolution cudnn_convolution")
PRODUCTS = names("mm addmm bmm baddbmm")
NORMS = names(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm"
)
LAYER_NORM = names("native_layer_norm")
SOFTMAXES = names("_softmax _log_softmax")
COPIES = names("clone _to_copy contiguous")
REDUCTIONS = names("sum mean amax amin var std var_mean")
MOVES = names("transpose permute t unsqueeze squeeze alias detach expand view _unsafe_view unflatten reshape")
CUTS = names("split split_with_sizes chunk slice narrow select unbind")


# ---- where they come from -----------------------------------------------------------------------
def contract(t: Tracer, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """(B, M, K) x (B, K, N) of ids, one or two layers each: the layers of the product, (B, M, N).

    Along K the same channels must meet; those along M or N pass on. Of a whole batch (of heads), both sides
    must have the same ones.
    """
    shape = (*a[0].shape[:2], b[0].size(2))
    rows, summed_a, batch_a = _by_axis(t, a, kept=1, summed=2)
    columns, summed_b, batch_b = _by_axis(t, b, kept=2, summed=1)
    if summed_a is not None and summed_b is not None:
        join(t, [summed_a[:, 0], summed_b[:, :, 0]])
    elif summed_a is not None or summed_b is not None:
        t.freeze(_ids_of(summed_a, summed_b), "multiplied with data that no layer made")
    batch = None
    if batch_a is not None and batch_b is not None:
        batch = join(t, [batch_a[:, :1, :1], batch_b[:, :1, :1]])
    else:
        t.freeze(_ids_of(batch_a, batch_b), "heads multiplied with heads that no layer made")
    found = [
        rows[:, :, :1] if rows is not None else None,
        columns[:, :1] if columns is not None else None,
        batch,
    ]
    layers = [ids.expand(shape) for ids in found if ids is not None]
    for ids in layers[2:]:
        t.freeze(distinct(ids), "a product with channels on three axes")
    return layers[:2] or [no_ids(shape)]


def _by_axis(
    t: Tracer, layers: list[Tensor], *, kept: int, summed: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the layers along the axis that is kept, the one summed over, and the batch alone."""
    found: dict[int, Tensor] = {}
    for ids in layers:
        axes = varying_axes(ids)
        axis = max(axes, default=-1)
        if {kept, summed} <= set(axes) or axis in found:
            t.freeze(distinct(ids), "a product with channels on two axes")
        elif axes:
            found[axis] = ids
    return found.get(kept), found.get(summed), found.get(0)


def _ids_of(*layers: Tensor | None) -> np.ndarray:
    return distinct(*[ids for ids in layers if ids is not None])


# ---- where they go ------------------------------------------------------------------------------
def turn(t: Tracer, op: Op) -> None:
    """Make the layer that a rule is about the first one."""
    if op.name in CONVOLUTIONS | NORMS | PRODUCTS | LAYER_NORM:
        x = op.data
        axis = x.dim() - 1 if op.name in LAYER_NORM else 1
        if x in t.second and not varies(t.ids(x), axis) and varies(t.second.read(x), axis):
            t.swap_layers(x)


def pointwise(t: Tracer, op: Op) -> bool:
    """Element-wise: each layer meets what lies along its axes. False where all inputs have one layer."""
    pair = next((x for x in op.inputs if x in t.second), None)
    if pair is None:
        return False
    dims = max(x.dim() for x in op.inputs)

    def axes(x: Tensor, ids: Tensor) -> set[int]:
        return {axis + dims - x.dim() for axis in varying_axes(ids)}

    places = [axes(pair, ids) for ids in t.layers(pair)]
    for x in op.inputs:
        for ids in () if t.is_parametric(x) else t.layers(x):
            if not any(axes(x, ids) <= own for own in places):
                t.freeze(distinct(ids), "meets channels on two axes")
    layers = []
    for own, others in (places, reversed(places)):
        inputs, along = [], {}
        for x in op.inputs:
            if not t.is_parametric(x):
                found = (ids for ids in t.layers(x) if axes(x, ids) and axes(x, ids) <= own)
                along[id(x)] = next(found, no_ids(x.shape))
            lengths = {axis + dims - x.dim() for axis, length in enumerate(x.shape) if length > 1}
            if not t.is_parametric(x) or lengths & own or (own is places[0] and not lengths & others):
                inputs.append(x)
        layers.append(meet(t, inputs, lambda x, along=along: along[id(x)]))  # type: ignore[misc]
    for output in op.outputs:
        t.write(output, *[ids.expand(output.shape) for ids in layers])
    return True


def carry(t: Tracer, op: Op, *, moved: bool) -> None:
    """Give the outputs their second layer, after the rule gave them their first; `moved`: a view."""
    pairs = [x for x in op.inputs if x in t.second]
    handled = (op.pointwise and not op.func._schema.is_mutable) or op.name in ("bmm", "baddbmm")
    if not pairs or handled:
        return
    x, output = pairs[0], op.outputs[0] if op.outputs else None
    ids = t.second.read(x)
    if moved:
        _view(t, op, x, ids)
    elif output is not None and len(pairs) == 1 and (new := _passed(t, op, ids)) is not None:
        for made in (x for x in op.outputs if x.shape == output.shape):
            layers = [ids for ids in (t.ids(made), new.expand(made.shape)) if varying_axes(ids)]
            if layers:
                t.write(made, *layers)
    elif not (op.name == "mm" and not any(map(t.is_parametric, op.inputs))):  # a product of activations
        for pair in pairs:
            t.freeze(distinct(t.second.read(pair)), f"channels on two axes in '{op.name}'")


def _passed(t: Tracer, op: Op, ids: Tensor) -> Tensor | None:
    """Return the second layer of what an operation made of its first input's, None where it can't pass."""
    passed = None
    if op.name in CONVOLUTIONS:  # of one position, to which channels are positions
        kernel, stride, padding, transposed = op.args[1].shape[2:], *op.args[3:5], op.args[6]
        still = kernel.numel() == 1 and set(stride) == {1} and set(padding) == {0} and not transposed
        passed = ids[:, :1] if still and not varies(ids, 1) else None
    elif op.name in ("mm", "addmm"):  # a layer, to which rows are positions
        passed = ids[:, :1] if not varies(ids, 1) and t.is_parametric(op.args[-1]) else None
    elif op.name in NORMS:
        passed = ids if not varies(ids, 1) else None
    elif op.name in LAYER_NORM:
        axes = range(ids.dim() - len(op.args[1]), ids.dim())
        passed = None if any(varies(ids, axis) for axis in axes) else ids
        for statistic in op.outputs[1:] if passed is not None else ():
            for axis in axes:
                ids = ids.narrow(axis, 0, 1)
            t.write(statistic, ids)
    elif op.name in COPIES:
        passed = ids
    elif op.name in SOFTMAXES:
        if varies(ids, op.args[1] % ids.dim()):
            t.freeze(distinct(ids), "softmax over channels")
        passed = ids
    elif op.name in REDUCTIONS:
        for axis in op.reduced_axes():
            if varies(ids, axis):
                op.statistics = op.statistics or op.name != "sum"
                ids = no_ids(ids.shape)  # what is summed over ends here
            ids = ids.narrow(axis, 0, 1)
        passed = ids.reshape(op.outputs[0].shape)
    return passed


def _view(t: Tracer, op: Op, x: Tensor, ids: Tensor) -> None:
    """Views read both layers; these must stay along axes of their own, and whole."""
    for output in op.outputs:
        first, second = t.ids(output), t.second.read(output)
        axes = varying_axes(second)
        together = len(axes) > 1 or any(varies(first, axis) for axis in axes)
        cut = op.name in CUTS and _is_cut(op, x, ids)
        if together or cut or op.name not in MOVES | CUTS:
            t.freeze(distinct(ids), f"channels on two axes in '{op.name}'")


def _is_cut(op: Op, x: Tensor, ids: Tensor) -> bool:
    axis = op.arg(2 if "split" in op.name or op.name == "chunk" else 1, 0) % x.dim()
    whole = op.outputs[0].dim() == x.dim() and op.outputs[0].size(axis) == x.size(axis)
    return varies(ids, axis) and not whole


def positions(t: Tracer, x: Tensor) -> tuple[np.ndarray, ...]:
    """Return the ids along those axes of a convolution's input that are positions to it."""
    if x not in t.second:
        return ()
    return tuple(line(t.second.read(x), axis) for axis in varying_axes(t.second.read(x)) if axis > 1)
