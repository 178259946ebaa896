"""Published rules for pairs, written out plainly, and the conventions that a result states."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kdlib_faces.evaluation import (
    PAIR_SETS,
    PairProtocol,
    evaluate,
    pair_set,
    positives_first_folds,
    tar_at_far,
    verify_pairs,
)
from kdlib_faces.evaluation.fold_thresholds import exact_at_far, grid_at_far


def make(count: int = 400, seed: int = 0, noise: float = 1.2, width: int = 10) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(seed)
    same = np.tile(np.repeat([True, False], count // 20), 10)
    left = generator.normal(size=(same.size, width))
    other = generator.normal(size=left.shape)
    return left, np.where(same[:, None], left, other) + noise * generator.normal(size=left.shape), same


def distances_of(left: Any, right: Any) -> np.ndarray:
    unit = [x / np.sqrt((x * x).sum(axis=1, keepdims=True)) for x in (left, right)]
    return np.square(unit[0] - unit[1]).sum(axis=1)


def contiguous(count: int) -> list[np.ndarray]:
    return np.array_split(np.arange(count), 10)


def interpolated(rates: list[float], thresholds: Any, target: float) -> float:
    """What SciPy's linear spline over equal abscissae gave: between the last point at most there and the next."""
    last = max(k for k in range(len(rates)) if rates[k] <= target)
    if last == len(rates) - 1:
        return float(thresholds[last])
    share = (target - rates[last]) / (rates[last + 1] - rates[last])
    return float(thresholds[last] + share * (thresholds[last + 1] - thresholds[last]))


def published_val(distances: Any, same: Any, target: float) -> tuple[float, float, float]:
    """insightface's calculate_val: FAR on the other folds at 0, 0.001, ...; interpolate; TAR and FAR on the held-out."""
    thresholds, vals, fars = np.arange(0, 4, 0.001), [], []
    for test in contiguous(len(same)):
        train = np.setdiff1d(np.arange(len(same)), test)
        negative = distances[train][~same[train]]
        rates = [float((negative < t).sum()) / negative.size for t in thresholds]
        limit = interpolated(rates, thresholds, target) if max(rates) >= target else 0.0
        accepted = distances[test] < limit
        vals.append(accepted[same[test]].sum() / same[test].sum())
        fars.append(accepted[~same[test]].sum() / (~same[test]).sum())
    return float(np.mean(vals)), float(np.std(vals)), float(np.mean(fars))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("far", [1e-3, 0.02, 0.1])
def test_val_in_grid_mode_is_the_published_procedure(seed: int, far: float) -> None:
    left, right, same = make(seed=seed)
    found = verify_pairs(left, right, same, val_fars=(far,)).val[far]
    tar, std, measured = published_val(distances_of(left, right), same, far)
    assert (found.tar, found.std, found.far) == (
        pytest.approx(tar, abs=1e-9),
        pytest.approx(std, abs=1e-9),
        pytest.approx(measured, abs=1e-9),
    )
    assert (found.rule, found.target, found.resolvable) == ("grid", far, far > 1e-3)


def test_val_accepts_nothing_if_the_grid_never_reaches_the_far() -> None:
    assert grid_at_far(np.array([3.9995, 4.0]), 0.5) == 0.0
    assert grid_at_far(np.array([0.5, 1.5]), 1.0) == pytest.approx(3.999)
    assert grid_at_far(np.array([3.9985, 4.0]), 0.25) == pytest.approx(3.9985)  # halfway from 3.998 to the last point
    assert grid_at_far(np.array([3.9975, 3.9985, 5, 5]), 0.375) == pytest.approx(3.9985)
    assert exact_at_far(np.array([0.5, 1.5]), 1.0) == np.inf


def test_val_in_exact_mode_is_the_rule_of_tar_at_far() -> None:
    left, right, same = make()
    found = verify_pairs(left, right, same, threshold="exact", val_fars=(0.05,)).val[0.05]
    distances = distances_of(left, right)
    for fold, test in enumerate(contiguous(same.size)):
        train = np.setdiff1d(np.arange(same.size), test)
        point = tar_at_far(-distances[train][same[train]], -distances[train][~same[train]], 0.05)
        assert found.thresholds[fold] == pytest.approx(-point.threshold, abs=1e-12)
        assert found.fold_tars[fold] == pytest.approx((distances[test][same[test]] < -point.threshold).mean())
    assert found.rule == "exact"


def published_pca(left: Any, right: Any, same: Any, k: int) -> list[float]:
    """insightface's calculate_roc with pca: fit on the other folds' left and right, transform, unit, distances."""
    left, right = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (left, right))
    thresholds, accuracies = np.arange(0, 4, 0.01), []
    for test in contiguous(len(same)):
        train = np.setdiff1d(np.arange(len(same)), test)
        both = np.concatenate([left[train], right[train]])
        center = both.mean(axis=0)
        axes = np.linalg.svd(both - center, full_matrices=False)[2][:k]
        distances = distances_of((left - center) @ axes.T, (right - center) @ axes.T)
        scores = [float(((distances[train] < t) == same[train]).mean()) for t in thresholds]
        accuracies.append(float(((distances[test] < thresholds[int(np.argmax(scores))]) == same[test]).mean()))
    return accuracies


@pytest.mark.parametrize("k", [1, 4, 10])
def test_pca_is_fitted_on_the_other_folds_alone(k: int) -> None:
    left, right, same = make()
    found = verify_pairs(left, right, same, pca=k)
    np.testing.assert_allclose(found.fold_accuracies, published_pca(left, right, same, k), atol=1e-9)
    assert found.to_dict()["pca"] == k
    # As published, `val` knows nothing of it.
    plain = verify_pairs(left, right, same, val_fars=(0.05,)).val[0.05]
    assert verify_pairs(left, right, same, pca=k, val_fars=(0.05,)).val[0.05].tar == plain.tar


def test_facexzoo_threshold_is_a_cosine_and_a_tie_is_always_wrong() -> None:
    left, right, same = make()
    scores = 1 - distances_of(left, right) / 2
    accuracies, thresholds = [], []
    for test in contiguous(same.size):
        train = np.setdiff1d(np.arange(same.size), test)
        low, high = scores[train].min(), scores[train].max()
        steps = [low + (high - low) / 1000 * k for k in range(1, 1001)]
        gains = [
            float((scores[train][same[train]] > t).mean() - (scores[train][~same[train]] > t).mean()) for t in steps
        ]
        best = steps[int(np.argmax(gains))]
        thresholds.append(best)
        right_ones = (scores[test][same[test]] > best).sum() + (scores[test][~same[test]] < best).sum()
        accuracies.append(right_ones / test.size)
    found = verify_pairs(left, right, same, threshold="facexzoo")
    np.testing.assert_allclose(found.thresholds, thresholds)
    np.testing.assert_allclose(found.fold_accuracies, accuracies, atol=1e-9)
    assert found.standard_error == pytest.approx(np.std(accuracies, ddof=1) / np.sqrt(10))
    entry = found.to_dict()
    assert entry["standard_error"] == found.standard_error
    assert "as FaceX-Zoo" in entry["convention"]
    # A held-out pair on the threshold itself is right neither as the same nor as different.
    eye = np.eye(2)
    tied = verify_pairs(eye[[0, 0] * 10], eye[[0, 1] * 10], [1, 0] * 10, threshold="facexzoo")
    assert tied.accuracy == 1.0
    level = verify_pairs(eye[[0] * 20], eye[[0] * 20], [1, 0] * 10, threshold="facexzoo")
    assert level.accuracy == 0.0


def test_the_nearest_rule_may_exceed_its_far() -> None:
    left, right, same = make()
    rows = np.stack([left, right], 1).reshape(-1, 10)
    index = np.arange(same.size) * 2
    found = evaluate(rows, PairProtocol(index, index + 1, same, fars=(0.0127, 1e-4), tar_mode="nearest"))
    assert (found.to_dict()["tar_rule"], found.to_dict()["tar_unresolvable"]) == ("nearest", ["0.0001"])
    assert "insightface" in found.convention
    assert found.tar[0.0127].far > 0.0127
    assert evaluate(rows, PairProtocol(index, index + 1, same, fars=(0.0127,))).tar[0.0127].far <= 0.0127


def test_positives_first_lists_get_folds_of_both_kinds() -> None:
    left, right, same = make()
    order = np.argsort(~same, kind="stable")
    with pytest.raises(ValueError, match="every fold must hold both kinds"):
        verify_pairs(left[order], right[order], same[order])
    folds = positives_first_folds(same[order])
    found = verify_pairs(left[order], right[order], same[order], fold_ids=folds)
    np.testing.assert_allclose(found.fold_accuracies, verify_pairs(left, right, same).fold_accuracies, atol=1e-12)


@pytest.mark.parametrize("name", sorted(PAIR_SETS))
def test_published_sets_have_ten_equal_folds(name: str) -> None:
    count = PAIR_SETS[name].pairs
    same = np.tile(np.repeat([True, False], count // 20), 10)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(2 * count, 4))
    rows[1::2] = np.where(same[:, None], rows[0::2], rows[1::2]) + 0.5 * generator.normal(size=(count, 4))
    left = np.arange(count) * 2
    result = evaluate(rows, pair_set(name, left, left + 1, same))
    assert result.pairs == count
    assert result.notes[0] == f"{name}: {count} of {count} pairs"
    order = np.argsort(~same, kind="stable")
    moved = evaluate(rows, pair_set(name, left[order], left[order] + 1, same[order], order="positives_first"))
    np.testing.assert_allclose(moved.fold_accuracies, result.fold_accuracies)


def test_pairs_from_shards_and_bad_unused_rows() -> None:
    left, right, same = make()
    sharded = verify_pairs([left[:33], left[33:]], iter([right[:399], right[399:]]), same)
    np.testing.assert_array_equal(verify_pairs(left, right, same).fold_accuracies, sharded.fold_accuracies)
    rows, protocol = (
        np.vstack([left, right, np.full((1, 10), np.nan)]),
        PairProtocol(np.arange(400), np.arange(400, 800), same),
    )
    for form, message in (
        (rows, r"embeddings must be finite .*got row 800"),
        ([rows[:800], np.ones((3, 9))], r"embeddings, shard 1, must be \(n, 10\), got \(3, 9\)"),
        (iter([np.array([["a"]])]), "shard 0, must be an array of numbers, got dtype <U1"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            evaluate(form, protocol)


def published_accuracies(
    left: np.ndarray, right: np.ndarray, same: np.ndarray, thresholds: Any, folds: Any
) -> list[float]:
    """Normalize, squared distance, and per fold the first threshold of best accuracy on the other folds."""
    distances = distances_of(left, right).tolist()
    accuracies = []
    for fold in sorted(set(folds)):
        train = [k for k in range(len(same)) if folds[k] != fold]
        test = [k for k in range(len(same)) if folds[k] == fold]
        grid = thresholds(sorted({distances[k] for k in train}))
        scores = [sum((distances[k] < t) == same[k] for k in train) / len(train) for t in grid]
        best = grid[scores.index(max(scores))]
        accuracies.append(sum((distances[k] < best) == same[k] for k in test) / len(test))
    return accuracies


def midpoints(known: list[float]) -> list[float]:
    return [known[0], *((a + b) / 2 for a, b in pairwise(known)), known[-1] + 1]


@pytest.mark.parametrize("seed", range(3))
def test_grid_is_the_published_procedure(seed: int) -> None:
    left, right, same = make(200, seed)
    result = verify_pairs(left, right, same)
    expected = published_accuracies(
        left, right, same, lambda _: list(np.arange(0, 4, 0.01)), [k // 20 for k in range(200)]
    )
    np.testing.assert_allclose(result.fold_accuracies, expected, rtol=0, atol=1e-9)
    assert result.accuracy == pytest.approx(np.mean(expected), abs=1e-9)
    assert result.std == pytest.approx(np.std(expected), abs=1e-9)
    assert result.standard_error == pytest.approx(np.std(expected, ddof=1) / np.sqrt(10), abs=1e-9)
    assert 0.6 < result.accuracy < 1
    assert (result.pairs, result.threshold_rule) == (200, "grid")
    assert set(np.round(result.thresholds * 100, 9) % 1) == {0.0}
    assert result.to_dict().keys() == {"accuracy", "std", "folds", "threshold_rule", "pairs"}


@pytest.mark.parametrize("seed", range(3))
def test_exact_takes_midpoints(seed: int) -> None:
    left, right, same = make(100, seed)
    folds = np.random.default_rng(seed).permutation(np.arange(100) % 4)
    result = verify_pairs(left, right, same, fold_ids=folds, threshold="exact")
    expected = published_accuracies(left, right, same, midpoints, list(folds))
    np.testing.assert_allclose(result.fold_accuracies, expected, rtol=0, atol=1e-9)


def test_exact_handles_ties_and_neighboring_floats() -> None:
    # Distances 0 and 2 only: the midpoint 1 separates them.
    left, right = np.eye(2)[[0, 0] * 10], np.eye(2)[[0, 1] * 10]
    result = verify_pairs(left, right, [1, 0] * 10, threshold="exact")
    assert (result.accuracy, result.thresholds.tolist()) == (1.0, [1.0] * 10)


def test_uneven_contiguous_folds_equal_those_of_kfold() -> None:
    left, right, _ = make(200)
    same = np.tile([True, False], 100)[:47]
    # 47 pairs: seven folds of five pairs, then three of four.
    folds = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5 + [5] * 5 + [6] * 5 + [7] * 4 + [8] * 4 + [9] * 4
    contiguous = verify_pairs(left[:47], right[:47], same)
    named = verify_pairs(left[:47], right[:47], same, fold_ids=[f"fold {fold}" for fold in folds])
    np.testing.assert_array_equal(contiguous.fold_accuracies, named.fold_accuracies)
