"""Recipe: what `evaluate` is asked to measure: `--protocol NAME[=PATH][,key=PATH ...]` as tasks with their images.

A task knows its images and judges the embeddings of all models at once. The sets that have readers of their own are in
`kdlib_faces.recipes.published_sets`.
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
from kdlib_faces.data.bin import load_bin
from kdlib_faces.data.listing import FaceList, read_faces
from kdlib_faces.evaluation import AgeErrorProtocol, AgeGapProtocol, CrossGroupProtocol, PairProtocol
from kdlib_faces.recipes.image_sets import ImageSet, images_of_bytes, images_of_files
from kdlib_faces.recipes.panels import Arrays, Judgement
from kdlib_faces.recipes.panels_ages import AgesPanel
from kdlib_faces.recipes.panels_groups import AgeErrorsPanel, CrossGroupPanel
from kdlib_faces.recipes.panels_pairs import PairsPanel
from kdlib_faces.recipes.panels_ranks import LeaveOneOutPanel

__all__ = ["Asked", "Settings", "Task", "of_rows", "parse_protocol", "tasks_of_faces"]

Judge = Callable[[Mapping[str, Arrays]], Judgement]
KEYS = ("images", "faces", "distractors", "norm", "scores", "rule", "kind", "published", "far", "reference")


@dataclass(frozen=True)
class Asked:
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
        worst: pairs of each kind to show.
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
    worst: int = 6
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
class Task:
    """A protocol with its images.

    Attributes:
        name: of the result.
        images: the sets whose embeddings it needs, the first its own.
        judge: set name -> model -> embeddings, to what was found.
    """

    name: str
    images: tuple[ImageSet, ...]
    judge: Judge


def parse_protocol(text: str, names: Mapping[str, Any]) -> Asked:
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
    return Asked(name, Path(path) if path else None, more, text)


def faces_of(asked: Asked, settings: Settings, *, path_is_list: bool) -> tuple[FaceList, ImageSet]:
    """The face list of a task: its own (`faces=`, `images=`, or the path), else that of `--faces`."""
    given = asked.more.get("faces") or asked.more.get("images") or (asked.path if path_is_list else None)
    if given is not None:
        return settings.list_of(Path(given))
    if settings.faces is None or settings.face_images is None:
        way = f"{asked.name}=LIST" if path_is_list else "images=FOLDER"
        raise InputError(f"--protocol {asked.text}: needs faces: give --faces LIST, or {way} (a CSV list or a folder)")
    return settings.faces, settings.face_images


def bin_task(asked: Asked, settings: Settings, name: str, title: str) -> Task:
    """A `.bin` set: its images are inside."""
    asked.known()
    path = asked.wants("a .bin file")
    found = load_bin(path)
    images = images_of_bytes(path.stem, found.images)
    protocol = PairProtocol.interleaved(found.same, None, settings.threshold, settings.fars, level=settings.level)
    notes = ("names and ages are not in a .bin: intervals take pairs as independent, folds may share people",)
    panel = PairsPanel(
        name, f"{path.stem} (.bin)", protocol, images.label, settings.convention, notes=notes, worst=settings.worst,
        **settings.sampling,
    )  # fmt: skip
    return Task(name, (images,), lambda given: panel.judge(given[images.name]))


def ages_task(asked: Asked, settings: Settings, name: str, title: str) -> Task:
    """All pairs by age gap, or by age groups."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    kind = "groups" if asked.name == "age_group" else "ages"
    task = ages_of_faces(faces, images, settings, name, title, kind)
    if task is None:
        column = "age_group" if kind == "groups" else "age"
        raise InputError(f"--protocol {asked.text}: no image of {', '.join(faces.sources)} has an {column}")
    return task


def ages_of_faces(
    faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str, kind: str = "either"
) -> Task | None:
    """By exact ages or by groups: `"ages"`, `"groups"`, or what more images have; None where no image has any."""
    rows = np.arange(len(faces))
    aged = rows[:0] if faces.ages is None or kind == "groups" else np.flatnonzero(np.isfinite(faces.ages))
    grouped = rows[:0] if faces.age_groups is None or kind == "ages" else np.flatnonzero(faces.age_groups >= 0)
    known = aged if len(aged) >= len(grouped) else grouped
    if not len(known):
        return None
    by_age: dict[str, Any] = {}
    if known is aged and faces.ages is not None:
        by_age = {"ages": faces.ages[known], "bins": settings.bins}
    elif faces.age_groups is not None:
        by_age = {"age_groups": np.asarray(faces.group_names)[faces.age_groups[known]]}
    protocol = AgeGapProtocol(faces.identities[known], fars=settings.fars, **settings.sampling, **by_age)
    left_out = len(faces) - len(known)
    notes = (f"{len(known)} of {len(faces)} images, the others have no known age",) if left_out else ()
    panel = AgesPanel(
        name, title, protocol, lambda row: images.label(int(known[row])), settings.convention, notes, settings.worst
    )

    def judge(given: Mapping[str, Arrays]) -> Judgement:
        arrays = given[images.name]
        found = panel.judge({name: _rows(array, known) for name, array in arrays.items()})
        return of_rows(found, known)

    return Task(name, (images,), judge)


def of_rows(found: Judgement, rows: NDArray[np.int64]) -> Judgement:
    """The worst pairs of a judgement of some rows of a set, by the rows of the whole set."""
    for pairs in found.worst.values():
        pairs[:] = [replace(pair, left=int(rows[pair.left]), right=int(rows[pair.right])) for pair in pairs]
    return found


def _rows(array: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    return array if len(rows) == len(array) else array[rows]


def groups_task(asked: Asked, settings: Settings, name: str, title: str) -> Task:
    """One age group against another: young faces among adult ones, as LAG has them."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    if faces.age_groups is None or len(set(faces.age_groups[faces.age_groups >= 0].tolist())) < 2:
        raise InputError(f"--protocol {asked.text}: images of two age groups are needed (a column age_group)")
    return groups_of_faces(faces, images, settings, name, title)


def groups_of_faces(faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str) -> Task:
    """The last group in the alphabet against the first: young against adult."""
    assert faces.age_groups is not None
    groups = np.asarray([*faces.group_names, ""])[faces.age_groups]
    there = sorted(set(groups.tolist()) - {""})
    protocol = CrossGroupProtocol(
        faces.identities, groups, probe=there[-1], gallery=there[0], fars=settings.fars,
        ranks=[rank for rank in settings.ranks if rank <= int((groups == there[0]).sum())], **settings.sampling,
    )  # fmt: skip
    panel = CrossGroupPanel(
        name, title, protocol, images.label, settings.convention, worst=settings.worst, **settings.sampling
    )
    return Task(name, (images,), lambda given: panel.judge(given[images.name]))


def age_errors_task(asked: Asked, settings: Settings, name: str, title: str) -> Task:
    """FNMR by gap and by the younger age, FMR among people of one age, slopes."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    aged = np.zeros(len(faces), bool) if faces.ages is None else np.isfinite(faces.ages)
    grouped = np.zeros(len(faces), bool) if faces.age_groups is None else faces.age_groups >= 0
    rows = np.flatnonzero(aged if aged.sum() >= grouped.sum() else grouped)
    if not len(rows):
        raise InputError(f"--protocol {asked.text}: no image of {', '.join(faces.sources)} has an age or an age group")
    by: dict[str, Any] = {"gap_bins": settings.bins}
    if aged.sum() >= grouped.sum():
        assert faces.ages is not None
        by["ages"] = faces.ages[rows]
    else:
        assert faces.age_groups is not None
        by["age_groups"] = np.asarray(faces.group_names)[faces.age_groups[rows]]
    protocol = AgeErrorProtocol(faces.identities[rows], fars=settings.fars, **by, **settings.sampling)
    left_out = len(faces) - len(rows)
    notes = (f"{len(rows)} of {len(faces)} images, the others have no known age",) if left_out else ()
    panel = AgeErrorsPanel(
        name, title, protocol, settings.convention, notes, settings.seed, lambda row: images.label(int(rows[row])),
        settings.worst,
    )  # fmt: skip

    def judge(given: Mapping[str, Arrays]) -> Judgement:
        return of_rows(panel.judge({each: _rows(array, rows) for each, array in given[images.name].items()}), rows)

    return Task(name, (images,), judge)


def leave_one_out_task(asked: Asked, settings: Settings, name: str, title: str) -> Task:
    """Each image of a list against all the others."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    if int(np.bincount(faces.identities).max()) < 2:
        raise InputError(f"--protocol {asked.text}: no identity has two images")
    return leave_one_out_of_faces(faces, images, settings, name, title)


def leave_one_out_of_faces(faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str) -> Task:
    """Each of these faces against all the others."""
    ages = _any_age(faces)
    panel = LeaveOneOutPanel(
        name, title, faces.identities, images.label, settings.convention,
        ages=ages if ages is not None and bool(np.isfinite(ages).all()) else None,
        ranks=settings.ranks, worst=settings.worst, **settings.sampling,
    )  # fmt: skip
    return Task(name, (images,), lambda given: panel.judge(given[images.name]))


def _any_age(faces: FaceList) -> NDArray[np.float64] | None:
    return None if faces.ages is None else faces.ages.astype(np.float64)


def tasks_of_faces(settings: Settings) -> tuple[list[Task], list[str]]:
    """What a face list can carry where no protocol is named, and notes on what it cannot."""
    faces, images = settings.faces, settings.face_images
    assert faces is not None
    assert images is not None
    tasks: list[Task] = []
    notes: list[str] = []
    by_age = ages_of_faces(faces, images, settings, "age_gap", "By age")
    if by_age is not None:
        tasks.append(by_age)
    else:
        notes.append("no image has an age or an age group: no evaluation by age gap")
    if faces.age_groups is not None and len(set(faces.age_groups[faces.age_groups >= 0].tolist())) > 1:
        tasks.append(groups_of_faces(faces, images, settings, "between_groups", "One age group against another"))
    if int(np.bincount(faces.identities).max()) > 1:
        tasks.append(leave_one_out_of_faces(faces, images, settings, "leave_one_out", "Each image among the others"))
    else:
        notes.append("no identity has two images: no leave-one-out identification")
    return tasks, notes
