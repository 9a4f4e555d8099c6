"""A net's outputs by name, and whether an ONNX file gives the same ones on real images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from sepress.errors import CheckError
from sepress.measure import Inputs
from sepress.modes import evaluating
from sepress.outputs import named_outputs
from sepress.runtime import open_session
from sepress.types import Check

PARITY_TOLERANCE = 1e-4
ROUNDING_LIMIT = 1e-2  # a net whose float32 is further than this from its float64 can't be judged by it
VACUOUS_SPREAD = 1e-5  # of max|a|: below it float32 rounding hides any difference


def check_onnx_parity(net: nn.Module, path: str | Path, images: Inputs) -> Check:
    """Compare the file's outputs with the net's on real images (N, ...), in batches of 1, 3 and more.

    Raises CheckError where ONNX Runtime can't run the file on these images.
    The error of an output is max|a - b| over images, by the spread max|a - mean over images|; the worst
    output counts and must stay within PARITY_TOLERANCE. `passed` is None where no output tells the images
    apart. Runs on the CPU in float32, where neither side rounds to TF32; where the two differ by more, the
    net in float64 decides whether that is an error or float32's own noise.
    """
    net, inputs = on_cpu(net), tuple(x.detach().cpu() for x in as_tuple(images))
    session = open_session(path, providers="cpu")
    fixed = session.get_inputs()[0].shape[0]
    pieces = _pieces(len(inputs[0]), fixed if isinstance(fixed, int) else None)
    batches = [tuple(x[start:stop] for x in inputs) for start, stop in pieces]
    if not batches:
        return Check(
            None, None, reason=f"fewer images ({len(inputs[0])}) than the file's batch size ({fixed})"
        )
    expected = _run_net(net, batches)
    found = _run_session(session, batches, list(expected))
    check = compare_outputs(expected, found)
    return judge_in_float64(net, batches, expected, found) or check if check.passed is False else check


def _run_net(net: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> dict[str, np.ndarray]:
    with evaluating(net):
        outputs = [named_outputs(net(*batch)) for batch in batches]
    return {name: np.concatenate([part[name].numpy() for part in outputs]) for name in outputs[0]}


def _run_session(
    session: Any, batches: Sequence[tuple[Tensor, ...]], outputs: Sequence[str]
) -> dict[str, np.ndarray]:
    names = [node.name for node in session.get_inputs()]
    found = []
    for batch in batches:
        try:
            found.append(session.run(outputs, dict(zip(names, (x.numpy() for x in batch), strict=True))))
        except Exception as error:  # the runtime's own, by what an operator met
            raise CheckError(
                f"ONNX Runtime can't run the file on a batch of {len(batch[0])}: {error}",
                remedy="Where the forward fixes the batch size, export with that one: batch=N.",
            ) from error
    return {name: np.concatenate([part[i] for part in found]) for i, name in enumerate(outputs)}


def judge_in_float64(
    net: nn.Module,
    batches: Sequence[tuple[Tensor, ...]],
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
) -> Check | None:
    """Pass what is as near to the net in float64 as the net in float32 is; None where that can't help.

    Deep untrained nets reach this: their logits hardly vary over images, and summation order shows.
    """
    doubles = [tuple(x.double() if x.is_floating_point() else x for x in batch) for batch in batches]
    try:
        exact = _run_net(copy.deepcopy(net).double(), doubles)
    except RuntimeError:  # a forward that fixes its dtype
        return None
    file, torch32 = compare_outputs(exact, found), compare_outputs(exact, expected)
    if file.relative_error is None or torch32.relative_error is None:
        return None
    bound = max(PARITY_TOLERANCE, 2 * torch32.relative_error)
    if file.relative_error > bound or torch32.relative_error > ROUNDING_LIMIT:
        return None
    reason = f"against float64, from which torch's own float32 differs by {torch32.relative_error:.1e}"
    return dataclasses.replace(file, passed=True, reason=reason)


def _pieces(count: int, fixed: int | None) -> Iterator[tuple[int, int]]:
    """Cut `count` images into (start, stop): one, three, then eights; or as large as the file demands."""
    start = 0
    sizes = iter((1, 3))
    while start < count:
        stop = start + (fixed or next(sizes, 8))
        if fixed and stop > count:
            return
        yield start, min(stop, count)
        start = stop


def compare_outputs(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Check:
    """Compare outputs (N, ...) by name: relative error by DESIGN's spread over images, and the argmax.

    `argmax_agreement` is the fraction of positions where the first output's largest class, along axis 1, is
    the same.
    """
    errors: dict[str, float] = {}
    for name, a in expected.items():
        b = found[name]
        if a.shape != b.shape:
            return Check(False, None, reason=f"'{name}' has shape {b.shape}, expected {a.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return Check(False, None, reason=f"'{name}' holds values that are not finite")
        a, b = a.astype(np.float64), b.astype(np.float64)
        spread = np.abs(a - a.mean(axis=0, keepdims=True)).max(initial=0.0)
        if spread > 0 and spread >= VACUOUS_SPREAD * np.abs(a).max():
            errors[name] = float(np.abs(a - b).max() / spread)
    agreement = _argmax_agreement(expected, found)
    if not errors:
        count = len(next(iter(expected.values())))
        vacuous = f"the outputs do not tell the {count} images apart: nothing to compare"
        return Check(None, None, reason=vacuous, argmax_agreement=agreement)
    worst = max(errors, key=lambda name: errors[name])
    error = errors[worst]
    reason = None
    if error > PARITY_TOLERANCE:
        reason = (
            f"'{worst}' differs by {error:.2e} of its spread, over the tolerance of {PARITY_TOLERANCE:.0e}"
        )
    return Check(error <= PARITY_TOLERANCE, error, reason=reason, argmax_agreement=agreement)


def _argmax_agreement(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> float | None:
    name, a = next(iter(expected.items()))
    if a.ndim < 2:
        return None
    return float((a.argmax(axis=1) == found[name].argmax(axis=1)).mean())


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def on_cpu(net: nn.Module) -> nn.Module:
    """Return the net itself where it lives on the CPU, else a copy there."""
    tensors = (*net.parameters(), *net.buffers())
    return net if all(t.device.type == "cpu" for t in tensors) else copy.deepcopy(net).cpu()
