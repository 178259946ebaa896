"""Recipe: what `evaluate` writes beside the report: pictures of the worst pairs, files of scores."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.harness.image_sets import ImageSet
from kdlib_faces.harness.panels import HardPair, ProtocolResult
from kdlib_faces.harness.tasks import EvaluationTask
from kdlib_faces.progress import progress as show

__all__ = ["FailurePicture", "failure_pictures", "write_scores"]

FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, eq=False)
class FailurePicture:
    """Pairs of images on which a model fails.

    Attributes:
        name: File name without suffix.
        title: Heading.
        caption: Text below it.
        pairs: Left image, right image (h, w, 3) uint8, and the text below the pair.
    """

    name: str
    title: str
    caption: str
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]


def failure_pictures(found: ProtocolResult, task: EvaluationTask, names: Sequence[str]) -> list[FailurePicture]:
    """Two pictures a model: pairs of one person that it tells apart, and different people it takes for one.

    Args:
        found: of the task.
        task: whose sets hold the images.
        names: the models, in the order of the report.

    Returns:
        Pictures for the report; none where the set has no images.
    """
    pictures = []
    for number, name in enumerate(names):
        for same, kind, (title, why) in (
            (True, "rejects", found.words.same),
            (False, "accepts", found.words.different),
        ):
            chosen = [pair for pair in found.worst.get(name, ()) if pair.same is same]
            drawn = [row for pair in chosen if (row := _drawn(task.images, pair)) is not None]
            if drawn:
                caption = f"As {name} sees them, {why}. A person, or an image, is shown once."
                pictures.append(FailurePicture(f"{task.name}_{number}_{kind}", f"{title}: {name}", caption, drawn))
    return pictures


def _drawn(sets: Sequence[ImageSet], pair: HardPair) -> tuple[Any, Any, str] | None:
    ends = ((sets[0], pair.left), (sets[pair.other], pair.right))
    left, right = (images.picture(row) for images, row in ends)
    if left is None or right is None:
        return None
    named = [Path(images.label(row)).stem for images, row in ends]
    score = f"{pair.score:.3f}".replace("-", "−")
    told = " · ".join(part for part in (score, pair.note, named[0]) if part)
    return left, right, f"{told}\n{named[1]}"


def write_scores(
    stage: Path, found: ProtocolResult, task: EvaluationTask, names: Sequence[str], most: int, *, progress: bool = False
) -> dict[str, str]:
    """One CSV a model, written row by row; no more than `most` rows.

    Returns:
        Model -> path below `stage`.
    """
    assert found.scores is not None
    (stage / "scores").mkdir(exist_ok=True)
    written = {}
    for name in names:
        inside = f"scores/{task.name}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.csv"
        with (stage / inside).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(found.scores.columns)
            rows = islice(_safe(found.scores.rows(name)), most)
            total = min(most, found.scores.total)
            writer.writerows(show(rows, f"scores of {name} by {task.name}", total=total, quiet=not progress))
        written[name] = inside
    return written


def _safe(rows: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """A cell that a spreadsheet would take for a formula gets an apostrophe before it."""
    for row in rows:
        yield tuple(
            f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) and not _is_number(cell) else cell
            for cell in row
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
