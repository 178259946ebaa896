"""Bins of ages, of age gaps and of pairs of age groups."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import check_ages, check_numbers, require
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, FloatArray, IntArray
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs

GAP_STARTS = (0, 5, 10, 20, 30)
"""Lower ends of the bins of age gaps, years."""
AGE_STARTS = (0, 5, 13, 18, 31, 51)
"""Lower ends of the bins of the younger image's age, years."""
PROBE_AGE_STARTS = (0, 5, 11, 18, 31, 51)
"""Lower ends of the bins of FG-NET's probe ages, years."""


def check_starts(owner: str, name: str, starts: Sequence[float]) -> FloatArray:
    """Lower ends of bins: not negative, rising."""
    array = np.asarray(check_numbers(owner, name, starts, min=0), dtype=np.float64)
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


class PairBins:
    """Bins of pairs of images (n,), by their ages in years, else by their groups; `starts` are lower ends of gaps."""

    def __init__(
        self,
        owner: str,
        codes: IntArray,
        ages: ArrayLike | None,
        age_groups: ArrayLike | None,
        starts: Sequence[float],
        name: str = "bins",
    ) -> None:
        self.codes, self.kind = codes, "group" if ages is None else "gap"
        self.ages: FloatArray | None = None
        if ages is not None:
            self.ages = check_ages(owner, ages, codes.size)
            self.starts = check_starts(owner, name, starts)
            self.names = bin_names(self.starts)
        else:
            if age_groups is None:
                raise InputError(f"{owner}: ages or age_groups must be given, got neither")
            self.groups, groups = check_labels(owner, "age_groups", age_groups, rows=codes.size, like="identities")
            self.group_names = [str(label) for label in groups]
            self.names, self.group_bin = group_bins(owner, self.group_names)

    @property
    def values(self) -> FloatArray | IntArray:
        """(n,) ages or codes of the groups."""
        return self.groups if self.ages is None else self.ages

    def of(self, i: IntArray, j: IntArray) -> npt.NDArray[np.int16]:
        """Bin of the pairs of rows i and j (broadcast together), -1 for none."""
        if self.ages is not None:
            return place(self.starts, np.abs(self.ages[i] - self.ages[j])).astype(np.int16)
        return self.group_bin[self.groups[i], self.groups[j]]

    def largest(self) -> str | None:
        """Name of the bin of the largest gap with genuine pairs; of groups, the mixed bin with the most of them."""
        bins = self.of(*genuine_pairs(self.codes)).astype(np.int64)
        held = np.bincount(bins + 1, minlength=len(self.names) + 1)[1:]
        if self.kind == "group":
            held = np.where(np.isin(np.arange(held.size), np.diag(self.group_bin)), 0, held)
        if not held.any():
            return None
        return self.names[int(held.argmax() if self.kind == "group" else np.flatnonzero(held)[-1])]
