"""Recipes room: teachers of the LIAAD recipe as caches of their outputs on the very images of the training. Reads both."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kdlib.cache import CachedTeacher, TeacherCache
from kdlib.cache.layout import read_header
from kdlib_faces._checks import InputError, show_name
from kdlib_faces.caching.source import data_digest
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig

__all__ = ["OpenTeachers", "is_cache", "open_teachers"]


@dataclass(frozen=True)
class OpenTeachers:
    """Both teachers, and what they want of the batches.

    Attributes:
        teachers: for `kdlib_faces.recipes.liaad.build`.
        views: the random views that caches hold, which the student must be shown; None leaves its images free.
        messages: a line on each teacher that is a cache.
    """

    teachers: dict[str, nn.Module]
    views: SeededViews | None
    messages: tuple[str, ...]


def is_cache(path: str) -> bool:
    """Whether a path is the folder of a cache, complete or not.

    Raises:
        CacheError: the header is damaged.
    """
    return Path(path).is_dir() and read_header(Path(path)) is not None


def open_teachers(
    sources: Mapping[str, str],
    faces: FaceList,
    *,
    features: Mapping[str, Mapping[str, str]],
    stage: int,
    open_file: Callable[[str, str], nn.Module],
    mirrored: bool,
    quiet: bool = True,
) -> OpenTeachers:
    """Open the teachers of a recipe. A folder is a cache that `kdlib-faces cache build` has made of the same lists.

    A cached teacher reads the batch's targets `"sample"`, the image's row over all lists, and `"view"`. It returns the outputs
    for the plain image, or for the mirrored one where the student sees that and the cache holds it; with a cache of random
    views both see the same one.

    Args:
        sources: Role of each teacher to its file, backbone name or folder.
        faces: The training images.
        features: Role to the features that are read, each with the setting that removes its term.
        stage: Number of the stage whose map is read.
        open_file: Source and role to a frozen teacher, for sources that are no folders.
        mirrored: Whether the student sees mirrored images.
        quiet: Show no progress.

    Raises:
        InputError: A file that cannot be used; a cache of other images, without a feature that the terms read, or of other
            views than the other cache or than the terms require.
        CacheError: A cache is incomplete or damaged.
    """
    teachers: dict[str, nn.Module] = {}
    views: dict[str, SeededViews] = {}
    messages = []
    digests: dict[str, str] = {}
    for role, source in sources.items():
        if not Path(source).is_dir():
            teachers[role] = open_file(source, role)
            continue
        cache = _opened(source)
        views[source] = _views(cache)
        _check_faces(cache, source, faces, views[source], digests, quiet=quiet)
        reads = features[role]
        _check_features(cache, source, role, reads, stage)
        both = _both_views(source, views[source], role, reads, mirrored)
        teachers[role] = CachedTeacher(
            cache, reads=("sample", "view") if both else ("sample",), features=tuple(reads) or None
        )
        messages.append(
            f"{role} teacher: {show_name(cache.notes.get('teacher', '?'))} from {source}, {_said_of(views[source])}"
        )
    return OpenTeachers(teachers, _common(views), tuple(messages))


def _opened(source: str) -> TeacherCache:
    if not is_cache(source):
        raise InputError(f"train: the folder {source} is no cache of a teacher's outputs: it has no header.json")
    return TeacherCache.open(source)


def _views(cache: TeacherCache) -> SeededViews:
    try:
        return SeededViews.from_text(cache.notes["views"])
    except (KeyError, InputError) as error:
        raise InputError(
            f"train: the notes of {cache.path} do not tell its views ({show_name(str(error))}); "
            "take one that `kdlib-faces cache build` has made"
        ) from error


def _check_faces(
    cache: TeacherCache, source: str, faces: FaceList, views: SeededViews, digests: dict[str, str], *, quiet: bool
) -> None:
    """Row by row the same images: a cache of other faces would teach each person another's embedding."""
    of = show_name(cache.notes.get("faces", "other lists"))
    if cache.samples != len(faces):
        raise InputError(
            f"train: {source} was computed from other images: what differs is their number, {cache.samples} of {of}, "
            f"{len(faces)} here; give the same lists in the same order"
        )
    header = read_header(Path(source))
    held = "" if header is None else header.parts.get("data", "")
    if not held:
        raise InputError(
            f"train: {source} does not tell what images it is of; take one that `kdlib-faces cache build` has made"
        )
    key = views.to_text()
    if key not in digests:
        digests[key] = data_digest(faces, views, quiet=quiet)
    if held != digests[key]:
        raise InputError(
            f"train: {source} was computed from other images: what differs is the data, their order, names, sizes or "
            f"content, though there are {len(faces)} in both; it is of {of}; give the same lists in the same order"
        )


def _check_features(cache: TeacherCache, source: str, role: str, reads: Mapping[str, str], stage: int) -> None:
    for feature, setting in reads.items():
        if feature not in cache.features:
            held = ", ".join(repr(show_name(name)) for name in cache.features)
            way = f"build another cache with --tap {feature}=stage{stage}, or " if feature != "embedding" else ""
            raise InputError(
                f"train: {source} holds no {feature!r}, which a term reads of the {role} teacher; there is {held}; "
                f"{way}leave the term out by --set recipe.{setting}=0"
            )


def _both_views(source: str, views: SeededViews, role: str, reads: Mapping[str, str], mirrored: bool) -> bool:
    """Whether the batch's views are asked for; a cache of plain images alone answers with these."""
    if views.augment is not None or views.count == 2:
        return True
    if mirrored and "map" in reads:
        raise InputError(
            f"train: {source} holds plain views alone, and a map of the {role} teacher says nothing of a mirrored image; "
            f"build another cache with --views 2, or --set augment.mirror=0, or --set recipe.{reads['map']}=0"
        )
    return False


def _common(views: Mapping[str, SeededViews]) -> SeededViews | None:
    """The random views of the caches, where they hold such."""
    random = [each for each in views.values() if each.augment is not None]
    if random and any(each != random[0] for each in views.values()):
        held = " and ".join(f"{source} holds {_shown(each)}" for source, each in views.items())
        raise InputError(f"train: both caches must hold the same views, but {held}")
    return random[0] if random else None


def _shown(views: SeededViews) -> str:
    if views.augment is None:
        return "plain ones"
    off = vars(AugmentConfig.none())
    on = ", ".join(f"{name} {value:g}" for name, value in vars(views.augment).items() if value != off[name])
    return f"{views.count} random ones by seed {views.seed} ({on})"


def _said_of(views: SeededViews) -> str:
    if views.augment is not None:
        return f"asked for the {views.count} random views that the student is shown"
    return (
        "asked for the plain image, mirrored where the student's is"
        if views.count == 2
        else "asked for the plain image"
    )
