"""The int8 form of a float32 ONNX graph, written node by node: `write_int8`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdlib_faces.export._equalize import group_of
from kdlib_faces.export._rounding import round_weights
from kdlib_faces.teachers.onnx.graph import library

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["write_int8"]

Ranges: TypeAlias = Mapping[str, tuple[float, float]]
"""Name of a tensor to its smallest and largest value."""

PRODUCTS = {"Conv", "Gemm", "MatMul"}
LIMITS = {"Relu", "Clip"}
"""Activations that onnxruntime runs inside of the quantized operation before them."""
SHAPES = {"Reshape", "Flatten"}
MAX_SAMPLES = 20_000
"""Positions of feature maps from which the rounding of one layer is computed."""
MAX_VALUES = 2**24
"""Values of all of these samples."""


def write_int8(
    model: "ModelProto", ranges: Ranges, images: NDArray[np.float32], floats: set[str]
) -> tuple["ModelProto", int]:
    """Quantize a graph: weights int8 by channel, activations uint8 (QDQ form).

    The layers are quantized in their order, with the values that the int8 graph computes before them: the weights are rounded
    by these inputs (`round_weights`), and the bias of each channel is moved by the mean error of its outputs on the images.

    PReLU with slopes `a <= 1` is `max(x, a x)`: both have one step, so that the maximum is that of the stored numbers.

    Args:
        model: The float graph.
        ranges: Ranges of the float32 tensors that depend on the images.
        images: Images as the graph takes them, `(n, 3, h, w)`.
        floats: First output of each node that stays float.

    Returns:
        The int8 graph, and the number of its products and convolutions that stayed float.
    """
    writer = _Writer(model, ranges, images, floats)
    for node in model.graph.node:
        writer.add(node)
    return writer.finish(), writer.float_products


class _Writer:
    """The int8 graph so far, with the values of its tensors on the images beside the exact ones."""

    def __init__(self, model: "ModelProto", ranges: Ranges, images: NDArray[np.float32], floats: set[str]) -> None:
        self.onnx = library("onnx")
        self.model, self.floats, self.float_products = model, floats, 0
        self.constants = {each.name: self.onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {}
        self.last: dict[str, int] = {}
        for at, node in enumerate(model.graph.node):
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
                self.last[name] = at
        self.outputs = {each.name for each in model.graph.output}
        self.ranges = dict(ranges)
        for node in model.graph.node:
            if self._is_maximum(node) and {node.input[0], node.output[0]} <= ranges.keys():
                (low, high), (other_low, other_high) = ranges[node.input[0]], ranges[node.output[0]]
                self.ranges[node.input[0]] = min(low, other_low), max(high, other_high)
        source = model.graph.input[0].name
        self.exact: dict[str, NDArray[np.float32]] = {source: images}
        self.found: dict[str, NDArray[np.float32]] = {source: images}
        self.floating = {source}
        """Tensors that the int8 graph holds as float under their own name."""
        self.unrounded: set[str] = set()
        """Those that only an activation reads: onnxruntime runs it with the quantized operation before it."""
        self.steps: dict[str, tuple[np.float32, np.uint8]] = {}
        """Step and zero point of the tensors that it holds as uint8."""
        self.nodes: list[NodeProto] = []
        self.values: dict[str, NDArray[np.generic]] = {}
        self.position = 0

    def add(self, node: "NodeProto") -> None:
        """Write the int8 form of a node, or the node itself."""
        results = self._run(node, self.exact)
        self.exact |= dict(zip(node.output, results, strict=True))
        quantizes = not self.floats & set(node.output)
        source = node.input[0] if node.input else ""
        if quantizes and self._is_product(node):
            self._product(node)
        elif quantizes and self._is_maximum(node) and source in self.steps:
            self._maximum(node)
        elif quantizes and node.op_type == "Add" and self._is_sum(node):
            inputs = [self._dequantized(name) for name in node.input]
            self._emit(node, inputs, self.found[source] + self.found[node.input[1]])
        elif quantizes and node.op_type in LIMITS and source in self.unrounded:
            (value,) = self._run(node, self.found)
            self._emit(node, [*node.input], value)
        elif quantizes and node.op_type in SHAPES and source in self.steps:
            inputs = [self._dequantized(source), *node.input[1:]]
            (value,) = self._run(node, self.found)
            self._emit(node, inputs, value, step=self.steps[source])
        else:
            self.float_products += node.op_type in PRODUCTS
            self._write(node.op_type, [self._float(name) for name in node.input], list(node.output), node)
            changed = any(self.found[name] is not self.exact[name] for name in node.input if name in self.exact)
            results = self._run(node, self.found) if changed else results
            self.found |= dict(zip(node.output, results, strict=True))
            self.floating.update(node.output)
        for name in [name for name in self.exact if self.last.get(name, self.position + 1) <= self.position]:
            del self.exact[name], self.found[name]
        self.position += 1

    def finish(self) -> "ModelProto":
        """The graph, with outputs in float32."""
        for name in self.outputs - self.floating:
            self.nodes.append(self.onnx.helper.make_node("DequantizeLinear", self._stored(name), [name]))
        result: ModelProto = self.onnx.ModelProto()
        result.CopyFrom(self.model)
        del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
        result.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        constants = {**self.constants, **self.values}
        result.graph.initializer.extend(
            self.onnx.numpy_helper.from_array(value, name) for name, value in constants.items() if name in used
        )
        return result

    def _is_product(self, node: "NodeProto") -> bool:
        """Whether a node multiplies a float32 tensor that depends on the images with constant weights."""
        if node.op_type not in PRODUCTS or node.input[1] not in self.constants or node.input[0] not in self.ranges:
            return False
        given = {each.name: self.onnx.helper.get_attribute_value(each) for each in node.attribute}
        dims, known = self.constants[node.input[1]].ndim, all(name in self.constants for name in node.input[2:])
        if node.op_type == "Conv":
            return dims == 4 and given.get("auto_pad", b"NOTSET") == b"NOTSET" and known
        plain = given.get("alpha", 1) == given.get("beta", 1) == 1 and not given.get("transA", 0)
        return dims == 2 and plain and known

    def _is_maximum(self, node: "NodeProto") -> bool:
        slopes = self.constants.get(node.input[1]) if node.op_type == "PRelu" else None
        return slopes is not None and slopes.shape[-3:] == (slopes.size, 1, 1) and bool((slopes <= 1).all())

    def _is_sum(self, node: "NodeProto") -> bool:
        stored = [name for name in node.input if name in self.steps]
        return bool(stored) and all(name in self.ranges and name not in self.constants for name in node.input)

    def _product(self, node: "NodeProto") -> None:
        """A convolution or matrix product with rounded weights and a corrected bias."""
        source, target = node.input[0], node.output[0]
        weight = self.constants[node.input[1]]
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB"))
        rows = torch.from_numpy(np.array(weight.T if transposed else weight, np.float32))
        given = self._dequantized(source)
        groups = group_of(node)
        samples = _samples(self.found[source], node, rows, groups)
        rounded, steps = round_weights(rows.reshape(groups, len(rows) // groups, -1), samples)
        flat = steps.reshape(-1).numpy()
        has_bias = node.op_type != "MatMul"
        bias = self.constants[node.input[2]] if len(node.input) > 2 else np.zeros(len(rows), np.float32)
        step = self.steps[source][0]
        # A bias has to fit into 32 bits, in steps of the product.
        flat = np.maximum(flat, np.abs(bias) / (step * np.float32(2**30))).astype(np.float32)
        whole = rounded.reshape(rows.shape).numpy()
        real = whole * flat.reshape(-1, *[1] * (whole.ndim - 1))
        stored, real = (whole.T, real.T) if transposed else (whole, real)
        trial = self.onnx.NodeProto()
        trial.CopyFrom(node)
        trial.input[1:] = ["weight"]
        (value,) = self._run(trial, self.found, {"weight": real.astype(np.float32)})
        axis = 1 if node.op_type == "Conv" else -1
        shape = [-1 if at == axis % value.ndim else 1 for at in range(value.ndim)]
        inputs = [given, self._weight(target, np.ascontiguousarray(stored), flat, axis=int(transposed), node=node)]
        if has_bias:
            others = tuple(at for at in range(value.ndim) if at != axis % value.ndim)
            bias = (self.exact[target] - value).mean(others, dtype=np.float64)
            counts = np.rint(bias / (flat * step)).clip(-(2**31), 2**31 - 1).astype(np.int32)
            value = value + (counts * (flat * step)).reshape(shape).astype(np.float32)
            inputs.append(self._weight(f"{target}_bias", counts, flat * step, axis=0))
        if node.op_type == "Conv":
            self._emit(node, inputs, value)
        else:
            self._write(node.op_type, inputs, [target], node)
            self.floating.add(target)
            self.found[target] = value

    def _maximum(self, node: "NodeProto") -> None:
        """PReLU as the maximum of the uint8 tensors of `x` and `a x`."""
        (source, slope), (target,) = node.input, node.output
        slopes = self.constants[slope].reshape(-1)
        flat = np.maximum(np.abs(slopes) / 127, 1e-12).astype(np.float32)
        whole = np.rint(slopes / flat).astype(np.int8).reshape(-1, 1, 1, 1)
        step = self.steps[source]
        inputs = [self._dequantized(source), self._weight(target, whole, flat, axis=0)]
        helper, product = self.onnx.helper, f"{target}_product"
        self.nodes.append(helper.make_node("Conv", inputs, [product], group=len(flat), kernel_shape=[1, 1]))
        self.nodes.append(
            helper.make_node("QuantizeLinear", [product, *self._stored(source)[1:]], [f"{product}_stored"])
        )
        self.steps[target] = step
        self.nodes.append(
            helper.make_node("Max", [self._stored(source)[0], f"{product}_stored"], [self._stored(target)[0]])
        )
        value = self.found[source] * (whole[..., 0, 0, 0] * flat).reshape(-1, 1, 1)
        self.found[target] = np.maximum(self.found[source], _rounded(value, step))

    def _emit(
        self, node: "NodeProto", inputs: list[str], value: NDArray[np.float32],
        step: tuple[np.float32, np.uint8] | None = None,
    ) -> None:  # fmt: skip
        """Write a node and store its output as uint8, unless the next node is an activation that runs with it."""
        (target,) = node.output
        readers = self.readers.get(target, [])
        limited = len(readers) == 1 and readers[0].op_type in LIMITS and not self.floats & set(readers[0].output)
        if limited and target not in self.outputs and node.op_type in ("Conv", "Add"):
            self._write(node.op_type, inputs, [target], node)
            self.floating.add(target)
            self.unrounded.add(target)
            self.found[target] = value
            return
        self._write(node.op_type, inputs, [f"{target}_exact"], node)
        self._store(target, f"{target}_exact", value, step)

    def _store(
        self, name: str, source: str, value: NDArray[np.float32], step: tuple[np.float32, np.uint8] | None = None
    ) -> None:
        """Quantize a float tensor of the int8 graph."""
        self.steps[name] = _step(*self.ranges[name]) if step is None else step
        self.found[name] = _rounded(value, self.steps[name])
        self.nodes.append(
            self.onnx.helper.make_node("QuantizeLinear", [source, *self._stored(name)[1:]], self._stored(name)[:1])
        )

    def _stored(self, name: str) -> list[str]:
        """Names of the uint8 form of a tensor, its step and its zero point."""
        step, zero = self.steps[name]
        names = [f"{name}_stored", f"step_{step!r}", f"zero_{zero}"]
        self.values |= {names[1]: np.array(step), names[2]: np.array(zero)}
        return names

    def _dequantized(self, name: str) -> str:
        """Name of a tensor after quantization, for a node that is to run in int8."""
        if name not in self.steps:
            self._store(name, name, self.found[name])
        target = f"{name}_{len(self.nodes)}_dequantized"
        self.nodes.append(self.onnx.helper.make_node("DequantizeLinear", self._stored(name), [target]))
        return target

    def _float(self, name: str) -> str:
        """Name of a tensor for a node that runs in float."""
        if not name or name in self.constants or name in self.floating:
            return name
        return self._dequantized(name)

    def _weight(
        self, name: str, whole: NDArray[np.generic], steps: NDArray[np.float32], *, axis: int,
        node: "NodeProto | None" = None,
    ) -> str:  # fmt: skip
        """Constants that are stored as integers, one step for each entry of `axis`."""
        target = f"{name}_weight_dequantized"
        names = [f"{name}_whole", f"{name}_steps"]
        self.values |= {names[0]: whole, names[1]: steps.astype(np.float32)}
        if node is not None and node.op_type != "Conv":
            # onnxruntime runs a matrix product in int8 only if its inputs state their zero points.
            names.append(f"{name}_zeros")
            self.values[names[2]] = np.zeros(len(steps), np.int8)
        self.nodes.append(self.onnx.helper.make_node("DequantizeLinear", names, [target], axis=axis))
        return target

    def _write(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], like: "NodeProto") -> None:
        node = self.onnx.NodeProto()
        node.CopyFrom(like)
        node.input[:], node.output[:] = inputs, outputs
        self.nodes.append(node)

    def _run(
        self, node: "NodeProto", values: Mapping[str, NDArray[np.float32]],
        constants: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> list[NDArray[np.float32]]:  # fmt: skip
        """Outputs of one node."""
        helper, runtime = self.onnx.helper, library("onnxruntime")
        known = {**self.constants, **(constants or {})}
        given = {name: values[name] for name in node.input if name and name not in known}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
            for name, value in given.items()
        ]
        weights = [self.onnx.numpy_helper.from_array(known[name], name) for name in set(node.input) & known.keys()]
        outputs = [self.onnx.ValueInfoProto(name=name) for name in node.output]
        graph = helper.make_graph([node], "node", inputs, outputs, weights)
        single = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        session = runtime.InferenceSession(single.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results: list[NDArray[np.float32]] = session.run(None, given)
        return results


def _step(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Step and zero point of uint8 for a range, which is made to include 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32(max((high - low) / 255, 1e-12))
    return step, np.uint8(np.clip(round(-low / float(step)), 0, 255))


def _rounded(value: NDArray[np.float32], step: tuple[np.float32, np.uint8]) -> NDArray[np.float32]:
    """The values after a round trip through uint8."""
    size, zero = step[0], np.float32(step[1])
    result: NDArray[np.float32] = (np.clip(np.rint(value / size) + zero, 0, 255) - zero) * size
    return result


def _attribute(node: "NodeProto", name: str) -> int:
    return next((each.i for each in node.attribute if each.name == name), 0)


def _ints(node: "NodeProto", name: str, default: list[int]) -> list[int]:
    return next((list(each.ints) for each in node.attribute if each.name == name), default)


def _samples(value: NDArray[np.float32], node: "NodeProto", weight: Tensor, groups: int) -> Tensor:
    """Inputs `(g, k, n)` of a product at evenly spaced positions."""
    inputs = weight[0].numel()
    limit = max(1, min(MAX_SAMPLES, MAX_VALUES // (groups * inputs)))
    if node.op_type != "Conv":
        rows = torch.from_numpy(value).reshape(-1, inputs)
        return rows[:: -(-len(rows) // limit)].T[None]
    height, width = weight.shape[2:]
    top, left, bottom, right = _ints(node, "pads", [0] * 4)
    columns: list[Tensor] = []
    dilations, strides = (tuple(_ints(node, name, [1, 1])) for name in ("dilations", "strides"))
    for image in torch.from_numpy(value):
        padded = F.pad(image[None], (left, right, top, bottom))
        unfolded = F.unfold(padded, (height, width), dilation=dilations, stride=strides)[0]
        stride = -(-unfolded.shape[1] * len(value) // limit)
        columns.append(unfolded[:, len(columns) % stride :: stride] if stride <= unfolded.shape[1] else unfolded[:, :1])
    return torch.cat(columns, dim=1).reshape(groups, inputs, -1)
