"""Eval mode for a while: afterwards every module is in the mode that it had."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def kept_modes(net: nn.Module) -> Iterator[None]:
    """Whatever train() and eval() do inside, each module has its own mode again afterwards."""
    modes = {module: module.training for module in net.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def take_modes(net: nn.Module, like: nn.Module) -> None:
    """Put each module in the mode of its original: a norm that was frozen stays so."""
    for module, original in zip(net.modules(), like.modules(), strict=True):
        module.training = original.training


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Run with the net in eval mode and without gradients; each module's own mode is restored."""
    with kept_modes(net), torch.no_grad():
        net.eval()
        yield
