"""Face crops aligned to a fixed template by a similarity transform of five landmarks."""

from typing import TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from kdlib_faces._checks import InputError

__all__ = ["ARCFACE_TEMPLATE", "align_face", "similarity_transform", "template_for"]

Array: TypeAlias = NDArray[np.float64]
Picture = TypeVar("Picture", Image.Image, NDArray[np.uint8])

ARCFACE_TEMPLATE: Array = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""(x, y) in pixels of a 112 x 112 crop: left eye, right eye, nose, left and right mouth corner, as seen in the image."""
ARCFACE_TEMPLATE.setflags(write=False)


def _points(owner: str, name: str, points: ArrayLike, count: int | None = None) -> Array:
    """Return `points` as finite float64 (n, 2)."""
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{owner}: {name} must be numbers (x, y), got {type(points).__name__}") from None
    if array.ndim != 2 or array.shape[1] != 2 or (count is not None and len(array) != count):
        raise InputError(f"{owner}: {name} must be ({count or 'n'}, 2), got {array.shape}")
    if not (np.abs(array) < 1e9).all():
        raise InputError(f"{owner}: {name} must be finite and below 1e9 pixels, got {array.tolist()[:5]}")
    return array


def template_for(size: int | tuple[int, int]) -> Array:
    """Return the template for another crop size.

    Args:
        size: side in pixels, or (h, w). A square multiple of 128 that is not a multiple of 112 has the margin that networks
            for 128 pixels expect: 8 pixels are added to x, then the template is scaled by size / 128. The crop (112, 96)
            loses 8 pixels on each side. Any other size scales the 112 x 112 template by the height and centers it.

    Returns:
        (5, 2) points (x, y) in pixels.

    Raises:
        InputError: the size is not a positive integer.

    Examples:
        >>> template_for(224)[0]
        array([ 76.5892, 103.3926])
        >>> template_for((112, 96))[0]
        array([30.2946, 51.6963])
    """
    height, width = size if isinstance(size, tuple) else (size, size)
    if not (isinstance(height, int) and isinstance(width, int) and min(height, width) >= 1):
        raise InputError(f"template_for: size must be whole pixels, at least 1, got {size}")
    if height == width and height % 128 == 0 and height % 112:
        scale, margin = height / 128, 8 * height / 128
    else:
        scale = height / 112
        margin = (width - 112 * scale) / 2
    template: Array = ARCFACE_TEMPLATE * scale + np.array([margin, 0.0])
    return template


def similarity_transform(landmarks: ArrayLike, template: ArrayLike = ARCFACE_TEMPLATE) -> Array:
    """Return the least-squares similarity transform (no shear, no reflection) of landmarks to a template.

    In the plane, scale and rotation are one complex factor `a`: with `z` and `t` the centered landmarks and template as
    complex numbers, `a = sum(conj(z) t) / sum(|z|^2)`. That is Umeyama's solution with a proper rotation.

    Args:
        landmarks: (n, 2) points (x, y) in the image, n >= 2.
        template: (n, 2) points (x, y) in the crop.

    Returns:
        (2, 3) matrix `M`: image point `p` maps to `M[:, :2] @ p + M[:, 2]`.

    Raises:
        InputError: shapes differ, a point is not finite, all landmarks coincide, or no similarity fits (a mirrored face can
            give scale 0).

    Examples:
        >>> similarity_transform([(0, 0), (1, 0)], [(5, 5), (5, 7)])  # twice as large, a quarter turn
        array([[ 0., -2.,  5.],
               [ 2.,  0.,  5.]])

    References:
        Umeyama, "Least-squares estimation of transformation parameters between two point patterns", TPAMI 1991.
    """
    source = _points("similarity_transform", "landmarks", landmarks)
    target = _points("similarity_transform", "template", template, len(source))
    z, t = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    z_mean, t_mean = z.mean(), t.mean()
    spread = float((np.abs(z - z_mean) ** 2).sum())
    if len(source) < 2 or not spread > 1e-12 * max(1.0, float(np.abs(z).max()) ** 2):
        raise InputError("similarity_transform: landmarks must be at least two different points")
    a = (np.conj(z - z_mean) * (t - t_mean)).sum() / spread
    if not abs(a) > 1e-9:
        raise InputError("similarity_transform: no similarity maps these landmarks to the template")
    shift = t_mean - a * z_mean
    return np.array([[a.real, -a.imag, shift.real], [a.imag, a.real, shift.imag]])


def align_face(image: Picture, landmarks: ArrayLike, size: int | tuple[int, int] = 112) -> Picture:
    """Crop a face so that its landmarks match the template.

    Pixel (x, y) is the value at the point (x, y), as in detectors and OpenCV. Sampling is bilinear without antialiasing,
    like the crops that published networks were trained on; pixels outside the image are black.

    Args:
        image: a PIL image (read as RGB), or a uint8 array (h, w) or (h, w, c).
        landmarks: (5, 2) points (x, y) in pixels of `image`, in the template's order.
        size: side of the crop in pixels, or (h, w); see `template_for`.

    Returns:
        The crop: an RGB PIL image for a PIL image, otherwise a uint8 array with the channels of `image`.

    Raises:
        InputError: the image or the landmarks have another form.

    Examples:
        >>> picture = np.full((200, 200, 3), 90, np.uint8)
        >>> align_face(picture, ARCFACE_TEMPLATE + 20).shape
        (112, 112, 3)
    """
    points = _points("align_face", "landmarks", landmarks, 5)
    if isinstance(image, Image.Image):
        return Image.fromarray(_warp(np.asarray(image.convert("RGB")), points, size))
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3) or not image.size:
        shown = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"align_face: image must be a PIL image or a uint8 array (h, w) or (h, w, c), got {shown}")
    return _warp(image, points, size)


def _warp(image: NDArray[np.uint8], points: Array, size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Sample `image` bilinearly at the pixels of the crop, mapped by the inverse similarity."""
    template = template_for(size)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    matrix = similarity_transform(points, template)
    y, x = np.mgrid[:rows, :columns].astype(np.float64)
    x, y = np.tensordot(np.linalg.inv(matrix[:, :2]), np.stack([x - matrix[0, 2], y - matrix[1, 2]]), axes=1)
    # Points far outside are black: clipping keeps their indices valid, and a black border of two pixels makes the
    # interpolation at the edge the same as inside.
    height, width = image.shape[:2]
    x, y = np.clip(x, -2, width), np.clip(y, -2, height)
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    padded = np.pad(image, [(2, 2), (2, 2), *[(0, 0)] * (image.ndim - 2)])
    right_part, low_part = (part.reshape(part.shape + (1,) * (image.ndim - 2)) for part in (x - left, y - top))
    corner = [padded[top + 2 + i, left + 2 + j].astype(np.float64) for i in (0, 1) for j in (0, 1)]
    upper = corner[0] * (1 - right_part) + corner[1] * right_part
    lower = corner[2] * (1 - right_part) + corner[3] * right_part
    return cast(NDArray[np.uint8], np.rint(upper * (1 - low_part) + lower * low_part).astype(np.uint8))
