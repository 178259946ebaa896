"""Bins of pairs of images, by age gap or by pair of age groups."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import check_ages, check_labels
from kdlib_faces.evaluation._types import ArrayLike, FloatArray, IntArray
from kdlib_faces.evaluation.statistics.bins import bin_names, check_starts, group_bins, place
from kdlib_faces.evaluation.statistics.resampling import genuine_pairs


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
