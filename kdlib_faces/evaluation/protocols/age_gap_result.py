"""Evaluation room: what an evaluation by age gap found. Plain data and its JSON form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdlib_faces.evaluation._checks import FloatArray, require
from kdlib_faces.evaluation.roc import TarAtFar, allowed_false_accepts, far_name
from kdlib_faces.evaluation.statistics.intervals import Estimate

__all__ = ["AgeGapResult", "BinResult"]


@dataclass(frozen=True)
class BinResult:
    """One bin of age gaps (or of a pair of age groups), or all pairs.

    Args:
        name: of the bin, `"10-19"`; `"all"` for all pairs.
        genuine: how many genuine pairs it holds.
        impostor: how many impostor pairs.
        auc: its genuine pairs against all impostor pairs.
        tar: by target FAR, the part of its genuine pairs accepted at the one threshold set on all impostor pairs.
        own_auc: its genuine pairs against its own impostor pairs, which have the same gap.
        own_tar: by target FAR, at the threshold set on its own impostor pairs.
    """

    name: str
    genuine: int
    impostor: int
    auc: Estimate
    tar: Mapping[float, Estimate]
    own_auc: Estimate
    own_tar: Mapping[float, Estimate]

    @property
    def fnmr(self) -> dict[float, Estimate]:
        """False non-match rate by target FAR: 1 - TAR at the global threshold."""
        return {far: _complement(estimate) for far, estimate in self.tar.items()}

    def metrics(self) -> dict[str, Estimate]:
        """Every estimate by name: `auc`, `tar@0.001`, `own_auc`, `own_tar@0.001`."""
        named = {"auc": self.auc, "own_auc": self.own_auc}
        named |= {f"tar@{far_name(far)}": estimate for far, estimate in self.tar.items()}
        return named | {f"own_tar@{far_name(far)}": estimate for far, estimate in self.own_tar.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "genuine": self.genuine,
            "impostor": self.impostor,
            "auc": self.auc.to_dict(),
            "tar": {far_name(far): estimate.to_dict() for far, estimate in self.tar.items()},
            "own_auc": self.own_auc.to_dict(),
            "own_tar": {far_name(far): estimate.to_dict() for far, estimate in self.own_tar.items()},
        }


@dataclass(frozen=True)
class AgeGapResult:
    """The result of an `AgeGapProtocol`.

    Args:
        kind: `"gap"` (bins of years) or `"group"` (pairs of age groups).
        bins: the bins in order.
        all: over all pairs, those in no bin too.
        operating_points: by target FAR, the global threshold and its counts; its own interval takes pairs as
            independent.
        roc: measured FAR and TAR, for `"all"` and for the bin of the largest gap against its own impostor pairs.
        large_gap: name of that bin; None where no bin has a genuine pair. Without impostor pairs it has no `roc`.
        edges: (e + 1,) edges of the histogram's score bins.
        genuine_counts: by bin name, (e,) genuine scores in each score bin.
        impostor_counts: (e,) all impostor scores.
        level: confidence of the intervals.
        fingerprint: of the protocol, so that only like is compared with like.
    """

    kind: str
    bins: tuple[BinResult, ...]
    all: BinResult
    operating_points: Mapping[float, TarAtFar]
    roc: Mapping[str, tuple[FloatArray, FloatArray]]
    large_gap: str | None
    edges: FloatArray
    genuine_counts: Mapping[str, list[int]]
    impostor_counts: list[int]
    level: float
    fingerprint: str

    def bin(self, name: str) -> BinResult:
        """The bin of this name, or `"all"`.

        Raises:
            ValueError: there is none.
        """
        known = {entry.name: entry for entry in (*self.bins, self.all)}
        require(name in known, "AgeGapResult.bin", f"name must be one of {', '.join(known)}, got {name!r}")
        return known[name]

    def unresolved(self) -> list[str]:
        """The estimates with too few impostor pairs for their FAR: their TAR is the one at no false accept.

        Returns:
            One line each, such as `"30+: own_tar@0.001 (412 impostor pairs)"`.
        """
        lines = [
            f"all: tar@{far_name(far)} ({point.impostors} impostor pairs)"
            for far, point in self.operating_points.items()
            if not point.resolvable
        ]
        for entry in self.bins:
            lines += [
                f"{entry.name}: own_tar@{far_name(far)} ({entry.impostor} impostor pairs)"
                for far, estimate in entry.own_tar.items()
                if estimate.value is not None and allowed_false_accepts(far, entry.impostor) < 1
            ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The `age_gap` entry of a report: plain values for JSON."""
        return {
            "kind": self.kind,
            "bins": [entry.to_dict() for entry in self.bins],
            "all": self.all.to_dict(),
            "roc": {name: {"far": far.tolist(), "tar": tar.tolist()} for name, (far, tar) in self.roc.items()},
            "histogram": {
                "edges": self.edges.tolist(),
                "genuine": {name: list(counts) for name, counts in self.genuine_counts.items()},
                "impostor": list(self.impostor_counts),
            },
        }


def _complement(estimate: Estimate) -> Estimate:
    low = None if estimate.high is None else 1 - estimate.high
    high = None if estimate.low is None else 1 - estimate.low
    value = None if estimate.value is None else 1 - estimate.value
    replicates = None if estimate.replicates is None else np.subtract(1, estimate.replicates)
    return Estimate(value, low, high, estimate.n, replicates)
