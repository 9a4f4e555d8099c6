"""What a net's layers cost in time, as a function of what is removed: a sum over layers, in nanoseconds.

A layer's time is a constant, a part for each channel of each axis that pruning can shorten, and a part for
the product of these: what a convolution with its norm, activation and data movement takes on a runtime that
lays channels out in blocks. Widths count in whole blocks, since the runtime fills the last one with zeros. A
grouped convolution's count as they are, and it takes longer by a part for each channel unless each of its
groups is whole blocks: ONNX Runtime then has a way without copies, at which 16 channels a group are faster
than 12 (NchwcTransformer::TransformConv).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from sepress.coupling import Coupling
from sepress.coupling.groups import Layers
from sepress.errors import InputError
from sepress.files import read_json
from sepress.types import JSON, Removed

SCHEMA = "sepress.latency-table/1"
_COEFFICIENTS = ("block", "fixed", "per_channel", "per_product", "per_ragged")


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """The times of one net's layers on one runtime and machine; predicts the net's with units removed.

    `fixed`, `per_channel`, `per_product` and `per_ragged` are nanoseconds, (layers,) but per_channel (layers,
    axes), in the order of Coupling.layers; `overhead` is what a call takes beside its layers.
    """

    net: str  # digest of the layers' full shapes: a table is of one net
    overhead: float  # negative where the profiler's own time is in the layers'
    block: np.ndarray  # (layers,) int: channels that the runtime handles together
    fixed: np.ndarray
    per_channel: np.ndarray
    per_product: np.ndarray
    per_ragged: np.ndarray
    conditions: Mapping[str, JSON]  # runtime, provider, threads, batch, input shape, machine
    validation: Mapping[str, JSON]  # whole nets that it had not seen: predicted and measured ratios

    def predict_ns(self, coupling: Coupling, removed: Removed) -> int:
        """The time of one call with those units gone."""
        return round(self.overhead + float(self.layer_ns(coupling.layers(removed)).sum()))

    def layer_ns(self, layers: Layers) -> np.ndarray:
        """The time of each layer, (layers,)."""
        x = features(layers, self.block)
        channels: np.ndarray = (self.per_channel * x.channels).sum(axis=1)
        taken: np.ndarray = self.fixed + channels + self.per_product * x.product + self.per_ragged * x.ragged
        return taken

    def check(self, coupling: Coupling) -> None:
        """Raise InputError where the table is of another net, or of none that takes time."""
        lengths = coupling.layers({}).lengths.shape
        if layers_digest(coupling) != self.net or self.per_channel.shape != lengths:
            raise InputError(
                "the latency table is of another net: its layers are not these",
                remedy="Make one for this net: sepress profile MODEL --out table.json.",
            )
        if (base := self.predict_ns(coupling, {})) <= 0:
            raise InputError(f"by the latency table a call of this net takes {base} ns", remedy=_REMEDY)

    def to_json(self) -> dict[str, JSON]:
        return {
            "schema": SCHEMA,
            "net": self.net,
            "overhead_ns": self.overhead,
            "layers": {name: getattr(self, name).tolist() for name in _COEFFICIENTS},
            "conditions": dict(self.conditions),
            "validation": dict(self.validation),
        }


@dataclass(frozen=True, eq=False)
class Features:
    """Widths, in whole blocks but for grouped convolutions, that a layer's time is a function of."""

    channels: np.ndarray  # (layers, axes) float, 0 where an axis can't shrink
    product: np.ndarray  # (layers,) float: of all that can, 0 where fewer than two
    ragged: np.ndarray  # (layers,) float: channels of a grouped convolution whose groups are not whole blocks


def features(layers: Layers, block: np.ndarray) -> Features:
    """What a layer's time is a function of; `block` is (layers,)."""
    grouped = np.array([kind == "grouped" for kind in layers.kinds])
    unit = np.where(grouped, 1, block)[:, None]
    blocks = np.ceil(layers.lengths / unit) * unit
    channels = np.where(layers.shrinking, blocks, 0.0)
    product = np.where(layers.shrinking, blocks, 1.0).prod(axis=1)
    product = np.where(layers.shrinking.sum(axis=1) > 1, product, 0.0)
    sides = np.stack(
        [layers.lengths[:, 0] // layers.groups, layers.lengths[:, 1:2].sum(axis=1)]
    )  # of a group
    ragged = grouped & (sides % block > 0).any(axis=0)
    return Features(channels, product, np.where(ragged, channels[:, 0], 0.0))


def layers_digest(coupling: Coupling) -> str:
    """What tells one net's layers from another's: their shapes and which axes can shrink."""
    layers = coupling.layers({})
    shapes = [layers.positions.tolist(), layers.lengths.tolist(), layers.shrinking.tolist()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def predictor(coupling: Coupling, table: LatencyTable | None = None) -> Callable[[Removed], int]:
    """What planning takes: the predicted time of a removal, in ns; without a table, by the coarse one.

    Raises InputError where the table is of another net.
    """
    if table is not None:
        table.check(coupling)
    known = table or coarse_table(coupling)
    return lambda removed: known.predict_ns(coupling, removed)


# ---- without a measured table ---------------------------------------------------------------------
@dataclass(frozen=True)
class _Price:
    """Nanoseconds of a layer, of each element that a convolution gives, and of each multiply-accumulate."""

    layer: float
    element: float
    mac: float
    ragged: float = 0.0  # of each element of a grouped convolution whose groups are not whole blocks


# Fitted to the tables of five nets of timm (seresnet50, mobilenetv3_large_100, efficientnet_b0, regnety_016,
# seresnext50_32x4d; 224 px, batch 1), as `python tests/benchmarks_latency.py coarse` does; grouped
# convolutions, of which these have few widths, to the sweep that `grouped` prints there. ONNX Runtime 1.31,
# one thread of an AMD EPYC with AVX-512, November 2026. Only their proportions matter.
_COARSE: dict[str, _Price] = {
    "pointwise": _Price(5000, 0.134, 0.0183),
    "spatial": _Price(4400, 0.360, 0.0176),
    "grouped": _Price(5000, 0.300, 0.0177, 3.6),
    "depthwise": _Price(9700, 0.041, 0.0455),
    "linear": _Price(7200, 0, 0.202),  # one row: all weights are fetched for it
}
_COARSE_BLOCK = 16  # channels of a block under AVX-512; whole blocks of it are also whole blocks of eight


def coarse_table(coupling: Coupling) -> LatencyTable:
    """What layers of these kinds and shapes cost on a CPU, roughly: enough to choose between plans."""
    layers = coupling.layers({})
    kinds = ["linear" if n == 1 else kind for n, kind in zip(layers.positions, layers.kinds, strict=True)]
    fixed, element, mac, ragged = np.array([astuple(_COARSE[kind]) for kind in kinds]).T
    element = element * layers.positions  # of each output channel, the first axis
    mac = mac * layers.positions * np.where(layers.shrinking, 1, layers.lengths).prod(axis=1)
    shrinking = layers.shrinking.sum(axis=1)
    per_channel = np.where(layers.shrinking & (shrinking == 1)[:, None], mac[:, None], 0.0)
    per_channel[:, 0] += np.where(layers.shrinking[:, 0], element, 0.0)
    fixed = fixed + np.where(layers.shrinking[:, 0], 0.0, element * layers.lengths[:, 0])
    return LatencyTable(
        net=layers_digest(coupling),
        overhead=0.0,
        block=np.full(len(kinds), _COARSE_BLOCK),
        fixed=fixed + np.where(shrinking == 0, mac, 0.0),
        per_channel=per_channel,
        per_product=np.where(shrinking > 1, mac, 0.0),
        per_ragged=ragged * layers.positions,
        conditions={"table": "coarse"},
        validation={},
    )


# ---- files ----------------------------------------------------------------------------------------
def table_from_json(value: JSON, *, where: str) -> LatencyTable:
    """Read what `to_json` gave; InputError names what is missing or of another kind."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise InputError(f"{where} is no latency table: expected schema {SCHEMA!r}", remedy=_REMEDY)
    try:
        layers = {name: np.array(value["layers"][name], dtype=float) for name in _COEFFICIENTS}
        table = LatencyTable(
            net=str(value["net"]),
            overhead=float(value["overhead_ns"]),
            **layers,
            conditions=dict(value["conditions"]),
            validation=dict(value["validation"]),
        )
    except KeyError as error:
        raise InputError(f"{where} is no whole latency table: it lacks {error}", remedy=_REMEDY) from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(f"{where} is no whole latency table: {str(error)[:200]}", remedy=_REMEDY) from error
    shapes = {len(figures) for figures in layers.values()}
    right = all(figures.ndim == 1 + (name == "per_channel") for name, figures in layers.items())
    if len(shapes) > 1 or not right or not math.isfinite(table.overhead):
        raise InputError(
            f"{where} is no whole latency table: its lists are of unequal lengths", remedy=_REMEDY
        )
    figures = np.concatenate(list(layers.values()), axis=None)
    if not np.isfinite(figures).all() or (figures < 0).any() or (table.block < 1).any():
        raise InputError(f"{where} holds times that are no times: negative, or no numbers", remedy=_REMEDY)
    return table


def as_table(table: LatencyTable | str | Path | None) -> LatencyTable | None:
    """The table itself, or the one in a file; None stays None."""
    return read_table(Path(table)) if isinstance(table, str | Path) else table


def read_table(path: Path) -> LatencyTable:
    """Read a latency table's file."""
    value = read_json(path, what="latency table", remedy=_REMEDY)
    return table_from_json(value, where=str(path))


_REMEDY = "Make one: sepress profile MODEL --out table.json."
