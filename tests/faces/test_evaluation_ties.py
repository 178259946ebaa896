"""Ties: images of equal embedding directions, against plain loops over a table of exact scores."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from kdlib_faces import evaluation
from kdlib_faces.evaluation import auc, evaluate, tar_at_far

FARS = (0.01, 0.1, 0.4)


def make(directions: int, width: int, seed: int, images: int = 60) -> tuple[Any, Any, Any, Any]:
    """Embeddings of few directions and many lengths; identities; ages; and the scores of all pairs, equal where they tie."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(0, directions, images)
    base = generator.normal(size=(directions, width))
    rows = base[kinds] * generator.uniform(0.1, 9, (images, 1))
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    table = np.array([[round(float(a @ b), 9) for b in unit] for a in unit])
    return rows, generator.integers(0, 12, images), generator.integers(0, 60, images), table[kinds[:, None], kinds]


@pytest.fixture(params=[(1, 7, 0), (1, 512, 1), (3, 33, 2), (5, 128, 3)], ids=str)
def tied(request: pytest.FixtureRequest) -> tuple[Any, Any, Any, Any]:
    return make(*request.param)


def split(table: Any, pairs: Any, codes: Any) -> tuple[list[float], list[float]]:
    genuine = [table[i, j] for i, j in pairs if codes[i] == codes[j]]
    return genuine, [table[i, j] for i, j in pairs if codes[i] != codes[j]]


def check_points(points: Any, genuine: Any, impostor: Any) -> None:
    for far in FARS:
        expected = tar_at_far(genuine, impostor, far)
        assert (points[far].tar, points[far].false_accepts) == (expected.tar, expected.false_accepts), far
        assert points[far].threshold == pytest.approx(expected.threshold, abs=1e-8)


def test_all_pairs(tied: Any) -> None:
    rows, codes, ages, table = tied
    genuine, impostor = split(table, list(combinations(range(len(rows)), 2)), codes)
    result = evaluate(rows, evaluation.AgeGapProtocol(codes, ages=ages, fars=FARS, replicates=3))
    check_points(result.operating_points, genuine, impostor)
    assert result.all.auc.value == pytest.approx(auc(genuine, impostor), abs=1e-12)
    assert [result.all.tar[far].value for far in FARS] == [tar_at_far(genuine, impostor, far).tar for far in FARS]
    check_points(
        evaluate(rows, evaluation.AgeErrorProtocol(codes, ages=ages, fars=FARS)).operating_points, genuine, impostor
    )


def test_given_pairs(tied: Any) -> None:
    rows, codes, _, table = tied
    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    left, right = np.array(pairs).T
    same = codes[left] == codes[right]
    folds = np.arange(same.size) % 4
    genuine, impostor = split(table, pairs, codes)
    result = evaluate(rows, evaluation.PairProtocol(left, right, same, folds, threshold="exact", fars=FARS))
    check_points(result.tar, genuine, impostor)
    assert result.summary().measures["auc"].value == pytest.approx(auc(genuine, impostor), abs=1e-12)
    distances = np.round(2 - 2 * table[left, right], 8)
    for fold in range(4):
        train, test = folds != fold, folds == fold
        limits = np.unique(distances[train])
        limits = np.concatenate([limits[:1], (limits[:-1] + limits[1:]) / 2, [9.0]])
        best = limits[np.argmax([((distances[train] < t) == same[train]).mean() for t in limits])]
        assert result.fold_accuracies[fold] == ((distances[test] < best) == same[test]).mean()


def rank_of(scores: Any, mates: Any) -> int:
    """Rank of the first mate if equal scores are ordered by their place."""
    order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))
    return 1 + next(place for place, k in enumerate(order) if mates[k])


def test_leave_one_out(tied: Any) -> None:
    rows, codes, _, table = tied
    result = evaluate(rows, evaluation.LeaveOneOutProtocol(codes, (1, 3)))
    for probe in range(60):
        others = [k for k in range(60) if k != probe]
        mates = codes[others] == codes[probe]
        assert result.ranks_of_mates[probe] == (rank_of(table[probe, others], mates) if mates.any() else 0)


def test_groups(tied: Any) -> None:
    rows, codes, ages, table = tied
    probes, gallery = np.flatnonzero(ages < 30), np.flatnonzero(ages >= 30)
    groups = np.where(ages < 30, "young", "adult")
    result = evaluate(rows, evaluation.CrossGroupProtocol(codes, groups, fars=FARS, replicates=3))
    genuine, impostor = split(table, [(i, j) for i in probes for j in gallery], codes)
    check_points(result.operating_points, genuine, impostor)
    assert result.auc.value == pytest.approx(auc(genuine, impostor), abs=1e-12)
    assert [result.tar[far].value for far in FARS] == [result.operating_points[far].tar for far in FARS]
    mated = [probe for probe in probes if (codes[gallery] == codes[probe]).any()]
    expected = [rank_of(table[probe, gallery], codes[gallery] == codes[probe]) for probe in mated]
    assert result.ranks_of_mates.tolist() == expected
    outcomes = result.outcomes()
    assert [outcomes[f"tar_{far:g}"].hits.mean() for far in FARS] == [result.tar[far].value for far in FARS]


def test_distractors(tied: Any) -> None:
    rows, codes, _, table = tied
    found = evaluation.identify_with_distractors(rows[:30], codes[:30], rows[30:], fars=FARS, ties="wrong")
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j and codes[i] == codes[j]]
    assert found.rank1 == np.mean([table[i, j] > table[i, 30:].max() for i, j in pairs])
    genuine = [table[i, j] for i, j in pairs if i < j]
    check_points(found.tar, genuine, table[:30, 30:].ravel())


def test_templates(tied: Any) -> None:
    rows, codes, _, table = tied
    check_templates(rows, codes, table)
    if np.unique(table).size == 1:
        # Rows of several directions tie in float64 only.
        check_templates(rows.astype(np.float32), codes, table)


def check_templates(rows: Any, codes: Any, table: Any) -> None:
    ids = np.arange(60)
    left, right = np.array(list(combinations(range(60), 2))).T
    same = codes[left] == codes[right]
    result = evaluation.template_verification(rows, ids, ids, left, right, same, fars=FARS)
    check_points(result.tar, table[left, right][same], table[left, right][~same])
    outcomes = result.outcomes()
    assert [outcomes[f"tar_{far:g}"].hits.mean() for far in FARS] == [result.tar[far].tar for far in FARS]
    first = np.array([np.flatnonzero(codes == code)[0] for code in np.unique(codes)[:6]])
    probes = np.setdiff1d(ids, first)
    found = evaluation.identify_templates(
        evaluation.pool_templates(rows, ids, ids),
        [(first, codes[first])],
        (probes, codes[probes]),
        fpirs=FARS,
        ranks=(1,),
    )
    ranks = [rank_of(table[p, first], codes[first] == codes[p]) if codes[p] in codes[first] else 0 for p in probes]
    assert found.searches[0].ranks.tolist() == ranks
    others = [table[p, first].max() for p, rank in zip(probes, ranks, strict=True) if not rank]
    for far in FARS:
        threshold = sorted(others, reverse=True)[int(far * len(others))]
        hits = [rank == 1 and table[p, first].max() > threshold for p, rank in zip(probes, ranks, strict=True) if rank]
        assert found.tpir[far].value == pytest.approx(np.mean(hits), abs=1e-12)
