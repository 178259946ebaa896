"""Recipe: what `evaluate` measures on lists of faces: by age, between age groups, each image among the others."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.lists import FaceList
from kdlib_faces.evaluation import AgeErrorProtocol, AgeGapProtocol, CrossGroupProtocol
from kdlib_faces.harness.image_sets import ImageSet
from kdlib_faces.harness.panels_ages import AgesPanel
from kdlib_faces.harness.panels_groups import AgeErrorsPanel, CrossGroupPanel
from kdlib_faces.harness.panels_ranks import LeaveOneOutPanel
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, faces_of, on_rows

__all__ = ["age_errors_task", "ages_task", "groups_task", "leave_one_out_task", "tasks_of_faces"]


def ages_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """All pairs by age gap, or by age groups."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    kind = "groups" if asked.name == "age_group" else "ages"
    task = ages_of_faces(faces, images, settings, name, title, kind)
    if task is None:
        column = "age_group" if kind == "groups" else "age"
        raise InputError(f"--protocol {asked.text}: no image of {', '.join(faces.sources)} has an {column}")
    return task


def aged_rows(faces: FaceList, kind: str = "either") -> tuple[NDArray[np.int64], dict[str, Any]] | None:
    """Rows of known age, and their ages or age groups as a protocol takes them; None where no image has any.

    Args:
        faces: the list.
        kind: `"ages"`, `"groups"`, or `"either"`: what more images have.
    """
    rows = np.arange(len(faces))
    aged = rows[:0] if faces.ages is None or kind == "groups" else np.flatnonzero(np.isfinite(faces.ages))
    grouped = rows[:0] if faces.age_groups is None or kind == "ages" else np.flatnonzero(faces.age_groups >= 0)
    if len(aged) and len(aged) >= len(grouped):
        assert faces.ages is not None
        return aged, {"ages": faces.ages[aged]}
    if not len(grouped):
        return None
    assert faces.age_groups is not None
    return grouped, {"age_groups": np.asarray(faces.group_names)[faces.age_groups[grouped]]}


def _left_out(faces: FaceList, rows: NDArray[np.int64]) -> tuple[str, ...]:
    whole = len(rows) == len(faces)
    return () if whole else (f"{len(rows)} of {len(faces)} images, the others have no known age",)


def ages_of_faces(
    faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str, kind: str = "either"
) -> EvaluationTask | None:
    """By exact ages or by groups, see `aged_rows`; None where no image has any."""
    found = aged_rows(faces, kind)
    if found is None:
        return None
    rows, by = found
    bins: dict[str, Any] = {"bins": settings.bins} if "ages" in by else {}
    protocol = AgeGapProtocol(faces.identities[rows], fars=settings.fars, **settings.sampling, **by, **bins)
    panel = AgesPanel(
        name, title, protocol, lambda row: images.label(int(rows[row])), settings.convention, _left_out(faces, rows),
        settings.num_failures,
    )  # fmt: skip
    return EvaluationTask(name, (images,), on_rows(images, rows, panel.judge))


def groups_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """One age group against another: young faces among adult ones, as LAG has them."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    if faces.age_groups is None or len(set(faces.age_groups[faces.age_groups >= 0].tolist())) < 2:
        raise InputError(f"--protocol {asked.text}: images of two age groups are needed (a column age_group)")
    return groups_of_faces(faces, images, settings, name, title)


def groups_of_faces(faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str) -> EvaluationTask:
    """The last group in the alphabet against the first: young against adult."""
    assert faces.age_groups is not None
    groups = np.asarray([*faces.group_names, ""])[faces.age_groups]
    there = sorted(set(groups.tolist()) - {""})
    protocol = CrossGroupProtocol(
        faces.identities, groups, probe=there[-1], gallery=there[0], fars=settings.fars,
        ranks=[rank for rank in settings.ranks if rank <= int((groups == there[0]).sum())], **settings.sampling,
    )  # fmt: skip
    panel = CrossGroupPanel(
        name,
        title,
        protocol,
        images.label,
        settings.convention,
        num_failures=settings.num_failures,
        **settings.sampling,
    )
    return EvaluationTask(name, (images,), lambda given: panel.judge(given[images.name]))


def age_errors_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """FNMR by gap and by the younger age, FMR among people of one age, slopes."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    found = aged_rows(faces)
    if found is None:
        raise InputError(f"--protocol {asked.text}: no image of {', '.join(faces.sources)} has an age or an age group")
    rows, by = found
    protocol = AgeErrorProtocol(
        faces.identities[rows], fars=settings.fars, gap_bins=settings.bins, **by, **settings.sampling
    )
    panel = AgeErrorsPanel(
        name, title, protocol, settings.convention, _left_out(faces, rows), settings.seed,
        lambda row: images.label(int(rows[row])), settings.num_failures,
    )  # fmt: skip
    return EvaluationTask(name, (images,), on_rows(images, rows, panel.judge))


def leave_one_out_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Each image of a list against all the others."""
    asked.known("faces", "images")
    faces, images = faces_of(asked, settings, path_is_list=True)
    if int(np.bincount(faces.identities).max()) < 2:
        raise InputError(f"--protocol {asked.text}: no identity has two images")
    return leave_one_out_of_faces(faces, images, settings, name, title)


def leave_one_out_of_faces(
    faces: FaceList, images: ImageSet, settings: Settings, name: str, title: str
) -> EvaluationTask:
    """Each of these faces against all the others."""
    ages = _any_age(faces)
    ranks = tuple(rank for rank in settings.ranks if rank < len(faces)) or (1,)
    left_out = [str(rank) for rank in settings.ranks if rank >= len(faces)]
    notes = (f"no rank {', '.join(left_out)}: the gallery has {len(faces) - 1} images",) if left_out else ()
    panel = LeaveOneOutPanel(
        name, title, faces.identities, images.label, settings.convention,
        ages=ages if ages is not None and bool(np.isfinite(ages).all()) else None,
        ranks=ranks, notes=notes, num_failures=settings.num_failures, **settings.sampling,
    )  # fmt: skip
    return EvaluationTask(name, (images,), lambda given: panel.judge(given[images.name]))


def _any_age(faces: FaceList) -> NDArray[np.float64] | None:
    return None if faces.ages is None else faces.ages.astype(np.float64)


def tasks_of_faces(settings: Settings) -> tuple[list[EvaluationTask], list[str]]:
    """What a face list can carry where no protocol is named, and notes on what it cannot."""
    faces, images = settings.faces, settings.face_images
    assert faces is not None
    assert images is not None
    tasks: list[EvaluationTask] = []
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
