"""Squeeze-and-Excitation as other people write it: small nets, each after the manner of code in public use.

`NETS` names a net's builder, its input's shape and its gates, counted in the code below. Nothing here
looks like sepress's own nets on purpose: inline functions, odd poolings, odd squashes, odd containers.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from nets import lively
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def conv3(i: int, o: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, stride, 1, groups=groups, bias=False)


# ---- SE with linear layers, and blocks around it -----------------------------------------------
class SELayer(nn.Module):
    """The one of most GitHub SE-ResNets: pool, view, two bias-free Linear in a Sequential, expand_as."""

    def __init__(self, channel: int, reduction: int = 4) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SEBasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(inplanes, planes, stride), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.se = conv3(planes, planes), nn.BatchNorm2d(planes), SELayer(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += residual
        return self.relu(out)


class CifarSEResNet(nn.Module):
    def __init__(self, block: type[nn.Module] = SEBasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(3, 16), nn.BatchNorm2d(16)
        self.layer1, self.layer2 = (
            nn.Sequential(block(16, 16), block(16, 16)),
            nn.Sequential(block(16, 32, 2)),
        )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer2(self.layer1(x)))
        x = x.view(x.size(0), -1)
        return self.fc(x)


class CaffeSEModule(nn.Module):
    """The converted Caffe SENet's: 1x1 convolutions with bias, named fc1 and fc2."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // reduction, kernel_size=1, padding=0)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // reduction, channels, kernel_size=1, padding=0)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        module_input = x
        x = self.avg_pool(x)
        x = self.fc1(x)
        x = self.relu(x)
        x = self.fc2(x)
        x = self.sigmoid(x)
        return module_input * x


class CaffeBottleneck(nn.Module):
    """SE-ResNeXt's bottleneck: grouped convolution, `se_module(out) + residual`, ceil-mode pooling before."""

    def __init__(self, inplanes: int, planes: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3(planes, planes, groups=groups), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, inplanes, 1, bias=False), nn.BatchNorm2d(inplanes)
        self.relu, self.se_module = nn.ReLU(inplace=True), CaffeSEModule(inplanes, 4)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = self.se_module(out) + residual
        return self.relu(out)


class CaffeSENet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer0 = [
            ("conv1", conv3(3, 16)),
            ("bn1", nn.BatchNorm2d(16)),
            ("relu1", nn.ReLU(inplace=True)),
            ("pool", nn.MaxPool2d(3, stride=2, ceil_mode=True)),
        ]
        self.layer0 = nn.Sequential(OrderedDict(layer0))
        self.layer1 = nn.Sequential(CaffeBottleneck(16, 8, 2), CaffeBottleneck(16, 8, 2))
        self.avg_pool, self.dropout, self.last_linear = nn.AvgPool2d(7, 1), nn.Dropout(0.2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.avg_pool(self.layer1(self.layer0(x))))
        return self.last_linear(x.view(x.size(0), -1))


class IdentitySEBlock(nn.Module):
    """SE on the identity branch, before the convolutions (SE-PRE, SE-Identity of the paper's ablation)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre, self.side, self.body = (
            SELayer(width),
            SELayer(width),
            nn.Sequential(
                nn.BatchNorm2d(width),
                nn.ReLU(),
                conv3(width, 12),
                nn.BatchNorm2d(12),
                nn.ReLU(),
                conv3(12, width),
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.side(x) + self.body(self.pre(x))


class IdentitySENet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.norm, self.fc = (
            conv3(3, 8),
            IdentitySEBlock(8),
            nn.BatchNorm2d(8),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.block(self.stem(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


# ---- mobile nets ---------------------------------------------------------------------------------
class HSigmoid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + 3) / 6


class HSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = HSigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)


class HardSELayer(nn.Module):
    def __init__(self, channel: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, 4), nn.ReLU(inplace=True), nn.Linear(4, channel), HSigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class InvertedResidual(nn.Module):
    """MobileNetV3's block with everything in one Sequential and SE after the depthwise activation."""

    def __init__(self, inp: int, hidden: int, oup: int, *, se_first: bool = False) -> None:
        super().__init__()
        self.identity = inp == oup
        tail: list[nn.Module] = (
            [HardSELayer(hidden), HSwish()] if se_first else [HSwish(), HardSELayer(hidden)]
        )
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            HSwish(),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            *tail,
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


class MobileV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = [
            InvertedResidual(8, 24, 8, se_first=True),
            InvertedResidual(8, 24, 12),
            InvertedResidual(12, 20, 12),
        ]
        self.features = nn.Sequential(conv3(3, 8, 2), nn.BatchNorm2d(8), HSwish(), *blocks)
        self.classifier = nn.Sequential(nn.Linear(12, 16), HSwish(), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(3).mean(2))


class SwishFunction(torch.autograd.Function):
    """A memory-efficient swish with its own backward."""

    @staticmethod
    def forward(ctx: object, i: Tensor) -> Tensor:
        ctx.save_for_backward(i)  # type: ignore[attr-defined]
        return i * torch.sigmoid(i)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        (i,) = ctx.saved_tensors  # type: ignore[attr-defined]
        s = torch.sigmoid(i)
        return grad * (s * (1 + i * (1 - s)))


class MemoryEfficientSwish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SwishFunction.apply(x)


class SamePadConv(nn.Conv2d):
    """TensorFlow's 'same' padding, computed from the image."""

    def forward(self, x: Tensor) -> Tensor:
        ih, iw = x.size()[-2:]
        kh, kw = self.weight.size()[-2:]
        sh, sw = self.stride
        pad_h = max((math.ceil(ih / sh) - 1) * sh + kh - ih, 0)
        pad_w = max((math.ceil(iw / sw) - 1) * sw + kw - iw, 0)
        if pad_h > 0 or pad_w > 0:
            x = F.pad(x, [pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class PlainMBConv(nn.Module):
    """EfficientNet's block of the popular PyTorch port: functional squeeze, drop_connect by hand."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self._expand_conv, self._bn0 = SamePadConv(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self._depthwise_conv = SamePadConv(hidden, hidden, 3, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden)
        self._se_reduce, self._se_expand = SamePadConv(hidden, 4, 1), SamePadConv(4, hidden, 1)
        self._project_conv, self._bn2 = SamePadConv(hidden, width, 1, bias=False), nn.BatchNorm2d(width)
        self._swish = MemoryEfficientSwish()

    def forward(self, inputs: Tensor, drop_connect_rate: float = 0.0) -> Tensor:
        x = self._swish(self._bn0(self._expand_conv(inputs)))
        x = self._swish(self._bn1(self._depthwise_conv(x)))
        x_squeezed = F.adaptive_avg_pool2d(x, 1)
        x_squeezed = self._se_expand(self._swish(self._se_reduce(x_squeezed)))
        x = torch.sigmoid(x_squeezed) * x
        x = self._bn2(self._project_conv(x))
        if self.training and drop_connect_rate:
            keep = 1 - drop_connect_rate
            random = keep + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
            x = x / keep * torch.floor(random)
        return x + inputs


class PlainEfficientNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SamePadConv(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self._blocks = nn.ModuleList([PlainMBConv(8, 24), PlainMBConv(8, 24)])
        self._fc, self._swish = nn.Linear(8, 5), MemoryEfficientSwish()

    def forward(self, x: Tensor) -> Tensor:
        x = self._swish(self._bn0(self._conv_stem(x)))
        for index, block in enumerate(self._blocks):
            x = block(x, drop_connect_rate=0.2 * index / len(self._blocks))
        return self._fc(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))


# ---- poolings, squashes and layouts --------------------------------------------------------------
class EinsumSE(nn.Module):
    """Raw weight matrices, einsum throughout, mean over a flattened view."""

    def __init__(self, c: int = 8, r: int = 4) -> None:
        super().__init__()
        self.stem = conv3(3, c)
        self.w1, self.w2 = nn.Parameter(torch.randn(c, r)), nn.Parameter(torch.randn(r, c))
        self.b1, self.b2 = nn.Parameter(torch.zeros(r)), nn.Parameter(torch.zeros(c))
        self.head = nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        z = torch.einsum("bchw->bc", x) / (x.shape[2] * x.shape[3])
        z = torch.einsum("bc,cr->br", z, self.w1) + self.b1
        s = torch.sigmoid(torch.einsum("br,rc->bc", F.gelu(z), self.w2) + self.b2)
        x = torch.einsum("bchw,bc->bchw", x, s)
        return self.head(F.relu(x).flatten(2).mean(-1))


class EinsumMaps(nn.Module):
    """1x1 convolutions as einsum over maps, weights first, and as matmul of flat maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.w, self.v = (
            conv3(3, 8),
            nn.Parameter(torch.randn(6, 8)),
            nn.Parameter(torch.randn(10, 6)),
        )
        self.se, self.head = SELayer(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(torch.einsum("bchw,kc->bkhw", F.relu(self.stem(x)), self.w))
        n, _, h, w = x.shape
        x = (self.v @ x.flatten(2)).view(n, -1, h, w)
        return self.head(self.se(x).mean((2, 3)))


class ChannelsLastSE(nn.Module):
    """NHWC inside: Linear layers on the last axis, LayerNorm, a gate on permuted data."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 12, 2, 2), nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.gate = nn.Sequential(nn.Linear(24, 6), nn.GELU(), nn.Linear(6, 24), nn.Hardsigmoid())
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        y = F.gelu(self.up(self.norm(x)))
        y = y * self.gate(y.mean(dim=(1, 2), keepdim=True))
        x = x + self.down(y)
        return self.head(x.mean([1, 2]))


class NormedSE(nn.Module):
    """BN inside the block, and a fixed-size average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.pool = conv3(3, 8), nn.BatchNorm2d(8), nn.AvgPool2d(12)
        self.se = nn.Sequential(
            nn.Conv2d(8, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        return self.head(
            (x * torch.clamp(self.se(self.pool(x)) * 0.2 + 0.5, min=0.0, max=1.0)).mean((-2, -1))
        )


class AvgMaxGate(nn.Module):
    """CBAM's channel part: one shared MLP on average and maximum, added, squashed; then its spatial part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3(3, 16)
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))
        self.spatial, self.bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        total = None
        for kind in ("avg", "max"):
            size = (x.size(2), x.size(3))
            pooled = (
                F.avg_pool2d(x, size, stride=size) if kind == "avg" else F.max_pool2d(x, size, stride=size)
            )
            raw = self.mlp(pooled)
            total = raw if total is None else total + raw
        x = x * torch.sigmoid(total).unsqueeze(2).unsqueeze(3).expand_as(x)
        compressed = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        x = x * torch.sigmoid(self.bn(self.spatial(compressed)))
        return self.head(x.mean((2, 3)))


class ConcurrentSE(nn.Module):
    """scSE: channel and spatial excitation, added (the spatial one is no gate of channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv3(3, 8), conv3(8, 8)
        self.cse = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8, 4, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 8, 1),
            nn.Sigmoid(),
        )
        self.sse, self.head = nn.Sequential(nn.Conv2d(8, 1, 1), nn.Sigmoid()), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x)))
        x = x * self.cse(x) + x * self.sse(x)
        return self.head(x.mean((2, 3)))


class SharedSE(nn.Module):
    """One SE module called after each of two layers, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.se, self.unused = conv3(3, 8), conv3(8, 8), SELayer(8), SELayer(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(F.relu(self.a(x)))
        return self.head(self.se(F.relu(self.b(x))).mean((2, 3)))


class SimpleGateNet(nn.Module):
    """NAFNet: a gate without any squash, halves multiplied with each other, learned gains."""

    def __init__(self) -> None:
        super().__init__()
        self.intro, self.ending = conv3(3, 8), conv3(8, 3)
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.beta = nn.Parameter(torch.zeros((1, 8, 1, 1)))

    def forward(self, inp: Tensor) -> Tensor:
        x = self.intro(inp)
        y1, y2 = self.conv2(self.conv1(x)).chunk(2, dim=1)
        y = y1 * y2
        y = self.conv3(y * self.sca(y))
        return self.ending(x + y * self.beta) + inp


class ResponseNormNet(nn.Module):
    """ConvNeXt-V2's global response norm on NHWC data: x * its own norm / the mean over channels. No SE."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 16), nn.Linear(16, 8)
        self.gamma, self.beta = nn.Parameter(torch.zeros(1, 1, 1, 16)), nn.Parameter(torch.zeros(1, 1, 1, 16))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        y = F.gelu(self.up(x))
        gx = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        y = self.gamma * (y * nx) + self.beta + y
        return self.head((x + self.down(y)).mean((1, 2)))


class FilmSE(nn.Module):
    """A gate of twice the channels that scales by 1 + gamma and shifts by beta (Leela-like SE)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = (
            conv3(3, 8),
            nn.Linear(8, 4),
            nn.Linear(4, 16),
            nn.Linear(8, 5),
        )
        self.c = 8

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
        gamma, beta = torch.split(y, self.c, dim=1)
        z = torch.sigmoid(gamma)[:, :, None, None] * x + beta[:, :, None, None]
        return self.head(F.relu(z + x).mean((2, 3)))


# ---- whole families ------------------------------------------------------------------------------
class SRChannelAttention(nn.Module):
    """RCAN's residual-in-residual net for super-resolution, with a pixel shuffle at the end."""

    def __init__(self, feats: int = 8) -> None:
        super().__init__()

        def rcab() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "body": nn.Sequential(conv3(feats, feats), nn.ReLU(True), conv3(feats, feats)),
                    "ca": nn.Sequential(
                        nn.AdaptiveAvgPool2d(1),
                        nn.Conv2d(feats, feats // 2, 1),
                        nn.ReLU(inplace=True),
                        nn.Conv2d(feats // 2, feats, 1),
                        nn.Sigmoid(),
                    ),
                }
            )

        self.head, self.blocks, self.tail = conv3(3, feats), nn.ModuleList([rcab(), rcab()]), conv3(feats, 3)
        self.up = nn.Sequential(nn.Conv2d(feats, 4 * feats, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - 0.5)
        res = x
        for block in self.blocks:
            y = block["body"](res)
            res = res + y * block["ca"](y)
        return self.tail(self.up(x + res)) + 0.5


class SEUNet(nn.Module):
    """SE in the encoder and the decoder, skips concatenated, interpolation to the skip's size, a mask out."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = SEBasicBlock(3, 8), SEBasicBlock(8, 16, 2), SEBasicBlock(16, 24, 2)
        self.up2, self.dec2 = nn.ConvTranspose2d(24, 16, 2, 2), conv3(32, 16)
        self.dec1, self.cse = conv3(24, 8), SELayer(8)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        e1 = self.enc1(x)
        e2 = self.enc2(e1)
        d2 = F.relu(self.dec2(torch.cat([self.up2(self.enc3(e2)), e2], dim=1)))
        up = F.interpolate(d2, size=e1.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(self.cse(F.relu(self.dec1(torch.cat((up, e1), 1)))))


class SEDense(nn.Module):
    """Features collected in a list and concatenated for every layer; SE after each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3(3, 8)
        self.layers = nn.ModuleList(
            [
                nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), conv3(8 + 4 * i, 4), SELayer(4, 2))
                for i in range(3)
            ]
        )
        self.norm, self.classifier = nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        out = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(out, (1, 1)).view(x.size(0), -1))


class SEInception(nn.Module):
    """Branches of four kinds side by side, SE on their concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1 = conv3(3, 8), nn.Conv2d(8, 4, 1)
        self.b2 = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), conv3(4, 6))
        self.b3 = nn.Sequential(
            nn.Conv2d(8, 2, 1),
            nn.Conv2d(2, 4, (1, 5), padding=(0, 2)),
            nn.Conv2d(4, 4, (5, 1), padding=(2, 0)),
        )
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 2, 1))
        self.se, self.fc = SELayer(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.se(F.relu(torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)))
        return self.fc(x.mean(dim=(2, 3)))


class SEShuffle(nn.Module):
    """ShuffleNet v1's unit: grouped 1x1 convolutions around a shuffle, SE at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 2
        self.stem, self.one = conv3(3, 16), nn.Conv2d(16, 8, 1, groups=2, bias=False)
        self.depthwise, self.two = conv3(8, 8, groups=8), nn.Conv2d(8, 16, 1, groups=2, bias=False)
        self.se, self.fc = SELayer(16), nn.Linear(16, 5)

    def shuffle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.data.size()
        x = x.view(n, self.groups, c // self.groups, h, w)
        return torch.transpose(x, 1, 2).contiguous().view(n, -1, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.two(self.depthwise(self.shuffle(F.relu(self.one(x)))))
        return self.fc(F.relu(x + self.se(y)).mean((2, 3)))


class C2fSE(nn.Module):
    """A detector's cross-stage block: chunk, a growing list, concatenation, SE; three scales out."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 6
        self.stem, self.cv1, self.cv2 = conv3(3, 8), nn.Conv2d(8, 12, 1), nn.Conv2d(24, 12, 1)
        self.m = nn.ModuleList([conv3(6, 6), conv3(6, 6)])
        self.att, self.down = SELayer(12), conv3(12, 12, 2)
        self.heads = nn.ModuleList([nn.Conv2d(12, 7, 1), nn.Conv2d(12, 7, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        y = list(self.cv1(F.silu(self.stem(x))).split((self.c, self.c), 1))
        y.extend(F.silu(m(y[-1])) for m in self.m)
        p3 = self.att(F.silu(self.cv2(torch.cat(y, 1))))
        return [head(p) for head, p in zip(self.heads, (p3, F.silu(self.down(p3))), strict=True)]


class Res2Block(nn.Module):
    """ECAPA-TDNN's dilated Res2Net block over chunks, with SE for signals."""

    def __init__(self, channels: int = 12, scale: int = 3) -> None:
        super().__init__()
        width = channels // scale
        self.scale, self.one, self.two = (
            scale,
            nn.Conv1d(channels, channels, 1),
            nn.Conv1d(channels, channels, 1),
        )
        self.convs = nn.ModuleList(
            [nn.Conv1d(width, width, 3, padding=2, dilation=2) for _ in range(scale - 1)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(scale - 1)])
        self.se1, self.se2 = nn.Conv1d(channels, 4, 1), nn.Conv1d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for i, part in enumerate(torch.chunk(F.relu(self.one(x)), self.scale, dim=1)):
            if i == 0:
                y = part
            elif i == 1:
                y = F.relu(self.norms[0](self.convs[0](part)))
            else:
                y = F.relu(self.norms[i - 1](self.convs[i - 1](part + y)))
            parts.append(y)
        y = F.relu(self.two(torch.cat(parts, dim=1)))
        s = y.mean(dim=2, keepdim=True)
        s = torch.sigmoid(self.se2(torch.relu(self.se1(s))))
        return s * y + x


class EcapaTdnn(nn.Module):
    """Speaker embedding: blocks' outputs concatenated, attentive statistics pooling with global context."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.b1, self.b2 = nn.Conv1d(10, 12, 5, padding=2), Res2Block(), Res2Block()
        self.mfa, self.tdnn, self.attend = nn.Conv1d(24, 16, 1), nn.Conv1d(48, 8, 1), nn.Conv1d(8, 16, 1)
        self.norm, self.fc = nn.BatchNorm1d(32), nn.Conv1d(32, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x1 = self.b1(x)
        x2 = self.b2(x1)
        x = F.relu(self.mfa(torch.cat([x1, x2], dim=1)))
        length = x.shape[-1]
        mean = x.mean(2).unsqueeze(2).repeat(1, 1, length)
        std = x.var(2).clamp(1e-6).sqrt().unsqueeze(2).repeat(1, 1, length)
        attention = self.attend(torch.tanh(self.tdnn(torch.cat([x, mean, std], dim=1))))
        attention = F.softmax(attention, dim=2)
        mean = (attention * x).sum(2)
        std = torch.sqrt((attention * (x - mean.unsqueeze(2)).pow(2)).sum(2).clamp(1e-6))
        return self.fc(self.norm(torch.cat((mean, std), dim=1)).unsqueeze(2)).squeeze(2)


class X3D(nn.Module):
    """Video: factorised 3-D convolutions, SE over time and space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_xy = nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.stem_t = nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=8, bias=False)
        self.a, self.b = (
            nn.Conv3d(8, 16, 1, bias=False),
            nn.Conv3d(16, 16, 3, padding=1, groups=16, bias=False),
        )
        self.bn, self.c, self.head = nn.BatchNorm3d(16), nn.Conv3d(16, 8, 1, bias=False), nn.Linear(8, 5)
        self.block = nn.Sequential(nn.Conv3d(16, 8, 1), nn.ReLU(), nn.Conv3d(8, 16, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_t(self.stem_xy(x)))
        y = self.bn(self.b(F.relu(self.a(x))))
        y = y * self.block(y.mean(dim=[2, 3, 4], keepdim=True))
        x = x + self.c(y * torch.sigmoid(y))
        return self.head(F.adaptive_avg_pool3d(x, 1).flatten(1))


# ---- weights that are not plain parameters -------------------------------------------------------
class OldWeightNorm(nn.Module):
    """torch.nn.utils.weight_norm (the old hook) and spectral_norm as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1), dim=0)
            self.b = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.se, self.head = SELayer(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.se(self.b(F.elu(self.a(x)))).mean((2, 3)))


class TiedSE(nn.Module):
    """Two blocks share their SE weights, and the classifier's weight is an embedding that is scored twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv3(3, 8), conv3(8, 8)
        self.se1, self.se2, self.head = SELayer(8), SELayer(8), nn.Linear(8, 5)
        self.se2.fc[0].weight, self.se2.fc[2].weight = self.se1.fc[0].weight, self.se1.fc[2].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.se2(F.relu(self.b(self.se1(F.relu(self.a(x)))))).mean((2, 3)))


class BlurPoolSE(nn.Module):
    """A fixed blur filter in a buffer, one copy a channel, reflection padding, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.se, self.head = conv3(3, 8), nn.PReLU(8), SELayer(8), nn.Linear(8, 5)
        kernel = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("filt", (kernel[:, None] * kernel[None] / 16)[None, None].repeat(8, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.filt, stride=2, groups=x.shape[1])
        return self.head(self.se(x).mean((2, 3)))


class RepSE(nn.Module):
    """RepVGG's three branches before they are merged, and a gate after their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dense, self.point = conv3(3, 8), conv3(8, 8), nn.Conv2d(8, 8, 1, bias=False)
        self.bn1, self.bn2, self.skip = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.se, self.head = CaffeSEModule(8, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn1(self.dense(x)) + self.bn2(self.point(x)) + self.skip(x)
        return self.head(F.relu(self.se(y)).mean((2, 3)))


# ---- forms of forward ----------------------------------------------------------------------------
class Checkpointed(CifarSEResNet):
    """Gradient checkpointing around a stage, and stochastic depth while training."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = checkpoint(self.layer1, x, use_reentrant=False)
        if self.training:
            x = x * (torch.rand(x.size(0), 1, 1, 1) < 0.8).to(x.dtype) / 0.8
        return self.fc(torch.flatten(self.avgpool(self.layer2(x)), 1))


Pair = namedtuple("Pair", ["logits", "features"])


class NamedOutputs(nn.Module):
    """Features for a loss beside the logits, in a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.se, self.b, self.fc = conv3(3, 8), SELayer(8), conv3(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Pair:
        features = F.relu(self.b(self.se(F.relu(self.a(x))))).mean((2, 3))
        return Pair(self.fc(features), features)


@dataclass
class Prediction:
    logits: Tensor
    hidden: list[Tensor] = dataclasses.field(default_factory=list)


class DataclassOutputs(NamedOutputs):
    def forward(self, x: Tensor) -> Prediction:  # type: ignore[override]
        features = F.relu(self.b(self.se(F.relu(self.a(x))))).mean((2, 3))
        return Prediction(self.fc(features), [features])


class Backbone(nn.Module):
    """A feature extractor that returns an ordered dict of stages, under a small pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"c2": SEBasicBlock(3, 8), "c3": SEBasicBlock(8, 16, 2)})
        self.lateral = nn.ModuleDict({"c2": nn.Conv2d(8, 6, 1), "c3": nn.Conv2d(16, 6, 1)})

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = OrderedDict()
        for name, stage in self.stages.items():
            x = stage(x)
            maps[name] = self.lateral[name](x)
        maps["c2"] = maps["c2"] + F.interpolate(maps["c3"], scale_factor=2.0, mode="nearest")
        return maps


class SerializedMBConv(nn.Module):
    """A functional net: one forward that walks a list of (kind, module), in place where it can."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            [conv3(3, 12), nn.BatchNorm2d(12), nn.SiLU(True), SELayer(12), conv3(12, 6)]
        )
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.classifier(torch.nn.functional.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])


@dataclass(frozen=True)
class Sample:
    """A net, the shape of one input and the gates that its code has."""

    build: Callable[[], nn.Module]
    gates: int
    shape: tuple[int, ...] = (3, 12, 12)


NETS: dict[str, Sample] = {
    "github se-resnet": Sample(CifarSEResNet, 3),
    "caffe se-resnext": Sample(CaffeSENet, 2, (3, 15, 15)),
    "se before and beside": Sample(IdentitySENet, 2),
    "mobilenetv3 in sequentials": Sample(MobileV3, 3),
    "efficientnet port": Sample(PlainEfficientNet, 2, (3, 13, 13)),
    "einsum": Sample(EinsumSE, 1),
    "einsum over maps": Sample(EinsumMaps, 1),
    "channels last": Sample(ChannelsLastSE, 1),
    "bn inside": Sample(NormedSE, 1),
    "cbam": Sample(AvgMaxGate, 1),
    "scse": Sample(ConcurrentSE, 1),
    "shared module": Sample(SharedSE, 2),
    "no squash": Sample(SimpleGateNet, 1),
    "response norm": Sample(ResponseNormNet, 0),
    "scale and shift": Sample(FilmSE, 1),
    "super-resolution": Sample(SRChannelAttention, 2),
    "u-net": Sample(SEUNet, 4),
    "densenet": Sample(SEDense, 3),
    "inception": Sample(SEInception, 1),
    "shufflenet": Sample(SEShuffle, 1),
    "detector": Sample(C2fSE, 1),
    "ecapa-tdnn": Sample(EcapaTdnn, 2, (10, 20)),
    "x3d": Sample(X3D, 1, (3, 4, 8, 8)),
    "computed weights": Sample(OldWeightNorm, 1),
    "tied gates": Sample(TiedSE, 2),
    "blur filters": Sample(BlurPoolSE, 1),
    "repvgg": Sample(RepSE, 1),
    "checkpointed": Sample(Checkpointed, 3),
    "named tuple": Sample(NamedOutputs, 1),
    "dataclass": Sample(DataclassOutputs, 1),
    "pyramid": Sample(Backbone, 2),
    "module list": Sample(SerializedMBConv, 1),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a net whose every parameter matters, and three inputs."""
    sample = NETS[name]
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    return lively(sample.build()), torch.randn(3, *sample.shape, generator=generator)
