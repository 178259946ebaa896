"""Selection of the pairs on which a model fails."""

from collections.abc import Callable, Hashable, Iterable

import numpy as np

from kdlib_faces.evaluation._types import AnyArray, BoolArray, FloatArray, IntArray, LabelArray
from kdlib_faces.evaluation.summary import HardPair

BLOCK = 512
MANY = 2000
"""Candidates per wanted pair that are sorted; identities and templates occur in many pairs."""


def first_disjoint(order: Iterable[int], ends: Callable[[int], Iterable[Hashable]], count: int) -> list[int]:
    """The first `count` items of an order that share no end (identity or image) with an earlier item.

    Examples:
        >>> first_disjoint([2, 0, 1], [("ann", "bob"), ("cy", "dan"), ("ann", "eve")].__getitem__, 5)
        [2, 1]
    """
    seen: set[Hashable] = set()
    chosen: list[int] = []
    for item in order:
        if len(chosen) >= count:
            break
        own = set(ends(item))
        if not seen & own:
            seen |= own
            chosen.append(item)
    return chosen


def hardest_pairs(
    scores: AnyArray, same: BoolArray, ends: tuple[LabelArray, LabelArray], count: int, make: Callable[[int], HardPair]
) -> list[HardPair]:
    """The genuine pairs of lowest score, then the impostor pairs of highest score.

    Args:
        scores: (p,) scores.
        same: (p,) which pairs are genuine.
        ends: What may occur once in the pairs of each kind: two identities, images or templates per pair, (p,) each.
        count: Number of pairs of each kind; fewer if there are not so many.
        make: Number of a pair to the pair.
    """
    chosen: list[int] = []
    for kind in (True, False) if count else ():
        members = np.flatnonzero(same == kind)
        cost = scores[members] if kind else -scores[members]
        if members.size > MANY * count + 1:
            limit = np.partition(cost, MANY * count)[MANY * count]
            members, cost = members[cost <= limit], cost[cost <= limit]
        order = members[np.argsort(cost, kind="stable")].tolist()
        chosen += first_disjoint(order, lambda pair: [end[pair].item() for end in ends], count)
    return [make(pair) for pair in chosen]


def most_similar_impostors(
    left: FloatArray, right: FloatArray, left_codes: IntArray, right_codes: IntArray, count: int
) -> list[tuple[int, int, float]]:
    """The impostor pairs of highest score, each identity once, without a list of all pairs.

    Args:
        left: (n, d) unit rows.
        right: (m, d) unit rows.
        left_codes: (n,) identities.
        right_codes: (m,) identities.
        count: Number of pairs.

    Returns:
        Row of `left`, row of `right` and score of each pair, falling.
    """
    free, right_free = np.ones(left_codes.size, dtype=np.bool_), np.ones(right_codes.size, dtype=np.bool_)
    partner, score = np.zeros(left_codes.size, dtype=np.int64), np.full(left_codes.size, -np.inf)
    stale = np.arange(left_codes.size)
    pairs: list[tuple[int, int, float]] = []
    while len(pairs) < count:
        for start in range(0, stale.size, BLOCK):
            rows = stale[start : start + BLOCK]
            allowed = (left_codes[rows, None] != right_codes) & right_free
            scores = np.where(allowed, left[rows] @ right.T, -np.inf)
            partner[rows], score[rows] = scores.argmax(axis=1), scores.max(axis=1)
        i = int(np.where(free, score, -np.inf).argmax())
        j = int(partner[i])
        if not free[i] or not np.isfinite(score[i]):
            break
        pairs.append((i, j, float(score[i])))
        taken = [left_codes[i], right_codes[j]]
        free &= ~np.isin(left_codes, taken)
        right_free &= ~np.isin(right_codes, taken)
        # Only rows whose partner was just taken need a new one.
        stale = np.flatnonzero(free & ~right_free[partner])
    return pairs


def missed_probes(
    probes: IntArray,
    mates: tuple[IntArray, FloatArray],
    impostors: tuple[IntArray, FloatArray],
    identities: LabelArray,
    count: int,
    impostor_set: int = 0,
) -> list[HardPair]:
    """The missed probes whose mate is furthest behind an impostor, each identity once.

    Args:
        probes: (m,) rows of the missed probes.
        mates: (m,) rows and (m,) scores of their mates.
        impostors: (m,) rows and (m,) scores of the impostors ahead of them; -1 for a row that cannot be shown.
        identities: (m,) identity of each probe.
        count: Number of probes.
        impostor_set: Index of the image set of the impostors.

    Returns:
        Each chosen probe with its mate, then each with its impostor.
    """
    order = np.argsort(mates[1] - impostors[1], kind="stable")
    chosen = first_disjoint(order, lambda probe: [identities[probe]], count)
    genuine = [HardPair(int(probes[k]), int(mates[0][k]), float(mates[1][k]), True) for k in chosen]
    return genuine + [
        HardPair(int(probes[k]), int(impostors[0][k]), float(impostors[1][k]), False, right_set=impostor_set)
        for k in chosen
        if impostors[0][k] >= 0
    ]
