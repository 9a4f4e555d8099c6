"""SE-ResNets for small images: He et al. 2016 (section 4.2) with SE as Hu et al. 2018 place it (section 3.3).

A 3x3 stem, then three stages of basic blocks with `width`, 2 `width` and 4 `width` channels; 6n + 2 layers
for n blocks a stage. SE recalibrates the residual branch before the addition.
"""

from __future__ import annotations

from torch import Tensor, nn

from sepress.models.squeeze_excitation import SqueezeExcitation


class SEBasicBlock(nn.Module):
    """Two 3x3 convolutions and SE on the residual branch, added to the shortcut."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcitation(channels, max(1, channels // reduction))
        self.act = nn.ReLU()
        # He et al.'s option B (a projection where the shape changes): their option A pads with zeros, which
        # would tie the channels of neighbouring stages to each other.
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.act(self.bn1(self.conv1(x)))
        residual = self.se(self.bn2(self.conv2(residual)))  # (N, C, H, W)
        out: Tensor = self.act(residual + self.shortcut(x))
        return out


class SEResNet(nn.Module):
    """Images (N, in_chans, H, W) -> logits (N, num_classes)."""

    def __init__(self, *, blocks: int, num_classes: int, in_chans: int, width: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        channels = (width, 2 * width, 4 * width)
        inputs = (width, *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    SEBasicBlock(
                        inputs[stage] if block == 0 else channels[stage],
                        channels[stage],
                        stride=2 if stage > 0 and block == 0 else 1,
                        reduction=reduction,
                    )
                    for block in range(blocks)
                )
            )
            for stage in range(3)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `initialise` says; whoever draws the layers' own first weights again calls it after them."""
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def initialise(net: nn.Module) -> None:
    """Kaiming for the convolutions before a norm (He et al. 2015); the rest keeps torch's default.

    The last norm of a block is not zeroed, as some recipes do: an untrained net would then ignore its
    residual branches, and the checks made on it would be empty.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# reduction=4 in all of them: Hu et al.'s 16 would leave one hidden unit at 16 channels.


def se_resnet8(*, num_classes: int = 10, in_chans: int = 3, width: int = 16, reduction: int = 4) -> SEResNet:
    """One block a stage: small enough to train in seconds on a CPU."""
    return SEResNet(blocks=1, num_classes=num_classes, in_chans=in_chans, width=width, reduction=reduction)


def se_resnet20(*, num_classes: int = 10, in_chans: int = 3, width: int = 16, reduction: int = 4) -> SEResNet:
    """Three blocks a stage: the smallest net of He et al.'s section 4.2."""
    return SEResNet(blocks=3, num_classes=num_classes, in_chans=in_chans, width=width, reduction=reduction)


def se_resnet56(*, num_classes: int = 10, in_chans: int = 3, width: int = 16, reduction: int = 4) -> SEResNet:
    """Nine blocks a stage: the depth on which CIFAR pruning results are published."""
    return SEResNet(blocks=9, num_classes=num_classes, in_chans=in_chans, width=width, reduction=reduction)
