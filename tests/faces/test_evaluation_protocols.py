"""Pair protocols, identities in folds and splits, and paired tests."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib_faces.evaluation import (
    IdentityOverlapWarning,
    PairProtocol,
    check_identity_disjoint,
    evaluate,
    identities_in_several_folds,
    identity_bootstrap,
    identity_disjoint_split,
    identity_overlap,
    pair_set,
    paired_test,
    positives_first_folds,
    tar_at_far,
    verify_pairs,
    wilson,
)


def make_embeddings(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 6))


def test_pairs_by_row_numbers_equal_pairs_of_arrays() -> None:
    embeddings, generator = make_embeddings(), np.random.default_rng(1)
    left, same = generator.integers(0, 40, 60), np.arange(60) % 2 == 0
    right = (left + generator.integers(1, 40, 60)) % 40
    for threshold in ("grid", "exact"):
        found = evaluate(embeddings, PairProtocol(left, right, same, threshold=threshold))
        direct = verify_pairs(embeddings[left], embeddings[right], same, threshold=threshold)
        np.testing.assert_array_equal(found.fold_accuracies, direct.fold_accuracies)
        assert direct.to_dict().items() <= found.to_dict().items()


def test_pairs_with_fars_have_operating_points() -> None:
    embeddings, same = make_embeddings(), np.arange(20) % 2 == 0
    result = evaluate(embeddings, PairProtocol.interleaved(same, fars=(0.25, 0.01), fold_ids=np.arange(20) // 4))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = (unit[0::2] * unit[1::2]).sum(axis=1)
    expected = tar_at_far(scores[same], scores[~same], 0.25)
    assert result.tar[0.25].tar == expected.tar
    assert result.to_dict()["tar"]["0.25"] == expected.estimate.to_dict()
    assert not result.tar[0.01].resolvable


def test_custom_protocols_are_accepted() -> None:
    class Rows:
        def evaluate(self, embeddings: Any) -> Any:
            return len(embeddings)

    assert evaluate(make_embeddings(), Rows()) == 40


@given(st.lists(st.integers(0, 12), min_size=3, max_size=60), st.integers(0, 99))
def test_a_split_shares_no_identity_and_loses_no_image(identities: list[int], seed: int) -> None:
    if len(set(identities)) < 3:
        with pytest.raises(ValueError, match="leave each part an identity"):
            identity_disjoint_split(identities, (0.4, 0.3, 0.3), seed=seed)
        return
    codes = np.array(identities)
    parts = identity_disjoint_split(codes, (0.4, 0.3, 0.3), seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(codes.size))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        check_identity_disjoint(codes[parts[a]], codes[parts[b]])
    assert [np.unique(codes[part]).size for part in parts] == np.diff(
        [0, *np.rint(np.array([0.4, 0.7, 1.0]) * np.unique(codes).size)]
    ).tolist()
    order = np.random.default_rng(seed).permutation(codes.size)
    moved = identity_disjoint_split(codes[order], (0.4, 0.3, 0.3), seed=seed)
    assert [set(codes[part]) for part in parts] == [set(codes[order][part]) for part in moved]


def test_the_intervals_of_a_pair_protocol_have_its_confidence() -> None:
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 100)
    rows = rng.normal(size=(400, 4))
    rows[1::2][same] += 2 * rows[::2][same]
    for level in (0.5, 0.95, 0.99):
        protocol = PairProtocol.interleaved(same, fars=(0.1,), level=level)
        point = protocol.evaluate(rows).tar[0.1]
        assert (point.low, point.high) == wilson(point.tar * 100, 100, level=level)
        assert (f"level={level}" in repr(protocol)) == (level != 0.95)
    with pytest.raises(ValueError, match="PairProtocol: level must be below 1, got 1"):
        PairProtocol.interleaved(same, level=1)


def test_incomplete_sets_need_folds_and_are_noted() -> None:
    same = np.tile([True, False], 100)
    left = np.arange(200) * 2
    result = evaluate(
        np.random.default_rng(0).normal(size=(400, 4)),
        pair_set("lfw", left, left + 1, same, fold_ids=np.arange(200) // 20),
    )
    assert result.to_dict()["notes"] == ["lfw: 200 of 6000 pairs"]


def pairs_of_identities() -> tuple[Any, Any, Any, Any, Any]:
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(40), 3)
    rows = generator.normal(size=(40, 6))[codes] + 0.8 * generator.normal(size=(120, 6))
    left = np.arange(0, 120, 3)
    pairs = np.concatenate([left, left]), np.concatenate([left + 1, (left + 4) % 120])
    return rows, codes, *pairs, np.repeat([True, False], 40)


def test_identities_in_several_folds_are_noted_and_training_identities_warned_of() -> None:
    rows, codes, left, right, same = pairs_of_identities()
    folds = positives_first_folds(same)
    assert identities_in_several_folds(codes[left], codes[right], folds) == list(range(0, 40, 4))
    protocol = PairProtocol(left, right, same, folds, identities=codes)
    result = evaluate(rows, protocol)
    assert result.to_dict()["notes"] == ["10 of 40 identities are in more than one fold"]
    with pytest.warns(IdentityOverlapWarning, match="3 of 40 identities were trained on"):
        noted = PairProtocol(left, right, same, folds, identities=codes, train_identities=[1, 2, 3, 77])
    assert "3 of 40 identities were trained on" in evaluate(rows, noted).notes
    assert identity_overlap([1, 2], [3]) == []
    with pytest.raises(ValueError, match="same must be in agreement with identities, got pair 0"):
        PairProtocol(left, right, ~same, folds, identities=codes)


def test_the_interval_over_identities_is_a_bootstrap_of_weighted_pairs() -> None:
    rows, codes, left, right, same = pairs_of_identities()
    protocol = PairProtocol(left, right, same, positives_first_folds(same), identities=codes, replicates=50, seed=3)
    result = evaluate(rows, protocol)
    estimate = result.accuracy_estimate()
    drawn = identity_bootstrap(codes, replicates=50, seed=3)
    for m, replicate in zip(drawn, estimate.replicates, strict=True):
        weight = [
            m[codes[a]] if codes[a] == codes[b] else m[codes[a]] * m[codes[b]] for a, b in zip(left, right, strict=True)
        ]
        assert replicate == pytest.approx(np.average(result.correct, weights=weight), abs=1e-12)
    assert estimate.value == pytest.approx(result.correct.mean())
    independent = evaluate(rows, PairProtocol(left, right, same, positives_first_folds(same))).accuracy_estimate()
    assert (independent.low, independent.high) == wilson(result.accuracy * same.size, same.size)


def test_paired_test() -> None:
    a = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 0])
    b = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    test = paired_test(a, b, replicates=300, seed=1)
    # 4 against 1: 2 (C(5,0) + C(5,1)) / 2^5.
    assert (test.only_a, test.only_b, test.p_value) == (4, 1, 0.375)
    assert test.difference.value == pytest.approx(0.3)
    assert test.difference.low <= 0.3 <= test.difference.high
    assert paired_test(a, a).p_value == 1.0
    clustered = paired_test(a, b, identities=[0] * 5 + [1] * 5, replicates=300)
    assert clustered.to_dict()["difference"]["n"] == 10
    even = paired_test([1, 0], [0, 1])
    assert even.p_value == 1.0
    many = paired_test(np.ones(3000), np.zeros(3000), replicates=10)
    assert 0 <= many.p_value < 1e-12
