"""Masked = removed: the old net, its removed channels zero where they are read, gives the new net's outputs.

Both nets run image by image, operation by operation as traced. The masked run zeroes activations
(never parameters) where ids are read and end. Statistics over channels (layer and group norm, weight
standardisation, means over channels) change with removal by design: the masked run computes on with
the pruned net's. Rounding can also flip what is chosen by value (an order, a threshold), so there the masked
run goes on with what the pruned net chose. float64 decides between rounding and error. Where post-processing
follows the last layer, the raw outputs that it reads are compared, and it runs on unwatched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sepress.coupling.groups import Coupling
from sepress.coupling.slots import names
from sepress.coupling.tags import unchanged_attributes
from sepress.coupling.trace import LAYOUT_OPS, Inputs, Operation, one_image, traceable, undisturbed
from sepress.outputs import tensors_in
from sepress.types import Check, Removed

TOLERANCE = 1e-4  # of the outputs' spread; rounding of float32 stays well below
VACUOUS_SPREAD = 1e-5  # of the outputs' magnitude: less is constant output
LOCKSTEP_TOLERANCE = 1e-6  # of an operation's output, in float64
NORMS = names(
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit _weight_norm_interface"
)


def check_removal(
    base: nn.Module, pruned: nn.Module, coupling: Coupling, removed: Removed, images: Inputs
) -> tuple[Check, dict[str, str]]:
    """Return the check's outcome, and on failure the groups that the first wrong operation touches, with why.

    `images` is a batch on the nets' device. The error is max|a - b| over images and outputs, divided
    by the spread max|a - mean over images of a|.
    """
    (base, images), (pruned, _) = traceable(base, images), traceable(pruned, images)
    replay = _Replay(coupling, coupling.gone(removed))
    with undisturbed(base), undisturbed(pruned):
        try:
            check = _outcome(replay.compare(base, pruned, images))
            if check.passed is False:
                check = _in_float64(replay, base, pruned, images) or check
        except _Diverged as diverged:
            check = Check(False, None, diverged.what)
            return check, replay.groups_at(diverged.index, removed, diverged.what)
        if check.passed is not False:
            return check, {}
        index, what = replay.first_difference(base, pruned, one_image(images))
    return check, replay.groups_at(index, removed, what)


@dataclass(frozen=True)
class _Figures:
    """Differences over all images and outputs: masked a, removed b."""

    error: float  # max |a - b|
    spread: float  # max |a - mean over images of a|; of one image, over its elements
    magnitude: float  # max |a|
    hidden: float  # worst relative difference of what statistics were taken over, or choices made by


class _Diverged(Exception):
    """The two runs stopped being comparable at an operation."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(what)
        self.index, self.what = index, what


def _outcome(figures: _Figures) -> Check:
    if not np.isfinite([figures.error, figures.magnitude]).all():
        return Check(False, None, "outputs are not finite")
    if figures.spread <= VACUOUS_SPREAD * figures.magnitude:
        if figures.error > TOLERANCE * figures.magnitude:
            return Check(
                False, figures.error / figures.magnitude, "outputs differ, and hardly depend on the image"
            )
        return Check(None, None, "outputs are the same for every image, so that nothing was compared")
    relative = max(figures.error / figures.spread, figures.hidden)
    return Check(relative <= TOLERANCE, relative)


def _in_float64(replay: _Replay, base: nn.Module, pruned: nn.Module, images: Inputs) -> Check | None:
    """Repeat the comparison where rounding can't matter; None where the nets don't run in float64."""
    try:
        figures = replay.compare(_double(base), _double(pruned), _double_images(images))
    except (RuntimeError, TypeError, _Diverged):  # a forward that fixes its own dtype
        return None
    return _outcome(figures)


def _double(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


def _double_images(images: Inputs) -> Inputs:
    if isinstance(images, tuple):
        return tuple(x.double() if x.is_floating_point() else x for x in images)
    return images.double()


@dataclass
class _Replay:
    """Runs both nets in step with the traced operations."""

    coupling: Coupling
    gone: np.ndarray  # of every slot

    def compare(self, base: nn.Module, pruned: nn.Module, images: Inputs) -> _Figures:
        first = images[0] if isinstance(images, tuple) else images
        masked_outputs: list[list[Tensor]] = []
        error = hidden = 0.0
        for index in range(len(first)):
            arguments = one_image(images, index)
            record = _Record(self)
            removed_out = _run(pruned, arguments, record)
            masked = _Masked(self, record)
            masked_out = _run(base, arguments, masked)
            if [x.shape for x in masked_out] != [x.shape for x in removed_out]:
                raise _Diverged(len(self.coupling._operations) - 1, "the outputs' shape changed")
            error = max([error, *(_max(a - b) for a, b in zip(masked_out, removed_out, strict=True))])
            hidden = max(hidden, masked.worst_hidden)
            masked_outputs.append(masked_out)
        spread = magnitude = 0.0
        for leaves in zip(*masked_outputs, strict=True):
            alike = all(leaf.shape == leaves[0].shape for leaf in leaves)
            values = (
                torch.stack(leaves) if alike else torch.cat(leaves)
            )  # boxes: more in one image than another
            centre = values.mean(dim=0) if len(values) > 1 else values.mean()
            spread, magnitude = max(spread, _max(values - centre)), max(magnitude, _max(values))
        return _Figures(error, spread, magnitude, hidden)

    def first_difference(
        self, base: nn.Module, pruned: nn.Module, arguments: tuple[Tensor, ...]
    ) -> tuple[int, str]:
        """Return the first operation whose surviving outputs differ, in float64 where the nets allow it."""
        try:
            nets = (_double(base), _double(pruned))
            return self._lockstep(*nets, tuple(_double_images(arguments)))
        except (RuntimeError, TypeError):
            return self._lockstep(base, pruned, arguments)

    def _lockstep(self, base: nn.Module, pruned: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[int, str]:
        record = _Record(self, everything=True)
        try:
            _run(pruned, arguments, record)
            _run(base, arguments, _Masked(self, record, compare=True))
        except _Diverged as diverged:
            return diverged.index, diverged.what
        last = len(self.coupling._operations) - 1
        return last, "the outputs differ"

    def is_over(self, index: int) -> bool:
        """Whether only post-processing is left."""
        ending = self.coupling.ending
        return ending is not None and index >= ending.operations

    def heads(self, index: int, result: Any) -> list[Tensor]:
        """Return what post-processing reads of an operation's result, as it is now."""
        ending = self.coupling.ending
        if ending is None:
            return []
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        return [tensors[position].clone() for number, position in ending.heads if number == index]

    def operation(self, index: int, name: str) -> Operation:
        operations = self.coupling._operations
        if index >= len(operations) or operations[index].name != name:
            raise _Diverged(min(index, len(operations) - 1), f"the forward takes another path at '{name}'")
        return operations[index]

    def mask(self, layers: Sequence[np.ndarray], like: Tensor) -> Tensor:
        """Return what is gone (bool), broadcastable to a tensor."""
        gone = torch.zeros((1,) * like.dim(), dtype=torch.bool)
        for ids in layers:
            marks = np.asarray(self.gone[ids])
            if marks.any():  # else its shape may be another image's: as many boxes as were chosen there
                gone = gone | torch.from_numpy(marks)
        return gone.to(like.device)

    def rescaled(self, layers: Sequence[np.ndarray]) -> bool:
        """Whether ids are of channels that surgery multiplied, so that the two nets' values differ."""
        widths = [f.width for f in self.coupling._factors if self.gone[f.width].any()]
        units = self.coupling._unit_of_slot[np.concatenate([np.zeros(0, np.int64), *widths])]
        return any(np.isin(self.coupling._unit_of_slot[ids], units).any() for ids in layers)

    def touches_removed(self, layers: Sequence[tuple[np.ndarray, ...] | None]) -> bool:
        return any(self.gone[ids].any() for part in layers if part is not None for ids in part)

    def groups_at(self, index: int, removed: Removed, what: str) -> dict[str, str]:
        """Return the groups with removed units at an operation, or else at the nearest ones."""
        operations = self.coupling._operations
        group_names = [group.name for group in self.coupling.groups for _ in range(group.units)]
        for reach in range(len(operations)):
            touched: dict[str, str] = {}
            for at in {max(0, index - reach), min(len(operations) - 1, index + reach)}:
                op = operations[at]
                place = f"{op.name} in '{op.module}'" if op.module else op.name
                every = [ids for _, ids in op.reads] + [ids for part in op.outputs if part for ids in part]
                for ids in every:
                    units = self.coupling._unit_of_slot[ids[self.gone[ids]]]
                    for unit in np.unique(units).tolist():
                        touched.setdefault(
                            group_names[unit], f"masked and removed channels disagree at {place}: {what}"
                        )
            if touched:
                return touched
        return {
            name: f"masked and removed channels disagree: {what}" for name, units in removed.items() if units
        }


def _run(net: nn.Module, arguments: tuple[Tensor, ...], mode: _Record | _Masked) -> list[Tensor]:
    """Return the output tensors of one image, or what post-processing reads, in float64 on the CPU."""
    with unchanged_attributes(net), _same_path(), mode:
        try:
            outputs = net(*arguments)
        except _Diverged:
            raise
        except Exception as error:
            first_line = str(error).split("\n")[0]
            raise _Diverged(mode.index, f"the forward fails: {first_line}") from error
    compared = mode.heads or tensors_in(outputs)
    return [x.detach().cpu().to(torch.float64) for x in compared]


@contextmanager
def _same_path() -> Iterator[None]:
    """Torch's fused fast paths are off while a function mode is on, as in the trace."""
    with BaseTorchFunctionMode():
        yield


def _max(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the pruned net and keeps what the masked run needs: statistics, or every output."""

    def __init__(self, replay: _Replay, *, everything: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = 0
        self.heads: list[Tensor] = []
        self.outputs: dict[int, list[Tensor]] = {}
        self.inputs: dict[int, list[Tensor]] = {}
        self._replay, self._everything = replay, everything

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in LAYOUT_OPS or self._replay.is_over(self.index):
            return func(*args, **(kwargs or {}))
        operation = self._replay.operation(self.index, func.overloadpacket.__name__)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        hides = operation.statistics or operation.chooses
        if hides:
            self.inputs[self.index] = [x.clone() for x in inputs]
        result = func(*args, **(kwargs or {}))
        if hides or self._everything:
            tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.outputs[self.index] = [x.clone() for x in tensors]
        self.heads += self._replay.heads(self.index, result)
        self.index += 1
        return result


class _Masked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the base net with removed channels zero where they are read."""

    def __init__(self, replay: _Replay, record: _Record, *, compare: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = 0
        self.heads: list[Tensor] = []
        self.worst_hidden = 0.0
        self._replay, self._record, self._compare = replay, record, compare

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in LAYOUT_OPS or self._replay.is_over(self.index):
            return func(*args, **(kwargs or {}))
        operation = self._replay.operation(self.index, func.overloadpacket.__name__)
        args, kwargs = self._zeroed(operation, args, kwargs or {})
        result = func(*args, **kwargs)
        if operation.statistics and self._replay.touches_removed(operation.inputs):
            result = self._with_statistics(operation, result, args)
        elif operation.chooses:
            result = self._with_choices(operation, result, args)
        if self._compare:
            self._compare_outputs(operation, result)
        self.heads += self._replay.heads(self.index, result)
        self.index += 1
        return result

    def _zeroed(self, operation: Operation, args: Any, kwargs: Any) -> tuple[Any, Any]:
        masks: dict[int, list[np.ndarray]] = {}
        for at, ids in operation.reads:
            if self._replay.gone[ids].any():
                masks.setdefault(at, []).append(ids)
        if not masks:
            return args, kwargs
        leaves, structure = tree_flatten((args, kwargs))
        position = 0
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if position in masks:
                    leaves[at] = leaf.masked_fill(self._replay.mask(masks[position], leaf), 0)
                position += 1
        zeroed: tuple[Any, Any] = tree_unflatten(leaves, structure)
        return zeroed

    def _with_statistics(self, operation: Operation, result: Any, args: Any) -> Any:
        """Return an operation's result with the statistics that the pruned net took."""
        leaves, structure = tree_flatten(result)
        recorded = self._record.outputs[self.index]
        for at in range(len(leaves)):
            if at > 0 or operation.name not in NORMS:
                leaves[at] = self._substituted(operation.outputs[at], leaves[at], recorded[at])
        if operation.name in NORMS:
            leaves[0].copy_(_normalised(operation.name, args, *leaves[1:]))  # in the layout it had
        else:
            self._compare_inputs(operation, args)
        return tree_unflatten(leaves, structure)

    def _with_choices(self, operation: Operation, result: Any, args: Any) -> Any:
        """Return an operation's result with the truths and whole numbers that the pruned net came to."""
        self._compare_inputs(operation, args)
        leaves, structure = tree_flatten(result)
        recorded = self._record.outputs[self.index]
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and not leaf.is_floating_point():
                leaves[at] = self._substituted(operation.outputs[at], leaf, recorded[at])
        return tree_unflatten(leaves, structure)

    def _substituted(self, layers: tuple[np.ndarray, ...] | None, own: Tensor, other: Tensor) -> Tensor:
        if not self._replay.touches_removed((layers,)):
            return other.clone()
        kept = ~self._replay.mask(layers or (), own).expand(own.shape)
        if int(kept.sum()) != other.numel():
            raise _Diverged(self.index, "statistics of another shape")
        result = own.clone()
        result[kept] = other.flatten()
        return result

    def _compare_inputs(self, operation: Operation, args: Any) -> None:
        """A statistic hides what it was taken over, and a choice what it was made by: that is compared."""
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        for layers, own, other in zip(
            operation.inputs, inputs, self._record.inputs[self.index], strict=False
        ):
            self.worst_hidden = max(self.worst_hidden, self._difference(layers, own, other))

    def _difference(self, layers: tuple[np.ndarray, ...] | None, own: Tensor, other: Tensor) -> float:
        """Return the largest difference of what survives, relative to the largest value."""
        kept = ~self._replay.mask(layers or (), own).expand(own.shape)
        surviving = own[kept].cpu().double()
        if surviving.numel() != other.numel():
            return float("inf")
        other = other.flatten().cpu().double()
        gap = (surviving - other).masked_fill(surviving == other, 0)  # equal infinities among them
        return _max(gap) / max(_max(surviving[surviving.isfinite()]), 1e-30)

    def _compare_outputs(self, operation: Operation, result: Any) -> None:
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        recorded = self._record.outputs[self.index]
        for layers, own, other in zip(operation.outputs, tensors, recorded, strict=False):
            known = layers is not None and own.is_floating_point() and not self._replay.rescaled(layers)
            if known and self._difference(layers, own, other) > LOCKSTEP_TOLERANCE:
                raise _Diverged(self.index, "its result differs")


def _normalised(name: str, args: Any, *statistics: Tensor) -> Tensor:
    """Normalise by given statistics: (x - mean) * scale, gain and bias; or v / norm * g of a weight norm."""
    x: Tensor = args[0]
    if name == "_weight_norm_interface":
        gain: Tensor = args[1]
        return x * (gain / statistics[0])
    mean, scale = statistics[:2]
    if name == "native_group_norm":
        weight, bias, groups = args[1], args[2], args[6]
        blocks = x.reshape(x.size(0), groups, -1)
        result = ((blocks - mean[..., None]) * scale[..., None]).reshape(x.shape)
        shape = (1, -1, *[1] * (x.dim() - 2))
    elif name == "native_layer_norm":
        weight, bias, shape = args[2], args[3], tuple(args[1])
        result = (x - mean) * scale
    else:
        weight, bias = args[1], args[2]
        shape = (1, -1, *[1] * (x.dim() - 2))
        result = (x - mean.view(shape)) * scale.view(shape)
    result = result if weight is None else result * weight.reshape(shape)
    result = result if bias is None else result + bias.reshape(shape)
    return result.to(x.dtype)
