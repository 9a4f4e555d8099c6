"""What the processes of one run agree on, through torch.distributed; one process needs none of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sepress.errors import InputError


def check_world(rank: int, world_size: int) -> None:
    """Raise InputError where the processes that run are not those that were asked for."""
    running = dist.is_available() and dist.is_initialized()
    actual = (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
    if actual != (rank, world_size):
        raise InputError(
            f"this was called as process {rank} of {world_size}, but torch.distributed runs it as "
            f"{actual[0]} of {actual[1]}",
            remedy="Start it with torchrun, and initialise torch.distributed before this call.",
        )


def average(tensors: Sequence[Tensor], *, world_size: int) -> None:
    """Replace each tensor by its mean over the processes, in place, in one transfer a dtype."""
    if world_size == 1:
        return
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t.detach() for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        flat /= world_size
        for t, mean in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
            t.copy_(mean.view_as(t))


def total(values: Tensor, *, world_size: int) -> Tensor:
    """The sum over the processes."""
    if world_size > 1:
        dist.all_reduce(values)
    return values


def share(tensors: Sequence[Tensor], *, world_size: int) -> None:
    """Give every process the tensors of process 0, in place."""
    if world_size > 1:
        for t in tensors:
            dense = t.detach().contiguous()
            dist.broadcast(dense, src=0)
            t.detach().copy_(dense)


def check_equal(value: int, what: str, *, device: torch.device, world_size: int) -> None:
    """Raise InputError on every process where the processes hold different values."""
    if world_size == 1:
        return
    values = torch.tensor([value, -value], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    most, least = values[0].item(), -values[1].item()
    if most != least:
        raise InputError(
            f"the processes do not agree on {what}: from {least} to {most}",
            remedy="Put the file where every process sees it.",
        )
