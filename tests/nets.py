"""Small networks, one structure each, for tests that need a net whose channels are known by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sepress.device import seeded


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value that matters, and return the net in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
            if parameter.dim() == 1:
                parameter.add_(0.5)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return net.eval()


def conv_bn(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SqueezeExcite(nn.Module):
    """The block of the SENet paper, with 1x1 convolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        return x * self.expand(self.squeeze(s).relu()).sigmoid()


class Head(nn.Module):
    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(-1))


class Plain(nn.Module):
    """conv a -> conv b -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv_bn(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


class Residual(nn.Module):
    """One residual block on a stream of 8; `inner` is free of it."""

    def __init__(self, *, se: bool = False) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = conv_bn(3, 8), conv_bn(8, 6), conv_bn(6, 8)
        self.se = SqueezeExcite(8, 4) if se else nn.Identity()
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.se(self.outer(self.inner(x).relu()))).relu()
        return self.head(x)


class InvertedBottleneck(nn.Module):
    """Expand, depthwise, gate, project: the gate judges the expanded channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = conv_bn(3, 6), conv_bn(6, 12, 1)
        self.depthwise, self.se = conv_bn(12, 12, groups=12), SqueezeExcite(12, 4)
        self.project, self.head = conv_bn(12, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = F.hardswish(self.depthwise(F.hardswish(self.expand(x))))
        return self.head(x + self.project(self.se(h)))


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(3, 6), conv_bn(6, 4), conv_bn(10, 4)
        self.head = Head(14)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        b = self.b(a).relu()
        c = self.c(torch.cat([a, b], 1)).relu()
        return self.head(torch.cat([a, b, c], 1))


class DepthwiseTwice(nn.Module):
    """A depthwise convolution with two filters a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv_bn(3, 6)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depthwise(self.a(x).relu()).relu())


class Grouped(nn.Module):
    """A grouped convolution: 12 -> 8 in 2 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped, self.head = conv_bn(3, 12), conv_bn(12, 8, groups=2), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(self.a(x).relu()).relu())


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = conv_bn(3, 6), nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.a(x).relu()).relu())


class Flattened(nn.Module):
    """A linear layer that reads every position of every channel; the width stands in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.width = conv_bn(3, 6), 6
        self.hidden, self.fc = nn.Linear(6 * 16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_max_pool2d(self.a(x).relu(), 4)
        return self.fc(self.hidden(x.view(x.size(0), self.width * 16)).relu())


class SEAnyDims(nn.Module):
    """An SE net for signals (1 dimension) or volumes (3)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv3d, nn.BatchNorm3d)
        self.a, self.norm = conv(3, 8, 3, padding=1), norm(8)
        self.squeeze, self.expand = nn.Linear(8, 4), nn.Linear(4, 8)
        self.b, self.head = conv(8, 6, 3, padding=1), Head(6)
        self.positions = tuple(range(2, 2 + dims))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        s = self.expand(self.squeeze(x.mean(self.positions)).relu()).sigmoid()
        x = x * s.reshape(*s.shape, *[1] * len(self.positions))
        return self.head(self.b(x).relu())


class InlineSE(nn.Module):
    """A gate written in forward: functional pooling, Linear layers, a clamped hard sigmoid, expand_as."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(8, 6)
        self.fc1, self.fc2, self.head = nn.Linear(8, 4), nn.Linear(4, 8), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        n, c, _, _ = x.shape
        s = F.adaptive_avg_pool2d(x, 1).view(n, c)
        s = torch.clamp(self.fc2(F.relu(self.fc1(s))) / 6 + 0.5, 0, 1).view(n, c, 1, 1)
        return self.head(self.b(x * s.expand_as(x)).relu())


class GatedIdentity(nn.Module):
    """Two gates of one module, the second in place after the add and on channels-last data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8), conv_bn(8, 8)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x) + x * self.one(x.mean((2, 3))).tanh()[:, :, None, None]
        x = x.permute(0, 2, 3, 1).contiguous()
        x *= F.hardsigmoid(self.two(x.mean((1, 2), keepdim=True)))
        return self.head(x.permute(0, 3, 1, 2))


class ScaleAndShift(nn.Module):
    """A gate of 2C that scales and shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.head = conv_bn(3, 8), nn.Linear(8, 16), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        scale, shift = self.fc(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return self.head((x * scale.sigmoid() + shift).relu())


class Tied(nn.Module):
    """One convolution's weight is used by two modules; the stream is 6 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.one, self.two = (
            conv_bn(3, 6),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
        )
        self.two.weight = self.one.weight
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.a(x).relu()).relu()).relu())


class LayerScale(nn.Module):
    """A gain kept as a plain parameter, and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 6), nn.Conv2d(6, 6, 3, padding=1), Head(6)
        self.gain = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(x + self.b(x) * self.gain)


class Shuffle(nn.Module):
    """ShuffleNet's unit: split in halves, work on one, concatenate, shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 12), conv_bn(6, 6), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu().chunk(2, dim=1)
        x = torch.cat([left, self.b(right).relu()], 1)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class StoredSplit(nn.Module):
    """Parts of unequal stored sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [8, 4]
        self.a, self.b, self.c, self.head = conv_bn(3, 12), conv_bn(8, 6), conv_bn(4, 6), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(self.a(x).relu(), self.widths, dim=1)
        return self.head(torch.cat([self.b(left), self.c(right)], 1).relu())


class WeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.b = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 6, 3, padding=1))
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Standardised(nn.Module):
    """Weight standardisation, whose statistics run over the input channels, and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = StandardisedConv(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.b, self.head = StandardisedConv(8, 6, 3, padding=1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norm(self.a(x)).relu()).relu())


class Normed(nn.Module):
    """Layer norm over channels, as ConvNeXt has it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x).permute(0, 2, 3, 1))
        return self.head(self.b(x).relu().permute(0, 3, 1, 2))


class TwoOutputs(nn.Module):
    """A dict with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.map, self.head = conv_bn(3, 8), conv_bn(8, 6), nn.Conv2d(6, 2, 1), Head(8)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        a = self.a(x).relu()
        b = self.b(a).relu()
        return {"logits": self.head(a), "maps": (self.map(b), b.mean((1, 2, 3)))}


class Attention(nn.Module):
    """Self-attention over positions, 2 heads of width 6, with its scale as a stored float."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_width, self.scale = 2, 6, 6**-0.5
        self.a, self.qkv, self.out = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 36), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)  # (N, L, C)
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(n, length, self.heads * self.head_width)
        return self.head((x + self.out(y)).mean(1))


class PaddedShortcut(nn.Module):
    """ResNet's option A: the shortcut is padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 6), conv_bn(6, 10), Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.head(self.b(x) + F.pad(x, (0, 0, 0, 0, 0, 4)))


class ChannelConv(nn.Module):
    """ECA: a gate from a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.along, self.b = conv_bn(3, 8), nn.Conv1d(1, 1, 3, padding=1, bias=False), conv_bn(8, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        s = self.along(x.mean((2, 3))[:, None]).sigmoid()  # (N, 1, C)
        return self.head(self.b(x * s.transpose(1, 2)[..., None]).relu())


class FlatBank(nn.Module):
    """Conditional convolution as timm has it: sigmoid routing over experts that lie flat, with biases."""

    def __init__(self, inputs: int, outputs: int, experts: int = 3, groups: int = 1) -> None:
        super().__init__()
        self.inputs, self.outputs, self.groups = inputs, outputs, groups
        self.weight = nn.Parameter(torch.randn(experts, outputs * (inputs // groups) * 9) * 0.3)
        self.bias = nn.Parameter(torch.randn(experts, outputs))

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = torch.matmul(routing, self.weight)
        weight = weight.view(n * self.outputs, self.inputs // self.groups, 3, 3)
        bias = torch.matmul(routing, self.bias).view(n * self.outputs)
        y = F.conv2d(x.reshape(1, n * c, h, w), weight, bias, padding=1, groups=n * self.groups)
        return y.view(n, self.outputs, h, w)


class Conditional(nn.Module):
    """Three of these with one routing, the middle one depthwise, as in a CondConv residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.routing, self.head = conv_bn(3, 8), nn.Linear(8, 3), Head(8)
        self.expand, self.depthwise = FlatBank(8, 12), FlatBank(12, 12, groups=12)
        self.project = FlatBank(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        routing = self.routing(x.mean((2, 3))).sigmoid()
        y = self.depthwise(self.expand(x, routing).relu(), routing).relu()
        return self.head(x + self.project(y, routing))


class StackedBank(nn.Module):
    """A bank (experts, out, in, k, k) mixed by a softmax, in one of the ways in which this is written."""

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        self.way, self.outputs, self.attend = way, outputs, nn.Linear(inputs, 3)
        self.weight = nn.Parameter(torch.randn(3, outputs, inputs, 3, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        a = self.attend(x.mean((2, 3))).softmax(1)
        if self.way == "einsum":
            weight = torch.einsum("nk,koihw->noihw", a, self.weight).flatten(0, 1)
        elif self.way == "sum":
            weight = (a[:, :, None, None, None, None] * self.weight).sum(1)
            weight = weight.view(-1, *self.weight.shape[2:])
        else:
            weight = (a @ self.weight.view(len(self.weight), -1)).view(-1, *self.weight.shape[2:])
        return F.conv2d(x.reshape(1, -1, h, w), weight, padding=1, groups=n).view(n, self.outputs, h, w)


class Dynamic(nn.Module):
    """Dynamic convolutions, each mixed in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), Head(7)
        self.a, self.b, self.c = (
            StackedBank(8, 6, "sum"),
            StackedBank(6, 8, "einsum"),
            StackedBank(8, 7, ""),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for layer in (self.a, self.b, self.c):
            x = layer(x).relu()
        return self.head(x)


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "se residual": lambda: Residual(se=True),
    "inverted bottleneck": InvertedBottleneck,
    "dense": Dense,
    "depthwise": DepthwiseTwice,
    "grouped": Grouped,
    "transposed": Transposed,
    "flattened": Flattened,
    "se 1d": lambda: SEAnyDims(1),
    "se 3d": lambda: SEAnyDims(3),
    "inline se": InlineSE,
    "gated identity": GatedIdentity,
    "scale and shift": ScaleAndShift,
    "tied": Tied,
    "layer scale": LayerScale,
    "shuffle": Shuffle,
    "stored split": StoredSplit,
    "weight norm": WeightNorm,
    "standardised": Standardised,
    "layer norm": Normed,
    "two outputs": TwoOutputs,
    "attention": Attention,
    "padded shortcut": PaddedShortcut,
    "channel conv": ChannelConv,
    "conditional": Conditional,
    "dynamic": Dynamic,
}
INPUT_SHAPES = {"se 1d": (3, 24), "se 3d": (3, 4, 6, 6)}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a lively net and three inputs for it."""
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(3, *INPUT_SHAPES.get(name, (3, 12, 12)), generator=generator)
    return lively(NETS[name](), seed), inputs


class SmallNet(nn.Module):
    """Convolution, norm, pooling and a head, in one to three dimensions."""

    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        self.conv, self.norm, self.fc = conv(3, 8, 3), norm(8), nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().flatten(2).mean(2)

    def forward(self, x: Tensor) -> object:
        return self.fc(self.features(x))


def images(count: int = 6, *shape: int) -> Tensor:
    """The same noise each time: 3 x 12 x 12 unless a shape is given."""
    with seeded(0):
        return torch.randn(count, *(shape or (3, 12, 12)))
