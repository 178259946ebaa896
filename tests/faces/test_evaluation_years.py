"""Errors by age, scores over the years, and groups without exact ages, against plain loops over all pairs."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kdlib_faces.evaluation import (
    AgeErrorProtocol,
    AgeGapProtocol,
    CrossGroupProtocol,
    LeaveOneOutProtocol,
    LongitudinalProtocol,
    auc,
    clustered_rate,
    evaluate,
    identity_bootstrap,
    leave_one_out,
    tar_at_far,
)
from kdlib_faces.evaluation.matching import all_pairs as all_pairs_module
from tests.faces.evaluation_calls import unit


def make(identities: int = 25, seed: int = 0, width: int = 16) -> tuple[Any, Any, Any]:
    """Embeddings that drift with the years, two to seven images per identity."""
    generator = np.random.default_rng(seed)
    codes = np.repeat(np.arange(identities), generator.integers(2, 8, identities))
    ages = np.round(generator.uniform(0, 60, codes.size), 1)
    center, drift = generator.normal(size=(2, identities, width))
    rows = center[codes] + drift[codes] * ages[:, None] / 40 + 0.7 * generator.normal(size=(codes.size, width))
    return rows, codes, ages


def every_pair(rows: Any, codes: Any) -> tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]:
    u = unit(rows)
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for i in range(len(u)):
        for j in range(i + 1, len(u)):
            kinds[int(codes[i] != codes[j])].append((i, j, float(u[i] @ u[j])))
    return kinds


@pytest.mark.parametrize("rows_at_a_time", [4, 33, 512])
def test_age_errors_equal_plain_loops(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_pairs_module, "ROWS", rows_at_a_time)
    rows, codes, ages = make()
    genuine, impostor = every_pair(rows, codes)
    fars = (0.1, 1e-2, 1e-3)
    result = evaluate(rows, AgeErrorProtocol(codes, ages=ages, fars=fars, replicates=20))
    for far in fars:
        point = tar_at_far([s for *_, s in genuine], [s for *_, s in impostor], far)
        found = result.operating_points[far]
        assert (found.tar, found.false_accepts, found.impostors) == (point.tar, point.false_accepts, len(impostor))
        assert found.threshold == pytest.approx(point.threshold, abs=1e-11)
        for name, low, high in (("0-4", 0, 5), ("5-9", 5, 10), ("10-19", 10, 20), ("20-29", 20, 30), ("30+", 30, 999)):
            scores = [s for i, j, s in genuine if low <= round(abs(ages[i] - ages[j]), 4) < high]
            row = next(row for row in result.fnmr_by_gap if row.name == name)
            assert row.pairs == len(scores)
            assert row.rates[far].value == pytest.approx(np.mean([s <= point.threshold for s in scores]))
            assert row.score.value == pytest.approx(np.mean(scores), abs=1e-11)
        edges = (0, 5, 13, 18, 31, 51, 999)
        for place, (low, high) in enumerate(pairwise(edges)):
            young = [s for i, j, s in genuine if low <= min(ages[i], ages[j]) < high]
            others = [s for i, j, s in impostor if low <= ages[i] < high and low <= ages[j] < high]
            younger, same_age = result.fnmr_by_younger_age[place], result.fmr_same_age[place]
            assert (younger.pairs, same_age.pairs) == (len(young), len(others))
            if young:
                assert younger.rates[far].value == pytest.approx(np.mean([s <= point.threshold for s in young]))
            assert same_age.rates[far].value == pytest.approx(np.mean([s > point.threshold for s in others]))
    assert sum(row.pairs for row in result.fnmr_by_gap) == len(genuine)


def test_slopes_are_least_squares_over_pairs_and_within_identities() -> None:
    rows, codes, ages = make()
    genuine, _ = every_pair(rows, codes)
    result = evaluate(rows, AgeErrorProtocol(codes, ages=ages, replicates=50))
    gap = np.array([abs(ages[i] - ages[j]) / 10 for i, j, _ in genuine])
    score, owner = np.array([s for *_, s in genuine]), np.array([codes[i] for i, *_ in genuine])
    assert result.slope.value == pytest.approx(np.polyfit(gap, score, 1)[0], abs=1e-10)
    levels = np.eye(25)[owner]
    assert result.slope_within.value == pytest.approx(
        np.linalg.lstsq(np.column_stack([gap, levels]), score, rcond=None)[0][0], abs=1e-10
    )
    assert result.slope_within.low < result.slope_within.value < result.slope_within.high < 0


def test_false_match_rates_are_resampled_by_the_identity_bootstrap() -> None:
    rows, codes, ages = make(identities=12)
    _, impostor = every_pair(rows, codes)
    result = evaluate(rows, AgeErrorProtocol(codes, ages=ages, fars=(0.1,), age_bins=(0, 30), replicates=15, seed=4))
    threshold = result.operating_points[0.1].threshold
    for m, replicate in zip(
        identity_bootstrap(codes, replicates=15, seed=4), result.fmr_same_age[1].rates[0.1].replicates, strict=True
    ):
        old = [(m[codes[i]] * m[codes[j]], s > threshold) for i, j, s in impostor if ages[i] >= 30 and ages[j] >= 30]
        assert replicate == pytest.approx(np.average([hit for _, hit in old], weights=[w for w, _ in old]), abs=1e-12)


def test_empty_bins_are_none_and_groups_replace_ages() -> None:
    rows, codes, ages = make()
    result = evaluate(rows, AgeErrorProtocol(codes, ages=ages, gap_bins=(0, 70), age_bins=(0, 61), replicates=10))
    for table in (result.fnmr_by_gap, result.fnmr_by_younger_age, result.fmr_same_age):
        assert table[1].pairs == 0
        assert table[1].to_dict()["rates"]["0.01"] == {"value": None, "low": None, "high": None, "n": 0}
    groups = np.where(ages < 18, "young", "adult")
    grouped = evaluate(rows, AgeErrorProtocol(codes, age_groups=groups, replicates=10))
    assert [row.name for row in grouped.fnmr_by_gap] == ["adult-adult", "adult-young", "young-young"]
    assert [row.name for row in grouped.fmr_same_age] == ["adult", "young"]
    by_gap = evaluate(rows, AgeGapProtocol(codes, age_groups=groups, replicates=0))
    for row in grouped.fnmr_by_gap:
        assert row.rates[1e-2].value == pytest.approx(by_gap.bin(row.name).fnmr[1e-2].value)
    entry = grouped.to_dict()
    assert (entry["kind"], entry["slope_per_decade"], entry["fnmr_by_younger_age"]) == ("group", None, [])


@pytest.mark.parametrize("reference", ["first", "all"])
def test_longitudinal_errors_and_slopes_equal_plain_loops(reference: Any) -> None:
    rows, codes, ages = make(identities=30, seed=2)
    u = unit(rows)
    pairs = []
    for identity in range(30):
        mine = sorted(np.flatnonzero(codes == identity), key=lambda row: (ages[row], row))
        if reference == "first":
            pairs += [(mine[0], row) for row in mine[1:]]
        else:
            pairs += [(mine[a], mine[b]) for a in range(len(mine)) for b in range(a + 1, len(mine))]
    elapsed = np.array([abs(ages[j] - ages[i]) for i, j in pairs])
    scores, owner = np.array([u[i] @ u[j] for i, j in pairs]), np.array([codes[i] for i, _ in pairs])
    _, impostor = every_pair(rows, codes)
    result = evaluate(
        rows, LongitudinalProtocol(codes, ages, reference=reference, fars=(0.05,), replicates=30, window=3)
    )
    point = tar_at_far(scores, [s for *_, s in impostor], 0.05)
    assert result.operating_points[0.05].tar == pytest.approx(point.tar)
    for row in result.after:
        inside = np.round(np.abs(elapsed - row.years), 4) <= 3
        assert (row.pairs, row.identities) == (inside.sum(), np.unique(owner[inside]).size)
        assert row.fnmr[0.05].value == pytest.approx((scores[inside] <= point.threshold).mean())
        assert row.score.value == pytest.approx(scores[inside].mean(), abs=1e-11)
    moving = [number for number in range(30) if np.unique(elapsed[owner == number]).size > 1]
    assert result.slope.n == np.isin(owner, moving).sum()
    levels = np.eye(30)[owner]
    slope = np.linalg.lstsq(np.column_stack([elapsed / 10, levels]), scores, rcond=None)[0][0]
    assert result.slope.value == pytest.approx(slope, abs=1e-10)
    for number, own in enumerate(result.identity_slopes):
        mine = owner == number
        if np.unique(elapsed[mine]).size > 1:
            assert own == pytest.approx(np.polyfit(elapsed[mine] / 10, scores[mine], 1)[0], abs=1e-8)
        else:
            assert np.isnan(own)
    assert [pair.same for pair in result.hardest(3)] == [True] * 3
    entry = result.to_dict()
    assert "protocol of this project" in entry["definition"]
    assert 0.5 < entry["identity_slopes"]["falling"] <= 1
    assert [row["years"] for row in entry["after"]] == [5, 10, 20, 30]


def test_a_genuine_score_at_the_threshold_is_rejected() -> None:
    rows, codes, ages = [[1, 0], [0, 1], [1, 0], [0, 1]], [0, 0, 1, 1], [1, 2, 3, 4]
    result = evaluate(rows, LongitudinalProtocol(codes, ages, fars=(0.5,), replicates=5))
    assert result.operating_points[0.5].threshold == 0.0  # the scores are 0 for genuine pairs, 1 or 0 for impostors
    assert result.outcomes()["fnmr_0.5"].hits.all()


def test_no_slope_without_elapsed_time() -> None:
    rows, codes, _ = make(identities=5)
    still = evaluate(rows, LongitudinalProtocol(codes, np.full(codes.size, 30.0), replicates=5))
    assert (still.slope.value, still.falling) == (None, None)
    assert all(row.pairs == 0 and row.fnmr[1e-2].value is None for row in still.after)
    assert still.to_dict()["identity_slopes"] == {"identities": 0, "quartiles": None, "falling": None}


def test_cross_group_rates_equal_loops_over_all_cross_pairs() -> None:
    rows, codes, ages = make(identities=20, seed=3)
    groups = np.where(ages < 20, "young", np.where(ages < 50, "adult", "old"))
    u = unit(rows)
    young, adult = np.flatnonzero(groups == "young"), np.flatnonzero(groups == "adult")
    genuine = [u[i] @ u[j] for i in young for j in adult if codes[i] == codes[j]]
    impostor = [u[i] @ u[j] for i in young for j in adult if codes[i] != codes[j]]
    result = evaluate(rows, CrossGroupProtocol(codes, groups, fars=(0.1, 0.01), ranks=(1, 3), replicates=20))
    assert int(result.protocol.same.sum()) == len(genuine)
    assert result.auc.value == pytest.approx(auc(genuine, impostor))
    for far in (0.1, 0.01):
        assert result.tar[far].value == pytest.approx(tar_at_far(genuine, impostor, far).tar)
        assert result.operating_points[far].tar == pytest.approx(result.tar[far].value)
    trials = {1: [], 3: []}  # type: dict[int, list[bool]]
    for i in young:
        order = sorted(adult, key=lambda j: -float(u[i] @ u[j]))
        if any(codes[j] == codes[i] for j in adult):
            for rank, hits in trials.items():
                hits.append(any(codes[j] == codes[i] for j in order[:rank]))
    for rank, hits in trials.items():
        assert result.rates[rank].value == pytest.approx(np.mean(hits))
    assert (result.protocol.probes.size, result.protocol.gallery.size, result.protocol.mateless) == (
        young.size,
        adult.size,
        young.size - len(trials[1]),
    )
    assert result.auc.low <= result.auc.value <= result.auc.high
    assert result.to_dict()["groups"] == ["young", "adult"]


def test_leave_one_out_by_probe_age_gap_and_rank() -> None:
    rows, codes, ages = make()
    result = evaluate(rows, LeaveOneOutProtocol(codes, ranks=(1, 4), ages=ages))
    assert [row.name for row in result.by_age] == ["0-4", "5-10", "11-17", "18-30", "31-50", "51+"]
    edges, gap_edges, gaps = (0, 5, 11, 18, 31, 51, 999), (0, 5, 10, 20, 30, 999), np.abs(ages - ages[result.mates])
    tables = (result.by_age, edges, ages), (result.by_gap, gap_edges, np.round(gaps, 4))
    for table, ends, years in tables:
        for row, low, high in zip(table, ends[:-1], ends[1:], strict=True):
            inside = (years >= low) & (years < high)
            assert row.probes == inside.sum() > 0
            for rank in (1, 4):
                assert row.rates[rank].value == pytest.approx((result.ranks_of_mates <= rank)[inside].mean())
    np.testing.assert_allclose(result.cmc(6), leave_one_out(rows, codes, ranks=(1, 2, 3, 4, 5, 6)))
    assert set(result.to_dict()) == {"rank1", "rank4", "probes", "by_age", "by_gap"}


def test_a_probe_without_a_mate_is_in_no_gap_bin() -> None:
    result = evaluate(np.eye(3)[[0, 0, 1, 2]], LeaveOneOutProtocol([0, 0, 1, 1], ranks=(1,), ages=[1, 2, 3, 90]))
    assert sum(row.probes for row in result.by_gap) == 4
    alone = evaluate(np.eye(3)[[0, 0, 1]], LeaveOneOutProtocol([0, 0, 1], ranks=(1,), ages=[1, 2, 3]))
    assert sum(row.probes for row in alone.by_gap) == 2
    assert sum(row.probes for row in alone.by_age) == 3


def test_a_clustered_interval_is_wider_than_over_pairs() -> None:
    hits = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 50)
    codes = np.repeat(np.arange(6), 50)
    clustered, single = clustered_rate(hits, codes), clustered_rate(hits, np.arange(300))
    assert clustered.value == single.value == pytest.approx(2 / 3)
    assert clustered.high - clustered.low > 3 * (single.high - single.low)


def test_pairs_behind_the_errors() -> None:
    rows, codes, ages = make()
    genuine, impostor = every_pair(rows, codes)
    result = evaluate(rows, AgeErrorProtocol(codes, ages=ages, fars=(1e-3, 0.02), replicates=0))
    found = sorted(zip(result.genuine.left, result.genuine.right, result.genuine.scores, strict=True))
    np.testing.assert_allclose(found, sorted(genuine), atol=1e-11)
    threshold = result.operating_points[0.02].threshold
    wrong = sorted(((i, j, s) for i, j, s in impostor if s > threshold + 1e-9), key=lambda each: -each[2])
    taken = result.false_accepts
    assert taken.left.size == len(wrong) == result.operating_points[0.02].false_accepts > 0
    np.testing.assert_allclose(np.stack([taken.left, taken.right, taken.scores], axis=1), wrong, atol=1e-11)
    assert not {"genuine", "false_accepts"} & set(result.to_dict())


def test_leave_one_out_uses_its_resamples_and_confidence() -> None:
    rows, codes, ages = make()
    narrow, wide = (
        evaluate(rows, LeaveOneOutProtocol(codes, (1,), ages=ages, replicates=50, seed=1, level=level))
        for level in (0.5, 0.99)
    )
    assert narrow.rates[1].value == wide.rates[1].value
    for few, many in ((narrow.rates[1], wide.rates[1]), (narrow.by_age[0].rates[1], wide.by_age[0].rates[1])):
        assert many.high - many.low > few.high - few.low > 0
    bare = evaluate(rows, LeaveOneOutProtocol(codes, (1,), ages=ages, replicates=0))
    assert bare.by_age[0].rates[1].low is None
