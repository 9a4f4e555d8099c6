"""Calibration images -> ExcitationStats: what gates and channels did, as sums, one forward a batch.

Only sums are kept, so the memory does not depend on the number of images, and the statistics of two sets of
images, or of two processes, add up to those of their union.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sepress import console
from sepress.coupling import Coupling
from sepress.errors import InputError
from sepress.gates import ReaderCall, Taps, mean_per_channel, rows_per_image, spread
from sepress.modes import kept_modes
from sepress.moments import Moments, as_read, from_sums, moment_sums, output_square
from sepress.outputs import tensors_in
from sepress.types import Gate, Reader

EVIDENCE = (
    "excitation",
    "class-excitation",
    "contribution",
    "fisher",
    "gate-taylor",
    "taylor",
    "hessian",
    "moments",
    "sensitivity",
)
NEEDS_LABELS = frozenset({"class-excitation", "fisher", "gate-taylor", "taylor", "hessian", "sensitivity"})
_GRADIENTS = NEEDS_LABELS - {"class-excitation", "hessian"}  # of a batch at once
_BULKY = frozenset({"moments", "sensitivity"})
SATURATED = 0.05  # a gate within this of 0 or 1 counts as saturated

# What the sums are called, and their shapes. C: channels of the gate; K: classes; P: positions that a reader
# reads; U: units of the group.
#   gate/NAME/sum, /square, /saturated      (C,)    of the excitation s, its square, and |s - 1/2| > 0.45
#   gate/NAME/class_sum                     (K, C)  of s, by label; with class-excitation
#   class_count                             (K,)    images, by label
#   reader/KEY/sum, /square                 (P,)    of the spatial means of x and of x^2
#   group/NAME/fisher, /gate-taylor         (U,)    of (dL/du)^2 and |dL/du|, u a factor on every reading of
#                                                   the unit
#   parameter/NAME/gradient, /square        (...)   of dL/dw and (dL/dw)^2
#   moments/KEY/rows, /sum, /square                 of what a layer multiplies its weight with; see `moments`
#   sensitivity/KEY                        (B, O, O) of dL/dy dL/dy^T, y what a layer gives at a place


@dataclass(frozen=True)
class ExcitationStats:
    """Sums over calibration images; `a + b` is what `calibrate` gives for the images of both.

    `sums` are float64 tensors on the CPU, by the names above; `evidence` says which were collected.
    """

    images: int
    sums: Mapping[str, Tensor]
    evidence: frozenset[str]
    data_id: str = ""

    def __add__(self, other: ExcitationStats) -> ExcitationStats:
        if self.sums.keys() != other.sums.keys() or self.evidence != other.evidence:
            raise InputError(
                "statistics of different nets or of different evidence can't be added",
                remedy="Calibrate both parts with the same net, criterion and classes.",
            )
        ids = dict.fromkeys((self.data_id, other.data_id))
        return ExcitationStats(
            images=self.images + other.images,
            sums={name: value + other.sums[name] for name, value in self.sums.items()},
            evidence=self.evidence,
            data_id="+".join(filter(None, ids)),
        )

    def mean_excitation(self, gate: Gate) -> Tensor:
        """The plain mean of the gate over images, (C,)."""
        return self._mean(f"gate/{gate.name}/sum", gate.channels)

    def excitation_variance(self, gate: Gate) -> Tensor:
        """The variance of the gate over images, (C,), biased."""
        square = self._mean(f"gate/{gate.name}/square", gate.channels)
        return (square - self.mean_excitation(gate).square()).clamp(min=0)

    def saturation(self, gate: Gate) -> Tensor:
        """The fraction of images on which the gate is within 0.05 of 0 or 1, or beyond, (C,)."""
        return self._mean(f"gate/{gate.name}/saturated", gate.channels)

    def class_mean_excitation(self, gate: Gate) -> Tensor:
        """The mean of the gate over the images of each class, (K, C); NaN for a class without images."""
        total = self._sum(f"gate/{gate.name}/class_sum", gate.channels, axis=1)
        return total / self.sums["class_count"][:, None]

    def mean_square(self, reader: Reader) -> Tensor:
        """The mean square of what is read at each position of the reader's axis, (P,)."""
        return self._mean(f"reader/{reader_key(reader)}/square", len(reader.unit))

    def variance(self, reader: Reader) -> Tensor:
        """The variance over images and places of what each position of the axis reads, (P,), biased."""
        mean = self._mean(f"reader/{reader_key(reader)}/sum", len(reader.unit))
        return (self.mean_square(reader) - mean.square()).clamp(min=0)

    def fisher(self, group: str, units: int) -> Tensor:
        """The mean square of dL/du of each unit, (U,); see `criteria` for u."""
        return self._mean(f"group/{group}/fisher", units)

    def moments(self, reader: Reader) -> Moments | None:
        """The mean and covariance of the rows that a layer reads; None where they were not collected."""
        return from_sums(self.sums, reader_key(reader))

    def sensitivity(self, reader: Reader) -> Tensor | None:
        """E[sum over places of dL/dy dL/dy^T] of what a layer gives, (B, O, O); None where not collected."""
        value = self.sums.get(f"sensitivity/{reader_key(reader)}")
        return None if value is None else value / self.images

    def gate_taylor(self, group: str, units: int) -> Tensor:
        """The mean of |dL/du| of each unit, (U,); see `criteria` for u."""
        return self._mean(f"group/{group}/gate-taylor", units)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of the mean loss at the parameters that belong to a group, by name."""
        return self._by_parameter("gradient")

    def squared_gradients(self) -> dict[str, Tensor]:
        """The mean of each image's squared gradient at the parameters that belong to a group, by name."""
        return self._by_parameter("square")

    def _by_parameter(self, what: str) -> dict[str, Tensor]:
        prefix, suffix = "parameter/", f"/{what}"
        return {
            name.removeprefix(prefix).removesuffix(suffix): value / self.images
            for name, value in self.sums.items()
            if name.startswith(prefix) and name.endswith(suffix)
        }

    def _mean(self, name: str, size: int) -> Tensor:
        return self._sum(name, size) / self.images

    def _sum(self, name: str, size: int, axis: int = 0) -> Tensor:
        value = self.sums.get(name)
        if value is None or value.shape[axis] != size:
            raise InputError(
                f"the statistics hold no '{name}' of {size} channels: they are of another net",
                remedy="Calibrate this net again.",
            )
        return value

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata that `safetensors.torch.save_file` takes.

        Moments and sensitivity stay out: they are as large as the layers are wide, squared.
        """
        metadata = {
            "schema": "sepress.excitation/1",
            "images": str(self.images),
            "evidence": " ".join(sorted(self.evidence - _BULKY)),
            "data_id": self.data_id,
        }
        kept = {name: v for name, v in self.sums.items() if name.split("/")[0] not in _BULKY}
        return {name: value.contiguous() for name, value in kept.items()}, metadata

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ExcitationStats:
        """The inverse of `to_tensors`."""
        if metadata.get("schema") != "sepress.excitation/1":
            raise InputError(
                "these tensors are no excitation statistics", remedy="Pass a file that a rank stage wrote."
            )
        return ExcitationStats(
            images=int(metadata["images"]),
            sums=dict(tensors),
            evidence=frozenset(metadata["evidence"].split()),
            data_id=metadata["data_id"],
        )


def reader_key(reader: Reader) -> str:
    """What names a reader among the sums: a weight used twice is two readers."""
    return f"{reader.parameter}@{reader.site.index}.{reader.site.operand}"


def judged_positions(coupling: Coupling) -> dict[str, np.ndarray]:
    """Where the units of prunable groups count: reader key -> (P,) group index at each position, or -1.

    What is read after a global pooling (an SE squeeze) only steers gates, so such readers count for the
    groups alone that nothing else reads (the hidden channels of an SE block). Readers without any such
    position are left out.
    """
    prunable = {group.name for group in coupling.prunable()}
    open_groups = np.array(
        [i for i, group in enumerate(coupling.groups) if group.name in prunable], dtype=int
    )
    read = [r.group for r in coupling.readers if not r.pooled]
    directly = np.unique(np.concatenate(read)) if read else np.zeros(0, dtype=int)
    judged = {}
    for reader in coupling.readers:
        counts = np.isin(reader.group, open_groups) & (reader.unit >= 0)
        if reader.pooled:
            counts &= ~np.isin(reader.group, directly)
        if counts.any():
            judged[reader_key(reader)] = np.where(counts, reader.group, -1)
    return judged


def calibrate(
    net: nn.Module,
    coupling: Coupling,
    batches: Iterable[Any],
    *,
    evidence: frozenset[str],
    device: torch.device | str,
    data_id: str = "",
    rank: int = 0,
    world_size: int = 1,
) -> ExcitationStats:
    """Run the images through `net` (on `device`, in eval mode) and return the sums that `evidence` names.

    A batch is inputs, or (inputs, targets) with targets (N,) of integers, -1 for none. 'excitation' gives the
    gates' moments, 'class-excitation' their means by label as well, the classes being the net's logits;
    'contribution' the variance that every layer reads; 'moments' the mean and covariance of what every layer
    multiplies its weight with; 'fisher', 'gate-taylor', 'taylor' and 'sensitivity' (of the loss to what a
    layer gives) take one backward a batch, 'hessian' a forward and a backward an image. These five and
    'class-excitation' need targets. With a `world_size`, every process takes each world_size-th batch from
    `rank` on, and the results add up. The net's mode, requires_grad and .grad are left as they were. Raises
    InputError for no images, missing targets and figures that are not finite.
    """
    if unknown := evidence - set(EVIDENCE):
        raise InputError(f"unknown evidence {sorted(unknown)}", remedy=f"Known: {', '.join(EVIDENCE)}.")
    collector = _Collector(net, coupling, evidence)
    images = 0
    with _measuring(net, trained=collector.parameters):
        weights = {name: w for name, w in _parameters(net).items() if name in collector.parameters}
        for i, batch in enumerate(console.track(batches, "calibrating")):
            if i % world_size != rank:
                continue
            inputs, targets = split_batch(batch)
            inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)
            images += collector.run(net, inputs, targets, weights, number=i)
    if images == 0:
        raise InputError(
            "no calibration image was given",
            remedy="Pass at least one batch of images; 256 to 1,024 are usual.",
        )
    for name, value in collector.sums.items():
        if not value.isfinite().all():
            raise InputError(
                f"'{name}' is not finite: the net gives NaN or infinity there on the calibration images",
                remedy="Check the model's weights and the preprocessing.",
            )
    return ExcitationStats(images, collector.sums, evidence, data_id)


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return a batch's inputs and its targets (N,), None where it has none: what a batch may be, everywhere.

    A pair is (inputs, targets) where its second is None or a row of integers. Any other tuple or list is
    what a net of several inputs is called with, and is returned as a tuple; a single one stands for itself.
    """
    if not isinstance(batch, tuple | list):
        return batch, None
    if len(batch) == 2 and (batch[1] is None or _is_targets(batch[1])):
        return batch[0], batch[1]
    return (batch[0] if len(batch) == 1 else tuple(batch)), None


def _is_targets(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 1 and not (x.is_floating_point() or x.is_complex())


class _Collector:
    """Runs batches and holds the sums; what a batch leaves on the device moves after its forward."""

    def __init__(self, net: nn.Module, coupling: Coupling, evidence: frozenset[str]) -> None:
        self._weights = _parameters(net)
        self.sums: dict[str, Tensor] = {}
        self._coupling, self._evidence = coupling, evidence
        self._judged = judged_positions(coupling)
        prunable = coupling.prunable()
        open_groups = [i for i, group in enumerate(coupling.groups) if group in prunable]
        self._refitted = {
            reader_key(r) for r in coupling.readers if np.isin(r.group, open_groups).any()
        }  # the layers that may lose an input, those of SE blocks included
        self.parameters = (
            frozenset(
                m.parameter for group in prunable for m in group.members if m.parameter in coupling.parameters
            )
            if evidence & {"taylor", "hessian"}
            else frozenset()
        )
        # All units of all groups stand in one row, and behind them one column that nothing removes.
        self._offsets = np.cumsum([0, *(group.units for group in coupling.groups)])
        self._columns: dict[str, Tensor] = {}
        self._pending: list[tuple[str, Tensor]] = []
        self._probe: Tensor | None = None
        self._classes: Tensor | None = None
        self._source: Tensor | None = None
        self._images = self._batch = 0

    def run(
        self,
        net: nn.Module,
        inputs: Any,
        targets: Tensor | None,
        weights: Mapping[str, Tensor],
        *,
        number: int,
    ) -> int:
        """Add one batch, `number` in the order of all of them, to the sums; return its number of images."""
        self._batch = number  # which places of it count for the moments
        first = tree_leaves(inputs)[0]
        self._images = first.shape[0]
        backward = bool(self._evidence & _GRADIENTS)
        self._source = None
        if "sensitivity" in self._evidence:  # gradients have to pass every layer on their way to somewhere
            self._source = torch.zeros((), device=first.device, requires_grad=True)
            with torch.enable_grad():
                inputs = tree_map(partial(_passing, self._source), inputs)
        probed = bool(self._evidence & {"fisher", "gate-taylor"})
        if probed:
            self._probe = first.new_ones((self._images, int(self._offsets[-1]) + 1), dtype=torch.float32)
            self._probe.requires_grad_()
        gates = bool(self._evidence & {"excitation", "class-excitation"})
        reads = probed or "contribution" in self._evidence
        taps = Taps(
            net,
            self._coupling,
            on_gate=self._on_gate if gates else None,
            on_read=self._on_read if reads else None,
            on_call=self._on_call if self._evidence & {"moments", "sensitivity"} else None,
        )
        self._classes = None
        with torch.set_grad_enabled(backward):
            with taps:
                output = _call(net, inputs)
            if self._evidence & NEEDS_LABELS:
                logits, targets = _labelled(output, targets)
                if "class-excitation" in self._evidence:
                    self._classes = F.one_hot(targets.cpu(), logits.shape[1]).double()  # (N, K)
                if backward:
                    self._backward(logits, targets, weights)
                if "hessian" in self._evidence:
                    self._image_by_image(net, inputs, targets, weights)
        self._probe = self._source = None
        self._flush()
        return self._images

    def _on_gate(self, gate: Gate, s: Tensor) -> None:
        if gate.silent_because is not None:
            return
        excitation = mean_per_channel(s.detach().float(), gate.site.axis, self._images)  # (N, C)
        self._pending.append((f"gate/{gate.name}", excitation))

    def _on_read(self, reader: Reader, x: Tensor) -> Tensor | None:
        key = reader_key(reader)
        if key not in self._judged:
            return None
        axis = reader.site.axis
        if "contribution" in self._evidence:
            others = [d for d in range(x.dim()) if d != axis]
            x32 = x.detach().float()
            mean = x32.mean(others, keepdim=True)
            scatter = (x32 - mean).square().mean(others)  # about the batch's mean: no cancellation in float32
            self._pending.append((f"reader/{key}", torch.stack([mean.flatten(), scatter])))  # (2, P)
        if self._probe is None:
            return None
        factor = self._probe[:, self._column(reader)].to(x.dtype)  # (N, P)
        return x * spread(factor.repeat_interleave(rows_per_image(x, axis, self._images), 0), x, axis)

    def _on_call(self, reader: Reader, call: ReaderCall) -> None:
        if reader_key(reader) not in self._refitted:
            return
        weight, key = as_read(self._weights[reader.parameter], reader), reader_key(reader)
        if "sensitivity" in self._evidence and call.result.requires_grad:
            on_gradient = partial(self._on_gradient, f"sensitivity/{key}", reader)
            call.result.register_hook(on_gradient)  # type: ignore[no-untyped-call]
        if "moments" in self._evidence:
            with torch.no_grad():
                sums = moment_sums(reader, call, weight, images=self._images, seed=self._batch)
            for name, value in sums.items():
                self._add(f"moments/{key}/{name}", value)

    def _on_gradient(self, name: str, reader: Reader, gradient: Tensor) -> None:
        self._add(name, output_square(gradient, reader))

    def _column(self, reader: Reader) -> Tensor:
        """The probe's column for each position that the reader reads, (P,)."""
        key = reader_key(reader)
        if key not in self._columns:
            group = self._judged[key]
            column = np.where(group >= 0, self._offsets[group] + reader.unit, self._offsets[-1])
            assert self._probe is not None
            self._columns[key] = torch.as_tensor(column, dtype=torch.int64, device=self._probe.device)
        return self._columns[key]

    def _backward(self, logits: Tensor, targets: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Add the gradients of the summed cross entropy; in eval mode no image bears on another's."""
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        probe = [] if self._probe is None else [self._probe]
        weights = weights if "taylor" in self._evidence else {}
        source = [] if self._source is None else [self._source]
        at = [*probe, *weights.values(), *source]
        gradients = torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)
        if probe:
            # (N, units of all groups): autograd has summed tied positions and readers, per image.
            g = gradients[0].cpu().double()
            for kind, total in (("fisher", g.square().sum(0)), ("gate-taylor", g.abs().sum(0))):
                if kind in self._evidence:
                    for group, start in zip(self._coupling.groups, self._offsets[:-1], strict=True):
                        self._add(f"group/{group.name}/{kind}", total[start : start + group.units])
        for name, gradient in zip(weights, gradients[len(probe) :], strict=not source):
            self._add(f"parameter/{name}/gradient", gradient)

    def _image_by_image(
        self, net: nn.Module, inputs: Any, targets: Tensor, weights: Mapping[str, Tensor]
    ) -> None:
        """Add the squares of every image's own gradient: a forward and a backward each."""
        squares = [torch.zeros_like(w) for w in weights.values()]
        for i in range(self._images):
            image = tree_map(lambda x, i=i: x[i : i + 1] if isinstance(x, Tensor) else x, inputs)
            with torch.enable_grad():
                logits, target = _labelled(_call(net, image), targets[i : i + 1])
                loss = F.cross_entropy(logits.float(), target)
            gradients = torch.autograd.grad(
                loss, list(weights.values()), allow_unused=True, materialize_grads=True
            )
            for total, gradient in zip(squares, gradients, strict=True):
                total += gradient.square()
        for name, total in zip(weights, squares, strict=True):
            self._add(f"parameter/{name}/square", total)

    def _flush(self) -> None:
        """Move what the forward left behind to the CPU and into the sums, in float64 (mps has none)."""
        for name, value in self._pending:
            if name.startswith("gate/"):
                self._add_excitation(name, value.cpu().double())
            else:
                mean, scatter = value.cpu().double()
                self._add(f"{name}/sum", self._images * mean)
                self._add(f"{name}/square", self._images * (scatter + mean.square()))
        self._pending.clear()
        if self._classes is not None:
            self._add("class_count", self._classes.sum(0))

    def _add_excitation(self, name: str, s: Tensor) -> None:
        self._add(f"{name}/sum", s.sum(0))
        self._add(f"{name}/square", s.square().sum(0))
        self._add(f"{name}/saturated", ((s < SATURATED) | (s > 1 - SATURATED)).sum(0))
        if self._classes is not None:
            self._add(f"{name}/class_sum", self._classes.T @ s)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu().double()
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value


def _parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    return dict(net.named_parameters(remove_duplicate=False))


def _call(net: nn.Module, inputs: Any) -> Any:
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def _passing(source: Tensor, x: Any) -> Any:
    """The same input, as one that gradients pass on the way to `source`, a zero; a net may write into it."""
    return x + source.to(x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _labelled(output: Any, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits (N, K) of a forward and the labels (N,) beside them, or an InputError."""
    logits = next(tensors_in(output), None)
    if targets is None or (targets < 0).any():
        raise InputError(
            "this criterion needs a label for every calibration image",
            remedy="Pass (inputs, targets) batches, or use the criterion contribution, which needs none.",
        )
    if logits is None or logits.dim() != 2 or int(targets.max()) >= logits.shape[1]:
        raise InputError(
            "the labels do not fit the net's output: expected logits (N, K) and labels under K",
            remedy="Use the criterion contribution, which needs no labels.",
        )
    return logits, targets.to(logits.device).long()


@contextmanager
def _measuring(net: nn.Module, *, trained: frozenset[str]) -> Iterator[None]:
    """Eval mode and gradients at the `trained` parameters alone; restored at the end."""
    flags = {p: p.requires_grad for p in net.parameters()}
    with kept_modes(net):
        try:
            net.eval()
            for p in flags:
                p.requires_grad_(False)
            for name, p in _parameters(net).items():
                if name in trained:
                    p.requires_grad_(True)
            yield
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)
