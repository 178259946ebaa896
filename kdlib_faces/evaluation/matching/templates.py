"""Pooling of the images of an identity to a template, as in IJB-B and IJB-C."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import blocks, check_each, check_scores, require, shards_of, unit_block
from kdlib_faces.evaluation._labels import check_labels
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, Embeddings, FloatArray, IntArray, LabelArray

OWNER = "pool_templates"
BLOCK = 1024
LARGE = 1e30


@dataclass(frozen=True)
class Templates:
    """Pooled templates.

    Attributes:
        ids: (t,) template ids, sorted.
        features: (t, d) unit rows, float32 if the embeddings were float32 or float16, else float64.
        images: (t,) number of images of each template.
        first_rows: (t,) row of its first image.
        feature_norm: `"keep"` or `"unit"`: whether the length of an image's embedding was kept.
        detector_scores: Whether images were weighted by the detector's score.
    """

    ids: LabelArray
    features: AnyArray
    images: IntArray
    first_rows: IntArray
    feature_norm: str
    detector_scores: bool

    @property
    def convention(self) -> str:
        """How the templates were pooled, in words."""
        norm = "lengths kept" if self.feature_norm == "keep" else "each image normalized first"
        score = "times the detector score" if self.detector_scores else "no detector score"
        return f"mean over the images of a medium, sum over media, then unit; {norm}; {score}"


def pool_templates(
    embeddings: Embeddings,
    template_ids: ArrayLike,
    media_ids: ArrayLike,
    *,
    detector_scores: ArrayLike | None = None,
    feature_norm: Literal["keep", "unit"] = "keep",
) -> Templates:
    """Pool images into templates: mean over the images of one medium, sum over media, then L2 normalization.

    A template is the weighted sum of its images, with weights detector score / (images of that medium in it), so it
    takes one pass over the embeddings, in shards or mapped from a file. Sums have the precision of the embeddings, at
    least float32.

    Args:
        embeddings: (n, d), of images, not normalized (the sum of the plain and the mirrored one); one array or shards.
        template_ids: (n,) whole numbers or strings, of each row; an image in two templates has two rows.
        media_ids: (n,) whole numbers or strings; the frames of one video share one.
        detector_scores: (n,) not negative, the weight of each image; None for equal weights.
        feature_norm: `"keep"` uses an embedding's length as a quality weight (insightface's N1), `"unit"` normalizes
            each embedding first (its N0). insightface's own flag `use_norm_score` has opposite meanings in two scripts.

    Returns:
        The templates, sorted by id.

    Raises:
        ValueError: Lengths differ, a row is not finite or zero, or a template sums to zero; the message gives it.

    Examples:
        >>> pooled = pool_templates([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0]], [7, 7, 7], [1, 1, 2])
        >>> pooled.features.round(4).tolist(), pooled.images.tolist()
        ([[0.7071, 0.7071]], [3])
    """
    check_choice(OWNER, "feature_norm", feature_norm, ("keep", "unit"))
    codes, ids = check_labels(OWNER, "template_ids", template_ids)
    media, known = check_labels(OWNER, "media_ids", media_ids, rows=codes.size, like="template_ids")
    weights = np.ones(codes.size)
    if detector_scores is not None:
        weights = check_scores(OWNER, "detector_scores", detector_scores, codes.size, "template_ids")
        check_each(OWNER, "detector_scores", weights >= 0, "not negative", "entry")
    _, group, counts = np.unique(codes * known.size + media, return_inverse=True, return_counts=True)
    weights = weights / counts[group]
    sums: AnyArray | None = None
    rows, wanted = 0, f"embeddings must have one row for each of {codes.size} template_ids"
    for shard in shards_of(OWNER, "embeddings", embeddings):
        require(rows + len(shard) <= codes.size, OWNER, f"{wanted}, got more")
        precise = _precise(shard)
        sums = np.zeros((ids.size, shard.shape[1]), dtype=precise) if sums is None else sums
        part = slice(rows, rows + len(shard))
        sums = _add(sums, shard, codes[part], weights[part], feature_norm, rows)
        rows += len(shard)
    require(rows == codes.size, OWNER, f"{wanted}, got {rows}")
    assert sums is not None
    empty = np.flatnonzero(~sums.any(axis=1))
    if empty.size:
        raise InputError(f"{OWNER}: every template must have a sum, got zero for template {ids[empty[0]].item()!r}")
    for part in blocks(sums):
        sums[part] = unit_block(OWNER, "templates", sums[part], part.start)
    first_rows = np.unique(codes, return_index=True)[1]
    return Templates(ids, sums, np.bincount(codes), first_rows, feature_norm, detector_scores is not None)


def _precise(rows: AnyArray) -> type[np.float32] | type[np.float64]:
    """The precision in which rows of this type are summed."""
    return np.float64 if rows.dtype.itemsize > 4 or rows.dtype.kind != "f" else np.float32


def _add(
    sums: AnyArray, shard: AnyArray, codes: IntArray, weights: FloatArray, feature_norm: str, offset: int
) -> AnyArray:
    """Add the rows of one shard to the sums of their templates; the sums become float64 if float32 overflows."""
    if not codes.size:
        return sums
    ordered = bool((codes[1:] >= codes[:-1]).all())
    # NumPy sorts 16-bit numbers by radix.
    short = codes.astype(np.uint16) if len(sums) <= 2**16 else codes
    order = None if ordered else np.argsort(short, kind="stable")
    owner = codes if order is None else codes[order]
    starts = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    ends = np.append(starts[1:], owner.size)
    # Blocks end at the end of a template, so that each sum is computed at once.
    cuts = np.unique(np.append(np.searchsorted(starts, np.arange(0, owner.size, BLOCK)), starts.size)).tolist()
    longest = max(int(ends[last - 1] - starts[first]) for first, last in pairwise(cuts))
    buffer = None if order is None else np.empty((longest, shard.shape[1]), dtype=shard.dtype)
    for first, last in pairwise(cuts):
        begin, end = int(starts[first]), int(ends[last - 1])
        if order is None or buffer is None:
            chosen, rows = np.arange(begin, end), shard[begin:end]
        else:
            chosen = order[begin:end]
            rows = np.take(shard, chosen, axis=0, out=buffer[: end - begin], mode="clip")
        runs = list(zip((starts[first:last] - begin).tolist(), (ends[first:last] - begin).tolist(), strict=True))
        segments = _pooled(rows, chosen, weights[chosen], runs, feature_norm, offset)
        if segments.dtype.itemsize > sums.dtype.itemsize:
            sums = sums.astype(segments.dtype)
        sums[owner[starts[first:last]]] += segments
    return sums


def _pooled(
    rows: AnyArray, chosen: IntArray, weights: FloatArray, runs: list[tuple[int, int]], feature_norm: str, offset: int
) -> AnyArray:
    """Weighted sum of each run of rows; errors give bad rows by `chosen` and `offset`."""
    precise = _precise(rows)
    rows = rows.astype(precise, copy=False)
    # Few rows besides zero rows start with a zero, so that only those are compared in full.
    suspects = np.flatnonzero(rows[:, 0] == 0)
    zero = suspects[~rows[suspects].any(axis=1)]
    if zero.size:
        row = int(chosen[zero].min()) + offset
        raise InputError(f"{OWNER}: embeddings must be non-zero in every row, got row {row} that is not")
    with np.errstate(all="ignore"):
        squares = None if feature_norm == "keep" else np.einsum("nd,nd->n", rows, rows)
        scaled = weights if squares is None else weights / np.sqrt(squares).astype(np.float64)
        segments = _run_sums(rows, scaled.astype(precise), runs)
        # Well inside the range of float32, so that sums over shards are too; False for NaN.
        small = max(segments.max(), -segments.min()) < LARGE or precise is np.float64
    if small and np.isfinite(segments).all() and (feature_norm == "keep" or scaled[weights > 0].all()):
        return segments
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        row = int(chosen[bad].min()) + offset
        raise InputError(f"{OWNER}: embeddings must be finite (no NaN, no infinity), got row {row} that is not")
    # Finite, but near the limit of float32: computed again in float64.
    rows = unit_block(OWNER, "embeddings", rows, offset) if feature_norm == "unit" else rows.astype(np.float64)
    return _run_sums(rows, weights, runs)


def _run_sums(rows: AnyArray, weights: AnyArray, runs: list[tuple[int, int]]) -> AnyArray:
    segments = np.empty((len(runs), rows.shape[1]), dtype=rows.dtype)
    for segment, (a, b) in zip(segments, runs, strict=True):
        np.dot(weights[a:b], rows[a:b], out=segment)
    return segments
