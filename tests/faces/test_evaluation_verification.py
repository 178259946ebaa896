"""Verification accuracy against the published steps written out plainly."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kdlib_faces.evaluation import verify_pairs


def make_pairs(count: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    same = np.tile(np.repeat([True, False], count // 20), 10)
    left = generator.normal(size=(same.size, 8))
    right = np.where(same[:, None], left, generator.normal(size=left.shape)) + noise * generator.normal(size=left.shape)
    return left, right, same


def published(left: np.ndarray, right: np.ndarray, same: np.ndarray, thresholds: Any, folds: Any) -> list[float]:
    """Normalize, squared distance, and per fold the first threshold of best accuracy on the other folds."""
    left = np.array([row / np.sqrt((row * row).sum()) for row in left])
    right = np.array([row / np.sqrt((row * row).sum()) for row in right])
    distances = [float(sum((a - b) ** 2)) for a, b in zip(left, right, strict=True)]
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
    left, right, same = make_pairs(200, seed)
    result = verify_pairs(left, right, same)
    expected = published(left, right, same, lambda _: list(np.arange(0, 4, 0.01)), [k // 20 for k in range(200)])
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
    left, right, same = make_pairs(100, seed)
    folds = np.random.default_rng(seed).permutation(np.arange(100) % 4)
    result = verify_pairs(left, right, same, fold_ids=folds, threshold="exact")
    expected = published(left, right, same, midpoints, list(folds))
    np.testing.assert_allclose(result.fold_accuracies, expected, rtol=0, atol=1e-9)


def test_exact_handles_ties_and_neighboring_floats() -> None:
    # Distances 0 and 2 only: the midpoint 1 separates them.
    left, right = np.eye(2)[[0, 0] * 10], np.eye(2)[[0, 1] * 10]
    result = verify_pairs(left, right, [1, 0] * 10, threshold="exact")
    assert (result.accuracy, result.thresholds.tolist()) == (1.0, [1.0] * 10)


def test_uneven_contiguous_folds_equal_those_of_kfold() -> None:
    left, right, _ = make_pairs(200, 0)
    same = np.tile([True, False], 100)[:47]
    # 47 pairs: seven folds of five pairs, then three of four.
    folds = [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5 + [5] * 5 + [6] * 5 + [7] * 4 + [8] * 4 + [9] * 4
    contiguous = verify_pairs(left[:47], right[:47], same)
    named = verify_pairs(left[:47], right[:47], same, fold_ids=[f"fold {fold}" for fold in folds])
    np.testing.assert_array_equal(contiguous.fold_accuracies, named.fold_accuracies)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda left, right, same: (left, right.at(3, np.inf), same), "right must be finite.*got row 3"),
        (lambda left, right, same: (left.at(5, 0.0), right, same), "left must be non-zero.*got row 5"),
        (lambda left, right, same: (left, right[:-1], same), "right must have one row for each of 40 .*got 39"),
        (lambda left, right, same: (left, right[:, :3], same), r"right must be \(n, 8\) like left"),
        (lambda left, right, same: (left, right, same[:-1]), r"same must be as long as the pairs \(40\), got 39"),
        (lambda left, right, same: (left, right, same | True), "both kinds of pair, got only True"),
        (lambda left, right, same: (left, right, same + 1), "same must be boolean"),
        (lambda left, right, same: (left, right, np.sort(same)), "fold 0 with only impostor pairs; is the file"),
        (lambda left, right, same: (left[:12], right[:12], np.tile([0, 1], 6)), "must be 20 pairs, got 12"),
        (lambda left, right, same: (left[:, 0], right, same), r"left must be \(n, d\), not empty, got \(40,\)"),
    ],
)
def test_bad_pairs_are_reported(change: Any, message: str) -> None:
    class Rows(np.ndarray):
        def at(self, row: int, value: float) -> "Rows":
            self[row] = value
            return self

    left, right, same = make_pairs(40, 0)
    with pytest.raises(ValueError, match=message):
        verify_pairs(*change(left.view(Rows), right.view(Rows), same))


def test_bad_folds_are_reported() -> None:
    left, right, same = make_pairs(40, 0)
    with pytest.raises(ValueError, match="fold 'b' with only impostor pairs"):
        verify_pairs(left, right, same, fold_ids=np.where(same, "a", np.where(np.arange(40) < 20, "a", "b")))
    with pytest.raises(ValueError, match="at least two folds"):
        verify_pairs(left, right, same, fold_ids=np.zeros(40, dtype=int))
    with pytest.raises(ValueError, match="fold_ids must be as long as the pairs"):
        verify_pairs(left, right, same, fold_ids=[0, 1])
    with pytest.raises(ValueError, match="threshold must be one of 'grid', 'exact'"):
        verify_pairs(left, right, same, threshold="best")  # type: ignore[arg-type]
