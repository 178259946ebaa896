"""Pair sets with published figures, and their protocols."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from kdlib._checks import check_choice
from kdlib_faces.evaluation._checks import check_array, require
from kdlib_faces.evaluation._types import ArrayLike
from kdlib_faces.evaluation.fold_thresholds import Rule
from kdlib_faces.evaluation.protocols.pairs import PairProtocol
from kdlib_faces.evaluation.splits import positives_first_folds


@dataclass(frozen=True)
class PairSet:
    """A published pair set.

    Attributes:
        name: Name as in the `.bin` sets.
        pairs: Number of pairs, in 10 folds with equally many genuine and impostor pairs.
        note: What the figure means and does not mean.

    Examples:
        >>> PAIR_SETS["cfp_fp"]
        PairSet(name='cfp_fp', pairs=7000, note='')
    """

    name: str
    pairs: int
    note: str = ""


_AGEDB = "all pairs are {} years apart: there is nothing to break down by gap inside the set"
PAIR_SETS = {
    each.name: each
    for each in (
        PairSet("lfw", 6000),
        *(PairSet(f"agedb_{years}", 6000, _AGEDB.format(int(years))) for years in ("05", "10", "20", "30")),
        PairSet("calfw", 6000, "the list was replaced in September 2018: figures of the old and the new one differ"),
        PairSet("cplfw", 6000),
        PairSet("cfp_ff", 7000),
        PairSet("cfp_fp", 7000),
        PairSet("cacd_vs", 4000, "no ages are published with the pairs"),
    )
}
"""The sets of `pair_set` by name."""


class _PairOptions(TypedDict, total=False):
    """Options of `PairProtocol` that `pair_set` passes on."""

    threshold: Rule
    fars: Sequence[float]
    images: int | None
    tar_mode: Literal["exact", "nearest"]
    val_fars: Sequence[float]
    pca: int | None
    identities: ArrayLike | None
    train_identities: ArrayLike | None
    ages: ArrayLike | None
    gap_bins: Sequence[float]
    notes: Sequence[str]
    replicates: int
    seed: int
    level: float


def pair_set(
    name: str,
    left: ArrayLike,
    right: ArrayLike,
    same: ArrayLike,
    *,
    fold_ids: ArrayLike | None = None,
    order: Literal["folds", "positives_first"] = "folds",
    **options: Unpack[_PairOptions],
) -> PairProtocol:
    """The protocol of a published pair set, with its published folds; missing pairs are noted in the result.

    Args:
        name: One of `PAIR_SETS`: `"lfw"`, `"agedb_05"` to `"agedb_30"`, `"calfw"`, `"cplfw"`, `"cfp_ff"`, `"cfp_fp"`,
            `"cacd_vs"`.
        left: (p,) row number of each pair's first image.
        right: (p,) row number of its second image.
        same: (p,) whether the pair is genuine.
        fold_ids: (p,) fold of each pair; required if pairs are missing.
        order: Order of a list without `fold_ids`: by folds, as in the `.bin` sets and in LFW's list, or all genuine pairs
            first, as in the original lists of CALFW and CPLFW.
        options: Options of `PairProtocol`: `threshold`, `fars`, `val_fars`, `pca`, `identities` ...

    Returns:
        The protocol.

    Raises:
        ValueError: The name is unknown, or the list is incomplete and has no folds: new folds would differ from the
            published ones.

    Examples:
        >>> import numpy as np
        >>> same = np.tile(np.repeat([True, False], 300), 10)
        >>> pair_set("lfw", np.arange(6000) * 2, np.arange(6000) * 2 + 1, same, fars=(1e-3,))
        PairProtocol(<6000 pairs>, fold_ids=None, threshold='grid', fars=(0.001,), images=None)
    """
    check_choice("pair_set", "name", name, tuple(PAIR_SETS))
    check_choice("pair_set", "order", order, ("folds", "positives_first"))
    known, count = PAIR_SETS[name], check_array("pair_set", "same", same).size
    message = f"{name} must have {known.pairs} pairs, got {count}: is it an old list, or another set?"
    require(count <= known.pairs, "pair_set", message)
    message = (
        f"fold_ids must be given where pairs of {name} are missing, got {count} of {known.pairs} pairs and no folds"
    )
    require(count == known.pairs or fold_ids is not None, "pair_set", message)
    if fold_ids is None and order == "positives_first":
        fold_ids = positives_first_folds(same)
    notes = [f"{name}: {count} of {known.pairs} pairs", *([known.note] if known.note else [])]
    options["notes"] = (*notes, *options.get("notes", ()))
    return PairProtocol(left, right, same, fold_ids, **options)
