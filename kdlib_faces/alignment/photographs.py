"""Crops of one photograph: detection, the choice among several faces, alignment and encoding."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdlib._checks import check_choice, check_number
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import CPU
from kdlib_faces.alignment.detector import DetectedFace, FaceDetector
from kdlib_faces.data.alignment import align_face, similarity_transform, template_for
from kdlib_faces.data.image_files import open_rgb
from kdlib_faces.data.images import decode_image

__all__ = ["AlignConfig", "AlignedPhotograph", "Crop", "PhotographAligner", "misfit_and_scale"]

Several = Literal["largest", "center", "all", "refuse"]
NoFace = Literal["skip", "keep-resized", "stop"]


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Configuration of `kdlib-faces align`.

    Attributes:
        several: Which of several faces are cropped: `"largest"`, `"center"` (the one nearest to the middle of the photograph),
            `"all"`, or `"refuse"` (none).
        no_face: Treatment of a photograph without a face: `"skip"`, `"keep-resized"` (the whole photograph at the size of a
            crop, its aspect ratio kept on black), or `"stop"`, an error.
        min_score: Lower limit of a face's score.
        min_size: Lower limit of the longer side of a face's box, in pixels of the photograph.
        size: Side of the crops in pixels.
        format: `"png"`, lossless, or `"jpg"` of quality 95.
        detector_size: Side of the detector's input, see `FaceDetector`.
        low_score: A face below this score is doubtful.
        max_scale: A crop that enlarges its face more than this is doubtful.
        max_misfit: A face is doubtful whose points differ more than this from the template, in pixels of a 112 x 112 crop (root
            mean square after the alignment): a profile, or wrong points.
        max_rival: A crop is doubtful if another face has more than this share of its size.

    Raises:
        ValueError, TypeError: A value is out of range.

    Examples:
        >>> AlignConfig(several="all", min_size=40, format="jpg").size
        112
        >>> AlignConfig(several="first")
        Traceback (most recent call last):
        ValueError: AlignConfig: several must be one of 'largest', 'center', 'all', 'refuse', got 'first'
    """

    several: Several = "largest"
    no_face: NoFace = "skip"
    min_score: float = 0.6
    min_size: float = 16.0
    size: int = 112
    format: Literal["png", "jpg"] = "png"
    detector_size: int | None = None
    low_score: float = 0.75
    max_scale: float = 2.0
    max_misfit: float = 6.0
    max_rival: float = 0.5

    def __post_init__(self) -> None:
        check_choice("AlignConfig", "several", self.several, ("largest", "center", "all", "refuse"))
        check_choice("AlignConfig", "no_face", self.no_face, ("skip", "keep-resized", "stop"))
        check_choice("AlignConfig", "format", self.format, ("png", "jpg"))
        check_number("AlignConfig", "min_score", self.min_score, above=0, max=1)
        check_number("AlignConfig", "size", self.size, min=16, max=1024, integer=True)
        for name in ("min_size", "low_score", "max_scale", "max_misfit", "max_rival"):
            check_number("AlignConfig", name, getattr(self, name), min=0)


@dataclass(frozen=True)
class Crop:
    """A crop of a photograph.

    Attributes:
        score: Of the face; 0 for a resized photograph.
        box: Left, top, right, bottom of the face in pixels of the photograph; empty for a resized photograph.
        points: x and y of the five points in turn, in pixels of the photograph; empty for a resized photograph.
        rival: Size of the largest other face, as a share of the size of this one.
    """

    score: float
    box: tuple[float, ...] = ()
    points: tuple[float, ...] = ()
    rival: float = 0.0


@dataclass(frozen=True)
class AlignedPhotograph:
    """Faces and crops of one photograph.

    Attributes:
        faces: Number of faces of sufficient score and size.
        crops: The crops that were made, the chosen or largest face first.
        error: Why the file cannot be read; empty if it can.
    """

    faces: int = 0
    crops: tuple[Crop, ...] = ()
    error: str = ""


def misfit_and_scale(crop: Crop, size: int) -> tuple[float, float]:
    """Return how far the points of a face are from the template, in pixels of a 112 x 112 crop, and how much it is enlarged."""
    points = np.array(crop.points).reshape(5, 2)
    template = template_for(size)
    matrix = similarity_transform(points, template)
    rest = points @ matrix[:, :2].T + matrix[:, 2] - template
    return float(np.sqrt((rest**2).sum(1).mean()) * 112 / size), float(np.hypot(*matrix[:, 0]))


class PhotographAligner:
    """Make the crops of photographs: `aligner(path) -> (AlignedPhotograph, encoded crops)`.

    Args:
        detector: The `.onnx` file of the detector.
        config: The settings.
        threads: Threads of the detector; None takes as many as torch uses.
        device: Device of the detector.

    Raises:
        InputError: The file is not a detector, or this onnxruntime does not run on the device.
    """

    def __init__(
        self, detector: Path, config: AlignConfig, *, threads: int | None = None, device: torch.device = CPU
    ) -> None:
        self.config = config
        self.detector = FaceDetector(
            detector, size=config.detector_size, min_score=config.min_score, threads=threads, device=device
        )  # fmt: skip

    def __call__(self, path: Path) -> tuple[AlignedPhotograph, list[bytes]]:
        """Return what was found, and one image file for each crop; an unreadable file is described by `error`."""
        try:
            photograph = open_rgb(path, str(path))
        except InputError as error:
            return AlignedPhotograph(error=str(error)), []
        faces = [face for face in self.detector(photograph) if face.side >= self.config.min_size and _alignable(face)]
        if not faces:
            if self.config.no_face != "keep-resized":
                return AlignedPhotograph(), []
            whole = decode_image(path.read_bytes(), self.config.size, name=str(path)).transpose(1, 2, 0)
            return AlignedPhotograph(crops=(Crop(0.0),)), [self._encode(whole)]
        chosen = self._choose(faces, photograph)
        crops = tuple(_describe(face, faces) for face in chosen)
        pixels = np.asarray(photograph)
        return AlignedPhotograph(len(faces), crops), [
            self._encode(align_face(pixels, np.array(crop.points).reshape(5, 2), self.config.size)) for crop in crops
        ]

    def _choose(self, faces: list[DetectedFace], photograph: Image.Image) -> list[DetectedFace]:
        if self.config.several == "refuse" and len(faces) > 1:
            return []
        if self.config.several == "center":
            middle = np.array(photograph.size) / 2
            return [min(faces, key=lambda face: float(np.hypot(*((face.box[:2] + face.box[2:]) / 2 - middle))))]
        by_size = sorted(faces, key=lambda face: -round(face.side))  # of equal ones the highest score first
        return by_size if self.config.several == "all" else by_size[:1]

    def _encode(self, pixels: NDArray[np.uint8]) -> bytes:
        stream = io.BytesIO()
        image = Image.fromarray(pixels)
        if self.config.format == "jpg":
            image.save(stream, "JPEG", quality=95, subsampling=0)
        else:
            image.save(stream, "PNG")
        return stream.getvalue()


def _alignable(face: DetectedFace) -> bool:
    """Whether a similarity maps the points to the template; those of a broken detector may coincide."""
    try:
        similarity_transform(face.points)
    except InputError:
        return False
    return True


def _describe(face: DetectedFace, faces: list[DetectedFace]) -> Crop:
    rival = max((other.side for other in faces if other is not face), default=0.0) / face.side
    return Crop(
        round(face.score, 4),
        tuple(round(value, 2) for value in face.box.tolist()),
        tuple(round(value, 2) for value in face.points.ravel().tolist()),
        round(rival, 3),
    )
