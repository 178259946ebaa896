"""Safe reading of ONNX files."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from kdlib_faces._checks import InputError, show_name

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__ = ["Graph", "ImageSize", "Layout", "file_errors", "library", "read_graph", "reason", "show_shape"]

ImageSize: TypeAlias = int | tuple[int, int]
"""Side of square images in pixels, or (height, width)."""

Layout: TypeAlias = Literal["bchw", "bhwc"]
"""Order of the dimensions of an image input."""

MAX_BYTES = 2**31 - 1
"""Maximum size of a protobuf message."""

MAX_VALUES = 2**21
"""Maximum number of values in the input of one run that a file may dictate: 55 images of 112 pixels, or one of 836."""

MAX_TOTAL = 2**28
"""Maximum number of values of all tensors of a graph for one image: 1 GiB of float32."""

FREE_SIZE = 112
"""Side in pixels of the sample images of a graph with free height and width: the usual face crop."""

_DTYPES: dict[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 10: np.float16, 11: np.float64}


@dataclass(frozen=True)
class Graph:
    """A parsed ONNX file with its weights, and what it declares about its image input.

    Attributes:
        path: The file.
        model: The parsed model.
        input_name: Name of the image input.
        shape: Declared shape of the input as `(b, c, h, w)`, whatever its layout; None where a dimension is free. A batch above
            one is free in `model`, because most graphs that declare one accept any.
        layout: Order of the dimensions in the file.
        dtype: Type of the input.
        sha256: Digest of the file and its external weights.
    """

    path: Path
    model: "ModelProto"
    input_name: str
    shape: tuple[int | None, ...]
    layout: Layout
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

    @property
    def declared(self) -> list[int | None]:
        """The shape of the input in the order of the file."""
        return [self.shape[at] for at in ((0, 1, 2, 3) if self.layout == "bchw" else (0, 2, 3, 1))]

    def outputs(self) -> dict[str, "NodeProto"]:
        """Every tensor that a node computes, in graph order, with its node."""
        return {name: node for node in self.model.graph.node for name in node.output if name}


def library(name: str) -> Any:
    """Import onnx or onnxruntime.

    Raises:
        InputError: It is not installed; the message names the extra to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(f"reading an ONNX file needs {name}; pip install kdlib-torch[onnx]") from error


def show_shape(shape: Sequence[int | None]) -> str:
    """A shape in words, as `free, 3, 112, 112`."""
    return ", ".join(str(dim or "free") for dim in shape)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Report whatever a damaged file raises inside the block, such as onnx's own KeyError, as one line that names the file."""
    try:
        yield
    except (InputError, Warning):
        raise
    except Exception as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {reason(error)})") from error


def reason(error: Exception) -> str:
    """First line of a library's error, printable and at most 300 characters."""
    return show_name(next(iter(str(error).strip().splitlines()), type(error).__name__), 300)


def _read(path: Path, label: str) -> bytes:
    """The bytes of a regular file of bounded size."""
    if not path.is_file():
        raise InputError(f"{label} {path} {'must be a file' if path.exists() else 'does not exist'}")
    try:
        size = path.stat().st_size
        if size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{label} {path} cannot be read: {reason(error)}") from error
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


def read_graph(path: str | os.PathLike[str], layout: Layout | None = None, *, size: int | None = None) -> Graph:
    """Parse an ONNX file and find its image input.

    The file is not trusted: its size and the sizes that it declares are bounded, and external weights must lie in its folder.

    Args:
        path: The `.onnx` file.
        layout: Order of the dimensions of the input; None derives it from the declared shape, or, where that is free, from a
            transposition of the images.
        size: Side of the images that the input is set to, in pixels, whatever it declares; None keeps the declared size.

    Returns:
        The graph with its weights.

    Raises:
        InputError: The file is missing, too large, not ONNX or cut short, keeps weights outside its folder, does not have
            exactly one input, the images, or computes tensors of more than 1 GiB for one image.

    Examples:
        >>> read_graph("no_such.onnx")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: the ONNX file no_such.onnx does not exist
    """
    path = Path(path)
    data = _read(path, "the ONNX file")
    library("onnx")
    with file_errors(path):
        return _parse(path, data, layout, size)


def _parse(path: Path, data: bytes, layout: Layout | None, size: int | None) -> Graph:
    onnx = library("onnx")
    model: ModelProto = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:
        raise InputError(f"{path} is not an ONNX file, or is cut short: {reason(error)}") from error
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
            f"({show_shape(shape)}) of type {kinds.get(kind.elem_type, 'unknown')}"
        )
    if (shape[0] or 1) > 1:
        kind.shape.dim[0].dim_param = "batch"
    layout = layout or _find_layout(model, inputs[0].name, shape)
    if size is not None:
        sides = (2, 3) if layout == "bchw" else (1, 2)
        for at in sides:
            kind.shape.dim[at].dim_value = size
        shape = tuple(size if at in sides else dim for at, dim in enumerate(shape))
    if layout == "bhwc":
        shape = tuple(shape[at] for at in (0, 3, 1, 2))
    graph = Graph(path, model, inputs[0].name, shape, layout, _DTYPES[kind.elem_type], digest.hexdigest())
    sizes = {inputs[0].name: prod(graph.sample_shape(1)), **_count_values(graph)}
    if (size is None and sizes[inputs[0].name] > MAX_VALUES) or sum(sizes.values()) > MAX_TOTAL:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InputError(
            f"{path} is too large: its input is ({show_shape(graph.declared)}), its largest tensor {largest!r} has "
            f"{sizes[largest]:,} values for one image; an image must have at most {MAX_VALUES:,}, all tensors {MAX_TOTAL:,}"
        )
    return graph


def _find_layout(model: "ModelProto", name: str, shape: Sequence[int | None]) -> Layout:
    """Channels last where the last dimension is that of a color or gray image, or the images are first transposed from it."""
    colors = (1, 3)
    if shape[1] is None and shape[3] is None:
        first = next((node for node in model.graph.node if name in node.input), None)
        turns = [list(a.ints) for a in first.attribute if a.name == "perm"] if first is not None else []
        return "bhwc" if [0, 3, 1, 2] in turns else "bchw"
    return "bhwc" if shape[3] in colors and shape[1] not in colors else "bchw"


def _count_values(graph: Graph) -> dict[str, int]:
    """Values of each tensor for one image as far as onnx can infer their shapes from the file, without running it."""
    onnx, proto = library("onnx"), graph.model.graph
    skeleton = onnx.ModelProto(ir_version=graph.model.ir_version, opset_import=graph.model.opset_import)
    skeleton.graph.node.extend(proto.node)
    for tensor in proto.initializer:  # shapes are computed from small constants; the weights themselves are not needed
        empty = onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        skeleton.graph.initializer.append(tensor if prod(tensor.dims) <= 64 else empty)
    image = next(value for value in proto.input if value.name == graph.input_name)
    skeleton.graph.input.append(image)
    one = graph.sample_shape(1)
    for dim, side in zip(
        skeleton.graph.input[0].type.tensor_type.shape.dim,
        one if graph.layout == "bchw" else (one[0], *one[2:], one[1]),
        strict=True,
    ):
        dim.dim_value = side
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except Exception:  # the runtime names what is wrong with the graph
        return {}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    return {name: prod(max(dim.dim_value, 1) for dim in dims) for name, dims in shapes.items()}
