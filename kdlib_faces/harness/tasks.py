"""Recipe: what `evaluate` is asked to measure: `--protocol NAME[=PATH][,key=PATH ...]` as tasks with their images.

A task knows its images and judges the embeddings of all models at once. Those of the sets that have
readers of their own are in `kdlib_faces.harness.published`, those of face lists in `kdlib_faces.harness.lists`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib._checks import nearest
from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.harness.image_sets import ImageSet, images_of_files
from kdlib_faces.harness.panels import Arrays, ProtocolResult

__all__ = ["EvaluationTask", "ProtocolSpec", "Settings", "faces_of", "on_rows", "parse_protocol", "task_of_protocol"]

Judge = Callable[[Mapping[str, Arrays]], ProtocolResult]
KEYS = ("images", "faces", "distractors", "norm", "scores", "rule", "kind", "published", "far", "reference")


@dataclass(frozen=True)
class ProtocolSpec:
    """One `--protocol`: its name, the path behind the `=`, and further ones by key."""

    name: str
    path: Path | None
    more: Mapping[str, str]
    text: str

    def wants(self, what: str) -> Path:
        """The path; an error that says what it must be where none was given."""
        if self.path is None:
            raise InputError(f"--protocol {self.text}: needs {what}, as {self.name}=PATH")
        return self.path

    def flag(self, key: str) -> bool:
        """`key=yes` or `key=no`; yes where it is not given."""
        value = self.more.get(key, "yes").lower()
        if value not in ("yes", "no"):
            raise InputError(f"--protocol {self.text}: {key} must be yes or no, got {value!r}")
        return value == "yes"

    def number(self, key: str, default: float) -> float:
        """A number above 0 and at most 1."""
        try:
            value = float(self.more.get(key, default))
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise InputError(f"--protocol {self.text}: {key} must be a rate above 0, got {self.more[key]!r}")
        return value

    def known(self, *keys: str) -> None:
        """Refuse keys that the protocol does not take."""
        for key in self.more:
            if key not in keys:
                takes = f"it takes {', '.join(keys)}" if keys else "it takes none"
                raise InputError(f"--protocol {self.text}: no {key}= here, {takes}")


@dataclass(frozen=True)
class Settings:
    """What tasks are made with.

    Attributes:
        faces: the lists of `--faces`; None where none were given.
        face_images: their images.
        convention: of the embeddings, said with each protocol.
        fars: target false accept rates.
        bins: lower ends of the bins of age gaps.
        ranks: of identification.
        threshold: of pair verification.
        replicates: of the intervals.
        seed: of the resamples.
        level: confidence.
        num_failures: pairs of each kind to show.
        progress: whether long protocols show how far they are.
    """

    faces: FaceList | None = None
    face_images: ImageSet | None = None
    convention: dict[str, str] = field(default_factory=dict)
    fars: tuple[float, ...] = (1e-2, 1e-3)
    bins: tuple[float, ...] = (0, 5, 10, 20, 30)
    ranks: tuple[int, ...] = (1, 5)
    threshold: Any = "grid"
    replicates: int = 500
    seed: int = 0
    level: float = 0.95
    num_failures: int = 6
    progress: bool = False
    lists: dict[Path, tuple[FaceList, ImageSet]] = field(default_factory=dict)
    sets: list[ImageSet] = field(default_factory=list)

    def list_of(self, path: Path) -> tuple[FaceList, ImageSet]:
        """A face list and its images, read once however many protocols use it."""
        if path not in self.lists:
            listed = read_faces([path])
            self.lists[path] = listed, self.set_of(path, listed.paths)
        return self.lists[path]

    def set_of(self, path: Path, files: Sequence[Path]) -> ImageSet:
        """The images of a list under its name, with a number where that is taken; the same images are one set."""
        taken = {images.name for images in self.sets} | {"faces"}
        stem = path.absolute().stem or "images"
        found = images_of_files(stem if stem not in taken else f"{stem}_{len(taken)}", files)
        for known in (*self.sets, *([self.face_images] if self.face_images is not None else [])):
            if known.fingerprint == found.fingerprint:
                return known
        self.sets.append(found)
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """Of every panel that resamples."""
        return {"replicates": self.replicates, "seed": self.seed, "level": self.level}


@dataclass(frozen=True, eq=False)
class EvaluationTask:
    """A protocol with its images.

    Attributes:
        name: of the result.
        images: the sets whose embeddings it needs, the first its own.
        judge: set name -> model -> embeddings, to what was found.
    """

    name: str
    images: tuple[ImageSet, ...]
    judge: Judge


def parse_protocol(text: str, names: Mapping[str, Any]) -> ProtocolSpec:
    """`NAME`, `NAME=PATH` or `NAME=PATH,key=PATH`; a comma is part of a path unless a known key follows it.

    Raises:
        InputError: no known name (with the nearest), or a key twice.

    Examples:
        >>> asked = parse_protocol("lfw=a,b/pairs.txt,images=lfw", {"lfw": None})
        >>> str(asked.path), dict(asked.more)
        ('a,b/pairs.txt', {'images': 'lfw'})
    """
    first, *rest = re.split(rf",(?=(?:{'|'.join(KEYS)})=)", text.strip())
    name, equals, path = first.partition("=")
    if name not in names:
        raise InputError(f"--protocol {text}: no protocol named {name!r}{nearest(name, list(names))}")
    more: dict[str, str] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key in more or not value:
            raise InputError(f"--protocol {text}: {key}= must be given once, with a value")
        more[key] = value
    if equals and not path:
        raise InputError(f"--protocol {text}: {name}= must be followed by a path")
    return ProtocolSpec(name, Path(path) if path else None, more, text)


def faces_of(asked: ProtocolSpec, settings: Settings, *, path_is_list: bool) -> tuple[FaceList, ImageSet]:
    """The face list of a task: its own (`faces=`, `images=`, or the path), else that of `--faces`."""
    given = asked.more.get("faces") or asked.more.get("images") or (asked.path if path_is_list else None)
    if given is not None:
        return settings.list_of(Path(given))
    if settings.faces is None or settings.face_images is None:
        way = f"{asked.name}=LIST" if path_is_list else "images=FOLDER"
        raise InputError(f"--protocol {asked.text}: needs faces: give --faces LIST, or {way} (a CSV list or a folder)")
    return settings.faces, settings.face_images


def on_rows(images: ImageSet, rows: NDArray[np.int64], judge: Callable[[Arrays], ProtocolResult]) -> Judge:
    """A judge of some rows of a set: it gets their embeddings, and its worst pairs are told by the rows of the whole set."""

    def judged(given: Mapping[str, Arrays]) -> ProtocolResult:
        arrays = given[images.name]
        found = judge({name: array if len(rows) == len(array) else array[rows] for name, array in arrays.items()})
        for pairs in found.worst.values():
            pairs[:] = [replace(pair, left=int(rows[pair.left]), right=int(rows[pair.right])) for pair in pairs]
        return found

    return judged


def task_of_protocol(
    name: str,
    title: str,
    protocol: Any,
    images: ImageSet,
    *,
    rows: NDArray[np.int64] | None = None,
    convention: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    num_failures: int = 6,
) -> EvaluationTask:
    """A protocol of `kdlib_faces.evaluation` with its images, as `evaluate_models` takes it.

    Args:
        name: Key of the results: letters, digits, `_`.
        title: Heading.
        protocol: The protocol; its rows are those of `images`, or `rows` of them.
        images: The image set.
        rows: Rows of the set that the protocol uses; None for all.
        convention: Further conventions for the report, such as the alignment.
        notes: Remarks for the report, such as left-out images.
        num_failures: Number of the hardest pairs of each kind to show.
    """
    from kdlib_faces.evaluation import AgeGapProtocol, LeaveOneOutProtocol, PairProtocol
    from kdlib_faces.harness.panels_ages import AgesPanel
    from kdlib_faces.harness.panels_pairs import PairsPanel
    from kdlib_faces.harness.panels_ranks import LeaveOneOutPanel

    used = np.arange(images.count or 0) if rows is None else rows
    words, remarks = dict(convention or {}), tuple(notes)

    def label(row: int) -> str:
        return images.label(int(used[row]))

    panel: Any
    if isinstance(protocol, AgeGapProtocol):
        panel = AgesPanel(name, title, protocol, label, words, remarks, num_failures)
    elif isinstance(protocol, PairProtocol):
        panel = PairsPanel(name, title, protocol, label, words, notes=remarks, num_failures=num_failures)
    elif isinstance(protocol, LeaveOneOutProtocol):
        panel = LeaveOneOutPanel(
            name, title, protocol.identities, label, words, protocol.ages, protocol.ranks, notes=remarks,
            num_failures=num_failures,
        )  # fmt: skip
    else:
        raise TypeError(f"task_of_protocol: no panel for {type(protocol).__name__}")
    return EvaluationTask(name, (images,), on_rows(images, used, panel.judge))
