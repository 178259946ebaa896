"""TAR at FAR against a brute-force search over thresholds, AUC against all pairs, and the curve."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib_faces.evaluation import auc, roc_points, tar_at_far, wilson

# Few distinct values, so that ties within and between the two kinds are the rule.
tied = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=40)
loose = st.lists(st.floats(-1, 1), min_size=1, max_size=40)
scores = st.one_of(tied, loose)
fars = st.one_of(st.sampled_from([0.1, 0.01, 0.25, 0.29, 0.5, 1.0]), st.floats(1e-6, 1))


@settings(max_examples=200)
@given(genuine=scores, impostor=scores, far=fars)
def test_exact_rule_by_brute_force(genuine: list[float], impostor: list[float], far: float) -> None:
    point = tar_at_far(genuine, impostor, far)
    # The loosest threshold, among the impostor scores and -inf, whose FAR is within the target.
    admissible = [t for t in [-np.inf, *impostor] if sum(s > t for s in impostor) / len(impostor) <= far]
    assert point.threshold == min(admissible)
    assert point.tar == pytest.approx(sum(s > min(admissible) for s in genuine) / len(genuine), abs=1e-12)
    assert point.false_accepts == sum(s > point.threshold for s in impostor)
    assert point.far == point.false_accepts / len(impostor) <= far
    assert point.resolvable == (1 / len(impostor) <= far)
    assert (point.low, point.high) == wilson(round(point.tar * len(genuine)), len(genuine))


@settings(max_examples=200)
@given(genuine=scores, impostor=scores, far=fars)
def test_nearest_by_brute_force(genuine: list[float], impostor: list[float], far: float) -> None:
    point = tar_at_far(genuine, impostor, far, mode="nearest")
    curve = []
    for t in [-np.inf, *genuine, *impostor]:
        rate = sum(s > t for s in impostor) / len(impostor)
        curve.append((abs(rate - far), -rate, -sum(s > t for s in genuine) / len(genuine)))
    _, rate, tar = min(curve)
    assert (point.far, point.tar) == (-rate, -tar)
    assert abs(point.far - far) <= abs(tar_at_far(genuine, impostor, far).far - far)


def test_published_rule_on_a_worked_case() -> None:
    impostor = np.arange(1000) / 1000
    point = tar_at_far([0.9985, 0.9975, 0.5], impostor, 1e-3)
    assert (point.threshold, point.false_accepts, point.far) == (0.998, 1, 0.001)
    assert point.tar == pytest.approx(1 / 3)
    unresolved = tar_at_far([1.5, 0.998], impostor, 1e-4)
    assert not unresolved.resolvable
    assert (unresolved.false_accepts, unresolved.threshold, unresolved.tar) == (0, 0.999, 0.5)


@given(genuine=scores, impostor=scores)
def test_auc_is_the_probability_over_all_pairs(genuine: list[float], impostor: list[float]) -> None:
    wins = [(g > i) + 0.5 * (g == i) for g in genuine for i in impostor]
    assert auc(genuine, impostor) == pytest.approx(sum(wins) / len(wins), abs=1e-12)
    assert auc(genuine, impostor) == pytest.approx(1 - auc(impostor, genuine), abs=1e-12)


@given(genuine=scores, impostor=scores, points=st.integers(2, 60))
def test_every_point_of_the_curve_is_an_exact_point(genuine: list[float], impostor: list[float], points: int) -> None:
    far, tar = roc_points(genuine, impostor, points)
    assert far.size == tar.size <= points
    assert (np.diff(far) >= 0).all()
    assert (np.diff(tar) >= 0).all()
    assert (far[-1], tar[-1]) == (1.0, 1.0)
    for f, t in zip(far, tar, strict=True):
        if f > 0:
            assert tar_at_far(genuine, impostor, f).tar == t


def test_tensors_and_half_precision_are_accepted() -> None:
    genuine, impostor = torch.tensor([0.75, 0.5], dtype=torch.bfloat16), torch.tensor([0.5, 0.25])
    assert tar_at_far(genuine, impostor.half(), 0.5).tar == 1.0
    assert auc(genuine.requires_grad_(), impostor) == 0.875


@pytest.mark.parametrize(
    ("genuine", "impostor", "far", "error", "message"),
    [
        ([], [0.1], 0.1, ValueError, "genuine must be .n,., not empty"),
        ([0.1], [], 0.1, ValueError, "impostor must be .n,., not empty"),
        ([0.1, float("nan")], [0.1], 0.1, ValueError, "genuine must be finite, got entry 1"),
        ([0.1], [float("inf"), 0.2], 0.1, ValueError, "impostor must be finite, got entry 0"),
        ([[0.1]], [0.1], 0.1, ValueError, r"genuine must be .*shape \(1, 1\)"),
        ([0.1], [0.2], 0.0, ValueError, "far must be a finite number and > 0"),
        ([0.1], [0.2], 1.5, ValueError, "far must be"),
        ([0.1], [0.2], float("nan"), TypeError, "far must be"),
        (["x"], [0.2], 0.1, TypeError, "genuine must be an array of numbers"),
    ],
)
def test_bad_scores_are_reported(genuine: Any, impostor: Any, far: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tar_at_far(genuine, impostor, far)
    with pytest.raises(ValueError, match="mode must be one of 'exact', 'nearest', got 'closest'"):
        tar_at_far([0.1], [0.2], 0.1, mode="closest")  # type: ignore[arg-type]
