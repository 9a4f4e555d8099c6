"""What layers took at many widths -> a latency table, by non-negative least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from sepress.costs import Features, LatencyTable, features, layers_digest
from sepress.coupling import Coupling
from sepress.types import Removed

BLOCKS = (16, 8, 32, 1)  # channels that a runtime may handle together; of equals the first


@dataclass(frozen=True, eq=False)
class Sample:
    """What each layer, with the operators that follow it, took: in ns, (layers,)."""

    removed: Removed
    base_ns: np.ndarray  # in the whole net, run in turn with it
    layer_ns: np.ndarray  # in the net with those units gone


def fit_table(coupling: Coupling, samples: Sequence[Sample]) -> LatencyTable:
    """Fit each layer's time to its widths, in the blocks that explain all of them best."""
    speeds = np.array([sample.base_ns.sum() for sample in samples])  # a slow spell slows both
    times = np.stack([s.layer_ns * np.median(speeds) / v for s, v in zip(samples, speeds, strict=True)])
    shapes = [coupling.layers(sample.removed) for sample in samples]
    fits = [
        _fit([features(layers, np.full(len(layers.kinds), b)) for layers in shapes], times) for b in BLOCKS
    ]
    best = np.argmin([error for _, error in fits], axis=0)
    coefficients = np.stack([fits[choice][0][layer] for layer, choice in enumerate(best)])
    return LatencyTable(
        net=layers_digest(coupling),
        overhead=0.0,
        block=np.array(BLOCKS)[best],
        fixed=coefficients[:, 0],
        per_channel=coefficients[:, 1:-2],
        per_product=coefficients[:, -2],
        per_ragged=coefficients[:, -1],
        conditions={},
        validation={},
    )


def _fit(seen: Sequence[Features], times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative least squares, layer by layer -> (layers, features) in ns, and squared errors (layers,).

    An error counts by its share of what the layer takes.
    """
    layers, axes = seen[0].channels.shape
    coefficients, errors = np.zeros((layers, axes + 3)), np.zeros(layers)
    for layer in range(layers):
        rows = np.stack([np.r_[1.0, x.channels[layer], x.product[layer], x.ragged[layer]] for x in seen])
        scale = np.maximum(rows.max(axis=0), 1e-12)
        weights = 1.0 / np.maximum(times[:, layer], 1e3)
        solution, residual = nnls(rows / scale * weights[:, None], times[:, layer] * weights)
        coefficients[layer] = solution / scale
        errors[layer] = float(residual) ** 2
    return coefficients, errors


def fit_overhead(predicted: np.ndarray, measured: np.ndarray) -> float:
    """What a call takes beside its layers, in ns: the constant that turns sums into the ratios measured.

    With it in both nets, (sum + o) / (base + o) = ratio: linear in o, solved by least squares of relative
    errors. The first entry is the base's. Negative where the profiler's own time is in the sums, but never so
    that less than a tenth of any of them is left: noise on a net of microseconds.
    """
    slope, level = (1 - measured) / measured, (measured * predicted[0] - predicted) / measured
    return max(float((slope * level).sum() / (slope**2).sum()), -0.9 * float(predicted.min()))
