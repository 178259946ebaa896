"""Evaluation room: many images of one person to one template, as IJB-B and IJB-C pool them. NumPy only."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import (
    FloatArray,
    IntArray,
    check_each,
    check_labels,
    check_scores,
    check_vector,
    require,
    shards_of,
    to_numpy,
    unit_block,
)

__all__ = ["Templates", "pool_templates"]

OWNER = "pool_templates"
BLOCK = 1024
LARGE = 1e30


@dataclass(frozen=True)
class Templates:
    """Pooled templates.

    Args:
        ids: (t,) template ids, sorted.
        features: (t, d) unit rows, float32 where the embeddings were float32 or float16, else float64.
        images: (t,) how many images each was pooled from.
        feature_norm: `"keep"` or `"unit"`: what was done with the length of an image's embedding.
        detector_scores: whether images were weighed by the detector's score.
    """

    ids: npt.NDArray[Any]
    features: npt.NDArray[np.floating[Any]]
    images: IntArray
    feature_norm: str
    detector_scores: bool

    @property
    def convention(self) -> str:
        """How they were pooled, in words."""
        norm = "lengths kept" if self.feature_norm == "keep" else "each image made unit first"
        score = "times the detector score" if self.detector_scores else "no detector score"
        return f"mean over the images of a medium, sum over media, then unit; {norm}; {score}"


def pool_templates(
    embeddings: Any,
    template_ids: Any,
    media_ids: Any,
    *,
    detector_scores: Any = None,
    feature_norm: Literal["keep", "unit"] = "keep",
) -> Templates:
    """Pool images into templates: mean over the images of one medium, sum over media, then one L2 norm.

    A template is the weighted sum of its images, with weights detector score / (images of that medium in it), so it
    takes one pass over the embeddings, in shards or mapped from a file. Sums are in the embeddings' own precision, at
    least float32.

    Args:
        embeddings: (n, d), of images not normalized (the sum of the plain and the mirrored one); one array or shards.
        template_ids: (n,) whole numbers or strings, of each row; an image in two templates has two rows.
        media_ids: (n,) whole numbers or strings; the frames of one video share one.
        detector_scores: (n,) not negative, weighs each image; None for no weight.
        feature_norm: `"keep"` lets an embedding's length count as a quality weight (insightface's N1), `"unit"` makes
            each embedding unit first (its N0). insightface's own flag `use_norm_score` means the one in one script and
            the other in another.

    Returns:
        The templates, sorted by id.

    Raises:
        ValueError: lengths that differ, a row that is not finite or zero, a template that sums to zero; it is named.

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
        check_vector(OWNER, "detector_scores", to_numpy(detector_scores), codes.size, "template_ids")
        weights = check_scores(OWNER, "detector_scores", detector_scores)
        check_each(OWNER, "detector_scores", weights >= 0, "not negative", "entry")
    _, group, counts = np.unique(codes * known.size + media, return_inverse=True, return_counts=True)
    weights = weights / counts[group.reshape(-1)]
    sums: npt.NDArray[Any] | None = None
    rows = 0
    for shard in shards_of(OWNER, "embeddings", embeddings):
        require(
            rows + len(shard) <= codes.size,
            OWNER,
            f"embeddings must have one row for each of {codes.size} template_ids, got more",
        )
        precise = _precise(shard)
        sums = np.zeros((ids.size, shard.shape[1]), dtype=precise) if sums is None else sums
        part = slice(rows, rows + len(shard))
        sums = _add(sums, shard, codes[part], weights[part], feature_norm, rows)
        rows += len(shard)
    require(
        sums is not None and rows == codes.size,
        OWNER,
        f"embeddings must have one row for each of {codes.size} template_ids, got {rows}",
    )
    assert sums is not None
    empty = np.flatnonzero(~sums.any(axis=1))
    if empty.size:
        raise InputError(f"{OWNER}: every template must have a sum, got zero for template {ids[empty[0]].item()!r}")
    step = max(1, 2**17 // sums.shape[1])
    for start in range(0, len(sums), step):
        sums[start : start + step] = unit_block(OWNER, "templates", sums[start : start + step], start)
    return Templates(ids, sums, np.bincount(codes), feature_norm, detector_scores is not None)


def _precise(rows: npt.NDArray[Any]) -> type[np.floating[Any]]:
    """What rows of this kind are summed in."""
    return np.float64 if rows.dtype.itemsize > 4 or rows.dtype.kind != "f" else np.float32


def _add(
    sums: npt.NDArray[Any],
    shard: npt.NDArray[Any],
    codes: IntArray,
    weights: FloatArray,
    feature_norm: str,
    offset: int,
) -> npt.NDArray[Any]:
    """Add one shard's rows to the sums of their templates, some whole templates at a time; the sums, perhaps made wider."""
    if not codes.size:
        return sums
    ordered = bool((codes[1:] >= codes[:-1]).all())
    # Sixteen bits are sorted by radix.
    short = codes.astype(np.uint16) if len(sums) <= 2**16 else codes
    order = None if ordered else np.argsort(short, kind="stable")
    owner = codes if order is None else codes[order]
    starts = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    ends = np.append(starts[1:], owner.size)
    # Blocks end where a template does, so that each sum is made in one go.
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
    rows: npt.NDArray[Any],
    chosen: IntArray,
    weights: FloatArray,
    runs: list[tuple[int, int]],
    feature_norm: str,
    offset: int,
) -> npt.NDArray[Any]:
    """Weighted sum of each run of rows; bad rows are named by `chosen` and `offset`."""
    precise = _precise(rows)
    rows = rows.astype(precise, copy=False)
    # A zero row starts with a zero; few others do.
    suspects = np.flatnonzero(rows[:, 0] == 0)
    zero = suspects[~rows[suspects].any(axis=1)]
    if zero.size:
        row = int(chosen[zero].min()) + offset
        raise InputError(f"{OWNER}: embeddings must be non-zero in every row, got row {row} that is not")
    with np.errstate(all="ignore"):
        scaled = weights / _lengths(rows) if feature_norm == "unit" else weights
        segments = _run_sums(rows, scaled.astype(precise), runs)
        # Far inside float32, so that sums over shards stay there too; NaN is not.
        small = max(segments.max(), -segments.min()) < LARGE or precise is np.float64
    if small and np.isfinite(segments).all() and (feature_norm == "keep" or scaled[weights > 0].all()):
        return segments
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        row = int(chosen[bad].min()) + offset
        raise InputError(f"{OWNER}: embeddings must be finite (no NaN, no infinity), got row {row} that is not")
    # Finite, and near the end of float32: once more in float64.
    rows = unit_block(OWNER, "embeddings", rows, offset) if feature_norm == "unit" else rows.astype(np.float64)
    return _run_sums(rows, weights, runs)


def _run_sums(rows: npt.NDArray[Any], weights: npt.NDArray[Any], runs: list[tuple[int, int]]) -> npt.NDArray[Any]:
    segments = np.empty((len(runs), rows.shape[1]), dtype=rows.dtype)
    for segment, (a, b) in zip(segments, runs, strict=True):
        np.dot(weights[a:b], rows[a:b], out=segment)
    return segments


def _lengths(rows: npt.NDArray[Any]) -> FloatArray:
    return np.asarray(np.sqrt(np.einsum("nd,nd->n", rows, rows)), dtype=np.float64)
