"""A minimal teacher as an ONNX file: one convolution, a map of 14 x 14 and an embedding."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save


def tiny_graph(path: Path, *, seed: int = 0, dim: int = 16) -> Path:
    """Write the file; the image input is `(n, 3, 112, 112)`, the map is named `middle`, the embedding `out`."""
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
    save(model, str(path))
    return path
