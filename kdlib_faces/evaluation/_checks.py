"""Checks of the arguments of the evaluation: arrays, tensors and shards in, clean NumPy arrays out."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict, Unpack, cast

import numpy as np
from torch import Tensor

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, BoolArray, Embeddings, FloatArray, IntArray

CELLS = 2**17
"""Numbers normalized at a time, so that they stay in the cache of a core."""
SCORES = 2**24
"""Scores computed at a time."""
MAX_PAIRS = 200_000_000
"""Pairs of which all scores are held, at up to 50 bytes each."""
MAX_YEARS = 10_000


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


def check_array(owner: str, name: str, x: ArrayLike) -> AnyArray:
    """`x` as a NumPy array; masked entries, below which values are undefined, and rows of unequal length are errors."""
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise InputError(f"{owner}: {name} must have no masked entries, got {int(np.ma.getmaskarray(x).sum())}")
    try:
        return to_numpy(x)
    except ValueError:
        raise InputError(f"{owner}: {name} must be an array, got rows of different lengths or types") from None


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
        what = f"{name}, shard {number}," if sharded else name
        array = check_array(owner, what, shard)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{owner}: {what} must be an array of numbers, got dtype {array.dtype}")
        require(array.ndim == 2 and array.shape[1] > 0, owner, f"{what} must be (n, d), not empty, got {array.shape}")
        width = array.shape[1] if width is None else width
        require(array.shape[1] == width, owner, f"{what} must be (n, {width}), got {array.shape}")
        yield array


def gather(owner: str, name: str, x: Embeddings) -> AnyArray:
    """`x` as one (n, d) array of numbers, with its shards concatenated; an array or memory map is returned as it is."""
    shards = list(shards_of(owner, name, x))
    require(sum(len(shard) for shard in shards) > 0, owner, f"{name} must be (n, d), not empty, got no row")
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def rows_at_a_time(max_rows: int, columns: int) -> int:
    """Number of rows of a block of scores, at most `max_rows`, so that memory does not grow with the number of columns."""
    return max(1, min(max_rows, SCORES // max(1, columns)))


def check_each(
    owner: str, name: str, good: BoolArray | np.bool_, wanted: str, what: str = "row", offset: int = 0
) -> None:
    """Every entry must be good; the error gives the first that is not, and their number."""
    if not good.all():
        bad = np.flatnonzero(~good)
        first = bad[0] + offset
        raise InputError(f"{owner}: {name} must be {wanted}, got {what} {first} that is not ({bad.size} in all)")


def _numbers(owner: str, name: str, x: ArrayLike) -> FloatArray:
    array = check_array(owner, name, x)
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
        rows = array[part] if array.dtype in (np.float32, np.float64) else array[part].astype(np.float64)
        with np.errstate(all="ignore"):
            square = np.einsum("nd,nd->n", rows, rows)
        # Few rows have a square out of this range; whether they are valid takes four times as long to decide.
        usual = ((square > 1e-30) & (square < 1e30)).all()
        if not usual and not _to_unit(rows, np.empty(rows.shape, dtype=np.float64)):
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


def check_ages(owner: str, x: ArrayLike, rows: int | None = None, *, unknown: bool = False) -> FloatArray:
    """Ages or dates in years (n,), finite, from 0 to 10,000; NaN is allowed for unknown ones."""
    array = _numbers(owner, "ages", x)
    check_vector(owner, "ages", array, rows, "identities")
    known = np.where(np.isnan(array), 0, array) if unknown else array
    check_each(owner, "ages", np.isfinite(known) & (known >= 0), "finite and not negative, in years")
    check_each(owner, "ages", known <= MAX_YEARS, f"in years, at most {MAX_YEARS}")
    return array


def check_booleans(owner: str, name: str, x: ArrayLike, rows: int | None = None, like: str = "rows") -> BoolArray:
    """Booleans, or numbers that are 0 or 1, (n,)."""
    array = check_array(owner, name, x)
    check_vector(owner, name, array, rows, like)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}: {name} must be an array of booleans, got dtype {array.dtype}")
    check_each(owner, name, np.isin(array, (0, 1)), "boolean (or 0 and 1)", "entry")
    return array.astype(np.bool_)


def check_flags(owner: str, name: str, x: ArrayLike, rows: int | None = None) -> BoolArray:
    """Booleans, or numbers that are 0 or 1, (n,), of both kinds."""
    flags = check_booleans(owner, name, x, rows, "the pairs")
    both = bool(flags.any() and not flags.all())
    require(both, owner, f"{name} must hold both kinds of pair, got only {bool(flags[0])}")
    return flags


def check_indices(owner: str, name: str, x: ArrayLike) -> IntArray:
    """Row numbers (n,), not negative."""
    array = check_array(owner, name, x)
    check_vector(owner, name, array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{owner}: {name} must be an array of row numbers (integers), got dtype {array.dtype}")
    check_each(owner, name, (array >= 0) & (array <= np.iinfo(np.int64).max), "row numbers from 0", "entry")
    return array.astype(np.int64)


def check_scalar(owner: str, name: str, value: object) -> object:
    """A value as Python's own, also from a NumPy or torch scalar; longer arrays are errors."""
    if not isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value
    if value.ndim:
        raise TypeError(f"{owner}: {name} must be one value, got {_shown(value)}")
    return value.item()


class Limits(TypedDict, total=False):
    """Limits of a number, as in `check_number`."""

    above: float
    min: float
    max: float | None
    integer: bool


def check_one(owner: str, name: str, value: object, **limits: Unpack[Limits]) -> float:
    """A number as Python's own, also from a NumPy or torch scalar; see `check_number`."""
    return check_number(owner, name, cast(float, check_scalar(owner, name, value)), **limits)


def _shown(value: object) -> str:
    """A value for an error, in one line."""
    return f"shape {tuple(value.shape)}" if isinstance(value, (np.ndarray, Tensor)) else repr(value)


def check_whole(owner: str, name: str, value: int, *, min: int, max: int | None = None) -> int:
    """A whole number from `min` to `max`, as Python's own."""
    return int(check_one(owner, name, value, integer=True, min=min, max=max))


def check_numbers(owner: str, name: str, values: Iterable[float], **limits: Unpack[Limits]) -> tuple[float, ...]:
    """The numbers of a sequence, an array or a tensor, as Python's own; see `check_number`."""
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"{owner}: {name} must be a sequence of numbers, got {_shown(values)}")
    return tuple(check_one(owner, name, each, **limits) for each in values)


def check_fars(owner: str, fars: Sequence[float], *, required: bool = False) -> tuple[float, ...]:
    """Target false accept rates, each in (0, 1] and different from the others; at least one if `required`."""
    rates = tuple(map(float, check_numbers(owner, "fars", fars, above=0.0, max=1.0)))
    # A result names them in six digits.
    require(len({f"{rate:g}" for rate in rates}) == len(rates), owner, f"fars must differ from each other, got {rates}")
    require(len(rates) > 0 or not required, owner, "fars must not be empty, got ()")
    return rates


def check_ranks(owner: str, ranks: Sequence[int], *, max: int | None = None, required: bool = True) -> tuple[int, ...]:
    """Ranks, from 1 to `max`; at least one if `required`."""
    each = tuple(map(int, check_numbers(owner, "ranks", ranks, integer=True, min=1, max=max)))
    require(len(each) > 0 or not required, owner, "ranks must not be empty, got ()")
    return each


def check_level(owner: str, level: float) -> float:
    """The confidence of an interval, in (0, 1)."""
    level = float(check_one(owner, "level", level, above=0))
    require(level < 1, owner, f"level must be below 1, got {level!r}")
    return level
