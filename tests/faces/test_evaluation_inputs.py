"""Labels and numbers as users hold them: NumPy and torch types, lists, object arrays, extreme and mixed values."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from kdlib_faces import evaluation
from kdlib_faces.evaluation import (
    LeaveOneOutProtocol,
    PairProtocol,
    TemplateVerificationProtocol,
    check_identity_disjoint,
    clustered_rate,
    identities_in_several_folds,
    identity_bootstrap,
    identity_overlap,
    paired_test,
    pool_templates,
    tar_at_far,
    verify_pairs,
)
from tests.faces.evaluation_calls import CALLS, CODES, PROTOCOLS, ROWS

BIG = 2**53


@pytest.mark.parametrize(
    ("identities", "message"),
    [
        (np.array([2**24, 2**24 + 1, 5, 5], dtype=np.float32), "below 16777216 in float32, which rounds larger ones"),
        (np.array([2**24 - 1, 5, 2**25, 5], dtype=np.float32), r"in float32, .*got entry 2 that is not \(1 in all\)"),
        (np.array([2048, 2049, 5, 5], dtype=np.float16), "below 2048 in float16"),
        (np.array([BIG, BIG + 1, 5, 5], dtype=np.float64), "below 9007199254740992 in float64"),
        (np.array([-float(BIG), 1, 5, 5]), "below 9007199254740992 in float64"),
        (np.array([1e300, 1, 5, 5]), "below 9007199254740992 in float64"),
        (torch.tensor([2.0**24, 2.0**24 + 1, 5, 5]), "below 16777216 in float32"),
        (torch.tensor([256.0, 257, 5, 5], dtype=torch.bfloat16), "below 256 in bfloat16"),
        ([1.0, float(BIG), 5, 5], "whole numbers or strings, got entry 1"),
        ([1, "1", 2, 2], "all whole numbers or all strings, got entry 1 that is not"),
        (["1", 1, "2", "2"], "all whole numbers or all strings, got entry 1 that is not"),
        ([1, True, 2, 2], "all whole numbers or all strings, got entry 1 that is not"),
        (np.array([1, "1", 2, 2], dtype=object), "all whole numbers or all strings, got entry 1"),
        (np.array(["a", np.nan, "b", "b"], dtype=object), "all whole numbers or all strings, got entry 1"),
        (["a", "a\0", "b", "b"], "free of null characters, got entry 1"),
        ([2**64, 1, 2, 2], "must have 64 bits"),
        ([-1, 2**63, 2, 2], "must have 64 bits"),
        ([[1, 2], [3], 4, 4], "must be an array, got rows of different lengths"),
        (np.ma.masked_array([1, 1, 2, 2], mask=[0, 1, 0, 0]), "must have no masked entries, got 1"),
        (np.array([b"a", b"a", b"b", b"b"]), "must be an array of whole numbers or strings, got dtype"),
        (np.array(["2020", "2021", "2021", "2022"], dtype="datetime64[Y]"), "whole numbers or strings, got dtype"),
    ],
)  # fmt: skip
def test_labels_that_would_merge_are_refused(identities: Any, message: str) -> None:
    for call in (
        lambda: LeaveOneOutProtocol(identities, (1,)),
        lambda: clustered_rate([1, 1, 0, 0], identities),
        lambda: pool_templates(np.eye(4), identities, [1, 2, 3, 4]),
        lambda: TemplateVerificationProtocol([1, 2, 3, 4], identities, [1, 2], [3, 4], [1, 0]),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^\w+: \w+ must .*{message}|^\w+: \w+ {message}"):
            call()


@pytest.mark.parametrize(
    "identities",
    [
        [BIG, BIG + 1, BIG, BIG + 1],
        np.array([BIG, BIG + 1, BIG, BIG + 1]),
        np.array([BIG, BIG + 1, BIG, BIG + 1], dtype=object),
        np.array([2**64 - 2, 2**64 - 1] * 2, dtype=np.uint64),
        [2**64 - 2, 2**64 - 1, 2**64 - 2, 2**64 - 1],
        [np.int64(BIG), BIG + 1, torch.tensor(BIG), np.int64(BIG + 1)],
        [1.0, 2, 1, np.float32(2)],
        np.array(["a", "b", "a", "b"], dtype=object),
        np.array(["a", "b", "a", "b"], dtype=np.dtypes.StringDType()),
        [np.str_("a"), "b", "a", "b"],
        ["é", "e\u0301", "é", "e\u0301"],
        np.array([2**24, 2**24 + 1] * 2, dtype=np.float64),
        np.array([1, 2, 1, 2], dtype=">i4"),
        np.array([1, 2, 1, 2] * 2, dtype=np.float32)[::2].repeat(2)[[0, 2, 0, 2]] + np.array([0, 1, 0, 1], np.float32),
    ],
)  # fmt: skip
def test_labels_that_differ_stay_apart(identities: Any) -> None:
    protocol = LeaveOneOutProtocol(identities, (1,))
    assert protocol.codes.tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])
    assert identity_bootstrap(identities, replicates=2, seed=0).shape == (2, 2)
    assert protocol.evaluate(np.eye(2)[[0, 1, 0, 1]]).rates[1].value == 1.0


def test_two_sets_of_labels_are_compared_exactly() -> None:
    signed, unsigned = np.array([-1, BIG + 1]), np.array([BIG, 2**64 - 1], dtype=np.uint64)
    assert identity_overlap(signed, unsigned) == []
    assert identity_overlap(np.array([BIG, 3]), unsigned) == [BIG]
    check_identity_disjoint(signed, unsigned)
    assert identities_in_several_folds(signed, unsigned, [0, 1]) == []
    assert identities_in_several_folds([-1, BIG], unsigned[[1, 0]], [0, 1]) == []
    test = paired_test([1, 0], [0, 1], identities=signed, other_identities=unsigned, replicates=5)
    assert test.difference.value == 0.0
    for call in (
        lambda: paired_test([1, 0], [0, 1], identities=[1, 2], other_identities=["1", "2"]),
        lambda: identities_in_several_folds([1, 2], ["1", "2"], [0, 1]),
        lambda: identity_overlap([1, 2], ["1", "2"]),
        lambda: PairProtocol([0, 1], [1, 2], [1, 0], identities=[7, 7, 8], train_identities=["7"]),
    ):
        with pytest.raises(ValueError, match=r"must be named alike|same must be in"):
            call()
    ids = np.array([2**64 - 1, 2**63 + 1, BIG + 1], dtype=np.uint64)
    protocol = TemplateVerificationProtocol(ids, [1, 2, 3], ids[:2], ids[1:], [1, 0], fars=(1.0,))
    assert protocol.evaluate(np.eye(3)).left.tolist() == [2, 1]
    without = TemplateVerificationProtocol(ids, [1, 2, 3], ids[:2], ids[1:], [1, 0], fars=())
    assert without.evaluate(np.eye(3)).tar == {}
    with pytest.raises(ValueError, match=rf"left must be in template_ids, got {BIG} in entry 0"):
        TemplateVerificationProtocol(ids, [1, 2, 3], [BIG, BIG + 1], ids[:2], [1, 0]).evaluate(np.eye(3))


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [(5, 1, 0.21875), (3, 3, 1.0), (0, 0, 1.0), (1, 0, 1.0), (0, 60, 2.0**-59), (400, 601, None), (700, 900, None)],
)
def test_mcnemar_is_exact(a: int, b: int, p: float | None) -> None:
    from fractions import Fraction
    from math import comb

    n = a + b
    exact = min(Fraction(1), Fraction(2 * sum(comb(n, k) for k in range(min(a, b) + 1)), 2**n))
    hits = np.repeat([1, 0], [a, b])
    found = paired_test(np.append(hits, 1), np.append(1 - hits, 1), replicates=2)
    assert (found.only_a, found.only_b) == (a, b)
    assert found.p_value == pytest.approx(float(exact), rel=1e-10)
    assert p is None or found.p_value == p


def test_mcnemar_is_never_zero() -> None:
    assert paired_test(np.ones(3000), np.zeros(3000), replicates=2).p_value == 5e-324
    sure = paired_test(np.ones(60), np.zeros(60), replicates=2)
    assert (sure.p_value, sure.p_text) == (2.0**-59, "p < 1e-16")
    assert paired_test([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]).p_text == "p = 0.22"
    million = paired_test(
        np.arange(400_000) < 199_000, np.arange(400_000) >= 199_000, replicates=0, identities=np.arange(400_000) % 9
    )
    assert million.p_value == pytest.approx(0.001569, rel=0.01)


def numpy_scalar(x: float) -> Any:
    return np.int64(x) if isinstance(x, int) else np.float32(x)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("one", "many"),
    [
        (numpy_scalar, lambda each: tuple(map(numpy_scalar, each))),
        (np.array, np.array),
        (torch.tensor, torch.tensor),
        (lambda x: np.uint8(x) if isinstance(x, int) else np.float64(x), list),
    ],
)
def test_numbers_of_numpy_and_torch_are_accepted(name: str, one: Any, many: Any) -> None:
    plain = PROTOCOLS[name]().evaluate(ROWS)
    found = CALLS[name](one, many).evaluate(ROWS)
    assert json.dumps(found.to_dict()).replace("0000000149011612", "") == json.dumps(plain.to_dict())
    assert repr(CALLS[name](one, many)).replace("0000000149011612", "") == repr(PROTOCOLS[name]())
    json.dumps([found.describe().counts, [dataclasses.asdict(each) for each in found.describe().bins.values()]])


@pytest.mark.parametrize(
    "kind", [np.float32, np.float16, lambda far: float(np.float32(far)), lambda far: torch.tensor(far)]
)
@pytest.mark.parametrize("far", [1e-4, 1e-3, 0.01, 0.1, 0.3])
def test_a_rate_of_less_precision_counts_as_its_decimal(kind: Any, far: float) -> None:
    generator = np.random.default_rng(0)
    genuine, impostor = generator.normal(1, 1, 500), generator.normal(0, 1, 10_000)
    for mode in ("exact", "nearest"):
        exact, found = (tar_at_far(genuine, impostor, each, mode=mode) for each in (far, kind(far)))
        assert (found.tar, found.threshold, found.false_accepts, found.resolvable) == (
            exact.tar, exact.threshold, exact.false_accepts, exact.resolvable,
        )  # fmt: skip
    same = np.tile(np.repeat([True, False], 100), 10)
    left = generator.normal(size=(2000, 3))
    right = np.where(same[:, None], left, generator.normal(size=left.shape)) + generator.normal(size=left.shape)
    for threshold in ("grid", "exact"):
        exact, found = (
            next(iter(verify_pairs(left, right, same, threshold=threshold, val_fars=[each]).val.values()))
            for each in (far, kind(far))
        )
        np.testing.assert_array_equal(found.thresholds, exact.thresholds)
    rates = np.array([far, 0.2], dtype=np.float32)
    result = PairProtocol(np.arange(2000), np.arange(2000, 4000), same, fars=rates).evaluate(np.vstack([left, right]))
    assert result.tar[rates[0]].false_accepts == round(far * 1000 - 0.49)


def test_other_functions_accept_numpy_numbers() -> None:
    assert evaluation.wilson(np.int64(3), np.int32(4), level=np.float64(0.9)) == evaluation.wilson(3, 4, level=0.9)
    far, tar = evaluation.roc_points([0.9, 0.3], [0.5, 0.2], np.int16(5))
    assert (far.tolist(), tar.tolist()) == ([0.5, 1.0], [1.0, 1.0])
    parts = evaluation.identity_disjoint_split(np.arange(10), np.array([0.8, 0.2], np.float32), seed=np.uint8(1))
    assert [part.size for part in parts] == [8, 2]
    assert evaluation.positives_first_folds(torch.tensor([1, 1, 0, 0]), np.int64(2)).tolist() == [0, 1, 0, 1]
    assert clustered_rate(torch.tensor([True, False]), [1, 2], replicates=np.int64(3)).value == 0.5
    images = np.arange(4 * 12, dtype=np.uint8).reshape(4, 3, 2, 2)
    assert evaluation.embed_images(lambda x: x.flatten(1), images, batch_size=np.int64(3)).shape == (4, 12)
    assert evaluation.leave_one_out(ROWS, CODES, np.arange(1, 4)).shape == (3,)
