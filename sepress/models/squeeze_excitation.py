"""The Squeeze-and-Excitation block (Hu, Shen & Sun 2018, section 3): one gate per channel, per image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Scale each channel of x by s = gate(expand(act(reduce(pool(x))))), as in equations 2-4."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.activation = activation()
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        z = self.squeeze(x)  # (N, C, 1, 1)
        r = self.activation(self.reduce(z))  # (N, R, 1, 1)
        s = self.gate(self.expand(r))  # (N, C, 1, 1), in 0..1
        scaled: Tensor = x * s
        return scaled
