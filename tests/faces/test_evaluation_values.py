"""The numbers in the results of every protocol as text, so that a change of the code that changes one of them is seen.

The inputs have few different scores, so ties are frequent, and entries of +1 and -1 in 16 dimensions, so scores are
exact on every machine. After an intended change, `python -m tests.faces.test_evaluation_values` rewrites
`result_values.txt`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdlib_faces import evaluation
from kdlib_faces.evaluation import EvaluationProtocol, evaluate
from tests.faces.evaluation_calls import PROTOCOLS, ROWS

FILE = Path(__file__).with_name("result_values.txt")

DRAW = np.random.default_rng(7)
CODES = DRAW.permutation(np.repeat(np.arange(14), [1, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 10]))
COUNT = CODES.size
AGES = DRAW.choice([2.0, 7.0, 16.0, 24.0, 33.0, 41.0, 62.0], COUNT)
GROUPS = np.where(AGES < 13, "child", np.where(AGES < 31, "young", "old"))
SIGNS = np.where(DRAW.random((14, 16)) < 0.5, -1.0, 1.0)[CODES] * np.where(DRAW.random((COUNT, 16)) < 0.22, -1.0, 1.0)
DISTRACTORS = np.where(DRAW.random((150, 16)) < 0.5, -1.0, 1.0)
DISTRACTORS[::40] = SIGNS[:4]  # images of the set among the distractors
FLAGGED = np.hstack([DISTRACTORS, (DRAW.random((150, 1)) < 0.1).astype(float)])
EVERY = np.argwhere(np.triu(np.ones((COUNT, COUNT), dtype=bool), 1))
OWN = CODES[EVERY[:, 0]] == CODES[EVERY[:, 1]]
NOISY = SIGNS + DRAW.normal(size=SIGNS.shape)  # sums of several rows have no exact length, so templates have no ties
LEFT, RIGHT = np.stack([DRAW.permutation(EVERY[kind])[:90] for kind in (OWN, ~OWN)], axis=1).reshape(-1, 2).T
TEMPLATES, MEDIA = np.arange(COUNT) // 3, np.arange(COUNT) // 2
K = np.arange(40)
FARS = (0.2, 0.01, 1e-6)
DRAWN = {"replicates": 20, "seed": 3}


def distractors(rows: Any = DISTRACTORS, **options: Any) -> EvaluationProtocol:
    return evaluation.DistractorProtocol(CODES, rows, fars=FARS, **DRAWN, **options)


TIED: dict[str, EvaluationProtocol] = {
    "pairs": evaluation.PairProtocol(LEFT, RIGHT, CODES[LEFT] == CODES[RIGHT], fars=FARS, val_fars=(0.01, 0.2)),
    "pairs, ages": evaluation.PairProtocol(
        LEFT, RIGHT, CODES[LEFT] == CODES[RIGHT], np.arange(LEFT.size) % 3, fars=FARS, threshold="exact",
        tar_mode="nearest", val_fars=(0.2,), ages=AGES, identities=CODES, train_identities=[99], notes=["a note"],
        **DRAWN,
    ),
    "leave one out": evaluation.LeaveOneOutProtocol(CODES, **DRAWN),
    "leave one out, ages": evaluation.LeaveOneOutProtocol(CODES, (1, 2, 4), ages=AGES, **DRAWN),
    "age gap": evaluation.AgeGapProtocol(CODES, ages=AGES, fars=FARS, **DRAWN),
    "age gap, groups": evaluation.AgeGapProtocol(CODES, age_groups=GROUPS, fars=FARS, max_impostors=500, **DRAWN),
    "age errors": evaluation.AgeErrorProtocol(CODES, ages=AGES, fars=FARS, **DRAWN),
    "age errors, groups": evaluation.AgeErrorProtocol(CODES, age_groups=GROUPS, fars=FARS, **DRAWN),
    "longitudinal": evaluation.LongitudinalProtocol(CODES, AGES, fars=FARS, **DRAWN),
    "longitudinal, all": evaluation.LongitudinalProtocol(
        CODES, AGES, years=(9, 25), window=4, reference="all", fars=FARS, **DRAWN
    ),
    "groups": evaluation.CrossGroupProtocol(CODES, GROUPS, probe="child", gallery="old", fars=FARS, **DRAWN),
    "groups, few": evaluation.CrossGroupProtocol(
        CODES, GROUPS, gallery="child", fars=FARS, ranks=(1, 5), max_impostors=300, **DRAWN
    ),
    "distractors": distractors(ages=AGES, sizes=(10, 100)),
    "distractors, ties": distractors(ties="wrong", ranks=(1, 3)),
    "distractors, flagged": distractors(FLAGGED, cleaning="extra_dimension", max_distractors=150),
    "distractors, no zeros": distractors(DISTRACTORS * (np.arange(150) % 9 > 0)[:, None], cleaning="exclude_zeros"),
    "distractors, zeros count": distractors(
        DISTRACTORS * (np.arange(150) % 9 > 0)[:, None], cleaning="zeros_score_0", ages=AGES, gap_bins=(0, 20)
    ),
    "template verification": evaluation.TemplateVerificationProtocol(
        TEMPLATES, MEDIA, K % 24, (K + 1 + K // 24 * 2) % 24, K % 3 == 0,
        detector_scores=AGES / 10, feature_norm="unit", fars=FARS, mode="nearest",
    ),
    "template identification": evaluation.TemplateIdentificationProtocol(
        TEMPLATES, MEDIA, [([0, 2, 4, 6, 8], [0, 1, 2, 3, 4]), ([1, 3, 5, 7, 9], [5, 6, 7, 8, 9])],
        (np.arange(10, 24), np.arange(14) % 12), fpirs=(0.5, 0.01), ranks=(1, 2), **DRAWN,
    ),
}  # fmt: skip


def leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Each value below a path; the entries of a list have one path."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.repr}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
        yield path, "/".join(text for _, text in leaves([entry for entry in value.values() if entry != ""], path))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry, f"{path}[]")
    elif isinstance(value, float):
        yield path, f"{round(value, 6) + 0.0:.6g}"
    else:
        yield path, str(value)


def shown(part: str, value: object) -> Iterator[str]:
    """A line for each path: its values, and of long lists the first, the last and some between."""
    grouped: dict[str, list[str]] = {}
    for path, text in leaves(value, part):
        grouped.setdefault(path, []).append(text)
    for path, texts in grouped.items():
        some = (
            texts
            if len(texts) <= 24
            else [*texts[:: len(texts) // 12], texts[-1], f"({len(texts)}, {texts.count('True')} true)"]
        )
        yield f"{path}: {' '.join(some)}"


def listing(rows: Any, protocol: EvaluationProtocol) -> list[str]:
    result = evaluate(rows, protocol)
    table = result.score_table(lambda row: f"i{row}", lambda row: f"d{row}")
    parts = {
        "to_dict": result.to_dict(),
        "summary": result.summary(),
        "outcomes": {
            key: [each.hits, each.verb] if isinstance(each, evaluation.Outcomes) else each.to_dict()
            for key, each in result.outcomes().items()
        },
        "counts": result.describe().counts,
        "bins": result.describe().bins,
        "hardest": [" ".join(text for _, text in leaves(each, "")) for each in result.hardest(5)],
        "rows": [" ".join(map(str, row)) for row in table.rows],
        "repr": [repr(protocol)],
    }
    return [line for part, value in parts.items() for line in shown(part, value)]


def text_of(name: str) -> str:
    rows = ROWS if name in PROTOCOLS else NOISY if "template" in name else SIGNS
    lines = listing(rows, PROTOCOLS[name]() if name in PROTOCOLS else TIED[name])
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [*PROTOCOLS, *TIED])
def test_values_agree_with_the_file(name: str) -> None:
    _, _, stored = FILE.read_text("utf-8").partition(f"== {name} ==\n")
    assert text_of(name) == stored.partition("\n== ")[0].rstrip("\n") + "\n"


if __name__ == "__main__":
    FILE.write_text("\n".join(f"== {name} ==\n{text_of(name)}" for name in [*PROTOCOLS, *TIED]), "utf-8")
