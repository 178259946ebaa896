"""The numbers in the results of every protocol and function as text, so that a change of the code that changes one of them is seen.

The inputs have few different scores, so ties are frequent, and entries of +1 and -1 in 16 dimensions, so scores are
exact on every machine. After an intended change, `python -m tests.faces.test_evaluation_values` rewrites
`result_values.txt`.
"""

from collections.abc import Callable, Iterator, Mapping
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
LEFT, RIGHT = np.stack([DRAW.permutation(EVERY[kind])[:90] for kind in (OWN, ~OWN)], axis=1).reshape(-1, 2)[:-1].T
TEMPLATES, MEDIA = np.arange(COUNT) // 3, np.arange(COUNT) // 2
K = np.arange(40)
FARS = (0.2, 0.01, 1e-6)
DRAWN = {"replicates": 20, "seed": 3}


def distractors(rows: Any = DISTRACTORS, **options: Any) -> EvaluationProtocol:
    return evaluation.DistractorProtocol(CODES, rows, fars=FARS, **DRAWN, **options)


TIED: dict[str, Callable[[], EvaluationProtocol]] = {
    "pairs": lambda: evaluation.PairProtocol(LEFT, RIGHT, CODES[LEFT] == CODES[RIGHT], fars=FARS, val_fars=(0.01, 0.2)),
    "pairs, ages": lambda: evaluation.PairProtocol(
        LEFT, RIGHT, CODES[LEFT] == CODES[RIGHT], np.arange(LEFT.size) % 3, fars=FARS, threshold="exact",
        tar_mode="nearest", val_fars=(0.2,), ages=AGES, identities=CODES, train_identities=[99], notes=["a note"],
        **DRAWN,
    ),
    "leave one out": lambda: evaluation.LeaveOneOutProtocol(CODES, **DRAWN),
    "leave one out, ages": lambda: evaluation.LeaveOneOutProtocol(CODES, (1, 2, 4), ages=AGES, **DRAWN),
    "age gap": lambda: evaluation.AgeGapProtocol(CODES, ages=AGES, fars=FARS, **DRAWN),
    "age gap, groups": lambda: evaluation.AgeGapProtocol(CODES, age_groups=GROUPS, fars=FARS, max_impostors=500, **DRAWN),
    "age errors": lambda: evaluation.AgeErrorProtocol(CODES, ages=AGES, fars=FARS, **DRAWN),
    "age errors, groups": lambda: evaluation.AgeErrorProtocol(CODES, age_groups=GROUPS, fars=FARS, **DRAWN),
    "longitudinal": lambda: evaluation.LongitudinalProtocol(CODES, AGES, fars=FARS, **DRAWN),
    "longitudinal, all": lambda: evaluation.LongitudinalProtocol(
        CODES, AGES, years=(9, 25), window=4, reference="all", fars=FARS, **DRAWN
    ),
    "groups": lambda: evaluation.CrossGroupProtocol(CODES, GROUPS, probe="child", gallery="old", fars=FARS, **DRAWN),
    "groups, few": lambda: evaluation.CrossGroupProtocol(
        CODES, GROUPS, gallery="child", fars=FARS, ranks=(1, 5), max_impostors=300, **DRAWN
    ),
    "distractors": lambda: distractors(ages=AGES, sizes=(10, 100)),
    "distractors, ties": lambda: distractors(ties="wrong", ranks=(1, 3)),
    "distractors, flagged": lambda: distractors(FLAGGED, cleaning="extra_dimension", max_distractors=150),
    "distractors, no zeros": lambda: distractors(DISTRACTORS * (np.arange(150) % 9 > 0)[:, None], cleaning="exclude_zeros"),
    "distractors, zeros count": lambda: distractors(
        DISTRACTORS * (np.arange(150) % 9 > 0)[:, None], cleaning="zeros_score_0", ages=AGES, gap_bins=(0, 20)
    ),
    "template verification": lambda: evaluation.TemplateVerificationProtocol(
        TEMPLATES, MEDIA, K % 24, (K + 1 + K // 24 * 2) % 24, K % 3 == 0,
        detector_scores=AGES / 10, feature_norm="unit", fars=FARS, mode="nearest",
    ),
    "template identification": lambda: evaluation.TemplateIdentificationProtocol(
        TEMPLATES, MEDIA, [([0, 2, 4, 6, 8], [0, 1, 2, 3, 4]), ([1, 3, 5, 7, 9], [5, 6, 7, 8, 9])],
        (np.arange(10, 24), np.arange(14) % 12), fpirs=(0.5, 0.01), ranks=(1, 2), **DRAWN,
    ),
}  # fmt: skip


def leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Each value below a path; the entries of a list have one path."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value) if field.repr}
    if isinstance(value, np.ndarray):
        yield f"{path} dtype", str(value.dtype)
        value = value.tolist()
    if isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys():
        yield path, "/".join(text for _, text in leaves([entry for entry in value.values() if entry != ""], path))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from leaves(entry, f"{path}[]")
    elif isinstance(value, (float, np.floating)):
        yield path, f"{round(float(value), 6) + 0.0:.6g}"
    else:
        yield path, str(value)


def of_all(texts: list[str]) -> str:
    """The number of values, and a number that changes with each of them."""
    known = {"True": 1.0, "False": 0.0, "None": 0.0}
    try:
        numbers = [known[text] if text in known else float(text) for text in texts]
    except ValueError:
        return str(len(texts))
    return f"{len(texts)} values, weighted mean {np.dot(numbers, np.arange(len(numbers))) / len(numbers) ** 2:.4f}"


def shown(part: str, value: object) -> Iterator[str]:
    """A line for each path: its values, and of long lists the first, the last and some between."""
    grouped: dict[str, list[str]] = {}
    for path, text in leaves(value, part):
        grouped.setdefault(path, []).append(text)
    for path, texts in grouped.items():
        some = texts if len(texts) <= 24 else [*texts[:: len(texts) // 12], texts[-1], f"({of_all(texts)})"]
        yield f"{path}: {' '.join(some)}"


def short(cell: object) -> str:
    """A cell of a table; of a score, which may come from numbers of single precision, five digits."""
    return f"{float(cell):.5f}" if isinstance(cell, str) and "." in cell else str(cell)


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
        "rows": [" ".join(map(short, row)) for row in table.rows],
        "repr": [repr(protocol)],
    }
    return [line for part, value in parts.items() for line in shown(part, value)]


COSINES = SIGNS @ SIGNS.T / 16
SAME = CODES[LEFT] == CODES[RIGHT]
GENUINE, IMPOSTOR = (COSINES[LEFT, RIGHT][kind] for kind in (SAME, ~SAME))
HITS, OTHER_HITS = DRAW.random((2, COUNT)) < [[0.7], [0.4]]
NAMED = np.array([f"n{code}" for code in CODES])
BLOCKS = (DRAW.random((11, 3, 4, 4)) * 255).astype(np.uint8)


def pixels(x: Any) -> Any:
    return x.flatten(1)[:, ::7]


def search(**options: Any) -> Any:
    return evaluation.identify_with_distractors(SIGNS, CODES, DISTRACTORS, fars=(0.01,), **DRAWN, **options)


def templates(**options: Any) -> Any:
    return evaluation.pool_templates(NOISY, TEMPLATES, MEDIA, **options)


def results() -> dict[str, Any]:
    return {name: TIED["age gap"]().evaluate(rows) for name, rows in (("good", SIGNS), ("bad", NOISY))}


FUNCTIONS: dict[str, Callable[[], object]] = {
    "auc": lambda: [evaluation.auc(GENUINE, IMPOSTOR), evaluation.auc(IMPOSTOR, GENUINE), evaluation.auc([1], [1, 0])],
    "clustered_rate": lambda: evaluation.clustered_rate(HITS, CODES, **DRAWN),
    "clustered_rate, level": lambda: evaluation.clustered_rate(HITS, NAMED, replicates=50, level=0.5),
    "compare": lambda: evaluation.compare(results(), "good", "bad"),
    "embed_images": lambda: evaluation.embed_images(pixels, BLOCKS, batch_size=4),
    "embed_images, as they are": lambda: evaluation.embed_images(pixels, BLOCKS[:3], flip=False, normalize=False),
    "identify_with_distractors": lambda: [search().to_dict(), search(ties="wrong", ages=AGES).to_dict()],
    "identity_bootstrap": lambda: evaluation.identity_bootstrap(CODES, replicates=3, seed=2),
    "identity_disjoint_split": lambda: evaluation.identity_disjoint_split(NAMED, (0.5, 0.3, 0.2), seed=5),
    "identity_overlap": lambda: [evaluation.identity_overlap(NAMED[:20], NAMED[30:50])],
    "leave_one_out": lambda: evaluation.leave_one_out(SIGNS, CODES, (1, 2, 5)),
    "pair_set": lambda: [
        evaluation.pair_set(name, LEFT, RIGHT, SAME, fold_ids=K.repeat(5)[: LEFT.size], notes=["own"])
        .evaluate(SIGNS)
        .notes
        for name in ("lfw", "cfp_fp", "agedb_30")
    ],
    "paired_test": lambda: evaluation.paired_test(HITS, OTHER_HITS, replicates=20),
    "paired_test, identities": lambda: evaluation.paired_test(
        HITS, OTHER_HITS, identities=CODES, other_identities=CODES[::-1], level=0.8, **DRAWN
    ),
    "paired_difference": lambda: evaluation.paired_difference(
        *(each.all.auc for each in results().values()), level=0.5
    ),
    "pool_templates": lambda: [templates(), templates(detector_scores=AGES / 10, feature_norm="unit")],
    "positives_first_folds": lambda: evaluation.positives_first_folds(np.sort(SAME)[::-1], 7),
    "roc_points": lambda: [evaluation.roc_points(GENUINE, IMPOSTOR, 9), evaluation.roc_points(IMPOSTOR, GENUINE)],
    "tar_at_far": lambda: [
        evaluation.tar_at_far(GENUINE, IMPOSTOR, far, mode=mode, level=0.8).to_dict()
        for far in (1, 0.5, 0.1, 0.03, 0.01, 0.001)
        for mode in ("exact", "nearest")
    ],
    "template_verification": lambda: evaluation.template_verification(
        NOISY, TEMPLATES, MEDIA, K % 24, (K + 1 + K // 24 * 2) % 24, K % 3 == 0, fars=(0.1,)
    ).to_dict(),
    "verify_pairs": lambda: [
        evaluation.verify_pairs(
            SIGNS[LEFT], SIGNS[RIGHT], SAME, threshold=threshold, val_fars=(0.1,), **options
        ).to_dict()
        for threshold in ("grid", "exact", "facexzoo")
        for options in ({}, {"fold_ids": np.arange(LEFT.size) // 2 % 4})
    ],
    "verify_pairs, pca": lambda: evaluation.verify_pairs(NOISY[LEFT], NOISY[RIGHT], SAME, pca=3).to_dict(),
    "wilson": lambda: [evaluation.wilson(k, 7, level=level) for k in (0, 3, 7) for level in (0.5, 0.95)],
}


def text_of(name: str) -> str:
    if name in FUNCTIONS:
        return "\n".join(shown("value", FUNCTIONS[name]())) + "\n"
    rows = ROWS if name in PROTOCOLS else NOISY if "template" in name else SIGNS
    lines = listing(rows, (PROTOCOLS | TIED)[name]())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [*PROTOCOLS, *TIED, *FUNCTIONS])
def test_values_agree_with_the_file(name: str) -> None:
    _, _, stored = FILE.read_text("utf-8").partition(f"== {name} ==\n")
    assert text_of(name) == stored.partition("\n== ")[0].rstrip("\n") + "\n"


def test_no_more_components_are_kept_than_there_are_dimensions() -> None:
    with pytest.raises(ValueError, match="pca must be a whole number and >= 1 and <= 16, got 17"):
        evaluation.verify_pairs(NOISY[LEFT], NOISY[RIGHT], SAME, pca=17)


LIMITS = {
    "matching.search.BLOCK": 7, "matching.search.CELLS": 40, "matching.search.PAIRS": 5,
    "matching.search.MANY": 2, "matching.galleries.BLOCK": 3, "matching.templates.BLOCK": 3, "matching.pair_scores.ROWS": 3,
    "matching.pair_scores.PAIRS": 5, "matching.pair_scores.SPARSE": 0.3, "statistics.clustered.ROWS": 3,
    "statistics.resampling.BLOCK": 4, "_checks.CELLS": 40, "_checks.SCORES": 60, "protocols.leave_one_out.BLOCK": 3,
    "protocols.distractors.BLOCK": 7, "matching.all_pairs.ROWS": 3, "hardest.BLOCK": 3, "_labels.MAX_TABLE": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", [*PROTOCOLS, *TIED, *FUNCTIONS])
def test_values_do_not_depend_on_the_sizes_of_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, size in LIMITS.items():
        monkeypatch.setattr(f"kdlib_faces.evaluation.{limit}", size)
    _, _, stored = FILE.read_text("utf-8").partition(f"== {name} ==\n")
    assert text_of(name) == stored.partition("\n== ")[0].rstrip("\n") + "\n"


if __name__ == "__main__":
    FILE.write_text("\n".join(f"== {name} ==\n{text_of(name)}" for name in [*PROTOCOLS, *TIED, *FUNCTIONS]), "utf-8")
