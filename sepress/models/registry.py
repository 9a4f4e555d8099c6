"""Our own architectures by name: small nets that timm and torchvision lack."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sepress.models.se_mobile import se_mobile
from sepress.models.se_resnet import se_resnet8, se_resnet20, se_resnet56

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "se_resnet8": se_resnet8,
    "se_resnet20": se_resnet20,
    "se_resnet56": se_resnet56,
    "se_mobile": se_mobile,
}
