"""What stands where the block of a folded gate stood: a closed list of modules, told by kind and shape."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sepress.device import home_of
from sepress.errors import InputError
from sepress.types import Replacement, ReplacementKind

MAX_AXES = 5  # of an excitation: images, channels, and three for positions


class FoldedIdentity(nn.Module):
    """Gives what it gets: its gate's constant lies in the weights before or after it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class ChannelScale(nn.Module):
    """Multiply a map (N, C, ...) by one constant per channel; `scale` is (C, 1, 1) for a map (N, C, H, W)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ConstantExcitation(nn.Module):
    """Give the same excitation for every image, where the multiplication is another module's.

    `scale` is (1, C, 1, 1) for a map (N, C, H, W), or one single 1 where the constant lies in weights.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale


KINDS: dict[ReplacementKind, type[nn.Module]] = {
    "identity": FoldedIdentity,
    "scale": ChannelScale,
    "excitation": ConstantExcitation,
}


def build_replacement(kind: ReplacementKind, shape: tuple[int, ...]) -> nn.Module:
    """Make one of the list; a shape is () for an identity."""
    return FoldedIdentity() if kind == "identity" else KINDS[kind](shape)


def find_replacements(net: nn.Module) -> tuple[Replacement, ...]:
    """Return the modules of the list that a net holds, in the order of its modules."""
    kinds = {module: kind for kind, module in KINDS.items()}
    return tuple(
        Replacement(path, kinds[type(module)], tuple(getattr(module, "scale", torch.empty(())).shape))
        for path, module in net.named_modules()
        if type(module) in kinds
    )


def put_module(net: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put a module at a path of the net, in train or eval mode as the one before it, which is returned."""
    owner, _, leaf = path.rpartition(".")
    held = net.get_submodule(owner)._modules
    old = held[leaf]
    assert old is not None
    held[leaf] = module.train(old.training)
    return old


def apply_replacements(net: nn.Module, replacements: Iterable[Replacement], *, where: str) -> None:
    """Replace modules of an architecture as a file's header says.

    The new ones lie on the device of the net's parameters, the meta device for an outline. Raises InputError
    for what can't have been written by us.
    """
    device = home_of(net)
    for new in replacements:
        if not _is_plain(new):
            raise InputError(f"{where}: its header puts a module of shape {new.shape} at '{new.module}'")
        try:
            old = net.get_submodule(new.module)
        except AttributeError:
            old = net
        if old is net:
            raise InputError(f"{where}: its header replaces '{new.module}', and there is no such module")
        with device:
            put_module(net, new.module, build_replacement(new.kind, new.shape))


def _is_plain(new: Replacement) -> bool:
    if new.kind == "identity":
        return new.shape == ()
    return 1 <= len(new.shape) <= MAX_AXES and all(length >= 1 for length in new.shape)
