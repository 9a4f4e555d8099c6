"""Run a network once on one image and note, operation by operation, which channels depend on which.

Two modes do it: a dispatch mode sees every operation and keeps ids beside activations; a function
mode sees the Python calls, which give sites for taps and carry tagged ints. The net is left as it was.
"""

from __future__ import annotations

import copy
import linecache
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sepress.coupling import pairs, rules
from sepress.coupling.banks import BankFinder
from sepress.coupling.claims import Claims
from sepress.coupling.endings import EndFinder, Ending
from sepress.coupling.gating import GateFinder, Mark
from sepress.coupling.rules import Op
from sepress.coupling.scaling import ATTENTION, Rescaling, Scales
from sepress.coupling.shadows import (
    Shadows,
    StorageMap,
    compress,
    distinct,
    from_slots,
    line,
    no_ids,
    varies,
    varying_axes,
)
from sepress.coupling.slots import Facts, SlotTable, names
from sepress.coupling.tags import SizeSource, TaggedInt, tagged_attributes
from sepress.device import kept_random_state
from sepress.errors import InputError
from sepress.modes import evaluating
from sepress.types import CallSite, Reason

Inputs = Tensor | tuple[Tensor, ...]
READING_CALLS = names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul __matmul__"
    " mm addmm"
)
# Where ids end, so where a mask must have made zeros.
READING_OPS = names(
    "convolution _convolution cudnn_convolution mkldnn_convolution mm addmm bmm baddbmm sum"
    " _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"
    " _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
)
# Operations that only lay memory out: which of them run depends on widths, so replays don't count them.
LAYOUT_OPS = names(
    "view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select as_strided"
    " as_strided_ alias detach clone contiguous _to_copy empty empty_strided unfold"
)
# Activations that become Python values: by an operation, or by a call that reads memory without one.
PYTHON_VALUES = names("_local_scalar_dense is_nonzero item equal")
PYTHON_COPIES = names("tolist numpy __array__ __dlpack__")
OWN_OPERATIONS = frozenset({"mps"})  # devices with other operations (a linear layer is one) and no float64
SWEEP_EVERY = 64  # operations between two looks for dead storages


@dataclass
class Call:
    """The outermost torch function call that runs."""

    index: int
    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def tags(self) -> list[TaggedInt]:
        """Return the tagged ints among the arguments, slices included, in order."""
        leaves = tree_leaves((tuple(self.args[1:]), self.kwargs))
        parts = [p for x in leaves for p in ((x.start, x.stop) if isinstance(x, slice) else (x,))]
        return [p for p in parts if isinstance(p, TaggedInt)]


@dataclass(frozen=True, eq=False)
class Operation:
    """What one operation of the forward read and made: ids that broadcast to its tensors."""

    name: str
    module: str
    reads: tuple[tuple[int, np.ndarray], ...]  # (position among its tensors, ids): ended here
    inputs: tuple[tuple[np.ndarray, ...] | None, ...]  # of those with statistics or choices
    outputs: tuple[tuple[np.ndarray, ...] | None, ...]  # several arrays: gone where any says so
    statistics: bool  # its statistics run over channels, so they change with removal
    chooses: bool  # it makes truths or whole numbers of activations, which rounding can flip


@dataclass(frozen=True, eq=False)
class MadeBy:
    """The output slots of a convolution or linear layer."""

    slots: np.ndarray
    mark: Mark | None  # of the input: whether it lies in a gate's branch


@dataclass(frozen=True, eq=False)
class ReadBy:
    """One layer that reads, as the trace met it."""

    parameter: str
    dim: int
    groups: int
    transposed: bool
    site: CallSite
    ids: np.ndarray  # along the axis read
    mark: Mark | None
    mixed: tuple[int, ...]  # see types.Reader


# Convolutions by their kernel and groups, and matrix products.
LayerKind = Literal["pointwise", "spatial", "grouped", "depthwise", "linear"]


@dataclass(frozen=True, eq=False)
class Product:
    """A term of the MACs: a constant times the surviving lengths of axes."""

    constant: int
    axes: tuple[np.ndarray, ...]
    kind: LayerKind = "linear"
    groups: int = 1
    beside: tuple[np.ndarray, ...] = ()  # axes of channels that are positions to the layer


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Interprets every operation on ids beside its real execution; collects facts for groups.py."""

    def __init__(self, net: nn.Module, banks: BankFinder, *, eca_neighbours: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.banks = banks
        self.eca_neighbours = eca_neighbours
        self.along_channels: list[tuple[str, np.ndarray]] = []  # modules that slide over channels, and ids
        self.slots = SlotTable(
            net, {(name, dim): axes for name, flat in banks.known.items() for dim, axes in flat.items()}
        )
        self.facts = Facts()
        self.shadows = Shadows()
        self.second = Shadows()  # of elements that two channels make: see pairs.py
        self.derived = Shadows(torch.int64)  # element numbers of tensors computed from parameters
        self.gates = GateFinder()
        self.scales = Scales()
        self.rescalings: list[Rescaling] = []
        self.operations: list[Operation] = []
        self.products: list[Product] = []
        self.producers: list[MadeBy] = []
        self.opaque: dict[str, tuple[int, Reason]] = {}  # layer -> output channels that nothing follows, why
        self.readers: list[ReadBy] = []
        self.claims = Claims(self.facts)
        self.group_counts: dict[str, np.ndarray] = {}  # depthwise module -> ids of its input
        self.calls: list[str] = []
        self.call: Call | None = None
        self.ends = EndFinder()
        self.ending: Ending | None = None  # set when the forward is over
        self.no_region: StorageMap[np.ndarray] = StorageMap()  # channels of maps pooled over no region
        self.touched: set[int] = set()  # the parameters and buffers that any operation took
        self.modules: list[str] = []  # those running, innermost last
        self._dispatched = 0
        for number in self.slots.clashing:
            self.freeze(self.slots.every_slot(number), "shares memory with another parameter")

    # ---- the interpreter ------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = list(_tensors((*args, *kwargs.values())))
        signals = [x for x in inputs if x in self.shadows]
        traced = bool(signals)
        self.touched.update(n for x in inputs if (n := self.slots.find(x)) is not None)
        if traced and name in PYTHON_VALUES:
            self.ends.decide(_data_dependent(self.module))
        result = func(*args, **kwargs)
        outputs = list(_tensors((result,)))
        op = Op(name, func, args, kwargs, inputs, signals, outputs)
        op.chooses = traced and _chooses(op)
        if name not in rules.FACTORIES and (traced or any(self.is_parametric(x) for x in inputs)):
            self._interpret(op, traced)
        if name not in LAYOUT_OPS:
            self._record(op)
        if traced:
            number = None if name in LAYOUT_OPS else len(self.operations) - 1
            self.ends.follow(self, op, layer=any(self._is_trained(x) for x in inputs), number=number)
        self._dispatched += 1
        if self._dispatched % SWEEP_EVERY == 0:
            for memory in (
                self.shadows,
                self.second,
                self.derived,
                self.gates,
                self.scales,
                self.banks,
                self.ends,
            ):
                memory.sweep()
        return result

    def _interpret(self, op: Op, traced: bool) -> None:
        aliases = bool(op.outputs) and all(x in self.shadows or self.is_parametric(x) for x in op.outputs)
        pairs.turn(self, op)
        if op.func._schema.is_mutable and rules.RULES.get(op.name) is not rules.batch_norm:
            rules.in_place(self, op)
        elif aliases:
            rules.view(self, op)
        elif not traced and not rules.reads_constants(self, op):
            rules.derive(self, op)
        elif op.pointwise:
            if op.name not in rules.COPIES:  # which a reshape makes
                for tag in self.call.tags() if self.call else ():
                    self.note_number(tag)
            rules.pointwise(self, op)
        else:
            rules.RULES.get(op.name, rules.unknown)(self, op)
        moved = aliases and not op.func._schema.is_mutable
        pairs.carry(self, op, moved=moved)
        if not moved:
            self.scales.observe(self, op)
        if traced:
            self.gates.observe(self, op)
            self.banks.follow(self, op)

    def _record(self, op: Op) -> None:
        statistics = op.statistics
        reads = tuple(
            (position, compress(ids).numpy())
            for position, x in enumerate(op.inputs)
            if op.name in READING_OPS and x in self.shadows
            for ids in self.layers(x)
        )
        compared = statistics or op.chooses
        self.operations.append(
            Operation(
                op.name,
                self.module,
                tuple((position, ids.copy()) for position, ids in reads if ids.any()),
                tuple(self._layers_of_ids(x) for x in op.inputs) if compared else (),
                tuple(
                    self._layers_of_ids(x) if statistics or x in self.shadows else None for x in op.outputs
                ),
                statistics,
                op.chooses,
            )
        )

    def _layers_of_ids(self, x: Tensor) -> tuple[np.ndarray, ...] | None:
        if x in self.shadows:
            return tuple(compress(ids).numpy().copy() for ids in self.layers(x))
        if not self.is_parametric(x):
            return None
        shape = [1] * x.dim()
        return tuple(
            slots.reshape([*shape[:axis], -1, *shape[axis + 1 :]])
            for axis in range(x.dim())
            if x.size(axis) > 1
            for slots in self.slots.axes_of_elements(line(self.elements(x), axis))
        )

    # ---- ids of tensors -------------------------------------------------------------------------
    def is_parametric(self, x: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer, or was computed from these alone."""
        return x not in self.shadows and (x in self.derived or self.slots.find(x) is not None)

    def _is_trained(self, x: Tensor) -> bool:
        """Whether a tensor is a parameter, or was computed from some: what takes it is a layer."""
        number = self.slots.find(x)
        return x in self.derived if number is None else self.slots.names[number] in self.slots.parameters

    def distinct_ids(self, x: Tensor) -> np.ndarray:
        """Return the ids that occur in a tensor."""
        return distinct(*self.layers(x))

    def ids(self, x: Tensor) -> Tensor:
        """Return the ids of a tensor, in its shape."""
        if x in self.shadows:
            return self.shadows.read(x)
        if self.is_parametric(x):
            for axis in reversed(range(x.dim())):
                slots = self.slots_along(x, axis)
                if slots is not None:
                    return from_slots(slots, axis, x.dim()).expand(x.shape)
        return no_ids(x.shape)

    def axis_ids(self, x: Tensor, axis: int) -> np.ndarray | int:
        """Return the ids along an axis, or its length where it has none."""
        if self.is_parametric(x):
            slots = self.slots_along(x, axis)
            return x.size(axis) if slots is None else slots
        found = (line(ids, axis) for ids in self.layers(x) if varies(ids, axis))
        return next(found, x.size(axis))

    def layers(self, x: Tensor) -> list[Tensor]:
        """Return the ids of a tensor, and the other ones of its elements where two channels make each."""
        return [self.ids(x), self.second.read(x)] if x in self.second else [self.ids(x)]

    def write(self, x: Tensor, ids: Tensor, *second: Tensor) -> None:
        """Give a tensor its ids, and a second layer of them."""
        self.shadows.write(x, ids)
        for other in second:
            self.second.write(x, other)

    def swap_layers(self, x: Tensor) -> None:
        """Let the two layers of a tensor's storage change places; their order says nothing."""
        self.shadows.swap(self.second, x)

    def overwrite(self, x: Tensor, ids: Tensor) -> None:
        if x in self.shadows:
            self.shadows.overwrite(x, ids)
        else:
            self.shadows.write(x, ids)

    def collapse(self, x: Tensor, ids: Tensor, axis: int) -> Tensor:
        """Make the ids along an axis one channel each, so that the axis no longer varies."""
        first = ids.narrow(axis, 0, 1).expand(ids.shape)
        small = compress(ids, (axis,))
        self.facts.unify(small.numpy(), small.narrow(axis, 0, 1).expand(small.shape).numpy())
        if x in self.shadows:
            self.shadows.overwrite(x, first)
        return first

    def elements(self, x: Tensor) -> Tensor:
        """Return which parameter element each element is (0: none)."""
        if x in self.derived:
            return self.derived.read(x)
        if self.slots.find(x) is not None:
            return self.slots.elements(x)
        return torch.zeros(1, dtype=torch.int64).expand(x.shape)

    def derive(self, x: Tensor, elements: Tensor) -> None:
        self.derived.write(x, elements)

    def slots_along(self, x: Tensor, axis: int) -> np.ndarray | None:
        """Return the slots along one axis of a parametric tensor, or None where unclear."""
        if x.size(axis) < 2 or x.stride(axis) == 0:
            return None
        if x in self.derived:
            return self.slots.of_elements(line(self.derived.read(x), axis))
        return self.slots.along(x, axis)

    def rearranged(self, op: Op, read: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Run an operation that only moves elements on what `read` gives for its tensors."""
        if op.name in ("_to_copy", "clone", "detach", "contiguous", "lift_fresh"):
            return [read(op.args[0])]
        ignored = ("dtype", "device", "layout", "pin_memory", "non_blocking", "memory_format")

        def shadow(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            index = not x.is_floating_point() and x is not op.args[0] and op.name != "cat"
            return x.cpu() if index else read(x).to(torch.float64)  # exact up to 2^53

        kwargs = {key: value for key, value in op.kwargs.items() if key not in ignored}
        moved = op.func(*tree_map(shadow, tuple(op.args)), **tree_map(shadow, kwargs))
        return [x.to(torch.int64) for x in tree_leaves(moved) if isinstance(x, Tensor)]

    # ---- facts ----------------------------------------------------------------------------------
    @property
    def module(self) -> str:
        return self.modules[-1] if self.modules else ""

    def freeze(self, ids: np.ndarray, why: str) -> None:
        self.facts.freeze(ids, Reason(why, self.module))

    def freeze_parameter(self, x: Tensor, why: str) -> None:
        """Freeze all slots of the elements that a tensor is a view of, or was computed from."""
        self.freeze(self.slots.touched(self.elements(x)), why)

    def count_macs(
        self,
        constant: int,
        *lengths: np.ndarray | int,
        kind: LayerKind = "linear",
        groups: int = 1,
        beside: tuple[np.ndarray, ...] = (),
    ) -> None:
        for length in lengths:
            constant *= length if isinstance(length, int) else 1
        axes = tuple(x for x in lengths if not isinstance(x, int))
        self.products.append(Product(constant, axes, kind, groups, beside))

    def add_producer(self, op: Op, slots: np.ndarray, weight: Tensor, bias: Tensor | None) -> None:
        """Note a layer that makes channels along axis 1."""
        self.producers.append(MadeBy(slots, self.gates.marks.get(op.data)))
        self.scales.made_by(self, op.outputs[0], 1, slots, weight, bias)

    def add_opaque(self, channels: int, why: str) -> None:
        """Note a layer whose output channels get no ids, so that they are counted as frozen."""
        self.opaque[self.module] = channels, Reason(why, self.module)

    def add_reader(self, op: Op, x: Tensor, weight: Tensor, axis: int, groups: int, transposed: bool) -> None:
        """Note a layer that reads ids, if the call that runs it is one that a tap can see."""
        slots = self.slots_along(weight, axis)
        ids = self.ids(x)
        if slots is None or self.call is None or self.call.name not in READING_CALLS or not varies(ids, 1):
            return
        outer, mixed = self._operand(x), self.banks.mixed_shape(self, weight)
        if outer is None or mixed is None:
            return
        position, tensor = outer
        channels = tensor.dim() - x.dim() + 1 if op.name not in ("mm", "addmm") else tensor.dim() - 1
        read = line(ids, 1)
        if tensor.size(channels) != len(read):
            return
        parameter, dim = self.slots.axes[self.slots.axis_of[slots[0]]]
        site = CallSite(self.call.index, self.call.name, position, channels, self.module)
        name, mark = self.slots.names[parameter], self.gates.marks.get(x)
        dim = axis if mixed else dim
        self.readers.append(ReadBy(name, dim, groups, transposed, site, read, mark, mixed))

    # ---- the call that runs ---------------------------------------------------------------------
    def _operand(self, x: Tensor) -> tuple[int, Tensor] | None:
        """Return the position among the call's tensor arguments, and the argument, that x is (a view of)."""
        if self.call is None:
            return None
        tensors = [a for a in tree_leaves((self.call.args, self.call.kwargs)) if isinstance(a, Tensor)]
        storage = x.untyped_storage()._cdata
        same = [(i, a) for i, a in enumerate(tensors) if a.untyped_storage()._cdata == storage]
        return next(((i, a) for i, a in same if a is x), same[0] if same else None)

    def call_site(self, x: Tensor, axis: int) -> CallSite | None:
        """Return where a tap finds x on a later run: operand of the outermost call.

        The call may lay its operand out anew (einsum), so long as one axis of it is x's.
        """
        outer = self._operand(x)
        if outer is None or self.call is None:
            return None
        position, tensor = outer
        if tensor.shape != x.shape:
            same = (x.size(axis), x.stride(axis))
            axes = [a for a in range(tensor.dim()) if (tensor.size(a), tensor.stride(a)) == same]
            if (
                len(axes) != 1
                or tensor.numel() < x.size(axis)
                or x.storage_offset() != tensor.storage_offset()
            ):
                return None
            axis = axes[0]
        return CallSite(self.call.index, self.call.name, position, axis, self.module)

    def call_name(self) -> str:
        return self.call.name if self.call else ""

    def call_has_tags(self) -> bool:
        return bool(self.call and self.call.tags())

    def claim_sizes(self, sizes: list[tuple[int, np.ndarray]]) -> list[np.ndarray]:
        """Bind the call's tagged ints to the channels they count, by value, in order; return the rest."""
        tags = self.call.tags() if self.call else []
        left = []
        for size, ids in sizes:
            if size in tags:
                self.claims.claim(tags.pop([int(tag) for tag in tags].index(size)), ids)
            else:
                left.append(ids)
        return left

    def freeze_written(self, ids: np.ndarray, what: str) -> None:
        """Freeze what a number in the code counts, and say in which line it is."""
        file, number = _line_that_runs()
        self.facts.fixed.update(np.unique(ids).tolist())
        self.freeze(ids, f"{what} written in the code ({file.name}, line {number})")

    def claim_shape(self, output: Tensor) -> None:
        """Bind the sizes given to view, reshape or expand to the channels on the output's axes."""
        if self.call is None or self.call.name not in ("view", "reshape", "expand", "unflatten"):
            return
        given = [*self.call.args[1:], *self.call.kwargs.values()]
        before = given.pop(0) if self.call.name == "unflatten" else 0  # axes that stay
        sizes = list(given[0]) if given and isinstance(given[0], (list, tuple)) else given
        sizes = [-1] * (before % (output.dim() - len(sizes) + 1)) + sizes if before else sizes
        for axis in range(output.dim()):
            ids = self.axis_ids(output, axis)
            at = axis - output.dim() if self.call.name == "expand" else axis
            size = sizes[at] if -len(sizes) <= at < len(sizes) else -1
            if isinstance(ids, int):
                if isinstance(size, TaggedInt):
                    self.claims.keep(size)
            elif isinstance(size, TaggedInt):
                self.claims.claim(size, ids)
            elif size != -1:
                self.freeze_written(ids, "a width")

    def note_number(self, tag: TaggedInt) -> None:
        """A number of channels that is computed with, as in a scale: it has to stay."""
        self.claims.hold(tag, Reason("computed with as a number", self.module))

    def claim_groups(self, ids: np.ndarray) -> None:
        """Bind a depthwise convolution's number of groups to the channels it reads."""
        call = self.call
        conv = call is not None and call.name.startswith("conv")
        count = (
            call.kwargs.get("groups", call.args[6] if len(call.args) > 6 else None) if conv and call else None
        )
        if isinstance(count, TaggedInt):
            self.claims.claim(count, ids)
        else:
            self.freeze_written(ids, "a number of groups")

    def tag_sizes(self, name: str, args: Sequence[Any], size: Any) -> Any:
        """Tag sizes read from a traced tensor or a parameter, so that other tensors shaped by them follow."""
        if name not in ("__get__", "size") or not args or not isinstance(args[0], Tensor):
            return size
        if not isinstance(size, int | torch.Size):
            return size
        with _disable_current_modes():  # reading ids must not be traced itself
            sources = self._size_sources(args[0])
        if isinstance(size, torch.Size):
            return torch.Size(
                [TaggedInt(n, {sources[a]: 1}) if a in sources else n for a, n in enumerate(size)]
            )
        axis = args[1] % args[0].dim() if len(args) > 1 and isinstance(args[1], int) else None
        return TaggedInt(size, {sources[axis]: 1}) if axis in sources else size

    def _size_sources(self, x: Tensor) -> dict[int | None, SizeSource]:
        """Return for each axis whose length is a number of channels what it counts."""
        if x in self.shadows:
            layers = [(varying_axes(ids), ids) for ids in self.layers(x)]
            return {axes[0]: SizeSource(line(ids, axes[0])) for axes, ids in layers if len(axes) == 1}
        if not self.is_parametric(x):
            return {}
        slots = {axis: self.slots_along(x, axis) for axis in range(x.dim())}
        return {axis: SizeSource(found) for axis, found in slots.items() if found is not None}

    def note_attention(self, call: Call) -> None:
        """Fused attention scales by the head width unless told otherwise; torch's layer fixes all widths."""
        if call.name == "multi_head_attention_forward":
            with _disable_current_modes():
                for x in tree_leaves((call.args, call.kwargs)):
                    if isinstance(x, Tensor):
                        self.freeze(self.distinct_ids(x), f"a width fixed by {call.name}")
        if call.name == ATTENTION:
            named = [call.kwargs[key] for key in ("query", "key", "value", "attn_mask") if key in call.kwargs]
            operands = [x for x in (*call.args, *named) if isinstance(x, Tensor)]
            with _disable_current_modes():
                own_scale = call.kwargs.get("scale") is not None
                self.scales.note_attention(self, operands, own_scale=own_scale)


def _chooses(op: Op) -> bool:
    """Whether an operation makes truths or whole numbers of activations: a threshold, an order."""
    return (
        op.name not in rules.POOLINGS  # where a window's largest value lies says nothing else
        and not all(x.is_floating_point() for x in op.outputs)
        and any(x.is_floating_point() for x in op.inputs)
    )


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield an operation's tensors in order: its arguments hold no containers but lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Calls(TorchFunctionMode):
    """Tells the tracer which outermost torch function runs, and counts them."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tracer, kwargs = self._tracer, kwargs or {}
        name = function_name(func)
        tracer.call = Call(len(tracer.calls), name, args, kwargs)
        tracer.calls.append(name)
        tracer.note_attention(tracer.call)
        if name in PYTHON_COPIES and isinstance(args[0], Tensor) and args[0] in tracer.shadows:
            tracer.ends.decide(_data_dependent(tracer.module))
        try:
            return tracer.tag_sizes(name, args, func(*args, **kwargs))
        finally:
            tracer.call = None


def function_name(func: Any) -> str:
    """Return the name under which a torch function's sites are known."""
    return str(getattr(func, "__name__", func))


def _line_that_runs() -> tuple[Path, int]:
    """Return the file and the line of the network's code."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return Path(frame.f_code.co_filename), frame.f_lineno


def _data_dependent(module: str) -> InputError:
    """Name the line of the forward that turns activations into a Python value."""
    file, number = _line_that_runs()
    text = linecache.getline(str(file), number).strip()
    return InputError(
        f"the forward of '{module or 'the network'}' turns activations into a Python value:"
        f" {file.name}, line {number}: {text}",
        remedy="Coupling can't be traced through a decision on data; take it out of forward,"
        " or prune the part of the network before it.",
    )


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Evaluate the net; beside its modes, its buffers and the random state come back as they were."""
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in net.buffers()]
    with evaluating(net), kept_random_state({p.device for p in net.parameters()}):
        try:
            yield
        finally:
            for buffer, version, saved in buffers:
                if buffer._version != version or not torch.equal(
                    buffer, saved
                ):  # batch norm counts no version
                    buffer.copy_(saved)


@contextmanager
def _module_paths(net: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep the dotted paths of the modules that run in a list."""
    paths = {module: path for path, module in net.named_modules()}

    def enter(module: nn.Module, _args: Any) -> None:
        if module in paths:
            running.append(paths[module])

    def leave(module: nn.Module, _args: Any, _output: Any) -> None:
        if module in paths:
            running.pop()

    # Two hooks for every module there is: two on each of the net's would take as long as its forward.
    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def one_image(inputs: Inputs, index: int = 0) -> tuple[Tensor, ...]:
    """Return the forward's arguments for one image of a batch, as copies."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(x[index : index + 1].detach().clone() for x in tensors)


def traceable(net: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return net and inputs; copies on the CPU where their device runs operations of its own."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not any(x.device.type in OWN_OPERATIONS for x in tensors):
        return net, inputs
    moved = tuple(x.cpu() for x in tensors)
    return copy.deepcopy(net).cpu(), moved if isinstance(inputs, tuple) else moved[0]


def run_forward(tracer: Tracer, net: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    """Return what one traced forward gives; InputError where it fails or decides on data."""
    for x in arguments:
        tracer.write(x, no_ids(x.shape))
    with _module_paths(net, tracer.modules), tagged_attributes(net, tracer.note_number):
        try:
            with _Calls(tracer), tracer:
                return net(*arguments)
        except InputError:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in arguments)
            raise InputError(
                f"the network's forward failed on an input of shape {shapes}:"
                f" {type(error).__name__}: {error}",
                remedy="Check the input size and the number of inputs that the network expects.",
            ) from error


__all__ = [
    "Inputs",
    "Operation",
    "Product",
    "Tracer",
    "function_name",
    "one_image",
    "run_forward",
    "traceable",
    "undisturbed",
]
