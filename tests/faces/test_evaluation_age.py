"""Evaluation by age gap and comparison of models against loops over pairs and resamples built image by image."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib_faces.evaluation import (
    AgeGapProtocol,
    AgeGapResult,
    auc,
    compare,
    evaluate,
    identity_bootstrap,
    roc_points,
    tar_at_far,
)

NAMES = ["0-4", "5-9", "10-19", "20-29", "30+"]


def make_set(seed: int, identities: int = 9, images: int = 5, tied: bool = False) -> tuple[Any, Any, Any]:
    """Embeddings, identities and ages; with `tied` the scores take few values."""
    generator = np.random.default_rng(seed)
    codes = generator.permutation(np.repeat(np.arange(identities), images))
    embeddings = generator.normal(size=(identities, 4))[codes] + 0.7 * generator.normal(size=(codes.size, 4))
    if tied:
        embeddings = np.where(np.abs(embeddings) > 0.8, np.sign(embeddings), 0.0)
        embeddings[~embeddings.any(axis=1), 0] = 1.0
    return embeddings, codes, generator.uniform(1, 60, codes.size)


def gap_name(gap: float) -> str:
    return next(name for low, name in zip((30, 20, 10, 5, 0), reversed(NAMES), strict=True) if gap >= low)


def by_hand(embeddings: Any, copies: list[tuple[int, list[int]]], ages: Any, fars: Any) -> dict[str, float]:
    """Every metric from lists of pairs. `copies` are (identity, rows); two copies of one identity are never compared."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    # The scores of a pair must not depend on how it is reached, or ties would be broken.
    table = np.round(unit @ unit.T, 12)
    genuine: dict[str, list[float]] = {name: [] for name in [*NAMES, "all"]}
    impostor: dict[str, list[float]] = {name: [] for name in [*NAMES, "all"]}
    for _, rows in copies:
        for i, j in combinations(rows, 2):
            genuine[gap_name(abs(ages[i] - ages[j]))].append(table[i, j])
            genuine["all"].append(table[i, j])
    for (a, first), (b, second) in combinations(copies, 2):
        if a != b:
            for i in first:
                for j in second:
                    impostor[gap_name(abs(ages[i] - ages[j]))].append(table[i, j])
                    impostor["all"].append(table[i, j])
    found = {}
    for name in [*NAMES, "all"]:
        for prefix, others in (("", impostor["all"]), ("own_", impostor[name])):
            usable = genuine[name] and others
            found[f"{name} {prefix}auc"] = auc(genuine[name], others) if usable else np.nan
            for far in fars:
                tar = tar_at_far(genuine[name], others, far).tar if usable else np.nan
                found[f"{name} {prefix}tar@{far:g}"] = tar
    return found


def metrics(result: AgeGapResult) -> dict[str, Any]:
    return {f"{e.name} {key}": value for e in (*result.bins, result.all) for key, value in e.metrics().items()}


@pytest.mark.parametrize("seed", range(3))
def test_values_by_hand(seed: int) -> None:
    embeddings, codes, ages = make_set(seed)
    fars = (0.2, 0.05, 0.001)
    result = evaluate(embeddings, AgeGapProtocol(codes, ages=ages, fars=fars, replicates=0))
    copies = [(k, np.flatnonzero(codes == k).tolist()) for k in range(9)]
    expected = by_hand(embeddings, copies, ages, fars)
    found = metrics(result)
    assert set(found) == set(expected)
    assert len(found) == 6 * 8
    for key, estimate in found.items():
        assert estimate.value == pytest.approx(expected[key], abs=1e-9), key
        assert estimate.low is None
    assert [entry.name for entry in result.bins] == NAMES
    assert sum(entry.genuine for entry in result.bins) == result.all.genuine == 9 * 10
    assert sum(entry.impostor for entry in result.bins) == result.all.impostor == 45 * 44 // 2 - 90


@pytest.mark.parametrize(("seed", "tied"), [(0, False), (1, False), (2, True), (3, True)])
def test_bootstrap_by_hand(seed: int, tied: bool) -> None:
    embeddings, codes, ages = make_set(seed, identities=6, images=4, tied=tied)
    fars = (0.3, 0.05)
    if tied:
        # Unit rows of small whole numbers give scores such as 1/sqrt(6) that two ways of summing could split.
        embeddings = np.eye(4)[np.abs(embeddings).argmax(axis=1)]
    result = AgeGapProtocol(codes, ages=ages, fars=fars, replicates=12, seed=5).evaluate(embeddings)
    draws = identity_bootstrap(codes, replicates=12, seed=5)
    found = metrics(result)
    for row, multiplicities in enumerate(draws):
        copies = [(k, np.flatnonzero(codes == k).tolist()) for k in range(6) for _ in range(multiplicities[k])]
        expected = by_hand(embeddings, copies, ages, fars)
        for key, estimate in found.items():
            assert estimate.replicates[row] == pytest.approx(expected[key], abs=1e-9, nan_ok=True), (row, key)
    assert draws.max() >= 2


def test_intervals_are_percentiles_of_the_replicates() -> None:
    embeddings, codes, ages = make_set(0)
    result = AgeGapProtocol(codes, ages=ages, fars=(0.1,), replicates=60, level=0.8).evaluate(embeddings)
    estimate = result.all.auc
    assert estimate.low == pytest.approx(np.quantile(estimate.replicates, 0.1))
    assert estimate.high == pytest.approx(np.quantile(estimate.replicates, 0.9))
    assert estimate.low < estimate.value < estimate.high
    fnmr = result.all.fnmr[0.1]
    assert (fnmr.value, fnmr.low) == (1 - result.all.tar[0.1].value, 1 - result.all.tar[0.1].high)


def test_thinned_resamples_agree_with_complete_ones() -> None:
    embeddings, codes, ages = make_set(0, identities=40, images=8)
    whole, thin = (
        AgeGapProtocol(codes, ages=ages, fars=(0.01,), replicates=40, max_impostors=most).evaluate(embeddings)
        for most in (10**9, 12_000)
    )
    for key, estimate in metrics(whole).items():
        other = metrics(thin)[key]
        assert other.value == estimate.value
        # The tail is whole. The sample of the rest, here 2000 pairs a bin, adds noise well below that of the resamples.
        error = np.sqrt(np.mean((other.replicates - estimate.replicates) ** 2))
        assert error < 0.4 * estimate.replicates.std(), key
        assert not np.array_equal(other.replicates, estimate.replicates) or "auc" not in key


@pytest.mark.parametrize(
    ("gap", "name"),
    [(0, "0-4"), (4.7, "0-4"), (4.999, "0-4"), (5, "5-9"), (9.99, "5-9"), (19.9, "10-19"), (30, "30+"), (80, "30+")],
)
def test_gaps_are_floored(gap: float, name: str) -> None:
    protocol = AgeGapProtocol([0, 0, 1], ages=np.array([20.3 + gap, 20.3, 1.0]))
    assert protocol.bins.names[int(protocol.bins.of(np.array([0]), np.array([1]))[0])] == name
    half = AgeGapProtocol([0, 0, 1], ages=np.array([20.3 + gap, 20.3, 1.0], dtype=np.float32))
    assert half.bins.names[int(half.bins.of(np.array([1]), np.array([0]))[0])] == name


def test_other_bins_and_gaps_below_the_first() -> None:
    protocol = AgeGapProtocol([0, 0, 1, 1], ages=[1, 2, 3, 6.5], bins=(2, 3, 3.5, 10), fars=(0.5,), replicates=0)
    assert protocol.bins.names == ["2", "3-<3.5", "3.5-<10", "10+"]
    result = protocol.evaluate(np.eye(4) + 0.1)
    assert [entry.genuine for entry in result.bins] == [0, 0, 1, 0]
    assert result.all.genuine == 2
    assert (result.large_gap, set(result.roc)) == ("3.5-<10", {"all", "3.5-<10"})
    with pytest.raises(ValueError, match=r"name must be one of 2, .*all, got '40'"):
        result.bin("40")


def test_groups_make_one_bin_for_each_pair() -> None:
    embeddings, codes, _ = make_set(0, identities=6, images=6)
    groups = np.array(["young", "adult"])[np.random.default_rng(0).integers(0, 2, codes.size)]
    protocol = AgeGapProtocol(codes, age_groups=groups, fars=(0.1,), replicates=0)
    result = protocol.evaluate(embeddings)
    assert result.to_dict()["kind"] == "group"
    assert [entry.name for entry in result.bins] == ["adult-adult", "adult-young", "young-young"]
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for entry in result.bins:
        pairs = [
            (unit[i] @ unit[j], codes[i] == codes[j])
            for i, j in combinations(range(codes.size), 2)
            if "-".join(sorted([groups[i], groups[j]])) == entry.name
        ]
        genuine, impostor = [s for s, same in pairs if same], [s for s, same in pairs if not same]
        assert (entry.genuine, entry.impostor) == (len(genuine), len(impostor))
        assert entry.own_auc.value == pytest.approx(auc(genuine, impostor), abs=1e-9)
    assert result.large_gap == "adult-young"
    assert AgeGapProtocol(codes, age_groups=codes % 2).bins.names == ["0-0", "0-1", "1-1"]
    assert AgeGapProtocol([0, 0, 1], age_groups=["0-9", "10+", "0-9"]).bins.names == [
        "0-9 / 0-9",
        "0-9 / 10+",
        "10+ / 10+",
    ]


def test_the_curve_of_the_largest_gap_is_against_its_own_impostors() -> None:
    embeddings, codes, ages = make_set(2)
    result = AgeGapProtocol(codes, ages=ages, replicates=0).evaluate(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    wide = [(i, j) for i, j in combinations(range(codes.size), 2) if abs(ages[i] - ages[j]) >= 30]
    genuine = [unit[i] @ unit[j] for i, j in wide if codes[i] == codes[j]]
    far, tar = roc_points(genuine, [unit[i] @ unit[j] for i, j in wide if codes[i] != codes[j]])
    np.testing.assert_allclose(result.roc["30+"][0], far, atol=1e-9)
    np.testing.assert_allclose(result.roc["30+"][1], tar, atol=1e-9)


def test_too_few_impostors_for_a_far_are_reported() -> None:
    embeddings, codes, ages = make_set(0)
    result = AgeGapProtocol(codes, ages=ages, fars=(0.1, 0.001), replicates=0).evaluate(embeddings)
    lines = result.unresolved()
    assert len(lines) == 6
    assert lines[0] == "all: tar@0.001 (900 impostor pairs)"
    assert lines[1] == f"0-4: own_tar@0.001 ({result.bins[0].impostor} impostor pairs)"


@settings(max_examples=20)
@given(seed=st.integers(0, 50), scale=st.floats(1e-20, 1e20))
def test_row_order_names_and_scale_do_not_matter(seed: int, scale: float) -> None:
    embeddings, codes, ages = make_set(seed, identities=4, images=4)
    order = np.random.default_rng(seed).permutation(codes.size)
    base = AgeGapProtocol(codes, ages=ages, fars=(0.1,), replicates=6).evaluate(embeddings)
    names = np.array(["a", "b", "c", "d"])[codes[order]]
    moved = AgeGapProtocol(names, ages=ages[order], fars=(0.1,), replicates=6).evaluate(embeddings[order] * scale)
    for key, estimate in metrics(base).items():
        other = metrics(moved)[key]
        assert other.value == (None if estimate.value is None else pytest.approx(estimate.value, abs=1e-9))
        np.testing.assert_allclose(other.replicates, estimate.replicates, atol=1e-9)


def test_empty_bins_are_null_and_a_bin_without_impostors_still_has_its_global_rate() -> None:
    null = {"value": None, "low": None, "high": None, "n": 0}
    protocol = AgeGapProtocol([0, 0, 1, 1], ages=[1, 2, 3, 4], fars=(0.5,), replicates=5)
    result = protocol.evaluate(np.eye(4) + 1)
    assert result.bin("30+").to_dict() == {
        "name": "30+",
        "genuine": 0,
        "impostor": 0,
        "auc": null,
        "own_auc": null,
        "tar": {"0.5": null},
        "own_tar": {"0.5": null},
    }
    assert result.bin("30+").fnmr[0.5].to_dict() == null
    entries = [entry for entry in compare({"x": result, "y": result}, "x", "y") if entry["bin"] == "30+"]
    assert [(entry["difference"]["value"], entry["separate"]) for entry in entries] == [(None, False)] * 4
    protocol = AgeGapProtocol([0, 0, 1, 1], ages=[1, 41, 20, 21], fars=(0.5,), replicates=5)
    entry = protocol.evaluate(np.eye(2)[[0, 0, 1, 1]]).bin("30+")
    assert (entry.genuine, entry.impostor, entry.tar[0.5].value, entry.auc.value) == (1, 0, 1.0, 1.0)
    assert entry.own_auc.to_dict() == null


def test_the_dictionary_holds_histograms_and_curves_of_the_bins() -> None:
    embeddings, codes, ages = make_set(2)
    result = AgeGapProtocol(codes, ages=ages, replicates=10).evaluate(torch.tensor(embeddings, dtype=torch.float32))
    entry = result.to_dict()
    assert list(entry) == ["kind", "bins", "all", "roc", "histogram", "thresholds"]
    assert (list(entry["all"]["tar"]), set(entry["roc"])) == (["0.01", "0.001"], {"all", "30+"})
    histogram = entry["histogram"]
    assert len(histogram["edges"]) == len(histogram["impostor"]) + 1
    assert sum(histogram["impostor"]) == result.all.impostor
    counted = {name: sum(counts) for name, counts in histogram["genuine"].items()}
    assert counted == {each.name: each.genuine for each in result.bins}


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


def test_compare_refuses_unlike_results() -> None:
    embeddings, codes, ages = make_set(0)
    first, second = (AgeGapProtocol(codes, ages=ages, replicates=3, seed=s).evaluate(embeddings) for s in (0, 1))
    with pytest.raises(ValueError, match="results of one protocol"):
        compare({"x": first, "y": second}, "x", "y")
    with pytest.raises(ValueError, match="must be among x, got 'z'"):
        compare({"x": first}, "x", "z")


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
