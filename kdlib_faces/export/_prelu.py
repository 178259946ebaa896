"""PReLU in the form in which onnxruntime is fast on CPUs."""

from typing import TYPE_CHECKING

import numpy as np

from kdlib_faces.teachers.onnx.graph import library

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["split_prelu"]


def split_prelu(model: "ModelProto") -> None:
    """Replace each PRelu on feature maps by depthwise 1x1 convolutions: `prelu(x) = a x + relu((1 - a) x)` for `a <= 1`.

    onnxruntime has no vectorized kernel for PRelu on CPUs: in a light face network it takes half the time. Depthwise
    convolutions stay in the layout of the convolutions around them, in float32 and in int8. A PRelu with a slope above 1
    stays as it is.
    """
    onnx = library("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    constants = {each.name: each for each in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        known = node.op_type == "PRelu" and node.input[1] in constants
        given = numpy_helper.to_array(constants[node.input[1]]) if known else np.zeros(0)
        slopes = given.reshape(-1)
        if slopes.size < 2 or given.ndim < 3 or given.shape[-3:] != (slopes.size, 1, 1) or (slopes > 1).any():
            nodes.append(node)
            continue
        (x, _), (y,) = node.input, node.output
        branches = []
        for part, values in (("slope", slopes), ("rest", 1 - slopes)):
            name = f"{y}_{part}"
            weight = numpy_helper.from_array(values.astype(np.float32).reshape(-1, 1, 1, 1), f"{name}_weight")
            model.graph.initializer.append(weight)
            nodes.append(
                helper.make_node("Conv", [x, weight.name], [name], name, group=len(values), kernel_shape=[1, 1])
            )
            branches.append(name)
        nodes.append(helper.make_node("Relu", [branches[1]], [f"{y}_relu"], f"{y}_relu"))
        nodes.append(helper.make_node("Add", [branches[0], f"{y}_relu"], [y], f"{y}_sum"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    left = [each for each in model.graph.initializer if each.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)
