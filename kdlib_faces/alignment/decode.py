"""Faces from the outputs of detection networks: YuNet and SCRFD, and non-maximum suppression."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kdlib_faces._checks import InputError

__all__ = ["Array", "Candidates", "DetectorKind", "decode_scrfd", "decode_yunet", "scrfd_outputs", "suppress_overlaps"]

Array: TypeAlias = NDArray[np.float64]
DetectorKind: TypeAlias = Literal["yunet", "scrfd"]

STRIDES = (8, 16, 32)
SCRFD_ANCHORS = 2
MAX_CANDIDATES = 5000
"""Candidates of the highest scores that are compared with each other, as in OpenCV's detector."""

MAX_COORDINATE = 1e6


@dataclass(frozen=True)
class Candidates:
    """Possible faces, in pixels of the network's input.

    Attributes:
        scores: `(n,)` from 0 to 1.
        boxes: `(n, 4)` left, top, right, bottom.
        points: `(n, 5, 2)` (x, y) of left eye, right eye, nose, left and right mouth corner, as seen in the image.
    """

    scores: Array
    boxes: Array
    points: Array

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Candidates":
        """Return some of the candidates."""
        return Candidates(self.scores[rows], self.boxes[rows], self.points[rows])


def _cells(stride: int, sides: tuple[int, int], anchors: int = 1) -> Array:
    """`(n, 2)` x and y of the cells of a stride in pixels, row by row, each repeated for its anchors."""
    y, x = np.mgrid[: sides[0] // stride, : sides[1] // stride] * float(stride)
    return np.repeat(np.stack([x.ravel(), y.ravel()], 1), anchors, axis=0)


def _rows(array: NDArray[np.generic], count: int, columns: int, name: str) -> Array:
    """An output as `(count, columns)` float64."""
    if array.size != count * columns or array.shape[-1] != columns:
        raise InputError(f"the detector's output {name!r} must hold {count} x {columns} values, got {array.shape}")
    return array.reshape(count, columns).astype(np.float64)


def decode_yunet(outputs: Mapping[str, NDArray[np.generic]], sides: tuple[int, int]) -> Candidates:
    """Decode the outputs `cls_8` to `kps_32` of YuNet (the file of 2023).

    For a cell at `(x, y)` of stride `s`, the score is `sqrt(cls obj)`, the center of the box `(x, y) + s (b0, b1)`, its size
    `s exp((b2, b3))`, and point `i` is `(x, y) + s (k_2i, k_2i+1)`.

    Args:
        outputs: Name to array, for one image.
        sides: Height and width of the input, pixels.

    Returns:
        One candidate per cell of each stride, in pixels of the input.

    Raises:
        InputError: An output has another shape.
    """
    found = []
    for stride in STRIDES:
        corner = _cells(stride, sides)
        widths = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
        part = {
            kind: _rows(outputs[f"{kind}_{stride}"], len(corner), width, f"{kind}_{stride}")
            for kind, width in widths.items()
        }
        scores = np.sqrt(np.clip(part["cls"], 0, 1) * np.clip(part["obj"], 0, 1))[:, 0]
        with np.errstate(over="ignore", invalid="ignore"):
            center, half = corner + stride * part["bbox"][:, :2], stride * np.exp(part["bbox"][:, 2:]) / 2
            boxes = np.concatenate([center - half, center + half], 1)
        points = corner[:, None] + stride * part["kps"].reshape(-1, 5, 2)
        found.append(Candidates(scores, boxes, points))
    return _join(found)


def scrfd_outputs(outputs: Mapping[str, NDArray[np.generic]], sides: tuple[int, int]) -> dict[tuple[str, int], str]:
    """Return the names of SCRFD's outputs by kind and stride, such as `("kps", 8)`, recognized by their shapes.

    Raises:
        InputError: The shapes are not those of SCRFD with landmarks.
    """
    kinds = {1: "score", 4: "bbox", 10: "kps"}
    strides = {SCRFD_ANCHORS * (sides[0] // stride) * (sides[1] // stride): stride for stride in STRIDES}
    names: dict[tuple[str, int], str] = {}
    for name, array in outputs.items():
        width = array.shape[-1] if array.ndim else 0
        stride = strides.get(array.size // width) if width in kinds else None
        if stride is not None:
            names[kinds[width], stride] = name
    if len(names) != len(kinds) * len(STRIDES):
        shapes = ", ".join(str(array.shape) for array in outputs.values())
        raise InputError(
            f"the detector's outputs must be scores (n, 1), boxes (n, 4) and points (n, 10) with n = "
            f"{', '.join(map(str, strides))} for an input of {sides[0]} x {sides[1]} pixels, as SCRFD has, got {shapes}"
        )
    return names


def decode_scrfd(
    outputs: Mapping[str, NDArray[np.generic]], names: Mapping[tuple[str, int], str], sides: tuple[int, int]
) -> Candidates:
    """Decode the outputs of SCRFD with landmarks.

    For an anchor at `(x, y)` of stride `s`, two in each cell, the box is `(x - s b0, y - s b1, x + s b2, y + s b3)`, and point
    `i` is `(x, y) + s (k_2i, k_2i+1)`.

    Args:
        outputs: Name to array, for one image.
        names: From `scrfd_outputs`.
        sides: Height and width of the input, pixels.

    Returns:
        Two candidates per cell of each stride, in pixels of the input.

    Raises:
        InputError: An output has another shape.
    """
    found = []
    for stride in STRIDES:
        anchor = _cells(stride, sides, SCRFD_ANCHORS)
        part = {
            kind: _rows(outputs[names[kind, stride]], len(anchor), width, names[kind, stride])
            for kind, width in {"score": 1, "bbox": 4, "kps": 10}.items()
        }
        boxes = np.concatenate([anchor - stride * part["bbox"][:, :2], anchor + stride * part["bbox"][:, 2:]], 1)
        points = anchor[:, None] + stride * part["kps"].reshape(-1, 5, 2)
        found.append(Candidates(part["score"][:, 0], boxes, points))
    return _join(found)


def _join(parts: Sequence[Candidates]) -> Candidates:
    return Candidates(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.points for part in parts]),
    )


def suppress_overlaps(candidates: Candidates, min_score: float, max_overlap: float) -> Candidates:
    """Return the faces, from the highest score: each candidate that overlaps no better one too much.

    Args:
        candidates: All candidates. Those with a number that is not finite are left out.
        min_score: Lower limit of the score.
        max_overlap: Upper limit of the intersection of two boxes over their union.

    Examples:
        >>> boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10.0]])
        >>> candidates = Candidates(np.array([0.7, 0.9, 0.8]), boxes, np.zeros((3, 5, 2)))
        >>> suppress_overlaps(candidates, 0.6, 0.3).scores.tolist()
        [0.9, 0.8]
    """
    valid = (np.abs(candidates.boxes) < MAX_COORDINATE).all(1) & (np.abs(candidates.points) < MAX_COORDINATE).all(
        (1, 2)
    )
    valid &= (candidates.scores >= min_score) & (candidates.boxes[:, :2] < candidates.boxes[:, 2:]).all(1)
    candidates = candidates.select(valid)
    order = np.argsort(-candidates.scores, kind="stable")[:MAX_CANDIDATES]
    left, top, right, bottom = candidates.boxes.T
    area = (right - left) * (bottom - top)
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        width = np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest])
        height = np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest])
        common = np.maximum(width, 0) * np.maximum(height, 0)
        order = rest[common <= max_overlap * (area[best] + area[rest] - common)]
    return candidates.select(np.array(kept, dtype=np.int64))
