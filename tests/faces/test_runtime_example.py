"""The example that runs an exported student without torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from kdlib_faces.data import SyntheticFaces
from kdlib_faces.data.alignment import ARCFACE_TEMPLATE, align_face

EXAMPLE = Path(__file__).parents[2] / "docs" / "runtime" / "runtime_face.py"
SIDE, STRIDE = 64, 16
BLOCKED = "import runpy, sys; sys.modules['torch'] = sys.modules['kdlib'] = sys.modules['kdlib_faces'] = None; " + (
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def write_detector(path: Path, points: np.ndarray) -> Path:
    """A graph with YuNet's outputs that finds one face at `points` (5, 2), pixels of its own input."""
    constants = {}
    for stride in (8, 16, 32):
        cells = (SIDE // stride) ** 2
        kps = np.zeros((1, cells, 10), np.float32)
        score = np.full((1, cells, 1), 0.1, np.float32)
        if stride == STRIDE:
            cell, columns = 6, SIDE // stride
            kps[0, cell] = (points / stride - (cell % columns, cell // columns)).ravel()
            score[0, cell] = 0.9
        constants |= {f"cls_{stride}": score, f"obj_{stride}": score, f"kps_{stride}": kps}
        constants[f"bbox_{stride}"] = np.zeros((1, cells, 4), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"c_{name}"], [name]) for name in constants],
        "detector",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in constants.items()],
        [numpy_helper.from_array(array, f"c_{name}") for name, array in constants.items()],
    )
    return save(graph, path)


def write_model(path: Path) -> Path:
    """Means of 4 x 4 pixels, less their mean over the image."""
    nodes = [
        helper.make_node("AveragePool", ["images"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("ReduceMean", ["flat"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Sub", ["flat", "mean"], ["embedding"]),
    ]
    shapes = (["n", 3, 112, 112], ["n", 3 * 28 * 28])
    source, target = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("images", "embedding"), shapes, strict=True)
    )
    return save(helper.make_graph(nodes, "model", [source], [target]), path)


def save(graph: onnx.GraphProto, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def test_the_example_finds_aligns_and_compares_faces_without_torch(tmp_path: Path) -> None:
    faces = SyntheticFaces(2, 1, 112, seed=4)
    photos, expected = [], []
    # A turned, larger template inside the photograph.
    turn = 1.2 * np.array([[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]])
    points = ARCFACE_TEMPLATE @ turn.T + (60, 15)
    for row in range(2):
        small = ((faces[row].image.numpy().transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
        photo = Image.fromarray(small).resize((256, 192))
        photo.save(tmp_path / f"{row}.png")
        photos.append(str(tmp_path / f"{row}.png"))
        expected.append(np.asarray(align_face(photo, points), np.float32).transpose(2, 0, 1) / 127.5 - 1)
    detector = write_detector(tmp_path / "detector.onnx", points * SIDE / 256)
    model = write_model(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(model))
    rows = [session.run(None, {"images": np.stack([crop, crop[..., ::-1]])})[0].sum(0) for crop in expected]
    left, right = (row / np.linalg.norm(row) for row in rows)
    command = [sys.executable, "-c", BLOCKED, str(EXAMPLE), str(detector), str(model), *photos]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(float(left @ right), abs=5e-3)


def test_the_example_is_short() -> None:
    lines = [line.strip() for line in EXAMPLE.read_text("utf-8").splitlines()]
    assert sum(bool(line) and not line.startswith(("#", '"""')) for line in lines) <= 30
