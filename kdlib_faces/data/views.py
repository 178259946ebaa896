"""Random augmentation of image batches."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from kdlib._checks import check_number

__all__ = ["AugmentConfig", "augment", "erase", "grayscale", "low_resolution", "mirror", "photometric", "warp"]


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of the random augmentation of training images; 0 turns a part off.

    Attributes:
        mirror: probability of a mirror image.
        brightness: maximum shift of the mean, as a fraction of the full range.
        contrast: maximum relative change of contrast.
        gamma: maximum change of log2 of the gamma exponent.
        shift: maximum shift, as a fraction of the side.
        scale: maximum relative change of size.
        rotate: maximum rotation, degrees.
        erase: probability of a gray rectangle.
        erase_area: maximum area of the rectangle, as a fraction of the image.
        low_resolution: probability of downscaling and upscaling.
        low_resolution_factor: minimum factor of the downscaling.
        grayscale: probability of conversion to grayscale.
    """

    mirror: float = 0.5
    brightness: float = 0.15
    contrast: float = 0.2
    gamma: float = 0.3
    shift: float = 0.04
    scale: float = 0.06
    rotate: float = 5.0
    erase: float = 0.0
    erase_area: float = 0.15
    low_resolution: float = 0.1
    low_resolution_factor: float = 0.4
    grayscale: float = 0.1

    def __post_init__(self) -> None:
        limits = {"gamma": 4.0, "rotate": 180.0}
        for name in self.__dataclass_fields__:
            check_number("AugmentConfig", name, getattr(self, name), min=0.0, max=limits.get(name, 1.0))
        for name in ("scale", "contrast"):
            check_number("AugmentConfig", name, getattr(self, name), max=0.9)
        check_number("AugmentConfig", "low_resolution_factor", self.low_resolution_factor, above=0.0)

    @classmethod
    def none(cls) -> "AugmentConfig":
        """Return a configuration without augmentation."""
        return cls(**dict.fromkeys(set(cls.__dataclass_fields__) - {"erase_area", "low_resolution_factor"}, 0.0))


def augment(images: Tensor, config: AugmentConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """Augment a batch.

    Args:
        images: `(b, 3, s, s)` uint8.
        config: strength of the augmentation.
        generator: source of all randomness.

    Returns:
        `(b, 3, s, s)` float32 in `[-1, 1]`, and the view: `(b,)` int64, 1 for a mirrored image.

    Examples:
        >>> pixels = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
        >>> views, view = augment(pixels, AugmentConfig.none(), torch.Generator().manual_seed(0))
        >>> views.shape, view.tolist()
        (torch.Size([1, 3, 4, 4]), [0])
    """
    images, view = mirror(images, config.mirror, generator)
    if config.brightness or config.contrast or config.gamma:
        x = photometric(images, config.brightness, config.contrast, config.gamma, generator)
    else:
        x = images.to(torch.float32).div_(255.0)
    if config.shift or config.scale or config.rotate:
        x = warp(x, config.shift, config.scale, config.rotate, generator)
    if config.low_resolution:
        x = low_resolution(x, config.low_resolution, config.low_resolution_factor, generator)
    if config.grayscale:
        x = grayscale(x, config.grayscale, generator)
    if config.erase:
        x = erase(x, config.erase, config.erase_area, generator)
    return x.mul_(2.0).sub_(1.0).clamp_(-1.0, 1.0), view


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


def mirror(images: Tensor, probability: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Mirror each image with `probability`; return the images and `(b,)` int64, 1 for a mirrored image."""
    chosen = torch.rand(len(images), generator=generator) < probability
    if chosen.any():
        images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    return images, chosen.to(torch.int64)


def photometric(x: Tensor, brightness: float, contrast: float, gamma: float, generator: Generator) -> Tensor:
    """`c * (x^g - m) + m + d` per image, clipped to `[0, 1]`; m is the mean of x^g. May change `x` in place.

    d is drawn from `[-brightness, brightness]`, c from `[1 - contrast, 1 + contrast]`, log2 g from `[-gamma, gamma]`. Bytes
    stand for x = byte / 255.
    """
    b = len(x)
    exponents = torch.exp2(_uniform(b, -gamma, gamma, generator)) if gamma else torch.ones(b)
    if x.dtype == torch.uint8:
        x = _powers(x, exponents)
    elif gamma:
        x = x.pow_(exponents[:, None, None, None])
    factor = _uniform(b, 1 - contrast, 1 + contrast, generator)
    shift = _uniform(b, -brightness, brightness, generator)
    offset = x.mean(dim=(1, 2, 3)) * (1 - factor) + shift
    return x.mul_(factor[:, None, None, None]).add_(offset[:, None, None, None]).clamp_(0.0, 1.0)


def _powers(images: Tensor, exponents: Tensor) -> Tensor:
    """`(byte / 255)^g` per image, looked up among the 256 values: ten times as fast as a power per pixel."""
    table = (torch.arange(256) / 255.0).pow(exponents[:, None]).numpy()
    x = torch.empty(images.shape, dtype=torch.float32)
    for values, image, out in zip(table, images.contiguous().numpy(), x.numpy(), strict=True):
        np.take(values, image, out=out, mode="clip")
    return x


def warp(x: Tensor, shift: float, scale: float, rotate: float, generator: Generator) -> Tensor:
    """Shift (fraction of the side), scale and rotate (degrees) each image, bilinear with repeated edges."""
    b = len(x)
    angle = _uniform(b, -rotate, rotate, generator) * (math.pi / 180)
    size = _uniform(b, 1 - scale, 1 + scale, generator)
    move = _uniform(2 * b, -2 * shift, 2 * shift, generator).view(b, 2, 1)
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    height, width = x.shape[2:]
    rows, columns = (torch.arange(side) * (2 / side) + (1 / side - 1) for side in (height, width))
    # As `affine_grid` does, by sums of a row and a column in place of a product of matrices.
    grid = torch.empty(b, height, width, 2)
    along = (cos[:, None] * columns, -sin[:, None] * rows), (sin[:, None] * columns, cos[:, None] * rows)
    for axis, (by_column, by_row) in enumerate(along):
        torch.add(by_column[:, None, :], (by_row + move[:, axis])[:, :, None], out=grid[..., axis])
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def low_resolution(x: Tensor, probability: float, factor: float, generator: Generator) -> Tensor:
    """Downscale random images and upscale them again; one factor from `[factor, 1]` per batch."""
    chosen = torch.rand(len(x), generator=generator) < probability
    ratio = float(_uniform(1, factor, 1.0, generator))
    if not chosen.any():
        return x
    side = (max(round(x.shape[2] * ratio), 1), max(round(x.shape[3] * ratio), 1))
    small = F.interpolate(x[chosen], size=side, mode="bilinear", antialias=True)
    x[chosen] = F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)
    return x


def grayscale(x: Tensor, probability: float, generator: Generator) -> Tensor:
    """Replace the channels of random images by their luma (ITU-R 601)."""
    chosen = torch.rand(len(x), generator=generator) < probability
    if chosen.any():
        luma = torch.einsum("bchw,c->bhw", x[chosen], x.new_tensor([0.299, 0.587, 0.114]))
        x[chosen] = luma[:, None].expand(-1, x.shape[1], -1, -1)
    return x


def erase(x: Tensor, probability: float, area: float, generator: Generator) -> Tensor:
    """Put a gray rectangle on random images: area up to `area`, aspect from 1:2 to 2:1."""
    b, _, height, width = x.shape
    chosen = torch.rand(b, generator=generator) < probability
    part = _uniform(b, 0.02 if area > 0.02 else 0.0, area, generator)
    stretch = torch.exp2(_uniform(b, -0.5, 0.5, generator))
    tall, wide = (part.sqrt() * stretch).clamp(max=1.0), (part.sqrt() / stretch).clamp(max=1.0)
    top = torch.rand(b, generator=generator) * (1 - tall)
    left = torch.rand(b, generator=generator) * (1 - wide)
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    hidden = in_rows[:, None, :, None] & in_columns[:, None, None, :] & chosen[:, None, None, None]
    return x.masked_fill_(hidden, 0.5)
