"""Export of networks to float32 ONNX graphs and to `torch.export` programs."""

import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._atomic import atomic_write
from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.backbones.input_spec import height_width
from kdlib_faces.data import SyntheticFaces
from kdlib_faces.export._prelu import split_prelu
from kdlib_faces.teachers import TeacherNet
from kdlib_faces.teachers.onnx.graph import library
from kdlib_faces.teachers.onnx.metadata import write_metadata

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["DEFAULT_OPSET", "Check", "compact", "export_onnx", "export_program", "keep", "run_graph", "sample_faces"]

Check = Callable[[Path], None]
"""Called with an exported file before it is kept; raises an `InputError` to refuse it."""

DEFAULT_OPSET = 18
BATCHES = (1, 3)


def export_onnx(
    model: TeacherNet,
    path: str | os.PathLike[str],
    *,
    normalize: bool = False,
    opset: int = DEFAULT_OPSET,
    images: Tensor | None = None,
    tolerance: float = 1e-4,
    metadata: Mapping[str, object] | None = None,
    check: Check | None = None,
) -> Path:
    """Write a network as an ONNX graph with a free batch size, after a comparison of both.

    The graph takes `images` `(b, 3, h, w)`, converted as `model.input_spec` states, and returns `embedding` `(b, d)`. Its
    metadata entry `kdlib_faces` is JSON: input specification, embedding dimension, opset and `metadata`. PReLU is written
    as depthwise convolutions, which halves the time of a light network in onnxruntime on a CPU.

    Args:
        model: A backbone or an age-invariant teacher.
        path: The `.onnx` file.
        normalize: Whether the graph returns embeddings of unit length.
        opset: Version of the ONNX operators, from 18.
        images: Face crops `(n, 3, h, w)` in [-1, 1], RGB, on which both are compared; None takes synthetic faces.
        tolerance: Maximum relative error of an embedding at batch sizes 1 and 3.
        metadata: Further entries of the metadata, as values of JSON, such as thresholds.
        check: Called with the file before it is kept.

    Returns:
        The path.

    Raises:
        InputError: A package is missing, the outputs differ by more than `tolerance`, or the file cannot be written. An
            earlier file at `path` is left unchanged.
    """
    check_number("export_onnx", "opset", opset, min=18, integer=True)
    check_number("export_onnx", "tolerance", tolerance, above=0)
    onnx = library("onnx")
    library("onnxscript")
    crops = _converted(model, images)
    network = _Exported(model, normalize)
    with _silent():
        program = torch.onnx.export(
            network, (crops[:2],), dynamo=True, input_names=["images"], output_names=["embedding"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), opset_version=opset, verbose=False,
        )  # fmt: skip
    assert program is not None  # with dynamo=True
    graph: ModelProto = program.model_proto
    split_prelu(graph)
    compact(graph)
    entry: dict[str, object] = {
        "input": {"size": model.input_size, **model.input_spec.fields()},
        "embedding_dim": model.embedding_dim, "normalized": normalize, "opset": opset, "precision": "float32",
        "network": type(getattr(model, "backbone", model)).__name__, **(metadata or {}),
    }  # fmt: skip
    write_metadata(graph, entry)
    content = graph.SerializeToString()
    onnx.checker.check_model(content)
    _check_parity("export_onnx", network, lambda batch: run_graph(content, batch), crops, tolerance)
    return keep("export_onnx", path, content, check)


def export_program(
    model: TeacherNet,
    path: str | os.PathLike[str],
    *,
    normalize: bool = False,
    images: Tensor | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Write a network as a `torch.export` program (`.pt2`) with a free batch size, after a comparison of both.

    `torch.export.load(path).module()` takes what the graph of `export_onnx` takes.

    Args:
        model: As for `export_onnx`.
        path: The `.pt2` file.
        normalize: As for `export_onnx`.
        images: As for `export_onnx`.
        tolerance: As for `export_onnx`.

    Returns:
        The path.

    Raises:
        InputError: The outputs differ by more than `tolerance`, or the file cannot be written.
    """
    crops = _converted(model, images)
    network = _Exported(model, normalize)
    with _silent():
        program = torch.export.export(network, (crops[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        stream = io.BytesIO()
        torch.export.save(program, stream)
        loaded = torch.export.load(io.BytesIO(stream.getvalue())).module()
    _check_parity("export_program", network, lambda batch: loaded(batch).detach().numpy(), crops, tolerance)
    return keep("export_program", path, stream.getvalue(), None)


class _Exported(nn.Module):
    """A frozen copy of a network on the CPU; its embeddings have unit length with `normalize`."""

    def __init__(self, network: nn.Module, normalize: bool) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).cpu().float()
        self.normalize = normalize
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """`(b, 3, h, w)` to `(b, d)`."""
        embedding: Tensor = self.network(images)
        return F.normalize(embedding) if self.normalize else embedding


def keep(owner: str, path: str | os.PathLike[str], content: bytes, check: Check | None) -> Path:
    """Check the content as a file in a temporary folder, then write it atomically."""
    target = Path(path)
    if check is not None:
        with tempfile.TemporaryDirectory() as folder:
            candidate = Path(folder) / target.name
            candidate.write_bytes(content)
            check(candidate)
    try:
        with atomic_write(target, durable=True) as stream:
            stream.write(content)
    except OSError as error:
        raise InputError(f"{owner}: cannot write {target}: {error.strerror or error}") from error
    return target


def compact(model: "ModelProto") -> None:
    """Remove what only serves to debug an export: shapes of inner tensors, doc strings and stack traces."""
    del model.graph.value_info[:]
    model.graph.doc_string = model.doc_string = ""
    for each in (*model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer, model.graph):
        each.doc_string = ""
        del each.metadata_props[:]


def run_graph(content: bytes, images: Tensor) -> np.ndarray:
    """Embeddings `(b, d)` of one run of a graph on converted images, on one thread of the CPU."""
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    return output


def sample_faces(size: int, count: int = 8) -> Tensor:
    """Synthetic faces `(count, 3, size, size)` in [-1, 1]."""
    faces = SyntheticFaces(identities=count, images_per_identity=1, size=size, seed=0)
    return torch.stack([faces[row].image for row in range(count)])


def _converted(model: TeacherNet, images: Tensor | None) -> Tensor:
    """At least three images as the network takes them."""
    faces = sample_faces(max(height_width("export", model.input_size))) if images is None else images.float()
    return model.input_spec(faces).repeat(-(-max(BATCHES) // len(faces)), 1, 1, 1).contiguous()


def _check_parity(
    owner: str, network: nn.Module, exported: Callable[[Tensor], np.ndarray], crops: Tensor, tolerance: float
) -> None:
    for batch in BATCHES:
        with torch.no_grad():
            wanted = network(crops[:batch]).numpy()
        found = exported(crops[:batch])
        if found.shape != wanted.shape:
            raise InputError(
                f"{owner}: the exported graph returns {found.shape} for {wanted.shape}; nothing was written"
            )
        error = float((np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())
        if not error <= tolerance:
            raise InputError(
                f"{owner}: embeddings of the exported graph must be within {tolerance:g} of those of the network, got a "
                f"relative error of {error:.2g} at batch size {batch}; nothing was written"
            )


@contextmanager
def _silent() -> Iterator[None]:
    """Hide the messages of the exporter: warnings about its own parts and about packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
