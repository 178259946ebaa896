"""Bins of ages, of age gaps and of pairs of age groups."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import require
from kdlib_faces.evaluation._types import AnyArray, FloatArray, IntArray

GAP_STARTS = (0, 5, 10, 20, 30)
"""Lower ends of the bins of age gaps, years."""
AGE_STARTS = (0, 5, 13, 18, 31, 51)
"""Lower ends of the bins of the younger image's age, years."""
PROBE_AGE_STARTS = (0, 5, 11, 18, 31, 51)
"""Lower ends of the bins of FG-NET's probe ages, years."""


def check_starts(owner: str, name: str, starts: Sequence[float]) -> FloatArray:
    """Lower ends of bins: not negative, rising."""
    for start in starts:
        check_number(owner, name, start, min=0)
    array = np.asarray(tuple(starts), dtype=np.float64)
    rising = array.size > 0 and bool((np.diff(array) > 0).all())
    require(rising, owner, f"{name} must rise from the first, got {tuple(starts)}")
    return array


def bin_names(starts: FloatArray) -> list[str]:
    """`0-4` for whole years, `0-<0.5` for fractions, `30+` for the last.

    Examples:
        >>> bin_names(np.array([0.0, 5.0, 6.0, 10.0]))
        ['0-4', '5', '6-9', '10+']
    """
    names = []
    for low, high in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if low.is_integer() and high.is_integer():
            names.append(f"{low:g}" if high == low + 1 else f"{low:g}-{high - 1:g}")
        else:
            names.append(f"{low:g}-<{high:g}")
    return [*names, f"{starts[-1]:g}+"]


def place(starts: FloatArray, years: AnyArray | Sequence[float]) -> IntArray:
    """Bin of each number of years, -1 below the first and for NaN.

    Years are rounded to 4 decimals, so that float32 rounding does not move a gap of 5 below 5.

    Examples:
        >>> place(np.array([0.0, 5.0]), [4.9, 4.99999999, 12.0]).tolist()
        [0, 1, 1]
    """
    rounded = np.round(np.asarray(years, dtype=np.float64), 4)
    bins = (np.searchsorted(starts, rounded, side="right") - 1).astype(np.int64)
    return np.where(np.isnan(rounded), -1, bins)


def group_bins(owner: str, labels: list[str]) -> tuple[list[str], npt.NDArray[np.int16]]:
    """Names of the unordered pairs of groups, and the bin of each pair (groups, groups)."""
    require(len(labels) <= 64, owner, f"age_groups must hold at most 64 groups, got {len(labels)}")
    joint = " / " if any("-" in label for label in labels) else "-"
    table = np.zeros((len(labels), len(labels)), dtype=np.int16)
    names: list[str] = []
    for a, b in zip(*np.triu_indices(len(labels)), strict=True):
        table[a, b] = table[b, a] = len(names)
        names.append(labels[a] + joint + labels[b])
    return names, table
