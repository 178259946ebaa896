"""Leave-one-out identification against sorting each probe's gallery by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib_faces.evaluation import LeaveOneOutProtocol, LeaveOneOutResult, leave_one_out, wilson
from kdlib_faces.evaluation.protocols import leave_one_out as identification


def detailed(embeddings: Any, identities: Any, ranks: Any = (1,)) -> LeaveOneOutResult:
    return LeaveOneOutProtocol(identities, ranks).evaluate(embeddings)


def by_hand(embeddings: np.ndarray, identities: Any, rank: int) -> float:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    correct = 0
    for probe in range(len(unit)):
        gallery = [k for k in range(len(unit)) if k != probe]
        scores = unit @ unit[probe]
        gallery.sort(key=lambda k: (-scores[k], k))
        correct += any(identities[k] == identities[probe] for k in gallery[:rank])
    return correct / len(unit)


@pytest.mark.parametrize("seed", range(4))
def test_rates_equal_those_of_sorted_galleries(seed: int) -> None:
    generator = np.random.default_rng(seed)
    identities = generator.integers(0, 9, 40)
    embeddings = generator.normal(size=(9, 6))[identities] + generator.normal(size=(40, 6))
    rates = leave_one_out(embeddings, identities, ranks=(5, 1, 39, 2))
    np.testing.assert_allclose(rates, [by_hand(embeddings, identities, k) for k in (5, 1, 39, 2)], rtol=0, atol=1e-9)
    assert 0 < rates[1] < 1


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=14), st.integers(1, 3))
def test_ties_are_ordered_by_row(rows: list[tuple[int, int]], rank: int) -> None:
    # One-hot embeddings: every score is exactly 0 or 1.
    identities = [identity for identity, _ in rows]
    embeddings = np.eye(4)[[place for _, place in rows]]
    if len(set(identities)) < 2 or len(set(identities)) == len(identities):
        with pytest.raises(ValueError, match="identities must hold"):
            leave_one_out(embeddings, identities, ranks=(rank,))
    else:
        expected = by_hand(embeddings, identities, rank)
        assert leave_one_out(embeddings, identities, ranks=(rank,))[0] == pytest.approx(expected, abs=1e-12)


def test_the_probe_is_left_out_by_row_and_a_duplicate_stays() -> None:
    embeddings = np.array([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    # Row 1 is the image of row 0 under another name and beats row 0's true mate; row 2 finds both, the true one first.
    result = detailed(embeddings, ["a", "b", "a", "b"])
    assert result.ranks_of_mates.tolist() == [2, 3, 1, 3]
    assert leave_one_out(embeddings, ["a", "b", "a", "b"]).tolist() == [0.25]


def test_detailed_result() -> None:
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [1.0, 1.0]])
    result = detailed(embeddings, ["a", "a", "b", "b", "alone"], (1, 4))
    assert (result.probes, result.mateless) == (5, 1)
    assert result.ranks_of_mates.tolist() == [1, 1, 1, 1, 0]
    low, high = wilson(4, 5)
    assert result.to_dict() == {
        "rank1": {"value": 0.8, "low": low, "high": high, "n": 5},
        "rank4": {"value": 0.8, "low": low, "high": high, "n": 5},
        "probes": 5,
    }


def test_mate_and_most_similar_impostor_of_each_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identification, "BLOCK", 7)
    generator = np.random.default_rng(5)
    identities = np.concatenate([generator.integers(0, 8, 38), [90, 91]])
    rows = generator.normal(size=(40, 5))
    result = detailed(rows, identities, (1,))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for probe in range(40):
        scores = unit @ unit[probe]
        others = [k for k in range(40) if identities[k] != identities[probe]]
        mates = [k for k in range(40) if identities[k] == identities[probe] and k != probe]
        impostor = max(others, key=lambda k: scores[k])
        assert result.impostors[probe] == impostor
        assert result.impostor_scores[probe] == pytest.approx(scores[impostor], abs=1e-12)
        if mates:
            mate = max(mates, key=lambda k: scores[k])
            assert result.mates[probe] == mate
            assert result.mate_scores[probe] == pytest.approx(scores[mate], abs=1e-12)
            assert (result.ranks_of_mates[probe] == 1) == (scores[mate] > scores[impostor])
        else:
            assert result.mates[probe] == -1
            assert np.isnan(result.mate_scores[probe])
    assert (result.mates < 0).sum() == result.mateless == 2
    assert "impostors" not in repr(result)
    assert set(result.to_dict()) == {"rank1", "probes"}
