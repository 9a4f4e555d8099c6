"""Tap the gates and the readers of a running net: read what passes there, or put something in its place.

A site is the ordinal of a torch function call within a forward (types.CallSite), so it is found in a
hand-written `forward` as well as in modules, and needs no hook on a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sepress.coupling import Coupling
from sepress.coupling.trace import function_name
from sepress.errors import InputError, SepressError
from sepress.types import CallSite, Gate, Reader, Removed

OnGate = Callable[[Gate, Tensor], "Tensor | None"]
OnProduct = Callable[[Gate, Tensor, Tensor], None]
OnRead = Callable[[Reader, Tensor], "Tensor | None"]
OnCall = Callable[[Reader, "ReaderCall"], None]
_Handler = Callable[[Tensor], "Tensor | None"]

_IDLE = -(1 << 60)  # the counter outside of a forward: no site is ever met


@dataclass(frozen=True)
class ReaderCall:
    """The call of a conv or linear layer that was just made: what it read, how, and what came of it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    x: Tensor  # the activation read
    result: Tensor


class Taps(TorchFunctionMode):
    """While the context lasts, every forward of `net` calls back at its gates and readers.

    `on_gate(gate, s)` gets the excitation as it is multiplied, after its squash (a shift's as it is added),
    with an axis of branches or of positions where the gate has values for each; `on_read(reader, x)` the
    activation that a conv or linear layer is about to read. What they return replaces the operand; None
    leaves it. `on_product(gate, s, x)` looks at the excitation and the map that are about to be multiplied,
    `on_call(reader, call)` at a layer's call once it is made. `net` must be in the mode
    that was traced (eval). Callbacks run outside of the mode: their own torch calls are neither counted nor
    tapped. Raises SepressError where a forward is not the traced one.
    """

    def __init__(
        self,
        net: nn.Module,
        coupling: Coupling,
        *,
        on_gate: OnGate | None = None,
        on_product: OnProduct | None = None,
        on_read: OnRead | None = None,
        on_call: OnCall | None = None,
    ) -> None:
        super().__init__()
        self._net = net
        self._calls = coupling.calls
        self._goes_on = coupling.ending is not None  # with post-processing, whose calls depend on the image
        self._index = _IDLE
        self._handlers: dict[int, list[tuple[CallSite, _Handler]]] = {}
        if on_gate is not None:
            for gate in coupling.gates:
                self._handlers.setdefault(gate.site.index, []).append((gate.site, partial(on_gate, gate)))
        if on_read is not None:
            for reader in coupling.readers:
                self._handlers.setdefault(reader.site.index, []).append(
                    (reader.site, partial(_image_by_image, on_read, reader))
                )
        self._products: dict[int, list[tuple[Gate, OnProduct]]] = {}
        if on_product is not None:
            for gate in coupling.gates:
                self._products.setdefault(gate.site.index, []).append((gate, on_product))
        self._watchers: dict[int, list[tuple[Reader, OnCall]]] = {}
        if on_call is not None:
            for reader in coupling.readers:
                self._watchers.setdefault(reader.site.index, []).append((reader, on_call))

    def __enter__(self) -> Taps:
        # Ours is the first hook: the calls of a user's own hooks were counted when the net was traced.
        self._hooks = (
            self._net.register_forward_pre_hook(self._start, prepend=True),
            self._net.register_forward_hook(self._stop, always_call=True),
        )
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        index = self._index
        self._index = index + 1
        for gate, look in self._products.get(index, ()):
            look(gate, *_factors(gate, func, args, kwargs))
        if index in self._handlers:
            args, kwargs = self._visit(index, func, args, kwargs or {})
        result = func(*args, **kwargs) if kwargs else func(*args)
        for reader, watch in self._watchers.get(index, ()):
            x = _operand(reader.site, func, args, kwargs)
            images = _unfolded(reader, x)
            given = result.reshape(len(images), -1, *result.shape[2:]) if images is not x else result
            watch(reader, ReaderCall(func, args, kwargs or {}, images, given))
        return result

    def _visit(
        self, index: int, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Run the handlers of one call; return its arguments, with what they put in place."""
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        replaced = False
        for site, handler in self._handlers[index]:
            _check_call(site, func, len(tensors))
            place = tensors[site.operand]
            operand = handler(leaves[place])
            if operand is not None:
                leaves[place], replaced = operand, True
        if replaced:
            args, kwargs = tree_unflatten(leaves, spec)
        return args, kwargs

    def _start(self, *_: Any) -> None:
        self._index = 0

    def _stop(self, module: nn.Module, args: Any, output: Any) -> None:
        count, self._index = self._index, _IDLE
        other = count < len(self._calls) if self._goes_on else count != len(self._calls)
        if output is not None and other:  # None: the forward raised
            raise _other_path(f"{count} torch calls, not {len(self._calls)}")


@contextmanager
def masking(net: nn.Module, coupling: Coupling, removed: Removed) -> Iterator[None]:
    """Zero the removed units wherever they are read, in every forward of `net` inside the context.

    The parameters stay as they are. Gates need no mask of their own: what they multiply is zeroed before
    anything reads it. Raises InputError for an unknown group.
    """
    number = {group.name: i for i, group in enumerate(coupling.groups)}
    gone = {number[coupling.group(name).name]: units for name, units in removed.items()}
    masks: dict[int, Tensor] = {}
    for reader in coupling.readers:
        masked = np.zeros(len(reader.unit), dtype=bool)
        for group, units in gone.items():
            masked |= (reader.group == group) & np.isin(reader.unit, units)
        if masked.any():
            masks[id(reader)] = torch.from_numpy(~masked)

    def mask(reader: Reader, x: Tensor) -> Tensor | None:
        keep = masks.get(id(reader))
        return None if keep is None else x * spread(keep.to(x), x, reader.site.axis)

    with Taps(net, coupling, on_read=mask):
        yield


def spread(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """View (C,) or (N, C) values so that they multiply `like`, whose channels lie on `axis`."""
    shape = [1] * like.dim()
    shape[axis] = like.shape[axis]
    if values.dim() == 2:
        shape[0] = like.shape[0]
    return values.view(shape)


def mean_per_channel(x: Tensor, axis: int, images: int) -> Tensor:
    """Average over all but image and channel axis: (N, ...) -> (N, C). InputError as in `rows_per_image`."""
    rows = rows_per_image(x, axis, images)
    x = x.movedim(axis, 1)
    return x.reshape(images, rows, x.shape[1], -1).mean((1, 3))


def rows_per_image(x: Tensor, axis: int, images: int) -> int:
    """How many rows of the first axis belong to each image, one by one (windows and patches fold into it).

    Raises InputError where the first axis can't be images.
    """
    rows, rest = divmod(x.shape[0], images)
    if axis == 0 or rest:
        raise InputError(
            f"a tensor {tuple(x.shape)}, channels on axis {axis}, does not keep {images} images apart",
            remedy="The forward must keep images on the first axis up to each gate and, for the criteria "
            "fisher and gate-taylor, up to each layer that reads a channel.",
        )
    return rows


def _unfolded(reader: Reader, x: Tensor) -> Tensor:
    """What a reader reads, images apart: (1, N P, ...), as a mixed weight needs it, to (N, P, ...)."""
    channels = len(reader.unit)
    return x.reshape(-1, channels, *x.shape[2:]) if reader.mixed and x.shape[1] != channels else x


def _image_by_image(on_read: OnRead, reader: Reader, x: Tensor) -> Tensor | None:
    seen = on_read(reader, _unfolded(reader, x))
    return None if seen is None else seen.reshape(x.shape)


def _operand(site: CallSite, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Tensor:
    return _tensors(site, func, args, kwargs)[site.operand]


def _factors(gate: Gate, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    """The excitation and the map beside it in the call that multiplies them."""
    tensors = _tensors(gate.site, func, args, kwargs)
    s = tensors.pop(gate.site.operand)
    if len(tensors) != 1:
        raise InputError(
            f"gate '{gate.name}' multiplies in a call of {len(tensors) + 1} tensors ({gate.site.function})",
            remedy="Expected the excitation and the map alone.",
        )
    return [s, tensors[0]]


def _tensors(site: CallSite, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    _check_call(site, func, len(tensors))
    return tensors


def _check_call(site: CallSite, func: Callable[..., Any], tensors: int) -> None:
    if function_name(func) != site.function or site.operand >= tensors:
        raise _other_path(f"call {site.index} is {function_name(func)}, not {site.function} ({site.module})")


def _other_path(what: str) -> SepressError:
    return SepressError(
        f"the forward took another path than the traced one: {what}",
        remedy="Keep eval mode and the input size as traced; control flow must not depend on the data."
        " Where the forward goes through its images one by one, pass batch_size=1.",
    )
