"""`auto`, `cpu`, `cuda`, `mps` -> torch.device, the best there is by default; random state kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sepress.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

DEVICES = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of that name; `auto` takes cuda, then mps, then cpu."""
    import torch

    kind = name.split(":")[0]
    if kind not in DEVICES:
        raise InputError(f"unknown device '{name}'", remedy=f"Choose one of: {', '.join(DEVICES)}.")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if available[d]))
    if not available[kind]:
        raise InputError(
            f"device '{name}' is not available here",
            remedy="Use --device auto, or install a torch build for it.",
        )
    return torch.device(name)


def home_of(net: nn.Module) -> torch.device:
    """The device that a net's parameters lie on; the CPU for a net without."""
    import torch

    return next((p.device for p in net.parameters()), torch.device("cpu"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's generators seeded, and leave the caller's random state as it was."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", index) for index in range(count)]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    with kept_random_state(devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def kept_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """Leave the random state of the CPU, and of these devices, as it was."""
    import torch

    devices = list(devices)
    cuda = [device.index or 0 for device in devices if device.type == "cuda"]
    mps = torch.mps.get_rng_state() if any(device.type == "mps" for device in devices) else None
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            if mps is not None:  # which fork_rng can't fork
                torch.mps.set_rng_state(mps)
