"""A training run's state -> tensors and plain values in a file -> the same state, to the bit.

An epoch draws its random numbers from a seed of its own (see loop.epoch_seed), so the state between two
epochs needs no random generator's.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepress.errors import InputError
from sepress.files import replacing
from sepress.types import JSON

SCHEMA = "sepress.checkpoint/1"
Tensors = dict[str, Tensor]


def tensors_of(net: nn.Module) -> Tensors:
    """The net's own parameters and buffers by name, shared ones once, detached but not copied."""
    return {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}


@torch.no_grad()
def copy_into(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the net's parameters and buffers, in place."""
    for name, t in tensors_of(net).items():
        t.copy_(tensors[name])


def save_checkpoint(path: Path, *, identity: Mapping[str, JSON], state: Mapping[str, Any]) -> None:
    """Write what the run is and how far it is, atomically."""
    with replacing(path) as temporary:
        torch.save({"schema": SCHEMA, "identity": dict(identity), "state": dict(state)}, temporary)


def load_checkpoint(path: Path, *, identity: Mapping[str, JSON]) -> dict[str, Any]:
    """Read the state of a run back (on the CPU); InputError if it is another run's, or not a checkpoint."""
    remedy = f"Delete {path} to train from the start, or name another checkpoint."
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        schema, theirs, state = found["schema"], found["identity"], found["state"]
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(
            f"{path} can't be read as a training checkpoint ({type(error).__name__})", remedy=remedy
        ) from error
    if schema != SCHEMA:
        raise InputError(f"{path} is of format {schema!r}; {SCHEMA!r} was expected", remedy=remedy)
    differences = [
        f"{key} ({theirs.get(key)!r} there, {identity.get(key)!r} here)"
        for key in dict.fromkeys((*theirs, *identity))
        if theirs.get(key) != identity.get(key)
    ]
    if differences:
        raise InputError(f"{path} is of another training run: {'; '.join(differences)}", remedy=remedy)
    return dict(state)
