"""Files -> what each operator took under ONNX Runtime's profiler -> what each layer of the net took."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sepress.coupling.groups import Layers
from sepress.errors import SepressError
from sepress.runtime import open_session

MOST_PADDING = 32  # channels that a runtime may add to fill a block
_FAR = 1e9  # no match


@dataclass(frozen=True)
class Event:
    """One operator of one profiled net: what it took, and the shapes that tell which layer it is."""

    op: str
    ns: float
    reads: tuple[int, ...]
    weight: tuple[int, ...]  # the second input
    output: tuple[int, ...]


def profile_files(paths: Sequence[Path], example: Tensor, *, threads: int, rounds: int) -> list[list[Event]]:
    """Run the files in turn under the runtime's profiler; each file's operators in order."""
    sessions = [
        open_session(path, providers="cpu", threads=threads, profile_to=path.with_suffix(""))
        for path in paths
    ]
    feeds = {sessions[0].get_inputs()[0].name: example.cpu().numpy()}
    for _ in range(rounds):
        for session in sessions:
            session.run(None, feeds)
    return [_read_events(Path(session.end_profiling()), rounds) for session in sessions]


def _read_events(path: Path, rounds: int) -> list[Event]:
    taken: dict[str, list[float]] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for event in json.loads(path.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken.setdefault(event["name"], []).append(event["dur"])
            facts[event["name"]] = event["args"]
    path.unlink()
    return [
        Event(
            op=facts[name]["op_name"],
            ns=1e3 * _typical(times),
            reads=_shape(facts[name].get("input_type_shape", ()), 0),
            weight=_shape(facts[name].get("input_type_shape", ()), 1),
            output=_shape(facts[name].get("output_type_shape", ()), 0),
        )
        for name, times in taken.items()
    ]


def _typical(times: Sequence[float]) -> float:
    """The mean of the faster half: the profiler counts whole microseconds, and interruptions only add."""
    return float(np.mean(sorted(times)[: max(1, len(times) // 2)]))


def _shape(shapes: Sequence[Mapping[str, Sequence[int]]], position: int) -> tuple[int, ...]:
    if position >= len(shapes):
        return ()
    return tuple(next(iter(shapes[position].values()), ()))


# ---- operators -> layers --------------------------------------------------------------------------
def assign(events: Sequence[Event], layers: Layers, *, batch: int) -> np.ndarray:
    """The time of each layer (layers,) ns: of its own operator, and of those that work on what it gives.

    The layers are of one image, the events of `batch`. Layers are matched by their weights' shapes, which a
    runtime may have padded to whole blocks; of two layers alike it does not matter which is which. Other
    operators go to the last layer before them whose output has as many channels, else to the last one at all.
    """
    total = np.zeros(len(layers.positions))
    own = [i for i, event in enumerate(events) if event.op in _LAYER_OPS and event.reads and event.output]
    cost = np.array([[_mismatch(events[i], batch, layers, j) for j in range(len(total))] for i in own])
    layer_of: dict[int, int] = {}
    if len(own):
        rows, columns = linear_sum_assignment(cost.reshape(len(own), len(total)))
        layer_of = {own[r]: int(c) for r, c in zip(rows, columns, strict=True) if cost[r, c] < _FAR}
    if len(layer_of) < 0.8 * len(own):
        raise SepressError(
            f"ONNX Runtime timed {len(own)} operators with weights; only {len(layer_of)} are known layers",
            remedy="Please report this net.",
        )
    before: list[tuple[int, int]] = []  # channels given, layer
    for i, event in enumerate(events):
        channels = event.output[1] if len(event.output) > 1 else 0
        if i in layer_of:
            before.append((channels, layer_of[i]))
            total[layer_of[i]] += event.ns
        else:
            alike = [layer for given, layer in before if given == channels]
            layer = alike[-1] if alike else before[-1][1] if before else 0
            total[layer] += event.ns
    return total


_CONVOLUTIONS = {"Conv", "FusedConv", "ConvTranspose"}
_LAYER_OPS = _CONVOLUTIONS | {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def _mismatch(event: Event, batch: int, layers: Layers, layer: int) -> float:
    """How many channels of padding make the layer this operator; _FAR where none do."""
    known = [int(n) for n in layers.lengths[layer] if n > 1]  # axes of length 1 are not told apart
    positions = int(layers.positions[layer])
    if event.op not in _CONVOLUTIONS:  # its weight may be packed away: told by what goes in and comes out
        return 0.0 if _multiplies(event, batch, known, positions) else _FAR
    counted = event.reads if event.op == "ConvTranspose" else event.output
    if positions * batch != counted[0] * np.prod(counted[2:]):
        return _FAR
    if event.op == "ConvTranspose":  # its weight may be packed away, too
        sides = event.reads[1], event.output[1] // int(layers.groups[layer])
        return 0.0 if known[:2] == list(sides) else _FAR
    found = [n for n in event.weight if n > 1]
    kernel = sum(n > 1 for n in event.weight[2:])
    if len(found) != len(known) or found[len(found) - kernel :] != known[len(known) - kernel :]:
        return _FAR
    padding = [padded - exact for padded, exact in zip(found, known, strict=True)]
    return float(sum(padding)) if all(0 <= n < MOST_PADDING for n in padding) else _FAR


def _multiplies(event: Event, batch: int, known: Sequence[int], positions: int) -> bool:
    """Whether a product of matrices has those axes; what the others of its three amount to is positions."""
    *rows, columns = event.output
    others = [math.prod(rows) // batch, event.reads[-1], columns]
    for length in known:
        if length not in others:
            return False
        others.remove(length)
    return math.prod(others) == positions
