"""Tasks on sets with published lists: pair lists, FG-NET, MegaFace, IJB-B and IJB-C."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError
from kdlib_faces.data.formats.bin import load_bin
from kdlib_faces.data.image_files import describe_skipped, scan_folder
from kdlib_faces.data.image_pairs import ImagePairs, PairList
from kdlib_faces.data.landmarks import five_points, read_points
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.sets.cacd import cacd_vs_pairs
from kdlib_faces.data.sets.cfp import read_cfp_pairs
from kdlib_faces.data.sets.fgnet import read_fgnet
from kdlib_faces.data.sets.ijb import read_ijb
from kdlib_faces.data.sets.lfw import read_lfw_pairs
from kdlib_faces.data.sources.base import FileImages
from kdlib_faces.evaluation import (
    PAIR_SETS,
    DistractorProtocol,
    DistractorResult,
    LeaveOneOutProtocol,
    PairProtocol,
    TemplateIdentificationProtocol,
    TemplateVerificationProtocol,
    pair_set,
)
from kdlib_faces.harness.image_sets import (
    Embeddings,
    ImageSet,
    aligned_images,
    images_of_bytes,
    images_of_files,
    rows_only,
)
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, TaskMaker, faces_of, task_of_protocol

__all__ = [
    "bin_task", "cacd_task", "cfp_task", "distractors_task", "fgnet_task", "ijb_task", "pairs_task",
    "published_pairs",
]  # fmt: skip

SIZES = tuple(10**power for power in range(1, 7))
"""Numbers of distractors at which rank 1 is reported."""
IJB_FPIRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
PUBLISHED = {
    "LFW View 2": "lfw",
    **{f"AgeDB-{years}": f"agedb_{years:02d}" for years in (5, 10, 20, 30)},
    "CALFW": "calfw",
    "CPLFW": "cplfw",
    "CFP-FP": "cfp_fp",
    "CFP-FF": "cfp_ff",
    "CACD-VS": "cacd_vs",
}
"""Name of a list's reader to name in `PAIR_SETS`."""


def pairs_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Pairs in LFW's format."""
    spec.check_options("images", "faces")
    pairs = read_lfw_pairs(spec.require_path("a pairs file"))
    return _task_of_pairs(pairs, spec, settings, name, title if spec.name != "pairs" else pairs.name)


def bin_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """A `.bin` set with its images."""
    spec.check_options()
    path = spec.require_path("a .bin file")
    pairs = load_bin(path)
    config = settings.config
    protocol = PairProtocol.interleaved(pairs.same, threshold=config.threshold, fars=config.fars, level=config.level)
    notes = ["names and ages are not in a .bin: intervals take pairs as independent, folds may share identities"]
    images = images_of_bytes(path.stem, pairs.images)
    return task_of_protocol(name, f"{path.stem} (.bin)", protocol, images, convention=settings.convention, notes=notes)


def published_pairs(read: Callable[..., ImagePairs], what: str) -> TaskMaker:
    """The maker of tasks on AgeDB, CALFW or CPLFW: `read` reads the list, and `what` describes its file in errors."""

    def make(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
        spec.check_options("images", "published")
        pairs = read(spec.require_path(what), published=spec.flag("published"))
        return _task_of_pairs(pairs, spec, settings, name, pairs.name)

    return make


def cfp_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """CFP, frontal against profile or frontal against frontal."""
    spec.check_options("images", "published", "kind")
    folder = spec.require_path("the set's folder, in which Protocol is")
    kind = cast(Literal["FP", "FF"], spec.options.get("kind", "FP").upper())
    pairs = read_cfp_pairs(folder, kind, published=spec.flag("published"))
    spec = replace(spec, options={"images": str(folder), **spec.options})
    return _task_of_pairs(pairs, spec, settings, name, pairs.name)


def cacd_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """CACD-VS, whose pairs follow from the names of its images."""
    spec.check_options()
    spec = replace(spec, options={"images": str(spec.require_path("the folder of images"))})
    return _task_of_pairs(cacd_vs_pairs(), spec, settings, name, title)


def _task_of_pairs(pairs: ImagePairs, spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Named pairs with the images of `images=` or of a face list, or with embeddings alone in the order of the names."""
    located = _locate(pairs, spec, settings, name)
    left, right, same = located.pairs.left, located.pairs.right, located.pairs.same
    if same.all() or not same.any():
        raise spec.error("genuine and impostor pairs are needed, got one kind only")
    known = PAIR_SETS.get(PUBLISHED.get(pairs.name, ""))
    published = known is not None and len(pairs) == known.pairs
    notes = []
    if located.pairs.missing:
        # The note of a published set counts the pairs itself.
        notes += (
            [] if published else [f"{located.pairs.missing} of {len(pairs)} pairs left out, their images are not there"]
        )
        notes += [located.skipped] if located.skipped else []
    identities = located.identities
    if identities is not None:
        wrong = int(((identities[left] == identities[right]) != same).sum())
        if wrong:
            identities = None
            notes.append(f"names and labels disagree on {wrong} pairs: intervals take pairs as independent")
    config = settings.config
    build = partial(pair_set, known.name) if known is not None and published else PairProtocol
    protocol = build(
        left, right, same, fold_ids=located.pairs.fold_ids, threshold=config.threshold, fars=config.fars,
        identities=identities, ages=located.ages, gap_bins=config.bins, notes=notes, **asdict(config.sampling),
    )  # fmt: skip
    convention = dict(settings.convention)
    if pairs.sha256:
        convention["List"] = f"{Path(pairs.source).name}, SHA-256 {pairs.sha256[:16]}…"
    if pairs.assigned_folds:
        convention["Folds"] = "assigned: slices of the genuine pairs and of the impostor pairs"
    return task_of_protocol(name, title, protocol, located.images, convention=convention)


@dataclass(frozen=True, eq=False)
class _LocatedPairs:
    """Pairs as rows of n images.

    Attributes:
        images: The images.
        pairs: The pairs whose images are there.
        identities: (n,) identity of each image; None if unknown.
        ages: (n,) years at each image; None if unknown.
        skipped: Note on files in the folder of the images that are not images; empty without any.
    """

    images: ImageSet
    pairs: PairList
    identities: NDArray[np.str_] | NDArray[np.int64] | None
    ages: NDArray[np.float32] | None
    skipped: str = ""


def _locate(pairs: ImagePairs, spec: ProtocolSpec, settings: Settings, name: str) -> _LocatedPairs:
    """Find the images of named pairs in the folder `images=`, or in a face list; without either, only rows are known."""
    identities = None if pairs.identities is None else np.asarray(pairs.identities)
    if "images" in spec.options:
        files, skipped = _files_below(Path(spec.options["images"]))
        folder = FaceList(FileImages(files), np.zeros(len(files), np.int64), ("",))
        located, rows = pairs.locate(folder), pairs.rows(folder)
        found = np.flatnonzero(rows >= 0)
        row_of = np.full(len(rows), -1)
        row_of[found] = np.arange(len(found))
        present = (row_of[pairs.left] >= 0) & (row_of[pairs.right] >= 0)
        return _LocatedPairs(
            images_of_files(name, [files[row] for row in rows[found]]),
            replace(located, left=row_of[pairs.left[present]], right=row_of[pairs.right[present]]),
            None if identities is None else identities[found],
            None if pairs.ages is None else pairs.ages[found],
            skipped,
        )
    if "faces" in spec.options or settings.faces is not None:
        faces, images = faces_of(spec, settings, path_is_list=False)
        return _LocatedPairs(images, pairs.locate(faces), faces.identities, faces.ages)
    images = rows_only(name, len(pairs.images), pairs.images.__getitem__)
    everything = PairList(pairs.left, pairs.right, pairs.same, pairs.fold_ids, missing=0)
    return _LocatedPairs(images, everything, identities, pairs.ages)


def _files_below(folder: Path) -> tuple[list[Path], str]:
    """Every image file below a folder, sorted, and a note on the other files, empty if there are none.

    Raises:
        InputError: There is no such folder, or no image in it.
    """
    files, others = scan_folder(folder)
    if not files:
        raise InputError(f"{folder}: no images found")
    return files, describe_skipped(folder, others)


def _fgnet(spec: ProtocolSpec) -> tuple[FaceList, NDArray[np.float32], ImageSet]:
    """FG-NET's faces, ages and images, aligned by their landmarks if every image has a `.pts` file."""
    folder = spec.require_path("the folder of FG-NET's images")
    faces = read_fgnet(folder, published=spec.flag("published"))
    assert faces.ages is not None
    points = {each.stem.casefold(): each for each in sorted(folder.rglob("*")) if each.suffix.lower() == ".pts"}
    if all(path.stem.casefold() in points for path in faces.paths):
        five = np.stack([five_points(read_points(points[path.stem.casefold()])) for path in faces.paths])
        return faces, faces.ages, aligned_images("fgnet", faces.paths, five, "the .pts files")
    return faces, faces.ages, images_of_files("fgnet", faces.paths)


def fgnet_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """Leave one image out on FG-NET, by the probe's age and by the gap."""
    spec.check_options("published")
    faces, ages, images = _fgnet(spec)
    config = settings.config
    protocol = LeaveOneOutProtocol(faces.identities, config.ranks, ages=ages, **asdict(config.sampling))
    convention = settings.convention
    return task_of_protocol(name, title, protocol, images, convention=convention, notes=faces.notes)


def distractors_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> EvaluationTask:
    """FG-NET's probes among distractors: a folder of images, or the file `distractors.npy` of a folder of embeddings."""
    spec.check_options("distractors", "published", "far")
    faces, ages, images = _fgnet(spec)
    notes = faces.notes
    if "distractors" in spec.options:
        folder = Path(spec.options["distractors"])
        files, skipped = _files_below(folder)
        distractors = images_of_files("distractors", files)
        notes += (skipped,) if skipped else ()
        source = f"{distractors.count:,} images of {folder.name}"
    else:
        distractors, source = rows_only("distractors", None), "rows of distractors.npy"
    far, config = spec.rate("far", 1e-6), settings.config

    def evaluate(embeddings: Mapping[str, Embeddings]) -> DistractorResult:
        others = embeddings[distractors.name]
        protocol = DistractorProtocol(
            faces.identities, others, fars=(far,), ranks=config.ranks, sizes=[size for size in SIZES if size <= len(others)],
            ages=ages, gap_bins=config.bins, progress=settings.progress, **asdict(config.sampling),
        )  # fmt: skip
        return protocol.evaluate(embeddings[images.name])

    convention = {"Distractors": source, **settings.convention}
    return EvaluationTask(name, title, (images, distractors), evaluate, convention=convention, notes=notes)


def ijb_task(spec: ProtocolSpec, settings: Settings, name: str, title: str) -> list[EvaluationTask]:
    """IJB-B or IJB-C: 1:1 if its pairs are there, 1:N if its galleries and probes are."""
    spec.check_options("images", "published", "norm", "scores", "rule")
    which: Literal["IJB-B", "IJB-C"] = "IJB-B" if spec.name == "ijbb" else "IJB-C"
    lists = read_ijb(spec.require_path("the folder of its lists"), which, published=spec.flag("published"))
    templates, landmarks = lists.templates, lists.landmarks
    if "images" in spec.options:
        files = [Path(spec.options["images"], each) for each in templates.images]
        if landmarks is None:
            images = images_of_files(spec.name, files)
        else:
            images = aligned_images(spec.name, files, landmarks.points, "the list")
    else:
        images = rows_only(spec.name, len(templates), templates.images.__getitem__)
    norm = cast(Literal["keep", "unit"], spec.choice("norm", ("keep", "unit")))
    rule = cast(Literal["exact", "nearest"], spec.choice("rule", ("exact", "nearest")))
    scores = landmarks.scores if spec.flag("scores") and landmarks is not None else None
    convention = settings.convention
    ids = templates.template_ids, templates.media_ids
    tasks = []
    if lists.pairs is not None:
        pairs = lists.pairs.left, lists.pairs.right, lists.pairs.same
        verification = TemplateVerificationProtocol(
            *ids, *pairs, detector_scores=scores, feature_norm=norm, mode=rule, level=settings.config.level
        )
        tasks.append(task_of_protocol(name, f"{title}, 1:1", verification, images, convention=convention))
    if lists.galleries is not None and lists.probes is not None:
        identification = TemplateIdentificationProtocol(
            *ids,
            [(gallery.template_ids, gallery.subject_ids) for gallery in lists.galleries],
            (lists.probes.template_ids, lists.probes.subject_ids),
            detector_scores=scores,
            feature_norm=norm,
            fpirs=IJB_FPIRS,
            **asdict(settings.config.sampling),
        )
        tasks.append(task_of_protocol(f"{name}_1n", f"{title}, 1:N", identification, images, convention=convention))
    if not tasks:
        raise spec.error(f"neither pairs nor galleries and probes of {which} are there")
    return tasks
