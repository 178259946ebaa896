"""Sessions that run ONNX graphs, and the tensors in them that taps refer to."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol, TypeAlias

import numpy as np
import torch

from kdlib import OUTPUT, Tap
from kdlib._checks import nearest
from kdlib_faces._checks import InputError
from kdlib_faces.teachers.onnx.graph import MAX_VALUES, Graph, library, reason

__all__ = [
    "OnnxTap",
    "Provider",
    "Session",
    "as_vectors",
    "check_declared_batch",
    "find_embedding",
    "find_tensor",
    "make_session",
    "providers_for",
    "run",
    "trace",
]

OnnxTap: TypeAlias = str | Tap | None
"""Name of a tensor or node; None or `kdlib.OUTPUT` for the embedding, `OUTPUT[i]` or `OUTPUT["name"]` for an output."""

Provider: TypeAlias = str | tuple[str, Mapping[str, object]]
"""Name of an onnxruntime execution provider, or a pair of name and options."""


class Session(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used."""

    def run(self, outputs: None, inputs: Mapping[str, np.ndarray], /) -> list[object]: ...

    def get_providers(self) -> list[str]: ...


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
        InputError: A provider is unknown or cannot be used here, or onnxruntime refuses the graph.
    """
    onnx, runtime = library("onnx"), library("onnxruntime")
    if isinstance(providers, str) or (providers is not None and not len(providers)):
        raise InputError(f"providers must be a list of execution providers, got {providers!r}")
    chosen: list[Provider] = ["CPUExecutionProvider"] if providers is None else list(providers)
    available = runtime.get_available_providers()
    names = []
    for provider in chosen:
        pair = isinstance(provider, tuple) and len(provider) == 2 and isinstance(provider[1], dict)
        name = provider[0] if pair else provider
        if not isinstance(name, str):
            raise InputError(f"an execution provider must be a name, or a pair of name and options, got {provider!r}")
        if name not in available:
            raise InputError(
                f"no execution provider {name!r} in this onnxruntime; there are {', '.join(available)}; install the "
                "onnxruntime package that has it (onnxruntime-gpu has CUDAExecutionProvider), or use another device"
            )
        names.append(name)
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
        raise InputError(f"{graph.path} cannot be run: {reason(error)}") from error
    # Without a usable device, onnxruntime drops the provider and runs on the CPU.
    dropped = [name for name in names if name not in session.get_providers()]
    if dropped:
        raise InputError(
            f"{graph.path}: onnxruntime cannot use {', '.join(dropped)} on this machine, only "
            f"{', '.join(session.get_providers())}; install its driver and libraries, or leave it out of providers"
        )
    return session


def providers_for(device: torch.device) -> list[Provider] | None:
    """Return the execution providers that run a graph on a device of torch; None for the CPU.

    Operations that the provider of the device lacks run on the CPU.

    Raises:
        InputError: No execution provider is known for such a device.

    Examples:
        >>> providers_for(torch.device("cpu"))
        >>> providers_for(torch.device("xpu", 0))[0]
        ('OpenVINOExecutionProvider', {'device_type': 'GPU'})
    """
    if device.type == "cpu":
        return None
    cuda = "CUDAExecutionProvider" if torch.version.hip is None else "MIGraphXExecutionProvider"
    known: dict[str, Provider] = {
        "cuda": (cuda, {"device_id": device.index or 0}),
        "mps": "CoreMLExecutionProvider",
        "xpu": ("OpenVINOExecutionProvider", {"device_type": "GPU"}),
    }
    if device.type not in known:
        raise InputError(
            f"no execution provider of onnxruntime is known for {device.type}; use --device cpu for .onnx files"
        )
    return [known[device.type], "CPUExecutionProvider"]


def run(graph: Graph, session: Session, images: np.ndarray) -> list[np.ndarray]:
    """Run `images` (b, c, h, w) and return the tensors of the session.

    Raises:
        InputError: The run fails, or an output is not an array.
    """
    given = images if graph.layout == "bchw" else np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    try:
        arrays = session.run(None, {graph.input_name: given})
    except Exception as error:
        raise InputError(f"{graph.path} fails on images {given.shape}: {reason(error)}") from error
    checked = [array for array in arrays if isinstance(array, np.ndarray)]
    if len(checked) < len(arrays):
        raise InputError(f"{graph.path} returns something other than arrays")
    return checked


def check_declared_batch(graph: Graph) -> int:
    """Return the batch that a graph declares and without which it does not run.

    Raises:
        InputError: The images of such a batch have more than `MAX_VALUES` values.
    """
    batch = graph.shape[0] or 1
    if prod(graph.sample_shape(batch)) > MAX_VALUES:
        raise InputError(
            f"{graph.path} only runs in batches of {batch:,} images, more than {MAX_VALUES:,} values; export it with a free batch"
        )
    return batch


def trace(graph: Graph, tensors: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of one gray image. Declared shapes are often missing or those of another batch.

    Raises:
        InputError: The graph does not run.
    """
    session, image = make_session(graph, tensors), np.zeros(graph.sample_shape(1), graph.dtype)
    try:
        arrays = run(graph, session, image)
    except InputError:
        if (graph.shape[0] or 1) == 1:
            raise
        batch = check_declared_batch(graph)
        arrays = run(graph, session, np.repeat(image, batch, axis=0))
        arrays = [array[:1] if array.shape[:1] == (batch,) else array for array in arrays]
    return dict(zip(tensors, arrays, strict=True))


def as_vectors(array: np.ndarray) -> np.ndarray:
    """Make `(b, d)` of `(b, d, 1, 1)`, `(b, 1, 1, d)` and `(b, 1, d)`, and of `(d,)`, which some graphs return for one image."""
    shape = array.shape
    if len(shape) == 1:
        return array[None]
    wrapped = len(shape) in (3, 4) and (set(shape[1:-1]) == {1} or shape[2:] == (1, 1))
    return array.reshape(len(array), prod(shape[1:])) if wrapped else array


def find_embedding(graph: Graph, *, vector: bool = False) -> str:
    """Return the first output of the graph that holds a vector for each image, or else the first output.

    Norms and qualities `(b, 1)` are not embeddings.

    Args:
        graph: From `read_graph`.
        vector: Whether a graph of several outputs, none of which holds a vector, is an error.

    Raises:
        InputError: The graph declares no output that it computes, or does not run.
    """
    known = graph.outputs()
    outputs = list(dict.fromkeys(str(each.name) for each in graph.model.graph.output if each.name in known))
    if not outputs:
        raise InputError(f"{graph.path} has no output that it computes")
    if len(outputs) == 1:
        return outputs[0]
    shapes = {name: as_vectors(array).shape for name, array in trace(graph, outputs).items()}
    vectors = (name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == 1 and shape[1] > 1)
    found = next(vectors, None if vector else outputs[0])
    if found is None:
        listed = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:4])
        raise InputError(
            f"{graph.path} is no face recognition network: none of its {len(outputs)} outputs holds one vector for each image, "
            f"got {listed}{', ...' if len(outputs) > 4 else ''}; a face detector is given as --detector"
        )
    return found


def find_tensor(graph: Graph, name: str, tap: OnnxTap) -> str:
    """Return the name of the tensor that a tap refers to.

    Args:
        graph: From `read_graph`.
        name: Name of the feature, for the error.
        tap: The tap. The name of a node refers to its first output; None and `OUTPUT` refer to the embedding.

    Raises:
        InputError: No node computes such a tensor; the message lists the nearest names.
    """
    if tap is None or tap == OUTPUT:
        return find_embedding(graph, vector=True)
    tensor: object = tap
    if isinstance(tap, Tap):
        outputs = {at: value.name for at, value in enumerate(graph.model.graph.output)}
        key = tap.index[0] if tap.path is None and len(tap.index) == 1 else None
        tensor = key if isinstance(key, str) else outputs.get(key) if isinstance(key, int) else None
    tensors = graph.outputs()
    nodes = {node.name: node.output[0] for node in graph.model.graph.node if node.name and any(node.output[:1])}
    if isinstance(tensor, str) and (tensor in tensors or tensor in nodes):
        return tensor if tensor in tensors else nodes[tensor]
    known = nearest(str(tensor), dict.fromkeys([*tensors, *nodes]))
    raise InputError(f"OnnxTeacher: tap {name!r}: no tensor or node named {tap!r} in {graph.path}{known}")
