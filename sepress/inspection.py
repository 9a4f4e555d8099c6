"""A net -> what is gated, what is not, what is frozen and why; no data and no weights are needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sepress.coupling import NETWORK_OUTPUT, Coupling, trace
from sepress.device import seeded
from sepress.measure import count_params
from sepress.types import JSON, Bundle, CouplingGroup, Role

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "sepress.inspection/1"


@dataclass(frozen=True)
class ChannelShares:
    """Output channels of a net's convolutions and linear layers, counted once for each layer that makes them.

    Where layers are coupled, each one's channels count: what surgery moves are the channels of layers. A
    layer whose channels nothing follows (its weight is computed in the forward) counts as frozen. What
    the net returns is counted apart, since no pruning may change it; the shares leave it out.
    """

    gated: int  # in a group that a gate judges
    ungated: int  # in a group without a gate
    se_hidden: int  # inside a gate's own branch
    frozen: int  # can't be removed, outputs apart
    outputs: int  # what the net returns

    @property
    def total(self) -> int:
        """All but the outputs."""
        return self.gated + self.ungated + self.se_hidden + self.frozen

    @property
    def free(self) -> float:
        """The share of `total` that pruning may remove; 1 for a net that has nothing but outputs."""
        return 1 - self.share("frozen") if self.total else 1.0

    def share(self, role: Role) -> float:
        """The fraction of `total` in that role; 0 for a net that has nothing but outputs."""
        count: int = getattr(self, role)
        return count / max(1, self.total)


def channel_shares(coupling: Coupling) -> ChannelShares:
    """Count the output channels of every producer by the role of the group that they belong to."""
    made = Counter(dict.fromkeys(("gated", "ungated", "se_hidden", "frozen", "outputs"), 0))
    for producer in coupling.producers:
        for number, channels in zip(*np.unique(producer.group, return_counts=True), strict=True):
            made[_place(coupling.groups[number]) if number >= 0 else "frozen"] += int(channels)
    return ChannelShares(**made)


def _place(group: CouplingGroup) -> str:
    is_output = any(reason.what == NETWORK_OUTPUT for reason in group.reasons)
    return "outputs" if is_output else group.role


@dataclass(frozen=True)
class Inspection:
    """The structure of one net, at its own input size."""

    model: str
    input_size: tuple[int, ...]
    trained: bool
    macs: int
    params: int
    coupling: Coupling

    def to_json(self) -> dict[str, JSON]:
        """What `sepress inspect --json` prints."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "input_size": list(self.input_size),
            "trained": self.trained,
            "macs": self.macs,
            "params": self.params,
            "gates": [
                {
                    "name": gate.name,
                    "channels": gate.channels,
                    "activation": gate.activation,
                    "group": gate.group,
                }
                for gate in self.coupling.gates
            ],
            "groups": [
                {
                    "name": group.name,
                    "role": group.role,
                    "width": group.width,
                    "gates": list(group.gates),
                    "producers": list(group.producers),
                    "frozen_because": group.frozen_because,
                }
                for group in self.coupling.groups
            ],
        }

    def shares(self) -> dict[str, float]:
        """The share of all channels in each role, each channel of a coupled set counted once."""
        widths: Counter[str] = Counter()
        for group in self.coupling.groups:
            widths[group.role] += group.width
        total = max(1, sum(widths.values()))
        return {role: widths[role] / total for role in ("gated", "ungated", "se_hidden", "frozen")}

    def render(self) -> RenderableType:
        """A summary and a table of groups, for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        size = "x".join(map(str, self.input_size))
        shares = ", ".join(f"{role.replace('_', ' ')} {share:.0%}" for role, share in self.shares().items())
        lines = [
            f"{self.model} at {size}: {self.macs / 1e6:,.1f} MMACs, {self.params / 1e6:,.2f} M parameters",
            f"{len(self.coupling.gates)} gates, {len(self.coupling.groups)} groups; channels: {shares}",
        ]
        if not self.trained:
            lines.append("Structure only: no weights were loaded.")
        if not self.coupling.gates:
            lines.append("No Squeeze-and-Excitation gate was found: criteria of excitation judge by L2.")
        table = Table(box=None, pad_edge=False)
        for header in ("group", "role", "width", "gates"):
            table.add_column(header, justify="right" if header in ("width", "gates") else "left")
        for group in self.coupling.groups:
            role = group.role + (f": {group.frozen_because}" if group.frozen_because else "")
            table.add_row(Text(group.name), Text(role), str(group.width), str(len(group.gates)))
        return Group(*(Text(line) for line in lines), table)


def inspect_bundle(bundle: Bundle) -> Inspection:
    """Trace the bundle's net on one random image of its input size, on the CPU."""
    size = bundle.spec.preprocessing.input_size
    with seeded(0):
        coupling = trace(bundle.net.cpu().eval(), torch.randn(1, *size))
    return Inspection(
        model=bundle.spec.reference,
        input_size=tuple(size),
        trained=bundle.spec.trained,
        macs=coupling.count_macs({}),
        params=count_params(bundle.net),
        coupling=coupling,
    )
