"""Descriptions of ONNX files, and the tensors that can be tapped."""

import os
from collections.abc import Mapping
from math import prod
from typing import NamedTuple, TypedDict

import numpy as np

from kdlib_faces.teachers.onnx.graph import Graph, ImageSize, Layout, file_errors, read_graph
from kdlib_faces.teachers.onnx.preprocessing import recognize_input
from kdlib_faces.teachers.onnx.runtime import as_vectors, find_embedding, trace

__all__ = ["GraphInfo", "GraphTap", "describe_graph", "list_taps", "suggest_taps"]

_UNCOUNTED = {"ConvInteger", "Einsum", "GRU", "If", "LSTM", "Loop", "MatMulInteger", "QLinearConv", "RNN", "Scan"}


class GraphTap(NamedTuple):
    """A tensor of a graph that can serve as a feature: its name, the op that computes it, its shape for one image."""

    name: str
    op: str
    shape: tuple[int, ...]


class GraphInfo(TypedDict):
    """Facts about an ONNX file, in values that JSON can hold; see `describe_graph`."""

    inputs: dict[str, list[int | None]]
    outputs: dict[str, list[int]]
    opset: dict[str, int]
    nodes: dict[str, int]
    parameters: int
    macs: int | None
    embedding: str
    embedding_dim: int | None
    input_size: ImageSize | None
    images: str
    bytes: int
    sha256: str


def _is_map(shape: tuple[int, ...], height: int, width: int) -> bool:
    """Whether `shape` is (1, c, h, w), both sides of the input halved equally often and rounded either way."""
    if len(shape) != 4 or shape[0] != 1 or min(shape[2:]) < 2:
        return False
    sides = ((height, shape[2]), (width, shape[3]))
    return any(all(full >> n <= side <= -(-full >> n) for full, side in sides) for n in range(height.bit_length()))


def list_taps(path: str | os.PathLike[str], layout: Layout | None = None) -> list[GraphTap]:
    """List the tensors of an ONNX file that can serve as features, in graph order.

    These are maps `(1, c, h, w)` whose sides are those of the input halved several times, and vectors `(1, d)`. Attention
    matrices, channels-last maps and shape arithmetic are left out.

    Args:
        path: The `.onnx` file.
        layout: As for `OnnxTeacher`.

    Returns:
        One `(name, op, shape)` per tensor; the shape is measured on one image.

    Raises:
        InputError: As `read_graph`, or the graph does not run.
    """
    graph = read_graph(path, layout)
    with file_errors(graph.path):
        nodes = graph.outputs()
        height, width = graph.sample_shape(1)[2:]
        taps = []
        for name, array in trace(graph, list(nodes)).items():
            shape, op = array.shape, nodes[name].op_type
            vector = len(shape) == 2 and shape[0] == 1
            if (
                np.issubdtype(array.dtype, np.floating)
                and op != "Constant"
                and (vector or _is_map(shape, height, width))
            ):
                taps.append(GraphTap(name, op, shape))
        return taps


def suggest_taps(path: str | os.PathLike[str], layout: Layout | None = None) -> dict[str, str]:
    """Suggest one map per resolution of an ONNX file: the output of the last residual block there.

    Among the maps of one resolution the last sum is chosen, or the last map if there is no sum. The result can be passed to
    `OnnxTeacher(path, taps)`; add `"embedding": None` for the output.

    Args:
        path: The `.onnx` file.
        layout: As for `OnnxTeacher`.

    Returns:
        `"map14"` (or `"map14x12"`) to a tensor name, highest resolution first.

    Raises:
        InputError: As `list_taps`.
    """
    chosen: dict[tuple[int, ...], GraphTap] = {}
    for tap in list_taps(path, layout):
        if len(tap.shape) == 4:
            earlier = chosen.get(tap.shape[2:])
            if earlier is None or tap.op == "Add" or earlier.op != "Add":
                chosen[tap.shape[2:]] = tap
    sizes = sorted(chosen, key=prod, reverse=True)
    return {f"map{h}" if h == w else f"map{h}x{w}": chosen[h, w].name for h, w in sizes}


def _count_macs(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Multiply-adds of convolutions and matrix products for one image; None where an op cannot be counted."""
    total = 0
    for node in graph.model.graph.node:
        if node.op_type in _UNCOUNTED:
            return None
        if node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul"}:
            continue
        left, right, out = (shapes.get(name) for name in (*node.input[:2], node.output[0]))
        if left is None or right is None or out is None:
            return None
        if node.op_type == "Conv":
            total += prod(out) * prod(right[1:])
        elif node.op_type == "ConvTranspose":
            total += prod(left) * prod(right[1:])
        else:
            transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += prod(out) * left[0 if transposed else -1]
    return total


def describe_graph(path: str | os.PathLike[str], layout: Layout | None = None) -> GraphInfo:
    """Describe an ONNX file.

    Args:
        path: The `.onnx` file.
        layout: As for `OnnxTeacher`.

    Returns:
        `inputs` and `outputs` (name to shape; None where free; outputs measured on one image), `opset` (domain to version),
        `nodes` (count by op), `parameters` (values in initializers), `macs` (multiply-adds of convolutions and matrix
        products for one image; None if not countable), `embedding` (name of the output that is the embedding),
        `embedding_dim` (None if that is no vector), `input_size` (side in pixels, (h, w) if not square, None if free),
        `images` (what the graph takes, as far as its first operations show it), `bytes` and `sha256`.

    Raises:
        InputError: As `read_graph`, or the graph does not run.
    """
    graph = read_graph(path, layout)
    with file_errors(graph.path):
        return _describe(graph)


def _describe(graph: Graph) -> GraphInfo:
    proto = graph.model.graph
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in proto.initializer}
    arrays = trace(graph, list(graph.outputs()))
    shapes |= {name: array.shape for name, array in arrays.items()}
    shapes[graph.input_name] = graph.sample_shape(1)
    ops = [node.op_type for node in proto.node]
    embedding = find_embedding(graph)
    vector = as_vectors(arrays[embedding]).shape if arrays[embedding].ndim else ()
    return {
        "inputs": {graph.input_name: graph.declared},
        "outputs": {value.name: list(shapes.get(value.name, ())) for value in proto.output},
        "opset": {entry.domain or "ai.onnx": entry.version for entry in graph.model.opset_import},
        "nodes": {op: ops.count(op) for op in sorted(set(ops))},
        "parameters": sum(prod(tensor.dims) for tensor in proto.initializer),
        "macs": _count_macs(graph, shapes),
        "embedding": embedding,
        "embedding_dim": vector[1] if len(vector) == 2 else None,
        "input_size": graph.input_size,
        "images": f"{recognize_input(graph).describe()}, {graph.layout}",
        "bytes": graph.path.stat().st_size,
        "sha256": graph.sha256,
    }
