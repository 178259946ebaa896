"""Recipes room: a teacher and a list of faces as a cache is made of them. Reads images, lists and weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from kdlib import OUTPUT, TeacherAdapter
from kdlib.cache import Fingerprint
from kdlib_faces._checks import InputError
from kdlib_faces.data.images import load_images
from kdlib_faces.data.lists import FaceList
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.progress import progress
from kdlib_faces.teachers.open import onnx_taps

__all__ = ["STAGES", "CacheSource", "data_digest", "parse_taps"]

STAGES = ("stage0", "stage1", "stage2", "stage3")
"""Names that every teacher knows for the ends of its four stages, whatever it calls them itself."""
_READ_WHOLE = 512
"""Images whose bytes enter the digest of a list, evenly spread; of all others name and size do."""


def data_digest(faces: FaceList, views: SeededViews, *, quiet: bool = True) -> str:
    """SHA-256 of a list's images and of how views are made of them.

    Of each image its place in the list, the last two parts of its path and its size in bytes count; of 512 images, evenly
    spread, every byte. So a list may move to another folder or machine, and a list that was aligned anew is another one.
    """
    seeded = [views.seed, None if views.augment is None else vars(views.augment)]
    digest = hashlib.sha256(json.dumps(["kdlib faces 1", len(faces), seeded]).encode())
    step = max(1, len(faces) // _READ_WHOLE)
    for row, path in enumerate(progress(faces.paths, "looking at the list's images", quiet=quiet)):
        try:
            size = path.stat().st_size
            whole = path.read_bytes() if row % step == 0 and size <= 1 << 26 else b""
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
        digest.update(f"\n{'/'.join(path.parts[-2:])}\t{size}\t".encode("utf-8", "surrogateescape"))
        digest.update(hashlib.sha256(whole).digest() if whole else b"")
    return digest.hexdigest()


class CacheSource:
    """A teacher and a list as a cache is made of them; a tap may be one of `STAGES`."""

    def __init__(
        self,
        faces: FaceList,
        path: Path,
        taps: Mapping[str, str],
        views: SeededViews,
        *,
        size: int,
        decoders: int,
        quiet: bool = True,
    ) -> None:
        self.faces, self.views, self.decoders = faces, views, decoders
        self.model, self.size, parts, taps = _teacher(path, taps, size)
        self.fingerprint = Fingerprint(
            teacher=parts.teacher,
            preprocessing=f"{parts.preprocessing}; central square, {self.size} pixels, rgb, (x - 127.5) / 127.5",
            data=data_digest(faces, views, quiet=quiet),
        )
        self.notes = {
            "teacher": path.name,
            "faces": ", ".join(Path(source).name for source in faces.sources),
            "size": str(self.size),
            "taps": json.dumps(dict(taps)),
            "views": views.to_text(),
        }

    def fetch(self, samples: Tensor, view: int) -> Tensor:
        """The teacher's images of some rows of the list."""
        pixels = load_images([self.faces.paths[row] for row in samples.tolist()], self.size, workers=self.decoders)
        return self.views(pixels, samples, view)


def _teacher(path: Path, taps: Mapping[str, str], size: int) -> tuple[nn.Module, int, Fingerprint, dict[str, str]]:
    """The teacher, the side of its images, the first two parts of its fingerprint, and its taps by their own names."""
    if not path.is_file():
        raise InputError(f"cache: teacher {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.suffix == ".onnx":
        from kdlib_faces.teachers import OnnxTeacher

        taps = {
            feature: str(onnx_taps(str(path), STAGES.index(name))["map"]) if name in STAGES else name
            for feature, name in taps.items()
        }
        graph = OnnxTeacher(path, {"embedding": None, **taps})
        side = graph.input_size
        if isinstance(side, tuple):
            raise InputError(f"cache: {path} must take square images, it takes {side[0]} x {side[1]}")
        return graph, size if side is None else side, Fingerprint(graph.fingerprint, "onnx", ""), taps
    from kdlib_faces.teachers import load_teacher

    network = load_teacher(path)
    taps = {feature: network.stages[STAGES.index(name)] if name in STAGES else name for feature, name in taps.items()}
    try:
        adapter = TeacherAdapter(network, {"embedding": OUTPUT, **taps}, preprocess=network.input_spec)
    except ValueError as error:
        raise InputError(f"cache: {path}: {error}") from error
    side = network.input_size
    return adapter, side if isinstance(side, int) else max(side), Fingerprint.of(adapter), taps


def parse_taps(given: Sequence[str]) -> dict[str, str]:
    """`FEATURE=NAME` to a dict; `NAME` alone is the feature `map`.

    Examples:
        >>> parse_taps(["stage2", "early=layer1"])
        {'map': 'stage2', 'early': 'layer1'}
    """
    found: dict[str, str] = {}
    for text in given:
        feature, equals, name = text.partition("=")
        feature, name = (feature, name) if equals else ("map", text)
        if not feature or not name or feature in found or feature == "embedding":
            raise InputError(f"cache: --tap must be FEATURE=NAME, each feature once and none 'embedding', got {text!r}")
        found[feature] = name
    return found
