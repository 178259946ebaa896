"""Recipe: evaluate models, or embeddings that another framework made, by any protocols, and write a report.

First every file is opened and checked, then embeddings are made and kept under `OUTPUT/work`, then each protocol judges all
models together; the report appears when all is done. A run that was stopped goes on where it was.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.evaluation._checks import check_level
from kdlib_faces.harness.embeddings import (
    embed,
    embed_faces,
    embed_set,
    load_model,
    open_model,
    read_embeddings,
)
from kdlib_faces.harness.evaluate import EvaluatedModel
from kdlib_faces.harness.image_sets import ImageSet, images_of_files
from kdlib_faces.harness.lists import tasks_of_faces
from kdlib_faces.harness.published import pairs_task
from kdlib_faces.harness.registry import PROTOCOLS
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, parse_protocol

__all__ = ["EvaluateConfig", "Prepared", "embed", "embed_faces", "load_model", "prepare", "read_embeddings"]


@dataclass(frozen=True)
class EvaluateConfig:
    """How models are evaluated.

    Attributes:
        batch_size: images in one forward.
        input_size: side of the images, pixels; None takes the model's own.
        flip: add the embedding of the mirrored image before normalizing.
        bins: lower edges of the bins of age gaps, years; the last is open.
        fars: false accept rates that TAR is told at.
        ranks: ranks of identification.
        threshold: of pair verification: `"grid"` as published figures have it, `"exact"`, or `"facexzoo"`.
        replicates: bootstrap replicates of the intervals.
        level: confidence of the intervals.
        seed: of the bootstrap.
        num_failures: how many of the worst pairs of each kind to show, 0 for none.
        score_rows: the most rows of a file of scores.
    """

    batch_size: int = 64
    input_size: int | None = None
    flip: bool = True
    bins: tuple[float, ...] = (0, 5, 10, 20, 30)
    fars: tuple[float, ...] = (1e-2, 1e-3)
    ranks: tuple[int, ...] = (1, 5)
    threshold: Literal["grid", "exact", "facexzoo"] = "grid"
    replicates: int = 500
    level: float = 0.95
    seed: int = 0
    num_failures: int = 6
    score_rows: int = 1_000_000

    def __post_init__(self) -> None:
        check_number("EvaluateConfig", "batch_size", self.batch_size, min=1, integer=True)
        check_number("EvaluateConfig", "num_failures", self.num_failures, min=0, max=24, integer=True)
        check_number("EvaluateConfig", "score_rows", self.score_rows, min=1, integer=True)
        check_number("EvaluateConfig", "replicates", self.replicates, min=0, integer=True)
        check_number("EvaluateConfig", "seed", self.seed, min=0, integer=True)
        check_level("EvaluateConfig", self.level)
        for name, least in (("bins", 0), ("ranks", 1)):
            if not getattr(self, name):
                raise InputError(f"EvaluateConfig: {name} must not be empty, got ()")
            for each in getattr(self, name):
                check_number("EvaluateConfig", name, each, min=least, integer=name == "ranks")
        if list(self.bins) != sorted(set(self.bins)):
            raise InputError(f"EvaluateConfig: bins must rise from the first, got {self.bins}")
        for far in self.fars:
            check_number("EvaluateConfig", "fars", far, above=0, max=1)
        if self.input_size is not None:
            check_number("EvaluateConfig", "input_size", self.input_size, min=8, integer=True)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that `evaluate_models` needs, read and checked.

    Attributes:
        tasks: Protocols with their images.
        models: Models with their embeddings.
        data: Entry `data` of report.json.
    """

    tasks: list[EvaluationTask]
    models: list[EvaluatedModel]
    data: dict[str, Any]


def prepare(
    config: EvaluateConfig,
    *,
    work: Path,
    faces: Sequence[str | os.PathLike[str]] = (),
    models: Sequence[str | os.PathLike[str]] = (),
    embeddings: Sequence[str | os.PathLike[str]] = (),
    pairs: str | os.PathLike[str] | None = None,
    protocols: Sequence[str] = (),
    progress: bool = False,
) -> Prepared:
    """Read protocols, models and embeddings, and embed the images that a model has not embedded yet.

    Args:
        config: Settings.
        work: Folder in which embeddings are kept; an interrupted run continues from it.
        faces: Face lists, as `read_faces` takes them; for protocols without images of their own.
        models: `.onnx` or weight files.
        embeddings: `.npy` files (n, d), rows in the order of the images; or folders with one such file per image set,
            named after it: `lfw.npy`, `fgnet.npy`, and `faces.npy` for the lists of `faces`.
        pairs: A pairs file in the format of LFW, on `faces`.
        protocols: `NAME[=PATH][,key=PATH ...]` each; without any, all that the lists of `faces` allow.
        progress: Show progress.

    Raises:
        InputError: A file is not usable, or there is nothing to evaluate.
    """
    if not models and not embeddings:
        raise InputError("evaluate: at least one model or one file of embeddings is needed, got none")
    if not faces and not protocols:
        raise InputError("evaluate: --faces or --protocol must be given: what is to be measured?")
    listed = read_faces(faces) if faces else None
    settings = _settings(config, listed, progress)
    tasks, notes = _tasks(settings, protocols, pairs)
    if not tasks:
        raise InputError(f"evaluate: nothing can be measured on {', '.join(map(str, faces))}: {'; '.join(notes)}")
    return Prepared(tasks, _sources(config, models, embeddings, tasks, work, progress), _data(settings, tasks, notes))


def _settings(config: EvaluateConfig, listed: FaceList | None, progress: bool) -> Settings:
    flip = "embedding of the mirrored image added before normalizing" if config.flip else "plain image only"
    return Settings(
        faces=listed,
        face_images=None if listed is None else images_of_files("faces", listed.paths),
        convention={"Flip": f"{flip}; embeddings from files as they are"},
        fars=config.fars,
        bins=config.bins,
        ranks=config.ranks,
        threshold=config.threshold,
        replicates=config.replicates,
        seed=config.seed,
        level=config.level,
        num_failures=config.num_failures,
        progress=progress,
    )


def _tasks(
    settings: Settings, protocols: Sequence[str], pairs: str | os.PathLike[str] | None
) -> tuple[list[EvaluationTask], list[str]]:
    """Every protocol asked for, under a name of its own."""
    tasks: list[EvaluationTask] = []
    notes: list[str] = []
    if settings.faces is not None and not protocols:
        tasks, notes = tasks_of_faces(settings)
    asked = [parse_protocol(text, PROTOCOLS) for text in protocols]
    if pairs is not None:
        given = ProtocolSpec("pairs", Path(pairs), {}, f"pairs={os.fspath(pairs)}")
        tasks.append(pairs_task(given, settings, "verification", "Given pairs"))
    taken: dict[str, int] = {}
    for each in asked:
        taken[each.name] = taken.get(each.name, 0) + 1
        name = each.name if taken[each.name] == 1 else f"{each.name}_{taken[each.name]}"
        known = PROTOCOLS[each.name]
        tasks += known.build(each, settings, name, known.title)
    return tasks, notes


def _sources(
    config: EvaluateConfig,
    models: Sequence[str | os.PathLike[str]],
    embeddings: Sequence[str | os.PathLike[str]],
    tasks: Sequence[EvaluationTask],
    work: Path,
    progress: bool,
) -> list[EvaluatedModel]:
    """Models and embeddings under names of their own; every file is opened before any model is run."""
    sets: dict[str, ImageSet] = {}
    for images in (images for task in tasks for images in task.images):
        if sets.setdefault(images.name, images).fingerprint != images.fingerprint:
            raise InputError(
                f"evaluate: two sets of different images are called {images.name!r}; measure one at a time"
            )
    sources: list[EvaluatedModel] = []

    def add(path: str | os.PathLike[str], facts: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Under the file's name, with its folder's where another one is called so."""
        stem, folder = Path(path).stem, Path(path).absolute().parent.name
        taken = {source.name for source in sources}
        name = next(each for each in (stem, f"{folder}/{stem}", f"{stem} ({len(sources) + 1})") if each not in taken)
        sources.append(EvaluatedModel(name, {**facts, "label": name}, arrays))

    given = [(path, {name: _given(Path(path), images) for name, images in sets.items()}) for path in embeddings]
    opened = [open_model(path, config.input_size) for path in models]
    if opened:
        for images in sets.values():
            if images.read is None:
                images.decode([], 112)  # says that there are no images
    for model in opened:
        made = {
            name: embed_set(model, images, work, batch_size=config.batch_size, flip=config.flip, progress=progress)
            for name, images in sets.items()
        }
        add(model.path, model.facts, made)
    for path, arrays in given:
        add(path, {"role": "student", "backbone": "embeddings from a file"}, arrays)
    return sources


def _given(path: Path, images: ImageSet) -> NDArray[Any]:
    """A file's rows for a set of images; of a folder, the file that is called after the set."""
    return read_embeddings(path / f"{images.name}.npy" if path.is_dir() else path, images.count)


def _data(settings: Settings, tasks: Sequence[EvaluationTask], notes: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {"notes": notes}
    names = dict.fromkeys(images.name for task in tasks for images in task.images)
    if settings.faces is not None:
        data["test_images"], data["test_identities"] = len(settings.faces), settings.faces.num_identities
        lists = ", ".join(Path(source).name for source in settings.faces.sources)
        names = dict.fromkeys(lists if name == "faces" else name for name in names)
    return data | {"name": ", ".join(names)}
