"""Pictures of the pairs on which models fail, and files of scores."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation import ProtocolResult
from kdlib_faces.evaluation.summary import HardPair
from kdlib_faces.harness.image_sets import file_name
from kdlib_faces.harness.tasks import EvaluationTask
from kdlib_faces.progress import progress as show

__all__ = ["FailurePicture", "failure_pictures", "write_scores"]

FORMULA = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)
HEADINGS = {
    "verification": (
        ("Genuine pairs of lowest score", "The first pairs to be rejected when the threshold rises"),
        ("Impostor pairs of highest score", "The first pairs to be accepted when the threshold falls"),
    ),
    "identification": (
        ("Missed probes with their mates", "The probes whose mate is furthest behind an impostor, with the mate on the right"),
        ("Missed probes with the impostors ahead", "The same probes, with the most similar impostor on the right"),
    ),
}  # fmt: skip


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


def failure_pictures(
    task: EvaluationTask, results: Mapping[str, ProtocolResult], num_failures: int
) -> list[FailurePicture]:
    """Return two pictures per model: of up to `num_failures` genuine pairs that it rejects, and impostor pairs that it accepts.

    A picture without pairs is left out, as where the images are not known.
    """
    pictures = []
    for number, (name, result) in enumerate(results.items()) if num_failures else ():
        headings = HEADINGS[result.describe().failures]
        hardest = result.hardest(num_failures)
        for same, kind, (title, caption) in zip((True, False), ("rejects", "accepts"), headings, strict=True):
            pairs = [row for pair in hardest if pair.same is same and (row := _shown(task, pair)) is not None]
            if pairs:
                text = f"{caption}; scores of {name}. Each identity or image is shown once."
                pictures.append(FailurePicture(f"{task.name}_{number}_{kind}", f"{title}: {name}", text, pairs))
    return pictures


def _shown(task: EvaluationTask, pair: HardPair) -> tuple[NDArray[np.uint8], NDArray[np.uint8], str] | None:
    right = pair.right if pair.right_set else task.set_row(pair.right)
    ends = (task.images[0], task.set_row(pair.left)), (task.images[pair.right_set], right)
    pixels = [images.picture(row) for images, row in ends]
    if pixels[0] is None or pixels[1] is None:
        return None
    names = [Path(images.label(row)).stem for images, row in ends]
    score = f"{pair.score:.3f}".replace("-", "−")
    return pixels[0], pixels[1], " · ".join(text for text in (score, pair.note, names[0]) if text) + f"\n{names[1]}"


def write_scores(
    folder: Path, task: EvaluationTask, results: Mapping[str, ProtocolResult], max_rows: int, *, progress: bool = False
) -> tuple[dict[str, str], int]:
    """Write one CSV file of scores per model, row by row, with at most `max_rows` rows.

    Returns:
        Model name to the path below `folder`, and the number of rows that a complete file would have.
    """
    (folder / "scores").mkdir(exist_ok=True)
    written: dict[str, str] = {}
    complete = 0
    for name, result in results.items():
        stem = f"scores/{task.name}-{file_name(name)}"
        paths = (f"{stem}{'' if number == 1 else f'-{number}'}.csv" for number in count(1))
        path = next(path for path in paths if path not in written.values())
        table = result.score_table(task.label, task.images[-1].label)
        with (folder / path).open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(table.columns)
            rows, total = islice(_escaped(table.rows), max_rows), min(max_rows, table.total)
            writer.writerows(show(rows, f"scores of {name} by {task.name}", total=total, quiet=not progress))
        written[name], complete = path, max(complete, table.total)
    return written, complete


def _escaped(rows: Iterator[Sequence[str | int | float]]) -> Iterator[tuple[str | int | float, ...]]:
    """A cell that a spreadsheet would run as a formula gets an apostrophe before it."""
    for row in rows:
        yield tuple(f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell for cell in row)


def _is_formula(text: str) -> bool:
    """Whether a text starts like a formula and is no number."""
    return text.startswith(FORMULA) and not NUMBER.fullmatch(text)
