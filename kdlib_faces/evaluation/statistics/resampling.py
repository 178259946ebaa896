"""Scores of all pairs of a set of images, and their rates under identity weights.

A bootstrap resample of identities changes no score, only the weight of each pair: m_i for a genuine pair of identity i,
m_i m_j for an impostor pair. All scores are therefore sorted once, and a resample is one pass of cumulated weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from kdlib_faces.evaluation._checks import rows_at_a_time
from kdlib_faces.evaluation._types import AnyArray, FloatArray, IntArray, JsonDict
from kdlib_faces.evaluation.matching.search import cosines, dot_rows
from kdlib_faces.evaluation.roc import allowed_false_accepts, by_far
from kdlib_faces.evaluation.statistics.intervals import Estimate, bootstrap_estimate

BLOCK = 256
TAIL = 4.0


@dataclass(frozen=True)
class PairScores:
    """Every pair of images once: genuine pairs (g,) and impostor pairs (N,), with identities and bins, -1 for no bin.

    A cost is a negated score, so that the most similar pair comes first in rising order. `weight` (N,) is the number of
    pairs that an impostor pair represents; None for one each.
    """

    genuine_cost: FloatArray
    genuine_identity: IntArray
    genuine_bin: AnyArray
    impostor_cost: FloatArray
    impostor_first: AnyArray
    impostor_second: AnyArray
    impostor_bin: AnyArray
    bins: int
    weight: FloatArray | None = None

    def genuine_in(self, number: int) -> slice | IntArray:
        """The genuine pairs of a bin; all of them for `number == bins`."""
        return slice(None) if number == self.bins else np.flatnonzero(self.genuine_bin == number)

    def impostors_in(self, number: int) -> slice | IntArray:
        """The impostor pairs of a bin; all of them for `number == bins`."""
        return slice(None) if number == self.bins else np.flatnonzero(self.impostor_bin == number)


@dataclass(frozen=True)
class Rates:
    """Rates of r resamples in each bin and, last, over all pairs; NaN if a resample holds no pair.

    AUC (r, bins + 1) and TAR (r, bins + 1, fars), against all impostor pairs and against those of the same bin (`own_`).
    """

    auc: FloatArray
    tar: FloatArray
    own_auc: FloatArray
    own_tar: FloatArray


def genuine_pairs(identities: IntArray) -> tuple[IntArray, IntArray]:
    """Row numbers (g,), (g,) of all genuine pairs i < j.

    Examples:
        >>> i, j = genuine_pairs(np.array([0, 1, 0, 0]))
        >>> list(zip(i.tolist(), j.tolist()))
        [(0, 2), (0, 3), (2, 3)]
    """
    order = np.argsort(identities, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(identities[order])) + 1)
    pairs = [group[np.stack(np.triu_indices(group.size, 1))] for group in groups]
    i, j = np.concatenate(pairs, axis=1)
    return i, j


def score_pairs(
    unit: FloatArray, identities: IntArray, bin_of: Callable[[IntArray, IntArray], AnyArray], bins: int
) -> PairScores:
    """Cosine of every pair of unit rows (n, d), in blocks; the peak is about 35 bytes per pair.

    `bin_of` returns the bin of pairs of rows (broadcast), -1 for none.
    """
    i, j = genuine_pairs(identities)
    cost = -dot_rows(unit, i, unit, j)
    order = np.argsort(cost, kind="stable")
    genuine = (cost[order], identities[i][order], bin_of(i, j)[order])

    count = identities.size
    total = count * (count - 1) // 2 - i.size
    costs = np.empty(total, dtype=np.float64)
    first, second = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int32)
    place = np.empty(total, dtype=np.int16)
    filled = 0
    step = rows_at_a_time(BLOCK, count)
    for start in range(0, count, step):
        rows, columns = np.arange(start, min(start + step, count))[:, None], np.arange(start, count)[None, :]
        wanted = (columns > rows) & (identities[rows] != identities[columns])
        part = slice(filled, filled + int(wanted.sum()))
        costs[part] = -cosines(unit[rows[:, 0]], unit[start:])[wanted]
        first[part] = np.broadcast_to(identities[rows], wanted.shape)[wanted]
        second[part] = np.broadcast_to(identities[columns], wanted.shape)[wanted]
        place[part] = bin_of(rows, columns)[wanted]
        filled = part.stop
    order = np.argsort(costs)
    # One at a time, so that each unsorted array is freed before the next sorted one is made.
    costs = costs[order]
    first = first[order]
    second = second[order]
    place = place[order]
    return PairScores(*genuine, costs, first, second, place, bins)


def thin(pairs: PairScores, *, max_pairs: int, fars: Sequence[float], seed: int) -> PairScores:
    """About `max_pairs` impostor pairs for the resamples: the most similar of each bin, and a sample of the others.

    The pairs that decide a threshold are all kept (of each bin the `4 max(fars)` part of highest scores, and at least
    1000). The others are sampled evenly along their scores, and weighted by the inverse of the sampled fraction. This
    changes the width of an interval by about one per cent (3.4 million pairs thinned to 2 million). All genuine pairs are
    kept, and all impostor pairs if there are at most `max_pairs`.
    """
    if pairs.impostor_cost.size <= max_pairs:
        return pairs
    generator = np.random.default_rng([seed, 1])
    weight = np.zeros(pairs.impostor_cost.size)
    for place in range(-1, pairs.bins):
        members = np.flatnonzero(pairs.impostor_bin == place)
        tail = min(members.size, max(1000, int(TAIL * max(fars, default=0.0) * members.size)))
        weight[members[:tail]] = 1.0
        rest = members[tail:]
        sample = min(rest.size, max(1000, max_pairs // (pairs.bins + 1)))
        if sample:
            # Evenly along the sorted scores from a random start, so that the sample has the distribution of all.
            step = rest.size / sample
            weight[rest[((np.arange(sample) + generator.random()) * step).astype(np.int64)]] = step
    kept = np.flatnonzero(weight)
    return replace(
        pairs,
        impostor_cost=pairs.impostor_cost[kept],
        impostor_first=pairs.impostor_first[kept].astype(np.int64),
        impostor_second=pairs.impostor_second[kept].astype(np.int64),
        impostor_bin=pairs.impostor_bin[kept],
        weight=weight[kept],
    )


def resampled_rates(pairs: PairScores, resamples: IntArray | None, fars: Sequence[float]) -> Rates:
    """AUC and TAR of each bin and of all pairs, in each of the resamples (r, identities); None for one row of ones."""
    count = 1 if resamples is None else len(resamples)
    places = pairs.bins + 1
    rates = Rates(*(np.full((count, places, *more), np.nan) for more in ((), (len(fars),)) * 2))
    genuine = [pairs.genuine_cost[pairs.genuine_in(place)] for place in range(places)]
    owner = [pairs.genuine_identity[pairs.genuine_in(place)] for place in range(places)]
    # Every bin is measured against all impostor pairs first, then against its own.
    sets = [pairs.bins, *range(pairs.bins)]
    costs = {place: pairs.impostor_cost[pairs.impostors_in(place)] for place in sets}
    members = {place: pairs.impostors_in(place) for place in sets}
    edges = {
        (place, against): _edges(genuine[place], costs[against])
        for place in range(places)
        for against in {place, pairs.bins}
    }
    for row in range(count):
        m = None if resamples is None else resamples[row].astype(np.float64)
        weights = _impostor_weights(pairs, m)
        heads = [_running(None if m is None else m.take(owner[place]), genuine[place].size) for place in range(places)]
        for against in sets:
            head = _running(None if weights is None else weights[members[against]], costs[against].size)
            if head[-1] <= 0:
                continue
            limits = [_limit(costs[against], head, far) for far in fars]
            for place in range(places) if against == pairs.bins else [against]:
                if heads[place][-1] <= 0:
                    continue
                area = _area(heads[place], head, *edges[place, against])
                tars = [heads[place][np.searchsorted(genuine[place], limit)] / heads[place][-1] for limit in limits]
                if against == pairs.bins:
                    rates.auc[row, place], rates.tar[row, place] = area, tars
                if against == place:
                    rates.own_auc[row, place], rates.own_tar[row, place] = area, tars
    return rates


def _impostor_weights(pairs: PairScores, m: FloatArray | None) -> FloatArray | None:
    """m_i m_j times the weight of the pair; None for ones."""
    if m is None:
        return pairs.weight
    weights = m.take(pairs.impostor_first)
    weights *= m.take(pairs.impostor_second)
    if pairs.weight is not None:
        weights *= pairs.weight
    return weights


def _running(weights: FloatArray | None, size: int) -> FloatArray:
    """(size + 1,) weight of the first 0, 1, ... size pairs."""
    if weights is None:
        return np.arange(size + 1, dtype=np.float64)
    head = np.zeros(size + 1)
    np.cumsum(weights, out=head[1:])
    return head


def _limit(cost: FloatArray, head: FloatArray, far: float) -> float:
    """Negated threshold of the exact rule: the cost of the (k+1)-th impostor pair, counted by weight."""
    place = int(np.searchsorted(head[1:], allowed_false_accepts(far, float(head[-1])), side="right"))
    return float(cost[place]) if place < cost.size else np.inf


def _edges(genuine: FloatArray, impostor: FloatArray) -> tuple[IntArray, IntArray]:
    """For each genuine pair, the number of impostor pairs of higher score, and of at least the same score."""
    return np.searchsorted(impostor, genuine, side="left"), np.searchsorted(impostor, genuine, side="right")


def _area(genuine: FloatArray, impostor: FloatArray, above: IntArray, not_below: IntArray) -> float:
    """Weighted AUC from the two cumulated weights; ties count one half."""
    weights = np.diff(genuine)
    beaten = 2 * impostor[-1] - impostor[above] - impostor[not_below]
    return float(np.dot(weights, beaten) / (2 * genuine[-1] * impostor[-1]))


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
