"""Conversion between features and the bytes of rows, and the error of the conversion.

`float16` and `float32` store the values in that type. `int8` stores one scale per row and feature, and integers:

    q = round(127 * x / max |x|),    x' = q * max |x| / 127

The error of a row is 1 - cos(x, x') and |x' - x| / |x|.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlib.cache._checks import check_cache, check_fits
from kdlib.cache.layout import DTYPES, Layout

__all__ = ["Errors", "pack", "unpack"]

_NARROW = 1e-12
"""Rows whose largest entry is below this are scaled up before squaring, since their squares would underflow."""

Errors = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float32]]
"""For each feature: maximum and sum of the cosine error over rows, and maximum relative error."""


def pack(
    layout: Layout, features: Mapping[str, Tensor], name_row: Callable[[int], str]
) -> tuple[NDArray[np.uint8], Errors]:
    """Convert features `(b, ...)`, float32 on the CPU, to rows `(b, row_bytes)` uint8, and measure the errors.

    Raises:
        CacheError: the features differ from those of earlier batches.
        ValueError: a value is not finite or does not fit the type on disk; `name_row` describes its row.
    """
    shapes = {name: tuple(x.shape[1:]) for name, x in features.items()}
    check_cache(shapes == layout.features, f"features must be {layout.features} as in earlier batches, got {shapes}")
    rows = np.empty((len(next(iter(features.values()))), layout.row_bytes), np.uint8)
    maxima, sums, relative = [], [], []
    for at, (name, (start, stop)) in enumerate(layout.places.items()):
        x = features[name].flatten(1)
        largest = x.abs().amax(1)
        check_fits(layout.dtype, name, largest, name_row)
        if layout.dtype == "int8":
            # The factor can exceed float32, for example for a row of 1e-40.
            factor = torch.where(largest > 0, 127.0 / largest.double(), 0.0)[:, None]
            wide = bool((factor > 1e30).any())
            x = (x.double() * factor).float() if wide else x * factor.float()
            scale = (largest.double() / 127.0).float()
            stored = x.round()
            if wide:  # a scale below the smallest float32 is stored as 0, which loses the row
                stored = torch.where((scale > 0)[:, None], stored, 0.0)
            rows[:, 4 * at : 4 * at + 4] = scale.numpy().astype("<f4").reshape(-1, 1).view(np.uint8)
            rows[:, start:stop] = stored.to(torch.int8).numpy().view(np.uint8)
        elif layout.dtype == "float16":
            half = x.half()
            rows[:, start:stop] = half.numpy().view(np.uint8)
            stored = half.float()
            narrow = (largest > 0) & (largest < _NARROW)
            if narrow.any():
                x, stored = (each / torch.where(narrow, largest, 1.0)[:, None] for each in (x, stored))
        else:
            rows[:, start:stop] = x.contiguous().numpy().view(np.uint8)
            stored = x
        cosine, distance = _row_errors(x, stored) if stored is not x else (np.zeros(1), np.zeros(1))
        maxima.append(cosine.max())
        sums.append(cosine.sum())
        relative.append(distance.max())
    return rows, (np.asarray(maxima, np.float32), np.asarray(sums, np.float64), np.asarray(relative, np.float32))


def _row_errors(x: Tensor, stored: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return 1 - cos and the relative L2 norm of the difference d, each `(b,)`.

    With p = <x, d> / |x|^2 and q = |d|^2 / |x|^2: cos = (1 + r)^(-1/2), r = (q - p^2) / (1 + p)^2. No nearly equal
    numbers are subtracted, so errors far below the float32 precision of 1 - cos are resolved.
    """
    d = stored - x
    square, p, q = (torch.linalg.vecdot(a, b).double().numpy() for a, b in ((x, x), (x, d), (d, d)))
    with np.errstate(all="ignore"):
        p, q = p / square, q / square
        r = np.maximum(q - p * p, 0.0) / (1.0 + p) ** 2
        root = np.sqrt(1.0 + r)
        cosine = r / (root * (root + 1.0))
    # A zero row is stored without error; a row that became zero has cosine error 1.
    cosine, distance = np.where(p > -0.999, cosine, 1.0), np.sqrt(q)
    return np.where(square > 0, cosine, 0.0), np.where(square > 0, distance, 0.0)


def unpack(layout: Layout, rows: NDArray[np.uint8], names: Iterable[str]) -> dict[str, Tensor]:
    """Convert rows `(b, row_bytes)` uint8, writable and each contiguous, to the named features `(b, ...)` float32."""
    out = {}
    for name in names:
        start, stop = layout.places[name]
        values = rows[:, start:stop]
        if layout.dtype == "int8":
            at = 4 * list(layout.features).index(name)
            scale = np.ascontiguousarray(rows[:, at : at + 4]).view("<f4").astype(np.float32)
            x = torch.from_numpy(values.view(np.int8)).float().mul_(torch.from_numpy(scale))
        else:
            x = torch.from_numpy(np.ascontiguousarray(values).view(DTYPES[layout.dtype])).float()
        out[name] = x.reshape(len(rows), *layout.features[name])
    return out
