"""Decoding of images to uint8 arrays."""

from os import PathLike

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kdlib_faces.data.image_files import decode_jpeg, open_rgb

__all__ = ["check_pixels", "decode_image", "decode_rows", "read_pixels", "to_float"]


def to_float(images: Tensor) -> Tensor:
    """Map pixels from 0..255 to `[-1, 1]`: `(x - 127.5) / 127.5`.

    Args:
        images: `(b, c, h, w)` uint8.

    Returns:
        `(b, c, h, w)` float32.

    Examples:
        >>> to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
        [-1.0, 1.0]
    """
    return images.to(torch.float32).sub_(127.5).div_(127.5)


def check_pixels(owner: str, images: Tensor) -> None:
    """Check that `images` are `(b, 3, h, w)` uint8."""
    if images.dtype != torch.uint8:
        raise TypeError(f"{owner}: images must be uint8, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{owner}: images must be (b, 3, h, w), got {tuple(images.shape)}")


def read_pixels(path: str | PathLike[str]) -> NDArray[np.uint8]:
    """Read a whole image file as RGB.

    Gray becomes three equal channels, and the EXIF orientation is applied. The format is recognized from the bytes, whatever
    the suffix: any that Pillow reads, except those for which it starts another program (EPS).

    Args:
        path: The file.

    Returns:
        `(h, w, 3)` uint8.

    Raises:
        InputError: The file is missing, not an image, truncated, or above 64 million pixels.
    """
    return np.asarray(open_rgb(path, str(path)))


def decode_image(data: bytes, size: int | tuple[int, int], *, name: str = "image") -> NDArray[np.uint8]:
    """Decode an image to RGB as `read_pixels` does, and resize it with antialiasing.

    An image that already has the size is returned unchanged. Another aspect ratio is kept, and the image is centered on
    black, as crops of other shapes relate to the template of `align_face`: a crop of 112 x 96 pixels (height x width)
    gets eight black columns on each side to make 112 x 112. Where `size` is not square, the height alone sets the scale, and
    columns that do not fit are cut.

    Args:
        data: The bytes of an image file.
        size: Side of the result, pixels, or (height, width).
        name: Name of the image in messages.

    Returns:
        `(3, h, w)` uint8.

    Raises:
        InputError: The data is not an image, truncated, or above 64 million pixels.

    Examples:
        >>> import io
        >>> stream = io.BytesIO()
        >>> Image.new("RGB", (2, 4), (255, 0, 7)).save(stream, "GIF")
        >>> decode_image(stream.getvalue(), 4)[0, 0].tolist()
        [0, 255, 255, 0]
    """
    return np.ascontiguousarray(decode_rows(data, size, name=name).transpose(2, 0, 1))


def decode_rows(
    data: bytes, size: int | tuple[int, int], *, name: str = "image", out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """As `decode_image`, to `(h, w, 3)`; into `out` if it is given."""
    rows, columns = size if isinstance(size, tuple) else (size, size)
    if out is None:
        out = np.empty((rows, columns, 3), dtype=np.uint8)
    pixels = decode_jpeg(data, out)
    if pixels is not out:
        out[:] = _fit(open_rgb(data, name) if pixels is None else Image.fromarray(pixels), rows, columns)
    return out


def _fit(image: Image.Image, rows: int, columns: int) -> NDArray[np.uint8]:
    """Resize and crop an image to `(rows, columns, 3)`; see `decode_image`."""
    scale = rows / image.height if rows != columns else min(rows / image.height, columns / image.width)
    inner = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    if inner != image.size:
        image = image.resize(inner, Image.Resampling.BILINEAR)
    if inner != (columns, rows):
        left, top = (columns - inner[0]) // 2, (rows - inner[1]) // 2
        image = image.crop((-left, -top, columns - left, rows - top))  # black beyond the image
    return np.asarray(image, dtype=np.uint8)
