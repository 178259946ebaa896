"""Selection of the pairs on which a model fails."""

from collections.abc import Callable, Hashable, Iterable

import numpy as np

from kdlib_faces.evaluation._checks import rows_at_a_time
from kdlib_faces.evaluation._types import AnyArray, BoolArray, FloatArray, IntArray, LabelArray
from kdlib_faces.evaluation.summary import HardPair

BLOCK = 512
MANY = 2000
"""Candidates per wanted pair that are sorted; identities and templates occur in many pairs."""


def first_disjoint(order: Iterable[int], ends: Callable[[int], Iterable[Hashable]], count: int) -> list[int]:
    """The first `count` items of an order that share no end (identity or image) with an earlier item."""
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
    """At most `count` genuine pairs of lowest score, then as many impostor pairs of highest score.

    `ends` are the two identities, images or templates of each pair, (p,) each; one occurs once in the pairs of each kind.
    `make` returns the pair of a number.
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
    """The impostor pairs of highest score, falling, each identity once: row of `left`, row of `right`, and score.

    There is no list of all pairs of the unit rows (n, d) and (m, d).
    """
    free, right_free = np.ones(left_codes.size, dtype=np.bool_), np.ones(right_codes.size, dtype=np.bool_)
    partner, score = np.zeros(left_codes.size, dtype=np.int64), np.full(left_codes.size, -np.inf)
    stale, step = np.arange(left_codes.size), rows_at_a_time(BLOCK, right_codes.size)
    pairs: list[tuple[int, int, float]] = []
    while len(pairs) < count:
        for start in range(0, stale.size, step):
            rows = stale[start : start + step]
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
    """The missed probes whose mate is furthest behind an impostor, each identity once: with the mate, then the impostor.

    `mates` and `impostors` are rows (m,) and scores (m,); -1 stands for a row that cannot be shown. `impostor_set` is the
    index of the image set of the impostors.
    """
    order = np.argsort(mates[1] - impostors[1], kind="stable")
    chosen = first_disjoint(order, lambda probe: [identities[probe]], count)
    genuine = [HardPair(int(probes[k]), int(mates[0][k]), float(mates[1][k]), True) for k in chosen]
    return genuine + [
        HardPair(int(probes[k]), int(impostors[0][k]), float(impostors[1][k]), False, right_set=impostor_set)
        for k in chosen
        if impostors[0][k] >= 0
    ]
