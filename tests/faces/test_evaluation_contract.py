"""The contract of every protocol."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdlib_faces.evaluation as evaluation
from kdlib_faces.evaluation import evaluate
from tests.faces.evaluation_calls import CODES, PROTOCOLS, ROWS, YEARS

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
        assert approximately(evaluate(form, PROTOCOLS[name]()).to_dict(), expected)
    exact = [
        ROWS.astype(">f8"),
        np.asfortranarray(ROWS),
        np.repeat(ROWS, 2, axis=1)[:, ::2],
        ROWS[::-1][::-1],
        ROWS.astype(np.longdouble),
        [ROWS[:5].astype(">f8"), torch.from_numpy(ROWS[5:])],
        [list(row) for row in ROWS],
    ]
    for form in exact:
        assert json.dumps(evaluate(form, PROTOCOLS[name]()).to_dict()) == json.dumps(whole)


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
    message = rf"^\w+: (embeddings|probes) must be {message}"
    with pytest.raises(ValueError, match=message):
        evaluate(bad, PROTOCOLS[name]())
    with pytest.raises(ValueError, match=message):
        evaluate([bad[:7], bad[7:]], PROTOCOLS[name]())


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:31], "must "),
        (ROWS[:1], "must "),
        (ROWS[:0], "must "),
        (ROWS[:, :0], "must "),
        (ROWS[0], "must "),
        (np.stack([ROWS, ROWS]), "must "),
        ([], r"must be \(n, d\), not empty"),
        ((), "must "),
        (ROWS.astype(object), "must be an array of numbers, got dtype object"),
        (ROWS > 0, "must be an array of numbers, got dtype bool"),
        (np.full((32, 6), "x"), "numbers"),
        (ROWS + 1j, "numbers"),
        ([[1.0, 2.0], [3.0]], "must be an array, got rows of different lengths"),
        ([ROWS[:8], ROWS[8:, :5]], r"shard 1, must be \(n, 6\)"),
    ],
)
def test_embeddings_of_another_kind_are_refused_in_one_line(name: str, rows: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        evaluate(iter(rows) if isinstance(rows, tuple) else rows, PROTOCOLS[name]())
    assert "\n" not in str(caught.value)


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


WITH_AGES = ["LeaveOneOutProtocol", "AgeGapProtocol", "AgeErrorProtocol", "LongitudinalProtocol"]
OWNERS = [*WITH_AGES, "identify_with_distractors", "CrossGroupProtocol"]
OLD = YEARS > 60
WRONG: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"replicates": -1}, "replicates must be", OWNERS),
    ({"seed": -1}, "seed must be", OWNERS),
    ({"level": 1.0}, "level must be below 1", OWNERS),
    ({"level": 0.0}, "level must be", OWNERS),
    ({"fars": (0.0,)}, "fars must be", OWNERS[1:]),
    ({"fars": (0.1, 0.1)}, "fars must differ", OWNERS[1:]),
    ({"ranks": (99,)}, "ranks must be", OWNERS[:1]),
    ({"codes": np.arange(32)}, "identities must hold one with", OWNERS),
    ({"codes": [1.5] * 32}, "identities must be whole numbers or strings, got entry 0", OWNERS),
    ({"ages": YEARS[:5]}, r"ages must be as long as identities \(32\), got 5", OWNERS[:-1]),
    ({"ages": np.where(np.arange(32) == 2, np.nan, YEARS)}, "ages must be finite .*row 2", OWNERS[:-1]),
    ({"ages": -YEARS}, "ages must be finite and not negative, in years, got row 0", OWNERS[:-1]),
    ({"ages": np.where(OLD, np.inf, YEARS)}, "ages must be finite", WITH_AGES),
    ({"ages": np.where(OLD, 20_010_401, YEARS)},
     r"ages must be in years, at most 10000, got row 3 that is not \(8 in all\)", WITH_AGES),
    ({"ages": np.where(OLD, 1e306, YEARS)}, "ages must be in years, at most 10000", WITH_AGES),
    ({"ages": YEARS.astype(str)}, "ages must be an array of numbers", WITH_AGES),
    ({"ages": np.array(YEARS, dtype="timedelta64[D]")}, "ages must be an array of numbers", WITH_AGES),
]  # fmt: skip


def build(owner: str, codes: Any = CODES, ages: Any = YEARS, **more: Any) -> Any:
    if owner == "CrossGroupProtocol":
        return evaluation.CrossGroupProtocol(codes, np.where(YEARS > 20, "adult", "young"), **more)
    if owner == "identify_with_distractors":
        return evaluation.DistractorProtocol(codes, ROWS[::3] + 1, ages=ages, **more)
    return getattr(evaluation, owner)(codes, ages=ages, **more)


@pytest.mark.parametrize(
    ("owner", "change", "message"), [(owner, change, message) for change, message, owners in WRONG for owner in owners]
)
def test_bad_arguments_are_reported_with_the_protocol(owner: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{owner}: {message}"):
        build(owner, **change)
