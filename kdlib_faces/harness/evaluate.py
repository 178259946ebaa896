"""Evaluation of models by protocols: embeddings in; results, summaries and pictures out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdlib_faces.evaluation import Sampling
from kdlib_faces.evaluation.summary import ModelEntry, ProtocolSummary
from kdlib_faces.harness.artifacts import FailurePicture, failure_pictures, write_scores
from kdlib_faces.harness.image_sets import Embeddings
from kdlib_faces.harness.panel import summarize
from kdlib_faces.harness.tasks import EvaluationTask
from kdlib_faces.progress import progress as show

__all__ = ["EvaluatedModel", "EvaluationOutput", "evaluate_models"]


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A model as the evaluation sees it.

    Attributes:
        name: Key of the model in the report.
        entry: Description of the model: role, label, backbone, parameters ...
        embeddings: Name of an image set to the embeddings (n, d) of its images, normalized or not.
    """

    name: str
    entry: ModelEntry
    embeddings: Mapping[str, Embeddings]


@dataclass
class EvaluationOutput:
    """Results of several protocols for several models.

    Attributes:
        models: Model name to its description, with the result of every task in `protocols`.
        summaries: One summary per task, the entries of `evaluations` in report.json.
        pictures: Pairs of images on which the models fail, to be drawn by the report.
    """

    models: dict[str, ModelEntry]
    summaries: list[ProtocolSummary] = field(default_factory=list)
    pictures: list[FailurePicture] = field(default_factory=list)


def evaluate_models(
    tasks: Sequence[EvaluationTask],
    models: Sequence[EvaluatedModel],
    *,
    sampling: Sampling | None = None,
    num_failures: int = 6,
    score_folder: Path | None = None,
    max_score_rows: int = 1_000_000,
    progress: bool = False,
) -> EvaluationOutput:
    """Evaluate models by protocols: the pipeline of both `evaluate` and `demo`.

    Args:
        tasks: Protocols with their images.
        models: Models with their embeddings of every image set of the tasks. For images in memory, make them with
            `kdlib_faces.evaluation.embed_images(model, images)` and describe the images by `images_of_tensor`.
        sampling: Resamples of the paired differences; `Sampling()` by default.
        num_failures: Maximal number of the hardest pairs of each kind to show; 0 for none.
        score_folder: Folder below which the files `scores/TASK-MODEL.csv` are written; None for no files.
        max_score_rows: Maximal number of rows of such a file.
        progress: Show progress.

    Returns:
        The results by model, and what a report shows of them; the arguments are not changed.
    """
    output = EvaluationOutput({model.name: replace(model.entry, protocols={}) for model in models})
    for task in show(tasks, "protocols", quiet=not progress):
        results = {model.name: task.evaluate(model.embeddings) for model in models}
        for name, result in results.items():
            output.models[name].protocols[task.name] = result.to_dict()
        summary = summarize(task, results, sampling or Sampling())
        pictures = failure_pictures(task, results, num_failures)
        summary.pictures = [picture.name for picture in pictures]
        if score_folder is not None:
            summary.scores, total = write_scores(score_folder, task, results, max_score_rows, progress=progress)
            if total > max_score_rows:
                summary.notes.append(f"files of scores hold the first {max_score_rows:,} of {total:,} rows")
        output.pictures += pictures
        output.summaries.append(summary)
    return output
