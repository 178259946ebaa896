"""`FaceDetector`: faces and their five landmarks, found by a YuNet or SCRFD network in an ONNX file."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kdlib._checks import check_number
from kdlib_faces._checks import InputError, show_name
from kdlib_faces._hardware import CPU
from kdlib_faces.alignment.decode import (
    STRIDES,
    Array,
    Candidates,
    DetectorKind,
    decode_scrfd,
    decode_yunet,
    scrfd_outputs,
    suppress_overlaps,
)
from kdlib_faces.teachers.onnx.graph import file_errors, read_graph
from kdlib_faces.teachers.onnx.runtime import make_session, providers_for, run

__all__ = ["DetectedFace", "FaceDetector"]

DEFAULT_SIZE = 640
MAX_OVERLAP = 0.3
SMALLER = (1.0, 0.5)
"""Scales at which a photograph is searched until a face is found: a face that fills it is too large for the network."""

YUNET_OUTPUTS = frozenset(f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in STRIDES)


@dataclass(frozen=True, eq=False)
class DetectedFace:
    """A face in a photograph.

    Attributes:
        score: From 0 to 1.
        box: `(4,)` left, top, right, bottom, in pixels of the photograph.
        points: `(5, 2)` (x, y) of left eye, right eye, nose, left and right mouth corner, as seen in the image.
    """

    score: float
    box: Array
    points: Array

    @property
    def side(self) -> float:
        """The longer side of the box in pixels."""
        return float((self.box[2:] - self.box[:2]).max())


class FaceDetector:
    """A face detector: `detector(photograph) -> [DetectedFace, ...]`, from the highest score.

    The file is YuNet of 2023 (12 outputs named `cls_8` to `kps_32`) or SCRFD with landmarks (9 outputs), recognized from its
    graph. A photograph is scaled so that it fits into the input, never enlarged, and completed by black pixels at the right and
    at the bottom. If no face is found, it is searched once more at half the size.

    Args:
        path: The `.onnx` file.
        size: Side of the network's input in pixels, a multiple of 32; None takes the size that the file declares, or 640 where
            it is free. Smaller faces are found with a larger input, in more time.
        min_score: Lower limit of the score.
        threads: Threads of onnxruntime; None takes as many as torch uses.
        device: Device on which onnxruntime runs the network.

    Attributes:
        kind: `"yunet"` or `"scrfd"`.
        sides: Height and width of the input.
        sha256: Digest of the file.

    Raises:
        InputError: The file is not such a detector, or this onnxruntime does not run on the device.

    Examples:
        >>> FaceDetector("no_such.onnx")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: the ONNX file no_such.onnx does not exist
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | None = None,
        min_score: float = 0.6,
        threads: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        if (
            size is not None
            and check_number("FaceDetector", "size", size, min=64, max=4096, integer=True) % STRIDES[-1]
        ):
            raise ValueError(f"FaceDetector: size must be a multiple of {STRIDES[-1]}, got {size}")
        self.min_score = check_number("FaceDetector", "min_score", min_score, above=0, max=1)
        graph = read_graph(path, size=size)
        if graph.input_size is None:
            graph = read_graph(path, size=DEFAULT_SIZE)
        self.path = graph.path
        self.sha256 = graph.sha256
        _, channels, height, width = graph.sample_shape(1)
        self.sides = (height, width)
        self._outputs = [output.name for output in graph.model.graph.output]
        if (
            channels != 3
            or height % STRIDES[-1]
            or width % STRIDES[-1]
            or len(set(self._outputs)) != len(self._outputs)
        ):
            raise InputError(
                f"{path} is no face detector: its input must be images of 3 channels with sides that are multiples of "
                f"{STRIDES[-1]}, got {channels} x {height} x {width}"
            )
        if set(self._outputs) != YUNET_OUTPUTS and len(self._outputs) != 9:
            raise InputError(
                f"{path} is no face detector: it must have the 12 outputs cls_8 to kps_32 of YuNet (2023), or the 9 of SCRFD "
                f"with landmarks, got {len(self._outputs)}: {', '.join(map(show_name, self._outputs[:12]))}"
            )
        self.kind: DetectorKind = "yunet" if set(self._outputs) == YUNET_OUTPUTS else "scrfd"
        self._graph = graph
        with file_errors(graph.path):
            self._session = make_session(graph, self._outputs, threads=threads, providers=providers_for(device))
            outputs = self._run(np.zeros((height, width, 3), np.uint8))
            self._names = scrfd_outputs(outputs, self.sides) if self.kind == "scrfd" else {}
            self._decode(outputs)

    def __repr__(self) -> str:
        return f"FaceDetector({str(self.path)!r}, size={self.sides[0]}, min_score={self.min_score})"

    def _run(self, canvas: NDArray[np.uint8]) -> dict[str, NDArray[np.generic]]:
        """Run one RGB image of the size of the input."""
        rgb = canvas.astype(np.float32)
        pixels = rgb[..., ::-1] if self.kind == "yunet" else (rgb - 127.5) / 128
        images = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]).astype(self._graph.dtype)
        return dict(zip(self._outputs, run(self._graph, self._session, images), strict=True))

    def _decode(self, outputs: dict[str, NDArray[np.generic]]) -> Candidates:
        if self.kind == "yunet":
            return decode_yunet(outputs, self.sides)
        return decode_scrfd(outputs, self._names, self.sides)

    def __call__(self, photograph: Image.Image) -> list[DetectedFace]:
        """Return the faces in an RGB image, from the highest score, in pixels of the image.

        Raises:
            InputError: The graph fails.
        """
        for smaller in SMALLER:
            scale = smaller * min(1.0, self.sides[0] / photograph.height, self.sides[1] / photograph.width)
            inner = max(1, round(scale * photograph.width)), max(1, round(scale * photograph.height))
            small = photograph if inner == photograph.size else photograph.resize(inner, Image.Resampling.BILINEAR)
            canvas = np.zeros((*self.sides, 3), np.uint8)
            canvas[: inner[1], : inner[0]] = np.asarray(small)
            found = suppress_overlaps(self._decode(self._run(canvas)), self.min_score, MAX_OVERLAP)
            if len(found.scores):
                break
        # Pixel (x, y) is the value at the point (x, y), so the left edge of the image, which scaling keeps, is at -0.5.
        factor = np.array(photograph.size) / inner
        return [
            DetectedFace(float(score), (box + 0.5) * np.tile(factor, 2) - 0.5, (points + 0.5) * factor - 0.5)
            for score, box, points in zip(found.scores, found.boxes, found.points, strict=True)
        ]
