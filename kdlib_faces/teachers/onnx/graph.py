"""Safe reading of ONNX files, and sessions that run them."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch

from kdlib import OUTPUT, Tap
from kdlib._checks import nearest
from kdlib_faces._checks import InputError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__ = [
    "Graph",
    "ImageSize",
    "OnnxTap",
    "Provider",
    "Session",
    "find_tensor",
    "library",
    "make_session",
    "read_graph",
]

ImageSize: TypeAlias = int | tuple[int, int]
"""Side of square images in pixels, or (height, width)."""

OnnxTap: TypeAlias = str | Tap | None
"""Name of a tensor or node; None, `kdlib.OUTPUT`, `OUTPUT[i]` or `OUTPUT["name"]` for an output of the graph."""

Provider: TypeAlias = str | tuple[str, Mapping[str, object]]
"""Name of an onnxruntime execution provider, or a pair of name and options."""

MAX_BYTES = 2**31 - 1
"""Maximum size of a protobuf message."""

MAX_VALUES = 2**28
"""Maximum number of values in the input of one run: 1 GiB of float32."""

FREE_SIZE = 112
"""Side in pixels of the sample images of a graph with free height and width: the usual face crop."""

_DTYPES: dict[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 10: np.float16, 11: np.float64}


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used."""

    def run(self, outputs: None, inputs: Mapping[str, np.ndarray], /) -> list[object]: ...


@dataclass(frozen=True)
class Graph:
    """A parsed ONNX file with its weights, and what it declares about its image input.

    Attributes:
        path: The file.
        model: The parsed model.
        input_name: Name of the image input.
        shape: Declared shape `(b, c, h, w)`; None where a dimension is free.
        dtype: Type of the input.
        sha256: Digest of the file and its external weights.
    """

    path: Path
    model: "ModelProto"
    input_name: str
    shape: tuple[int | None, ...]
    dtype: type[np.generic]
    sha256: str

    def sample_shape(self, batch: int) -> tuple[int, ...]:
        """Shape of an input of `batch` images, with 3 channels and `FREE_SIZE` pixels for free dimensions."""
        return (batch, *(known or fill for known, fill in zip(self.shape[1:], (3, FREE_SIZE, FREE_SIZE), strict=True)))

    @property
    def input_size(self) -> ImageSize | None:
        """Side of the images in pixels; (h, w) where not square, None where free."""
        height, width = self.shape[2:]
        if height is None or width is None:
            return None
        return height if height == width else (height, width)

    def outputs(self) -> dict[str, "NodeProto"]:
        """Every tensor that a node computes, in graph order, with its node."""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    def run(self, session: Session, images: np.ndarray) -> list[np.ndarray]:
        """Run `images` (b, c, h, w) and return the tensors of the session.

        Raises:
            InputError: The run fails, or an output is not an array.
        """
        try:
            arrays = session.run(None, {self.input_name: images})
        except Exception as error:
            raise InputError(f"{self.path} fails on images {images.shape}: {_reason(error)}") from error
        checked = [array for array in arrays if isinstance(array, np.ndarray)]
        if len(checked) < len(arrays):
            raise InputError(f"{self.path} returns something other than arrays")
        return checked


def library(name: str) -> Any:
    """Import onnx or onnxruntime.

    Raises:
        InputError: It is not installed; the message names the extra to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"reading an ONNX file needs {name}; pip install kdlib-torch[onnx]") from error


def _reason(error: Exception) -> str:
    """First line of a library's error, at most 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _read(path: Path, label: str) -> bytes:
    """The bytes of a regular file of bounded size."""
    if not path.is_file():
        raise InputError(f"{label} {path} {'must be a file' if path.exists() else 'does not exist'}")
    try:
        size = path.stat().st_size
        if size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{label} {path} cannot be read: {_reason(error)}") from error
    raise InputError(f"{label} {path} must be at most {MAX_BYTES} bytes, got {size}")


def _tensors(message: Any) -> Iterator["TensorProto"]:
    """Every tensor of a model: initializers, attributes, subgraphs, functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.name == "TensorProto":
                yield child
            elif hasattr(child, "ListFields"):
                yield from _tensors(child)


def _external_file(path: Path, location: str) -> Path:
    """The file of external weights, which must lie in the folder of the graph, links resolved."""
    # Download caches link the graph and its weights into one store, which then counts as the folder of the graph.
    folders = (path.parent.resolve(), path.resolve().parent)
    target = (path.parent / location.split("\0")[0]).resolve()
    if "\0" in location or not any(folder in target.parents for folder in folders):
        raise InputError(f"{path} keeps weights in {location!r}; they must lie in the folder of the graph")
    return target


def _load_external(path: Path, model: "ModelProto", digest: "hashlib._Hash") -> None:
    """Read external weights into the model; check their folder and their size."""
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
        try:
            start = int(entry.get("offset", 0))
            stop = start + int(entry.get("length") or len(data) - start)
        except ValueError:
            raise InputError(f"{path}: weights {tensor.name!r} have a broken offset or length") from None
        if not 0 <= start <= stop <= len(data):
            raise InputError(f"{path}: weights {tensor.name!r} reach beyond the {len(data)} bytes of {location!r}")
        total += stop - start
        if total > MAX_BYTES:
            raise InputError(f"{path}: its external weights must be at most {MAX_BYTES} bytes together")
        tensor.raw_data = data[start:stop]
        del tensor.external_data[:]
        tensor.data_location = 0  # type: ignore[assignment]  # TensorProto.DEFAULT


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Parse an ONNX file and find its image input.

    The file is not trusted: its size is bounded, and external weights must lie in its folder.

    Args:
        path: The `.onnx` file.

    Returns:
        The graph with its weights.

    Raises:
        InputError: The file is missing, too large, not ONNX or cut short, keeps weights outside its folder, or does not have
            exactly one input, images `(b, c, h, w)`.

    Examples:
        >>> read_graph("no_such.onnx")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: the ONNX file no_such.onnx does not exist
    """
    path = Path(path)
    data = _read(path, "the ONNX file")
    onnx = library("onnx")
    model: ModelProto = onnx.ModelProto()
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
        raise InputError(f"{path} must have one input, the images (b, c, h, w), got {names}")
    kind = inputs[0].type.tensor_type
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
    if len(shape) != 4 or kind.elem_type not in _DTYPES:
        kinds = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
        raise InputError(
            f"{path} has no image input: {inputs[0].name!r} must be (b, c, h, w) of floats or bytes, got "
            f"({', '.join(str(dim or 'free') for dim in shape)}) of type {kinds.get(kind.elem_type, 'unknown')}"
        )
    graph = Graph(path, model, inputs[0].name, shape, _DTYPES[kind.elem_type], digest.hexdigest())
    if prod(graph.sample_shape(shape[0] or 2)) > MAX_VALUES:
        raise InputError(f"{path} must take at most {MAX_VALUES} values a run, {inputs[0].name!r} is {shape}")
    return graph


def find_tensor(graph: Graph, name: str, tap: OnnxTap) -> str:
    """Return the name of the tensor that a tap refers to.

    Args:
        graph: From `read_graph`.
        name: Name of the feature, for the error.
        tap: The tap. The name of a node refers to its first output; None and `OUTPUT` refer to the first output of the graph.

    Raises:
        InputError: No node computes such a tensor; the message lists the nearest names.
    """
    outputs = [value.name for value in graph.model.graph.output]
    if tap is None or tap == OUTPUT:
        tensor = outputs[0] if outputs else None
    elif isinstance(tap, Tap):
        keys = tap.index if tap.path is None and len(tap.index) == 1 else ()
        tensor = next((key if isinstance(key, str) else dict(enumerate(outputs)).get(key) for key in keys), None)
    else:
        tensor = tap
    tensors = graph.outputs()
    nodes = {node.name: node.output[0] for node in graph.model.graph.node if node.name and any(node.output[:1])}
    if isinstance(tensor, str) and (tensor in tensors or tensor in nodes):
        return tensor if tensor in tensors else nodes[tensor]
    known = nearest(str(tensor), dict.fromkeys([*tensors, *nodes]))
    raise InputError(f"OnnxTeacher: tap {name!r}: no tensor or node named {tap!r} in {graph.path}{known}")


def make_session(
    graph: Graph, tensors: Sequence[str], *, threads: int | None = None, providers: Sequence[Provider] | None = None
) -> Session:
    """Make an onnxruntime session that computes `tensors` only.

    Args:
        graph: From `read_graph`.
        tensors: Distinct names of tensors that nodes compute.
        threads: Threads within an operation; None takes as many as torch uses.
        providers: Execution providers in order of preference; None runs on the CPU.

    Raises:
        InputError: A provider is unknown, or onnxruntime refuses the graph.
    """
    onnx, runtime = library("onnx"), library("onnxruntime")
    if isinstance(providers, str) or (providers is not None and not len(providers)):
        raise InputError(f"providers must be a list of execution providers, got {providers!r}")
    chosen: list[Provider] = ["CPUExecutionProvider"] if providers is None else list(providers)
    available = runtime.get_available_providers()
    for provider in chosen:
        pair = isinstance(provider, tuple) and len(provider) == 2 and isinstance(provider[1], dict)
        name = provider[0] if pair else provider
        if not isinstance(name, str):
            raise InputError(f"an execution provider must be a name, or a pair of name and options, got {provider!r}")
        if name not in available:
            raise InputError(f"no execution provider {name!r} in this onnxruntime; there are {', '.join(available)}")
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    # Declared shapes are often those of the one image that a graph was exported with; the runtime infers its own.
    del model.graph.value_info[:]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    # Spinning threads are up to a third faster on idle cores and as much slower beside data loaders and the student.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session: Session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=chosen, enable_fallback=0
        )
    except Exception as error:
        raise InputError(f"{graph.path} cannot be run: {_reason(error)}") from error
    return session
