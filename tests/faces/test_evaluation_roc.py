"""TAR, AUC and curves against brute force; Wilson's interval against its equation; bootstraps and paired differences."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib_faces.evaluation import (
    Estimate,
    auc,
    bootstrap_estimate,
    identity_bootstrap,
    paired_difference,
    roc_points,
    tar_at_far,
    wilson,
)

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


@pytest.mark.parametrize(("far", "allowed"), [(0.29, 29), (np.nextafter(0.07, 0), 6)])
def test_a_far_times_the_impostors_that_rounds_up_or_down(far: float, allowed: int) -> None:
    assert tar_at_far([2.0], np.arange(100) / 100, far).false_accepts == allowed


def test_the_threshold_in_json_is_null_if_no_score_is_above_it() -> None:
    entry = tar_at_far([0.9, 0.5], [0.6, 0.2], 0.5).to_dict()
    assert entry["threshold"] == 0.2
    assert tar_at_far([0.9, 0.5], [0.6, 0.2], 1.0).to_dict()["threshold"] is None


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


@given(trials=st.integers(1, 500), share=st.floats(0, 1), level=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_solves_its_equation_and_contains_the_rate(trials: int, share: float, level: float) -> None:
    successes = round(share * trials)
    rate, z = successes / trials, NormalDist().inv_cdf(0.5 + level / 2)
    low, high = wilson(successes, trials, level=level)
    assert 0 <= low <= rate <= high <= 1
    assert low < high
    for end in (low, high):
        # The definition: |rate - end| is z standard errors at the end, not at the rate.
        assert (rate - end) ** 2 == pytest.approx(z * z * end * (1 - end) / trials, abs=1e-9)


def test_identity_bootstrap_is_deterministic_and_even() -> None:
    identities = np.repeat(np.arange(20), 3)
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what is watched here
    draws = identity_bootstrap(identities, replicates=2000, seed=3)
    assert draws.shape == (2000, 20)
    assert (draws.sum(axis=1) == 20).all()
    np.testing.assert_array_equal(draws, identity_bootstrap(identities, replicates=2000, seed=3))
    assert not np.array_equal(draws, identity_bootstrap(identities, replicates=2000, seed=4))
    np.testing.assert_allclose(draws.mean(axis=0), 1.0, atol=0.1)
    np.testing.assert_allclose(draws.var(axis=0), 0.95, atol=0.2)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_bootstrap_estimate_takes_percentiles_of_finite_replicates() -> None:
    replicates = np.concatenate([np.linspace(0.2, 0.8, 101), [np.nan] * 50])
    estimate = bootstrap_estimate(0.5, replicates, n=7, clusters=4, level=0.9)
    assert estimate.low == pytest.approx(0.23)
    assert estimate.high == pytest.approx(0.77)
    assert (estimate.value, estimate.n) == (0.5, 7)


def test_bootstrap_estimate_is_never_certain_from_few_identities() -> None:
    one = bootstrap_estimate(0.5, np.full(50, 0.5), n=10, clusters=1)
    assert one.low < 0.1
    assert one.high > 0.9
    top = bootstrap_estimate(1.0, np.ones(50), n=10, clusters=30)
    assert (top.low, top.high) == wilson(30, 30)


def test_bootstrap_estimate_of_nothing_is_null() -> None:
    empty = bootstrap_estimate(float("nan"), np.full(5, np.nan), n=0, clusters=0)
    assert empty.to_dict() == {"value": None, "low": None, "high": None, "n": 0}
    assert bootstrap_estimate(0.4, np.empty(0), n=3, clusters=2) == Estimate(0.4, None, None, 3)


def test_paired_difference_is_narrower_than_separate_ones() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(0.5, 0.1, 400)
    a = bootstrap_estimate(0.6, shared + 0.1 + generator.normal(0, 0.01, 400), n=50, clusters=9)
    b = bootstrap_estimate(0.5, shared, n=40, clusters=9)
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(0.1)
    assert difference.n == 40
    assert a.overlaps(b)
    assert difference.low > 0.05


def test_paired_difference_without_values_or_with_other_resamples() -> None:
    empty = Estimate(None, None, None, 0, np.full(3, np.nan))
    some = Estimate(0.5, 0.4, 0.6, 3, np.full(3, 0.5))
    assert paired_difference(empty, some).to_dict()["value"] is None
    assert some.overlaps(empty)
    with pytest.raises(ValueError, match="equally many replicates, got 3 and 2"):
        paired_difference(some, Estimate(0.5, 0.4, 0.6, 3, np.full(2, 0.5)))
    with pytest.raises(ValueError, match="got 3 and none"):
        paired_difference(some, Estimate(0.5, 0.4, 0.6, 3))
