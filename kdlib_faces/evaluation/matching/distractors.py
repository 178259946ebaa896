"""Distractors in blocks, with noisy ones removed; the trials and rates among them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np

from kdlib_faces.evaluation._checks import check_each, is_shards, require, shards_of, to_numpy
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, Embeddings, FloatArray, IntArray, JsonDict
from kdlib_faces.evaluation.roc import by_far
from kdlib_faces.evaluation.statistics.intervals import Estimate

MEGAFACE = 1_000_000
Cleaning = Literal["none", "extra_dimension", "exclude_zeros", "zeros_score_0"]


class DistractorBlock(NamedTuple):
    """Distractors (m, d) and their numbers (m,) in the given order; further ones that score 0 against every probe, and
    those left out as noisy, are counted."""

    rows: AnyArray
    numbers: IntArray
    zeros: int = 0
    cleaned: int = 0


@dataclass(frozen=True)
class DistractorTrials:
    """The single trials: a probe with one mate among all distractors.

    Attributes:
        probe: (t,) row of the probe.
        mate: (t,) row of its mate.
        score: (t,) their cosine.
        rank: (t,) rank of the mate among the distractors, from 1; the largest requested rank plus one if it is lower.
        distractor: (n,) for each probe, the number of its most similar distractor in the given order, the lowest of equal
            ones; -1 if none is above a zero row that counts as 0.
        distractor_score: (n,) for each probe, the cosine of that distractor.
    """

    probe: IntArray
    mate: IntArray
    score: FloatArray
    rank: IntArray
    distractor: IntArray
    distractor_score: FloatArray


@dataclass(frozen=True)
class GapRates:
    """The rates of one bin of age gaps between probe and mate.

    Attributes:
        name: Name of the bin, such as `"10-19"`.
        trials: Number of ordered pairs.
        rank1: Rank-1 rate, None in an empty bin.
        tar: Target FAR to the part of its pairs accepted at the one threshold.
    """

    name: str
    trials: int
    rank1: Estimate
    tar: Mapping[float, Estimate]

    def to_dict(self) -> JsonDict:
        """Plain values for JSON."""
        return {"name": self.name, "trials": self.trials, "rank1": self.rank1.to_dict(), "tar": by_far(self.tar)}


def distractor_blocks(
    owner: str,
    distractors: Embeddings,
    width: int,
    *,
    cleaning: Cleaning,
    sizes: Sequence[int],
    max_distractors: int,
    block_size: int,
) -> Iterator[DistractorBlock]:
    """Read distractors in blocks of at most `block_size` rows that end where one of `sizes`, rising, is reached.

    `width` is the number of columns, with the extra one of `"extra_dimension"`.
    """
    total = used = 0
    for shard in shards_of(owner, "distractors", distractors, width):
        start = 0
        while start < len(shard):
            limit = min([block_size, *(size - used for size in sizes if size > used)])
            rows = shard[start : start + limit]
            start += len(rows)
            numbers = np.arange(total, total + len(rows))
            total += len(rows)
            message = f"max_distractors must be an upper bound, got {max_distractors} and a row {max_distractors}"
            require(total <= max_distractors, owner, message)
            block = DistractorBlock(rows, numbers) if cleaning == "none" else _clean(owner, rows, numbers, cleaning)
            used += len(block.rows) + block.zeros
            yield block


def _clean(owner: str, rows: AnyArray, numbers: IntArray, cleaning: Cleaning) -> DistractorBlock:
    # Checked before rows are left out, so that the message gives the number of the bad row.
    finite = np.isfinite(rows).all(axis=1)
    check_each(owner, "distractors", finite, "finite (no NaN, no infinity)", offset=int(numbers[0]))
    if cleaning == "extra_dimension":
        good, rows = rows[:, -1] == 0, rows[:, :-1]
    else:
        good = rows.any(axis=1)
    bad = int(good.size - good.sum())
    if bad:
        rows, numbers = rows[good], numbers[good]
    return DistractorBlock(rows, numbers, *((bad, 0) if cleaning == "zeros_score_0" else (0, bad)))


def known_size(owner: str, distractors: Embeddings) -> int:
    """Number of distractors; MegaFace's million for an iterator, whose length is not known."""
    if not is_shards(distractors):
        array = to_numpy(cast(ArrayLike, distractors))
        require(array.ndim == 2, owner, f"distractors must be (m, d), or shards, got {array.shape}")
        return max(1, len(array))
    if isinstance(distractors, (list, tuple)):
        return max(1, sum(len(shard) for shard in distractors))
    return MEGAFACE
