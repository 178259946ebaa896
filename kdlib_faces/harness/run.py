"""Recipe: evaluate models, or embeddings that another framework made, by any protocols, and write a report.

First every file is opened and checked, then embeddings are made and kept under `OUTPUT/work`, then each protocol judges all
models together; the report appears when all is done. A run that was stopped goes on where it was.
"""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces._output import check_output, staged, swept
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.evaluation._checks import check_level
from kdlib_faces.harness.artifacts import failure_pictures, write_scores
from kdlib_faces.harness.embeddings import (
    embed,
    embed_faces,
    embed_set,
    load_model,
    open_model,
    read_embeddings,
)
from kdlib_faces.harness.image_sets import ImageSet, images_of_files
from kdlib_faces.harness.lists import tasks_of_faces
from kdlib_faces.harness.published import pairs_task
from kdlib_faces.harness.registry import PROTOCOLS
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, parse_protocol
from kdlib_faces.progress import progress as show
from kdlib_faces.progress import say

__all__ = ["EvaluateConfig", "embed", "embed_faces", "load_model", "read_embeddings", "run"]


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
        worst: how many of the worst pairs of each kind to show, 0 for none.
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
    worst: int = 6
    score_rows: int = 1_000_000

    def __post_init__(self) -> None:
        check_number("EvaluateConfig", "batch_size", self.batch_size, min=1, integer=True)
        check_number("EvaluateConfig", "worst", self.worst, min=0, max=24, integer=True)
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
class _Source:
    """Where a model's embeddings come from, and what the report says of it."""

    name: str
    facts: dict[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def run(
    config: EvaluateConfig,
    *,
    output: Path,
    faces: Sequence[str | os.PathLike[str]] = (),
    models: Sequence[str | os.PathLike[str]] = (),
    embeddings: Sequence[str | os.PathLike[str]] = (),
    pairs: str | os.PathLike[str] | None = None,
    protocols: Sequence[str] = (),
    scores: bool = False,
    progress: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Evaluate model files and embedding files by protocols, and write a report.

    Args:
        config: how.
        output: folder for report.json, report.md, report.html and figures; they are written when all is done. Embeddings
            of model files are kept in its folder `work`, from which a run that was stopped goes on.
        faces: lists, as `read_faces` takes them; for the protocols that bring no images of their own.
        models: `.onnx` or weight files.
        embeddings: `.npy` files `(n, d)`, rows in the order of the images; or folders with one such file for each set of
            images, called after it: `lfw.npy`, `fgnet.npy`, and `faces.npy` for the lists of `faces`.
        pairs: a pairs file in the format of LFW, on `faces`.
        protocols: `NAME[=PATH][,key=PATH ...]` each; without any, what the lists of `faces` can carry.
        scores: write each protocol's scores of each model to `scores/PROTOCOL-MODEL.csv`.
        progress: show how far it is.
        command: noted in the report.

    Returns:
        The content of report.json.

    Raises:
        InputError: any of the files is not usable, or there is nothing to evaluate.
    """
    if not models and not embeddings:
        raise InputError("evaluate: at least one model or one file of embeddings is needed, got none")
    if not faces and not protocols:
        raise InputError("evaluate: --faces or --protocol must be given: what is to be measured?")
    check_output(output)
    listed = read_faces(faces) if faces else None
    settings = _settings(config, listed, progress)
    tasks, notes = _tasks(settings, protocols, pairs)
    if not tasks:
        raise InputError(f"evaluate: nothing can be measured on {', '.join(map(str, faces))}: {'; '.join(notes)}")
    with swept(output):
        sources = _sources(config, models, embeddings, tasks, output / "work", progress)
        return _judge_and_write(config, output, settings, tasks, sources, notes, scores, progress, command)


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
        worst=config.worst,
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
) -> list[_Source]:
    """Models and embeddings under names of their own; every file is opened before any model is run."""
    sets: dict[str, ImageSet] = {}
    for images in (images for task in tasks for images in task.images):
        if sets.setdefault(images.name, images).fingerprint != images.fingerprint:
            raise InputError(
                f"evaluate: two sets of different images are called {images.name!r}; measure one at a time"
            )
    sources: list[_Source] = []

    def add(path: str | os.PathLike[str], facts: dict[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Under the file's name, with its folder's where another one is called so."""
        stem, folder = Path(path).stem, Path(path).absolute().parent.name
        taken = {source.name for source in sources}
        name = next(each for each in (stem, f"{folder}/{stem}", f"{stem} ({len(sources) + 1})") if each not in taken)
        sources.append(_Source(name, {**facts, "label": name}, arrays))

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


def _judge_and_write(
    config: EvaluateConfig,
    output: Path,
    settings: Settings,
    tasks: Sequence[EvaluationTask],
    sources: Sequence[_Source],
    notes: list[str],
    scores: bool,
    progress: bool,
    command: str,
) -> dict[str, Any]:
    from kdlib_faces import report

    started = datetime.now(UTC)
    names = [source.name for source in sources]
    told = {source.name: {**source.facts, "protocols": {}} for source in sources}
    evaluations: list[dict[str, Any]] = []
    pictures: list[report.Picture] = []
    with staged(output) as stage:
        for task in show(tasks, "protocols", quiet=not progress):
            given = {images.name: {s.name: s.arrays[images.name] for s in sources} for images in task.images}
            found = task.judge(given)
            for name, result in found.results.items():
                told[name]["protocols"][task.name] = result
            shown = failure_pictures(found, task, names)
            found.entry["pictures"] = [picture.name for picture in shown]
            if scores and found.scores is not None:
                found.entry["scores"] = write_scores(stage, found, task, names, config.score_rows, progress=progress)
                if found.scores.total > config.score_rows:
                    line = f"files of scores hold the first {config.score_rows:,} of {found.scores.total:,} rows"
                    found.entry.setdefault("notes", []).append(line)
            pictures += shown
            evaluations.append(found.entry)
        content = {
            "format": 1,
            "title": "Evaluation",
            "command": command,
            "created": started.isoformat(timespec="seconds"),
            "version": version("kdlib-torch"),
            "seeds": [config.seed],
            "config": asdict(config),
            "environment": _environment(),
            "data": _data(settings, tasks, [*notes, *_entry_notes(evaluations)]),
            "level": config.level,
            "models": told,
            "evaluations": evaluations,
        }
        report.write(stage, content, pictures=pictures, progress=progress)
    say(f"report: {output / 'report.html'}", quiet=not progress)
    return content


def _entry_notes(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{entry['title']}: {note}" for entry in evaluations for note in entry.get("notes") or ()]


def _data(settings: Settings, tasks: Sequence[EvaluationTask], notes: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {"notes": notes}
    names = dict.fromkeys(images.name for task in tasks for images in task.images)
    if settings.faces is not None:
        data["test_images"], data["test_identities"] = len(settings.faces), settings.faces.num_identities
        lists = ", ".join(Path(source).name for source in settings.faces.sources)
        names = dict.fromkeys(lists if name == "faces" else name for name in names)
    return data | {"name": ", ".join(names)}


def _environment() -> dict[str, Any]:
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
