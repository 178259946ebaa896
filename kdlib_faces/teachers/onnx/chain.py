"""Teachers room: an ONNX graph read as a chain of layers, with residual sums as forks of it. Touches `onnx_graph`.

Names in the file say nothing here: a layer is what its operation and its weights are. What only computes shapes for a
`Reshape` is left out, so that a flattening looks the same whichever exporter wrote it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.teachers.onnx.graph import Graph, _library

__all__ = ["Residual", "Step", "read_chain"]

_PASSING = {"Identity", "Dropout"}
_SHAPES = {"Shape", "Gather", "Unsqueeze", "Squeeze", "Concat", "Cast", "Slice", "Constant", "Mul", "ReduceProd"}


@dataclass
class Step:
    """One layer: `kind` is `conv`, `norm`, `prelu`, `flatten` or `linear`; `node` tells it in an error."""

    kind: str
    node: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    stride: int = 1
    padding: int = 0
    groups: int = 1
    eps: float = 1e-5


@dataclass
class Residual:
    """A fork whose two ways are summed: the longer one, and the shorter one, often empty."""

    body: list["Step | Residual"]
    shortcut: list["Step | Residual"]
    node: str


def read_chain(graph: Graph) -> list[Step | Residual]:
    """The layers from the image input to the graph's first output, in order.

    Args:
        graph: from `read_graph`.

    Raises:
        InputError: an operation that no face backbone of ours has, or a graph that is no chain with residual sums; the
            message names the node.
    """
    try:
        return _Reader(graph).run()
    except RecursionError as error:
        raise InputError(f"{graph.path} cannot be imported: its forks lie within each other too deep") from error


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        to_array: Callable[[Any], np.ndarray] = _library("onnx").numpy_helper.to_array
        proto = graph.model.graph
        self.constants: dict[str, Any] = {each.name: to_array(each) for each in proto.initializer}
        for node in proto.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = next(
                    (to_array(a.t) for a in node.attribute if a.name == "value"), None
                )
            elif node.op_type == "Identity" and node.input[0] in self.constants:
                self.constants[node.output[0]] = self.constants[node.input[0]]
        self.output = proto.output[0].name if proto.output else ""
        self.users: dict[str, list[Any]] = {}
        arithmetic: set[str] = set()
        for node in self._needed(proto.node):
            inputs = [name for name in node.input if name and name not in self.constants]
            known = all(name in arithmetic for name in inputs)
            if node.op_type == "Shape" or (known and node.op_type in _SHAPES):
                arithmetic.update(node.output)
                continue
            for name in dict.fromkeys(inputs):
                if name not in arithmetic:
                    self.users.setdefault(name, []).append(node)
        self.seen: set[int] = set()

    def _needed(self, nodes: Any) -> list[Any]:
        """The nodes that the output depends on, in the file's order."""
        makers = {name: node for node in nodes for name in node.output if name}
        wanted, needed = [self.output], set()
        while wanted:
            node = makers.get(wanted.pop())
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                wanted.extend(node.input)
        return [node for node in nodes if id(node) in needed]

    def run(self) -> list[Step | Residual]:
        items, end = self._walk(self.graph.input_name)
        if end != self.output:
            raise self._no(f"the chain of layers ends at {end!r}, not at the output {self.output!r}")
        return items

    def _walk(self, tensor: str, first: Any = None) -> tuple[list[Step | Residual], Any]:
        """From `tensor` to the end of the chain; on a way of a fork, which starts with `first`, to the sum that ends it."""
        items: list[Step | Residual] = []
        branch = first is not None
        while True:
            users = [first] if first is not None else self.users.get(tensor, [])
            first = None
            if not users:
                return items, tensor
            if len(users) == 2:
                item, tensor = self._fork(tensor, users)
                items.append(item)
                continue
            node = users[0]
            if len(users) > 2:
                raise self._no(f"{tensor!r} is read {len(users)} times", node)
            if branch and node.op_type == "Add" and not any(name in self.constants for name in node.input):
                return items, node
            self._visit(node)
            step = self._step(node, items)
            if step is not None:
                items.append(step)
            tensor = node.output[0]

    def _fork(self, tensor: str, users: list[Any]) -> tuple[Residual, str]:
        ways = [self._walk(tensor, user) for user in users]
        ends = [end for _, end in ways]
        if isinstance(ends[0], str) or ends[0] is not ends[1]:
            raise self._no(f"the two ways from {tensor!r} do not meet in one sum", users[0])
        self._visit(ends[0])
        body, shortcut = sorted((items for items, _ in ways), key=len, reverse=True)
        return Residual(body, shortcut, _name(ends[0])), ends[0].output[0]

    def _visit(self, node: Any) -> None:
        if id(node) in self.seen:
            raise self._no("the graph runs in a circle", node)
        self.seen.add(id(node))

    def _step(self, node: Any, before: list[Step | Residual]) -> Step | None:
        """One node as a layer; None where it adds nothing, or its bias to the layer before."""
        kind, attributes = node.op_type, {a.name: a for a in node.attribute}
        if kind in _PASSING:
            return None
        if kind == "Conv":
            return self._conv(node, attributes)
        if kind == "BatchNormalization":
            if "training_mode" in attributes and attributes["training_mode"].i:
                raise self._no("a BatchNormalization in training mode", node)
            names = ("weight", "bias", "mean", "var")
            weights = {name: self._weight(node, at + 1) for at, name in enumerate(names)}
            eps = attributes["epsilon"].f if "epsilon" in attributes else 1e-5
            return Step("norm", _name(node), weights, eps=eps)
        if kind == "PRelu":
            return Step("prelu", _name(node), {"weight": self._weight(node, 1).reshape(-1)})
        if kind in ("Relu", "LeakyRelu"):
            slope = 0.0 if kind == "Relu" else (attributes["alpha"].f if "alpha" in attributes else 0.01)
            return Step("prelu", _name(node), {"weight": torch.tensor([slope])})
        if kind in ("Flatten", "Reshape"):
            if "axis" in attributes and attributes["axis"].i != 1:
                raise self._no("a Flatten that mixes images", node)
            return Step("flatten", _name(node))
        if kind in ("Gemm", "MatMul"):
            return self._linear(node, attributes)
        if kind == "Add" and before and isinstance(before[-1], Step) and before[-1].kind == "linear":
            added = self._weight(node, 0 if node.input[0] in self.constants else 1).reshape(-1)
            before[-1].weights["bias"] = before[-1].weights.get("bias", torch.zeros(1)) + added
            return None
        raise self._no("an operation that is in no face backbone of ours", node)

    def _conv(self, node: Any, attributes: dict[str, Any]) -> Step:
        weight = self._weight(node, 1)
        strides = list(attributes["strides"].ints) if "strides" in attributes else [1, 1]
        pads = list(attributes["pads"].ints) if "pads" in attributes else [0, 0, 0, 0]
        dilations = list(attributes["dilations"].ints) if "dilations" in attributes else [1, 1]
        automatic = attributes["auto_pad"].s if "auto_pad" in attributes else b"NOTSET"
        plain = weight.dim() == 4 and len(set(strides)) == 1 and len(set(pads)) == 1 and set(dilations) == {1}
        if not plain or automatic not in (b"NOTSET", b"VALID"):
            raise self._no("a convolution of unequal strides or pads", node)
        weights = {"weight": weight}
        if len(node.input) > 2 and node.input[2]:
            weights["bias"] = self._weight(node, 2)
        groups = attributes["group"].i if "group" in attributes else 1
        return Step("conv", _name(node), weights, stride=strides[0], padding=pads[0], groups=groups)

    def _linear(self, node: Any, attributes: dict[str, Any]) -> Step:
        weight = self._weight(node, 1)
        scale = [attributes[name].f for name in ("alpha", "beta") if name in attributes]
        if any(value != 1.0 for value in scale) or ("transA" in attributes and attributes["transA"].i):
            raise self._no("a scaled or turned matrix product", node)
        if weight.dim() != 2:
            raise self._no("a matrix product of more than two dimensions", node)
        turned = node.op_type == "Gemm" and "transB" in attributes and attributes["transB"].i
        weights = {"weight": weight if turned else weight.T.contiguous()}
        if len(node.input) > 2 and node.input[2]:
            weights["bias"] = self._weight(node, 2).reshape(-1)
        return Step("linear", _name(node), weights)

    def _weight(self, node: Any, at: int) -> Tensor:
        array = self.constants.get(node.input[at]) if len(node.input) > at else None
        if array is None:
            raise self._no("an operation whose weights are not in the file", node)
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        if not torch.isfinite(tensor).all():
            raise self._no("weights that are NaN or infinite", node)
        return tensor

    def _no(self, what: str, node: Any = None) -> InputError:
        where = f" at {_name(node)}" if node is not None else ""
        return InputError(f"{self.graph.path} cannot be imported as a native backbone{where}: {what}")


def _name(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"
