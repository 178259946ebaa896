"""Every protocol as a function of how numbers are given, `CALLS[name](one, many)`, and as is, `PROTOCOLS[name]()`."""

from functools import partial
from typing import Any

import numpy as np

from kdlib_faces import evaluation
from kdlib_faces.evaluation import LeaveOneOutProtocol, PairProtocol, TemplateVerificationProtocol

CODES = np.repeat(np.arange(8), 4)
YEARS = np.tile([3.0, 10.0, 31.0, 62.0], 8)
ROWS = np.random.default_rng(0).normal(size=(8, 6))[CODES] + 0.6 * np.random.default_rng(1).normal(size=(32, 6))
LEFT = np.arange(32)
RIGHT = np.where(LEFT % 2 == 0, LEFT + 1, (LEFT + 8) % 32)


def unit(x: Any) -> np.ndarray:
    """Rows of unit length, one at a time: a plain reference."""
    return np.array([row / np.sqrt((row * row).sum()) for row in np.asarray(x, dtype=np.float64)])


CALLS: dict[str, Any] = {
    "PairProtocol": lambda one, many: PairProtocol(
        LEFT, RIGHT, LEFT % 2 == 0, LEFT // 8, fars=many([0.1, 0.5]), val_fars=many([0.1]), images=one(32), pca=one(3),
        gap_bins=many([0, 5]), replicates=one(5), seed=one(1), level=one(0.5), ages=YEARS, identities=CODES,
    ),
    "LeaveOneOutProtocol": lambda one, many: LeaveOneOutProtocol(
        CODES, many([1, 3]), ages=YEARS, age_bins=many([0, 30]), gap_bins=many([0, 5]), replicates=one(5), seed=one(1),
        level=one(0.5),
    ),
    "AgeGapProtocol": lambda one, many: evaluation.AgeGapProtocol(
        CODES, ages=YEARS, bins=many([0, 5]), fars=many([0.1, 0.5]), replicates=one(5), seed=one(1), level=one(0.5),
        max_impostors=one(99),
    ),
    "AgeErrorProtocol": lambda one, many: evaluation.AgeErrorProtocol(
        CODES, ages=YEARS, gap_bins=many([0, 5]), age_bins=many([0, 9]), fars=many([0.1, 0.5]), replicates=one(5),
        seed=one(1), level=one(0.5),
    ),
    "LongitudinalProtocol": lambda one, many: evaluation.LongitudinalProtocol(
        CODES, YEARS, years=many([5, 20]), window=one(2.5), fars=many([0.1, 0.5]), replicates=one(5), seed=one(1),
        level=one(0.5),
    ),
    "CrossGroupProtocol": lambda one, many: evaluation.CrossGroupProtocol(
        CODES, (YEARS > 20).astype(int), probe=one(0), gallery=one(1), fars=many([0.1, 0.5]), ranks=many([1, 3]),
        replicates=one(5), seed=one(1), level=one(0.5), max_impostors=one(99),
    ),
    "DistractorProtocol": lambda one, many: evaluation.DistractorProtocol(
        CODES, ROWS[::3] + 1, fars=many([0.1, 0.5]), ranks=many([1, 3]), sizes=many([2, 4]), ages=YEARS,
        gap_bins=many([0, 5]), max_distractors=one(99), replicates=one(5), seed=one(1), level=one(0.5),
    ),
    "TemplateVerificationProtocol": lambda one, many: TemplateVerificationProtocol(
        LEFT // 2, LEFT, [0, 2, 4, 0, 1], [1, 3, 5, 2, 9], [1, 1, 1, 0, 0], fars=many([0.1, 0.5]), level=one(0.5),
    ),
    "TemplateIdentificationProtocol": lambda one, many: evaluation.TemplateIdentificationProtocol(
        LEFT // 2, LEFT, [([0, 2, 4], [0, 1, 2])], ([1, 3, 5, 7], [0, 1, 2, 3]), fpirs=many([0.1, 0.5]),
        ranks=many([1, 3]), replicates=one(5), seed=one(1), level=one(0.5),
    ),
}  # fmt: skip
PROTOCOLS = {name: partial(call, lambda x: x, tuple) for name, call in CALLS.items()}
