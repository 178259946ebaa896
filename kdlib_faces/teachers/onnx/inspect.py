"""Teachers room: says what an ONNX file is and which of its tensors can be tapped. Touches onnxruntime by `onnx_graph`.

Shapes are measured by running one gray image, because declared ones are often missing or those of another batch.
"""

import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdlib_faces.teachers.onnx.graph import Graph, make_session, read_graph, run_session

__all__ = ["Tap", "describe_graph", "list_taps", "suggest_taps"]

_UNCOUNTED = {"ConvInteger", "Einsum", "GRU", "If", "LSTM", "Loop", "MatMulInteger", "QLinearConv", "RNN", "Scan"}


class Tap(NamedTuple):
    """A tensor of a graph that can serve as a feature: its name, the op that makes it, its shape for one image."""

    name: str
    op: str
    shape: tuple[int, ...]


def _trace(graph: Graph) -> dict[str, np.ndarray]:
    """Every array that a graph makes of one gray image."""
    names = list(graph.outputs())
    session = make_session(graph, names)
    return dict(zip(names, run_session(graph, session, np.zeros(graph.sample_shape(1), graph.dtype)), strict=True))


def _is_map(shape: tuple[int, ...], height: int, width: int) -> bool:
    """Whether `shape` is (1, c, h, w) with the input's sides halved as often as each other, rounded either way."""
    if len(shape) != 4 or shape[0] != 1 or min(shape[2:]) < 2:
        return False
    high, wide = (height, height), (width, width)
    while high[1] >= shape[2] and wide[1] >= shape[3]:
        if high[0] <= shape[2] <= high[1] and wide[0] <= shape[3] <= wide[1]:
            return True
        high, wide = (high[0] // 2, -(-high[1] // 2)), (wide[0] // 2, -(-wide[1] // 2))
    return False


def list_taps(path: str | os.PathLike[str], *, every: bool = False) -> list[Tap]:
    """The tensors of an ONNX file that can serve as features, in graph order.

    Kept are maps `(1, c, h, w)` whose sides are the input's halved some times, and vectors `(1, d)`; attention
    matrices, channels-last maps and shape arithmetic are left out.

    Args:
        path: an `.onnx` file.
        every: list every floating-point tensor instead.

    Returns:
        One `Tap(name, op, shape)` per tensor; the shape is measured on one image.

    Raises:
        InputError: as `read_graph`, or the graph does not run.
    """
    graph = read_graph(path)
    nodes = graph.outputs()
    height, width = graph.sample_shape(1)[2:]
    taps = []
    for name, array in _trace(graph).items():
        if not np.issubdtype(array.dtype, np.floating) or nodes[name].op_type == "Constant":
            continue
        shape = array.shape
        vector = len(shape) == 2 and shape[0] == 1
        if every or vector or _is_map(shape, height, width):
            taps.append(Tap(name, nodes[name].op_type, shape))
    return taps


def suggest_taps(path: str | os.PathLike[str]) -> dict[str, str]:
    """One map for each resolution of an ONNX file: the end of the last residual block there.

    Among the maps of one resolution the last sum is taken, and where there is none the last map. The result is ready
    for `OnnxTeacher(path, taps)`; add `"embedding": None` for the output.

    Args:
        path: an `.onnx` file.

    Returns:
        `"map14"` (or `"map14x12"`) to a tensor name, largest resolution first.

    Raises:
        InputError: as `list_taps`.
    """
    chosen: dict[tuple[int, ...], Tap] = {}
    for tap in list_taps(path):
        if len(tap.shape) == 4:
            held = chosen.get(tap.shape[2:])
            if held is None or tap.op == "Add" or held.op != "Add":
                chosen[tap.shape[2:]] = tap
    sizes = sorted(chosen, key=prod, reverse=True)
    return {f"map{h}" if h == w else f"map{h}x{w}": chosen[h, w].name for h, w in sizes}


def _macs(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
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
        elif node.op_type == "MatMul":
            total += prod(out) * left[-1]
        else:
            flipped = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
            total += prod(out) * left[0 if flipped else -1]
    return total


def describe_graph(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What an ONNX file is, in plain values that JSON takes.

    Args:
        path: an `.onnx` file.

    Returns:
        `inputs` and `outputs` (name to shape; None where free; outputs measured on one image), `opset` (domain to
        version), `nodes` (count by op), `parameters` (values in initializers), `macs` (multiply-adds of convolutions
        and matrix products for one image, None if not countable), `embedding_dim` (None if the first output is no
        vector), `input_size` (side in pixels, (h, w) if not square, None if free), `bytes` and `sha256`.

    Raises:
        InputError: as `read_graph`, or the graph does not run.
    """
    graph = read_graph(path)
    proto = graph.model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.initializer} | {
        name: array.shape for name, array in _trace(graph).items()
    }
    shapes[graph.input_name] = graph.sample_shape(1)
    ops = [node.op_type for node in proto.node]
    first = shapes.get(proto.output[0].name, ()) if proto.output else ()
    return {
        "inputs": {graph.input_name: list(graph.shape)},
        "outputs": {value.name: list(shapes.get(value.name, ())) for value in proto.output},
        "opset": {entry.domain or "ai.onnx": entry.version for entry in graph.model.opset_import},
        "nodes": {op: ops.count(op) for op in sorted(set(ops))},
        "parameters": sum(prod(tensor.dims) for tensor in proto.initializer),
        "macs": _macs(graph, shapes),
        "embedding_dim": first[1] if len(first) == 2 else None,
        "input_size": graph.input_size,
        "bytes": Path(path).stat().st_size,
        "sha256": graph.sha256,
    }
