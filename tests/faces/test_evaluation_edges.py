"""Embeddings, ages, folds and image sets at their edges: layouts, absurd values, images used twice, bounds of memory."""

from pathlib import Path

import numpy as np
import pytest

from kdlib_faces import evaluation
from kdlib_faces._checks import InputError
from kdlib_faces.evaluation import PairProtocol, clustered_rate, identity_bootstrap, paired_test, pool_templates
from kdlib_faces.harness.embeddings import read_embeddings
from tests.faces.evaluation_calls import CODES, LEFT, PROTOCOLS, RIGHT, ROWS, YEARS


def test_embeddings_must_have_the_rows_of_identities_and_ages() -> None:
    for given in ({"identities": CODES}, {"ages": np.where(YEARS > 60, np.nan, YEARS)}):
        protocol = PairProtocol(LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, fars=(0.1,), **given)
        assert protocol.evaluate(ROWS).pairs == 32
        with pytest.raises(ValueError, match="embeddings must have one row for each of 32 images of 32 pairs, got 33"):
            protocol.evaluate(np.vstack([ROWS, ROWS[:1]]))


@pytest.mark.parametrize("sizes", [(4, 4, 24), (10, 11, 11)])
def test_folds_of_unequal_size_count_alike(sizes: tuple[int, ...]) -> None:
    folds = np.repeat([0, 1, 2], sizes)
    protocol = PairProtocol(LEFT, RIGHT, LEFT % 2 == 0, folds, identities=CODES, replicates=20)
    result = protocol.evaluate(np.random.default_rng(5).normal(size=ROWS.shape))
    weights = 1 / np.bincount(folds)[folds]
    estimate = result.accuracy_estimate()
    assert result.accuracy == pytest.approx(np.average(result.correct, weights=weights)) != result.correct.mean()
    assert (estimate.value, result.summary().measures["accuracy"].value) == (result.accuracy, result.accuracy)
    drawn = identity_bootstrap(CODES, replicates=20, seed=0)
    for m, replicate in zip(drawn, estimate.replicates, strict=True):
        a, b = CODES[LEFT], CODES[RIGHT]
        weight = np.where(a == b, m[a], m[a] * m[b]) * weights
        assert replicate == pytest.approx(np.average(result.correct, weights=weight))
    bare = PairProtocol(LEFT, RIGHT, LEFT % 2 == 0, folds).evaluate(ROWS)
    assert bare.accuracy_estimate().value == bare.accuracy


def test_images_that_are_compared_with_themselves_are_noted_or_refused() -> None:
    result = PairProtocol([0, 1, 2, 3], [0, 2, 2, 1], [1, 0, 1, 0], [0, 0, 1, 1]).evaluate(np.eye(4))
    assert result.to_dict()["notes"] == ["2 of 4 pairs compare an image with itself"]
    found = evaluation.identify_with_distractors(ROWS, CODES, np.vstack([3 * ROWS[:2], -ROWS[:5]]))
    assert found.describe().notes == ("2 probes have a distractor of the same embedding",)
    pooled = pool_templates(ROWS[:6], np.arange(6), np.arange(6))
    with pytest.raises(ValueError, match=r"probes must not be templates of galleries\[1\], got \[3\] in both"):
        evaluation.identify_templates(pooled, [([0], ["a"]), ([3], ["b"])], ([2, 3, 4], ["a", "b", "c"]))


def test_lists_of_all_pairs_and_resamples_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (
        ("age_gap", "images must make at most 400 pairs, got 496; AgeErrorProtocol holds no list"),
        ("cross_group", "probes x gallery must be at most 200 pairs, got 256"),
    ):
        monkeypatch.setattr(f"kdlib_faces.evaluation.protocols.{name}.MAX_PAIRS", 400 if name == "age_gap" else 200)
        with pytest.raises(ValueError, match=message):
            PROTOCOLS[{"age_gap": "AgeGapProtocol", "cross_group": "CrossGroupProtocol"}[name]]()
    with pytest.raises(ValueError, match=r"replicates must be at most 200 for 1000000 identities \(1.6 GB\), got 500"):
        clustered_rate(np.ones(10**6), np.arange(10**6))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_blocks_of_scores_do_not_change_a_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = PROTOCOLS[name]()
    whole = protocol.evaluate(ROWS)
    monkeypatch.setattr("kdlib_faces.evaluation._checks.SCORES", 100)
    parts = protocol.evaluate(ROWS)
    assert parts.to_dict() == whole.to_dict()
    assert parts.hardest(3) == whole.hardest(3)


def test_many_independent_observations_need_no_counts_of_each() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.random(60_000) < 0.81, generator.random(60_000) < 0.8
    test, few = paired_test(a, b), paired_test(a[:40_000], b[:40_000], replicates=200)
    assert test.difference.value == pytest.approx(a.mean() - b.mean())
    assert (test.only_a, test.only_b) == (int((a & ~b).sum()), int((b & ~a).sum()))
    spread = [each.difference.high - each.difference.low for each in (test, few)]
    assert spread[0] == pytest.approx(spread[1] * np.sqrt(40 / 60), rel=0.2)


def test_many_observations_of_few_identities_are_resampled_by_identity() -> None:
    identities = np.arange(60_000) % 10
    difference = paired_test(identities < 5, np.zeros(60_000), identities=identities, replicates=200).difference
    assert difference.high - difference.low > 0.3


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (7, 5",
        b"{'descr': '<f4', 'fo7tran_order': False, 'shape': (7, 5), \x9e",
        b"{'descr': '<,4', 'fortran_order': False, 'shape': (7, 5)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000000000000, 5)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 5)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (True, 5)}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (7, 5)}",
        b"-" * 9000 + b"1",
        b"(" * 900,
    ],
    ids=lambda header: header[:60].decode("latin-1"),
)
def test_a_broken_header_of_an_embeddings_file_gives_one_line(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    for version in (1, 2, 3):
        size = (len(header) + 1).to_bytes(2 if version == 1 else 4, "little")
        path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + header + b"\n" + bytes(140))
        with pytest.raises(InputError, match=r"rows\.npy: not a \.npy file of numbers \([^\n]{3,170}\)$"):
            read_embeddings(path, 7)


def test_an_archive_of_arrays_is_no_embeddings_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", rows=ROWS)
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 and more")
    for name in ("rows.npz", "damaged.npz"):
        with pytest.raises(InputError, match=rf"{name}: not a \.npy file of numbers"):
            read_embeddings(tmp_path / name, 32)


def test_a_pca_beyond_the_rank_of_the_embeddings_is_refused() -> None:
    flat = np.hstack([ROWS[:, :3], np.zeros((32, 3))])
    for rows, rank in ((flat, 3), (np.repeat(ROWS[:1], 32, axis=0), 0)):
        protocol = PairProtocol(LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, pca=rank + 1)
        with pytest.raises(ValueError, match=rf"pca must be at most {rank}, the rank of the other folds'"):
            protocol.evaluate(rows)
    assert PairProtocol(LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, pca=3).evaluate(flat).pca == 3


def test_rejections_by_gap_leave_out_unknown_ages() -> None:
    ages = np.where(np.arange(32) % 5 == 0, np.nan, YEARS)
    protocol = PairProtocol(LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, fars=(0.2,), ages=ages, gap_bins=(0, 10, 25))
    result = protocol.evaluate(ROWS)
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    expected: dict[int, list[bool]] = {0: [], 1: [], 2: []}
    for a, b in zip(LEFT[::2], RIGHT[::2], strict=True):
        gap = abs(ages[a] - ages[b])
        if not np.isnan(gap):
            expected[int(gap >= 10) + int(gap >= 25)].append(unit[a] @ unit[b] <= result.tar[0.2].threshold)
    found = result.summary().bins["fnmr"]
    assert [(each.value, each.n) for each in found] == [
        (float(np.mean(each)) if each else None, len(each)) for each in expected.values()
    ]
    unknown = PairProtocol(LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, fars=(0.2,), ages=np.full(32, np.nan))
    assert unknown.evaluate(ROWS).summary().bins == {}


def test_lengths_beyond_the_squares_of_float64_do_not_matter() -> None:
    same, folds = LEFT % 2 == 0, LEFT // 8
    expected = evaluation.verify_pairs(ROWS[LEFT], ROWS[RIGHT], same, fold_ids=folds, threshold="exact")
    for scale in (1e180, 1e-180):
        found = evaluation.verify_pairs(ROWS[LEFT] * scale, ROWS[RIGHT], same, fold_ids=folds, threshold="exact")
        np.testing.assert_array_equal(found.fold_accuracies, expected.fold_accuracies)
        np.testing.assert_allclose(found.thresholds, expected.thresholds, atol=1e-11)


def test_an_iterator_of_distractors_serves_one_evaluation() -> None:
    protocol = evaluation.DistractorProtocol(CODES, iter([ROWS[:5] + 1, ROWS[5:] - 1]), fars=(0.1,))
    assert protocol.evaluate(ROWS).distractors == 32
    with pytest.raises(ValueError, match="distractors was an iterator, which an evaluation used up; pass a list"):
        protocol.evaluate(ROWS)


def test_images_of_other_groups_change_nothing() -> None:
    groups = np.tile(["young", "young", "adult", "adult"], 8)
    alone = evaluation.CrossGroupProtocol(CODES, groups, replicates=9).evaluate(ROWS).to_dict()
    rows, codes = np.vstack([ROWS[:5] + 1, ROWS]), np.concatenate([[-3, -2, 4, 99, 99], CODES])
    more = evaluation.CrossGroupProtocol(codes, np.concatenate([["old"] * 5, groups]), replicates=9)
    assert more.evaluate(rows).to_dict() == alone
    for codes, message in (
        ([0, 0, 1], "an impostor pair across the groups"),
        ([0, 1, 0], "one with images of both groups"),
    ):
        with pytest.raises(ValueError, match=f"CrossGroupProtocol: identities must hold {message}"):
            evaluation.CrossGroupProtocol(codes, ["young", "adult", "old"])


def test_images_in_no_pair_change_nothing() -> None:
    pairs = (LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8)
    alone = PairProtocol(*pairs, fars=(0.2,), identities=CODES, replicates=9).evaluate(ROWS)
    more = PairProtocol(*pairs, fars=(0.2,), identities=np.append(CODES, [-1, 55, 3]), replicates=9)
    found = more.evaluate(np.vstack([ROWS, ROWS[:3]]))
    assert found.to_dict() == alone.to_dict()
    assert found.summary() == alone.summary()
