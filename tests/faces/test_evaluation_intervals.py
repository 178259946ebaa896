"""Intervals: Wilson against the quadratic it solves, the identity bootstrap, and paired differences."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib_faces.evaluation import Estimate, bootstrap_estimate, identity_bootstrap, paired_difference, wilson


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


@pytest.mark.parametrize(
    ("successes", "trials", "level", "message"),
    [
        (1, 0, 0.95, "wilson: trials must be"),
        (3, 2, 0.95, "wilson: successes must be"),
        (-1, 2, 0.95, "wilson: successes must be"),
        (1, 2, 1.0, "wilson: level must be below 1"),
        (1, 2, 0.0, "wilson: level must be"),
        (float("nan"), 10, 0.95, "wilson: successes must be a finite number"),
    ],
)
def test_wilson_refuses(successes: float, trials: float, level: float, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        wilson(successes, trials, level=level)


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
    assert one.low is not None
    assert one.high is not None
    assert one.low < 0.1
    assert one.high > 0.9
    top = bootstrap_estimate(1.0, np.ones(50), n=10, clusters=30)
    assert (top.low, top.high) == wilson(30, 30)


def test_bootstrap_estimate_of_nothing_is_null() -> None:
    empty = bootstrap_estimate(float("nan"), np.full(5, np.nan), n=0, clusters=0)
    assert empty.to_dict() == {"value": None, "low": None, "high": None, "n": 0}
    assert bootstrap_estimate(0.4, np.empty(0), n=3, clusters=2).to_dict() == {
        "value": 0.4,
        "low": None,
        "high": None,
        "n": 3,
    }


def test_paired_difference_is_narrower_than_separate_ones() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(0.5, 0.1, 400)
    a = bootstrap_estimate(0.6, shared + 0.1 + generator.normal(0, 0.01, 400), n=50, clusters=9)
    b = bootstrap_estimate(0.5, shared, n=40, clusters=9)
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(0.1)
    assert difference.n == 40
    assert a.overlaps(b)
    assert difference.low is not None
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
