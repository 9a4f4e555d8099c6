"""An inverted-bottleneck net with SE for 32-pixel images, in the manner of MobileNetV3.

Blocks of Sandler et al. 2018 (section 3.3), SE on the expanded channels, hard-swish and hard-sigmoid as in
Howard et al. 2019 (section 5); fewer strides and stages than theirs, since CIFAR's images are small.
"""

from __future__ import annotations

from torch import Tensor, nn

from sepress.models.se_resnet import initialise
from sepress.models.squeeze_excitation import SqueezeExcitation

# (expansion, output channels, blocks, stride of the first block)
STAGES = ((2, 16, 1, 1), (3, 24, 2, 2), (4, 40, 2, 2), (4, 80, 2, 2))
STEM = 16
HEAD = 240


class InvertedBottleneck(nn.Module):
    """1x1 expand, 3x3 depthwise, SE on the hidden channels, 1x1 project without activation."""

    def __init__(
        self, in_channels: int, channels: int, *, expansion: int, stride: int, reduction: int
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act = nn.Hardswish()
        self.se = SqueezeExcitation(hidden, max(8, hidden // reduction), gate=nn.Hardsigmoid)
        self.project = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.bn1(self.expand(x)))  # (N, hidden, H, W)
        h = self.se(self.act(self.bn2(self.depthwise(h))))
        out: Tensor = self.bn3(self.project(h))
        return x + out if self.residual else out


class SEMobile(nn.Module):
    """Images (N, in_chans, H, W) -> logits (N, num_classes)."""

    def __init__(self, *, num_classes: int, in_chans: int, width_mult: float, reduction: int) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, round(channels * width_mult / 8) * 8)

        width = scaled(STEM)
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.Hardswish()
        blocks: list[nn.Module] = []
        for expansion, channels, count, first_stride in STAGES:
            for index in range(count):
                stride = first_stride if index == 0 else 1
                out = scaled(channels)
                blocks.append(
                    InvertedBottleneck(width, out, expansion=expansion, stride=stride, reduction=reduction)
                )
                width = out
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(width, scaled(HEAD), 1, bias=False)
        self.bn2 = nn.BatchNorm2d(scaled(HEAD))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(scaled(HEAD), num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `initialise` says; whoever draws the layers' own first weights again calls it after them."""
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.bn1(self.conv1(x))))
        x = self.act(self.bn2(self.conv2(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def se_mobile(
    *, num_classes: int = 10, in_chans: int = 3, width_mult: float = 1.0, reduction: int = 4
) -> SEMobile:
    """7.7 million MACs at 32 pixels; reduction 4 as in MobileNetV3."""
    return SEMobile(num_classes=num_classes, in_chans=in_chans, width_mult=width_mult, reduction=reduction)
