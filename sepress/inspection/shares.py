"""Coupling -> how many output channels are gated, judged otherwise, inside a gate, or frozen."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from sepress.coupling import NETWORK_OUTPUT, Coupling
from sepress.types import CouplingGroup, Role


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
    for group, channels in zip(coupling.groups, made_channels(coupling), strict=True):
        made["outputs" if is_output(group) else group.role] += int(channels)
    made["frozen"] += sum(len(producer.group) for producer in coupling.producers if producer.reason)
    return ChannelShares(**made)


def made_channels(coupling: Coupling) -> np.ndarray:
    """Count the output channels of all producers in every group, (groups,) int."""
    made = np.concatenate([np.zeros(0, np.int64), *(producer.group for producer in coupling.producers)])
    counts: np.ndarray = np.bincount(made[made >= 0], minlength=len(coupling.groups))
    return counts


def is_output(group: CouplingGroup) -> bool:
    """Whether the group's channels are what the net returns."""
    return any(reason.what == NETWORK_OUTPUT for reason in group.reasons)
