"""Channel ranges of a graph made equal before it is quantized."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdlib_faces.teachers.onnx.graph import library

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["equalize", "group_of"]

KEEPING = {"Relu", "PRelu"}  # f(s x) = s f(x) for s > 0, channel by channel
SMALLEST = 1e-2
"""A channel is enlarged at most so many times less one: a dead channel would otherwise get weights without bound."""


def group_of(node: "NodeProto") -> int:
    """The number of groups of a convolution."""
    return next((each.i for each in node.attribute if each.name == "group"), 1)


def equalize(model: "ModelProto", peaks: dict[str, NDArray[np.float32]]) -> None:
    """Scale the channels of feature maps so that all of a map have the same range; the output of the graph stays the same.

    An int8 map has one step for all channels, so a channel of small range loses its precision (Nagel et al., "Data-free
    quantization through weight equalization and bias correction", ICCV 2019). A channel scale passes through ReLU, PReLU
    and sums, and is absorbed by the convolutions before and behind. Maps that any other operation reads keep their scale.

    Args:
        model: The graph, changed in place.
        peaks: Name of a tensor to the largest absolute value of each channel `(c,)`; other tensors are no feature maps.
    """
    numpy_helper = library("onnx").numpy_helper
    constants = {each.name: each for each in model.graph.initializer}
    convolutions, scales = _channel_scales(model, peaks)
    for node in convolutions:
        weight = numpy_helper.to_array(constants[node.input[1]])
        outputs, inputs = weight.shape[:2]
        new = weight.astype(np.float64)
        if (scale := scales.get(node.input[0])) is not None:
            group = np.arange(outputs) // (outputs // group_of(node))
            new *= scale[group[:, None] * inputs + np.arange(inputs)][..., None, None]
        if (scale := scales.get(node.output[0])) is not None:
            new /= scale[:, None, None, None]
            for name in node.input[2:]:
                bias = numpy_helper.to_array(constants[name]) / scale
                constants[name].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), name))
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(new.astype(np.float32), node.input[1]))


def _channel_scales(
    model: "ModelProto", peaks: dict[str, NDArray[np.float32]]
) -> tuple[list["NodeProto"], dict[str, NDArray[np.float32]]]:
    """Find the convolutions that can absorb scales, and the scale `(c,)` of each feature map by which it is divided.

    Maps that ReLU, PReLU and sums connect have one scale: the largest of their ranges relative to the largest channel.
    """
    graph = model.graph
    constants = {each.name for each in graph.initializer}
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            name = parent[name]
        return name

    fixed = {graph.input[0].name, *(each.name for each in graph.output)}
    readers: dict[str, int] = {}
    convolutions = []
    for node in graph.node:
        data = [name for name in node.input if name and name not in constants]
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
        if node.op_type == "Conv" and len(data) == 1 and all(name in constants for name in node.input[1:]):
            convolutions.append(node)
            root(data[0]), root(node.output[0])
        elif (node.op_type in KEEPING and len(data) == 1) or (node.op_type == "Add" and len(data) == 2):
            for name in data:
                parent[root(name)] = root(node.output[0])
        else:
            fixed.update(data, node.output)
    held = {root(name) for name in fixed if name in parent}
    # Weights that two layers share cannot be scaled for one of them.
    held |= {
        root(name)
        for node in convolutions
        if any(readers[each] > 1 for each in node.input[1:])
        for name in (node.input[0], node.output[0])
    }
    ranges: dict[str, NDArray[np.float32]] = {}
    for name in parent:
        if root(name) not in held and name in peaks:
            before = ranges.get(root(name))
            ranges[root(name)] = peaks[name] if before is None else np.maximum(before, peaks[name])
    scales = {name: np.maximum(each / max(float(each.max()), 1e-30), SMALLEST) for name, each in ranges.items()}
    return convolutions, {name: scales[root(name)] for name in parent if root(name) in scales}
