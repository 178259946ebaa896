"""The evaluation room's checks: the only place in it that words an error. NumPy arrays in, clean NumPy arrays out.

An evaluation that gives a number on bad input is worse than none (a NaN embedding compares as False and so looks like
chance), so every entry goes through here. Tensors are taken too and converted; nothing else of torch is touched.
Embeddings may also come in shards: a sequence or an iterator of (m, d) arrays.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kdlib._checks import check_number
from kdlib_faces._checks import InputError

__all__ = [
    "BoolArray",
    "FloatArray",
    "IntArray",
    "check_ages",
    "check_distinct",
    "check_each",
    "check_fars",
    "check_flags",
    "check_indices",
    "check_labels",
    "check_level",
    "check_people",
    "check_rows",
    "check_scores",
    "check_vector",
    "gather",
    "is_shards",
    "look_up",
    "require",
    "shards_of",
    "to_numpy",
    "unit_block",
    "unit_rows",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
CELLS = 2**17
"""Numbers worked on at a time where rows are made unit: they stay in a core's cache."""
SPAN = 50_000_000


def require(good: bool, owner: str, message: str) -> None:
    """Raise `InputError("owner: message")` unless `good`."""
    if not good:
        raise InputError(f"{owner}: {message}")


def to_numpy(x: Any) -> npt.NDArray[Any]:
    """A NumPy view of an array, list or tensor; half-precision tensors come as float32."""
    if callable(getattr(x, "detach", None)):
        x = x.detach().cpu()
        return np.asarray((x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy())
    return np.asarray(x)


def is_shards(x: Any) -> bool:
    """Whether `x` is a sequence or an iterator of (m, d) arrays rather than one array."""
    if hasattr(x, "__array__") or hasattr(x, "detach"):
        return False
    if isinstance(x, (list, tuple)):
        return len(x) > 0 and all(getattr(shard, "ndim", 0) == 2 for shard in x)
    return isinstance(x, Iterable) and not isinstance(x, (str, bytes))


def shards_of(owner: str, name: str, x: Any, width: int | None = None) -> Iterator[npt.NDArray[Any]]:
    """The (m, d) arrays of numbers that `x` holds, one where it is an array itself; all of one width."""
    for number, shard in enumerate(x if is_shards(x) else [x]):
        array, what = to_numpy(shard), f"{name}, shard {number}," if is_shards(x) else name
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{owner}: {what} must be an array of numbers, got dtype {array.dtype}")
        _unmasked(owner, what, shard)
        require(array.ndim == 2 and array.shape[1] > 0, owner, f"{what} must be (n, d), not empty, got {array.shape}")
        width = array.shape[1] if width is None else width
        require(array.shape[1] == width, owner, f"{what} must be (n, {width}), got {array.shape}")
        yield array


def gather(owner: str, name: str, x: Any) -> npt.NDArray[Any]:
    """`x` as one (n, d) array of numbers, its shards put together; an array or memory map is passed on as it is."""
    shards = list(shards_of(owner, name, x))
    require(sum(len(shard) for shard in shards) > 0, owner, f"{name} must be (n, d), not empty, got no row")
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def check_each(owner: str, name: str, good: BoolArray, wanted: str, what: str = "row", offset: int = 0) -> None:
    """Every entry must be good; the first that is not is named, and how many there are."""
    if not good.all():
        bad = np.flatnonzero(~good)
        first = bad[0] + offset
        raise InputError(f"{owner}: {name} must be {wanted}, got {what} {first} that is not ({bad.size} in all)")


def _unmasked(owner: str, name: str, x: Any) -> None:
    """A masked entry is a hole: what lies under it is no number."""
    if isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x):
        raise InputError(f"{owner}: {name} must have no masked entries, got {int(np.ma.getmaskarray(x).sum())}")


def _numbers(owner: str, name: str, x: Any) -> FloatArray:
    _unmasked(owner, name, x)
    array = to_numpy(x)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{owner}: {name} must be an array of numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def unit_rows(owner: str, name: str, x: Any, *, rows: int | None = None, like: str = "identities") -> FloatArray:
    """`x` (n, d), one array or shards, as float64 with unit rows; a row that is NaN, infinite or zero is named."""
    array = gather(owner, name, x)
    if rows is not None:
        require(
            array.shape[0] == rows, owner, f"{name} must have one row for each of {rows} {like}, got {array.shape[0]}"
        )
    unit = np.empty(array.shape, dtype=np.float64)
    step = max(1, CELLS // array.shape[1])
    for start in range(0, len(array), step):
        part = array[start : start + step]
        if not _to_unit(part, unit[start : start + step]):
            _name_bad_rows(owner, name, array, start)
    return unit


def unit_block(owner: str, name: str, rows: npt.NDArray[Any], offset: int = 0) -> FloatArray:
    """A few rows (m, d) as float64 unit rows, the same bits as `unit_rows` gives; `offset` is added to a named row."""
    unit = np.empty(rows.shape, dtype=np.float64)
    if not _to_unit(rows, unit):
        _name_bad_rows(owner, name, rows, 0, offset)
    return unit


def check_rows(owner: str, name: str, array: npt.NDArray[Any]) -> None:
    """Name the first row of (n, d) numbers that is not finite or zero; nothing is kept."""
    step = max(1, CELLS // array.shape[1])
    for start in range(0, len(array), step):
        part = array[start : start + step]
        if not _to_unit(part, np.empty(part.shape, dtype=np.float64)):
            _name_bad_rows(owner, name, array, start)


def _to_unit(rows: npt.NDArray[Any], unit: FloatArray) -> bool:
    """Write unit rows; False where a row has no direction."""
    with np.errstate(all="ignore"):
        unit[...] = rows
        square = np.einsum("nd,nd->n", unit, unit)
        if not ((square > 1e-200) & (square < 1e200)).all():
            # By the largest entry first: the squares of 1e200 or 1e-200 would leave float64's range.
            largest = np.abs(unit).max(axis=1, keepdims=True)
            if not (np.isfinite(largest) & (largest > 0)).all():
                return False
            unit /= largest
            square = np.einsum("nd,nd->n", unit, unit)
    unit /= np.sqrt(square)[:, None]
    return True


def _name_bad_rows(owner: str, name: str, array: npt.NDArray[Any], start: int, offset: int = 0) -> None:
    """Raise for the first row from `start` on that is not finite, or else zero; kinds are not mixed."""
    step = max(1, CELLS // array.shape[1])
    parts = [array[at : at + step].astype(np.float64) for at in range(start, len(array), step)]
    before = np.ones(start, dtype=np.bool_)
    finite = np.concatenate([before, *(np.isfinite(part).all(axis=1) for part in parts)])
    check_each(owner, name, finite, "finite (no NaN, no infinity)", offset=offset)
    nonzero = np.concatenate([before, *(np.abs(part).max(axis=1) > 0 for part in parts)])
    check_each(owner, name, nonzero, "non-zero in every row", offset=offset)


def check_vector(owner: str, name: str, array: npt.NDArray[Any], rows: int | None = None, like: str = "rows") -> None:
    """`array` must be (n,), not empty, and as long as `rows` when that is given."""
    require(array.ndim == 1 and array.size > 0, owner, f"{name} must be (n,), not empty, got shape {array.shape}")
    require(rows is None or array.size == rows, owner, f"{name} must be as long as {like} ({rows}), got {array.size}")


def check_scores(owner: str, name: str, x: Any) -> FloatArray:
    """Scores (n,) as float64, finite, at least one."""
    array = _numbers(owner, name, x)
    check_vector(owner, name, array)
    check_each(owner, name, np.isfinite(array), "finite", "entry")
    return array


def check_ages(owner: str, x: Any, rows: int) -> FloatArray:
    """Ages in years (n,), finite and not negative."""
    array = _numbers(owner, "ages", x)
    check_vector(owner, "ages", array, rows, "identities")
    check_each(owner, "ages", np.isfinite(array) & (array >= 0), "finite and not negative, in years")
    return array


def check_flags(owner: str, name: str, x: Any, rows: int) -> BoolArray:
    """Booleans, or numbers that are 0 or 1, (n,), of both kinds."""
    array = to_numpy(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}: {name} must be an array of booleans, got dtype {array.dtype}")
    check_vector(owner, name, array, rows, "the pairs")
    if array.dtype.kind != "b":
        check_each(owner, name, np.isin(array, (0, 1)), "boolean (or 0 and 1)", "entry")
    flags = array.astype(np.bool_)
    require(
        bool(flags.any() and not flags.all()), owner, f"{name} must hold both kinds of pair, got only {bool(flags[0])}"
    )
    return flags


def check_labels(
    owner: str, name: str, x: Any, *, rows: int | None = None, like: str = "rows"
) -> tuple[IntArray, npt.NDArray[Any]]:
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
        # Numbers close together are counted rather than sorted.
        whole = array.astype(np.int64)
        least, most = int(whole.min()), int(whole.max())
        if most - least <= 4 * array.size + 1000:
            present = np.bincount(whole - least) > 0
            return (np.cumsum(present) - 1)[whole - least], (np.flatnonzero(present) + least).astype(array.dtype)
    labels, codes = np.unique(array, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), labels


def check_people(owner: str, x: Any) -> tuple[IntArray, npt.NDArray[Any]]:
    """Identities (n,) as `check_labels` gives them, of at least two people, one of them with two images."""
    codes, labels = check_labels(owner, "identities", x)
    require(labels.size >= 2, owner, f"identities must hold at least two identities, got only {labels.tolist()[0]!r}")
    require(codes.size > labels.size, owner, "identities must hold one with two images, got one image of each")
    return codes, labels


def check_indices(owner: str, name: str, x: Any) -> IntArray:
    """Row numbers (n,), not negative."""
    array = to_numpy(x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{owner}: {name} must be an array of row numbers (integers), got dtype {array.dtype}")
    check_vector(owner, name, array)
    check_each(owner, name, array >= 0, "row numbers from 0", "entry")
    return array.astype(np.int64)


def check_fars(owner: str, fars: Any) -> tuple[float, ...]:
    """Target false accept rates, each in (0, 1], no two alike."""
    fars = tuple(fars)
    for far in fars:
        check_number(owner, "fars", far, above=0.0, max=1.0)
    require(len(set(fars)) == len(fars), owner, f"fars must differ from each other, got {fars}")
    return tuple(float(far) for far in fars)


def check_level(owner: str, level: float) -> None:
    """The confidence of an interval, in (0, 1)."""
    check_number(owner, "level", level, above=0)
    require(level < 1, owner, f"level must be below 1, got {level!r}")


def check_distinct(owner: str, name: str, codes: IntArray, labels: npt.NDArray[Any]) -> None:
    """Labels, as `check_labels` gives them, of which none may come twice."""
    if labels.size < codes.size:
        twice = int(np.flatnonzero(np.bincount(codes) > 1)[0])
        first, second = np.flatnonzero(codes == twice)[:2].tolist()
        raise InputError(
            f"{owner}: {name} must not come twice, got {labels[twice].item()!r} in entries {first} and {second}"
        )


def look_up(owner: str, name: str, x: Any, known: npt.NDArray[Any], where: str) -> IntArray:
    """Place of each label of `x` (m,) in the sorted array `known`; one that is not there is named, never 0."""
    array = to_numpy(x)
    check_vector(owner, name, array)
    small = all(each.dtype.kind in "iu" and each.dtype != np.uint64 for each in (array, known))
    if small and int(known[-1]) - int(known[0]) <= SPAN:
        # A table in place of sorting: pairs come by the ten million.
        whole, least, most = array.astype(np.int64, copy=False), int(known[0]), int(known[-1])
        table = np.full(most - least + 1, -1, dtype=np.int64)
        table[known.astype(np.int64) - least] = np.arange(known.size)
        inside = (whole >= least) & (whole <= most)
        found = np.where(inside, table[np.where(inside, whole - least, 0)], -1)
    else:
        codes, labels = check_labels(owner, name, array)
        kinds = ["strings" if each.dtype.kind == "U" else "numbers" for each in (labels, known)]
        require(kinds[0] == kinds[1], owner, f"{name} must be {kinds[1]} as in {where}, got {kinds[0]}")
        spot = np.minimum(np.searchsorted(known, labels), known.size - 1)
        found = np.where(known[spot] == labels, spot, -1)[codes]
    if found.min() < 0:
        bad = np.flatnonzero(found < 0)
        raise InputError(
            f"{owner}: {name} must be in {where}, got {array[bad[0]].item()!r} in entry {bad[0]} that is not "
            f"({bad.size} in all)"
        )
    return found
