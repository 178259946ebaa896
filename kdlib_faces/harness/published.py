"""Recipe: the sets whose lists are published, as tasks of `evaluate`: pair lists, FG-NET, MegaFace, IJB-B and IJB-C, years."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.bin import load_bin
from kdlib_faces.data.image_pairs import ImagePairs
from kdlib_faces.data.lists import IMAGE_SUFFIXES, FaceList
from kdlib_faces.data.sets.agedb import read_agedb_pairs
from kdlib_faces.data.sets.cacd import cacd_vs_pairs
from kdlib_faces.data.sets.calfw import read_calfw_pairs, read_cplfw_pairs
from kdlib_faces.data.sets.cfp import read_cfp_pairs
from kdlib_faces.data.sets.fgnet import read_fgnet
from kdlib_faces.data.sets.ijb import read_ijb
from kdlib_faces.data.sets.lfw import read_lfw_pairs
from kdlib_faces.data.sets.longitudinal import read_longitudinal
from kdlib_faces.evaluation import PAIR_SETS, LongitudinalProtocol, PairProtocol, pair_set
from kdlib_faces.harness.image_sets import ImageSet, aligned_images, images_of_bytes, images_of_files, rows_only
from kdlib_faces.harness.panels import Arrays, ProtocolResult
from kdlib_faces.harness.panels_distractors import DistractorsPanel
from kdlib_faces.harness.panels_pairs import PairsPanel
from kdlib_faces.harness.panels_ranks import LeaveOneOutPanel
from kdlib_faces.harness.panels_templates import TemplatesPanel
from kdlib_faces.harness.panels_years import LongitudinalPanel
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, faces_of, on_rows

__all__ = [
    "agedb_task",
    "bin_task",
    "cacd_task",
    "calfw_task",
    "cfp_task",
    "cplfw_task",
    "distractors_task",
    "fgnet_task",
    "ijb_task",
    "lfw_task",
    "longitudinal_task",
    "pairs_task",
]

MOST_FILES = 20_000_000
PUBLISHED = {
    "LFW View 2": "lfw", "AgeDB-5": "agedb_05", "AgeDB-10": "agedb_10", "AgeDB-20": "agedb_20", "AgeDB-30": "agedb_30",
    "CALFW": "calfw", "CPLFW": "cplfw", "CFP-FP": "cfp_fp", "CFP-FF": "cfp_ff", "CACD-VS": "cacd_vs",
}  # fmt: skip


def pairs_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Pairs in LFW's format."""
    asked.known("images", "faces")
    found = read_lfw_pairs(asked.wants("a pairs file"))
    return task_of_pairs(found, asked, settings, name, title if asked.name != "pairs" else found.name)


lfw_task = pairs_task


def bin_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
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
    return EvaluationTask(name, (images,), lambda given: panel.judge(given[images.name]))


def agedb_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """A protocol of AgeDB."""
    asked.known("images", "published")
    found = read_agedb_pairs(asked.wants("a protocol file (.mat)"), published=asked.flag("published"))
    return task_of_pairs(found, asked, settings, name, found.name)


def calfw_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """CALFW's pairs."""
    return _two_lines(read_calfw_pairs, asked, settings, name)


def cplfw_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """CPLFW's pairs."""
    return _two_lines(read_cplfw_pairs, asked, settings, name)


def _two_lines(read: Callable[..., ImagePairs], asked: ProtocolSpec, settings: Settings, name: str) -> EvaluationTask:
    asked.known("images", "published")
    found = read(asked.wants("a pairs file"), published=asked.flag("published"))
    return task_of_pairs(found, asked, settings, name, found.name)


def cfp_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """CFP, frontal against profile or frontal against frontal."""
    asked.known("images", "published", "kind")
    kind: Any = asked.more.get("kind", "FP").upper()
    folder = asked.wants("the set's folder, in which Protocol is")
    found = read_cfp_pairs(folder, kind, published=asked.flag("published"))
    asked = replace(asked, more={"images": str(folder), **asked.more})
    return task_of_pairs(found, asked, settings, name, found.name)


def cacd_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """CACD-VS, whose pairs are told by its images' names."""
    asked.known()
    asked = replace(asked, more={"images": str(asked.wants("the folder of images"))})
    return task_of_pairs(cacd_vs_pairs(), asked, settings, name, title)


def task_of_pairs(found: ImagePairs, asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Named pairs with the images of `images=`, of a face list, or with embeddings alone, rows in the order of the names."""
    notes: list[str] = []
    who: Any = found.identities
    ages = found.ages
    if "images" in asked.more:
        files = files_below(Path(asked.more["images"]))
        listed = FaceList(tuple(files), np.zeros(len(files), np.int64), ("",))
        present = np.arange(len(found.images))
        each = replace(
            found, left=present, right=present, same=np.ones(len(present), bool), fold_ids=present, assigned_folds=False
        ).locate(listed)
        where = np.full(len(present), -1)
        where[each.fold_ids] = np.arange(len(each.left))
        images = images_of_files(name, [files[row] for row in each.left])
        pairs = found.locate(listed)
        both = (where[found.left] >= 0) & (where[found.right] >= 0)
        left, right = where[found.left[both]], where[found.right[both]]
        who = None if who is None else np.asarray(who)[each.fold_ids]
        ages = None if ages is None else ages[each.fold_ids]
        same, folds, missing = pairs.same, pairs.fold_ids, pairs.missing
    elif "faces" in asked.more or settings.faces is not None:
        listed, images = faces_of(asked, settings, path_is_list=False)
        pairs = found.locate(listed)
        left, right, same, folds, missing = pairs.left, pairs.right, pairs.same, pairs.fold_ids, pairs.missing
        who, ages = listed.identities, listed.ages
    else:
        images = rows_only(name, len(found.images), found.images.__getitem__)
        left, right, same, folds, missing = found.left, found.right, found.same, found.fold_ids, 0
    if missing:
        notes.append(f"{missing} of {len(found)} pairs left out, their images are not there")
    if same.all() or not same.any():
        raise InputError(f"--protocol {asked.text}: pairs of one person and of two are needed, got one kind only")
    if who is not None:
        who = np.asarray(who)
        wrong = int(((who[left] == who[right]) != same).sum())
        if wrong:
            who = None
            notes.append(f"names and labels disagree on {wrong} pairs: intervals take pairs as independent")
    options: dict[str, Any] = {
        "fold_ids": folds, "threshold": settings.threshold, "fars": settings.fars, "identities": who, "notes": notes,
        "level": settings.level,
    }  # fmt: skip
    known = PAIR_SETS.get(PUBLISHED.get(found.name, ""))
    if known is not None and len(found) == known.pairs:
        options["notes"] = notes[1:] if missing else notes  # the set's own note counts the pairs
        protocol = pair_set(known.name, left, right, same, **options)
    else:
        protocol = PairProtocol(left, right, same, **options)
    convention = dict(settings.convention)
    if found.sha256:
        convention["List"] = f"{Path(found.source).name}, SHA-256 {found.sha256[:16]}…"
    if found.assigned_folds:
        convention["Folds"] = "dealt: slices of the pairs of one person and of those of two"
    panel = PairsPanel(
        name, title, protocol, images.label, convention, ages=None if ages is None else ages.astype(np.float64),
        bins=settings.bins, worst=settings.worst, **settings.sampling,
    )  # fmt: skip
    return EvaluationTask(name, (images,), lambda given: panel.judge(given[images.name]))


def files_below(folder: Path) -> list[Path]:
    """Every image file below a folder, sorted.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"folder of images not found: {folder}")
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        files += [Path(parent, each) for each in sorted(names) if Path(each).suffix.lower() in IMAGE_SUFFIXES]
        if len(files) > MOST_FILES:
            raise InputError(f"{folder}: more than {MOST_FILES:,} images")
    if not files:
        raise InputError(f"{folder}: no images found")
    return files


def _fgnet(asked: ProtocolSpec) -> tuple[FaceList, ImageSet, str]:
    """FG-NET's images, aligned by their landmarks where every image has a `.pts` file."""
    from kdlib_faces.data.landmarks import five_points, read_points

    folder = asked.wants("the folder of FG-NET's images")
    faces = read_fgnet(folder, published=asked.flag("published"))
    points = {each.stem.casefold(): each for each in sorted(folder.rglob("*")) if each.suffix.lower() == ".pts"}
    if all(path.stem.casefold() in points for path in faces.paths):
        five = np.stack([five_points(read_points(points[path.stem.casefold()])) for path in faces.paths])
        return faces, aligned_images("fgnet", faces.paths, five), "by five points from the .pts files"
    return faces, images_of_files("fgnet", faces.paths), "none: images as they are, cut to their central square"


def fgnet_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Leave one image out on FG-NET, by the probe's age and by the gap."""
    asked.known("published")
    faces, images, alignment = _fgnet(asked)
    assert faces.ages is not None
    panel = LeaveOneOutPanel(
        name, title, faces.identities, images.label, {"Alignment": alignment, **settings.convention},
        ages=faces.ages.astype(np.float64), ranks=settings.ranks, worst=settings.worst, **settings.sampling,
    )  # fmt: skip
    return EvaluationTask(name, (images,), lambda given: panel.judge(given[images.name]))


def distractors_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """FG-NET's probes among distractors: a folder of images, or the file `distractors.npy` of a folder of embeddings."""
    asked.known("distractors", "published", "far")
    faces, images, alignment = _fgnet(asked)
    if "distractors" in asked.more:
        folder = Path(asked.more["distractors"])
        strangers = images_of_files("distractors", files_below(folder))
        told = f"{strangers.count:,} images of {folder.name}"
    else:
        strangers = rows_only("distractors", None)
        told = "rows of distractors.npy"
    assert faces.ages is not None
    far = asked.number("far", 1e-6)
    panel = DistractorsPanel(
        name, title, faces.identities, faces.ages.astype(np.float64),
        {"Distractors": told, "Alignment": alignment, **settings.convention}, fars=(far,), ranks=settings.ranks,
        sizes=tuple(10**power for power in range(1, 7)), bins=settings.bins, progress=settings.progress,
        labels=images.label, stranger_labels=strangers.label, worst=settings.worst, **settings.sampling,
    )  # fmt: skip

    def judge(given: Mapping[str, Arrays]) -> ProtocolResult:
        return panel.judge(given[images.name], given[strangers.name])

    return EvaluationTask(name, (images, strangers), judge)


def ijb_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> list[EvaluationTask]:
    """IJB-B or IJB-C: 1:1 where its pairs are there, 1:N where its galleries and probes are."""
    asked.known("images", "published", "norm", "scores", "rule")
    which: Any = "IJB-B" if asked.name == "ijbb" else "IJB-C"
    found = read_ijb(asked.wants("the folder of its lists"), which, published=asked.flag("published"))
    if "images" in asked.more:
        files = [Path(asked.more["images"], each) for each in found.templates.images]
        images = (
            images_of_files(asked.name, files)
            if found.landmarks is None
            else aligned_images(asked.name, files, found.landmarks.points)
        )
        alignment = "none: images as they are" if found.landmarks is None else "by the list's five points"
    else:
        images = rows_only(asked.name, len(found.templates), found.templates.images.__getitem__)
        alignment = "that of the embeddings"
    weighed = asked.flag("scores") and found.landmarks is not None
    norm: Any = asked.more.get("norm", "keep")
    rule: Any = asked.more.get("rule", "exact")
    for key, value, allowed in (("norm", norm, ("keep", "unit")), ("rule", rule, ("exact", "nearest"))):
        if value not in allowed:
            raise InputError(f"--protocol {asked.text}: {key} must be {' or '.join(allowed)}, got {value!r}")
    panel = TemplatesPanel(
        name, title, found.templates.template_ids, found.templates.media_ids,
        {"Alignment": alignment, **settings.convention},
        pairs=None if found.pairs is None else (found.pairs.left, found.pairs.right, found.pairs.same),
        galleries=None if found.galleries is None else [(g.template_ids, g.subject_ids) for g in found.galleries],
        probes=None if found.probes is None else (found.probes.template_ids, found.probes.subject_ids),
        detector_scores=found.landmarks.scores if weighed and found.landmarks is not None else None,
        feature_norm=norm, mode=rule, worst=settings.worst, **settings.sampling,
    )  # fmt: skip
    tasks = []
    if panel.pairs is not None:
        tasks.append(EvaluationTask(name, (images,), lambda given: panel.verify(given[images.name])))
    if panel.galleries is not None and panel.probes is not None:
        tasks.append(EvaluationTask(f"{name}_1n", (images,), lambda given: panel.identify(given[images.name])))
    if not tasks:
        raise InputError(f"--protocol {asked.text}: neither pairs nor galleries and probes of {which} are there")
    return tasks


def longitudinal_task(asked: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """People over years: a list with ages or dates, or `--faces` with ages."""
    asked.known("reference")
    notes: tuple[str, ...] = ()
    if asked.path is not None:
        listed = read_longitudinal(asked.path)
        identities, years = listed.identities, listed.years
        images = settings.set_of(asked.path, listed.paths)
        rows = np.arange(len(identities))
    else:
        faces, images = faces_of(asked, settings, path_is_list=True)
        if faces.ages is None:
            raise InputError(f"--protocol {asked.text}: no image of {', '.join(faces.sources)} has an age")
        rows = np.flatnonzero(np.isfinite(faces.ages))
        identities, years = faces.identities[rows], faces.ages[rows].astype(np.float64)
        if len(rows) < len(faces):
            notes = (f"{len(rows)} of {len(faces)} images, the others have no known age",)
    reference: Any = asked.more.get("reference", "first")
    if reference not in ("first", "all"):
        raise InputError(f"--protocol {asked.text}: reference must be first or all, got {reference!r}")
    protocol = LongitudinalProtocol(identities, years, reference=reference, fars=settings.fars, **settings.sampling)
    panel = LongitudinalPanel(
        name, title, protocol, settings.convention, notes, **settings.sampling,
        labels=lambda row: images.label(int(rows[row])), worst=settings.worst,
    )  # fmt: skip

    return EvaluationTask(name, (images,), on_rows(images, rows, panel.judge))
