"""Small ONNX graphs of the tests."""

from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F


def tiny_graph(path: Path, *, seed: int = 0, dim: int = 16) -> Path:
    """Write a minimal teacher: one convolution, a map of 14 x 14 and an embedding. The image input is `(n, 3, 112, 112)`, the map is named `middle`, the embedding `out`."""
    rng = np.random.default_rng(seed)
    weights = {
        "kernel": rng.normal(0, 0.1, (6, 3, 8, 8)).astype(np.float32),
        "matrix": rng.normal(0, 0.5, (6, dim)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["conv"], "conv", strides=[8, 8]),
        helper.make_node("Relu", ["conv"], ["middle"], "relu"),
        helper.make_node("GlobalAveragePool", ["middle"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "matrix"], ["out"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", dim])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path


def unit_graph(path: Path, size: int, dim: int = 16) -> Path:
    """Write a teacher whose embeddings have unit length, with NaN for a black image: 0 divided by its length 0."""
    matrix = np.random.default_rng(0).normal(0, 0.02, (3 * size * size, dim)).astype(np.float32)
    weights = {"matrix": matrix, "one": np.float32(1), "shape": np.array([-1, len(matrix)])}
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["flat"]),
        helper.make_node("Add", ["flat", "one"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "matrix"], ["product"]),
        helper.make_node("ReduceL2", ["product"], ["length"], axes=[1], keepdims=1),
        helper.make_node("Div", ["product", "length"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "unit",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", dim])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )
    return path


RNG = np.random.default_rng(0)
KERNEL = RNG.normal(0, 0.3, (4, 3, 3, 3)).astype(np.float32)
SECOND = RNG.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32)
MATRIX = RNG.normal(0, 0.5, (4, 6)).astype(np.float32)


def network(batch="n", size=16, *, tail=None, extra=(), dtype=TensorProto.FLOAT, channels=3):
    """Conv, Relu, Conv, Add at half size ("map"), pooled and multiplied to a 6-vector ("out")."""
    real = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["c1"], "first", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "second"], ["c2"], "middle", pads=[1] * 4),
        helper.make_node("Add", ["r1", "c2"], ["map"], "sum"),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"], "pool"),
        *(tail or [helper.make_node("Flatten", ["pooled"], ["flat"], "flatten")]),
        helper.make_node("MatMul", ["flat", "matrix"], ["out"], "last"),
    ]
    weights = {
        "kernel": KERNEL[:, :channels].astype(real),
        "second": SECOND.astype(real),
        "matrix": MATRIX.astype(real),
    }
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", dtype, [batch, channels, size, size])],
        # The declared output is that of one image, as exporters leave it.
        [helper.make_tensor_value_info("out", dtype, [1, 6])],
        [*[numpy_helper.from_array(value, name) for name, value in weights.items()], *extra],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return model


def reshaped(shape=(1, 4), batch="n", size=16):
    """A graph that declares a free batch by default, with a reshape made for one image."""
    tail = [helper.make_node("Reshape", ["pooled", "shape"], ["flat"], "reshape")]
    return network(batch, size, tail=tail, extra=[numpy_helper.from_array(np.array(shape, np.int64), "shape")])


def mixing(batch):
    """Rows that depend on each other: the mean of the batch is added, as by a BatchNorm in training mode."""
    tail = [
        helper.make_node("Flatten", ["pooled"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["mean"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["mean", "ramp"], ["bent"]),
        helper.make_node("Add", ["rows", "bent"], ["flat"]),
    ]
    ramp = np.arange(4, dtype=np.float32)[None] if batch == "n" else np.arange(batch, dtype=np.float32)[:, None]
    return network(batch, tail=tail, extra=[numpy_helper.from_array(ramp, "ramp")])


def save(model, folder, name="net.onnx"):
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def truth(images):
    """The same network in torch."""
    r1 = F.conv2d(images, torch.from_numpy(KERNEL), stride=2, padding=1).relu()
    maps = r1 + F.conv2d(r1, torch.from_numpy(SECOND), padding=1)
    return {"map": maps, "embedding": maps.mean((2, 3)) @ torch.from_numpy(MATRIX)}
