"""Calibration images -> batch norm's running statistics, afresh: after surgery they are another net's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sepress.calibrate import split_batch
from sepress.errors import InputError
from sepress.modes import evaluating


def recalibrate_batchnorm(net: nn.Module, batches: Iterable[Any], *, device: torch.device) -> int:
    """Set each batch norm's running mean and (unbiased) variance to the batches' averages; returns how many.

    Each batch weighs by its number of images, so equal batches give what momentum=None gives, and a short
    last one does not count for more. `batches` yields inputs, or (inputs, targets). Only batch norms
    that keep statistics run in train mode: dropout and the like stay off, frozen norms stay. The net is
    moved to the device; modes and momenta are restored. A batch of one image has no variance after a global
    pooling and is left out; InputError if nothing else is there. Without batch norms no batch is read.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    net.to(device)
    seen = 0
    with evaluating(net), _averaging(norms):
        for batch in batches:
            inputs, _ = split_batch(batch)
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            images = len(arguments[0])
            if images == 1:
                continue
            seen += images
            for norm in norms:
                norm.momentum = images / seen  # old * (1 - m) + new * m: the mean over images so far
            net(*(x.to(device, non_blocking=True) for x in arguments))
    if not seen:
        raise InputError(
            "batch norm can't be recalibrated: no batch of two images or more",
            remedy="Pass more calibration images.",
        )
    return len(norms)


@contextmanager
def _averaging(norms: list[_BatchNorm]) -> Iterator[None]:
    """Train mode of the norms alone (not of what they contain: timm's hold a dropout); momenta restored."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.training = True
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.zero_()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
