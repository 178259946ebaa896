"""Comparison of two models on one set, and the pairs that a model fails on, against loops over pairs."""

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from kdlib_faces.evaluation import AgeGapProtocol, compare


def make_set(seed: int, identities: int = 9, images: int = 5) -> tuple[Any, Any, Any]:
    """Embeddings, identities and ages."""
    generator = np.random.default_rng(seed)
    codes = generator.permutation(np.repeat(np.arange(identities), images))
    embeddings = generator.normal(size=(identities, 4))[codes] + 0.7 * generator.normal(size=(codes.size, 4))
    return embeddings, codes, generator.uniform(1, 60, codes.size)


def test_compare_pairs_the_resamples() -> None:
    embeddings, codes, ages = make_set(0, identities=20)
    protocol = AgeGapProtocol(codes, ages=ages, fars=(0.1,), replicates=80)
    noise = np.random.default_rng(1).normal(size=embeddings.shape)
    good, bad = protocol.evaluate(embeddings), protocol.evaluate(embeddings + 3 * noise)
    entries = compare({"good": good, "bad": bad}, "good", "bad")
    assert len(entries) == 6 * 4
    assert list(entries[0]) == ["a", "b", "protocol", "bin", "metric", "difference", "separate"]
    assert {entry["metric"] for entry in entries} == {"auc", "own_auc", "tar@0.1", "own_tar@0.1"}
    by_key = {(entry["bin"], entry["metric"]): entry for entry in entries}
    clear = by_key["all", "auc"]
    assert clear["separate"] is True
    replicates = good.all.auc.replicates - bad.all.auc.replicates
    assert clear["difference"] == {
        "value": pytest.approx(good.all.auc.value - bad.all.auc.value),
        "low": pytest.approx(np.quantile(replicates, 0.025)),
        "high": pytest.approx(np.quantile(replicates, 0.975)),
        "n": good.all.genuine,
    }
    same = compare({"good": good, "twin": good}, "good", "twin")
    assert {entry["separate"] for entry in same} == {False}
    assert {entry["difference"]["value"] for entry in same} == {0.0}
    json.dumps(entries, allow_nan=False)


def test_compare_refuses_unlike_results() -> None:
    embeddings, codes, ages = make_set(0)
    first, second = (AgeGapProtocol(codes, ages=ages, replicates=3, seed=s).evaluate(embeddings) for s in (0, 1))
    with pytest.raises(ValueError, match="results of one protocol"):
        compare({"x": first, "y": second}, "x", "y")
    with pytest.raises(ValueError, match="must be among x, got 'z'"):
        compare({"x": first}, "x", "z")


def test_compare_leaves_empty_bins_null() -> None:
    protocol = AgeGapProtocol([0, 0, 1, 1], ages=[1, 2, 3, 4], fars=(0.5,), replicates=5)
    result = protocol.evaluate(np.eye(4) + 1)
    entries = [entry for entry in compare({"x": result, "y": result}, "x", "y") if entry["bin"] == "30+"]
    assert [entry["difference"]["value"] for entry in entries] == [None] * 4
    assert [entry["separate"] for entry in entries] == [False] * 4


@pytest.mark.parametrize("seed", range(3))
def test_hardest_pairs_by_hand(seed: int) -> None:
    embeddings, codes, ages = make_set(seed, identities=8)
    pairs = AgeGapProtocol(codes, ages=ages, replicates=0).evaluate(embeddings).hardest(3)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected, used = [], set()
    scored = sorted((float(unit[i] @ unit[j]), i, j) for i, j in combinations(range(codes.size), 2))
    for score, i, j in scored:
        if codes[i] == codes[j] and abs(ages[i] - ages[j]) >= 30 and codes[i] not in used and len(expected) < 3:
            used.add(codes[i])
            expected.append((i, j, pytest.approx(score), True))
    used = set()
    for score, i, j in reversed(scored):
        if codes[i] != codes[j] and not {codes[i], codes[j]} & used and len(expected) < 6:
            used |= {codes[i], codes[j]}
            expected.append((i, j, pytest.approx(score), False))
    assert [(pair.left, pair.right, pair.score, pair.same) for pair in pairs] == expected


def test_hardest_pairs_are_limited_by_the_number_of_identities() -> None:
    pairs = AgeGapProtocol([0, 0, 1], ages=[1, 2, 3]).evaluate(np.eye(3) + 0.1).hardest(5)
    assert [pair.same for pair in pairs] == [True, False]
