"""A net and a labelled split -> how often it is right, on which images, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress import console
from sepress.data import make_loader
from sepress.errors import InputError
from sepress.modes import evaluating
from sepress.outputs import tensors_in
from sepress.train.ranks import check_world, total

if TYPE_CHECKING:
    from sepress.data import DataSource, Loader


@dataclass(frozen=True)
class Accuracy:
    """Fractions right over the `n` labelled images of a split; a None has its reason in `reason`.

    `loss` is the mean cross-entropy without smoothing; `per_class` is top-1 by class name, of the
    classes that have images in the split. Where no image was classified, `split` and `n` are None too.
    """

    split: str | None
    n: int | None
    top1: float | None
    top5: float | None
    loss: float | None
    per_class: Mapping[str, float] | None
    reason: str | None = None


def evaluate(
    net: nn.Module,
    source: DataSource,
    *,
    split: str,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Accuracy:
    """Classify every labelled image of the split once, in eval mode and full precision.

    The net is moved to the device; its mode is restored. Where labels can't be compared with its outputs,
    or outputs are not finite, the figures are None with the reason. Every process gets the whole's figures.
    """
    net.to(device)
    with evaluating(net):
        return count_right(
            _answering(net, device),
            source,
            split=split,
            device=device,
            batch_size=batch_size,
            workers=workers,
            rank=rank,
            world_size=world_size,
        )


def count_right(
    answer: Callable[[Tensor], Any],
    source: DataSource,
    *,
    split: str,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Accuracy:
    """As `evaluate`, of whatever gives outputs for images (N, C, H, W): a net, or a file in its runtime.

    It is given every image of the split, labelled or not, in the split's order. `device` is where processes
    add up what they counted.
    """
    check_world(rank, world_size)
    reason = source.labels_reason
    if reason is None and not source.splits.get(split):
        reason = f"the data has no '{split}' split (it has: {', '.join(source.splits)})"
    if reason is not None:
        return _nothing(reason)
    names = output_names(source)
    classes = len(names)
    loader = make_loader(
        source.dataset(split), batch_size=batch_size, workers=workers, rank=rank, world_size=world_size
    )
    counts = torch.zeros(3, classes, dtype=torch.float64)  # by class: images, right, right among five
    loss_sum = torch.zeros(2, dtype=torch.float64)  # of the loss, and images whose loss is not finite
    for logits, targets in _classify(answer, loader, split, classes=classes):
        _count(counts, loss_sum, logits, targets)
    sums = torch.cat([counts.flatten(), loss_sum]).to(device if world_size > 1 else "cpu")
    sums = total(sums, world_size=world_size).cpu()
    return _accuracy(split, names, sums[:-2].view(3, classes), *sums[-2:].tolist())


def find_right(
    net: nn.Module,
    source: DataSource,
    *,
    split: str,
    device: torch.device,
    batch_size: int = 256,
    workers: int = 0,
) -> np.ndarray:
    """Which labelled images of the split the net is right on, (n,) bool, in the split's order.

    The same images for every net, so that two nets can be compared in pairs; the mean is `evaluate`'s top-1.
    The net is moved to the device; its mode is restored. Where outputs are not finite, the net is wrong.
    Raises InputError where there is no labelled image.
    """
    loader = make_loader(source.dataset(split), batch_size=batch_size, workers=workers)
    classes = len(output_names(source))
    net.to(device)
    with evaluating(net):
        right = [
            (logits.argmax(1) == targets) & logits.isfinite().all(1)
            for logits, targets in _classify(_answering(net, device), loader, split, classes=classes)
        ]
    if not sum(map(len, right)):
        raise InputError(f"no image of the {split} split has a label")
    return torch.cat(right).numpy()


def _answering(net: nn.Module, device: torch.device) -> Callable[[Tensor], Any]:
    return lambda images: net(images.to(device, non_blocking=True))


def _classify(
    answer: Callable[[Tensor], Any], loader: Loader, split: str, *, classes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (N, K) float32 and targets (N,) of the labelled images, batch by batch, on the CPU."""
    for inputs, targets in console.track(loader, f"evaluating on {split}", total=len(loader)):
        known = targets >= 0
        logits = logits_of(answer(inputs), classes=classes)
        yield logits.float().cpu()[known], targets[known]


def _count(counts: Tensor, loss_sum: Tensor, logits: Tensor, targets: Tensor) -> None:
    """Add one batch to the sums, in float64; logits (N, K) on the CPU, targets (N,) from 0."""
    losses = F.cross_entropy(logits.double(), targets, reduction="none")  # (N,)
    finite = losses.isfinite()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]  # (N, 5), the best first
    for row, weights in zip(counts, (finite, finite & hits[:, 0], finite & hits.any(1)), strict=True):
        row += torch.bincount(targets, weights=weights.double(), minlength=len(row))
    loss_sum += torch.stack([losses[finite].sum(), (~finite).sum().double()])


def _accuracy(split: str, names: tuple[str, ...], counts: Tensor, loss_sum: float, broken: float) -> Accuracy:
    images, right, right5 = (row.sum().item() for row in counts)
    n = int(images + broken)
    if n == 0:
        return _nothing(f"no image of the {split} split has a label")
    if broken:
        reason = f"the outputs are not finite for {int(broken)} of {n} images"
        return Accuracy(split, n, None, None, None, None, reason)
    few = len(names) <= 5
    return Accuracy(
        split=split,
        n=n,
        top1=right / n,
        top5=None if few else right5 / n,
        loss=loss_sum / n,
        per_class={
            name: hit / of
            for name, of, hit in zip(names, counts[0].tolist(), counts[1].tolist(), strict=True)
            if of
        },
        reason=f"top-5 says nothing among {len(names)} classes" if few else None,
    )


def _nothing(reason: str) -> Accuracy:
    return Accuracy(None, None, None, None, None, None, reason)


def output_names(source: DataSource) -> tuple[str, ...]:
    """Distinct names of the net's outputs, for a source whose labels fit them.

    ImageNet has two classes 'crane' and two 'maillot': a name's later owners get their output's number.
    """
    names = source.class_names
    if names is None:
        raise InputError(
            "the data names no classes",
            remedy="Pass --classes FILE, one name for each output, in output order.",
        )
    first = {name: output for output, name in reversed(list(enumerate(names)))}
    return tuple(name if first[name] == output else f"{name} ({output})" for output, name in enumerate(names))


def logits_of(output: Any, *, classes: int) -> Tensor:
    """Return the class logits (N, classes) among a net's outputs.

    The output may be a tensor, or a tuple, list, mapping or dataclass that holds tensors, nested or not: its
    first floating tensor of two axes with `classes` columns is taken (so of (logits, auxiliary logits) the
    first). Raises InputError where there is none.
    """
    found = list(tensors_in(output))
    for tensor in found:
        if tensor.ndim == 2 and tensor.shape[1] == classes and tensor.is_floating_point():
            return tensor
    shapes = ", ".join(str(tuple(t.shape)) for t in found) or "no tensor"
    raise InputError(
        f"the net gives {shapes}; logits of shape (N, {classes}) were expected",
        remedy=f"Use a classifier with {classes} outputs (--num-classes), or data of as many classes.",
    )
