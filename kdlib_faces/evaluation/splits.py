"""Folds of pairs, and splits of images that share no identity."""

from collections.abc import Sequence

import numpy as np

from kdlib_faces.evaluation._checks import check_flags, check_numbers, check_whole, require
from kdlib_faces.evaluation._labels import check_label_pairs, check_labels, check_same_kind
from kdlib_faces.evaluation._types import ArrayLike, IntArray


class IdentityOverlapWarning(UserWarning):
    """Identities of the training set are in the test set: the figure is too good."""


def identity_disjoint_split(identities: ArrayLike, fractions: Sequence[float], *, seed: int) -> list[IntArray]:
    """Split images into parts that share no identity.

    Identities, not images, are assigned: they are shuffled by the seed and cut at the cumulated fractions, without
    stratification. The order of the rows does not change the part of an identity.

    Args:
        identities: (n,) whole numbers or strings.
        fractions: Share of identities in each part, above 0, summing to 1.
        seed: Seed of the shuffle.

    Returns:
        For each part its row numbers, rising; together they are all rows.

    Raises:
        ValueError: The fractions do not sum to 1, or a part would get no identity.

    Examples:
        >>> train, test = identity_disjoint_split(["a", "a", "b", "c", "c"], (0.67, 0.33), seed=0)
        >>> train.size + test.size
        5
    """
    owner = "identity_disjoint_split"
    codes, labels = check_labels(owner, "identities", identities)
    fractions = check_numbers(owner, "fractions", fractions, above=0, max=1)
    require(len(fractions) > 0, owner, "fractions must not be empty, got ()")
    require(abs(sum(fractions) - 1) < 1e-6, owner, f"fractions must sum to 1, got {fractions}")
    seed = check_whole(owner, "seed", seed, min=0)
    cuts = np.rint(np.cumsum(fractions)[:-1] * labels.size).astype(np.int64)
    sizes = np.diff(cuts, prepend=0, append=labels.size)
    short = np.flatnonzero(sizes < 1)
    message = f"fractions must leave each part an identity, got {labels.size} identities for {fractions}"
    require(short.size == 0, owner, message)
    part_of = np.empty(labels.size, dtype=np.int64)
    part_of[np.random.default_rng(seed).permutation(labels.size)] = np.repeat(np.arange(len(fractions)), sizes)
    return [np.flatnonzero(part_of[codes] == part) for part in range(len(fractions))]


def check_identity_disjoint(a: ArrayLike, b: ArrayLike) -> None:
    """Raise an error if two sets of images share an identity: a test on training identities gives too good a figure.

    Args:
        a: (n,) identities of one set, whole numbers or strings.
        b: (m,) identities of the other set, of the same type.

    Raises:
        InputError: The sets share an identity; the message lists the shared ones.
        ValueError: As `identity_overlap`.

    Examples:
        >>> check_identity_disjoint(["ann", "bob"], ["bob", "cy"])
        Traceback (most recent call last):
        ...
        kdlib_faces._checks.InputError: check_identity_disjoint: a and b must share no identity, got 1 in both: 'bob'
    """
    shared = _overlap("check_identity_disjoint", a, b)
    listed = ", ".join(map(repr, shared[:5])) + (", ..." if len(shared) > 5 else "")
    message = f"a and b must share no identity, got {len(shared)} in both: {listed}"
    require(not shared, "check_identity_disjoint", message)


def identity_overlap(a: ArrayLike, b: ArrayLike) -> list[str | int]:
    """The identities that two sets of images share, sorted.

    Args:
        a: (n,) identities of one set, whole numbers or strings.
        b: (m,) identities of the other set, of the same type.

    Returns:
        The shared identities.

    Raises:
        ValueError: One holds numbers and the other strings, which cannot be compared.

    Examples:
        >>> identity_overlap(["ann", "bob"], ["bob", "cy"])
        ['bob']
        >>> identity_overlap(["ann", "bob"], [3, 4])
        Traceback (most recent call last):
        ...
        kdlib_faces._checks.InputError: identity_overlap: identities of a and b must be named alike, got strings and numbers
    """
    return _overlap("identity_overlap", a, b)


def _overlap(owner: str, a: ArrayLike, b: ArrayLike) -> list[str | int]:
    _, first = check_labels(owner, "a", a)
    _, second = check_labels(owner, "b", b)
    check_same_kind(owner, "identities of a and b", first, second)
    return sorted(set(first.tolist()) & set(second.tolist()))


def positives_first_folds(same: ArrayLike, folds: int = 10) -> IntArray:
    """Folds of a list with all genuine pairs first, as those of CALFW and CPLFW.

    Fold k takes the k-th part of the genuine pairs and the k-th part of the impostor pairs. Contiguous parts of such a
    list would be folds of one kind, and their accuracy would be meaningless.

    Args:
        same: (n,) whether each pair is genuine, in any order.
        folds: Number of folds.

    Returns:
        (n,) fold of each pair, from 0.

    Raises:
        ValueError: There are fewer pairs of a kind than folds.

    Examples:
        >>> positives_first_folds([1, 1, 1, 1, 0, 0], folds=2).tolist()
        [0, 0, 1, 1, 0, 1]
    """
    owner = "positives_first_folds"
    flags, folds = check_flags(owner, "same", same), check_whole(owner, "folds", folds, min=2)
    fold_ids = np.empty(flags.size, dtype=np.int64)
    for kind in (True, False):
        rows = np.flatnonzero(flags == kind)
        require(rows.size >= folds, owner, f"same must hold {folds} pairs of each kind, got {rows.size} of {kind}")
        for fold, part in enumerate(np.array_split(rows, folds)):
            fold_ids[part] = fold
    return fold_ids


def identities_in_several_folds(first: ArrayLike, second: ArrayLike, fold_ids: ArrayLike) -> list[str | int]:
    """Identities with pairs in more than one fold: the folds' accuracies are then not independent.

    Args:
        first: (n,) identity of each pair's first image.
        second: (n,) identity of its second image, named in the same way.
        fold_ids: (n,) fold of each pair.

    Returns:
        These identities, sorted; an empty list for identity-disjoint folds.

    Examples:
        >>> identities_in_several_folds(["ann", "ann", "cy"], ["bob", "ann", "cy"], [0, 1, 1])
        ['ann']
    """
    owner = "identities_in_several_folds"
    folds, _ = check_labels(owner, "fold_ids", fold_ids)
    *sides, labels = check_label_pairs(owner, ("first", "second"), first, second, folds.size, "fold_ids")
    seen = np.unique(np.stack([np.concatenate(sides), np.concatenate([folds, folds])]), axis=1)
    return list(labels[np.bincount(seen[0]) > 1].tolist())
