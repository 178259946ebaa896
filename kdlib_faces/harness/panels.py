"""Recipe: results of protocols in the form that a report shows: pieces that every kind of protocol shares.

The form is in `kdlib_faces.report.evaluations`; here are its parts from arrays and estimates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import Estimate, roc_points

__all__ = [
    "MISSED",
    "VERIFIED",
    "ProtocolResult",
    "ScoreTable",
    "Words",
    "HardPair",
    "curve",
    "differences",
    "estimate",
    "far_words",
    "histogram",
    "measure",
    "missed_pairs",
    "once_each",
    "operating_point",
    "pairs_of_models",
    "unit_rows",
]

Arrays = Mapping[str, NDArray[Any]]
EDGES = np.linspace(-1, 1, 101)
MOST_COMPARED = 4
PAIRED = "Paired bootstrap, both models on the same resamples{}; each model's thresholds are kept as they are."


@dataclass(frozen=True)
class HardPair:
    """A pair that a model judges wrong, or nearly so.

    Attributes:
        left: row of the task's first set.
        right: row of the set `other`.
        score: cosine.
        same: whether it is one person.
        note: what else is said of it, such as the years between.
        other: which of the task's sets the right image is of.
    """

    left: int
    right: int
    score: float
    same: bool
    note: str = ""
    other: int = 0


@dataclass(frozen=True)
class Words:
    """What the pictures of the worst pairs are called, and why these are shown: of one person, and of different ones."""

    same: tuple[str, str]
    different: tuple[str, str]


VERIFIED = Words(
    ("One person, least alike", "the first to be rejected when the threshold rises"),
    ("Different people, most alike", "the first to be accepted when it falls"),
)
MISSED = Words(
    ("Missed, each beside its mate", "the probes whose mate is furthest behind somebody else, that mate on the right"),
    ("Missed, each beside who was ahead", "the same probes, the most alike stranger on the right"),
)


@dataclass(frozen=True)
class ScoreTable:
    """Scores to be written down: the columns, and a function that gives the rows of a model one by one."""

    columns: tuple[str, ...]
    rows: Callable[[str], Iterator[tuple[Any, ...]]]
    total: int


@dataclass
class ProtocolResult:
    """What a protocol found for all models.

    Attributes:
        entry: of the report's `evaluations`.
        results: model -> what its result writes down, for `protocols` of the report.
        num_failures: model -> the pairs to look at; empty where there are none.
        words: what their pictures are called.
        scores: what a file of scores would hold; None where there is none.
    """

    entry: dict[str, Any]
    results: dict[str, dict[str, Any]]
    worst: dict[str, list[HardPair]] = field(default_factory=dict)
    words: Words = VERIFIED
    scores: ScoreTable | None = None


def unit_rows(array: NDArray[Any]) -> NDArray[np.float64]:
    """Embeddings of length one, float64."""
    rows = np.asarray(array, dtype=np.float64)
    found: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return found


def once_each(order: Iterable[int], ends: Callable[[int], Iterable[Any]], count: int) -> list[int]:
    """The first `count` items of an order none of whose ends (people, images) has come before.

    Examples:
        >>> once_each([2, 0, 1], [("ann", "bob"), ("cy", "dan"), ("ann", "eve")].__getitem__, 5)
        [2, 1]
    """
    seen: set[Any] = set()
    found: list[int] = []
    for item in order:
        if len(found) >= count:
            break
        mine = set(ends(item))
        if not seen & mine:
            seen |= mine
            found.append(item)
    return found


def missed_pairs(
    probes: NDArray[Any],
    mates: tuple[NDArray[Any], NDArray[Any]],
    strangers: tuple[NDArray[Any], NDArray[Any]],
    people: NDArray[Any],
    count: int,
    other: int = 0,
) -> list[HardPair]:
    """Probes that were taken for somebody else, furthest first, a person once: each beside its mate, then beside the stranger.

    Args:
        probes: (m,) rows of the missed probes.
        mates: rows (m,) and scores (m,) of their mates.
        strangers: likewise of the strangers ahead of them; a row of -1 cannot be shown.
        people: (m,) identity of each.
        count: how many.
        other: which of the task's sets the strangers are of.
    """
    order = np.argsort(mates[1] - strangers[1], kind="stable")
    chosen = once_each(order, lambda item: [people[item]], count)
    pairs = [
        [HardPair(int(probes[k]), int(row[k]), float(score[k]), same, other=0 if same else other) for k in chosen]
        for same, (row, score) in ((True, mates), (False, strangers))
    ]
    return pairs[0] + [pair for pair in pairs[1] if pair.right >= 0]


def measure(title: str, unit: str = "rate", note: str = "", better: str = "high") -> dict[str, str]:
    """A row of the table of measures."""
    return {"title": title, "unit": unit, "note": note, "better": better}


def estimate(found: Estimate | None, *, resolvable: bool = True, note: str = "") -> dict[str, Any]:
    """An estimate as the report takes it; None is one of nothing."""
    if found is None:
        return {"value": None}
    entry: dict[str, Any] = dict(found.to_dict())
    if not resolvable:
        entry["resolvable"] = False
    return entry | ({"note": note} if note else {})


def operating_point(found: Any) -> dict[str, Any]:
    """A `TarAtFar`: its TAR with the interval, flagged where its FAR cannot be resolved."""
    return estimate(found.estimate, resolvable=found.resolvable)


def far_words(far: float, rate: str = "FAR") -> str:
    """`FAR 0.1 %`; `FAR 1e-06` below a hundred-thousandth."""
    return f"{rate}\u00a0{100 * far:g}\u00a0%" if far >= 1e-4 else f"{rate}\u00a0{far:g}"


def curve(genuine: NDArray[Any], impostor: NDArray[Any]) -> dict[str, list[float]]:
    """The ROC of two score vectors."""
    far, tar = roc_points(genuine, impostor)
    return {"far": far.tolist(), "tar": tar.tolist()}


def histogram(genuine: NDArray[Any], impostor: NDArray[Any], threshold: float | None = None) -> dict[str, Any]:
    """Counts of both kinds of score in bins from -1 to 1."""
    found: dict[str, Any] = {
        "edges": EDGES.tolist(),
        "genuine": np.histogram(np.clip(genuine, -1, 1), EDGES)[0].tolist(),
        "impostor": np.histogram(np.clip(impostor, -1, 1), EDGES)[0].tolist(),
    }
    return found | ({"threshold": float(threshold)} if threshold is not None and np.isfinite(threshold) else {})


def pairs_of_models(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each model with each, or with the first one where they are many."""
    names = list(names)
    return list(combinations(names, 2)) if len(names) <= MOST_COMPARED else [(names[0], each) for each in names[1:]]


def differences(
    measures: Mapping[str, Mapping[str, NDArray[np.bool_]]],
    identities: Mapping[str, tuple[NDArray[Any], NDArray[Any]] | None],
    *,
    replicates: int,
    seed: int,
    level: float,
    right: str = "right",
) -> list[dict[str, Any]]:
    """Every pair of models by every measure that is a share of observations judged right.

    Args:
        measures: key -> model -> (n,) whether each observation is right.
        identities: key -> the two identities of each observation; None resamples the observations.
        replicates: bootstrap resamples.
        seed: of the resamples.
        level: the confidence.
        right: what an observation that counts is called.

    Returns:
        Rows of the report's `differences`.
    """
    from kdlib_faces.evaluation.statistics.paired import paired_test

    rows = []
    for key, hits in measures.items():
        who = identities.get(key)
        for a, b in pairs_of_models(list(hits)):
            given = {} if who is None else {"identities": who[0], "other_identities": who[1]}
            test = paired_test(hits[a], hits[b], replicates=replicates, seed=seed, level=level, **given)
            note = f"{right} by one alone: {test.only_a} and {test.only_b}, McNemar p {test.p_value:.2g}"
            rows.append({"a": a, "b": b, "measure": key, "difference": estimate(test.difference, note=note)})
    return rows
