"""The order of pairs of equal score, which must not depend on how the scores are computed."""

import numpy as np
import pytest

from kdlib_faces.evaluation import AgeErrorProtocol, evaluate
from kdlib_faces.evaluation.matching import all_pairs


def test_false_accepts_of_equal_score_are_in_the_order_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    rows = np.eye(3)[generator.integers(0, 3, 40)] + np.array([0.5, 0, 0])
    protocol = AgeErrorProtocol(
        generator.integers(0, 10, 40), ages=generator.integers(0, 60, 40), fars=(0.9,), replicates=2
    )
    for block in (1, 7, 512):
        monkeypatch.setattr(all_pairs, "ROWS", block)
        left, right, scores = evaluate(rows, protocol).false_accepts.arrays
        found = list(zip((-scores).tolist(), left.tolist(), right.tolist(), strict=True))
        assert len(set(scores.tolist())) < len(found) > 100
        assert found == sorted(found), block
