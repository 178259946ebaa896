"""Tasks on face lists: by age, between age groups, over the years, and identification of each image."""

from dataclasses import asdict
from typing import Literal, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.sets.longitudinal import read_longitudinal
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
    "age_errors_task",
    "age_gap_task",
    "between_groups_task",
    "leave_one_out_task",
    "longitudinal_task",
    "tasks_of_faces",
]


class _Ages(TypedDict, total=False):
    """The age argument of a protocol: one of the two."""

    ages: NDArray[np.float32]
    age_groups: NDArray[np.str_]


def _aged_rows(
    faces: FaceList, kind: Literal["ages", "groups", "either"] = "either"
) -> tuple[NDArray[np.int64], _Ages] | None:
    """Rows of known age, and their ages or age groups; None if no image has any.

    Args:
        faces: The list.
        kind: `"ages"`, `"groups"`, or `"either"` for what more images have.
    """
    aged = grouped = np.arange(0)
    if faces.ages is not None and kind != "groups":
        aged = np.flatnonzero(np.isfinite(faces.ages))
    if faces.age_groups is not None and kind != "ages":
        grouped = np.flatnonzero(faces.age_groups >= 0)
    if faces.ages is not None and aged.size and aged.size >= grouped.size:
        return aged, {"ages": faces.ages[aged]}
    if faces.age_groups is None or not grouped.size:
        return None
    return grouped, {"age_groups": np.asarray(faces.group_names)[faces.age_groups[grouped]]}


def _left_out(faces: FaceList, rows: NDArray[np.int64]) -> tuple[str, ...]:
    complete = len(rows) == len(faces)
    return () if complete else (f"{len(rows)} of {len(faces)} images, the others have no known age",)


def age_gap_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """All pairs by age gap, or by age groups."""
    spec.check_options("faces", "images")
    faces, images = faces_of(spec, settings, path_is_list=True)
    task = _age_gap(faces, images, settings, name, title, "groups" if spec.name == "age_group" else "ages")
    if task is None:
        column = "age_group" if spec.name == "age_group" else "age"
        raise InputError(f"--protocol {spec.text}: no image of {', '.join(faces.sources)} has an {column}")
    return task


def _age_gap(
    faces: FaceList,
    images: ImageSet,
    settings: Settings,
    name: str,
    title: str,
    kind: Literal["ages", "groups", "either"] = "either",
) -> EvaluationTask | None:
    """None if no image has an age or a group."""
    aged = _aged_rows(faces, kind)
    if aged is None:
        return None
    rows, by = aged
    protocol = AgeGapProtocol(
        faces.identities[rows], **by, bins=settings.bins, fars=settings.fars, **asdict(settings.sampling)
    )
    notes = _left_out(faces, rows)
    return task_of_protocol(name, title, protocol, images, rows=rows, convention=settings.convention, notes=notes)


def between_groups_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """One age group against another."""
    spec.check_options("faces", "images")
    faces, images = faces_of(spec, settings, path_is_list=True)
    task = _between_groups(faces, images, settings, name, title)
    if task is None:
        raise InputError(f"--protocol {spec.text}: images of two age groups are needed (a column age_group)")
    return task


def _between_groups(
    faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str
) -> EvaluationTask | None:
    """The last group in alphabetical order against the first, such as young against adult; None without two groups."""
    if faces.age_groups is None:
        return None
    groups = np.asarray([*faces.group_names, ""])[faces.age_groups]
    names = sorted(set(groups.tolist()) - {""})
    if len(names) < 2:
        return None
    protocol = CrossGroupProtocol(
        faces.identities,
        groups,
        probe=names[-1],
        gallery=names[0],
        fars=settings.fars,
        ranks=[rank for rank in settings.ranks if rank <= int((groups == names[0]).sum())],
        **asdict(settings.sampling),
    )
    return task_of_protocol(name, title, protocol, images, convention=settings.convention)


def age_errors_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """FNMR by gap and by the younger age, FMR among images of one age, slopes."""
    spec.check_options("faces", "images")
    faces, images = faces_of(spec, settings, path_is_list=True)
    aged = _aged_rows(faces)
    if aged is None:
        raise InputError(f"--protocol {spec.text}: no image of {', '.join(faces.sources)} has an age or an age group")
    rows, by = aged
    protocol = AgeErrorProtocol(
        faces.identities[rows], **by, fars=settings.fars, gap_bins=settings.bins, **asdict(settings.sampling)
    )
    notes = _left_out(faces, rows)
    return task_of_protocol(name, title, protocol, images, rows=rows, convention=settings.convention, notes=notes)


def leave_one_out_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Each image of a list against all the others."""
    spec.check_options("faces", "images")
    faces, images = faces_of(spec, settings, path_is_list=True)
    task = _leave_one_out(faces, images, settings, name, title)
    if task is None:
        raise InputError(f"--protocol {spec.text}: no identity has two images")
    return task


def _leave_one_out(
    faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str
) -> EvaluationTask | None:
    """None if no identity has two images."""
    if int(np.bincount(faces.identities).max()) < 2:
        return None
    ranks = tuple(rank for rank in settings.ranks if rank < len(faces)) or (1,)
    left_out = [str(rank) for rank in settings.ranks if rank >= len(faces)]
    notes = [f"no rank {', '.join(left_out)}: the gallery has {len(faces) - 1} images"] if left_out else []
    ages = None if faces.ages is None or not np.isfinite(faces.ages).all() else faces.ages
    protocol = LeaveOneOutProtocol(faces.identities, ranks, ages=ages, **asdict(settings.sampling))
    return task_of_protocol(name, title, protocol, images, convention=settings.convention, notes=notes)


def longitudinal_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Identities over the years: a list with ages or dates, or `--faces` with ages."""
    spec.check_options("reference")
    rows: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()
    if spec.path is not None:
        dated = read_longitudinal(spec.path)
        identities, years = dated.identities, dated.years
        images = settings.image_set(spec.path, dated.paths)
    else:
        faces, images = faces_of(spec, settings, path_is_list=True)
        if faces.ages is None:
            raise InputError(f"--protocol {spec.text}: no image of {', '.join(faces.sources)} has an age")
        rows = np.flatnonzero(np.isfinite(faces.ages))
        identities, years = faces.identities[rows], faces.ages[rows].astype(np.float64)
        notes = _left_out(faces, rows)
    reference = cast(Literal["first", "all"], spec.choice("reference", ("first", "all")))
    protocol = LongitudinalProtocol(
        identities, years, reference=reference, fars=settings.fars, **asdict(settings.sampling)
    )
    return task_of_protocol(name, title, protocol, images, rows=rows, convention=settings.convention, notes=notes)


def tasks_of_faces(settings: Settings) -> tuple[list[EvaluationTask], list[str]]:
    """All protocols that a face list allows if none is given, and notes on those that it does not allow."""
    assert settings.faces is not None
    assert settings.face_images is not None
    given = settings.faces, settings.face_images, settings
    age_gap = _age_gap(*given, "age_gap", "By age")
    leave_one_out = _leave_one_out(*given, "leave_one_out", "Leave-one-out identification")
    notes = []
    if age_gap is None:
        notes.append("no image has an age or an age group: no evaluation by age gap")
    if leave_one_out is None:
        notes.append("no identity has two images: no leave-one-out identification")
    groups = _between_groups(*given, "between_groups", "One age group against another")
    return [task for task in (age_gap, groups, leave_one_out) if task is not None], notes
