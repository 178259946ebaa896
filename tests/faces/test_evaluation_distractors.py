"""Identification among distractors against plain loops over the whole matrix of scores."""

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from kdlib_faces.evaluation import DistractorProtocol, identify_with_distractors, tar_at_far
from kdlib_faces.evaluation.matching import search as search_module
from tests.faces.evaluation_calls import unit


def make(identities: int = 12, each: int = 4, distractors: int = 700, width: int = 24) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(identities), each)
    probes = generator.normal(size=(identities, width))[codes] + generator.normal(size=(codes.size, width))
    return probes, codes, generator.normal(size=(distractors, width)).astype(np.float32)


def test_operating_points_equal_those_of_all_products() -> None:
    probes, codes, distractors = make()
    result = identify_with_distractors(probes, codes, distractors, fars=(1e-4, 1e-2, 0.3))
    assert (result.distractors, result.protocol.mateless) == (700, 0)
    p, d = unit(probes), unit(distractors)
    genuine = [p[i] @ p[j] for i in range(48) for j in range(i + 1, 48) if codes[i] == codes[j]]
    for far, point in result.tar.items():
        expected = tar_at_far(genuine, (p @ d.T).ravel(), far)
        assert point.tar == expected.tar == float(point)
        assert point.threshold == pytest.approx(expected.threshold, abs=1e-12)
        assert (point.false_accepts, point.impostors) == (expected.false_accepts, 48 * 700)
    assert 0.05 < result.tar[1e-2].tar < 0.95


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_blocks_shards_and_types_do_not_change_the_result(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probes, codes, distractors = make(distractors=150)
    whole = identify_with_distractors(probes, codes, distractors, fars=(1e-3, 0.2), ranks=(1, 3)).to_dict()
    monkeypatch.setattr(search_module, "BLOCK", block)
    monkeypatch.setattr("kdlib_faces.evaluation.protocols.distractors.BLOCK", 3 * block)
    shards = [distractors[:50], distractors[50:50], distractors[50:]]
    for given in (distractors, shards, iter(shards), torch.from_numpy(distractors)):
        found = identify_with_distractors(probes, codes, given, fars=(1e-3, 0.2), ranks=(1, 3))
        assert found.to_dict() == whole


def test_a_tie_is_correct_as_published_or_wrong() -> None:
    # The two images of identity 0 have the same cosine with each other as with the one distractor.
    probes, codes = np.array([[3.0, 1.0], [1.0, 3.0], [-1.0, 0.0], [-1.0, 0.0]]), [0, 0, 1, 1]
    # Of another length: equal directions still tie.
    distractors = np.array([[1.0, 3.0], [3.0, 1.0]]) * 7
    assert identify_with_distractors(probes, codes, distractors[:1]).rank1 == 0.75
    found = {
        ties: identify_with_distractors(probes[[0, 1]], [0, 0], distractors[:1], ties=ties).rates[1].value
        for ties in ("correct", "wrong")
    }
    assert found == {"correct": 0.5, "wrong": 0.0}


@pytest.mark.parametrize("width", [2, 3, 17, 128, 512])
def test_a_copy_of_the_mate_ties_to_the_last_bit(width: int) -> None:
    generator = np.random.default_rng(width)
    probes = generator.normal(size=(2, width)).astype(np.float32)
    far = generator.normal(size=(40, width)) * 1e-3 - 5 * probes[0]
    result = identify_with_distractors(probes, [0, 0], np.vstack([far, 4 * probes[1]]))
    assert result.trials.distractor_score[0] == result.trials.score[0]
    both = identify_with_distractors(np.vstack([probes, -probes[:1]]), [0, 0, 1], probes[1:], ties="wrong")
    assert both.rank1 == 0.0


def test_sizes_are_prefixes_and_the_number_used_is_reported() -> None:
    probes, codes, distractors = make(distractors=300)
    result = identify_with_distractors(probes, codes, distractors, sizes=(1, 10, 250, 300))
    for size, rate in result.by_size.items():
        assert rate.value == identify_with_distractors(probes, codes, distractors[:size]).rank1
    assert list(result.by_size) == [1, 10, 250, 300]
    assert result.to_dict()["distractors"] == 300


def test_rank_1_by_gap() -> None:
    probes, codes, distractors = make()
    ages = np.tile([5.0, 8.0, 20.0, 30.0], 12)
    result = identify_with_distractors(probes, codes, distractors, ages=ages, gap_bins=(0, 5, 10, 20, 40), fars=(0.01,))
    assert [row.name for row in result.by_gap] == ["0-4", "5-9", "10-19", "20-39", "40+"]
    assert sum(row.trials for row in result.by_gap) == result.trials.rank.size
    total = sum(row.trials * row.rank1.value for row in result.by_gap if row.rank1.value is not None)
    assert total / result.trials.rank.size == pytest.approx(result.rank1)
    assert result.by_gap[1].rank1.value is None
    assert result.by_gap[4].tar[0.01].value is None
    subset = np.flatnonzero(np.isin(ages, (5, 8)))
    expected = identify_with_distractors(probes[subset], codes[subset], distractors).rank1
    assert result.by_gap[0].rank1.value == pytest.approx(expected)


def test_cleaning_conventions() -> None:
    # Every cosine is negative: a zero row that scores 0 beats the mates, one that never matches does not.
    probes, codes = np.array([[1.0, 0.1], [-0.3, 1.0]]), [0, 0]
    noisy = np.array([[-1.0, -1.0], [0.0, 0.0], [-1.0, -0.9]])
    zero = identify_with_distractors(probes, codes, noisy, cleaning="zeros_score_0")
    left_out = identify_with_distractors(probes, codes, noisy, cleaning="exclude_zeros")
    assert (zero.rank1, zero.distractors, zero.cleaned) == (0.0, 3, 0)
    assert (left_out.rank1, left_out.distractors, left_out.cleaned) == (1.0, 2, 1)
    extra = np.hstack([noisy + np.array([[0, 0], [9, 9], [0, 0]]), [[0], [100], [0]]])
    for given in (probes, np.hstack([probes, np.zeros((2, 1))])):
        dropped = identify_with_distractors(given, codes, extra, cleaning="extra_dimension")
        assert (dropped.rank1, dropped.distractors, dropped.cleaned) == (1.0, 2, 1)
    assert "1 cleaned away (extra_dimension)" in dropped.convention
    extra[2, 0] = np.nan
    with pytest.raises(ValueError, match=r"distractors must be finite .*, got row 2"):
        identify_with_distractors(probes, codes, [extra[:2], extra[2:]], cleaning="extra_dimension")


def test_a_collapsed_model_has_finite_rates() -> None:
    probes = np.ones((40, 16)) + 1e-9 * np.random.default_rng(0).normal(size=(40, 16))
    result = identify_with_distractors(probes, np.arange(40) // 2, np.ones((500, 16)), fars=(1e-3,), ties="wrong")
    assert 0 <= result.rank1 <= 1
    assert result.tar[1e-3].far <= 1e-3


def test_values_beyond_float32() -> None:
    probes, codes, distractors = make(distractors=60)
    plain = identify_with_distractors(probes, codes, distractors.astype(np.float64), fars=(0.05,))
    for factor in (1e200, 1e-200):
        scaled = identify_with_distractors(probes, codes, distractors.astype(np.float64) * factor, fars=(0.05,))
        assert scaled.rank1 == plain.rank1
        assert scaled.tar[0.05].tar == plain.tar[0.05].tar


@pytest.mark.parametrize("row", [0, 3, 13, 39])
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_bad_distractor_is_reported_with_its_number(row: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    probes, codes, distractors = make(distractors=40)
    distractors[row] = value
    monkeypatch.setattr(search_module, "BLOCK", 4)
    for given in (distractors, [distractors[:11], distractors[11:]]):
        with pytest.raises(ValueError, match=rf"distractors must be .*got row {row} that is not"):
            identify_with_distractors(probes, codes, given)


def test_operating_points_are_numbers_too() -> None:
    probes, codes, distractors = make(distractors=60)
    point = identify_with_distractors(probes, codes, distractors, fars=(0.1,)).tar[0.1]
    assert (point, hash(point), f"{point:.3f}") == (point.tar, hash(point.tar), f"{point.tar:.3f}")
    for again in (copy.deepcopy(point), pickle.loads(pickle.dumps(point)), dataclasses.replace(point)):
        assert (again, again.to_dict(), type(again)) == (point, point.to_dict(), type(point))
    assert dataclasses.replace(point, tar=0.5) == 0.5
    assert point != dataclasses.replace(point, far=0.9)


@pytest.mark.parametrize("ties", ["correct", "wrong"])
@pytest.mark.parametrize("block", [5, 64, 4096])
def test_rank_and_nearest_distractor_of_every_trial(ties: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    probes, codes, distractors = make(distractors=150)
    distractors[[40, 77, 149]] = 3 * distractors[[12, 12, 5]]  # equal directions: the first one is reported
    monkeypatch.setattr(search_module, "BLOCK", block)
    result = identify_with_distractors(probes, codes, [distractors[:30], distractors[30:]], ranks=(1, 4), ties=ties)
    trials = result.trials
    p, d = unit(probes), unit(distractors)
    cosine = np.round(p @ d.T, 12)
    expected = [(i, j) for i in range(48) for j in range(48) if i != j and codes[i] == codes[j]]
    assert sorted(zip(trials.probe.tolist(), trials.mate.tolist(), strict=True)) == expected
    for probe, mate, score, place in zip(trials.probe, trials.mate, trials.score, trials.rank, strict=True):
        assert score == pytest.approx(p[probe] @ p[mate], abs=1e-11)
        ahead = cosine[probe] > score if ties == "correct" else cosine[probe] >= score
        assert place == min(1 + ahead.sum(), 5)
    np.testing.assert_array_equal(trials.distractor, cosine.argmax(axis=1))
    np.testing.assert_allclose(trials.distractor_score, cosine.max(axis=1), atol=1e-11)
    for rank in (1, 4):
        assert result.rates[rank].value == (trials.rank <= rank).mean()
    assert result.rank1 == result.rates[1].value
    assert result.to_dict()["trials"] == len(expected)
    shown = [row[3] for row in result.score_table(str, str).rows]
    assert shown == [rank if rank <= 4 else ">4" for rank in trials.rank.tolist()]
    assert {1, ">4"} <= set(shown)


def test_the_function_passes_its_settings_to_the_protocol() -> None:
    probes, codes, distractors = make(distractors=60)
    settings = {
        "fars": (0.1,), "ranks": (1, 3), "ties": "wrong", "cleaning": "exclude_zeros", "sizes": (10, 40),
        "ages": np.arange(48.0), "gap_bins": (0, 20), "max_distractors": 80, "replicates": 20, "seed": 3, "level": 0.5,
    }  # fmt: skip
    whole = DistractorProtocol(codes, distractors, **settings).evaluate(probes).to_dict()
    assert identify_with_distractors(probes, codes, distractors, **settings).to_dict() == whole
    for name in settings:
        changed = {"seed": 4, "level": 0.6, "replicates": 10, "ties": "correct", "max_distractors": 100}.get(name)
        rest = {key: value for key, value in settings.items() if key != name} | ({name: changed} if changed else {})
        result = identify_with_distractors(probes, codes, distractors, **rest)
        assert (result.to_dict() == whole) == (name == "max_distractors")


def test_the_first_distractor_is_among_the_failures() -> None:
    probes, codes = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.1, 1.0]], [0, 0, 1, 1]
    failures = identify_with_distractors(probes, codes, [[1.0, 0.05], [-1.0, -1.0]]).hardest(2)
    assert (0, 0) in [(pair.left, pair.right) for pair in failures if not pair.same]


def test_distractor_numbers_count_cleaned_ones() -> None:
    probes = [[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]
    noisy = [[0.0, 0.0], [0.0, 0.0], [1.0, 0.2], [-1.0, -1.0]]
    codes = [0, 0, 1, 1]
    excluded = identify_with_distractors(probes, codes, noisy, cleaning="exclude_zeros")
    assert excluded.trials.distractor.tolist() == [2, 2, 2, 2]
    backwards = [[0.0, 0.0], [-1.0, -1.0]]
    zeroed = identify_with_distractors(probes, codes, backwards, cleaning="zeros_score_0").trials
    assert zeroed.distractor.tolist() == [-1] * 4
    assert zeroed.distractor_score.tolist() == [0.0] * 4
