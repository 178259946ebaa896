"""Checks of the arguments of the evaluation: arrays, tensors and shards in, clean NumPy arrays out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import numpy as np
from torch import Tensor

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, BoolArray, Embeddings, FloatArray, IntArray, LabelArray

CELLS = 2**17
"""Numbers normalized at a time, so that they stay in the cache of a core."""
MAX_TABLE = 50_000_000


def require(good: bool, owner: str, message: str) -> None:
    """Raise `InputError("owner: message")` unless `good`."""
    if not good:
        raise InputError(f"{owner}: {message}")


def to_numpy(x: ArrayLike) -> AnyArray:
    """A NumPy view of an array, list or tensor; half-precision tensors are converted to float32."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return np.asarray((x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy())
    return np.asarray(x)


def is_shards(x: Embeddings) -> bool:
    """Whether `x` is a sequence or an iterator of (m, d) arrays rather than one array."""
    if isinstance(x, (Tensor, np.ndarray)) or hasattr(x, "__array__"):
        return False
    if isinstance(x, (list, tuple)):
        return len(x) > 0 and all(isinstance(shard, (np.ndarray, Tensor)) and shard.ndim == 2 for shard in x)
    return isinstance(x, Iterable) and not isinstance(x, (str, bytes))


def shards_of(owner: str, name: str, x: Embeddings, width: int | None = None) -> Iterator[AnyArray]:
    """The (m, d) arrays of numbers of `x`, all of one width; a single one if `x` is an array."""
    sharded = is_shards(x)
    shards: Iterable[ArrayLike] = cast(Iterable[AnyArray], x) if sharded else [cast(ArrayLike, x)]
    for number, shard in enumerate(shards):
        array, what = to_numpy(shard), f"{name}, shard {number}," if sharded else name
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{owner}: {what} must be an array of numbers, got dtype {array.dtype}")
        _unmasked(owner, what, shard)
        require(array.ndim == 2 and array.shape[1] > 0, owner, f"{what} must be (n, d), not empty, got {array.shape}")
        width = array.shape[1] if width is None else width
        require(array.shape[1] == width, owner, f"{what} must be (n, {width}), got {array.shape}")
        yield array


def gather(owner: str, name: str, x: Embeddings) -> AnyArray:
    """`x` as one (n, d) array of numbers, with its shards concatenated; an array or memory map is returned as it is."""
    shards = list(shards_of(owner, name, x))
    require(sum(len(shard) for shard in shards) > 0, owner, f"{name} must be (n, d), not empty, got no row")
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def check_each(
    owner: str, name: str, good: BoolArray | np.bool_, wanted: str, what: str = "row", offset: int = 0
) -> None:
    """Every entry must be good; the error gives the first that is not, and their number."""
    if not good.all():
        bad = np.flatnonzero(~good)
        first = bad[0] + offset
        raise InputError(f"{owner}: {name} must be {wanted}, got {what} {first} that is not ({bad.size} in all)")


def _unmasked(owner: str, name: str, x: object) -> None:
    """A masked array must have no masked entries: the values below the mask are undefined."""
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise InputError(f"{owner}: {name} must have no masked entries, got {int(np.ma.getmaskarray(x).sum())}")


def _numbers(owner: str, name: str, x: ArrayLike) -> FloatArray:
    _unmasked(owner, name, x)
    array = to_numpy(x)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{owner}: {name} must be an array of numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def unit_rows(owner: str, name: str, x: Embeddings, *, rows: int | None = None) -> FloatArray:
    """`x` (n, d), one array or shards, as float64 with unit rows; the error gives a row that is not finite or zero."""
    array = gather(owner, name, x)
    message = f"{name} must have one row for each of {rows} identities, got {len(array)}"
    require(rows is None or len(array) == rows, owner, message)
    unit = np.empty(array.shape, dtype=np.float64)
    for part in blocks(array):
        if not _to_unit(array[part], unit[part]):
            _name_bad_rows(owner, name, array)
    return unit


def unit_block(owner: str, name: str, rows: AnyArray, offset: int = 0) -> FloatArray:
    """A few rows (m, d) as float64 unit rows, bit for bit as `unit_rows`; `offset` is added to the row of an error."""
    unit = np.empty(rows.shape, dtype=np.float64)
    if not _to_unit(rows, unit):
        _name_bad_rows(owner, name, rows, offset)
    return unit


def check_rows(owner: str, name: str, array: AnyArray) -> None:
    """Raise an error for the first row of (n, d) numbers that is not finite or zero."""
    for part in blocks(array):
        if not _to_unit(array[part], np.empty(array[part].shape, dtype=np.float64)):
            _name_bad_rows(owner, name, array)


def blocks(array: AnyArray) -> list[slice]:
    """Slices of the rows of (n, d) that stay in the cache of a core."""
    step = max(1, CELLS // array.shape[1])
    return [slice(start, start + step) for start in range(0, len(array), step)]


def _to_unit(rows: AnyArray, unit: FloatArray) -> bool:
    """Write unit rows to `unit`; False if a row is not finite or zero."""
    with np.errstate(all="ignore"):
        unit[...] = rows
        square = np.einsum("nd,nd->n", unit, unit)
        if not ((square > 1e-200) & (square < 1e200)).all():
            # Divided by the largest entry first: squares of 1e200 or 1e-200 would leave the range of float64.
            largest = np.abs(unit).max(axis=1, keepdims=True)
            if not (np.isfinite(largest) & (largest > 0)).all():
                return False
            unit /= largest
            square = np.einsum("nd,nd->n", unit, unit)
    unit /= np.sqrt(square)[:, None]
    return True


def _name_bad_rows(owner: str, name: str, array: AnyArray, offset: int = 0) -> None:
    """Raise an error for the first row that is not finite; if all are, for the first that is zero."""
    largest = np.concatenate([np.abs(array[part].astype(np.float64)).max(axis=1) for part in blocks(array)])
    check_each(owner, name, np.isfinite(largest), "finite (no NaN, no infinity)", offset=offset)
    check_each(owner, name, largest > 0, "non-zero in every row", offset=offset)


def check_vector(owner: str, name: str, array: AnyArray, rows: int | None = None, like: str = "rows") -> None:
    """`array` must be (n,), not empty, and as long as `rows` when that is given."""
    require(array.ndim == 1 and array.size > 0, owner, f"{name} must be (n,), not empty, got shape {array.shape}")
    require(rows is None or array.size == rows, owner, f"{name} must be as long as {like} ({rows}), got {array.size}")


def check_scores(owner: str, name: str, x: ArrayLike, rows: int | None = None, like: str = "rows") -> FloatArray:
    """Scores (n,) as float64, finite, at least one, as long as `rows` when that is given."""
    array = _numbers(owner, name, x)
    check_vector(owner, name, array, rows, like)
    check_each(owner, name, np.isfinite(array), "finite", "entry")
    return array


def check_ages(owner: str, x: ArrayLike, rows: int) -> FloatArray:
    """Ages in years (n,), finite and not negative."""
    array = _numbers(owner, "ages", x)
    check_vector(owner, "ages", array, rows, "identities")
    check_each(owner, "ages", np.isfinite(array) & (array >= 0), "finite and not negative, in years")
    return array


def check_flags(owner: str, name: str, x: ArrayLike, rows: int) -> BoolArray:
    """Booleans, or numbers that are 0 or 1, (n,), of both kinds."""
    array = to_numpy(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}: {name} must be an array of booleans, got dtype {array.dtype}")
    check_vector(owner, name, array, rows, "the pairs")
    if array.dtype.kind != "b":
        check_each(owner, name, np.isin(array, (0, 1)), "boolean (or 0 and 1)", "entry")
    flags = array.astype(np.bool_)
    both = bool(flags.any() and not flags.all())
    require(both, owner, f"{name} must hold both kinds of pair, got only {bool(flags[0])}")
    return flags


def check_labels(
    owner: str, name: str, x: ArrayLike, *, rows: int | None = None, like: str = "rows"
) -> tuple[IntArray, LabelArray]:
    """Labels (whole numbers or strings) as codes (n,) into the sorted array of distinct labels."""
    array = to_numpy(x)
    check_vector(owner, name, array, rows, like)
    if array.dtype.kind == "f":
        check_each(owner, name, np.isfinite(array) & (array == np.floor(array)), "whole numbers or strings", "entry")
        array = array.astype(np.int64)
    elif array.dtype.kind == "O":
        is_text = np.array([isinstance(label, str) for label in array], dtype=np.bool_)
        check_each(owner, name, is_text, "strings, or an array of whole numbers", "entry")
        array = array.astype(np.str_)
    elif array.dtype.kind not in "iuU":
        raise TypeError(f"{owner}: {name} must be an array of whole numbers or strings, got dtype {array.dtype}")
    if array.dtype.kind in "iu" and array.dtype != np.uint64:
        # Counting is faster than sorting if the numbers are dense.
        whole = array.astype(np.int64)
        low, high = int(whole.min()), int(whole.max())
        if high - low <= 4 * array.size + 1000:
            present = np.bincount(whole - low) > 0
            return (np.cumsum(present) - 1)[whole - low], (np.flatnonzero(present) + low).astype(array.dtype)
    labels, codes = np.unique(array, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), labels


def check_identities(owner: str, x: ArrayLike) -> tuple[IntArray, LabelArray]:
    """Labels of at least two identities, one of them with two images; see `check_labels`."""
    codes, labels = check_labels(owner, "identities", x)
    require(labels.size >= 2, owner, f"identities must hold at least two identities, got only {labels.tolist()[0]!r}")
    require(codes.size > labels.size, owner, "identities must hold one with two images, got one image of each")
    return codes, labels


def check_indices(owner: str, name: str, x: ArrayLike) -> IntArray:
    """Row numbers (n,), not negative."""
    array = to_numpy(x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{owner}: {name} must be an array of row numbers (integers), got dtype {array.dtype}")
    check_vector(owner, name, array)
    check_each(owner, name, array >= 0, "row numbers from 0", "entry")
    return array.astype(np.int64)


def check_fars(owner: str, fars: Sequence[float], *, required: bool = False) -> tuple[float, ...]:
    """Target false accept rates, each in (0, 1] and different from the others; at least one if `required`."""
    fars = tuple(fars)
    for far in fars:
        check_number(owner, "fars", far, above=0.0, max=1.0)
    require(len(set(fars)) == len(fars), owner, f"fars must differ from each other, got {fars}")
    require(len(fars) > 0 or not required, owner, "fars must not be empty, got ()")
    return tuple(float(far) for far in fars)


def check_ranks(owner: str, ranks: Sequence[int], *, max: int | None = None, required: bool = True) -> tuple[int, ...]:
    """Ranks, from 1 to `max`; at least one if `required`."""
    require(len(ranks) > 0 or not required, owner, "ranks must not be empty, got ()")
    for rank in ranks:
        check_number(owner, "ranks", rank, min=1, max=max, integer=True)
    return tuple(int(rank) for rank in ranks)


def check_level(owner: str, level: float) -> float:
    """The confidence of an interval, in (0, 1)."""
    check_number(owner, "level", level, above=0)
    require(level < 1, owner, f"level must be below 1, got {level!r}")
    return float(level)


def check_distinct(owner: str, name: str, codes: IntArray, labels: LabelArray) -> None:
    """Labels, as returned by `check_labels`, must not occur twice."""
    if labels.size < codes.size:
        twice = int(np.flatnonzero(np.bincount(codes) > 1)[0])
        first, second = np.flatnonzero(codes == twice)[:2].tolist()
        got = f"{labels[twice].item()!r} in entries {first} and {second}"
        raise InputError(f"{owner}: {name} must not occur twice, got {got}")


def look_up(owner: str, name: str, x: ArrayLike, known: LabelArray, where: str) -> IntArray:
    """Index of each label of `x` (m,) in the sorted array `known`; the error gives a label that is missing."""
    array = to_numpy(x)
    check_vector(owner, name, array)
    small = all(each.dtype.kind in "iu" and each.dtype != np.uint64 for each in (array, known))
    if small and int(known[-1]) - int(known[0]) <= MAX_TABLE:
        # A table is faster than sorting for tens of millions of pairs.
        whole, low, high = array.astype(np.int64, copy=False), int(known[0]), int(known[-1])
        table = np.full(high - low + 1, -1, dtype=np.int64)
        table[known.astype(np.int64) - low] = np.arange(known.size)
        inside = (whole >= low) & (whole <= high)
        indices = np.where(inside, table[np.where(inside, whole - low, 0)], -1)
    else:
        codes, labels = check_labels(owner, name, array)
        kinds = ["strings" if each.dtype.kind == "U" else "numbers" for each in (labels, known)]
        require(kinds[0] == kinds[1], owner, f"{name} must be {kinds[1]} as in {where}, got {kinds[0]}")
        spot = np.minimum(np.searchsorted(known, labels), known.size - 1)
        indices = np.where(known[spot] == labels, spot, -1)[codes]
    if indices.min() < 0:
        bad = np.flatnonzero(indices < 0)
        got = f"{array[bad[0]].item()!r} in entry {bad[0]} that is not ({bad.size} in all)"
        raise InputError(f"{owner}: {name} must be in {where}, got {got}")
    return indices
