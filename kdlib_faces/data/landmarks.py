"""Facial landmarks: `.pts` files, and five points from sixty-eight."""

from os import PathLike

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.text import is_number, read_lines

__all__ = ["five_points", "read_points"]

MAX_POINTS = 10_000


def read_points(path: str | PathLike[str], *, count: int | None = 68) -> NDArray[np.float32]:
    """Read a `.pts` file: `version: 1`, `n_points: 68`, and between braces one line `x y` per point.

    Args:
        path: The file.
        count: Expected number of points; None accepts the number in the file.

    Returns:
        `(count, 2)` float32, x and y in pixels.

    Raises:
        InputError: The file has another form, the number of points differs from `n_points` or `count`, or a coordinate is
            not finite.

    Examples:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.pts"
        >>> _ = file.write_text("version: 1\\nn_points: 2\\n{\\n1 2\\n3.5 4\\n}\\n")
        >>> read_points(file, count=2).tolist()
        [[1.0, 2.0], [3.5, 4.0]]
    """
    points: list[tuple[float, float]] = []
    announced: int | None = None
    inside = done = False
    for number, text in read_lines(path, what="points file"):
        where, line = f"{path} line {number}", text.strip()
        name, _, value = (part.strip() for part in line.partition(":"))
        if done:
            raise InputError(f"{where}: nothing may follow the closing brace, got {line[:40]!r}")
        if not inside and name.casefold() in ("version", "n_points"):
            if not is_number(value, 5):
                raise InputError(f"{where}: {name} must be a whole number, got {value[:40]!r}")
            announced = int(value) if name.casefold() == "n_points" else announced
        elif not inside and line == "{":
            inside = True
        elif inside and line == "}":
            done = True
        elif inside:
            points.append(_point(line, where))
        else:
            raise InputError(f"{where}: must be 'version: 1', 'n_points: n' or an opening brace, got {line[:40]!r}")
        if len(points) > MAX_POINTS:
            raise InputError(f"{where}: more than {MAX_POINTS:,} points")
    if not done:
        raise InputError(f"{path}: the points must be enclosed in braces; the file is truncated")
    for what, expected in (("n_points", announced), ("count", count)):
        if expected is not None and len(points) != expected:
            raise InputError(f"{path}: {what} is {expected}, got {len(points)} points")
    return np.asarray(points, dtype=np.float32).reshape(-1, 2)


def _point(line: str, where: str) -> tuple[float, float]:
    try:
        x, y = (float(field) for field in line.split())
    except ValueError:
        raise InputError(f"{where}: must be 'x y', got {line[:40]!r}") from None
    if not (abs(x) < 1e6 and abs(y) < 1e6):
        raise InputError(f"{where}: a point must be within a million pixels, got {line[:40]!r}")
    return x, y


def five_points(points: ArrayLike) -> NDArray[np.float32]:
    """Reduce the 68 points of the iBUG layout to five: left eye, right eye, nose tip, left and right mouth corner.

    An eye is the mean of its corners, points 36 and 39 or 42 and 45, counted from 0; the others are points 30, 48 and 54.
    Five-point templates are commonly fitted to sets annotated with 68 points in this way.

    Args:
        points: `(..., 68, 2)`, x and y.

    Returns:
        `(..., 5, 2)` float32, in the order of `ARCFACE_TEMPLATE`.

    Raises:
        ValueError: The shape is another one.

    Examples:
        >>> import numpy as np
        >>> five_points(np.stack([np.arange(68), np.zeros(68)], -1))[:, 0].tolist()
        [37.5, 43.5, 30.0, 48.0, 54.0]
    """
    array = np.asarray(points, dtype=np.float32)
    if array.ndim < 2 or array.shape[-2:] != (68, 2):
        raise ValueError(f"five_points: points must be (..., 68, 2), got {array.shape}")
    eyes = [(array[..., a, :] + array[..., b, :]) / 2 for a, b in ((36, 39), (42, 45))]
    return np.stack([*eyes, array[..., 30, :], array[..., 48, :], array[..., 54, :]], axis=-2)
