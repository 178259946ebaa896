"""TAR and AUC of genuine pairs by bin, against all impostor pairs and against those of the same bin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kdlib_faces.evaluation._types import IntArray, JsonDict
from kdlib_faces.evaluation.roc import allowed_false_accepts, by_far
from kdlib_faces.evaluation.statistics.intervals import Estimate, bootstrap_estimate
from kdlib_faces.evaluation.statistics.resampling import PairScores, resampled_rates


@dataclass(frozen=True)
class BinResult:
    """One bin of age gaps (or one pair of age groups), or all pairs.

    Attributes:
        name: Name of the bin, such as `"10-19"`; `"all"` for all pairs.
        genuine: Number of genuine pairs.
        impostor: Number of impostor pairs.
        auc: AUC of its genuine pairs against all impostor pairs.
        tar: Target FAR to the part of its genuine pairs accepted at the one threshold set on all impostor pairs.
        own_auc: AUC of its genuine pairs against its own impostor pairs, which have the same gap.
        own_tar: Target FAR to the TAR at the threshold set on its own impostor pairs.
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
        return {far: estimate.complement() for far, estimate in self.tar.items()}

    def resolves(self, far: float) -> bool:
        """Whether its own impostor pairs allow a false accept at this FAR; True for an empty bin."""
        return self.own_tar[far].value is None or allowed_false_accepts(far, self.impostor) >= 1

    def metrics(self) -> dict[str, Estimate]:
        """Every estimate by name: `auc`, `own_auc`, `tar@0.001`, `own_tar@0.001`."""
        named = {"auc": self.auc, "own_auc": self.own_auc}
        named |= {f"tar@{far:g}": estimate for far, estimate in self.tar.items()}
        return named | {f"own_tar@{far:g}": estimate for far, estimate in self.own_tar.items()}

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        counts = {"name": self.name, "genuine": self.genuine, "impostor": self.impostor}
        pooled = {"auc": self.auc.to_dict(), "tar": by_far(self.tar)}
        return {**counts, **pooled, "own_auc": self.own_auc.to_dict(), "own_tar": by_far(self.own_tar)}


def bin_results(
    pairs: PairScores,
    thinned: PairScores,
    names: Sequence[str],
    fars: Sequence[float],
    resamples: IntArray,
    level: float,
) -> list[BinResult]:
    """The rates of every bin and, last, of all pairs: values from `pairs`, resamples (r, identities) of `thinned`."""
    values, resampled = resampled_rates(pairs, None, fars), resampled_rates(thinned, resamples, fars)
    results = []
    for number, name in enumerate([*names, "all"]):
        members = pairs.genuine_in(number)
        genuine, clusters = pairs.genuine_cost[members].size, np.unique(pairs.genuine_identity[members]).size
        estimate = partial(bootstrap_estimate, n=genuine, clusters=clusters, level=level)
        tar, own_tar = (
            {far: estimate(v[0, number, k], r[:, number, k]) for k, far in enumerate(fars)}
            for v, r in ((values.tar, resampled.tar), (values.own_tar, resampled.own_tar))
        )
        auc = estimate(values.auc[0, number], resampled.auc[:, number])
        own_auc = estimate(values.own_auc[0, number], resampled.own_auc[:, number])
        impostor = pairs.impostor_cost[pairs.impostors_in(number)].size
        results.append(BinResult(name, genuine, impostor, auc, tar, own_auc, own_tar))
    return results
