"""The evaluation room's checks: the only place in it that words an error. NumPy arrays in, clean NumPy arrays out.

An evaluation that gives a number on bad input is worse than none (a NaN embedding compares as False and so looks like
chance), so every entry goes through here. Tensors are taken too and converted; nothing else of torch is touched.
"""

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
    "check_fars",
    "check_flags",
    "check_indices",
    "check_labels",
    "check_scores",
    "check_vector",
    "require",
    "to_numpy",
    "unit_rows",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def require(good: bool, owner: str, message: str) -> None:
    """Raise `InputError("owner: message")` unless `good`."""
    if not good:
        raise InputError(f"{owner}: {message}")


def to_numpy(x: Any) -> npt.NDArray[Any]:
    """A NumPy view of an array, list or tensor; a floating tensor (bfloat16 too) comes as float64."""
    if callable(getattr(x, "detach", None)):
        x = x.detach().cpu()
        return np.asarray((x.double() if x.is_floating_point() else x).numpy())
    return np.asarray(x)


def _first_bad(owner: str, name: str, good: BoolArray, wanted: str, what: str = "row") -> None:
    """Name the first row that is not good, and how many there are."""
    if not good.all():
        bad = np.flatnonzero(~good)
        raise InputError(f"{owner}: {name} must be {wanted}, got {what} {bad[0]} that is not ({bad.size} in all)")


def _numbers(owner: str, name: str, x: Any) -> FloatArray:
    array = to_numpy(x)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{owner}: {name} must be an array of numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def unit_rows(owner: str, name: str, x: Any, *, rows: int | None = None, like: str = "identities") -> FloatArray:
    """`x` (n, d) as float64 with unit rows; a row that is NaN, infinite or zero is named, never passed on."""
    array = _numbers(owner, name, x)
    require(
        array.ndim == 2 and array.shape[0] > 0 and array.shape[1] > 0,
        owner,
        f"{name} must be (n, d), not empty, got {array.shape}",
    )
    if rows is not None:
        require(
            array.shape[0] == rows, owner, f"{name} must have one row for each of {rows} {like}, got {array.shape[0]}"
        )
    _first_bad(owner, name, np.asarray(np.isfinite(array).all(axis=1)), "finite (no NaN, no infinity)")
    largest = np.abs(array).max(axis=1, keepdims=True)
    _first_bad(owner, name, np.asarray(largest[:, 0] > 0), "non-zero in every row")
    # By the largest entry first: the squares of 1e200 or 1e-200 would leave float64's range.
    array /= largest
    array /= np.linalg.norm(array, axis=1, keepdims=True)
    return array


def check_vector(owner: str, name: str, array: npt.NDArray[Any], rows: int | None = None, like: str = "rows") -> None:
    """`array` must be (n,), not empty, and as long as `rows` when that is given."""
    require(array.ndim == 1 and array.size > 0, owner, f"{name} must be (n,), not empty, got shape {array.shape}")
    require(rows is None or array.size == rows, owner, f"{name} must be as long as {like} ({rows}), got {array.size}")


def check_scores(owner: str, name: str, x: Any) -> FloatArray:
    """Scores (n,) as float64, finite, at least one."""
    array = _numbers(owner, name, x)
    check_vector(owner, name, array)
    _first_bad(owner, name, np.isfinite(array), "finite", "entry")
    return array


def check_ages(owner: str, x: Any, rows: int) -> FloatArray:
    """Ages in years (n,), finite and not negative."""
    array = _numbers(owner, "ages", x)
    check_vector(owner, "ages", array, rows, "identities")
    _first_bad(owner, "ages", np.isfinite(array) & (array >= 0), "finite and not negative, in years")
    return array


def check_flags(owner: str, name: str, x: Any, rows: int) -> BoolArray:
    """Booleans, or numbers that are 0 or 1, (n,), of both kinds."""
    array = to_numpy(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{owner}: {name} must be an array of booleans, got dtype {array.dtype}")
    check_vector(owner, name, array, rows, "the pairs")
    _first_bad(owner, name, np.isin(array, (0, 1)), "boolean (or 0 and 1)", "entry")
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
        _first_bad(owner, name, np.isfinite(array) & (array == np.floor(array)), "whole numbers or strings", "entry")
        array = array.astype(np.int64)
    elif array.dtype.kind == "O":
        is_text = np.array([isinstance(label, str) for label in array], dtype=np.bool_)
        _first_bad(owner, name, is_text, "strings, or an array of whole numbers", "entry")
        array = array.astype(np.str_)
    elif array.dtype.kind not in "iuU":
        raise TypeError(f"{owner}: {name} must be an array of whole numbers or strings, got dtype {array.dtype}")
    labels, codes = np.unique(array, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), labels


def check_indices(owner: str, name: str, x: Any) -> IntArray:
    """Row numbers (n,), not negative."""
    array = to_numpy(x)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{owner}: {name} must be an array of row numbers (integers), got dtype {array.dtype}")
    check_vector(owner, name, array)
    _first_bad(owner, name, array >= 0, "row numbers from 0", "entry")
    return array.astype(np.int64)


def check_fars(owner: str, fars: Any) -> tuple[float, ...]:
    """Target false accept rates, each in (0, 1], no two alike."""
    fars = tuple(fars)
    for far in fars:
        check_number(owner, "fars", far, above=0.0, most=1.0)
    require(len(set(fars)) == len(fars), owner, f"fars must differ from each other, got {fars}")
    return tuple(float(far) for far in fars)
