"""The images that an ONNX graph takes, recognized from its first operations, and the identity of a preprocessing function."""

import re
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdlib_faces.backbones import InputSpec
from kdlib_faces.teachers.onnx.constants import read_constants
from kdlib_faces.teachers.onnx.graph import Graph, library
from kdlib_faces.teachers.onnx.metadata import stated_input

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["callable_id", "recognize_input"]

_PASSING = {"Cast", "Clip", "DequantizeLinear", "Dropout", "Identity", "Pad", "QuantizeLinear", "Resize", "Upsample"}


def recognize_input(graph: Graph) -> InputSpec:
    """Return the pixel range, and where it shows the channel order, of the images that a graph takes.

    The first operations are followed as long as they add, subtract, multiply, divide or normalize by constants. Together they
    are `x -> scale x + shift` for each channel. Preprocessing centers the images, so its zero lies within the range of the
    pixels: near the middle of 0..255 or of 0..1. A graph that divides by more than 50 takes 0..255 too. All others, above all
    those that begin with a convolution, take `(pixel - 127.5) / 127.5`, the convention of face recognition.

    Faces are more red than blue, so means that rise from the first channel to the last are those of BGR images. Otherwise the
    channels are taken for RGB.

    A graph of `kdlib_faces.export` states its images in its metadata, which are then taken.

    Args:
        graph: From `read_graph`.

    Returns:
        The format of the images, of the declared size.

    Raises:
        InputError: The metadata are malformed.
    """
    if (stated := stated_input(graph.model)) is not None:
        return stated
    scale, shift = _first_affine(graph)
    size = 112 if graph.input_size is None else graph.input_size
    zeros = -shift / np.where(scale == 0, 1, scale)
    zero, gain = float(zeros.mean()), float(np.abs(scale).mean())
    color: Literal["rgb", "bgr"] = "bgr" if zeros[-1] > 1.03 * zeros[0] and zero > 0.2 else "rgb"
    if graph.dtype is np.uint8 or zero > 2 or gain < 1 / 50:
        return InputSpec(size=size, color=color, mean=0.0, scale=1.0)
    if 0.2 < zero < 0.8:
        return InputSpec(size=size, color=color, mean=0.0, scale=255.0)
    return InputSpec(size=size)


def _first_affine(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift (c,) of the operations before the first one that is not affine, for each channel of the input."""
    values = read_constants(graph)
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.model.graph.node:
        for name in node.input if node.op_type != "Shape" else ():
            readers.setdefault(name, []).append(node)
    channels = graph.sample_shape(1)[1]
    scale, shift = np.ones(channels), np.zeros(channels)
    place = np.arange(channels)  # of each channel of the input
    axis, tensor = 1 if graph.layout == "bchw" else 3, graph.input_name
    for _ in range(32):
        node = readers[tensor][0] if len(readers.get(tensor, ())) == 1 else None
        if node is None or not node.output:
            break
        attributes = {each.name: library("onnx").helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type == "Transpose" and axis in attributes.get("perm", ()):
            axis = attributes["perm"].index(axis)
        elif node.op_type in ("Gather", "Slice"):
            places = _reordered(node, attributes, values, axis, channels)
            if places is None:
                break
            place = places[place]
        elif node.op_type not in _PASSING:
            step = _affine(node, attributes, values, tensor, axis, channels)
            if step is None:
                break
            gain, offset = step[0][place], step[1][place]
            scale, shift = scale * gain, shift * gain + offset
        tensor = node.output[0]
    return scale, shift


def _affine(
    node: "NodeProto",
    attributes: Mapping[str, float],
    values: Mapping[str, np.ndarray],
    x: str,
    axis: int,
    channels: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Factor and summand of each channel; None for an operation that is not of this kind."""
    kind, one, zero = node.op_type, np.ones(channels), np.zeros(channels)
    if kind == "BatchNormalization" and axis == 1 and len(node.input) == 5:
        parts = [_per_channel(values.get(name), 3, channels) for name in node.input[1:]]
        weight, bias, mean, var = (zero if each is None else each for each in parts)
        gain = weight / np.sqrt(np.maximum(var, 0) + attributes.get("epsilon", 1e-5))
        return None if any(each is None for each in parts) else (gain, bias - mean * gain)
    if kind not in ("Add", "Sub", "Mul", "Div") or len(node.input) != 2:
        return None
    first = node.input[0] == x
    value = _per_channel(values.get(node.input[1 if first else 0]), axis, channels)
    if value is None or (kind == "Div" and not (first and value.all())):
        return None
    if kind in ("Mul", "Div"):
        return (value if kind == "Mul" else 1 / value), zero
    if kind == "Add":
        return one, value
    return (one, -value) if first else (-one, value)


def _per_channel(value: np.ndarray | None, axis: int, channels: int) -> np.ndarray | None:
    """A constant as one number for each channel, which lie along `axis` of four dimensions; None for any other."""
    if value is None or value.dtype.kind not in "fiu" or value.size not in (1, channels):
        return None
    along = value.ndim - 4 + axis
    if value.size > 1 and not (0 <= along < value.ndim and value.shape[along] == channels):
        return None
    return np.broadcast_to(value.reshape(-1).astype(np.float64), (channels,))


def _reordered(
    node: "NodeProto", attributes: Mapping[str, int], values: Mapping[str, np.ndarray], axis: int, channels: int
) -> np.ndarray | None:
    """The new place of each channel where a node reverses or reorders them; None where it does something else."""
    given = [values.get(name) for name in node.input[1:]]
    if any(each is None for each in given):
        return None
    lists = [each.reshape(-1).tolist() for each in given if each is not None]
    if node.op_type == "Gather":
        return (
            np.argsort(lists[0])
            if attributes.get("axis", 0) % 4 == axis and sorted(lists[0]) == list(range(channels))
            else None
        )
    return (
        np.arange(channels)[::-1]
        if [[at % 4 for at in each] for each in lists[2:3]] == [[axis]] and lists[3:] == [[-1]]
        else None
    )


def callable_id(function: object) -> str:
    """A text that changes with a preprocessing function, the same in every process: its name and code, or its repr."""
    if isinstance(function, MethodType):
        function = function.__func__
    if isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        state = repr((_code_id(function.__code__), function.__defaults__, cells))
        return f"{function.__module__}.{function.__code__.co_qualname} {_without_addresses(state)}"
    return _without_addresses(repr(function))


def _code_id(code: CodeType) -> tuple[object, ...]:
    constants = [_code_id(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return code.co_code.hex(), code.co_names, constants


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
