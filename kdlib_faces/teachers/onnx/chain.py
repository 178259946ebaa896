"""An ONNX graph as a chain of layers in which residual sums are forks."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kdlib_faces._checks import InputError, show_name
from kdlib_faces.teachers.onnx.constants import read_constants
from kdlib_faces.teachers.onnx.graph import Graph, library
from kdlib_faces.teachers.onnx.runtime import find_embedding

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["Layers", "Residual", "Step", "read_chain"]

_PASSING = {"Identity", "Dropout"}
_AUTOMATIC = {b"SAME_UPPER", b"SAME_LOWER"}
_SHAPES = {"Shape", "Gather", "Unsqueeze", "Squeeze", "Concat", "Cast", "Slice", "Constant", "Mul", "ReduceProd"}


@dataclass
class Step:
    """One layer: `kind` is `conv`, `norm`, `prelu`, `flatten` or `linear`; `node` names it in an error."""

    kind: str
    node: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    stride: int = 1
    padding: int = 0
    groups: int = 1
    eps: float = 1e-5


@dataclass
class Residual:
    """A fork whose two branches are summed: the longer one, and the shorter one, often empty."""

    body: "Layers"
    shortcut: "Layers"
    node: str


Layers: TypeAlias = list[Step | Residual]


def read_chain(graph: Graph) -> Layers:
    """Return the layers from the image input to the first output of the graph, in order.

    A layer is identified by its operation and weights, never by names in the file. Operations that only compute shapes for a
    `Reshape` are left out, so that a flattening looks the same from every exporter.

    Args:
        graph: From `read_graph`.

    Raises:
        InputError: An operation that none of our backbones has, or a graph that is not a chain with residual sums; the
            message names the node.
    """
    try:
        return _Reader(graph).run()
    except RecursionError as error:
        raise InputError(f"{graph.path} cannot be imported: its forks are nested too deeply") from error


class _Reader:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.onnx = library("onnx")
        self.constants = read_constants(graph)
        self.output = find_embedding(graph)
        self.seen: set[int] = set()
        self.users: dict[str, list[NodeProto]] = {}
        shape_arithmetic: set[str] = set()
        for node in self._needed():
            inputs = [name for name in node.input if name and name not in self.constants]
            if node.op_type == "Shape" or (node.op_type in _SHAPES and shape_arithmetic.issuperset(inputs)):
                shape_arithmetic.update(node.output)
                continue
            for name in dict.fromkeys(inputs):
                if name not in shape_arithmetic:
                    self.users.setdefault(name, []).append(node)

    def _needed(self) -> list["NodeProto"]:
        """The nodes that the output depends on, in graph order."""
        nodes = list(self.graph.model.graph.node)
        index = {name: at for at, node in enumerate(nodes) for name in node.output if name}
        wanted, needed = [self.output], set()
        while wanted:
            at = index.get(wanted.pop())
            if at is not None and at not in needed:
                needed.add(at)
                wanted.extend(nodes[at].input)
        return [nodes[at] for at in sorted(needed)]

    def run(self) -> Layers:
        items, end = self._walk(self.graph.input_name)
        if end != self.output:
            raise self._error(f"the chain of layers ends at {end!r}, not at the output {self.output!r}")
        return _with_linear(items)

    def _walk(self, tensor: str, first: "NodeProto | None" = None) -> tuple[Layers, "str | NodeProto"]:
        """From `tensor` to the end of the chain. On a branch, which starts at the node `first`, to the sum that ends it."""
        items: Layers = []
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
                raise self._error(f"{tensor!r} is read {len(users)} times", node)
            if branch and node.op_type == "Add" and not any(name in self.constants for name in node.input):
                return items, node
            self._visit(node)
            step = self._step(node, items)
            if step is not None:
                items.append(step)
            tensor = node.output[0]

    def _fork(self, tensor: str, users: list["NodeProto"]) -> tuple[Residual, str]:
        (first, end), (second, other) = (self._walk(tensor, user) for user in users)
        if isinstance(end, str) or end is not other:
            raise self._error(f"the two branches from {tensor!r} do not end in one sum", users[0])
        self._visit(end)
        body, shortcut = sorted((first, second), key=len, reverse=True)
        return Residual(body, shortcut, _name(end)), end.output[0]

    def _visit(self, node: "NodeProto") -> None:
        if id(node) in self.seen:
            raise self._error("the graph has a cycle", node)
        self.seen.add(id(node))

    def _step(self, node: "NodeProto", before: Layers) -> Step | None:
        """One node as a layer; None for an operation without effect, and for a bias, which is added to the layer before."""
        kind = node.op_type
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        if kind in _PASSING:
            return None
        if kind == "Conv":
            return self._conv(node, attributes)
        if kind == "BatchNormalization":
            if attributes.get("training_mode"):
                raise self._error("a BatchNormalization in training mode", node)
            weights = {name: self._weight(node, at) for at, name in enumerate(("weight", "bias", "mean", "var"), 1)}
            return Step("norm", _name(node), weights, eps=attributes.get("epsilon", 1e-5))
        if kind == "PRelu":
            return Step("prelu", _name(node), {"weight": self._weight(node, 1).reshape(-1)})
        if kind in ("Relu", "LeakyRelu"):
            slope = 0.0 if kind == "Relu" else attributes.get("alpha", 0.01)
            return Step("prelu", _name(node), {"weight": torch.tensor([slope])})
        if kind in ("Flatten", "Reshape", "Squeeze"):
            if attributes.get("axis", 1) != 1:
                raise self._error("a Flatten that mixes images", node)
            return Step("flatten", _name(node))
        if kind in ("Gemm", "MatMul"):
            return self._linear(node, attributes)
        if kind == "Add" and before and isinstance(before[-1], Step) and before[-1].kind in ("conv", "linear"):
            bias = self._weight(node, 0 if node.input[0] in self.constants else 1).reshape(-1)
            before[-1].weights["bias"] = before[-1].weights.get("bias", torch.zeros(1)) + bias
            return None
        raise self._error("an operation that none of our face backbones has", node)

    def _conv(self, node: "NodeProto", attributes: dict[str, Any]) -> Step:
        weights = self._weights(node)
        strides, pads = attributes.get("strides", [1, 1]), attributes.get("pads", [0, 0, 0, 0])
        plain = weights["weight"].dim() == 4 and len(set(strides)) == len(set(pads)) == 1
        if not plain or set(attributes.get("dilations", [1])) != {1} or attributes.get("auto_pad") in _AUTOMATIC:
            raise self._error("a convolution of unequal strides or pads", node)
        groups = attributes.get("group", 1)
        return Step("conv", _name(node), weights, stride=strides[0], padding=pads[0], groups=groups)

    def _linear(self, node: "NodeProto", attributes: dict[str, Any]) -> Step:
        weights = self._weights(node)
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA"):
            raise self._error("a scaled or transposed matrix product", node)
        if weights["weight"].dim() != 2:
            raise self._error("a matrix product of more than two dimensions", node)
        if not attributes.get("transB"):
            weights["weight"] = weights["weight"].T.contiguous()
        return Step("linear", _name(node), weights)

    def _weights(self, node: "NodeProto") -> dict[str, Tensor]:
        """The weight of a layer, and its bias if it has one."""
        weights = {"weight": self._weight(node, 1)}
        if len(node.input) > 2 and node.input[2]:
            weights["bias"] = self._weight(node, 2).reshape(-1)
        return weights

    def _weight(self, node: "NodeProto", at: int) -> Tensor:
        array = self.constants.get(node.input[at]) if len(node.input) > at else None
        if array is None:
            raise self._error("an operation whose weights are not in the file", node)
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        if not torch.isfinite(tensor).all():
            raise self._error("weights that are NaN or infinite", node)
        return tensor

    def _error(self, reason: str, node: "NodeProto | None" = None) -> InputError:
        where = "" if node is None else f" at {_name(node)}"
        return InputError(f"{self.graph.path} cannot be imported as a native backbone{where}: {reason}")


def _with_linear(items: Layers) -> Layers:
    """Turn an embedding made by a convolution over the whole final grid, 1 x 1 or larger, into the linear layer that it is."""
    at = next((at for at in reversed(range(len(items))) if _kind(items[at]) not in ("flatten", "norm")), 0)
    last = items[at] if items else None
    if not isinstance(last, Step) or last.kind != "conv" or last.groups != 1 or last.padding:
        return items
    weights = {**last.weights, "weight": last.weights["weight"].flatten(1)}
    norms = [step for step in items[at + 1 :] if _kind(step) == "norm"]
    return [*items[:at], Step("flatten", last.node), Step("linear", last.node, weights), *norms]


def _kind(item: Step | Residual) -> str:
    return item.kind if isinstance(item, Step) else "sum"


def _name(node: "NodeProto") -> str:
    return show_name(f"{node.op_type} {node.name or node.output[0]!r}")
