"""Random augmentation of image batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional as F

from kdlib._checks import check_number
from kdlib_faces.data.images import to_float

__all__ = [
    "VIEWS_VERSION",
    "AugmentConfig",
    "augment",
    "draw_views",
    "erase",
    "find_opencv",
    "grayscale",
    "low_resolution",
    "mirror",
    "photometric",
    "similarities",
    "warp",
]

DRAWS = (
    "mirror", "right", "down", "angle", "size", "low_resolution", "factor", "grayscale", "gamma", "contrast", "brightness",
    "erase", "area", "stretch", "top", "left",
)  # fmt: skip
"""What the random numbers of an image decide, in the order of the columns of `draw_views`."""
VIEWS_VERSION = 2
"""Number of the augmentation: raise it with any change that gives other views for the same draws, which outdates caches."""


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


def augment(images: Tensor, config: AugmentConfig, draws: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Augment a batch.

    Geometry, resolution and gray are applied to bytes; one table of 256 values per image then gives the floats.

    Args:
        images: `(b, 3, h, w)` uint8.
        config: strength of the augmentation.
        draws: `(b, 16)` numbers of `draw_views`, which are all the randomness there is.

    Returns:
        `(b, 3, h, w)` float32 in `[-1, 1]`, and the view: `(b,)` int64, 1 for a mirrored image.

    Examples:
        >>> pixels = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4)
        >>> draws = draw_views(1, torch.Generator().manual_seed(0))
        >>> views, view = augment(pixels, AugmentConfig.none(), draws)
        >>> views.shape, view.tolist()
        (torch.Size([1, 3, 4, 4]), [0])
    """
    drawn = dict(zip(DRAWS, draws.T, strict=True))

    def between(name: str, low: float, high: float) -> NDArray[np.float64]:
        values: NDArray[np.float64] = drawn[name] * (high - low) + low
        return values

    mirrored = drawn["mirror"] < config.mirror
    if config.shift or config.scale or config.rotate:
        move = np.stack([between(name, -config.shift, config.shift) for name in ("right", "down")], axis=1)
        angle, size = (
            between("angle", -config.rotate, config.rotate),
            between("size", 1 - config.scale, 1 + config.scale),
        )
        x = warp(images, similarities(angle, size, move, mirrored, images.shape[2:]))
    else:
        x = mirror(images, mirrored)
    if config.low_resolution:
        chosen = drawn["low_resolution"] < config.low_resolution
        x = low_resolution(x, np.where(chosen, between("factor", config.low_resolution_factor, 1.0), 1.0))
    if config.grayscale:
        x = grayscale(x, drawn["grayscale"] < config.grayscale)
    if config.brightness or config.contrast or config.gamma:
        gamma, contrast = 2.0 ** between("gamma", -config.gamma, config.gamma), config.contrast
        brightness = between("brightness", -config.brightness, config.brightness)
        out = photometric(x, gamma, between("contrast", 1 - contrast, 1 + contrast), brightness)
    else:
        out = to_float(x)
    if config.erase:
        area = between("area", min(config.erase_area, 0.02), config.erase_area)
        stretch = 2.0 ** between("stretch", -0.5, 0.5)
        area = np.where(drawn["erase"] < config.erase, area, 0.0)
        out = erase(out, area, stretch, drawn["top"], drawn["left"])
    return out, torch.from_numpy(mirrored.astype(np.int64))


def draw_views(count: int, generator: Generator) -> NDArray[np.float64]:
    """Draw `(count, 16)` numbers in `[0, 1)`: a row for each image, a column for each of `DRAWS`.

    The columns are the same for every `AugmentConfig`, so turning off a part leaves the others unchanged.
    """
    return torch.rand(count, len(DRAWS), generator=generator, dtype=torch.float64).numpy()


def mirror(images: Tensor, chosen: NDArray[np.bool_]) -> Tensor:
    """Return a copy of `(b, 3, h, w)` images in which the chosen ones are mirrored."""
    out = images.clone()
    for row in np.flatnonzero(chosen).tolist():  # an index of several rows would change the memory format
        out[row] = images[row].flip(-1)
    return out


def similarities(
    angle: NDArray[np.float64],
    size: NDArray[np.float64],
    move: NDArray[np.float64],
    mirrored: NDArray[np.bool_],
    shape: Sequence[int],
) -> NDArray[np.float64]:
    """Matrices `(b, 2, 3)` that map a pixel (column, row, 1) of the result to the point of the image that it shows.

    The image is mirrored, turned by `angle` degrees and scaled by `size` around its center, and the point shown there moves
    by `move`, a fraction of the sides.
    """
    sides = np.array([shape[1], shape[0]], dtype=np.float64)
    radians = (angle * (math.pi / 180)).tolist()
    # One by one, since vectorized functions may round differently at different places of an array.
    cos = np.array([math.cos(each) for each in radians]) / size
    sin = np.array([math.sin(each) for each in radians]) / size
    linear = np.stack([cos, -sin, sin, cos], axis=1).reshape(-1, 2, 2)
    center = (sides - 1) / 2
    offset = center + move * sides - linear @ center
    matrices = np.concatenate([linear, offset[:, :, None]], axis=2)
    matrices[mirrored, 0] *= -1
    matrices[mirrored, 0, 2] += sides[0] - 1
    return matrices


def warp(images: Tensor, matrices: NDArray[np.float64]) -> Tensor:
    """Show the points of `(b, 3, h, w)` uint8 images that `(b, 2, 3)` matrices map to; see `similarities`.

    Bilinear with repeated edges, rounded to bytes, in channels-last memory format. OpenCV computes it in half the time, where
    it is installed; its bytes differ from those of torch by at most 1.
    """
    opencv = find_opencv()
    if opencv is None:
        return _warp_by_torch(images, matrices)
    rows = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    out = np.empty_like(rows)
    _, height, width, _ = rows.shape
    # With a fourth channel, OpenCV is faster by a quarter.
    wide, moved = (np.empty((height, width, 4), dtype=np.uint8) for _ in range(2))
    for image, matrix, into in zip(rows, matrices, out, strict=True):
        opencv.cvtColor(image, opencv.COLOR_RGB2RGBA, wide)
        flags = opencv.INTER_LINEAR | opencv.WARP_INVERSE_MAP
        opencv.warpAffine(wide, matrix, (width, height), moved, flags, opencv.BORDER_REPLICATE)
        opencv.cvtColor(moved, opencv.COLOR_RGBA2RGB, into)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def _warp_by_torch(images: Tensor, matrices: NDArray[np.float64]) -> Tensor:
    height, width = images.shape[2:]
    out = torch.empty_like(images, memory_format=torch.channels_last)
    grid = torch.empty(1, height, width, 2)
    for image, matrix, into in zip(images, matrices, out, strict=True):  # one by one, in the cache of the processor
        for axis, (side, (by_column, by_row, offset)) in enumerate(zip((width, height), matrix.tolist(), strict=True)):
            # `grid_sample` maps -1 and 1 to the outer edges of the image.
            along = torch.arange(width) * (by_column * 2 / side) + (offset * 2 / side + 1 / side - 1)
            down = torch.arange(height) * (by_row * 2 / side)
            torch.add(along, down[:, None], out=grid[0, ..., axis])
        x = image[None].to(torch.float32, memory_format=torch.contiguous_format)
        into.copy_(F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)[0].round_())
    return out


def low_resolution(images: Tensor, factors: NDArray[np.float64]) -> Tensor:
    """Downscale uint8 images by their factor and upscale them again, in place; 1 leaves an image unchanged."""
    height, width = images.shape[2:]
    for row in np.flatnonzero(factors < 1).tolist():
        side = [max(round(each * float(factors[row])), 1) for each in (height, width)]
        small = F.interpolate(images[row : row + 1], size=side, mode="bilinear", antialias=True)
        images[row] = F.interpolate(small, size=(height, width), mode="bilinear")[0]
    return images


def grayscale(images: Tensor, chosen: NDArray[np.bool_]) -> Tensor:
    """Replace the channels of the chosen uint8 images by their luma (ITU-R 601), in place."""
    opencv, luma = find_opencv(), np.array([[0.299, 0.587, 0.114]] * 3, dtype=np.float32)
    rows = images.permute(0, 2, 3, 1).numpy()
    for row in np.flatnonzero(chosen).tolist():
        if opencv is None:
            rows[row] = np.rint(rows[row].astype(np.float32) @ luma.T)
        else:
            rows[row] = opencv.transform(rows[row], luma)
    return images


def photometric(
    images: Tensor, gamma: NDArray[np.float64], contrast: NDArray[np.float64], brightness: NDArray[np.float64]
) -> Tensor:
    """`c * (x^g - m^g) + m^g + d` per image, clipped to `[0, 1]` and mapped to `[-1, 1]`.

    x is byte / 255 and m its mean in the image; g is `gamma`, c `contrast` and d `brightness`, each `(b,)`.

    Returns:
        `(b, 3, h, w)` float32 in the memory format of the images.
    """
    if not images.is_contiguous():
        images = images.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(images, dtype=torch.float32)
    opencv, lines = find_opencv(), _lines(images)
    # One by one, since vectorized functions may round differently at different places of an array.
    means = [each.sum(dtype=np.uint32) / each.size if opencv is None else opencv.mean(each)[0] for each in lines]
    middle = np.array([(mean / 255) ** exponent for mean, exponent in zip(means, gamma.tolist(), strict=True)])
    tables = (torch.arange(256) / 255).pow(torch.from_numpy(gamma).float()[:, None])
    factor, offset = (
        torch.from_numpy(each).float()[:, None] for each in (contrast, middle * (1 - contrast) + brightness)
    )
    tables = tables.mul_(factor).add_(offset).clamp_(0.0, 1.0).mul_(2.0).sub_(1.0)
    for table, image, into in zip(tables.numpy(), lines, _lines(out), strict=True):
        if opencv is None:
            np.take(table, image, out=into, mode="clip")
        else:
            opencv.LUT(image, table, into)
    return out


def erase(
    images: Tensor,
    area: NDArray[np.float64],
    stretch: NDArray[np.float64],
    top: NDArray[np.float64],
    left: NDArray[np.float64],
) -> Tensor:
    """Put a gray rectangle on float images in `[-1, 1]`, in place.

    Args:
        images: `(b, 3, h, w)`.
        area: `(b,)` fractions of the image; 0 leaves an image unchanged.
        stretch: `(b,)` square roots of height by width.
        top: `(b,)` place from 0, the rectangle touches the upper edge, to 1, the lower one.
        left: `(b,)` likewise.
    """
    height, width = images.shape[2:]
    for row in np.flatnonzero(area > 0).tolist():
        side = math.sqrt(float(area[row]))
        tall, wide = min(1.0, side * float(stretch[row])), min(1.0, side / float(stretch[row]))
        # Pixels whose center lies in the rectangle.
        first, begin = float(top[row]) * (1 - tall) * height, float(left[row]) * (1 - wide) * width
        rows, columns = (
            slice(round(at), round(at + size)) for at, size in ((first, tall * height), (begin, wide * width))
        )
        images[row, :, rows, columns] = 0.0
    return images


@cache
def find_opencv() -> ModuleType | None:
    """Return OpenCV if it is installed, in a version that does not round the points of `warpAffine` to 1/32 pixel."""
    try:
        import cv2
    except ImportError:
        return None
    module: ModuleType = cv2
    return module if int(cv2.__version__.split(".")[0]) >= 5 else None


def _lines(images: Tensor) -> NDArray[np.generic]:
    """A view `(b, n, m)` of dense images `(b, c, h, w)`, in the order of the memory."""
    return (images if images.is_contiguous() else images.permute(0, 2, 3, 1)).flatten(2).numpy()
