"""Search among any number of distractors in one pass.

Scores are float32 matrix products; every score that can decide something is computed again in float64 from the rows
themselves, so the result is that of float64 throughout, for any block size.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from kdlib_faces.evaluation._checks import unit_block
from kdlib_faces.evaluation._types import AnyArray, FloatArray, IntArray, SingleArray

BLOCK = 4096
CELLS = 2**23
"""Number of scores in memory; with many probes, blocks become smaller."""
PAIRS = 4096
MANY = 200_000
DECIMALS = 12


def product_error(width: int) -> float:
    """Bound on the error of a float32 product of two unit rows of this width, with all roundings."""
    return (2 * width + 16) * 2.0**-24


def dot_rows(left: AnyArray, i: IntArray, right: AnyArray, j: IntArray, *, single: bool = False) -> FloatArray:
    """(p,) products of unit rows i of `left` and j of `right`, rounded to 12 decimals, so that rows of equal direction tie.

    `single` rows have the length 1 to float32 precision only; their products are divided by the lengths.
    """
    out = np.empty(i.size)
    for start in range(0, i.size, PAIRS):
        part = slice(start, start + PAIRS)
        a, b = (rows[at[part]].astype(np.float64, copy=False) for rows, at in ((left, i), (right, j)))
        out[part] = np.einsum("pd,pd->p", a, b)
        if single:
            out[part] /= np.sqrt(np.einsum("pd,pd->p", a, a) * np.einsum("pd,pd->p", b, b))
    return np.round(out, DECIMALS)


def cosines(left: AnyArray, right: AnyArray) -> FloatArray:
    """(n, m) products of all unit rows, float64 and rounded as in `dot_rows`."""
    products = left.astype(np.float64, copy=False) @ right.astype(np.float64, copy=False).T
    return np.round(products, DECIMALS, out=products)


def ranks_of(scores: FloatArray, columns: IntArray) -> tuple[FloatArray, IntArray]:
    """The score (p,) in one column of each row of `scores` (p, n), and its rank in the row from 1.

    Equal scores are ranked by column, the lower one first.

    Examples:
        >>> ranks_of(np.array([[0.5, 0.9, 0.5], [0.1, 0.2, 0.3]]), np.array([2, 2]))
        (array([0.5, 0.3]), array([3, 1]))
    """
    chosen = np.take_along_axis(scores, columns[:, None], axis=1)
    ahead = (scores > chosen) | ((scores == chosen) & (np.arange(scores.shape[1]) < columns[:, None]))
    return chosen[:, 0], 1 + ahead.sum(axis=1)


@dataclass
class Search:
    """The `ranks` largest distractor scores of each probe, of unit rows (p, d), and the `top` largest of all."""

    owner: str
    probes: FloatArray
    ranks: int
    top: int
    seen: int = 0
    best: FloatArray = field(init=False)
    """(p, ranks) largest scores of each probe, falling; -inf for missing ones."""
    nearest: IntArray = field(init=False)
    """(p,) number of each probe's most similar distractor, the lowest of equal ones; -1 for none, or one that scores 0."""
    largest: FloatArray = field(init=False)
    """At most `top` of the largest scores, unordered."""

    def __post_init__(self) -> None:
        self.best = np.full((len(self.probes), self.ranks), -np.inf)
        self.nearest = np.full(len(self.probes), -1, dtype=np.int64)
        self.largest = np.empty(0)
        self._single = self.probes.astype(np.float32)
        self._error = product_error(self.probes.shape[1])
        self._scores = np.empty((0, 0), dtype=np.float32)

    def add(self, rows: AnyArray, numbers: IntArray) -> None:
        """Add distractors (m, d), none of them zero, with their numbers (m,)."""
        step = max(1, min(BLOCK, CELLS // len(self.probes)))
        for start in range(0, len(rows), step):
            self._add(rows[start : start + step], numbers[start : start + step])

    def add_zeros(self, count: int) -> None:
        """Add distractors that score 0 against every probe."""
        if count:
            self.nearest[self.best[:, 0] < 0] = -1
            zeros = np.zeros((len(self.probes), min(count, self.ranks)))
            self.best = -np.sort(-np.hstack([self.best, zeros]), axis=1)[:, : self.ranks]
            self._keep(np.zeros(min(count * len(self.probes), self.top)))
            self.seen += count

    def _add(self, block: AnyArray, numbers: IntArray) -> None:
        offset = int(numbers[0])
        single = self._unit_single(block, offset)
        shape = (len(self.probes), len(block))
        if self._scores.shape != shape:
            self._scores = np.empty(shape, dtype=np.float32)
        scores = np.matmul(self._single, single.T, out=self._scores)
        highest = scores.max(axis=1)
        self._update_best(block, scores, highest, numbers)
        if self.top:
            self._update_largest(block, scores, highest, offset)
        self.seen += len(block)

    def _unit_single(self, block: AnyArray, offset: int) -> SingleArray:
        # torch converts float16 seven times as fast as NumPy, which takes a tenth of the time of the products.
        half = torch.from_numpy(np.array(block)) if block.dtype == np.float16 else None
        with np.errstate(all="ignore"):
            single: SingleArray = block.astype(np.float32) if half is None else half.float().numpy()
            square = np.einsum("nd,nd->n", single, single)
            # Also False for NaN. The float64 path normalizes rows that float32 cannot square, and raises for bad rows.
            if not ((square > 1e-30) & (square < 1e30)).all():
                return unit_block(self.owner, "distractors", block, offset).astype(np.float32)
        single *= (1 / np.sqrt(square))[:, None]
        return single

    def _exact(self, block: AnyArray, probe: IntArray, row: IntArray, offset: int) -> FloatArray:
        """(c,) float64 scores of a few pairs."""
        used, place = np.unique(row, return_inverse=True)
        unit = unit_block(self.owner, "distractors", block[used], offset)
        if probe.size > MANY and probe.size * 16 > len(self.probes) * len(block):
            # In the first block of a search for millions, or with the many ties of a collapsed model, one product is faster.
            return cosines(self.probes, unit)[probe, place]
        return dot_rows(self.probes, probe, unit, place)

    def _update_best(self, block: AnyArray, scores: SingleArray, highest: SingleArray, numbers: IntArray) -> None:
        moved = np.flatnonzero(highest > self.best[:, -1] - self._error)
        if not moved.size:
            return
        part = scores[moved]
        floor = self.best[moved, -1] - self._error
        if self.ranks < part.shape[1]:
            kth = highest[moved]
            if self.ranks > 1:
                kth = np.partition(part, -self.ranks, axis=1)[:, -self.ranks]
            floor = np.maximum(floor, kth - 2 * self._error)
        where, row = np.nonzero(part >= floor[:, None])
        exact = self._exact(block, moved[where], row, int(numbers[0]))
        order = np.lexsort((-exact, where))
        where, row, exact = where[order], row[order], exact[order]
        rank = np.arange(where.size) - np.searchsorted(where, where)
        kept = rank < self.ranks
        ahead = np.flatnonzero((rank == 0) & (exact > self.best[moved[where], 0]))
        self.nearest[moved[where[ahead]]] = numbers[row[ahead]]
        fresh = np.full((moved.size, self.ranks), -np.inf)
        fresh[where[kept], rank[kept]] = exact[kept]
        self.best[moved] = -np.sort(-np.hstack([self.best[moved], fresh]), axis=1)[:, : self.ranks]

    def _update_largest(self, block: AnyArray, scores: SingleArray, highest: SingleArray, offset: int) -> None:
        floor = (float(self.largest.min()) if self.largest.size >= self.top else -np.inf) - self._error
        moved = np.flatnonzero(highest > floor)
        if not moved.size:
            return
        part = scores[moved]
        good = part > floor
        values = part[good]
        if values.size > self.top:
            kth = float(np.partition(values, -self.top)[-self.top])
            good &= part >= kth - 2 * self._error
        where, row = np.nonzero(good)
        self._keep(self._exact(block, moved[where], row, offset))

    def _keep(self, scores: FloatArray) -> None:
        merged = np.concatenate([self.largest, scores])
        if merged.size > self.top:
            merged = np.partition(merged, -self.top)[-self.top :] if self.top else merged[:0]
        self.largest = merged
