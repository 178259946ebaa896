"""Evaluation of models by protocols: embeddings in; results, summaries and pictures out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.evaluation.summary import (
    Bins,
    CmcCurve,
    Difference,
    Histogram,
    Measure,
    MeasuredValue,
    ModelSummary,
    ProtocolSummary,
    RocCurve,
    SearchCurve,
)
from kdlib_faces.harness.artifacts import FailurePicture, failure_pictures, write_scores
from kdlib_faces.harness.tasks import EvaluationTask
from kdlib_faces.progress import progress as show

__all__ = ["EvaluatedModel", "EvaluationOutput", "evaluate_models"]


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A model as the evaluation sees it.

    Attributes:
        name: Key of the model in the report.
        facts: Entry of the model in report.json without its `protocols`: role, label, backbone, parameters ...
        embeddings: Name of an image set to the embeddings (n, d) of its images, normalized or not.
    """

    name: str
    facts: dict[str, Any]
    embeddings: Mapping[str, NDArray[np.floating[Any]]]


@dataclass
class EvaluationOutput:
    """Results of several protocols for several models.

    Attributes:
        models: Model name to its entry in report.json: its facts, and `protocols` with the result of every task.
        summaries: One summary per task, the entries of `evaluations` in report.json.
        pictures: Pairs of images on which the models fail, to be drawn by the report.
    """

    models: dict[str, dict[str, Any]]
    summaries: list[ProtocolSummary] = field(default_factory=list)
    pictures: list[FailurePicture] = field(default_factory=list)


def evaluate_models(
    tasks: Sequence[EvaluationTask],
    models: Sequence[EvaluatedModel],
    *,
    score_folder: Path | None = None,
    max_score_rows: int = 1_000_000,
    progress: bool = False,
) -> EvaluationOutput:
    """Evaluate models by protocols: the pipeline of both `evaluate` and `demo`.

    Args:
        tasks: Protocols with their images, see `task_of_protocol`.
        models: Models with their embeddings of every image set of the tasks. For images in memory, make them with
            `kdlib_faces.evaluation.embed_images(model, images)` and describe the images by `images_of_tensor`.
        score_folder: Folder below which the files `scores/TASK-MODEL.csv` are written; None for no files.
        max_score_rows: Maximal number of rows of such a file.
        progress: Show progress.

    Returns:
        The results.
    """
    names = [model.name for model in models]
    output = EvaluationOutput({model.name: {**model.facts, "protocols": {}} for model in models})
    for task in show(tasks, "protocols", quiet=not progress):
        given = {images.name: {model.name: model.embeddings[images.name] for model in models} for images in task.images}
        result = task.judge(given)
        for name, entry in result.results.items():
            output.models[name]["protocols"][task.name] = entry
        pictures = failure_pictures(result, task, names)
        summary = _summary(result.entry)
        summary.pictures = [picture.name for picture in pictures]
        if score_folder is not None and result.scores is not None:
            summary.scores = write_scores(score_folder, result, task, names, max_score_rows, progress=progress)
            if result.scores.total > max_score_rows:
                summary.notes.append(
                    f"files of scores hold the first {max_score_rows:,} of {result.scores.total:,} rows"
                )
        output.pictures += pictures
        output.summaries.append(summary)
    return output


def _summary(entry: dict[str, Any]) -> ProtocolSummary:
    kinds: dict[str, Any] = {"roc": RocCurve, "cmc": CmcCurve, "search": SearchCurve, "histogram": Histogram}
    return ProtocolSummary(
        **{key: entry[key] for key in ("name", "title", "question", "convention", "counts", "notes") if key in entry},
        measures={key: Measure(**each) for key, each in entry.get("measures", {}).items()},
        bins={key: Bins(**each) for key, each in entry.get("bins", {}).items()},
        models={
            name: ModelSummary(
                measures={key: MeasuredValue(**each) for key, each in model.get("measures", {}).items()},
                bins={
                    key: [MeasuredValue(**(row or {})) for row in rows] for key, rows in model.get("bins", {}).items()
                },
                **{key: kind(**model[key]) for key, kind in kinds.items() if key in model},
            )
            for name, model in entry["models"].items()
        },
        differences=[
            Difference(row["a"], row["b"], row["measure"], MeasuredValue(**row["difference"]))
            for row in entry.get("differences", ())
        ],
        difference_rule=entry.get("difference_rule", ""),
    )
