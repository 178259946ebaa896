"""Int8 and float16 versions of exported graphs."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import InputSpec
from kdlib_faces.data.images import to_float
from kdlib_faces.export._equalize import equalize, group_of
from kdlib_faces.export.float_graph import Check, compact, keep, run_graph
from kdlib_faces.teachers.onnx.graph import file_errors, library, read_graph
from kdlib_faces.teachers.onnx.metadata import read_metadata, write_metadata
from kdlib_faces.teachers.onnx.preprocessing import recognize_input

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["convert_float16", "quantize_onnx"]

Arrays: TypeAlias = dict[str, NDArray[np.float32]]

BATCH = 16
MAX_IMAGES = 512
PARTS = 8
"""Parts of the graph whose sensitivity is measured."""
QUANTIZED = ("Conv", "Gemm", "MatMul")
FOLLOWING = {"Conv", "Relu", "PRelu", "Add"}


def quantize_onnx(
    path: str | os.PathLike[str],
    images: Tensor | NDArray[np.uint8],
    output: str | os.PathLike[str],
    *,
    min_cosine: float = 0.97,
    check: Check | None = None,
) -> Path:
    """Write an int8 version of a float32 ONNX graph: weights by channel, activations by ranges measured on face crops.

    The channels of feature maps are scaled to equal ranges first, which changes no output. All convolutions, sums and
    matrix products are then quantized (onnxruntime's QDQ form), except convolutions with several channels in each group,
    which onnxruntime runs slowly in int8. If the embeddings of images that were not used for the ranges are then less
    similar to those of the float graph than `min_cosine`, the most sensitive parts of the graph stay float, at most half of it.

    Args:
        path: The float graph, as `export_onnx` writes it.
        images: Face crops `(n, 3, h, w)`, RGB, uint8, or floating-point in [-1, 1]: at least 8, at most 512 are used. They
            should be like the images on which the model will be used.
        output: The file to write.
        min_cosine: Minimum mean cosine of the embeddings of both graphs.
        check: Called with the file before it is kept.

    Returns:
        The path of the int8 graph.

    Raises:
        InputError: The graph cannot be read or quantized, there are too few images, no version reaches `min_cosine`, or
            `check` refuses the file. An earlier file at `output` is left unchanged.
    """
    check_number("quantize_onnx", "min_cosine", min_cosine, min=-1, max=1)
    onnx = library("onnx")
    graph = read_graph(path)
    crops = _as_taken(images, recognize_input(graph))
    held_out = max(4, len(crops) // 4)
    calibration, validation = crops[held_out:], crops[:held_out]
    model: ModelProto = graph.model
    with file_errors(Path(path)):
        names = _feature_tensors(model)
        equalize(
            model,
            {
                name: np.maximum(-low, high)
                for name, (low, high) in _ranges(model, names, calibration).items()
                if low.ndim
            },
        )
        found = _ranges(model, names, calibration)
        ranges = {name: (float(low.min()), float(high.max())) for name, (low, high) in found.items()}
        wanted = torch.from_numpy(run_graph(model.SerializeToString(), validation))
        floats = _grouped(model)
        best = _quantized(model, ranges, floats)
        cosine = _similarity(best, validation, wanted)
        kept_parts: list[tuple[float, set[str]]] = []
        if cosine < min_cosine:
            trials = [(part, _quantized(model, ranges, floats | part)) for part in _parts(model)]
            kept_parts = sorted(
                ((_similarity(each, validation, wanted), part) for part, each in trials), key=lambda pair: -pair[0]
            )
        for _, part in kept_parts[: PARTS // 2]:
            if cosine >= min_cosine:
                break
            floats = floats | part
            best = _quantized(model, ranges, floats)
            cosine = _similarity(best, validation, wanted)
    if cosine < min_cosine:
        raise InputError(
            f"quantize_onnx: embeddings of the int8 graph must have a mean cosine of at least {min_cosine:g} to those of {path}, "
            f"got {cosine:.4f}; give more images that are like those of the application"
        )
    entry = read_metadata(best) | {
        "precision": "int8", "calibration_images": len(calibration), "cosine": round(cosine, 5),
        "float_nodes": sum(node.op_type in QUANTIZED for node in model.graph.node if node.name in floats),
    }  # fmt: skip
    write_metadata(best, entry)
    onnx.checker.check_model(best)
    return keep("quantize_onnx", output, best.SerializeToString(), check)


def convert_float16(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, check: Check | None = None
) -> Path:
    """Write a float16 version of a float32 ONNX graph; its input and output stay float32.

    Args:
        path: The float graph, as `export_onnx` writes it.
        output: The file to write.
        check: Called with the file before it is kept.

    Returns:
        The path.

    Raises:
        InputError: The graph cannot be read or converted, or `check` refuses the file.
    """
    graph = read_graph(path)
    library("onnxruntime")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with file_errors(Path(path)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values below the smallest of float16, which become 0
        model = convert_float_to_float16(graph.model, keep_io_types=True, disable_shape_infer=False)
        compact(model)
        write_metadata(model, read_metadata(model) | {"precision": "float16"})
    return keep("convert_float16", output, model.SerializeToString(), check)


def _as_taken(images: Tensor | NDArray[np.uint8], spec: InputSpec) -> Tensor:
    given = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images))
    if given.ndim != 4 or given.shape[1] != 3 or len(given) < 8:
        raise InputError(f"quantize_onnx: images must be (n, 3, h, w) with at least 8 images, got {tuple(given.shape)}")
    given = given[:: -(-len(given) // MAX_IMAGES)]
    return spec(given.float() if given.is_floating_point() else to_float(given)).contiguous()


def _feature_tensors(model: "ModelProto") -> list[str]:
    """Names of all tensors that a quantized graph needs ranges of: the input and what nodes compute from it."""
    constants = {each.name for each in model.graph.initializer}
    moving = {model.graph.input[0].name}
    for node in model.graph.node:
        if any(name in moving for name in node.input if name not in constants) and node.op_type != "Shape":
            moving.update(node.output)
    return [model.graph.input[0].name, *(name for node in model.graph.node for name in node.output if name in moving)]


def _ranges(
    model: "ModelProto", names: Sequence[str], images: Tensor
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Smallest and largest value of each channel of feature maps `(c,)`; of other tensors as arrays without dimensions."""
    onnx, runtime = library("onnx"), library("onnxruntime")
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[1:])
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for batch in torch.split(images, BATCH):
        arrays = [batch.numpy(), *session.run(None, {names[0]: batch.numpy()})]
        for name, array in zip(names, arrays, strict=True):
            if array.dtype != np.float32:
                continue
            axes = (0, 2, 3) if array.ndim == 4 else None
            low, high = np.asarray(array.min(axes)), np.asarray(array.max(axes))
            if name in found:
                low, high = np.minimum(low, found[name][0]), np.maximum(high, found[name][1])
            found[name] = low, high
    return found


def _quantized(model: "ModelProto", ranges: Mapping[str, tuple[float, float]], floats: set[str]) -> "ModelProto":
    """The graph with int8 weights and uint8 activations, except for the nodes named in `floats`."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    copied = library("onnx").ModelProto()
    copied.CopyFrom(model)
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()}
    quantizer = QDQQuantizer(
        copied, per_channel=True, reduce_range=False, weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data), nodes_to_quantize=[], nodes_to_exclude=sorted(floats),
        op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Relu", "Reshape", "Flatten"],
        extra_options={"QuantizeBias": True},
    )  # fmt: skip
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: ModelProto = quantizer.model.model
    _shorten(result)
    return result


def _shorten(model: "ModelProto") -> None:
    """Remove what makes a small file large: zero points that are zero, and long names."""
    numpy_helper = library("onnx").numpy_helper
    compact(model)
    graph = model.graph
    zero = {
        each.name
        for each in graph.initializer
        if each.name.endswith("zero_point") and not numpy_helper.to_array(each).any()
    }
    kinds = {each.name: each.data_type for each in graph.initializer}
    # onnxruntime runs a matrix product in int8 only if its inputs state their zero points.
    products = {name for node in graph.node if node.op_type in ("Gemm", "MatMul") for name in node.input}
    for node in graph.node:
        # Without a zero point, the type of the values is that of the input; a quantizing node would choose uint8.
        if (
            node.op_type == "DequantizeLinear"
            and node.input[0] in kinds
            and len(node.input) > 2
            and node.input[2] in zero
            and node.output[0] not in products
        ):
            del node.input[2]
    used = {name for node in graph.node for name in node.input}
    left = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    kept = {each.name for each in (*graph.input, *graph.output)}
    names: dict[str, str] = {"": ""}
    for node in graph.node:
        node.name = ""
        for field in (node.input, node.output):
            for at, name in enumerate(field):
                field[at] = name if name in kept else names.setdefault(name, f"t{len(names)}")
    for each in graph.initializer:
        each.name = names[each.name]


def _similarity(model: "ModelProto", images: Tensor, wanted: Tensor) -> float:
    found = torch.from_numpy(run_graph(model.SerializeToString(), images))
    return float(F.cosine_similarity(found, wanted).mean())


def _grouped(model: "ModelProto") -> set[str]:
    """Names of convolutions with several channels in each group, and of the activation behind them.

    onnxruntime quantizes the weights of a float convolution again if the nodes before and behind it are int8, so the
    activation has to be float as well.
    """
    constants = {each.name: tuple(each.dims) for each in model.graph.initializer}
    floats: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Conv" and group_of(node) > 1 and constants.get(node.input[1], (0, 1))[1] > 1:
            floats |= {node.name, *(each.name for each in _activation(model, node.output[0], constants))}
    return floats


def _activation(model: "ModelProto", tensor: str, constants: Mapping[str, tuple[int, ...]]) -> Iterator["NodeProto"]:
    """Nodes behind a tensor that are its activation: ReLU, PReLU, depthwise 1x1 convolutions and their sum."""
    reached = {tensor}
    for node in model.graph.node:
        data = {name for name in node.input if name not in constants}
        pointwise = node.op_type == "Conv" and constants.get(node.input[1], ())[1:] == (1, 1, 1) and group_of(node) > 1
        if data and data <= reached and (pointwise or node.op_type in ("Relu", "PRelu", "Add")):
            yield node
            reached.update(node.output)


def _parts(model: "ModelProto") -> list[set[str]]:
    """Names of the nodes of consecutive parts of the graph."""
    names = [node.name for node in model.graph.node]
    return [set(map(str, part)) for part in np.array_split(np.array(names), min(PARTS, len(names))) if len(part)]
