"""The contract of every protocol."""

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
IDENTITIES = np.repeat(np.arange(8), 4)
AGES = np.tile([3.0, 10.0, 31.0, 62.0], 8)
GROUPS = np.tile(["young", "young", "adult", "adult"], 8)
ROWS = GENERATOR.normal(size=(8, 6))[IDENTITIES] + 0.6 * GENERATOR.normal(size=(32, 6))
OTHERS = GENERATOR.normal(size=(50, 6))
LEFT = np.arange(32)
RIGHT = np.where(LEFT % 2 == 0, LEFT + 1, (LEFT + 8) % 32)
TEMPLATES = np.arange(32) // 2

PROTOCOLS: dict[str, Callable[[], Any]] = {
    "PairProtocol": lambda: evaluation.PairProtocol(
        LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, fars=(0.1,), val_fars=(0.1,), pca=3, identities=IDENTITIES
    ),
    "LeaveOneOutProtocol": lambda: evaluation.LeaveOneOutProtocol(IDENTITIES, ages=AGES),
    "AgeGapProtocol": lambda: evaluation.AgeGapProtocol(IDENTITIES, ages=AGES, replicates=5),
    "AgeErrorProtocol": lambda: evaluation.AgeErrorProtocol(IDENTITIES, ages=AGES, replicates=5),
    "LongitudinalProtocol": lambda: evaluation.LongitudinalProtocol(IDENTITIES, AGES, replicates=5),
    "CrossGroupProtocol": lambda: evaluation.CrossGroupProtocol(IDENTITIES, GROUPS, replicates=5),
    "DistractorProtocol": lambda: evaluation.DistractorProtocol(
        IDENTITIES, OTHERS, fars=(0.01,), ages=AGES, sizes=(10,)
    ),
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
def test_a_result_is_json_and_equal_for_every_type_of_embeddings(name: str, tmp_path: Path) -> None:
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
def test_a_bad_row_is_reported(name: str, value: float, row: int, message: str) -> None:
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
def test_embeddings_must_be_numbers(name: str) -> None:
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
def test_masked_entries_are_refused(name: str) -> None:
    masked = np.ma.masked_array(ROWS, mask=np.zeros(ROWS.shape, dtype=bool))
    assert approximately(evaluate(masked, PROTOCOLS[name]()).to_dict(), evaluate(ROWS, PROTOCOLS[name]()).to_dict())
    masked[3, 2] = np.ma.masked
    with pytest.raises(ValueError, match="must have no masked entries, got 1"):
        evaluate(masked, PROTOCOLS[name]())


OWNERS = [
    "AgeErrorProtocol", "AgeGapProtocol", "LongitudinalProtocol", "LeaveOneOutProtocol", "identify_with_distractors",
    "CrossGroupProtocol",
]  # fmt: skip


def build(owner: str, codes: Any = IDENTITIES, ages: Any = AGES, **more: Any) -> Any:
    if owner == "CrossGroupProtocol":
        return evaluation.CrossGroupProtocol(codes, GROUPS, **more)
    if owner == "identify_with_distractors":
        return evaluation.DistractorProtocol(codes, OTHERS, ages=ages, **more)
    return getattr(evaluation, owner)(codes, ages=ages, **more)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicates": -1}, "replicates must be"),
        ({"seed": -1}, "seed must be"),
        ({"level": 1.0}, "level must be below 1"),
        ({"fars": (0.0,)}, "fars must be"),
        ({"fars": (0.1, 0.1)}, "fars must differ"),
        ({"codes": np.arange(32)}, "identities must hold one with"),
        ({"codes": [1.5] * 32}, "identities must be whole numbers or strings, got entry 0"),
        ({"ages": AGES[:5]}, r"ages must be as long as identities \(32\), got 5"),
        ({"ages": np.where(np.arange(32) == 2, np.nan, AGES)}, "ages must be finite .*row 2"),
        ({"ages": -AGES}, "ages must be finite and not negative, in years, got row 0"),
    ],
)
def test_bad_arguments_are_reported_with_the_protocol(owner: str, change: dict[str, Any], message: str) -> None:
    if owner == "CrossGroupProtocol" and "ages" in change:
        change = {"level": 0.0}
        message = "level must be"
    if owner == "LeaveOneOutProtocol" and "fars" in change:
        change, message = {"ranks": (99,)}, "ranks must be"
    with pytest.raises(ValueError, match=f"^{owner}: {message}"):
        build(owner, **change)


def test_distractors_and_scores_are_checked() -> None:
    for given in ("abc", 3, 2.5, np.zeros(4)):
        with pytest.raises((ValueError, TypeError), match=r"^identify_with_distractors: distractors must be"):
            evaluation.identify_with_distractors(ROWS, IDENTITIES, given)
    with pytest.raises(ValueError, match="genuine must have no masked entries, got 1"):
        evaluation.tar_at_far(np.ma.masked_array([0.1, 0.2], mask=[0, 1]), [0.0], 0.5)
