"""Teachers of a recipe from model files or from caches of their outputs on the training images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from kdlib import Teacher
from kdlib.cache import CachedTeacher, TeacherCache, read_header
from kdlib_faces._checks import InputError, show_name
from kdlib_faces.caching.source import data_digest, describe_views
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.seeded_views import SeededViews

__all__ = ["OpenTeachers", "TeacherSource", "is_cache", "open_teachers", "targets_read"]


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from and what a recipe reads of it.

    Attributes:
        role: name of the teacher in the recipe.
        path: a model file, the name of a backbone, or the folder of a cache.
        reads: feature to the setting whose value 0 removes the term that reads it.
        stage: number of the stage that is the feature `map`.
    """

    role: str
    path: str
    reads: Mapping[str, str]
    stage: int


@dataclass(frozen=True)
class OpenTeachers:
    """Teachers by role, the random views of caches that the student must use (or None), and one line per cache."""

    teachers: dict[str, nn.Module]
    views: SeededViews | None
    messages: tuple[str, ...]


def targets_read(teacher: nn.Module, targets: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the targets that a teacher reads in place of images, in the order of its arguments; none if it reads images."""
    inputs = teacher.inputs if isinstance(teacher, Teacher) else None
    names = [] if inputs is None else [inputs] if isinstance(inputs, str) else list(inputs)
    return [targets[name] for name in names]


def is_cache(path: str) -> bool:
    """Return whether a path is the folder of a cache, complete or not.

    Raises:
        CacheError: the header is damaged.
    """
    return Path(path).is_dir() and read_header(Path(path)) is not None


def open_teachers(
    sources: Sequence[TeacherSource],
    faces: FaceList,
    *,
    open_file: Callable[[TeacherSource], nn.Module],
    mirrored: bool,
) -> OpenTeachers:
    """Open the teachers of a recipe; a folder is a cache that `kdlib-faces cache build` made of the same lists.

    A cached teacher reads the targets `"sample"`, the row of the image over all lists, and `"view"`. It returns the outputs
    for the plain image, or for the mirrored one if the student's image is mirrored and the cache contains it. With a cache
    of random views, both use the same view.

    Args:
        sources: the teachers.
        faces: the training images.
        open_file: opens a source that is not a cache.
        mirrored: whether the student's images may be mirrored.

    Raises:
        InputError: a file cannot be used, or a cache has other images, lacks a feature, or has unsuitable views.
        CacheError: a cache is incomplete or damaged.
    """
    teachers: dict[str, nn.Module] = {}
    views: dict[str, SeededViews] = {}
    messages = []
    digests: dict[str, str] = {}
    for source in sources:
        if not Path(source.path).is_dir():
            teachers[source.role] = open_file(source)
            continue
        if not is_cache(source.path):
            raise InputError(
                f"train: the folder {source.path} is not a cache of teacher outputs: it has no header.json"
            )
        cache = TeacherCache.open(source.path)
        views[source.path] = seeded = _views(cache)
        _check_faces(cache, source.path, faces, seeded, digests)
        _check_features(cache, source)
        inputs = ("sample", "view") if _uses_views(source, seeded, mirrored) else ("sample",)
        teachers[source.role] = CachedTeacher(cache, inputs=inputs, features=tuple(source.reads) or None)
        name = show_name(cache.notes.get("teacher", "?"))
        messages.append(f"{source.role} teacher: {name} from {source.path}, outputs for {describe_views(seeded)}")
    random = [each for each in views.values() if each.augment is not None]
    if random and any(each != random[0] for each in views.values()):
        found = " and ".join(f"{source} has {describe_views(each)}" for source, each in views.items())
        raise InputError(f"train: both caches must have the same views, but {found}")
    return OpenTeachers(teachers, random[0] if random else None, tuple(messages))


def _views(cache: TeacherCache) -> SeededViews:
    try:
        views = SeededViews.from_text(cache.notes["views"])
    except (KeyError, InputError) as error:
        raise InputError(
            f"train: the notes of {cache.path} do not describe its views ({show_name(str(error))}); "
            "use a cache of `kdlib-faces cache build`"
        ) from error
    views.check_version(f"train: {cache.path}")
    return views


def _check_faces(
    cache: TeacherCache, source: str, faces: FaceList, views: SeededViews, digests: dict[str, str]
) -> None:
    """Require the same images row by row; otherwise a student would learn the embedding of another identity."""
    lists, stored = show_name(cache.notes.get("faces", "other lists")), cache.parts.get("data", "")
    if cache.samples != len(faces):
        raise InputError(
            f"train: {source} was computed from other images: it has {cache.samples} images of {lists}, the lists have "
            f"{len(faces)}; give the same lists in the same order"
        )
    if not stored:
        raise InputError(f"train: {source} does not identify its images; use a cache of `kdlib-faces cache build`")
    if (key := views.to_text()) not in digests:
        digests[key] = data_digest(faces, views)
    if stored != digests[key]:
        raise InputError(
            f"train: {source} was computed from other images: order, names, sizes or content differ, although both have "
            f"{len(faces)} images; it belongs to {lists}; give the same lists in the same order"
        )


def _check_features(cache: TeacherCache, source: TeacherSource) -> None:
    for feature, setting in source.reads.items():
        if feature not in cache.features:
            stored = ", ".join(repr(show_name(name)) for name in cache.features)
            build = f"build another cache with --tap {feature}=stage{source.stage}, or "
            raise InputError(
                f"train: {source.path} has no feature {feature!r}, which a term of the {source.role} teacher needs; it has "
                f"{stored}; {'' if feature == 'embedding' else build}remove the term by --set {setting}=0"
            )


def _uses_views(source: TeacherSource, views: SeededViews, mirrored: bool) -> bool:
    """Whether the teacher reads the view of the batch; a cache of plain images always returns these."""
    if views.augment is not None or views.count == 2:
        return True
    if mirrored and "map" in source.reads:
        raise InputError(
            f"train: {source.path} has plain views only, and a map of the {source.role} teacher does not fit a mirrored "
            f"image; build another cache with --views 2, or --set augment.mirror=0, or --set {source.reads['map']}=0"
        )
    return False
