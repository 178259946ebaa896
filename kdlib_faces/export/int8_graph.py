"""Int8 and float16 versions of exported graphs."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

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
from kdlib_faces.export._int8_writer import write_int8
from kdlib_faces.export._prelu import join_prelu, split_prelu
from kdlib_faces.export.float_graph import Check, compact, keep, run_graph
from kdlib_faces.teachers.onnx.graph import file_errors, library, read_graph
from kdlib_faces.teachers.onnx.metadata import read_metadata, write_metadata
from kdlib_faces.teachers.onnx.preprocessing import recognize_input

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["convert_float16", "quantize_onnx"]

BATCH = 16
MAX_IMAGES = 512
PARTS = 8
"""Parts of the graph whose sensitivity is measured."""
WANTED_COSINE = 0.995
"""Below it, the first layers stay float."""
FIRST_WEIGHTS = 0.015
"""Part of the weights in these layers. They have the largest maps and few weights: their errors pass through all others."""
MAX_TUNING = 64
"""Images on which the weights are rounded and the biases corrected."""
MAX_MAP_VALUES = 2**26
"""Values of one map for all of these images."""
MIN_OPSET = 13
QUANTIZED = ("Conv", "Gemm", "MatMul")


def quantize_onnx(
    path: str | os.PathLike[str],
    images: Tensor | NDArray[np.uint8],
    output: str | os.PathLike[str],
    *,
    min_cosine: float = 0.97,
    check: Check | None = None,
) -> Path:
    """Write an int8 version of a float32 ONNX graph: weights by channel, activations by ranges measured on face crops.

    The channels of feature maps are scaled to equal ranges first, which changes no output. Convolutions, sums and matrix
    products are then quantized in their order (QDQ form): weights are rounded so that the errors of an output cancel on the
    images, and biases are moved by the mean error. Convolutions with several channels in each group stay float, since
    onnxruntime runs them slowly in int8.

    The result is compared on images that were not used before. If the mean cosine of the embeddings is below 0.995, the first
    layers stay float, with at most 1.5 % of the weights. If it is still below `min_cosine`, the most sensitive parts of the
    graph stay float as well, at most half of it.

    The file requires onnxruntime 1.24 where the graph has PReLU: earlier versions have no maximum of uint8 tensors.

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

    References:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019 (ranges and biases);
        Frantar et al., "GPTQ", ICLR 2023 (rounding).
    """
    check_number("quantize_onnx", "min_cosine", min_cosine, min=-1, max=1)
    onnx = library("onnx")
    graph = read_graph(path)
    crops = _as_taken(images, recognize_input(graph))
    held_out = max(4, len(crops) // 4)
    calibration, validation = crops[held_out:], crops[:held_out]
    model: ModelProto = graph.model
    if (opset := _opset(model)) < MIN_OPSET:
        raise InputError(f"quantize_onnx: {path} must have opset {MIN_OPSET} or later, got {opset}; export it again")
    with file_errors(Path(path)):
        best = _best_trial(model, calibration, validation, min_cosine)
    if best.cosine < min_cosine:
        raise InputError(
            f"quantize_onnx: embeddings of the int8 graph must have a mean cosine of at least {min_cosine:g} to those of {path}, "
            f"got {best.cosine:.4f}; give more images that are like those of the application"
        )
    entry = read_metadata(best.model) | {
        "precision": "int8", "calibration_images": len(calibration), "cosine": round(best.cosine, 5),
        "float_nodes": best.float_products,
    }  # fmt: skip
    write_metadata(best.model, entry)
    _shorten(best.model)
    onnx.checker.check_model(best.model)
    return keep("quantize_onnx", output, best.model.SerializeToString(), check)


@dataclass(frozen=True)
class _Trial:
    """An int8 graph, the nodes that stayed float by their first outputs, and the cosine of its embeddings."""

    model: "ModelProto"
    floats: set[str]
    float_products: int
    cosine: float


def _best_trial(model: "ModelProto", calibration: Tensor, validation: Tensor, min_cosine: float) -> _Trial:
    """Quantize with as few float nodes as the cosines on the validation images require; changes `model`."""
    _prepare(model)
    names = _feature_tensors(model)
    found, _ = _ranges(model, names, calibration)
    equalize(model, {name: np.maximum(-low, high) for name, (low, high) in found.items() if low.ndim})
    found, largest = _ranges(model, names, calibration)
    ranges = {name: (float(low.min()), float(high.max())) for name, (low, high) in found.items()}
    count = max(4, min(MAX_TUNING, MAX_MAP_VALUES // largest))
    tuning = calibration[:: -(-len(calibration) // count)].numpy()
    wanted = torch.from_numpy(run_graph(model.SerializeToString(), validation))

    def trial(floats: set[str], tuning: NDArray[np.float32]) -> _Trial:
        written, number = write_int8(model, ranges, tuning, floats)
        split_prelu(written)
        compact(written)
        return _Trial(written, floats, number, _similarity(written, validation, wanted))

    best = trial(_grouped(model), tuning)
    if best.cosine < WANTED_COSINE:
        best = max(best, trial(best.floats | _first_layers(model), tuning), key=lambda each: each.cosine)
    if best.cosine < min_cosine:
        # A few images suffice to order the parts.
        trials = [(trial(best.floats | part, tuning[:BATCH]).cosine, part) for part in _parts(model)]
        for _, part in sorted(trials, key=lambda pair: -pair[0])[: PARTS // 2]:
            best = trial(best.floats | part, tuning)
            if best.cosine >= min_cosine:
                break
    return best


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
) -> tuple[dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]], int]:
    """Smallest and largest value of each channel of feature maps `(c,)`; of other tensors as arrays without dimensions.

    Also returns the largest number of values of one tensor for one image.
    """
    onnx, runtime = library("onnx"), library("onnxruntime")
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[1:])
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    largest = 1
    for batch in torch.split(images, BATCH):
        arrays = [batch.numpy(), *session.run(None, {names[0]: batch.numpy()})]
        for name, array in zip(names, arrays, strict=True):
            if array.dtype != np.float32:
                continue
            largest = max(largest, array.size // len(batch))
            axes = (0, 2, 3) if array.ndim == 4 else None
            low, high = np.asarray(array.min(axes)), np.asarray(array.max(axes))
            if name in found:
                low, high = np.minimum(low, found[name][0]), np.maximum(high, found[name][1])
            found[name] = low, high
    return found, largest


def _opset(model: "ModelProto") -> int:
    return next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)


def _prepare(model: "ModelProto") -> None:
    """Write PReLU as one node where possible, and constants as initializers."""
    numpy_helper = library("onnx").numpy_helper
    nodes = list(model.graph.node)
    constants = [node for node in nodes if node.op_type == "Constant" and node.attribute[0].name == "value"]
    for node in constants:
        model.graph.initializer.append(
            numpy_helper.from_array(numpy_helper.to_array(node.attribute[0].t), node.output[0])
        )
        model.graph.node.remove(node)
    split_prelu(model)
    join_prelu(model)


def _shorten(model: "ModelProto") -> None:
    """Replace the long names of the nodes, constants and inner tensors, which make a small file large."""
    graph = model.graph
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
    """Outputs of convolutions with several channels in each group, and of the activation behind them.

    onnxruntime quantizes the weights of a float convolution again if the nodes before and behind it are int8, so the
    activation has to be float as well.
    """
    shapes = {each.name: tuple(each.dims) for each in model.graph.initializer}
    floats: set[str] = set()
    for node in model.graph.node:
        grouped = node.op_type == "Conv" and group_of(node) > 1 and shapes.get(node.input[1], (0, 1))[1] > 1
        if grouped or (node.op_type in ("Relu", "PRelu", "Clip") and node.input[0] in floats):
            floats.add(node.output[0])
    return floats


def _first_layers(model: "ModelProto") -> set[str]:
    """First outputs of the nodes before the layer with which the weights exceed `FIRST_WEIGHTS`."""
    sizes = {each.name: prod(each.dims) for each in model.graph.initializer}
    weights = [
        sizes.get(node.input[1], 0) if node.op_type in QUANTIZED and len(node.input) > 1 else 0
        for node in model.graph.node
    ]
    within = np.cumsum(weights) <= FIRST_WEIGHTS * sum(weights)
    return {node.output[0] for node, inside in zip(model.graph.node, within, strict=True) if inside}


def _parts(model: "ModelProto") -> list[set[str]]:
    """First outputs of the nodes of consecutive parts of the graph."""
    names = [node.output[0] for node in model.graph.node]
    return [set(map(str, part)) for part in np.array_split(np.array(names), min(PARTS, len(names))) if len(part)]
