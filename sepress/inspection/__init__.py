"""A net -> what is gated, what judges the rest, what is frozen and why; no data and no weights are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sepress import console
from sepress.coupling import Coupling, trace
from sepress.device import seeded
from sepress.inspection.reasons import explain
from sepress.inspection.shares import ChannelShares, channel_shares, made_channels
from sepress.measure import count_params
from sepress.types import JSON, Bundle

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "sepress.inspection/2"

__all__ = ["SCHEMA", "ChannelShares", "Inspection", "channel_shares", "inspect_bundle"]


@dataclass(frozen=True)
class Inspection:
    """The structure of one net, at its own input size."""

    model: str
    input_size: tuple[int, ...]
    trained: bool
    macs: int
    params: int
    coupling: Coupling

    def touched_macs(self) -> np.ndarray:
        """The MACs of the layers that make or read each group's channels, (groups,) int.

        A layer between two groups counts for both, so these add up to more than the net's.
        """
        counts = [
            self.macs - self.coupling.count_macs({group.name: tuple(range(group.units))})
            for group in self.coupling.groups
        ]
        return np.array(counts, dtype=np.int64)

    def to_json(self) -> dict[str, JSON]:
        """What `sepress inspect --json` prints: every gate, group and layer, never shortened."""
        shares = channel_shares(self.coupling)
        counted = zip(self.coupling.groups, made_channels(self.coupling), self.touched_macs(), strict=True)
        return {
            "schema": SCHEMA,
            "model": self.model,
            "input_size": list(self.input_size),
            "trained": self.trained,
            "macs": self.macs,
            "params": self.params,
            "channels": {
                "gated": shares.gated,
                "ungated": shares.ungated,
                "se_hidden": shares.se_hidden,
                "frozen": shares.frozen,
                "outputs": shares.outputs,
                "free_share": shares.free,
            },
            "gates": [
                {
                    "name": gate.name,
                    "kind": gate.kind,
                    "channels": gate.channels,
                    "activation": gate.activation,
                    "producer": gate.producer,
                    "group": gate.group,
                }
                for gate in self.coupling.gates
            ],
            "groups": [
                {
                    "name": group.name,
                    "role": group.role,
                    "width": group.width,
                    "units": group.units,
                    "made_channels": int(made),
                    "touched_macs": int(macs),
                    "gates": list(group.gates),
                    "producers": list(group.producers),
                    "reasons": [
                        {"what": reason.what, "module": reason.module, "why": explain(reason.what)}
                        for reason in group.reasons
                    ],
                }
                for group, made, macs in counted
            ],
            "unfollowed": [
                {"layer": made.module, "made_channels": len(made.group), "what": made.reason.what}
                for made in self.coupling.producers
                if made.reason is not None
            ],
        }

    def render(self, *, full: bool = False, command: str = "MODEL") -> RenderableType:
        """One screen for a terminal, or with `full` every gate and group; `command` is what was inspected."""
        from sepress.inspection.terminal import render

        return render(self, full=full, command=command)


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Trace the bundle's net on one random image of its input size, on the CPU."""
    size = bundle.spec.preprocessing.input_size
    with seeded(0), console.working("tracing one image"):
        coupling = trace(bundle.net.cpu().eval(), torch.randn(1, *size))
    return Inspection(
        model=bundle.spec.reference,
        input_size=tuple(size),
        trained=bundle.spec.trained,
        macs=coupling.count_macs({}),
        params=count_params(bundle.net),
        coupling=coupling,
    )
