"""Constant tensors of an ONNX graph."""

import numpy as np

from kdlib_faces._checks import InputError
from kdlib_faces.teachers.onnx.graph import Graph, library, reason

__all__ = ["read_constants"]

_FOLDED = {"Cast", "Concat", "Identity", "Neg", "Reciprocal", "Reshape", "Sqrt", "Squeeze", "Transpose", "Unsqueeze"}


def read_constants(graph: Graph) -> dict[str, np.ndarray]:
    """Return the weights of a graph, its constants, and what is made of them by reshaping, casting and the like.

    Raises:
        InputError: A constant is damaged; the message names it.
    """
    onnx, proto = library("onnx"), graph.model.graph
    tensors = {tensor.name: tensor for tensor in proto.initializer}
    for node in proto.node:
        if node.op_type == "Constant" and node.output:
            tensors.update((node.output[0], each.t) for each in node.attribute if each.name == "value")
    values: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        try:
            values[name] = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # damaged bytes can raise almost anything
            raise InputError(f"{graph.path}: the constant {name!r} is damaged: {reason(error)}") from error
    for node in proto.node:
        inputs = [name for name in node.input if name]
        if node.op_type in _FOLDED and len(node.output) == 1 and inputs and all(name in values for name in inputs):
            one = onnx.helper.make_graph(
                [node],
                "constant",
                [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(inputs)],
                [onnx.ValueInfoProto(name=node.output[0])],
            )
            model = onnx.helper.make_model(one, opset_imports=graph.model.opset_import)
            try:
                evaluator = library("onnx.reference").ReferenceEvaluator(model)
                values[node.output[0]] = np.asarray(evaluator.run(None, {name: values[name] for name in inputs})[0])
            except Exception:
                # The tensor then counts as computed, and a reader that needs it as a constant raises an error.
                continue
    return values
