"""Tasks on face lists: by age, between age groups, over the years, and identification of each image."""

from dataclasses import asdict
from typing import Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.sets.longitudinal import read_longitudinal
from kdlib_faces.data.sources.base import FileImages
from kdlib_faces.evaluation import (
    AgeErrorProtocol,
    AgeGapProtocol,
    CrossGroupProtocol,
    LeaveOneOutProtocol,
    LongitudinalProtocol,
)
from kdlib_faces.harness.image_sets import ImageSet
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, faces_of, task_of_protocol

__all__ = [
    "age_errors_task", "age_gap_task", "between_groups_task", "leave_one_out_task", "longitudinal_task",
    "tasks_of_faces",
]  # fmt: skip


class _Ages(TypedDict, total=False):
    """The age argument of a protocol: one of the two."""

    ages: NDArray[np.float32]
    age_groups: NDArray[np.str_]


def _faces(spec: ProtocolSpec, settings: Settings) -> tuple[FaceList, ImageSet]:
    spec.check_options("faces", "images")
    return faces_of(spec, settings, path_is_list=True)


def _aged_rows(
    spec: ProtocolSpec, faces: FaceList, kind: str = "an age or an age group"
) -> tuple[NDArray[np.int64], _Ages, tuple[str, ...]]:
    """Rows of known age, their ages or age groups (of which more are known), and a note on the rows that are left out.

    Args:
        spec: The protocol, for the error.
        faces: The list.
        kind: `"an age"`, `"an age_group"`, or either.
    """
    aged = grouped = np.arange(0)
    if faces.ages is not None and kind != "an age_group":
        aged = np.flatnonzero(np.isfinite(faces.ages))
    if faces.age_groups is not None and kind != "an age":
        grouped = np.flatnonzero(faces.age_groups >= 0)
    if faces.ages is not None and aged.size and aged.size >= grouped.size:
        rows, by = aged, _Ages(ages=faces.ages[aged])
    elif faces.age_groups is not None and grouped.size:
        rows, by = grouped, _Ages(age_groups=np.asarray(faces.group_names)[faces.age_groups[grouped]])
    else:
        raise spec.error(f"no image of {', '.join(faces.sources)} has {kind}")
    note = f"{len(rows)} of {len(faces)} images, the others have no known age"
    return rows, by, () if len(rows) == len(faces) else (note,)


def age_gap_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """All pairs by age gap, or by age groups."""
    faces, images = _faces(spec, settings)
    kind = {"age_gap": "an age", "age_group": "an age_group"}.get(spec.name, "an age or an age group")
    rows, by, notes = _aged_rows(spec, faces, kind)
    config = settings.config
    protocol = AgeGapProtocol(
        faces.identities[rows], **by, bins=config.bins, fars=config.fars, **asdict(config.sampling)
    )
    return task_of_protocol(name, title, protocol, images, rows=rows, convention=settings.convention, notes=notes)


def between_groups_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """The last group in alphabetical order against the first, such as young against adult."""
    faces, images = _faces(spec, settings)
    codes = np.full(len(faces), -1) if faces.age_groups is None else faces.age_groups
    groups = np.asarray([*faces.group_names, ""])[codes]
    names = sorted(set(groups.tolist()) - {""})
    if len(names) < 2:
        raise spec.error("images of two age groups are needed (a column age_group)")
    config = settings.config
    protocol = CrossGroupProtocol(
        faces.identities,
        groups,
        probe=names[-1],
        gallery=names[0],
        fars=config.fars,
        ranks=[rank for rank in config.ranks if rank <= int((groups == names[0]).sum())],
        **asdict(config.sampling),
    )
    return task_of_protocol(name, title, protocol, images, convention=settings.convention)


def age_errors_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """FNMR by gap and by the younger age, FMR among images of one age, slopes."""
    faces, images = _faces(spec, settings)
    rows, by, notes = _aged_rows(spec, faces)
    config = settings.config
    protocol = AgeErrorProtocol(
        faces.identities[rows], **by, fars=config.fars, gap_bins=config.bins, **asdict(config.sampling)
    )
    return task_of_protocol(name, title, protocol, images, rows=rows, convention=settings.convention, notes=notes)


def leave_one_out_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Each image of a list against all the others."""
    faces, images = _faces(spec, settings)
    if int(np.bincount(faces.identities).max()) < 2:
        raise spec.error("no identity has two images")
    given, sampling = settings.config.ranks, settings.config.sampling
    ranks = tuple(rank for rank in given if rank < len(faces)) or (1,)
    left_out = [str(rank) for rank in given if rank >= len(faces)]
    notes = [f"no rank {', '.join(left_out)}: the gallery has {len(faces) - 1} images"] if left_out else []
    ages = None if faces.ages is None or not np.isfinite(faces.ages).all() else faces.ages
    protocol = LeaveOneOutProtocol(faces.identities, ranks, ages=ages, **asdict(sampling))
    return task_of_protocol(name, title, protocol, images, convention=settings.convention, notes=notes)


def longitudinal_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Identities over the years: a list with ages or dates, or `--data` with ages."""
    spec.check_options("reference")
    rows: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()
    if spec.path is not None:
        dated = read_longitudinal(spec.path)
        identities, years = dated.identities, dated.years
        images = settings.image_set(spec.path, FileImages(dated.paths))
    else:
        faces, images = faces_of(spec, settings, path_is_list=True)
        rows, by, notes = _aged_rows(spec, faces, "an age")
        identities, years = faces.identities[rows], by["ages"].astype(np.float64)
    reference = cast(Literal["first", "all"], spec.choice("reference", ("first", "all")))
    fars, sampling = settings.config.fars, settings.config.sampling
    protocol = LongitudinalProtocol(identities, years, reference=reference, fars=fars, **asdict(sampling))
    return task_of_protocol(name, title, protocol, images, rows=rows, convention=settings.convention, notes=notes)


def tasks_of_faces(settings: Settings) -> tuple[list[EvaluationTask], list[str]]:
    """All protocols that the lists of `--data` allow if none is given, and notes on those that they do not allow."""
    tasks, notes = [], []
    for name, title, make in (
        ("age_gap", "By age", age_gap_task),
        ("between_groups", "One age group against another", between_groups_task),
        ("leave_one_out", "Leave-one-out identification", leave_one_out_task),
    ):
        if name == "between_groups" and (settings.faces is None or settings.faces.age_groups is None):
            continue
        try:
            tasks.append(make(ProtocolSpec("faces", None, {}, ""), settings, name, title))
        except InputError as error:
            notes.append(f"not evaluated: {title[0].lower()}{title[1:]}, {error}")
    return tasks, notes
