"""Teachers room: a face network in an ONNX file as a teacher. Touches onnxruntime by `onnx_graph`.

An `OnnxTeacher` stands where a `kdlib.TeacherAdapter` stands: images in, named features out, nothing to train.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank
from kdlib_faces._checks import InputError
from kdlib_faces.teachers.onnx.graph import Graph, find_tensor, make_session, read_graph, run_session
from kdlib_faces.teachers.onnx.inspect import Tap, describe_graph, list_taps, suggest_taps

__all__ = ["OnnxTeacher", "Tap", "describe_graph", "list_taps", "suggest_taps"]

MOST_CONTRAST = 8.0
"""Largest pixel that passes for the convention [-1, 1]: augmented images overshoot it, but 0..255 is far above."""

_ABANDONED: list[Any] = []


class OnnxTeacher(nn.Module):
    """A frozen teacher in an ONNX file: `teacher(images) -> {feature name: (b, ...)}`.

    Intermediate tensors are made outputs in memory; the file is never written. Images go through in the batch they
    come in where the graph allows that. Where it fixes its batch, they go through in that many at a time, the last run
    padded; where it claims a free batch but is wrong on two images (reshapes made for one), one by one. Which of these
    holds is found at construction by comparing a run of two images with two runs of one.

    The module has no parameters and an empty state dict. Copies, pickles and forked workers hold the path and open the
    graph anew when first called; a file that has changed since is refused.

    Args:
        path: an `.onnx` file with one image input `(b, c, h, w)`.
        taps: feature name to a tensor name, a node name, or None (or `kdlib.OUTPUT`) for the graph's first output;
            default `{"embedding": None}`. `list_taps` and `suggest_taps` list the candidates.
        preprocess: `"symmetric"`: the graph takes our images as they are, RGB, `(x - 127.5) / 127.5`. A callable maps
            our images `(b, 3, h, w)` to what the graph takes (BGR, other scales, other sizes). Pickling needs a named
            function.
        threads: threads of onnxruntime; None: as many as torch uses when the graph is opened.
        providers: onnxruntime execution providers, best first, each a name or a pair of name and options, such as
            `("CUDAExecutionProvider", {"device_id": 1})`; None: the CPU.
        batch: `"auto"`, or the most images in one run.
        resize: resize images to the graph's input size (bilinear, antialiased) before `preprocess`; otherwise another
            size is an error.

    Attributes:
        input_size: side of the images in pixels; (h, w) where not square, None where the graph leaves it free.
        shapes: shape of each feature of one image, without the batch dimension.

    Shape:
        images `(b, 3, h, w)` in [-1, 1], RGB; each feature `(b, ...)`, float32, on the images' device.

    Raises:
        InputError: the file, a tap, the image size or the graph's output is not usable; the message says which.

    Examples:
        With a file at hand::

            teacher = OnnxTeacher("w600k_mbf.onnx", {"map": "505", "embedding": None})
            features = teacher(images)  # {"map": (b, 256, 7, 7), "embedding": (b, 512)}

        >>> OnnxTeacher("no_such.onnx")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: the ONNX file no_such.onnx does not exist
    """

    reads: ClassVar[tuple[str, ...]] = ()
    """Names of the targets passed in place of the inputs: none."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        taps: Mapping[str, object] | None = None,
        *,
        preprocess: str | Callable[[Tensor], Tensor] = "symmetric",
        threads: int | None = None,
        providers: Sequence[Any] | None = None,
        batch: int | str = "auto",
        resize: bool = False,
    ) -> None:
        super().__init__()
        if not (callable(preprocess) or preprocess == "symmetric"):
            raise InputError(f"OnnxTeacher: preprocess must be 'symmetric' or a callable, got {preprocess!r}")
        if threads is not None:
            check_number("OnnxTeacher", "threads", threads, min=1, integer=True)
        if batch != "auto":
            check_number("OnnxTeacher", "batch", batch, min=1, integer=True)
        self.path = Path(path)
        self.preprocess = preprocess
        self.threads = threads
        self.providers = providers if providers is None or isinstance(providers, str) else list(providers)
        self.batch = batch
        self.resize = bool(resize)
        self._graph: Graph | None = None
        self._session: Any = None
        self._process = 0
        graph = read_graph(self.path)
        self._location = self.path.absolute()
        self._sha256 = graph.sha256
        self.input_size = graph.input_size
        if self.resize and self.input_size is None:
            raise InputError(
                f"OnnxTeacher: {self.path} leaves its input size free; resize=True has nothing to resize to"
            )
        self._check_input(graph)
        self.taps = {"embedding": None} if taps is None else dict(taps)
        self._tensors = {name: find_tensor(graph, name, wanted) for name, wanted in self.taps.items()}
        if not self._tensors:
            raise InputError("OnnxTeacher: taps must name at least one feature, got none")
        self._open(graph)
        self._run_batch, self.shapes = self._probe(graph)

    def _check_input(self, graph: Graph) -> None:
        """A graph that takes our images as they are has three floating-point channels."""
        if callable(self.preprocess):
            return
        channels = graph.shape[1]
        if channels not in (None, 3) or not issubclass(graph.dtype, np.floating):
            shown = ", ".join(str(dim or "free") for dim in graph.shape)
            raise InputError(
                f"OnnxTeacher: {self.path} must take (b, 3, h, w) floating point, got ({shown}) "
                f"{np.dtype(graph.dtype)}; give a callable preprocess"
            )

    def _open(self, graph: Graph) -> None:
        """Build the session, and drop the weights that it now holds itself."""
        names = list(dict.fromkeys(self._tensors.values()))
        self._session = make_session(graph, names, threads=self.threads, providers=self.providers)
        self._process = os.getpid()
        self._graph = Graph(graph.path, None, graph.input_name, graph.shape, graph.dtype, graph.sha256)

    def _ready(self) -> Graph:
        """The graph of an open session; opens one in a copy, an unpickled teacher or a forked process."""
        graph = self._graph
        if graph is None or self._process != os.getpid():
            # The threads of a session made before a fork are not here to be joined: it must never be destroyed.
            if self._session is not None:
                _ABANDONED.append(self._session)
            graph = read_graph(self._location)
            if graph.sha256 != self._sha256:
                raise InputError(f"OnnxTeacher: {self.path} has changed since this teacher was made")
            self._open(graph)
        return graph

    def _run(self, graph: Graph, images: np.ndarray) -> dict[str, np.ndarray]:
        """One run of the graph; each feature must be batch first, floating point and finite."""
        names = list(dict.fromkeys(self._tensors.values()))
        arrays = dict(zip(names, run_session(graph, self._session, images), strict=True))
        features = {}
        for name, tensor in self._tensors.items():
            array = arrays[tensor]
            if array.ndim < 2 or array.shape[0] != len(images) or not np.issubdtype(array.dtype, np.floating):
                raise InputError(
                    f"OnnxTeacher: tap {name!r}: {tensor!r} must be floating point (b, ...) with b = {len(images)}, "
                    f"got {array.shape} {array.dtype} from {self.path}"
                )
            features[name] = array.astype(np.float32, copy=False)
            if not np.isfinite(features[name]).all():
                rows = np.flatnonzero(~np.isfinite(features[name]).reshape(len(array), -1).all(1))
                raise InputError(f"OnnxTeacher: tap {name!r}: {self.path} gives NaN or infinity for image {rows[0]}")
        return features

    def _probe(self, graph: Graph) -> tuple[int | None, dict[str, tuple[int, ...]]]:
        """How many images a run takes (None: any number), and the shape of each feature of one image."""
        fixed = graph.shape[0]
        images = _probe_images(graph.sample_shape(fixed or 2)).astype(graph.dtype)
        if fixed is not None:
            if self.batch not in ("auto", fixed):
                raise InputError(
                    f"OnnxTeacher: {self.path} fixes its batch at {fixed}; batch must be 'auto' or {fixed}"
                )
            straight, rolled = self._run(graph, images), self._run(graph, np.roll(images, 1, axis=0))
            if not all(_agree(np.roll(straight[name], 1, axis=0), rolled[name], graph.dtype) for name in straight):
                raise InputError(f"OnnxTeacher: {self.path} mixes the {fixed} images of its batch")
            return fixed, {name: array.shape[1:] for name, array in straight.items()}
        first, second = (self._run(graph, images[i : i + 1]) for i in range(2))
        shapes = {name: array.shape[1:] for name, array in first.items()}
        if self.batch == 1:
            return 1, shapes
        try:
            together = self._run(graph, images)
        except InputError:
            right = False
        else:
            right = all(
                _agree(together[name], np.concatenate([first[name], second[name]]), graph.dtype) for name in shapes
            )
        if not right and isinstance(self.batch, int):
            raise InputError(f"OnnxTeacher: {self.path} is right one image at a time only; batch must be 'auto' or 1")
        return (self.batch if isinstance(self.batch, int) else None) if right else 1, shapes

    @property
    def embedding_dim(self) -> int | None:
        """Length of the feature named "embedding", or of the last vector among the features; None without one."""
        vectors = {name: shape[0] for name, shape in self.shapes.items() if len(shape) == 1}
        return vectors.get("embedding", next(reversed(vectors.values()), None))

    @property
    def run_batch(self) -> int | None:
        """Images in one run of the graph: a number, or None for as many as come."""
        return self._run_batch

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file, the tapped tensors and the preprocessing: what cached features depend on."""
        parts = [self._sha256, self._tensors, _callable_id(self.preprocess), self.resize]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the graph is: see `describe_graph`; beside that the features' shapes and the images in one run."""
        return describe_graph(self._location) | {
            "features": {name: list(shape) for name, shape in self.shapes.items()},
            "run_batch": self._run_batch,
        }

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of `images` (b, 3, h, w), each `(b, ...)` float32 on the images' device."""
        check_floating("OnnxTeacher", images=images)
        check_rank("OnnxTeacher", "images", images, "b 3 h w")
        if images.shape[1] != 3:
            raise InputError(f"OnnxTeacher: images must be (b, 3, h, w), got {tuple(images.shape)}")
        graph = self._ready()
        array = self._prepared(graph, images)
        step = self._run_batch or max(len(array), 1)
        parts: dict[str, list[np.ndarray]] = {
            name: [np.zeros((0, *shape), np.float32)] if not len(array) else [] for name, shape in self.shapes.items()
        }
        for start in range(0, len(array), step):
            chunk = array[start : start + step]
            count = len(chunk)
            if graph.shape[0] is not None and count < step:
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], step - count, axis=0)])
            try:
                features = self._run(graph, chunk)
            except InputError as error:
                where = f" (images {start} to {start + count - 1} of {len(array)})" if len(array) > step else ""
                raise InputError(f"{error}{where}") from error
            for name, feature in features.items():
                parts[name].append(feature[:count])
        whole = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
        return {name: torch.from_numpy(array).to(images.device) for name, array in whole.items()}

    def _prepared(self, graph: Graph, images: Tensor) -> np.ndarray:
        """Our images as the array that the graph takes."""
        # One pass tells NaN, infinity and range: a teacher should cost what its graph costs.
        low, high = (float(end) for end in torch.aminmax(images)) if images.numel() else (0.0, 0.0)
        if not (isfinite(low) and isfinite(high)):
            raise InputError("OnnxTeacher: images must be finite, got NaN or infinity")
        x = images.float()
        if self.resize and self.input_size is not None:
            size = self.input_size if isinstance(self.input_size, tuple) else (self.input_size, self.input_size)
            if x.shape[2:] != size and len(x):
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        if not isinstance(self.preprocess, str):
            x = self.preprocess(x)
        elif max(-low, high) > MOST_CONTRAST:
            raise InputError(f"OnnxTeacher: images must be in [-1, 1], got values up to {max(-low, high):g}")
        wanted = (len(images), *graph.shape[1:])
        good = isinstance(x, Tensor) and x.dim() == 4
        if not good or any(want not in (None, got) for want, got in zip(wanted, x.shape, strict=True)):
            shown = ", ".join(str(dim or "free") for dim in (graph.shape[1:]))
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            after = "" if isinstance(self.preprocess, str) else " after preprocess"
            hint = "" if self.resize or after else "; resize=True resizes them"
            raise InputError(f"OnnxTeacher: images must be (b, {shown}){after} for {self.path}, got {got}{hint}")
        return np.ascontiguousarray(x.detach().cpu().numpy().astype(graph.dtype, copy=False))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_graph": None, "_process": 0}

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxTeacher":
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update({name: _copied(value) for name, value in self.__getstate__().items()})
        return copy

    def __repr__(self) -> str:
        options = {"preprocess": "symmetric", "threads": None, "providers": None, "batch": "auto", "resize": False}
        given = [f"{name}={getattr(self, name)!r}" for name, usual in options.items() if getattr(self, name) != usual]
        return f"OnnxTeacher({', '.join([repr(str(self.path)), repr(self.taps), *given])})"


def _copied(value: Any) -> Any:
    """A container of its own; what is inside (names, numbers, functions) is never changed and may be shared."""
    return value.copy() if isinstance(value, (dict, list, set)) else value


def _agree(a: np.ndarray, b: np.ndarray, dtype: type[np.generic]) -> bool:
    """Whether two results are one but for the rounding of another batch size."""
    slack = 2e-2 if dtype is np.float16 else 1e-3
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= slack * np.abs(b).max(initial=0) + 1e-6)


def _probe_images(shape: tuple[int, ...]) -> np.ndarray:
    """Images in [-1, 1] that have little in common: noise, then ever smoother and fainter waves."""
    batch, channels, height, width = shape
    noise = np.random.default_rng(0).uniform(-1, 1, shape)
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    waves = [np.sin(9 * (x + c * y) / (i + 1)) / (i + 1) for i in range(batch) for c in range(channels)]
    smooth = np.stack(waves).reshape(shape)
    return np.concatenate([noise[:1], smooth[1:]]).astype(np.float32)


def _callable_id(function: object) -> str:
    """A text that changes when a preprocessing changes: its name and code, or its repr; the same in every process."""
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType):
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        state = repr((_code_id(code), getattr(function, "__defaults__", None), cells))
        return f"{getattr(function, '__module__', '')}.{code.co_qualname} {_stable(state)}"
    return _stable(repr(function))


def _code_id(code: CodeType) -> tuple[Any, ...]:
    constants = [_code_id(value) if isinstance(value, CodeType) else repr(value) for value in code.co_consts]
    return code.co_code.hex(), code.co_names, constants


def _stable(text: str) -> str:
    """`text` without the memory addresses that differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
