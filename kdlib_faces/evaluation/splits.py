"""Evaluation room: parts that share no identity. NumPy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import IntArray, check_labels, require

__all__ = ["check_identity_disjoint", "identity_disjoint_split"]


def identity_disjoint_split(identities: Any, fractions: Sequence[float], *, seed: int) -> list[IntArray]:
    """Split images into parts that share no identity.

    Identities, not images, are dealt: they are shuffled by the seed and cut at the cumulated fractions. Nothing is
    stratified. The order of the rows does not change which identity falls into which part.

    Args:
        identities: (n,) whole numbers or strings.
        fractions: the share of identities in each part, above 0, summing to 1.
        seed: of the shuffle.

    Returns:
        For each part its row numbers, rising; together they are all rows.

    Raises:
        ValueError: fractions that do not sum to 1, or a part that would get no identity.

    Examples:
        >>> train, test = identity_disjoint_split(["a", "a", "b", "c", "c"], (0.67, 0.33), seed=0)
        >>> train.size + test.size
        5
    """
    owner = "identity_disjoint_split"
    codes, labels = check_labels(owner, "identities", identities)
    require(len(fractions) > 0, owner, "fractions must not be empty, got ()")
    for fraction in fractions:
        check_number(owner, "fractions", fraction, above=0, most=1)
    require(abs(sum(fractions) - 1) < 1e-6, owner, f"fractions must sum to 1, got {tuple(fractions)}")
    check_number(owner, "seed", seed, least=0, integer=True)
    cuts = np.rint(np.cumsum(fractions)[:-1] * labels.size).astype(np.int64)
    sizes = np.diff(cuts, prepend=0, append=labels.size)
    short = np.flatnonzero(sizes < 1)
    require(
        short.size == 0,
        owner,
        f"fractions must leave each part an identity, got {labels.size} identities for {tuple(fractions)}",
    )
    part_of = np.empty(labels.size, dtype=np.int64)
    part_of[np.random.default_rng(seed).permutation(labels.size)] = np.repeat(np.arange(len(fractions)), sizes)
    return [np.flatnonzero(part_of[codes] == part) for part in range(len(fractions))]


def check_identity_disjoint(a: Any, b: Any) -> None:
    """Refuse two sets of images that share an identity: a test on people of the training set flatters the model.

    Args:
        a: (n,) identities of one set, whole numbers or strings.
        b: (m,) identities of the other, of the same kind.

    Raises:
        ValueError: an identity in both, or numbers in one and strings in the other, which say nothing of each other.

    Examples:
        >>> check_identity_disjoint(["ann", "bob"], ["bob", "cy"])
        Traceback (most recent call last):
        ...
        kdlib_faces._checks.InputError: check_identity_disjoint: a and b must share no identity, got 1 in both: 'bob'
    """
    owner = "check_identity_disjoint"
    _, first = check_labels(owner, "a", a)
    _, second = check_labels(owner, "b", b)
    kinds = ["strings" if labels.dtype.kind == "U" else "numbers" for labels in (first, second)]
    require(kinds[0] == kinds[1], owner, f"a and b must name identities alike, got {kinds[0]} and {kinds[1]}")
    shared = np.intersect1d(first, second).tolist()
    listed = ", ".join(repr(label) for label in shared[:5]) + (", ..." if len(shared) > 5 else "")
    require(not shared, owner, f"a and b must share no identity, got {len(shared)} in both: {listed}")
