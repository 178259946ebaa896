"""Preparation of an evaluation: files are opened and checked, images are embedded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.evaluation import Sampling
from kdlib_faces.evaluation._checks import check_level
from kdlib_faces.evaluation.summary import DataSummary, ModelEntry
from kdlib_faces.evaluation.fold_thresholds import Rule
from kdlib_faces.harness.embeddings import embed_set, open_model, read_embeddings
from kdlib_faces.harness.evaluate import EvaluatedModel
from kdlib_faces.harness.image_sets import Embeddings, ImageSet, images_of_files
from kdlib_faces.harness.lists import tasks_of_faces
from kdlib_faces.harness.registry import PROTOCOLS
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, parse_protocol

__all__ = ["EvaluateConfig", "PreparedEvaluation", "prepare"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation.

    Attributes:
        batch_size: Images in one forward.
        input_size: Side of the images, pixels; None for the model's own.
        flip: Add the embedding of the mirrored image before normalization.
        bins: Lower ends of the bins of age gaps, years; the last bin is open.
        fars: Target false accept rates.
        ranks: Ranks of identification.
        threshold: Threshold rule of pair verification: `"grid"` as in published figures, `"exact"`, or `"facexzoo"`.
        replicates: Bootstrap resamples of the intervals.
        level: Confidence of the intervals.
        seed: Seed of the bootstrap.
        num_failures: Number of the hardest pairs of each kind to show, 0 for none.
        score_rows: Maximal number of rows of a file of scores.
    """

    batch_size: int = 64
    input_size: int | None = None
    flip: bool = True
    bins: tuple[float, ...] = (0, 5, 10, 20, 30)
    fars: tuple[float, ...] = (1e-2, 1e-3)
    ranks: tuple[int, ...] = (1, 5)
    threshold: Rule = "grid"
    replicates: int = 500
    level: float = 0.95
    seed: int = 0
    num_failures: int = 6
    score_rows: int = 1_000_000

    def __post_init__(self) -> None:
        owner = "EvaluateConfig"
        for name, low, high in (
            ("batch_size", 1, None), ("num_failures", 0, 24), ("score_rows", 1, None), ("replicates", 0, None),
            ("seed", 0, None), *([("input_size", 8, None)] if self.input_size is not None else []),
        ):  # fmt: skip
            check_number(owner, name, getattr(self, name), min=low, max=high, integer=True)
        check_level(owner, self.level)
        for name, values, low in (("bins", self.bins, 0), ("ranks", self.ranks, 1)):
            if not values:
                raise InputError(f"EvaluateConfig: {name} must not be empty, got ()")
            for value in values:
                check_number(owner, name, value, min=low, integer=name == "ranks")
        if list(self.bins) != sorted(set(self.bins)):
            raise InputError(f"EvaluateConfig: bins must rise from the first, got {self.bins}")
        for far in self.fars:
            check_number(owner, "fars", far, above=0, max=1)

    @property
    def sampling(self) -> Sampling:
        """Resamples of the intervals."""
        return Sampling(self.replicates, self.seed, self.level)


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
    faces: Sequence[PathLike] = (),
    models: Sequence[PathLike] = (),
    embeddings: Sequence[PathLike] = (),
    pairs: PathLike | None = None,
    protocols: Sequence[str] = (),
    progress: bool = False,
) -> PreparedEvaluation:
    """Read protocols, models and embeddings, and embed the images that are missing from a model's embeddings.

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
    face_list = read_faces(faces) if faces else None
    settings = _settings(config, face_list, progress)
    tasks, notes = _tasks(settings, protocols, pairs)
    if not tasks:
        raise InputError(f"evaluate: nothing can be measured on {', '.join(map(str, faces))}: {'; '.join(notes)}")
    evaluated = _models(config, models, embeddings, tasks, work, progress)
    return PreparedEvaluation(tasks, evaluated, _data(settings, tasks, notes))


def _settings(config: EvaluateConfig, faces: FaceList | None, progress: bool) -> Settings:
    flip = "embedding of the mirrored image added before normalizing" if config.flip else "plain image only"
    return Settings(
        faces=faces,
        face_images=None if faces is None else images_of_files("faces", faces.paths),
        convention={"Flip": f"{flip}; embeddings from files as they are"},
        fars=config.fars,
        bins=config.bins,
        ranks=config.ranks,
        threshold=config.threshold,
        sampling=config.sampling,
        progress=progress,
    )


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


def _models(
    config: EvaluateConfig,
    models: Sequence[PathLike],
    embeddings: Sequence[PathLike],
    tasks: Sequence[EvaluationTask],
    work: Path,
    progress: bool,
) -> list[EvaluatedModel]:
    """Models and embeddings, each with its own name; every file is opened before any model runs."""
    sets: dict[str, ImageSet] = {}
    for images in (images for task in tasks for images in task.images):
        if sets.setdefault(images.name, images).fingerprint != images.fingerprint:
            raise InputError(
                f"evaluate: two sets of different images are called {images.name!r}; measure one at a time"
            )
    evaluated: list[EvaluatedModel] = []

    def add(path: PathLike, entry: ModelEntry, arrays: Mapping[str, Embeddings]) -> None:
        """Add a model named after its file, with the folder or a number if the name is taken."""
        stem, folder = Path(path).stem, Path(path).absolute().parent.name
        taken = {model.name for model in evaluated}
        name = next(each for each in (stem, f"{folder}/{stem}", f"{stem} ({len(taken) + 1})") if each not in taken)
        evaluated.append(EvaluatedModel(name, replace(entry, label=name), arrays))

    given = [(path, {name: _read(Path(path), images) for name, images in sets.items()}) for path in embeddings]
    opened = [open_model(path, config.input_size) for path in models]
    for images in sets.values() if opened else ():
        images.check_images()
    for model in opened:
        made = {
            name: embed_set(model, images, work, batch_size=config.batch_size, flip=config.flip, progress=progress)
            for name, images in sets.items()
        }
        add(model.path, model.entry, made)
    for path, arrays in given:
        add(path, ModelEntry("student", backbone="embeddings from a file"), arrays)
    return evaluated


def _read(path: Path, images: ImageSet) -> Embeddings:
    """The rows of an image set from a file; from a folder, the file named after the set."""
    return read_embeddings(path / f"{images.name}.npy" if path.is_dir() else path, images.count)


def _data(settings: Settings, tasks: Sequence[EvaluationTask], notes: list[str]) -> DataSummary:
    data = DataSummary(notes=notes)
    names = dict.fromkeys(images.name for task in tasks for images in task.images)
    if settings.faces is not None:
        data.test_images, data.test_identities = len(settings.faces), settings.faces.num_identities
        lists = ", ".join(Path(source).name for source in settings.faces.sources)
        names = dict.fromkeys(lists if name == "faces" else name for name in names)
    data.name = ", ".join(names)
    return data
