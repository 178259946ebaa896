"""Preparation of an evaluation: files are opened and checked, images are embedded."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces._hardware import Hardware
from kdlib_faces.data.image_files import describe_far_sizes
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.evaluation.summary import DataSummary, ModelEntry
from kdlib_faces.harness.embeddings import OpenedModel, embed_set, open_model, read_embeddings
from kdlib_faces.harness.evaluate import EvaluatedModel
from kdlib_faces.harness.image_sets import OF_EMBEDDINGS, ImageSet, images_of_source
from kdlib_faces.harness.lists import tasks_of_faces
from kdlib_faces.harness.registry import PROTOCOLS
from kdlib_faces.harness.tasks import EvaluateConfig, EvaluationTask, ProtocolSpec, Settings, parse_protocol
from kdlib_faces.progress import say
from kdlib_faces.teachers.input_options import InputOptions, inputs_of_models

__all__ = ["PreparedEvaluation", "prepare"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class PreparedEvaluation:
    """Everything that `evaluate_models` needs, read and checked.

    Attributes:
        tasks: Protocols with their images.
        models: Models with their embeddings.
        data: Description of the data for the report.
    """

    tasks: list[EvaluationTask]
    models: list[EvaluatedModel]
    data: DataSummary


def prepare(
    config: EvaluateConfig,
    *,
    work: Path,
    data: Sequence[PathLike] = (),
    models: Sequence[PathLike] = (),
    inputs: Sequence[str] = (),
    embeddings: Sequence[PathLike] = (),
    pairs: PathLike | None = None,
    protocols: Sequence[str] = (),
    progress: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    hardware: Hardware | None = None,
    workers: int = 2,
) -> PreparedEvaluation:
    """Read protocols, models and embeddings, and embed the images that are missing from a model's embeddings.

    Args:
        config: Settings.
        work: Folder in which embeddings are kept; an interrupted run continues from it.
        data: Face lists, as `read_faces` takes them; for protocols without images of their own.
        models: `.onnx` or weight files, or `NAME=FILE` to name them in the report.
        inputs: Input options of the models, as `InputOptions.parse` reads them: one text for all, or one for each.
        embeddings: `.npy` files (n, d), rows in the order of the images; or folders with one such file per image set,
            named after it: `lfw.npy`, `fgnet.npy`, and `faces.npy` for those of `data`; or `NAME=FILE`.
        pairs: A pairs file in the format of LFW, on the images of `data`.
        protocols: `NAME[=PATH][,key=PATH ...]` each; without any, all that the lists of `data` allow.
        progress: Show progress.
        on_error: Whether images of `data` that cannot be read stop the evaluation; see `read_faces`.
        hardware: Device of the models, and the processes that share the images; None for this process on the CPU.
        workers: Threads that decode images.

    Returns:
        The tasks, and the models with their embeddings of every image set of the tasks.

    Raises:
        InputError: A file is not usable, or there is nothing to evaluate.
    """
    if not models and not embeddings:
        raise InputError("evaluate: at least one model or one file of embeddings is needed, got none")
    for what, given, limit in (("models", [*models, *embeddings], 100), ("protocols", protocols, 100)):
        if len(given) > limit:
            raise InputError(f"evaluate: at most {limit} {what} are evaluated at once, got {len(given)}")
    if not data and not protocols:
        raise InputError("evaluate: --data or --protocol must be given, got neither")
    face_list = read_faces(data, on_error=on_error) if data else None
    settings = _settings(config, face_list, progress)
    tasks, notes = _tasks(settings, protocols, pairs)
    if not tasks:
        raise InputError(f"evaluate: nothing can be measured on {', '.join(map(str, data))}: {'; '.join(notes)}")
    if embeddings:
        alignment = "{}; embeddings from files as they are" if models else OF_EMBEDDINGS
        tasks = [
            replace(task, convention={**task.convention, "Alignment": alignment.format(task.alignment)})
            for task in tasks
        ]
    embedding = _Embedding(config, work, progress, hardware or Hardware(), workers)
    evaluated = _models(embedding, models, inputs, embeddings, tasks, notes)
    return PreparedEvaluation(
        tasks, evaluated, _data(settings, tasks, [*notes, *(() if face_list is None else face_list.notes)])
    )


def _settings(config: EvaluateConfig, faces: FaceList | None, progress: bool) -> Settings:
    flip = "embedding of the mirrored image added before normalizing" if config.flip else "plain image only"
    convention = {"Flip": f"{flip}; embeddings from files as they are"}
    images = None if faces is None else images_of_source("faces", faces.images)
    return Settings(config, faces, images, convention, progress)


def _tasks(
    settings: Settings, protocols: Sequence[str], pairs: PathLike | None
) -> tuple[list[EvaluationTask], list[str]]:
    """The tasks of all protocols, each with its own name, and notes on what the face lists do not allow."""
    tasks: list[EvaluationTask] = []
    notes: list[str] = []
    if settings.faces is not None and not protocols:
        tasks, notes = tasks_of_faces(settings)
    specs = [parse_protocol(text, PROTOCOLS) for text in protocols]
    if pairs is not None:
        spec = ProtocolSpec("pairs", Path(pairs), {}, f"pairs={os.fspath(pairs)}")
        tasks += PROTOCOLS["pairs"].build(spec, settings, "verification")
    counts: dict[str, int] = {}
    for spec in specs:
        counts[spec.name] = counts.get(spec.name, 0) + 1
        name = spec.name if counts[spec.name] == 1 else f"{spec.name}_{counts[spec.name]}"
        tasks += PROTOCOLS[spec.name].build(spec, settings, name)
    return tasks, notes


@dataclass(frozen=True)
class _Embedding:
    """Settings with which models are opened and run."""

    config: EvaluateConfig
    work: Path
    progress: bool
    hardware: Hardware
    workers: int

    def open(self, path: Path, input_options: InputOptions) -> OpenedModel:
        return open_model(
            path, self.config.input_size, input_options, device=self.hardware.device, compile=self.config.compile,
            quiet=not self.progress,
        )  # fmt: skip

    def run(self, model: OpenedModel, images: ImageSet) -> NDArray[np.float32]:
        return embed_set(
            model, images, self.work, batch_size=self.config.batch_size, flip=self.config.flip, progress=self.progress,
            hardware=self.hardware, amp=self.config.amp, workers=self.workers,
        )  # fmt: skip


def _models(
    embedding: _Embedding,
    models: Sequence[PathLike],
    inputs: Sequence[str],
    embeddings: Sequence[PathLike],
    tasks: Sequence[EvaluationTask],
    notes: list[str],
) -> list[EvaluatedModel]:
    """Models and embeddings, each with its own name; every file is opened before any model runs.

    Images far from the size of a model are added to `notes`: they are probably photographs instead of aligned crops.
    """
    sets: dict[str, ImageSet] = {}
    for images in (images for task in tasks for images in task.images):
        if sets.setdefault(images.name, images).fingerprint != images.fingerprint:
            raise InputError(
                f"evaluate: two sets of different images are called {images.name!r}; measure one at a time"
            )
    names = _names([*models, *embeddings])
    given = []
    for name, path in names[len(models) :]:
        files = {each: path / f"{each}.npy" if path.is_dir() else path for each in sets}
        arrays = {each: read_embeddings(files[each], images.count) for each, images in sets.items()}
        given.append(EvaluatedModel(name, ModelEntry("student", name, "embeddings from a file"), arrays))
    options = inputs_of_models(inputs, len(models))
    opened = [
        (name, embedding.open(path, each)) for (name, path), each in zip(names[: len(models)], options, strict=True)
    ]
    for images in sets.values() if opened else ():
        images.check_images()
    if opened:
        say(f"device: {embedding.hardware.describe(embedding.config.amp)}", quiet=not embedding.progress)
    far = (describe_far_sizes(images.sources, model.size) for _, model in opened for images in sets.values())
    notes += dict.fromkeys(filter(None, far))
    evaluated = []
    for name, model in opened:
        made = {each: embedding.run(model, images) for each, images in sets.items()}
        evaluated.append(EvaluatedModel(name, replace(model.entry, label=name), made))
    return evaluated + given


def _names(given: Sequence[PathLike]) -> list[tuple[str, Path]]:
    """Name and path of each file: as in `NAME=FILE`, else its stem, with its folders where other files have that stem."""
    texts = [os.fspath(each) for each in given]
    parts = [text.partition("=") if "=" in text and not os.path.exists(text) else ("", "", text) for text in texts]
    paths = [Path(file) for _, _, file in parts]
    steps = [(*path.parent.parts, path.stem) for path in map(Path.absolute, paths)]
    names: list[str] = []
    for at, (name, _, _) in enumerate(parts):
        others = [steps[other] for other, (named, _, _) in enumerate(parts) if other != at and not named]
        depths = (n for n in range(1, len(steps[at]) + 1) if all(each[-n:] != steps[at][-n:] for each in others))
        depth = next(depths, 0)
        names.append(name or ("/".join(steps[at][-depth:]) if depth else f"{steps[at][-1]} ({at + 1})"))
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"evaluate: two models are named {name!r}; name them as in --model NAME=FILE")
    return list(zip(names, paths, strict=True))


def _data(settings: Settings, tasks: Sequence[EvaluationTask], notes: list[str]) -> DataSummary:
    data = DataSummary(notes=notes)
    names = dict.fromkeys(images.name for task in tasks for images in task.images)
    if settings.faces is not None:
        data.test_images, data.test_identities = len(settings.faces), settings.faces.num_identities
        lists = ", ".join(Path(source).name for source in settings.faces.sources)
        names = dict.fromkeys(lists if name == "faces" else name for name in names)
    data.name = ", ".join(names)
    return data
