"""Teacher and face list as input of a cache build."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import OUTPUT, TeacherAdapter
from kdlib.cache import Fingerprint
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import CPU, Amp
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.image_files import describe_far_sizes
from kdlib_faces.data.lists import FaceList, warn
from kdlib_faces.data.seeded_views import SeededViews
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.teachers.input_options import InputOptions
from kdlib_faces.teachers.onnx.graph import read_graph
from kdlib_faces.teachers.open import load_network, onnx_taps, open_onnx

__all__ = ["STAGES", "CacheSource", "data_digest", "describe_views", "parse_taps"]

STAGES = ("stage0", "stage1", "stage2", "stage3")
"""Names of the ends of the four stages, which every teacher accepts as taps."""
_FULLY_HASHED = 512
"""Number of evenly spaced images whose bytes are part of the digest; for all others only name and size are."""


def data_digest(faces: FaceList, views: SeededViews) -> str:
    """Return the SHA-256 of the images of a list and of the definition of their views.

    It covers the order of the images, the last two components of each path and each file size (or the places of the images
    in records and shards), and every byte of 512 evenly spaced images. A list can therefore be moved to another folder or
    machine, and a list that was aligned again has another digest.
    """
    seeded = [views.seed, *([None] if views.augment is None else [vars(views.augment), views.version])]
    digest = hashlib.sha256(json.dumps(["kdlib faces 1", len(faces), seeded]).encode())
    rows, step = np.arange(len(faces)), max(1, len(faces) // _FULLY_HASHED)
    for start in range(0, len(faces), step):
        for part in faces.images.layout(rows[start : start + 1]):
            digest.update(part)
        try:
            content = faces.images[start]
        except InputError:  # an error where the image is read, unless such images are skipped
            content = b""
        digest.update(hashlib.sha256(content).digest())
        for part in faces.images.layout(rows[start + 1 : start + step]):
            digest.update(part)
    return digest.hexdigest()


def describe_views(views: SeededViews) -> str:
    """Describe the views of a cache in a few words.

    Examples:
        >>> describe_views(SeededViews(2))
        'the plain and the mirrored image'
    """
    if views.augment is None:
        return "the plain and the mirrored image" if views.count == 2 else "the plain image"
    off = vars(AugmentConfig.none())
    on = ", ".join(f"{name} {value:g}" for name, value in vars(views.augment).items() if value != off[name])
    return f"{views.count} random views with seed {views.seed} ({on})"


class CacheSource:
    """A teacher and a face list for a cache build; a tap may be one of `STAGES`.

    With `on_error="skip"` the outputs for an image that cannot be read are those for a black one: rows keep their numbers, and
    a training that skips the image as well never reads them.
    """

    def __init__(
        self,
        faces: FaceList,
        path: Path,
        taps: Mapping[str, str],
        views: SeededViews,
        *,
        size: int,
        decoders: int,
        input_options: InputOptions,
        on_error: Literal["stop", "skip"] = "stop",
        device: torch.device = CPU,
        amp: Amp = "none",
    ) -> None:
        self.faces, self.views = faces, views
        self.model, self.size, parts, taps = _teacher(path, taps, size, input_options, device)
        self._images = FaceImages(faces.images, self.size, threads=decoders, on_error=on_error)
        warn(describe_far_sizes(faces.images, self.size))
        self.fingerprint = Fingerprint(
            teacher=parts.teacher,
            preprocessing=f"{parts.preprocessing}; upright, centered on black, {self.size} pixels, rgb, (x - 127.5) / 127.5"
            + ("" if amp == "none" else f"; {amp}"),
            data=data_digest(faces, views),
        )
        self.notes = {
            "teacher": path.name,
            "faces": ", ".join(Path(source).name for source in faces.sources),
            "size": str(self.size),
            "taps": json.dumps(dict(taps)),
            "views": views.to_text(),
            "input": str(input_options),
            "amp": amp,
        }

    def fetch(self, samples: Tensor, view: int) -> Tensor:
        """Return the teacher's inputs for some rows of the list; black where an image cannot be read and is skipped.

        Raises:
            InputError: Images cannot be read, and they are not skipped.
        """
        return self.views(self._images[samples], samples, view)


def _teacher(
    path: Path, taps: Mapping[str, str], size: int, input_options: InputOptions, device: torch.device
) -> tuple[nn.Module, int, Fingerprint, dict[str, str]]:
    """Return the teacher, its input size, the first two parts of its fingerprint, and its resolved taps."""
    if not path.is_file():
        raise InputError(f"cache: teacher {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.suffix == ".onnx":
        taps = {
            feature: str(onnx_taps(str(path), STAGES.index(name), input_options.layout)["map"])
            if name in STAGES
            else name
            for feature, name in taps.items()
        }
        not_square = isinstance(read_graph(path, input_options.layout).input_size, tuple)
        graph = open_onnx(
            path, {"embedding": None, **taps}, input_options=input_options, resize=not_square, device=device
        )
        own = graph.input_size or size
        return graph, own if isinstance(own, int) else max(own), Fingerprint(graph.fingerprint, "onnx", ""), taps
    network = load_network(path, input_options)
    taps = {feature: network.stages[STAGES.index(name)] if name in STAGES else name for feature, name in taps.items()}
    try:
        adapter = TeacherAdapter(network, {"embedding": OUTPUT, **taps}, preprocess=network.input_spec)
    except ValueError as error:
        raise InputError(f"cache: {path}: {error}") from error
    side = network.input_size
    fingerprint = Fingerprint.of(adapter)  # before the weights move
    if device != CPU:
        adapter = TeacherAdapter(network, adapter.taps, preprocess=network.input_spec, device=device)
    return adapter, side if isinstance(side, int) else max(side), fingerprint, taps


def parse_taps(given: Sequence[str]) -> dict[str, str]:
    """Parse `FEATURE=NAME` options; `NAME` alone means the feature `map`.

    Examples:
        >>> parse_taps(["stage2", "early=layer1"])
        {'map': 'stage2', 'early': 'layer1'}
    """
    taps: dict[str, str] = {}
    for text in given:
        feature, equals, name = text.partition("=")
        feature, name = (feature, name) if equals else ("map", text)
        if not feature or not name or feature in taps or feature == "embedding":
            raise InputError(
                f"cache: --tap must be FEATURE=NAME with distinct features other than 'embedding', got {text!r}"
            )
        taps[feature] = name
    return taps
