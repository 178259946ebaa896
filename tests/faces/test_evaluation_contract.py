"""What every protocol owes its user, checked of each that the evaluation shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdlib_faces.evaluation as evaluation
from kdlib_faces.evaluation import evaluate

GENERATOR = np.random.default_rng(0)
WHO = np.repeat(np.arange(8), 4)
AGES = np.tile([3.0, 10.0, 31.0, 62.0], 8)
GROUPS = np.tile(["young", "young", "adult", "adult"], 8)
ROWS = GENERATOR.normal(size=(8, 6))[WHO] + 0.6 * GENERATOR.normal(size=(32, 6))
OTHERS = GENERATOR.normal(size=(50, 6))
LEFT = np.arange(32)
RIGHT = np.where(LEFT % 2 == 0, LEFT + 1, (LEFT + 8) % 32)
TEMPLATES = np.arange(32) // 2

PROTOCOLS: dict[str, Callable[[], Any]] = {
    "PairProtocol": lambda: evaluation.PairProtocol(
        LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, fars=(0.1,), val_fars=(0.1,), pca=3, identities=WHO
    ),
    "LeaveOneOutProtocol": lambda: evaluation.LeaveOneOutProtocol(WHO, ages=AGES),
    "AgeGapProtocol": lambda: evaluation.AgeGapProtocol(WHO, ages=AGES, replicates=5),
    "AgeErrorProtocol": lambda: evaluation.AgeErrorProtocol(WHO, ages=AGES, replicates=5),
    "LongitudinalProtocol": lambda: evaluation.LongitudinalProtocol(WHO, AGES, replicates=5),
    "CrossGroupProtocol": lambda: evaluation.CrossGroupProtocol(WHO, GROUPS, replicates=5),
    "DistractorProtocol": lambda: evaluation.DistractorProtocol(WHO, OTHERS, fars=(0.01,), ages=AGES, sizes=(10,)),
    "TemplateVerificationProtocol": lambda: evaluation.TemplateVerificationProtocol(
        TEMPLATES, np.arange(32), [0, 2, 4, 0, 1], [1, 3, 5, 2, 9], [1, 1, 1, 0, 0], fars=(0.5,)
    ),
    "TemplateIdentificationProtocol": lambda: evaluation.TemplateIdentificationProtocol(
        TEMPLATES,
        np.arange(32),
        [([0, 2, 4], [0, 1, 2]), ([6, 8], [3, 4])],
        ([1, 3, 5, 7, 9, 11], [0, 1, 2, 3, 4, 5]),
        fpirs=(0.5,),
    ),
}
NOT_PROTOCOLS = {"EvaluationProtocol"}


def test_every_public_protocol_is_tested() -> None:
    shown = {name for name in evaluation.__all__ if name.endswith("Protocol")} - NOT_PROTOCOLS
    assert shown == set(PROTOCOLS)
    assert len(PROTOCOLS) == 9


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_result_is_json_and_the_same_for_every_kind_of_embeddings(name: str, tmp_path: Path) -> None:
    whole = evaluate(ROWS, PROTOCOLS[name]()).to_dict()
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    single = evaluate(ROWS.astype(np.float32), PROTOCOLS[name]()).to_dict()
    half = ROWS.astype(np.float16)
    half.tofile(tmp_path / "map")
    mapped = np.memmap(tmp_path / "map", dtype=np.float16, mode="r", shape=half.shape)
    forms: list[tuple[Any, Any]] = [
        ([ROWS[:5], ROWS[5:6], ROWS[6:]], whole),
        ((ROWS[k : k + 7] for k in range(0, 32, 7)), whole),
        (ROWS.tolist(), whole),
        (torch.from_numpy(ROWS), whole),
        (torch.from_numpy(ROWS).float().requires_grad_(), single),
        (mapped, evaluate(half, PROTOCOLS[name]()).to_dict()),
    ]
    for form, expected in forms:
        found = evaluate(form, PROTOCOLS[name]()).to_dict()
        assert approximately(found, expected)


def approximately(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(approximately(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(approximately(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == pytest.approx(b, abs=1e-9)  # type: ignore[no-any-return]
    return bool(a == b)


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_length_of_all_embeddings_does_not_matter(name: str, scale: float) -> None:
    assert approximately(
        evaluate(ROWS * scale, PROTOCOLS[name]()).to_dict(), evaluate(ROWS, PROTOCOLS[name]()).to_dict()
    )


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "row", "message"),
    [
        (np.nan, 9, "finite.*row 9"),
        (np.inf, 31, "finite.*row 31"),
        (-np.inf, 0, "finite.*row 0"),
        (0.0, 17, "non-zero.*row 17"),
    ],
)
def test_a_bad_row_is_named_and_never_a_number(name: str, value: float, row: int, message: str) -> None:
    bad = ROWS.copy()
    bad[row] = value
    with pytest.raises(ValueError, match=message):
        evaluate(bad, PROTOCOLS[name]())
    with pytest.raises(ValueError, match=message):
        evaluate([bad[:7], bad[7:]], PROTOCOLS[name]())


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("rows", [ROWS[:31], ROWS[:0], ROWS[:, :0], ROWS[0], np.stack([ROWS, ROWS])])
def test_a_wrong_shape_is_refused(name: str, rows: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        evaluate(rows, PROTOCOLS[name]())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_embeddings_that_are_no_numbers_are_refused(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match="numbers"):
        evaluate(np.full((32, 6), "x"), PROTOCOLS[name]())
    with pytest.raises((TypeError, ValueError), match="numbers"):
        evaluate(ROWS + 1j, PROTOCOLS[name]())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_embeddings_are_not_changed_and_a_second_run_gives_the_same(name: str) -> None:
    kept, protocol = ROWS.copy(), PROTOCOLS[name]()
    first = evaluate(ROWS, protocol).to_dict()
    assert evaluate(ROWS, protocol).to_dict() == first
    np.testing.assert_array_equal(kept, ROWS)
    assert repr(protocol).startswith(f"{name}(")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_lies_under_a_mask_is_no_number(name: str) -> None:
    masked = np.ma.masked_array(ROWS, mask=np.zeros(ROWS.shape, dtype=bool))
    assert approximately(evaluate(masked, PROTOCOLS[name]()).to_dict(), evaluate(ROWS, PROTOCOLS[name]()).to_dict())
    masked[3, 2] = np.ma.masked
    with pytest.raises(ValueError, match="must have no masked entries, got 1"):
        evaluate(masked, PROTOCOLS[name]())


def test_errors_name_the_protocol_that_was_called() -> None:
    for make in (
        lambda **more: evaluation.AgeErrorProtocol(WHO, ages=AGES, **more),
        lambda **more: evaluation.LongitudinalProtocol(WHO, AGES, **more),
        lambda **more: evaluation.CrossGroupProtocol(WHO, GROUPS, **more),
        lambda **more: evaluation.DistractorProtocol(WHO, OTHERS, **more),
        lambda **more: evaluation.LeaveOneOutProtocol(WHO, **more),
        lambda **more: evaluation.AgeGapProtocol(WHO, ages=AGES, **more),
    ):
        name = type(make()).__name__.replace("DistractorProtocol", "identify_with_distractors")
        with pytest.raises(ValueError, match=f"^{name}: replicates must be"):
            make(replicates=-1)
    for given in ("abc", 3, 2.5, np.zeros(4)):
        with pytest.raises((ValueError, TypeError), match=r"^identify_with_distractors: distractors must be"):
            evaluation.identify_with_distractors(ROWS, WHO, given)
    with pytest.raises(ValueError, match="genuine must have no masked entries, got 1"):
        evaluation.tar_at_far(np.ma.masked_array([0.1, 0.2], mask=[0, 1]), [0.0], 0.5)
