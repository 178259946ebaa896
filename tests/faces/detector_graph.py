"""Small face detectors as ONNX graphs, and photographs in which they find faces.

A cell of 32 pixels is a face whose score is its red level divided by 255. Box and points of the face are constants relative to
the corner of the cell.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from PIL import Image

from kdlib_faces.data.alignment import ARCFACE_TEMPLATE

SIDE = 160
CORNER = np.array([-40.0, -36.0])
"""Corner of the crop of 112 x 112 pixels relative to the corner of the red cell."""

POINTS = ARCFACE_TEMPLATE + CORNER
BOX = np.array([-30.0, -34.0, 50.0, 60.0])


def detector(
    path: Path, kind: str = "yunet", *, side: int | str = SIDE, batch: int | str = 1, spread: float = 1.0
) -> Path:
    """Write a detector; `spread` moves the points apart by a factor."""
    nodes, weights, outputs = [], {}, []

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(name: str, value: object, dtype: type = np.float32) -> str:
        weights[name] = np.asarray(value, dtype)
        return name

    zero, level = constant("zero", 0), "red"
    constant("start", [2 if kind == "yunet" else 0], np.int64)
    constant("stop", [3 if kind == "yunet" else 1], np.int64)
    node("Slice", ["images", "start", "stop", constant("axis", [1], np.int64)], "channel")
    if kind == "yunet":
        node("Div", ["channel", constant("full", 255)], level)
    else:
        node("Mul", ["channel", constant("scale", 128 / 255)], "scaled")
        node("Add", ["scaled", constant("half", 0.5)], level)
    center, size = (BOX[:2] + BOX[2:]) / 2, BOX[2:] - BOX[:2]
    boxes = [*center / 32, *np.log(size / 32)] if kind == "yunet" else [*-BOX[:2] / 32, *BOX[2:] / 32]
    middle = POINTS.mean(0)
    shapes = {"bbox": boxes, "kps": ((POINTS - middle) * spread + middle).ravel() / 32}
    for stride in (8, 16, 32):
        pooled = node("AveragePool", [level], f"p{stride}", kernel_shape=[stride] * 2, strides=[stride] * 2)
        factor = constant(f"f{stride}", float(stride == 32))
        score = node(
            "Reshape",
            [node("Mul", [pooled, factor], f"m{stride}"), constant("column", [-1, 1], np.int64)],
            f"s{stride}",
        )
        if kind == "scrfd":  # the second anchor of a cell finds nothing
            pair = node("Concat", [score, node("Mul", [score, zero], f"z{stride}")], f"c{stride}", axis=1)
            score = node("Reshape", [pair, "column"], f"a{stride}")
        found = {"cls": score, "obj": score} if kind == "yunet" else {"score": score}
        blank = node("Mul", [score, zero], f"blank{stride}")
        found |= {
            name: node("Add", [blank, constant(name, np.array(values)[None])], f"{name}_rows{stride}")
            for name, values in shapes.items()
        }
        for name, tensor in found.items():
            wrapped = node(
                "Unsqueeze",
                [tensor, constant("first", [0], np.int64)],
                f"{name}_{stride}" if kind == "yunet" else f"{name}w{stride}",
            )
            outputs.append(wrapped if kind == "yunet" else node("Squeeze", [wrapped, "first"], f"{len(outputs) + 440}"))
    graph = helper.make_graph(
        [*_unique(nodes)],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def _unique(nodes: list[NodeProto]) -> list[NodeProto]:
    assert len({name for each in nodes for name in each.output}) == len(nodes)
    return nodes


def photograph(
    cells: dict[tuple[int, int], int], *, height: int = SIDE, width: int = SIDE, seed: int = 0, scale: int = 1
) -> NDArray[np.uint8]:
    """An image `(h, w, 3)` whose cells `(row, column)` have a red level, on noise without red."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[..., 0] = 0
    cell = 32 * scale
    for (row, column), level in cells.items():
        pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell, 0] = level
    return pixels


def put_photograph(path: Path, cells: dict[tuple[int, int], int], *, orientation: int = 1, **options: int) -> Path:
    """Write a photograph as PNG or, by the suffix, another lossless format, with an EXIF orientation."""
    image = Image.fromarray(photograph(cells, **options))
    exif = Image.Exif()
    exif[0x112] = orientation
    if orientation == 6:  # a reader turns it clockwise
        image = image.transpose(Image.Transpose.ROTATE_90)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)
    return path
