"""Wrong arguments of the evaluation: each is refused in one line that names it, what was expected and what came."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdlib_faces import evaluation
from kdlib_faces.evaluation import (
    AgeErrorProtocol,
    AgeGapProtocol,
    CrossGroupProtocol,
    LeaveOneOutProtocol,
    LongitudinalProtocol,
    PairProtocol,
    TemplateIdentificationProtocol,
    check_identity_disjoint,
    clustered_rate,
    embed_images,
    identify_templates,
    identify_with_distractors,
    identity_disjoint_split,
    leave_one_out,
    pair_set,
    paired_test,
    pool_templates,
    positives_first_folds,
    roc_points,
    tar_at_far,
    template_verification,
    verify_pairs,
    wilson,
)
from tests.faces.evaluation_calls import CODES, LEFT, RIGHT, YEARS

PAIRS = np.random.default_rng(0).normal(size=(2, 40, 10))
SAME = np.tile([True, True, False, False], 10)
IMAGES = np.random.default_rng(0).integers(0, 256, (23, 3, 6, 6), dtype=np.uint8)
OTHERS = np.random.default_rng(0).normal(size=(20, 4))
SEARCH = {"galleries": [([1, 2], ["a", "b"])], "probes": ([3, 4], ["a", "z"])}
Cases = list[tuple[dict[str, Any], str]]


def with_row(array: np.ndarray, row: int, value: float) -> np.ndarray:
    return np.where(np.arange(len(array))[:, None] == row, value, array)


def evaluate_pairs(rows: int, **arguments: Any) -> Any:
    return PairProtocol([0, 1], same=[1, 0], **arguments).evaluate(np.eye(rows))


# A function with valid arguments, then changes of them with the messages.
TABLE: list[tuple[Callable[..., Any], dict[str, Any], Cases]] = [
    (verify_pairs, {"left": PAIRS[0], "right": PAIRS[1], "same": SAME}, [
        ({"right": with_row(PAIRS[1], 3, np.inf)}, "right must be finite.*got row 3"),
        ({"left": with_row(PAIRS[0], 5, 0.0)}, "left must be non-zero.*got row 5"),
        ({"right": PAIRS[1][:-1]}, "right must have one row for each of 40 .*got 39"),
        ({"right": PAIRS[1][:, :3]}, r"right must be \(n, 10\) like left"),
        ({"same": SAME[:-1]}, r"same must be as long as the pairs \(40\), got 39"),
        ({"same": SAME | True}, "both kinds of pair, got only True"),
        ({"same": SAME + 1}, "same must be boolean"),
        ({"same": np.sort(SAME)}, "fold 0 with only impostor pairs; is the file"),
        ({"left": PAIRS[0][:12], "right": PAIRS[1][:12], "same": np.tile([0, 1], 6)}, "must be 20 pairs, got 12"),
        ({"left": PAIRS[0][:, 0]}, r"left must be \(n, d\), not empty, got \(40,\)"),
        ({"fold_ids": np.where(SAME, "a", np.where(np.arange(40) < 20, "a", "b"))}, "fold 'b' with only impostor pairs"),
        ({"fold_ids": np.zeros(40, dtype=int)}, "at least two folds"),
        ({"fold_ids": [0, 1]}, "fold_ids must be as long as the pairs"),
        ({"threshold": "best"}, "threshold must be one of 'grid', 'exact'"),
        ({"pca": 11}, "pca must be"),
    ]),
    (PairProtocol, {"left": LEFT, "right": RIGHT, "same": LEFT % 2 == 0, "fold_ids": LEFT // 8}, [
        ({"ages": -YEARS}, "PairProtocol: ages must be finite and not negative"),
        ({"ages": np.where(YEARS > 60, np.inf, YEARS)}, "PairProtocol: ages must be finite"),
        ({"ages": YEARS * 1000}, "PairProtocol: ages must be in years, at most 10000"),
        ({"ages": YEARS.astype(str)}, "PairProtocol: ages must be an array of numbers"),
        ({"ages": YEARS[:30]}, "PairProtocol: ages must hold row 31, got 30 rows"),
        ({"ages": np.append(YEARS, 1), "images": 32}, "ages must have a row for each of 32 images, got 33"),
        ({"ages": np.append(YEARS, 1), "identities": CODES}, "ages must have a row for each of 32 images, got 33"),
        ({"train_identities": [1]}, "PairProtocol: train_identities needs identities"),
        ({"right": RIGHT[:-1]}, r"right must be as long as left \(32\), got 31"),
        ({"left": -LEFT}, "left must be row numbers from 0, got entry 1"),
        ({"left": LEFT.astype(float)}, "left must be an array of row numbers"),
        ({"left": np.where(LEFT == 1, np.uint64(2**63), LEFT.astype(np.uint64))}, "left must be row numbers from 0, got entry 1"),
        ({"left": [], "right": [], "same": []}, r"left must be \(n,\), not empty"),
        ({"same": np.ma.masked_array(LEFT % 2, mask=LEFT == 3)}, "same must have no masked entries, got 1"),
        ({"same": [1, 0, 1]}, r"same must be as long as the pairs \(32\), got 3"),
        ({"fold_ids": [0]}, "fold_ids must be as long as left"),
        ({"threshold": "top"}, "threshold must be one of"),
        ({"replicates": -1}, "PairProtocol: replicates must be"),
        ({"seed": 1.5}, "PairProtocol: seed must be"),
        ({"notes": "aligned"}, "notes must be a list or tuple of strings"),
    ]),
    (evaluate_pairs, {}, [
        ({"right": [1, 9], "rows": 3}, "embeddings must hold row 9, got 3 rows"),
        ({"right": [2, 3], "images": 4, "rows": 5}, "each of 4 images of 2 pairs, got 5"),
    ]),
    (identify_with_distractors, {"probes": np.eye(4) + 1, "identities": [0, 0, 1, 1], "distractors": OTHERS}, [
        ({"distractors": np.ones((5, 3))}, r"distractors must be \(n, 4\), got \(5, 3\)"),
        ({"distractors": np.empty((0, 4))}, "distractors must hold one"),
        ({"distractors": iter(())}, "distractors must hold one"),
        ({"distractors": (np.ones((9, 4)) for _ in range(3)), "max_distractors": 20}, "must be an upper bound, got 20"),
        ({"fars": (1.0,), "max_distractors": 50_000_000, "distractors": iter(())}, "at most 20000000 false accepts"),
        *(({"distractors": given}, r"^identify_with_distractors: distractors must be") for given in ("abc", 3, 2.5, np.zeros(4))),
        ({"ranks": ()}, "ranks must not be empty"),
        ({"ties": "maybe"}, "ties must be one of 'correct', 'wrong'"),
        ({"cleaning": "soap"}, "cleaning must be one of"),
        ({"sizes": (10, 5)}, "sizes must rise"),
        *(({"sizes": (size, 5)}, f"sizes must be a whole number and >= 1, got {size}") for size in (0, 2.5)),
        ({"sizes": (10, 21)}, "sizes must be at most the 20 distractors, got"),
        ({"distractors": with_row(OTHERS, 1, 0)}, "distractors must be non-zero in every row, got row 1"),
        ({"distractors": np.zeros((3, 4)), "cleaning": "exclude_zeros"}, "one that is not cleaned away, got none"),
    ]),
    (leave_one_out, {"embeddings": np.eye(3), "identities": [1, 1, 2], "ranks": (1,)}, [
        ({"identities": [1, 1, 1]}, "at least two identities, got only 1"),
        ({"identities": [1.0, np.nan, 2.0]}, "identities must be whole numbers or strings, got entry 1"),
        ({"identities": np.array(["a", None, "a"], dtype=object)}, "got entry 1 that is not"),
        ({"identities": np.array([1.0, 2.5, 2.0])}, "identities must be whole numbers or strings, got entry 1"),
        ({"identities": [True, False], "embeddings": np.eye(2)}, "identities must be an array of whole numbers or strings"),
        ({"identities": [[1, 1, 2]]}, "identities must be"),
        *(({"ranks": ranks}, "ranks must be a whole number") for ranks in ((0,), np.arange(1.0, 2.0), [np.True_])),
        ({"ranks": (3,)}, "ranks must be a whole number.*<= 2"),
        ({"ranks": ()}, "ranks must not be empty"),
        *(({"ranks": ranks}, "ranks must be a sequence of numbers") for ranks in (1, np.array(1))),
        ({"ranks": torch.ones(2, 2)}, r"ranks must be a sequence of numbers, got shape \(2, 2\)$"),
    ]),
    (LeaveOneOutProtocol, {"identities": [0, 0, 1], "ranks": (1,)}, [
        ({"level": np.ones((2, 2))}, r"level must be one value, got shape \(2, 2\)$"),
    ]),
    (AgeErrorProtocol, {"identities": [0, 0, 1], "ages": [1, 2, 3]}, [
        ({"fars": 0.1}, "fars must be a sequence of numbers"),
        ({"fars": "0.1"}, "fars must be a finite number"),
        ({"fars": ()}, "fars must not be empty"),
    ]),
    (AgeGapProtocol, {"identities": [0, 0, 1], "ages": [1, 2, 3]}, [
        ({"fars": (0.1, 0.1 + 1e-12)}, "fars must differ"),
        ({"ages": None, "age_groups": ["a", "b"]}, r"AgeGapProtocol: age_groups must be as long as identities \(3\), got 2"),
        ({"ages": None}, "AgeGapProtocol: ages or age_groups must be given, got neither"),
        ({"bins": (0, 5, 5)}, r"AgeGapProtocol: bins must rise from the first, got \(0, 5, 5\)"),
        ({"bins": ()}, "bins must rise"),
        ({"bins": (-1, 5)}, "bins must be a finite number and >= 0"),
        ({"ages": [], "identities": []}, "identities must be .n,., not empty"),
    ]),
    (LongitudinalProtocol, {"identities": [0, 0, 1], "ages": [1, 2, 3]}, [
        ({"reference": "last"}, "reference must be one of 'first', 'all'"),
        ({"years": (0,)}, "years must be"),
        ({"fars": ()}, "fars must not be empty"),
    ]),
    (CrossGroupProtocol, {"identities": [0, 0, 1, 1], "groups": ["young", "adult", "young", "adult"]}, [
        ({"groups": ["young", "old", "young", "old"]}, "gallery must be one of 'old', 'young', got 'adult'"),
        ({"gallery": "young"}, "probe and gallery must be two groups"),
        ({"probe": np.ones(2)}, "probe must be one value"),
        ({"identities": [0, 1, 2, 3]}, "one with images of both groups, got none"),
        ({"ranks": (3,)}, "ranks must be"),
    ]),
    (identify_templates, {"templates": pool_templates(np.eye(4) + 1, [1, 2, 3, 4], [1, 2, 3, 4]), **SEARCH}, [
        ({"galleries": []}, "galleries must not be empty"),
        ({"galleries": [([], [])]}, r"template ids of galleries\[0\] must be \(n,\), not empty"),
        ({"galleries": [([1, 2], ["a", "a"])]}, r"subjects of galleries\[0\] must not occur twice, got 'a' in entries 0 and 1"),
        ({"galleries": [([1, 1], ["a", "b"])]}, r"template ids of galleries\[0\] must not occur twice, got 1"),
        ({"galleries": [([1, 9], ["a", "b"])]}, r"template ids of galleries\[0\] must be in template_ids, got 9 in entry 1"),
        ({"probes": ([3, 3], ["a", "z"])}, "template ids of probes must not occur twice, got 3"),
        ({"probes": ([3, 77], ["a", "z"])}, "template ids of probes must be in template_ids, got 77 in entry 1"),
        ({"probes": ([3, 4], ["a", "b"])}, r"galleries\[0\] must have a non-mated probe, got none"),
        ({"probes": ([3, 4], ["y", "z"])}, r"galleries\[0\] must have a mated probe, got none"),
        ({"probes": ([3, 4], [1, 2])}, "subjects must be named alike, got numbers and strings"),
        ({"probes": ([3], ["a", "b"])}, "subjects of probes must be as long as their template ids"),
        ({"ranks": ()}, "ranks must not be empty"),
    ]),
    (TemplateIdentificationProtocol, {"template_ids": [1], "media_ids": [1], "probes": ([1], [1])}, [
        ({"galleries": None}, "galleries must be a list"),
    ]),
    (pool_templates, {"embeddings": np.ones((3, 2)), "template_ids": [7, 7, 8], "media_ids": [1, 2, 3]}, [
        ({"embeddings": np.array([[1, 0], [np.nan, 0], [0, 1.0]])}, "embeddings must be finite .*got row 1"),
        ({"embeddings": [np.eye(2), np.array([[np.inf, 0]])]}, "embeddings must be finite .*got row 2"),
        ({"embeddings": np.array([[1, 0], [0, 1.0], [0, 0]])}, "embeddings must be non-zero in every row, got row 2"),
        ({"embeddings": np.array([[1.0, 1], [-1, -1], [0, 1]])}, "every template must have a sum, got zero for template 7"),
        ({"embeddings": np.eye(2)}, "one row for each of 3 template_ids, got 2"),
        ({"embeddings": np.ones((4, 2))}, "one row for each of 3 template_ids, got more"),
        ({"media_ids": [1, 2]}, r"media_ids must be as long as template_ids \(3\), got 2"),
        ({"detector_scores": [1.0, np.nan, 1]}, "detector_scores must be finite, got entry 1"),
        ({"detector_scores": [1.0, -1, 1]}, "detector_scores must be not negative, got entry 1 that is not"),
        ({"detector_scores": [0.0, 0, 1]}, "got zero for template 7"),
        ({"feature_norm": "use"}, "feature_norm must be one of 'keep', 'unit'"),
    ]),
    (template_verification, {
        "embeddings": np.eye(3) + 1, "template_ids": [5, 9, 7], "media_ids": [1, 2, 3], "left": [5, 5, 7], "right": [9, 7, 9],
        "same": [1, 0, 0],
    }, [
        ({"left": [5, 5, 6]}, r"left must be in template_ids, got 6 in entry 2 that is not \(1 in all\)"),
        ({"right": [9, 0, 7]}, "right must be in template_ids, got 0 in entry 1"),
        ({"right": [9, 10**12, 7]}, "right must be in template_ids, got 1000000000000 in entry 1"),
        ({"left": ["5", "5", "5"]}, "left and template_ids must be named alike, got strings and numbers"),
        ({"right": [5, 9, 7]}, "every pair must be of two templates, got pair 0 that is not"),
        ({"right": [9, 7]}, r"right must be as long as left \(3\), got 2"),
        ({"same": [1, 1, 1]}, "same must hold both kinds of pair, got only True"),
        ({"same": [1, 0]}, r"same must be as long as the pairs \(3\), got 2"),
        ({"fars": (2.0,)}, "fars must be"),
        ({"mode": "roc"}, "mode must be one of"),
    ]),
    (embed_images, {"model": lambda x: x.flatten(1)[:, :5], "images": IMAGES}, [
        ({"images": IMAGES.astype(np.float32)}, "images must be uint8, got dtype float32"),
        ({"images": IMAGES[0]}, r"images, batch 0, must be \(b, c, h, w\), got \(6, 6\)"),
        ({"images": []}, "images must hold one, got none"),
        ({"images": [IMAGES, IMAGES[:, :, :5]]}, r"batch 1, must be \(b, 3, 6, 6\)"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"model": lambda x: x}, r"must return embeddings \(23, d\), got \(23, 3, 6, 6\)"),
        ({"model": lambda x: x.sum()}, "must return embeddings"),
        ({"model": lambda x: x.tolist()}, r"must return embeddings \(23, d\), got list"),
        ({"model": lambda x: {"logits": x}}, "must return 'embedding', got 'logits'"),
        ({"model": lambda x: x.flatten(1) * 0}, "non-zero to be normalized, got image 0"),
        ({"out": np.empty((23, 4))}, r"out must be \(n, 5\) with a row"),
        ({"out": np.empty((30, 5))}, "out must have one row for each of 23"),
        ({"out": np.empty((9, 5)), "batch_size": 8}, "with a row for each"),
        ({"out": np.empty((23, 5), np.uint8)}, "out must be an array of floating-point numbers, got dtype uint8"),
        ({"model": lambda x: 1e6 + x.flatten(1), "normalize": False, "out": np.empty((23, 108), np.float16)},
         "embeddings as float16 must be finite, got image 0"),
    ]),
    (identity_disjoint_split, {"identities": ["a", "b", "c"], "fractions": (0.5, 0.5), "seed": 0}, [
        ({"fractions": (0.5, 0.4)}, "fractions must sum to 1"),
        ({"fractions": ()}, "fractions must not be empty"),
        ({"fractions": (1.0, 0.0)}, "fractions must be"),
        ({"fractions": (0.999, 0.001)}, "leave each part an identity, got 3 identities"),
        ({"fractions": 0.5}, "fractions must be a sequence of numbers"),
    ]),
    (check_identity_disjoint, {}, [
        ({"a": range(6), "b": range(9)}, r"got 6 in both: 0, 1, 2, 3, 4, \.\.\."),
        ({"a": ["1"], "b": [1]}, "named alike, got strings and numbers"),
    ]),
    (tar_at_far, {"genuine": [0.1], "impostor": [0.2], "far": 0.1}, [
        ({"genuine": []}, "genuine must be .n,., not empty"),
        ({"impostor": []}, "impostor must be .n,., not empty"),
        ({"genuine": [0.1, np.nan]}, "genuine must be finite, got entry 1"),
        ({"impostor": [np.inf, 0.2]}, "impostor must be finite, got entry 0"),
        ({"genuine": [[0.1]]}, r"genuine must be .*shape \(1, 1\)"),
        ({"genuine": np.ma.masked_array([0.1, 0.2], mask=[0, 1])}, "genuine must have no masked entries, got 1"),
        ({"genuine": ["x"]}, "genuine must be an array of numbers"),
        ({"far": 0.0}, "far must be a finite number and > 0"),
        *(({"far": far}, "far must be a finite number") for far in (1.5, np.nan, np.bool_(True))),
        ({"mode": "closest"}, "mode must be one of 'exact', 'nearest', got 'closest'"),
    ]),
    (paired_test, {"a": [1, 1, 0, 0], "b": [1, 0, 1, 0]}, [
        ({"b": [1]}, r"b must be as long as a \(4\), got 1"),
        ({"a": [2, 2, 1, 1]}, r"a must be boolean \(or 0 and 1\), got entry 0"),
        ({"other_identities": [1, 2, 3, 4]}, "identities must be given with other_identities"),
        ({"identities": [1]}, "identities must be as long as a"),
    ]),
    (clustered_rate, {"hits": [1.0, 0.0], "identities": [0, 1]}, [
        ({"hits": ["1", "0"]}, "hits must be an array of numbers"),
        ({"hits": [2.0], "identities": [0]}, r"hits must be in \[0, 1\], got entry 0"),
        ({"identities": [0]}, "identities must be as long as hits"),
    ]),
    (positives_first_folds, {"same": SAME}, [
        ({"same": [1] * 3 + [0] * 40}, "same must hold 10 pairs of each kind, got 3 of True"),
    ]),
    (evaluation.identities_in_several_folds, {"first": [1, 2], "second": [1, 3], "fold_ids": [0, 1]}, [
        ({"first": [1]}, r"first must be as long as fold_ids \(2\), got 1"),
        ({"second": [1]}, r"second must be as long as fold_ids \(2\), got 1"),
        ({"second": ["a", "b"]}, "first and second must be named alike, got numbers and strings"),
    ]),
    (pair_set, {"name": "lfw", "left": LEFT, "right": RIGHT, "same": LEFT % 2, "fold_ids": LEFT // 8}, [
        ({"fold_ids": None}, "fold_ids must be given where pairs of lfw are missing, got 32 of 6000"),
        ({"name": "cacd_vs", "same": np.tile([1, 0], 3000)}, "cacd_vs must have 4000 pairs, got 6000"),
        ({"name": "megaface"}, "name must be one of 'lfw'"),
    ]),
    (roc_points, {"genuine": [1.0], "impostor": [0.0]}, [({"points": 10**30}, "points must be a whole number")]),
    (wilson, {"successes": 1, "trials": 2, "level": 0.95}, [
        ({"trials": 0}, "wilson: trials must be"),
        *(({"successes": number}, "wilson: successes must be a finite number") for number in (3, -1, np.nan)),
        ({"level": 1.0}, "wilson: level must be below 1"),
        ({"level": 0.0}, "wilson: level must be"),
    ]),
    (evaluation.evaluate, {"embeddings": np.eye(2)}, [
        ({"protocol": "lfw"}, r"protocol must have an evaluate\(embeddings\) method, got str"),
    ]),
]  # fmt: skip
OWNERS: dict[Callable[..., Any], Callable[..., Any]] = {
    evaluate_pairs: PairProtocol,
    leave_one_out: LeaveOneOutProtocol,
}
"""Functions whose messages begin with the name of the protocol that they build."""
CASES = [(function, {**valid, **change}, message) for function, valid, cases in TABLE for change, message in cases]


@pytest.mark.parametrize(("function", "arguments", "message"), CASES)
def test_wrong_arguments_are_refused(function: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{OWNERS.get(function, function).__name__}: ")


@pytest.mark.parametrize(("function", "valid", "cases"), TABLE)
def test_the_other_arguments_are_valid(function: Callable[..., Any], valid: dict[str, Any], cases: Cases) -> None:
    if function not in (evaluate_pairs, check_identity_disjoint, TemplateIdentificationProtocol, evaluation.evaluate):
        function(**valid)
