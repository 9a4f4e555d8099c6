"""What each family of operations says about ids: one short function each, one literal table.

A rule gets the tracer and one operation, states facts (unify, align, freeze) and gives the outputs
their ids. Element-wise operations are known by torch's own tag; an operation without a rule freezes
what it touches, with its name as the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from sepress.coupling import pairs
from sepress.coupling.meeting import join, meet, tie
from sepress.coupling.scaling import ATTENTION
from sepress.coupling.shadows import (
    along,
    broadcast_shape,
    compress,
    distinct,
    from_slots,
    line,
    no_ids,
    varies,
    varying_axes,
)
from sepress.coupling.slots import NONE, PADDING, names

if TYPE_CHECKING:
    from sepress.coupling.trace import LayerKind, Tracer


@dataclass
class Op:
    """One dispatched operation of the traced forward, after it ran."""

    name: str
    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    signals: list[Tensor]  # those inputs that held activations before it ran
    outputs: list[Tensor]
    statistics: bool = False  # set by a rule: it sums up over channels, so its result changes with removal
    chooses: bool = False  # it makes truths or whole numbers of activations, which rounding can flip

    @property
    def pointwise(self) -> bool:
        return torch.Tag.pointwise in self.func.tags or self.name in POINTWISE

    def arg(self, position: int, default: Any = None) -> Any:
        return self.args[position] if len(self.args) > position else default

    @property
    def data(self) -> Tensor:
        """What a layer with weights reads."""
        x: Tensor = self.args[1] if self.name == "addmm" else self.args[0]
        return x

    def reduced_axes(self) -> list[int]:
        """Return the axes that a reduction of the first argument runs over, whatever its signature."""
        rank = self.args[0].dim()
        dims = self.kwargs.get("dim", self.arg(1))
        if self.name in ("norm", "linalg_vector_norm"):
            dims = self.arg(2)
        if not isinstance(dims, (int, list, tuple)) or isinstance(dims, bool) or dims == [] or rank == 0:
            return list(range(rank))
        return sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)})


Rule = Callable[["Tracer", Op], None]


# ---- element-wise -------------------------------------------------------------------------------
def pointwise(t: Tracer, op: Op) -> None:
    """Ids that meet at one position are one channel; a parameter's slots are too (gain, bias, PReLU)."""
    bank = next((x for x in op.inputs if t.banks.is_bank(t, x)), None)
    if bank is not None:
        return mixed_by_factors(t, op, bank)
    if pairs.pointwise(t, op):
        return None
    ids = meet(t, op.inputs, t.ids)
    for output in op.outputs:
        t.write(output, ids.expand(output.shape))
    return None


def in_place(t: Tracer, op: Op) -> None:
    """An operation that writes into its first argument."""
    target = op.args[0]
    if not isinstance(target, Tensor) or op.name in FILLS:
        return
    if t.is_parametric(target):
        t.freeze_parameter(target, "written to in the forward")
        return
    ids = t.ids(target)
    if op.name == "copy_":
        new = t.ids(op.args[1]).expand(target.shape)
    elif op.name == "index_put_" and (put := _put(t, op, target)) is not None:
        new = put
    elif op.pointwise:
        met = meet(t, op.inputs, t.ids).expand(target.shape)
        new = torch.where(ids != NONE, ids, met)
    else:
        t.freeze(distinct(*[t.ids(x) for x in op.inputs]), f"in-place {op.name}")
        return
    if target not in t.shadows or not torch.equal(new, ids):
        t.overwrite(target, new)


def _put(t: Tracer, op: Op, target: Tensor) -> Tensor | None:
    """Rows written at positions: every position may be one of them; None where channels are picked.

    Which positions these are may depend on the image, so it doesn't count where they lie in this one.
    """
    values, picked = op.args[2], _picked_axes(op.args[1])
    rest = target.dim() - len(picked)
    if picked != set(range(len(picked))) or values.dim() < rest:
        return None
    shadows = [t.ids(target), t.ids(values)]
    if any(varies(ids, axis) for ids in shadows for axis in range(ids.dim() - rest)):
        return None
    if (channels := t.no_region.get(values)) is not None:  # none here, but some in another image
        t.no_region.drop(values)
        shadows[1] = from_slots(channels, 0, rest).expand(values.shape[1:])[None]
    elif not values.numel():
        return None
    rows = [ids[(0,) * (ids.dim() - rest)] for ids in shadows]
    return join(t, rows).expand(target.shape)


# ---- layers with weights ------------------------------------------------------------------------
def convolution(t: Tracer, op: Op) -> None:
    """The weight's input slots are what it reads, its output slots are what it makes."""
    x, weight, bias, transposed, groups = op.args[0], op.args[1], op.args[2], op.args[6], op.args[8]
    ids, output = t.ids(x), op.outputs[0]
    out_axis, in_axis = (1, 0) if transposed else (0, 1)
    if _runs_along_channels(t, op):
        return along_channels(t, op)
    positions = x.size(0) * (x if transposed else output).shape[2:].numel()  # windows may lie in the batch
    depthwise = groups > 1 and groups == x.size(1) and weight.size(1) == 1
    kind: LayerKind = "pointwise" if weight[0, 0].numel() == 1 else "spatial"
    if groups > 1:
        kind = "depthwise" if depthwise else "grouped"
    axes = (t.axis_ids(weight, axis) for axis in range(weight.dim()))
    beside = pairs.positions(t, x)
    positions //= int(np.prod([len(places) for places in beside]))
    t.count_macs(positions, *axes, kind=kind, groups=int(groups), beside=beside)
    if depthwise:
        out_axis = 0
    made = t.slots_along(weight, out_axis) if t.is_parametric(weight) else None
    reads_channels = varies(ids, 1)
    why = None
    if not t.is_parametric(weight):
        why = "convolution with a weight that is not a parameter"
        t.banks.note(t, weight)
    elif made is None and output.size(1) > 1:
        why = "a weight whose layout is unclear"
    elif not reads_channels and varying_axes(ids):
        why = "convolution along the channel axis"
    elif groups > 1 and not depthwise and (transposed or not reads_channels or _is_merged(t, weight, made)):
        why = "a grouped convolution whose layout is unclear"
    if why is not None:
        _freeze_layer(t, ids, op.inputs[1:], why)
    elif depthwise:
        _depthwise(t, ids, made, groups, output.size(1))
    elif groups > 1:
        _grouped(t, op, ids, made, groups)
    else:
        _dense_input(t, t.slots_along(weight, in_axis), ids, 1)
    if why is not None:
        t.add_opaque(output.size(1), why)
    if made is None or why is not None:
        t.write(output, no_ids(output.shape))
        return None
    _bias(t, bias, made)
    t.write(output, from_slots(made, 1, output.dim()))
    t.add_producer(op, made, weight, bias)
    if not depthwise:
        t.add_reader(op, x, weight, in_axis, groups, transposed)
    return None


def _runs_along_channels(t: Tracer, op: Op) -> bool:
    """Whether a kernel slides over channels, one value each in and out."""
    x, weight, output = op.args[0], op.args[1], op.outputs[0]
    along = [axis for axis in varying_axes(t.ids(x)) if axis > 1]
    return (
        len(along) == 1
        and not varies(t.ids(x), 1)
        and t.is_parametric(weight)
        and weight.shape[:2].numel() == 1
        and x.shape == output.shape
    )


def along_channels(t: Tracer, op: Op) -> None:
    """ECA: channel c's value comes from those of c and its neighbours; survivors become neighbours.

    So the result changes with removal, as a norm's statistics do (Wang et al. 2020, ECA-Net, sec. 3.2).
    """
    ids, weight, output = t.ids(op.args[0]), op.args[1], op.outputs[0]
    (axis,) = varying_axes(ids)
    t.count_macs(output.numel() // output.size(axis) * weight.numel(), t.axis_ids(output, axis))
    t.write(output, ids)
    if t.eca_neighbours:
        op.statistics = True
        t.along_channels.append((t.module, line(ids, axis)))
    else:
        t.freeze(distinct(ids), "convolution along the channel axis (ECA; --eca-neighbours lets them go)")


def _is_merged(t: Tracer, weight: Tensor, made: np.ndarray | None) -> bool:
    """Whether a grouped weight is a reshaped parameter, so that its input axis is not one axis of it."""
    return made is None or (weight.size(1) > 1 and t.slots_along(weight, 1) is None)


def _depthwise(t: Tracer, ids: Tensor, made: np.ndarray | None, groups: int, width: int) -> None:
    """Filter i (or its `multiple` filters) reads channel i; the number of groups follows the channels."""
    if made is None:
        return
    multiple = width // groups
    for offset in range(multiple):
        tie(t, made[offset::multiple], ids, 1)
    t.claim_groups(line(ids, 1))


def _grouped(t: Tracer, op: Op, ids: Tensor, made: np.ndarray | None, groups: int) -> None:
    """Blocks keep equal counts, so the same offset of every block is one unit, on both sides."""
    assert made is not None
    first = line(ids, 1)
    index, found = along(ids, 1)
    t.facts.unify(first[index], found)
    blocks = first.reshape(groups, -1)
    t.facts.align(blocks)
    t.facts.align(made.reshape(groups, -1))
    if (first == NONE).any():
        t.freeze(first, "a grouped convolution reads data that no layer made")
    reads = t.slots_along(op.args[1], 1)
    if reads is not None:
        t.facts.unify(reads, blocks[0])


def _dense_input(t: Tracer, slots: np.ndarray | None, ids: Tensor, axis: int) -> None:
    if slots is not None:
        tie(t, slots, ids, axis)
    elif ids.size(axis) > 1:
        t.freeze(distinct(ids), "read by a weight whose layout is unclear")


def _bias(t: Tracer, bias: Tensor | None, made: np.ndarray) -> None:
    if bias is None:
        return
    if not t.is_parametric(bias):
        tie(t, made, t.ids(bias), bias.dim() - 1)
        return
    slots = t.slots_along(bias, bias.dim() - 1)
    if slots is not None:
        t.facts.unify(slots, made)
    elif bias.numel() > 1:
        t.freeze(made, "a bias whose layout is unclear")


def _freeze_layer(t: Tracer, ids: Tensor, weights: list[Tensor], why: str) -> None:
    t.freeze(distinct(ids), why)
    for weight in weights:
        if t.is_parametric(weight):
            t.freeze_parameter(weight, why)
        else:
            t.freeze(distinct(t.ids(weight)), why)


def matrix_product(t: Tracer, op: Op) -> None:
    """x @ w with a parameter on the right is a linear layer: rows of w read, columns make."""
    bias, x, weight = op.args if op.name == "addmm" else (None, op.args[0], op.args[1])
    output = op.outputs[0]
    if t.banks.is_bank(t, weight) and not t.is_parametric(x):
        return mixed_by_product(t, op, x, weight)
    t.count_macs(1, t.axis_ids(x, 0), t.axis_ids(weight, 0), t.axis_ids(weight, 1))
    if not t.is_parametric(weight) and not t.is_parametric(x):
        layers = pairs.contract(t, [i[None] for i in t.layers(x)], [i[None] for i in t.layers(weight)])
        t.write(output, *[ids[0] for ids in layers])
        return None
    ids = t.ids(x)
    reads = t.slots_along(weight, 0) if t.is_parametric(weight) else None
    makes = t.slots_along(weight, 1) if t.is_parametric(weight) else None
    if t.is_parametric(x) or not t.is_parametric(weight):
        why = "matrix product with a parameter on the left"
    elif (reads is None and weight.size(0) > 1) or (makes is None and weight.size(1) > 1):
        why = "a weight whose layout is unclear"
    elif varies(ids, 0) and not varies(ids, 1):
        return _linear_over_positions(t, output, ids, weight)
    else:
        why = None
    if why is not None:
        _freeze_layer(t, no_ids(x.shape) if t.is_parametric(x) else ids, [x, weight], why)
        t.add_opaque(output.size(0 if t.is_parametric(x) else 1), why)
        t.write(output, no_ids(output.shape))
        return None
    _dense_input(t, reads, ids, 1)
    if makes is None:
        t.write(output, no_ids(output.shape))
    else:
        _bias(t, bias, makes)
        t.write(output, from_slots(makes, 1, 2))
        t.add_producer(op, makes, weight, bias)
    t.add_reader(op, x, weight, 0, 1, False)
    return None


def _linear_over_positions(t: Tracer, output: Tensor, ids: Tensor, weight: Tensor) -> None:
    """A linear layer over tokens or pixels: channels pass it, its own axes are positions."""
    t.freeze_parameter(weight, "a linear layer over positions")
    t.write(output, ids[:, :1].expand(output.shape))


def batched_product(t: Tracer, op: Op) -> None:
    """Activation times activation (attention): what is summed over must be the same channels."""
    a, b = (op.args[1], op.args[2]) if op.name == "baddbmm" else (op.args[0], op.args[1])
    if t.banks.is_bank(t, b) and not t.is_parametric(a) and len(b) == 1:
        return mixed_by_product(t, op, a[0], b[0])
    if len(a) == 1 and t.is_parametric(a) != t.is_parametric(b) and op.name == "bmm":
        return _layer_in_a_batch(t, op, a[0], b[0])
    t.count_macs(1, *(t.axis_ids(a, axis) for axis in range(3)), t.axis_ids(b, 2))
    if t.is_parametric(a) or t.is_parametric(b):
        _freeze_layer(t, no_ids(()), [a, b], "a batched product with a parameter")
    layers = pairs.contract(t, t.layers(a), t.layers(b))
    if op.name == "baddbmm":
        layers = [join(t, [layers[0], t.ids(op.args[0])]), *layers[1:]]
    t.write(op.outputs[0], *layers)
    return None


def _layer_in_a_batch(t: Tracer, op: Op, a: Tensor, b: Tensor) -> None:
    """x @ w, or w @ x, in a batch of one: how einsum writes a linear layer of images or of maps."""
    x, weight, output = a, b, op.outputs[0][0]
    if t.is_parametric(a):
        x, weight, output = b.t(), a.t(), output.t()
    matrix_product(t, replace(op, name="mm", args=(x, weight), inputs=[x, weight], outputs=[output]))


# ---- weights mixed from a bank (see banks.py) ---------------------------------------------------
def mixed_by_product(t: Tracer, op: Op, x: Tensor, bank: Tensor) -> None:
    """Routing (1, K) @ bank (K, P): a weight for this image, whose elements are those of any one expert."""
    experts = t.slots_along(bank, 0)
    t.count_macs(x.size(0), t.axis_ids(bank, 0), *_axes_walked(t, bank[0]))
    _dense_input(t, experts, t.ids(x), 1)
    t.derive(op.outputs[0], t.elements(bank)[0].expand(op.outputs[0].shape))
    if op.name == "mm" and bank.dim() == len(t.slots.stored[t.slots.find(bank) or 0]):
        t.add_reader(op, x, bank, 0, 1, False)


def mixed_by_factors(t: Tracer, op: Op, bank: Tensor) -> None:
    """A bank times factors of its experts, or of other axes of it: what these count goes with the axis."""
    shape = op.outputs[0].shape
    for x in op.inputs:
        if t.is_parametric(x):
            continue
        ids = t.ids(x)
        for axis in varying_axes(ids):
            at = axis - x.dim() + bank.dim()
            slots = t.slots_along(bank, at) if at >= 0 and bank.size(at) > 1 else None
            if slots is None:
                t.freeze(distinct(ids), "scales a weight along an axis that it has not")
            else:
                tie(t, slots, ids, axis)
    t.derive(op.outputs[0], t.elements(bank).expand(shape))


def _axes_walked(t: Tracer, expert: Tensor) -> list[np.ndarray | int]:
    """Return the axes of a bank that one expert's elements, all of them, run over."""
    number = t.slots.parameter_of(int(t.elements(expert)[(0,) * expert.dim()]))
    assert number is not None
    first, shape = t.slots.first_slot[number], t.slots.shapes[number]
    axes = [np.arange(f, f + n) for f, n in zip(first, shape, strict=True)][1:]
    return list(axes) if np.prod(shape[1:]) == expert.numel() else [expert.numel()]


def fused_attention(t: Tracer, op: Op) -> None:
    """softmax(q k^T) v: the widths of q and k meet, v's width passes on."""
    query, key, value = (t.ids(x) for x in op.args[:3])
    output = op.outputs[0]
    if op.kwargs.get("scale") is None and t.call_name() != ATTENTION:
        t.freeze(distinct(query, key), "attention scaled by its head width")
    if op.func.overloadpacket in flop_registry:  # torch's counter leaves the CPU's kernel out, so we do too
        scores = (*op.args[0].shape[:3], op.args[1].shape[2])
        t.count_macs(int(np.prod(scores)), t.axis_ids(op.args[0], 3))
        t.count_macs(int(np.prod(scores)), t.axis_ids(op.args[2], 3))
    if query.dim() != 4 or any(varies(ids, axis) for ids in (query, key, value) for axis in (1, 2)):
        t.freeze(distinct(query, key, value), "attention over channels")
        t.write(output, no_ids(output.shape))
        return
    for bias in op.inputs[3:]:
        t.freeze(distinct(t.ids(bias)), "added to attention over heads that no layer made")
    join(t, [query[:, 0, 0], key[:, 0, 0]])
    t.write(output, value[:, :, :1].expand(output.shape))


# ---- norms, softmax, reductions -----------------------------------------------------------------
def batch_norm(t: Tracer, op: Op) -> None:
    """Gain, bias and running statistics belong to the channels of axis 1."""
    ids = t.ids(op.inputs[0])
    _norm_parameters(t, op.inputs[1:], ids, (1,))
    t.write(op.outputs[0], ids)
    _scaled_by_norm(t, op, 1, *op.args[1:3])


def group_norm(t: Tracer, op: Op) -> None:
    """Like batch norm; groups keep equal counts, and their statistics change with what is removed."""
    ids, groups = t.ids(op.inputs[0]), op.args[6]
    if ids.dim() > 1 and varies(ids, 1):
        _norm_parameters(t, op.inputs[1:], ids, (1,))
        t.facts.align(line(ids, 1).reshape(groups, -1))
        op.statistics = True
    t.write(op.outputs[0], ids)


def layer_norm(t: Tracer, op: Op) -> None:
    """Gain and bias belong to the normalised axes, whose statistics change with what is removed."""
    ids = t.ids(op.inputs[0])
    axes = tuple(range(ids.dim() - len(op.args[1]), ids.dim()))
    _norm_parameters(t, op.inputs[1:], ids, axes)
    t.write(op.outputs[0], ids)
    if any(varies(ids, axis) for axis in axes):
        op.statistics = True
        t.claim_sizes([(ids.size(axis), line(ids, axis)) for axis in axes if varies(ids, axis)])
    if len(axes) == 1:
        _scaled_by_norm(t, op, axes[0], *op.args[2:4])


def _scaled_by_norm(t: Tracer, op: Op, axis: int, gain: Tensor | None, bias: Tensor | None) -> None:
    """A norm's gain and bias make what follows anew: a factor on both scales it."""
    slots = t.slots_along(gain, 0) if gain is not None and t.is_parametric(gain) else None
    if gain is not None and slots is not None:
        t.scales.made_by(t, op.outputs[0], axis, slots, gain, bias)


def _norm_parameters(t: Tracer, parameters: list[Tensor], ids: Tensor, axes: tuple[int, ...]) -> None:
    for parameter in parameters:
        for own, axis in enumerate(axes):
            if not t.is_parametric(parameter):
                join(t, [t.ids(parameter), compress(ids, (axis,)).movedim(axis, -1).flatten(0, -2)[0]])
            elif (slots := t.slots_along(parameter, own)) is not None:
                tie(t, slots, ids, axis) if varies(ids, axis) else t.freeze(slots, "a norm over other axes")


def softmax(t: Tracer, op: Op) -> None:
    """Over channels a softmax changes with what is removed; over attention's or radix axes it doesn't."""
    ids = t.ids(op.inputs[0])
    axis = op.args[1] % max(1, ids.dim())
    axes = varying_axes(ids)
    if axis in axes:
        if len(axes) > 1:
            ids = t.collapse(op.inputs[0], ids, axis)
        else:
            t.freeze(distinct(ids), "softmax over channels")
    t.write(op.outputs[0], ids)


def reduction(t: Tracer, op: Op) -> None:
    """Reduced positions pass their id on; a reduction over channels is a statistic that changes."""
    x = op.inputs[0]
    ids, reduced = t.ids(x), op.reduced_axes()
    axes = varying_axes(ids)
    over = [axis for axis in reduced if axis in axes]
    kept = [axis for axis in axes if axis not in reduced]
    for axis in over if kept else ():
        ids = t.collapse(x, ids, axis)
    if over and not kept:
        if op.name in ("argmax", "argmin"):
            t.freeze(distinct(ids), f"{op.name} over channels")
        if op.name != "sum":  # zeros leave a sum as it is
            op.statistics = True
        ids = no_ids(ids.shape)
    for axis in reduced:
        ids = ids.narrow(axis, 0, 1)
    for output in op.outputs:
        t.write(output, ids.reshape(output.shape))


# ---- positions ----------------------------------------------------------------------------------
def pooling(t: Tracer, op: Op) -> None:
    """Pooling and resizing work on each channel; a window keeps the id that is uniform over it."""
    ids, output = t.ids(op.inputs[0]), op.outputs[0]
    small = compress(ids, (0, 1))
    if not output.numel():
        t.no_region.put(output, line(ids, 1))
    spatial = [axis for axis in range(2, ids.dim()) if small.size(axis) > 1]
    if spatial and not varies(ids, 1):
        t.freeze(distinct(ids), f"{op.name} over positions of several channels")
        t.write(output, no_ids(output.shape))
        return
    if spatial:  # several ids in one window (after a pixel shuffle) are one
        index, found = along(ids, 1)
        t.facts.unify(line(ids, 1)[index], found)
    for axis in spatial:
        small = small.narrow(axis, 0, 1)
    for result in op.outputs:
        t.write(result, small.expand((*result.shape[:2], *[1] * (result.dim() - 2))))


def padding(t: Tracer, op: Op) -> None:
    """Pads copy the edge's ids; zeros padded beside channels are channels that can't go."""
    ids, pads = t.ids(op.inputs[0]), op.args[1]
    for number in range(len(pads) // 2):
        axis, (before, after) = ids.dim() - 1 - number, pads[2 * number : 2 * number + 2]
        if before == after == 0:
            continue
        length, channels = ids.size(axis), varies(ids, axis)
        source = torch.arange(-before, length + after)
        padded = ids.index_select(axis, source.clamp(0, length - 1))
        if channels and op.name == "constant_pad_nd":
            padded.index_fill_(axis, ((source < 0) | (source >= length)).nonzero().flatten(), PADDING)
        elif channels:
            t.freeze(distinct(ids), f"{op.name} along channels")
        ids = padded
    t.write(op.outputs[0], ids)


def concatenation(t: Tracer, op: Op) -> None:
    """Joined along channels, ids lie side by side; along positions, they meet."""
    parts = [x for x in op.args[0] if x.numel()]
    output, shadows = op.outputs[0], [t.ids(x) for x in parts]
    if not parts:
        t.write(output, no_ids(output.shape))
        return
    axis = op.arg(1, 0) % output.dim()
    if not any(varies(ids, axis) for ids in shadows) and any(varying_axes(ids) for ids in shadows):
        t.write(output, join(t, [ids.narrow(axis, 0, 1) for ids in shadows]).expand(output.shape))
        return
    small = [compress(ids, (axis,)) for ids in shadows]
    shape = broadcast_shape(*[(*s.shape[:axis], 1, *s.shape[axis + 1 :]) for s in small])
    t.write(
        output, torch.cat([s.expand(*shape[:axis], s.size(axis), *shape[axis + 1 :]) for s in small], axis)
    )


def copy(t: Tracer, op: Op) -> None:
    """A copy or a fixed rearrangement of elements: the same operation on the shadow."""
    for output, ids in zip(op.outputs, t.rearranged(op, t.ids), strict=True):
        t.write(output, ids)


def lookup(t: Tracer, op: Op) -> None:
    """Picks positions by stored numbers; where these count channels, removal would shift them."""
    x = op.args[0]
    axes = set(varying_axes(t.ids(x)))
    dims = _looked_up(op, x)
    if axes & dims:
        t.freeze(distinct(t.ids(x)), f"channels picked by stored positions ({op.name})")
    copy(t, op)


def _looked_up(op: Op, x: Tensor) -> set[int]:
    if op.name == "index":
        return _picked_axes(op.args[1])
    if op.name in ("roll", "rot90"):
        dims = op.arg(2, [0])
        return {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    return {op.arg(2, 0) % x.dim()} if op.name == "repeat_interleave" else {op.arg(1, 0) % x.dim()}


def _picked_axes(indices: Sequence[Tensor | None]) -> set[int]:
    """Return the axes that an index holds positions of; a mask holds truths for as many as it has axes."""
    picked: set[int] = set()
    axis = 0
    for index in indices:
        length = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            picked |= set(range(axis, axis + length))
        axis += length
    return picked


def ordering(t: Tracer, op: Op) -> None:
    """Sorted by value: along positions each channel on its own; over channels removal changes the order."""
    ids = t.ids(op.inputs[0])
    axis = op.kwargs.get("dim", op.arg(ORDERINGS[op.name], -1)) % max(1, ids.dim())
    if ids.dim() and varies(ids, axis):
        t.freeze(distinct(ids), f"ordered by value ({op.name})")
        ids = no_ids(ids.shape)
    for output in op.outputs:
        shape = [1 if at == axis else n for at, n in enumerate(ids.shape)]
        t.write(output, ids.narrow(axis, 0, 1).reshape(shape) if output.numel() else no_ids(output.shape))


def channel_shuffle(t: Tracer, op: Op) -> None:
    """Interleaves blocks of channels: they must keep equal counts."""
    t.facts.align(line(t.ids(op.inputs[0]), 1).reshape(op.args[1], -1))
    copy(t, op)


def deciding(t: Tracer, op: Op) -> None:
    """What is picked, and how much, is told by values: these must be there."""
    t.freeze(distinct(*(t.ids(x) for x in op.inputs)), f"what is picked depends on its values ({op.name})")
    for output in op.outputs:
        t.write(output, no_ids(output.shape))


def unknown(t: Tracer, op: Op) -> None:
    """No rule: whatever it touches stays as it is, and the reason says so."""
    _freeze_layer(t, no_ids(()), op.inputs, f"no rule for operation '{op.name}'")
    for output in op.outputs:
        t.write(output, no_ids(output.shape))


# ---- views --------------------------------------------------------------------------------------
def view(t: Tracer, op: Op) -> None:
    """Views read the same shadow; what needs a word is a size written in Python."""
    x, output = op.inputs[0], op.outputs[0]
    if op.name in RESHAPES:
        reshaped(t, x, output)
    elif t.is_parametric(x):
        _cut_parameter(t, op, x)
    elif op.name in ("split", "split_with_sizes", "chunk", "tensor_split"):
        _split(t, op)
    elif op.name in ("slice", "narrow"):
        _slice(t, op)
    elif op.name in ("select", "unbind") and varies(t.ids(x), axis := op.arg(1, 0) % x.dim()):
        t.freeze(line(t.ids(x), axis), "a channel picked by its position")
    elif op.name == "expand":
        t.claim_shape(output)


def reshaped(t: Tracer, x: Tensor, output: Tensor) -> None:
    """Channels laid over several axes go in equal numbers from each: the longest axis shrinks."""
    ids = t.ids(output)
    axes = varying_axes(ids)
    if not t.is_parametric(x) and len(axes) > max(1, len(varying_axes(t.ids(x)))):
        shrinks = max(axes, key=lambda axis: (ids.size(axis), axis))
        for axis in axes:
            if axis != shrinks:
                ids = t.collapse(output, ids, axis)
    t.claim_shape(output)


def _cut_parameter(t: Tracer, op: Op, x: Tensor) -> None:
    """A parameter cut into parts: where the cut lies is written in the code."""
    if op.name in ("split", "split_with_sizes", "chunk", "slice", "narrow", "select", "unbind"):
        axis = op.arg(2 if "split" in op.name else 1, 0) % x.dim()
        whole = op.name in ("slice", "narrow") and op.outputs[0].size(axis) == x.size(axis)
        slots = t.slots_along(x, axis)
        if slots is not None and not whole:
            t.freeze(slots, "a parameter cut at positions written in the code")


def _split(t: Tracer, op: Op) -> None:
    ids = t.ids(op.inputs[0])
    axis = op.arg(2, 0) % ids.dim()
    if not varies(ids, axis):
        return
    parts = [line(t.ids(output), axis) for output in op.outputs]
    equal = len({len(part) for part in parts}) == 1
    if equal and (op.name != "split_with_sizes" or not t.call_has_tags()):
        t.facts.align(np.stack(parts))
    if t.call_name() == "chunk":
        return
    if op.name == "split_with_sizes":
        written = t.claim_sizes([(len(part), part) for part in parts])
    else:
        written = [line(ids, axis)] if t.claim_sizes([(len(parts[0]), parts[0])]) else []
    for part in written:
        t.freeze_written(part, "split at sizes")


def _slice(t: Tracer, op: Op) -> None:
    """A cut between channels stands at a number that must be found again after removal.

    One written in the code holds what it counts: the channels before it, or behind it where it is negative.
    """
    x, output = op.inputs[0], op.outputs[0]
    axis = op.arg(1, 0) % x.dim()
    ids = t.ids(x)
    if output.size(axis) == x.size(axis) or not varies(ids, axis):
        return
    channels, length = line(ids, axis), x.size(axis)
    if op.arg(4, 1) != 1:
        t.freeze_written(channels, "cut at a position")
        return
    start = (op.arg(2) or 0) % length
    for given, cut in ((op.arg(2) or 0, start), (op.arg(3) or 0, start + output.size(axis))):
        if 0 < cut < length and t.claim_sizes([(cut, channels[:cut])]):
            t.freeze_written(channels[cut:] if given < 0 else channels[:cut], "cut at a position")


# ---- weights computed from parameters -----------------------------------------------------------
def derive(t: Tracer, op: Op) -> None:
    """A tensor computed from parameters alone remembers, element by element, where it comes from."""
    parametric = [x for x in op.inputs if t.is_parametric(x)]
    main = max(parametric, key=lambda x: x.numel())
    output = op.outputs[0] if op.outputs else None
    if output is None or not (main.is_floating_point() or output.is_floating_point() or op.name in COPIES):
        return
    if op.pointwise and output.numel() == main.numel():
        for other in parametric:
            if other is not main:
                _same_slots(t, other, main)
        t.derive(output, t.elements(main).reshape(output.shape))
    elif op.name in ("native_batch_norm", "_native_batch_norm_legit"):
        for other in parametric:
            _same_slots(t, other, main, axis=1) if other is not main else None
        t.derive(output, t.elements(main))
        for statistic in op.outputs[1:]:
            t.derive(statistic, t.elements(main)[0].flatten(1)[:, 0])
        op.statistics = True
    elif op.name == "_weight_norm_interface":  # v, g, dim -> v / |v| * g, and |v|
        v, g, kept = op.args[0], op.args[1], op.arg(2, 0)
        _same_slots(t, g, v)
        t.derive(output, t.elements(v))
        norms = t.elements(v).movedim(kept, 0).flatten(1)[:, 0]
        t.derive(op.outputs[1], norms.reshape(op.outputs[1].shape))
        op.statistics = True
    elif op.name in REDUCTIONS:
        elements = t.elements(main)
        for axis in reversed(op.reduced_axes()):
            elements = elements.narrow(axis, 0, 1)
        for result in op.outputs:
            t.derive(result, elements.reshape(result.shape))
        op.statistics = True
    elif op.name in COPIES or op.name in LOOKUPS:
        for result, elements in zip(op.outputs, t.rearranged(op, t.elements), strict=True):
            t.derive(result, elements)
    else:
        count = flop_registry.get(op.func.overloadpacket)
        if count is not None:  # such as a layer over a stored table of positions
            t.count_macs(count(*op.args, **op.kwargs, out_val=output) // 2)
        for parameter in parametric:
            t.freeze_parameter(parameter, f"a weight computed by '{op.name}'")


def reads_constants(t: Tracer, op: Op) -> bool:
    """Whether a layer reads what no parameter made, as one that embeds positions does: it makes channels."""
    if RULES.get(op.name) not in (convolution, matrix_product) or t.is_parametric(op.data):
        return False
    weight = op.args[1 if op.data is op.args[0] else 2]
    return t.slots.find(weight) is not None


def _same_slots(t: Tracer, a: Tensor, b: Tensor, axis: int | None = None) -> None:
    """Unify the slots of two parameters where they are broadcast against each other."""
    pairs = [(0, axis)] if axis is not None else [(-k, -k) for k in range(1, min(a.dim(), b.dim()) + 1)]
    for own, other in pairs:
        if a.size(own) == b.size(other) > 1:
            mine, theirs = t.slots_along(a, own % a.dim()), t.slots_along(b, other % b.dim())
            if mine is not None and theirs is not None:
                t.facts.unify(mine, theirs)


# ---- the table ----------------------------------------------------------------------------------
POINTWISE = names(
    "hardswish hardswish_ _prelu_kernel prelu log_sigmoid_forward masked_fill masked_fill_ dropout"
    " native_dropout where hardsigmoid hardsigmoid_ lerp addcmul addcmul_ softplus relu6 bernoulli"
    " rrelu_with_noise"
)
COPIES = names(
    "clone _to_copy contiguous cat stack flip repeat pixel_shuffle pixel_unshuffle tril triu detach"
    " lift_fresh im2col split_with_sizes_copy"
)
LOOKUPS = names("index_select index gather take_along_dim roll rot90 repeat_interleave")
ORDERINGS = {"topk": 2, "kthvalue": 2, "sort": 1, "argsort": 1}  # operation -> place of its axis
DECIDING = names("nonzero nms masked_select _unique _unique2 unique_dim unique_consecutive bincount")
POOLINGS = names(
    "max_pool1d max_pool2d max_pool2d_with_indices max_pool3d_with_indices mkldnn_max_pool2d"
    " avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d"
    " _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
    " upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d"
    " upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"
    " _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d roi_align roi_pool"
)
PADDINGS = names(
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d"
    " replication_pad2d replication_pad3d"
)
REDUCTIONS = names(
    "mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp argmax"
    " argmin prod any all"
)
RESHAPES = names("view _unsafe_view unflatten reshape")
FILLS = names(
    "fill_ zero_ uniform_ normal_ bernoulli_ as_strided_ transpose_ t_ squeeze_ unsqueeze_ swapaxes_"
    " detach_ requires_grad_"
)
FACTORIES = names(
    "zeros ones empty full arange scalar_tensor new_zeros new_ones new_empty new_full zeros_like"
    " ones_like empty_like full_like rand randn rand_like randn_like linspace empty_strided"
    " new_empty_strided sym_size eye hann_window hamming_window _local_scalar_dense item is_nonzero"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(COPIES, copy),
    **dict.fromkeys(LOOKUPS, lookup),
    **dict.fromkeys(ORDERINGS, ordering),
    **dict.fromkeys(DECIDING, deciding),
    **dict.fromkeys(POOLINGS, pooling),
    **dict.fromkeys(PADDINGS, padding),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"), convolution),
    **dict.fromkeys(("mm", "addmm"), matrix_product),
    **dict.fromkeys(("bmm", "baddbmm"), batched_product),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        fused_attention,
    ),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ),
        batch_norm,
    ),
    "native_group_norm": group_norm,
    "native_layer_norm": layer_norm,
    "_softmax": softmax,
    "_log_softmax": softmax,
    "cat": concatenation,
    "native_channel_shuffle": channel_shuffle,
    "channel_shuffle": channel_shuffle,
}
