"""Teachers room: reads and runs ONNX files. Touches onnx and onnxruntime, both imported only when a file is read.

A graph is a file from outside, so nothing in it is believed: external weights may only lie beside the file, sizes are
bounded, and declared shapes are dropped before a run.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any

import numpy as np
import torch

from kdlib._checks import nearest
from kdlib.adapters.tap import OUTPUT
from kdlib.adapters.tap import Tap as ModuleTap
from kdlib_faces._checks import InputError

__all__ = ["Graph", "find_tensor", "make_session", "read_graph", "run_session"]

MOST_BYTES = 2**31 - 1
"""A protobuf message cannot be longer, and no face network is."""

MOST_VALUES = 2**28
"""Pixels and channels of the largest batch that a graph may ask for: 1 GiB of float32."""

FREE_SIZE = 112
"""The side, in pixels, that a graph of free height and width is tried with: the usual face crop."""

_DTYPES: dict[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 10: np.float16, 11: np.float64}


@dataclass(frozen=True)
class Graph:
    """A parsed file: the onnx model with its weights inside, and what the file says of its one image input.

    `shape` is the declared `(b, c, h, w)`, None where the graph leaves a dimension free; `sha256` covers the file and
    its external weights.
    """

    path: Path
    model: Any
    input_name: str
    shape: tuple[int | None, ...]
    dtype: type[np.generic]
    sha256: str

    def sample_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of an input of `batch` images, free dimensions filled in: 3 channels, `FREE_SIZE` pixels."""
        return (batch, *(known or fill for known, fill in zip(self.shape[1:], (3, FREE_SIZE, FREE_SIZE), strict=True)))

    @property
    def input_size(self) -> int | tuple[int, int] | None:
        """Side of the images in pixels; (h, w) where not square, None where the graph leaves it free."""
        height, width = self.shape[2:]
        if height is None or width is None:
            return None
        return height if height == width else (height, width)

    def outputs(self) -> dict[str, Any]:
        """Every tensor that a node makes, in graph order, with its node."""
        return {name: node for node in self.model.graph.node for name in node.output if name}


def _library(name: str) -> ModuleType:
    """Import onnx or onnxruntime, or say which extra brings it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"reading an ONNX file needs {name}; pip install kdlib-torch[onnx]") from error


def _reason(error: Exception) -> str:
    """First line of a library's error, short enough for one line of ours."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def _read(path: Path, what: str) -> bytes:
    """The bytes of a plain file of bounded size."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{what} {path} must be a file")
        if info.st_size > MOST_BYTES:
            raise InputError(f"{what} {path} must be at most {MOST_BYTES} bytes, got {info.st_size}")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what} {path} cannot be read: {_reason(error)}") from error


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto below a model, whatever holds it: initializers, attributes, subgraphs, functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        children = [value] if hasattr(value, "ListFields") else value
        for child in children:
            if field.message_type.name == "TensorProto":
                yield child
            elif hasattr(child, "ListFields"):
                yield from _tensors(child)


def _external_file(path: Path, location: str) -> Path:
    """Where external weights lie: in the graph's own folder, links followed, and nowhere else."""
    parts = (*PurePosixPath(location).parts, *PureWindowsPath(location).parts)
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if not location or "\0" in location or absolute or ".." in parts:
        raise InputError(f"{path} keeps weights in {location!r}; they must lie in the folder of the graph")
    target = (path.parent / location).resolve()
    # A download cache links the graph and its weights alike into one store: that store is the graph's folder too.
    if not any(target.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent)):
        raise InputError(f"{path} keeps weights in {location!r}, a link out of the folder of the graph")
    return target


def _load_external(path: Path, model: Any, digest: "hashlib._Hash") -> None:
    """Bring external weights into the model, checking where they lie and that they are there in full."""
    files: dict[str, bytes] = {}
    total = 0
    for tensor in _tensors(model):
        if tensor.data_location != 1:  # TensorProto.EXTERNAL
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        target = _external_file(path, location)
        if location not in files:
            files[location] = _read(target, "the weight file")
            digest.update(hashlib.sha256(files[location]).digest())
        data = files[location]
        offset, length = entry.get("offset", "0"), entry.get("length", "")
        if not (offset.isdecimal() and (length.isdecimal() or not length)):
            raise InputError(f"{path}: weights {tensor.name!r} have a broken offset or length")
        start = int(offset)
        stop = start + int(length) if length else len(data)
        if not start <= stop <= len(data):
            raise InputError(f"{path}: weights {tensor.name!r} reach beyond the {len(data)} bytes of {location!r}")
        total += stop - start
        if total > MOST_BYTES:
            raise InputError(f"{path}: its external weights must be at most {MOST_BYTES} bytes together")
        tensor.raw_data = data[start:stop]
        del tensor.external_data[:]
        tensor.data_location = 0  # TensorProto.DEFAULT


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Parse an ONNX file and find its image input.

    Args:
        path: an `.onnx` file; external weights must lie in its folder.

    Returns:
        The graph, weights inside.

    Raises:
        InputError: the file is missing, too large, not ONNX or cut short, keeps weights outside its folder, or has no
            single image input `(b, c, h, w)`.

    Examples:
        >>> read_graph("no_such.onnx")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: the ONNX file no_such.onnx does not exist
    """
    path = Path(path)
    data = _read(path, "the ONNX file")
    onnx = _library("onnx")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise InputError(f"{path} is not an ONNX file, or is cut short: {_reason(error)}") from error
    if not (model.ir_version and model.graph.node and model.opset_import):
        raise InputError(f"{path} is not an ONNX file: it holds no graph")
    digest = hashlib.sha256(data)
    _load_external(path, model, digest)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise InputError(f"{path} must have one input, the images (b, c, h, w); it has {names}")
    kind = inputs[0].type.tensor_type
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
    if len(shape) != 4 or kind.elem_type not in _DTYPES:
        shown = ", ".join(str(dim or "free") for dim in shape)
        kinds = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
        raise InputError(
            f"{path} has no image input: {inputs[0].name!r} must be (b, c, h, w) of floats or bytes, got ({shown}) of "
            f"type {kinds.get(kind.elem_type, 'unknown')}"
        )
    graph = Graph(path, model, inputs[0].name, shape, _DTYPES[kind.elem_type], digest.hexdigest())
    if prod(graph.sample_shape(shape[0] or 2)) > MOST_VALUES:
        raise InputError(f"{path} must take at most {MOST_VALUES} values a run, {inputs[0].name!r} is {shape}")
    return graph


def find_tensor(graph: Graph, name: str, wanted: object) -> str:
    """The tensor that tap `name` means.

    Args:
        graph: from `read_graph`.
        name: the feature's name, for the error.
        wanted: a tensor's name, a node's name (its first output), None or `kdlib.OUTPUT` for the graph's first output,
            or `kdlib.OUTPUT[i]` and `kdlib.OUTPUT["name"]` for another.

    Raises:
        InputError: no node makes such a tensor; the message names the nearest.
    """
    found = wanted
    outputs = [value.name for value in graph.model.graph.output]
    if wanted is None or wanted == OUTPUT:
        found = outputs[0] if outputs else None
    elif isinstance(wanted, ModuleTap) and wanted.path is None and len(wanted.index) == 1:
        key = wanted.index[0]
        found = key if isinstance(key, str) else dict(enumerate(outputs)).get(key)
    tensors = graph.outputs()
    nodes = {node.name: node.output[0] for node in graph.model.graph.node if node.name and any(node.output[:1])}
    if isinstance(found, str) and (found in tensors or found in nodes):
        return found if found in tensors else nodes[found]
    known = nearest(str(found), dict.fromkeys([*tensors, *nodes]))
    raise InputError(f"OnnxTeacher: tap {name!r}: no tensor or node named {wanted!r} in {graph.path}{known}")


def make_session(
    graph: Graph, tensors: Sequence[str], *, threads: int | None = None, providers: Sequence[Any] | None = None
) -> Any:
    """An onnxruntime session that gives `tensors` and computes nothing that they do not need.

    Args:
        graph: from `read_graph`.
        tensors: names of tensors that nodes make, without repetition.
        threads: threads within an operation; None: as many as torch uses.
        providers: onnxruntime execution providers, best first, each a name or a pair of name and options, such as
            `("CUDAExecutionProvider", {"device_id": 1})`; None: the CPU.

    Raises:
        InputError: an unknown provider, or a graph that onnxruntime refuses.
    """
    onnx, runtime = _library("onnx"), _library("onnxruntime")
    if isinstance(providers, str) or (providers is not None and not len(providers)):
        raise InputError(f"providers must be a list of execution providers, got {providers!r}")
    wanted = list(providers) if providers is not None else ["CPUExecutionProvider"]
    known = runtime.get_available_providers()
    for provider in wanted:
        pair = isinstance(provider, tuple) and len(provider) == 2 and isinstance(provider[1], dict)
        name = provider[0] if pair else provider
        if not isinstance(name, str):
            raise InputError(f"an execution provider must be a name, or a pair of name and options, got {provider!r}")
        if name not in known:
            raise InputError(f"no execution provider {name!r} in this onnxruntime; there are {', '.join(known)}")
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    # Declared shapes are often those of the one image that a graph was exported with: the runtime infers its own.
    del model.graph.value_info[:]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # Threads that wait busily gain up to a third on idle cores and lose as much beside data loaders and the student.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return runtime.InferenceSession(model.SerializeToString(), options, providers=wanted, enable_fallback=0)
    except Exception as error:
        raise InputError(f"{graph.path} cannot be run: {_reason(error)}") from error


def run_session(graph: Graph, session: Any, images: np.ndarray) -> list[np.ndarray]:
    """Run `images` (b, c, h, w) and return the session's tensors in the order they were asked for.

    Raises:
        InputError: the run fails, or an output is not an array.
    """
    try:
        arrays: list[np.ndarray] = session.run(None, {graph.input_name: images})
    except Exception as error:
        raise InputError(f"{graph.path} fails on images {images.shape}: {_reason(error)}") from error
    if not all(isinstance(array, np.ndarray) for array in arrays):
        raise InputError(f"{graph.path} gives something other than arrays")
    return arrays
