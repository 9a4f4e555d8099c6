"""Image -> uint8 tensor of the input size -> augmented -> normalised; batch-wise wherever sizes agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as pixels

from sepress.data.images import Mode
from sepress.errors import InputError
from sepress.types import Preprocessing

SMALL = 64  # up to this input size images are shifted by cropping, above it resized at random
_LONGEST = 16  # a strip's longer side, in shorter sides, beyond which its ends are cut before resizing
_DEGREES, _SCALE, _SHIFT = 10.0, 0.1, 0.07  # of the digits' augmentation; 0.07 * 28 px = 2 px

BatchAugment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Prepare:
    """Resize the shorter side to size / crop_pct and crop the centre: -> uint8 (C, H, W).

    An image that has the input's size already is taken as it is.
    """

    mode: Mode
    height: int
    width: int
    crop_pct: float
    interpolation: InterpolationMode

    def __call__(self, image: Image.Image) -> Tensor:
        if image.size != (self.width, self.height):
            image = pixels.resize(
                _without_ends(image),
                self._covering(image.size),
                interpolation=self.interpolation,
                antialias=True,
            )
            image = pixels.center_crop(image, [self.height, self.width])
        return _to_tensor(image)

    def _covering(self, size: tuple[int, int]) -> list[int]:
        """The (height, width) that just covers the input's size / crop_pct, in the image's proportions."""
        width, height = min(size[0], size[1] * _LONGEST), min(size[1], size[0] * _LONGEST)
        rows, columns = round(self.height / self.crop_pct), round(self.width / self.crop_pct)
        if rows * width >= columns * height:
            return [rows, rows * width // height]
        return [columns * height // width, columns]


@dataclass(frozen=True)
class RandomView:
    """A random crop of random size and shape, mirrored half the time: -> uint8 (C, H, W).

    (Szegedy et al. 2015; the usual training view of large photographs.) Draws from torch's global
    generator, as torchvision's transforms do; callers seed it.
    """

    prepare: Prepare

    def __call__(self, image: Image.Image) -> Tensor:
        size = [self.prepare.height, self.prepare.width]
        crop = v2.RandomResizedCrop(size, interpolation=self.prepare.interpolation, antialias=True)
        return _to_tensor(v2.RandomHorizontalFlip()(crop(image)))


def build_prepare(preprocessing: Preprocessing) -> Prepare:
    """Check the figures (InputError) and build the deterministic path from image to tensor."""
    shape = preprocessing.input_size
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise InputError(
            f"images can't feed an input of shape {tuple(shape)}",
            remedy="Expected channels (1 or 3), height, width; the Python API takes other inputs as tensors.",
        )
    for key, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != shape[0] or not all(math.isfinite(v) for v in values):
            raise InputError(f"{key}: {shape[0]} finite values were expected, one a channel, not {values!r}")
    if min(preprocessing.std) <= 0:
        raise InputError(f"std: values above 0 were expected, not {preprocessing.std!r}")
    if not 0.05 <= preprocessing.crop_pct <= 1:
        raise InputError(f"crop_pct: a share from 0.05 to 1 was expected, not {preprocessing.crop_pct!r}")
    try:
        interpolation = InterpolationMode(preprocessing.interpolation)
    except ValueError:
        known = ", ".join(mode.value for mode in InterpolationMode)
        raise InputError(
            f"unknown interpolation '{preprocessing.interpolation}'", remedy=f"Choose one of: {known}."
        ) from None
    return Prepare("L" if shape[0] == 1 else "RGB", shape[1], shape[2], preprocessing.crop_pct, interpolation)


def normalise(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, C, H, W) levels 0..255, uint8 or float -> float32, (x / 255 - mean) / std per channel."""
    shape = (1, -1, 1, 1)
    scale = torch.tensor([1 / (255 * s) for s in std]).view(shape)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(shape)
    return images.float().mul_(scale).add_(shift) if images.dtype == torch.uint8 else images * scale + shift


def to_levels(images: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float images (N, C, H, W) that `normalise` made of uint8 ones -> those, exactly."""
    shape = (1, -1, 1, 1)
    levels = 255 * (images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape))
    return levels.round().clamp(0, 255).to(torch.uint8)


def shift_and_mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 1/8 of the size over black, mirror half the images; uint8 (N, C, H, W) both ways.

    (He et al. 2016: 4 px for 32.) One gather a batch: a shifted, mirrored image is an index map.
    """
    count, _, height, width = images.shape
    down, right = height // 8, width // 8
    padded = functional.pad(images, (right, right, down, down))
    top = torch.randint(0, 2 * down + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * right + 1, (count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    columns = torch.arange(width).expand(count, -1)
    rows = top + torch.arange(height)  # (N, H)
    columns = left + torch.where(mirrored, columns.flip(1), columns)  # (N, W)
    source = (rows * padded.shape[3])[:, :, None] + columns[:, None, :]  # (N, H, W) into H' x W'
    index = source.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, index).view_as(images)


def shift_and_turn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale and shift a little over black, never mirror: uint8 (N, C, H, W) -> float, levels 0..255."""
    count, _, height, width = images.shape
    draw = torch.rand((count, 4), generator=generator) * 2 - 1
    angle = draw[:, 0] * math.radians(_DEGREES)
    scale = 1 + draw[:, 1] * _SCALE
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack(
        [
            cos,
            -sin * (height / width),
            2 * _SHIFT * draw[:, 2],
            sin * (width / height),
            cos,
            2 * _SHIFT * draw[:, 3],
        ],
        dim=1,
    ).view(count, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images.float(), grid, align_corners=False)


def _without_ends(image: Image.Image) -> Image.Image:
    """The centre of a very long strip: resizing all of it could take any amount of memory."""
    width, height = min(image.width, image.height * _LONGEST), min(image.height, image.width * _LONGEST)
    return image if (width, height) == image.size else pixels.center_crop(image, [height, width])


def _to_tensor(image: Image.Image) -> Tensor:
    tensor: Tensor = pixels.pil_to_tensor(image)
    return tensor
