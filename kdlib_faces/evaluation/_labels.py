"""Labels of identities, groups, folds and templates as arrays; different labels never become equal."""

from typing import cast

import numpy as np
import torch
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.evaluation._checks import check_array, check_each, check_vector, require
from kdlib_faces.evaluation._types import AnyArray, ArrayLike, IntArray, LabelArray

MAX_TABLE = 50_000_000
INT64 = np.iinfo(np.int64)


def label_array(owner: str, name: str, x: ArrayLike, *, rows: int | None = None, like: str = "rows") -> LabelArray:
    """Labels (n,) as strings or as integers, of 64 bits if they need it.

    Floating-point labels must be whole and below the first number that their type rounds (2^24 for float32), and a list
    must hold numbers or strings, not both, which NumPy would all turn into strings.
    """
    array = check_array(owner, name, x)
    check_vector(owner, name, array, rows, like)
    if array.dtype.kind not in "iufUOT":
        raise TypeError(f"{owner}: {name} must be an array of whole numbers or strings, got dtype {array.dtype}")
    if array.dtype.kind in "OT" or isinstance(x, (list, tuple)):
        entries = array.tolist() if array.dtype.kind in "OT" else cast(list[object], x)
        return _exact(
            owner, name, [each.item() if isinstance(each, (np.generic, Tensor)) else each for each in entries]
        )
    if array.dtype.kind == "f":
        kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else array.dtype.name
        eps = (torch.finfo(x.dtype) if isinstance(x, Tensor) else np.finfo(array.dtype)).eps
        limit = min(2 / float(eps), 2.0**53)
        whole = np.isfinite(array) & (array == np.floor(array))
        check_each(owner, name, whole, "whole numbers or strings", "entry")
        wanted = f"below {limit:.0f} in {kind}, which rounds larger ones (pass integers or strings)"
        check_each(owner, name, np.abs(array) < limit, wanted, "entry")
        array = array.astype(np.int64)
    if array.dtype.kind == "u" and int(array.max()) <= INT64.max:
        array = array.astype(np.int64)
    return array


def _exact(owner: str, name: str, entries: list[object]) -> LabelArray:
    """Labels of a list or of an object array, of one kind."""
    text = np.array([isinstance(each, str) for each in entries])
    number = np.array([isinstance(each, (int, float)) and not isinstance(each, bool) for each in entries])
    check_each(owner, name, text if text[0] else number, "all whole numbers or all strings", "entry")
    if text[0]:
        # NumPy drops null characters at the end of a string.
        check_each(
            owner, name, ~np.array([str(each).endswith("\0") for each in entries]), "free of null characters", "entry"
        )
        return np.array(entries, dtype=np.str_)
    values = cast(list[int | float], entries)
    whole = np.array([isinstance(each, int) or (each.is_integer() and abs(each) < 2**53) for each in values])
    check_each(owner, name, whole, "whole numbers or strings", "entry")
    numbers = [int(each) for each in values]
    low, high = min(numbers), max(numbers)
    require(
        low >= INT64.min and high < 2 ** (64 if low >= 0 else 63),
        owner,
        f"{name} must have 64 bits, got {low} to {high}",
    )
    return np.array(numbers, dtype=np.int64 if high <= INT64.max else np.uint64)


def check_labels(
    owner: str, name: str, x: ArrayLike, *, rows: int | None = None, like: str = "rows"
) -> tuple[IntArray, LabelArray]:
    """Labels (whole numbers or strings) as codes (n,) into the sorted array of distinct labels."""
    array = label_array(owner, name, x, rows=rows, like=like)
    if array.dtype.kind in "iu" and array.dtype != np.uint64:
        # Counting is faster than sorting if the numbers are dense.
        whole = array.astype(np.int64)
        low, high = int(whole.min()), int(whole.max())
        if high - low <= 4 * array.size + 1000:
            present = np.bincount(whole - low) > 0
            return (np.cumsum(present) - 1)[whole - low], (np.flatnonzero(present) + low).astype(array.dtype)
    labels, codes = np.unique(array, return_inverse=True)
    return codes.reshape(-1).astype(np.int64), labels


def check_label_pairs(
    owner: str, names: tuple[str, str], first: ArrayLike, second: ArrayLike, rows: int, like: str
) -> tuple[IntArray, IntArray, LabelArray]:
    """The labels of both sides of pairs as codes (n,), (n,) into the sorted array of the distinct labels of both."""
    a, b = (label_array(owner, name, x, rows=rows, like=like) for name, x in zip(names, (first, second), strict=True))
    check_same_kind(owner, " and ".join(names), a, b)
    if a.dtype.kind == b.dtype.kind:
        codes, labels = check_labels(owner, " and ".join(names), np.concatenate([a, b]))
    else:
        # Signed and unsigned integers together would become float64.
        labels, codes = np.unique(np.concatenate([a.astype(object), b.astype(object)]), return_inverse=True)
    return codes[: a.size], codes[a.size :], labels


def check_same_kind(owner: str, names: str, a: LabelArray, b: LabelArray) -> None:
    """Both must be strings, or both numbers."""
    kinds = ["strings" if each.dtype.kind == "U" else "numbers" for each in (a, b)]
    require(kinds[0] == kinds[1], owner, f"{names} must be named alike, got {kinds[0]} and {kinds[1]}")


def check_identities(owner: str, x: ArrayLike) -> tuple[IntArray, LabelArray]:
    """Labels of at least two identities, one of them with two images; see `check_labels`."""
    codes, labels = check_labels(owner, "identities", x)
    require(labels.size >= 2, owner, f"identities must hold at least two identities, got only {labels.tolist()[0]!r}")
    require(codes.size > labels.size, owner, "identities must hold one with two images, got one image of each")
    return codes, labels


def check_distinct(owner: str, name: str, codes: IntArray, labels: LabelArray) -> None:
    """Labels, as returned by `check_labels`, must not occur twice."""
    if labels.size < codes.size:
        twice = int(np.flatnonzero(np.bincount(codes) > 1)[0])
        first, second = np.flatnonzero(codes == twice)[:2].tolist()
        got = f"{labels[twice].item()!r} in entries {first} and {second}"
        raise InputError(f"{owner}: {name} must not occur twice, got {got}")


def find_labels(labels: LabelArray, known: LabelArray) -> IntArray:
    """Index of each label (m,) in the array `known`, -1 for one that is not there."""
    place = {label: k for k, label in enumerate(known.tolist())}
    return np.array([place.get(label, -1) for label in labels.tolist()], dtype=np.int64)


def look_up(owner: str, name: str, x: ArrayLike, known: LabelArray, where: str) -> IntArray:
    """Index of each label of `x` (m,) in the sorted array `known`; the error gives a label that is missing."""
    array: AnyArray = label_array(owner, name, x)
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
        check_same_kind(owner, f"{name} and {where}", labels, known)
        indices = find_labels(labels, known)[codes]
    if indices.min() < 0:
        bad = np.flatnonzero(indices < 0)
        got = f"{array[bad[0]].item()!r} in entry {bad[0]} that is not ({bad.size} in all)"
        raise InputError(f"{owner}: {name} must be in {where}, got {got}")
    return indices
