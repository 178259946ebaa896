"""Protocols with their images: the tasks of an evaluation, its settings and the syntax of `--protocol`."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdlib._checks import check_number, nearest
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import Amp
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.sources.base import ImageSource
from kdlib_faces.evaluation import EvaluationProtocol, ProtocolResult, Sampling
from kdlib_faces.evaluation._checks import check_level
from kdlib_faces.evaluation.fold_thresholds import Rule
from kdlib_faces.harness.image_sets import Embeddings, ImageSet, images_of_source

__all__ = [
    "EvaluateConfig", "EvaluationTask", "ProtocolSpec", "Settings", "TaskMaker", "faces_of", "parse_protocol",
    "task_of_protocol",
]  # fmt: skip

KEYS = ("images", "faces", "distractors", "norm", "scores", "rule", "kind", "published", "far", "reference")


@dataclass(frozen=True, eq=False)
class EvaluationTask:
    """A protocol with its images.

    Attributes:
        name: Key of the results: letters, digits, `_`.
        title: Heading.
        images: Image sets whose embeddings are needed: that of the protocol, and the distractors if there are any.
        evaluate: Name of an image set to a model's embeddings of it, to the result of the protocol.
        rows: Rows of the first set that the protocol uses; None for all.
        convention: Further conventions for the report.
        notes: Remarks for the report, such as left-out images.
    """

    name: str
    title: str
    images: tuple[ImageSet, ...]
    evaluate: Callable[[Mapping[str, Embeddings]], ProtocolResult]
    rows: NDArray[np.int64] | None = None
    convention: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def alignment(self) -> str:
        """How the faces of all image sets are aligned."""
        first, *others = self.images
        more = [f"{images.name}: {images.alignment}" for images in others if images.alignment != first.alignment]
        return "; ".join([first.alignment, *more])

    def set_row(self, row: int) -> int:
        """Row of the first image set for a row of the protocol."""
        return row if self.rows is None else int(self.rows[row])

    def label(self, row: int) -> str:
        """Name of the image of a row of the protocol."""
        return self.images[0].label(self.set_row(row))


def task_of_protocol(
    name: str,
    title: str,
    protocol: EvaluationProtocol[ProtocolResult],
    images: ImageSet,
    *,
    rows: NDArray[np.int64] | None = None,
    convention: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> EvaluationTask:
    """A protocol of `kdlib_faces.evaluation` with its images, for `evaluate_models`; see `EvaluationTask`."""

    def evaluate(embeddings: Mapping[str, Embeddings]) -> ProtocolResult:
        array = embeddings[images.name]
        return protocol.evaluate(array if rows is None or len(rows) == len(array) else array[rows])

    return EvaluationTask(name, title, (images,), evaluate, rows, dict(convention or {}), tuple(notes))


@dataclass(frozen=True)
class ProtocolSpec:
    """One parsed `--protocol`: its name, the path after the `=`, and the options."""

    name: str
    path: Path | None
    options: Mapping[str, str]
    text: str

    def require_path(self, what: str) -> Path:
        """The path; an error says what it must be if it is missing."""
        if self.path is None:
            raise self.error(f"needs {what}, as {self.name}=PATH")
        return self.path

    def error(self, message: str) -> InputError:
        """The error for this protocol, which names it as it was given."""
        return InputError(f"--protocol {self.text}: {message}" if self.text else message)

    def flag(self, key: str) -> bool:
        """`key=yes` or `key=no`; yes by default."""
        return self.choice(key, ("yes", "no")) == "yes"

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of some values, by default the first."""
        value = self.options.get(key, allowed[0])
        if value.lower() not in allowed:
            raise self.error(f"{key} must be {' or '.join(allowed)}, got {value!r}")
        return value.lower()

    def rate(self, key: str, default: float) -> float:
        """A number above 0 and at most 1."""
        try:
            value = float(self.options.get(key, default))
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise self.error(f"{key} must be a rate above 0, got {self.options[key]!r}")
        return value

    def check_options(self, *keys: str) -> None:
        """Refuse options that the protocol does not take."""
        for key in self.options:
            if key not in keys:
                takes = f"takes {', '.join(keys)}" if keys else "takes no options"
                raise self.error(f"unknown option {key}=, {self.name} {takes}")


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
        amp: Precision of the forward pass: `"none"`, `"bfloat16"` or `"float16"`.
        compile: Compile the networks by `torch.compile`; ONNX graphs are left as they are.
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
    amp: Amp = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        owner = "EvaluateConfig"
        limits = {"batch_size": (1, 65_536), "replicates": (0, 100_000), "num_failures": (0, 24), "score_rows": (1, 10**12),
                  "seed": (0, 2**63 - 1), "input_size": (8, 4096)}  # fmt: skip
        for name, (low, high) in limits.items():
            if getattr(self, name) is not None:
                check_number(owner, name, getattr(self, name), min=low, max=high, integer=True)
        check_level(owner, self.level)
        for name, values, fewest in (("bins", self.bins, 1), ("ranks", self.ranks, 1), ("fars", self.fars, 0)):
            if not fewest <= len(values) <= 100:
                raise InputError(f"{owner}: {name} must have {fewest} to 100 entries, got {len(values)}")
        for value in self.bins:
            check_number(owner, "bins", value, min=0)
        for rank in self.ranks:
            check_number(owner, "ranks", rank, min=1, integer=True)
        if list(self.bins) != sorted(set(self.bins)):
            raise InputError(f"{owner}: bins must rise from the first, got {self.bins}")
        for far in self.fars:
            check_number(owner, "fars", far, above=0, max=1)

    @property
    def sampling(self) -> Sampling:
        """Resamples of the intervals."""
        return Sampling(self.replicates, self.seed, self.level)


@dataclass(frozen=True)
class Settings:
    """Settings and images from which tasks are made.

    Attributes:
        config: The configuration.
        faces: The lists of `--data`; None without any.
        face_images: Their images.
        convention: Conventions of the embeddings, reported with each protocol.
        progress: Show the progress of long protocols.
    """

    config: EvaluateConfig
    faces: FaceList | None = None
    face_images: ImageSet | None = None
    convention: dict[str, str] = field(default_factory=dict)
    progress: bool = False
    lists: dict[Path, tuple[FaceList, ImageSet]] = field(default_factory=dict)
    sets: list[ImageSet] = field(default_factory=list)

    def read_list(self, path: Path) -> tuple[FaceList, ImageSet]:
        """A face list and its images, read once for all protocols."""
        if path not in self.lists:
            faces = read_faces([path])
            self.lists[path] = faces, self.image_set(path, faces.images)
        return self.lists[path]

    def image_set(self, path: Path, source: ImageSource) -> ImageSet:
        """The images of a list, named after it, with a number if the name is taken; equal images are one set."""
        taken = {images.name for images in self.sets} | {"faces"}
        stem = path.absolute().stem or "images"
        images = images_of_source(stem if stem not in taken else f"{stem}_{len(taken)}", source)
        for known in (*self.sets, *([self.face_images] if self.face_images is not None else [])):
            if known.fingerprint == images.fingerprint:
                return known
        self.sets.append(images)
        return images


TaskMaker: TypeAlias = Callable[[ProtocolSpec, Settings, str, str], EvaluationTask | list[EvaluationTask]]
"""Parsed `--protocol`, settings, name and title to the tasks."""


def parse_protocol(text: str, names: Collection[str]) -> ProtocolSpec:
    """`NAME`, `NAME=PATH` or `NAME=PATH,key=PATH`; a comma is part of a path unless a known key follows it.

    Raises:
        InputError: The name is unknown (the message gives the nearest), or a key occurs twice.

    Examples:
        >>> spec = parse_protocol("lfw=a,b/pairs.txt,images=lfw", ["lfw"])
        >>> str(spec.path), dict(spec.options)
        ('a,b/pairs.txt', {'images': 'lfw'})
    """
    first, *rest = re.split(rf",(?=(?:{'|'.join(KEYS)})=)", text.strip())
    name, equals, path = first.partition("=")
    if name not in names:
        raise InputError(f"--protocol {text}: no protocol named {name!r}{nearest(name, list(names))}")
    options: dict[str, str] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key in options or not value:
            raise InputError(f"--protocol {text}: {key}= must be given once, with a value")
        options[key] = value
    if equals and not path:
        raise InputError(f"--protocol {text}: {name}= must be followed by a path")
    return ProtocolSpec(name, Path(path) if path else None, options, text)


def faces_of(spec: ProtocolSpec, settings: Settings, *, path_is_list: bool) -> tuple[FaceList, ImageSet]:
    """The face list of a task: its own (`faces=`, `images=`, or the path), else that of `--data`."""
    given = spec.options.get("faces") or spec.options.get("images") or (spec.path if path_is_list else None)
    if given is not None:
        return settings.read_list(Path(given))
    if settings.faces is None or settings.face_images is None:
        way = f"{spec.name}=LIST" if path_is_list else "images=FOLDER"
        raise spec.error(f"needs faces: give --data LIST, or {way} (a CSV list or a folder)")
    return settings.faces, settings.face_images
