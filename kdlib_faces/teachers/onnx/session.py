"""`OnnxTeacher`: a face network in an ONNX file as a frozen teacher."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank
from kdlib_faces._checks import InputError
from kdlib_faces.teachers.onnx.graph import Graph, OnnxTap, Provider, Session, find_tensor, make_session, read_graph

__all__ = ["OnnxTeacher"]

Preprocess: TypeAlias = str | Callable[[Tensor], Tensor]

MAX_PIXEL = 8.0
"""Maximum pixel of images in [-1, 1]: augmented images exceed 1, but images in 0..255 are far above."""

# Sessions made before a fork. Their threads do not exist in the child process, so they must never be destroyed.
_ABANDONED: list[Session] = []


class OnnxTeacher(nn.Module):
    """A frozen teacher in an ONNX file: `teacher(images) -> {feature name: (b, ...)}`.

    It takes the place of a `kdlib.TeacherAdapter`. Tapped tensors become outputs in memory; the file is never written. Images
    run in one batch where the graph allows it. A graph with a fixed batch gets that many images at a time, the last run
    padded. A graph that declares a free batch but is wrong on two images (reshapes made for one) gets them one by one. The
    constructor finds out which by comparing a run of two images with two runs of one.

    The module has no parameters and an empty state dict. Copies, pickles and forked workers hold the path and open the graph
    again when first called; they refuse a file that has changed since.

    Args:
        path: An `.onnx` file with one image input `(b, c, h, w)`.
        taps: Feature name to a tensor name, a node name, or None (or `kdlib.OUTPUT`) for the first output of the graph;
            default `{"embedding": None}`. `list_taps` and `suggest_taps` list the candidates.
        preprocess: `"symmetric"`: the graph takes RGB images, `(x - 127.5) / 127.5`. A callable maps such images
            `(b, 3, h, w)` to what the graph takes (BGR, other scales, other sizes). Pickling requires a named function.
        threads: Threads of onnxruntime; None takes as many as torch uses when the graph is opened.
        providers: onnxruntime execution providers in order of preference, each a name or a pair of name and options, such as
            `("CUDAExecutionProvider", {"device_id": 1})`; None runs on the CPU.
        batch: Maximum number of images in one run, or `"auto"`.
        resize: Resize images to the input size of the graph (bilinear, antialiased) before `preprocess`; otherwise another
            size is an error.

    Attributes:
        input_size: Side of the images in pixels; (h, w) where not square, None where the graph leaves it free.
        shapes: Shape of each feature of one image, without the batch dimension.
        run_batch: Images in one run of the graph; None for any number.
        reads: Empty: the teacher reads images.

    Shape:
        images `(b, 3, h, w)` in [-1, 1], RGB; each feature `(b, ...)`, float32, on the images' device.

    Raises:
        InputError: The file, a tap, the image size or the output of the graph cannot be used.

    Examples:
        With a file at hand::

            teacher = OnnxTeacher("w600k_mbf.onnx", {"map": "505", "embedding": None})
            features = teacher(images)  # {"map": (b, 256, 7, 7), "embedding": (b, 512)}

        >>> OnnxTeacher("no_such.onnx")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: the ONNX file no_such.onnx does not exist
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        path: str | os.PathLike[str],
        taps: Mapping[str, OnnxTap] | None = None,
        *,
        preprocess: Preprocess = "symmetric",
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
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
        graph = read_graph(self.path)
        self._location = self.path.absolute()
        self._sha256 = graph.sha256
        self.input_size = graph.input_size
        if self.resize and self.input_size is None:
            raise InputError(f"OnnxTeacher: {self.path} has a free input size; resize=True has nothing to resize to")
        if not callable(preprocess) and (graph.shape[1] not in (None, 3) or not issubclass(graph.dtype, np.floating)):
            raise InputError(
                f"OnnxTeacher: {self.path} must take (b, 3, h, w) floating point, got ({_show_shape(graph.shape)}) "
                f"{np.dtype(graph.dtype)}; give a callable preprocess"
            )
        self.taps: dict[str, OnnxTap] = {"embedding": None} if taps is None else dict(taps)
        self._tensors = {name: find_tensor(graph, name, tap) for name, tap in self.taps.items()}
        if not self._tensors:
            raise InputError("OnnxTeacher: taps must name at least one feature, got none")
        self._open: tuple[int, Graph, Session] | None = None
        self.run_batch, self.shapes = self._probe(*self._make_session(graph))

    def _make_session(self, graph: Graph) -> tuple[Graph, Session]:
        names = list(dict.fromkeys(self._tensors.values()))
        session = make_session(graph, names, threads=self.threads, providers=self.providers)
        graph.model.Clear()  # the session holds its own copy of the weights
        self._open = (os.getpid(), graph, session)
        return graph, session

    def _session(self) -> tuple[Graph, Session]:
        """The open session; a copy, an unpickled teacher and a forked process open their own."""
        if self._open is not None:
            process, graph, session = self._open
            if process == os.getpid():
                return graph, session
            _ABANDONED.append(session)
        graph = read_graph(self._location)
        if graph.sha256 != self._sha256:
            raise InputError(f"OnnxTeacher: {self.path} has changed since this teacher was made")
        return self._make_session(graph)

    def _run(self, graph: Graph, session: Session, images: np.ndarray) -> dict[str, np.ndarray]:
        """One run of the graph; each feature must be batch first, floating point and finite."""
        names = list(dict.fromkeys(self._tensors.values()))
        arrays = dict(zip(names, graph.run(session, images), strict=True))
        features = {}
        for name, tensor in self._tensors.items():
            array = arrays[tensor]
            if array.ndim < 2 or array.shape[0] != len(images) or not np.issubdtype(array.dtype, np.floating):
                raise InputError(
                    f"OnnxTeacher: tap {name!r}: {tensor!r} must be floating point (b, ...) with b = {len(images)}, "
                    f"got {array.shape} {array.dtype} from {self.path}"
                )
            features[name] = array.astype(np.float32, copy=False)
            finite = np.isfinite(features[name]).reshape(len(array), -1).all(1)
            if not finite.all():
                raise InputError(
                    f"OnnxTeacher: tap {name!r}: {self.path} gives NaN or infinity for image {np.argmin(finite)}"
                )
        return features

    def _probe(self, graph: Graph, session: Session) -> tuple[int | None, dict[str, tuple[int, ...]]]:
        """The images of a run (None: any number), and the shape of each feature of one image."""
        fixed = graph.shape[0]
        images = _probe_images(graph.sample_shape(fixed or 2)).astype(graph.dtype)
        if fixed is not None:
            if self.batch not in ("auto", fixed):
                raise InputError(
                    f"OnnxTeacher: {self.path} fixes its batch at {fixed}; batch must be 'auto' or {fixed}"
                )
            plain, rolled = (self._run(graph, session, each) for each in (images, np.roll(images, 1, axis=0)))
            if not all(_equal(np.roll(plain[name], 1, axis=0), rolled[name], graph.dtype) for name in plain):
                raise InputError(f"OnnxTeacher: {self.path} mixes the {fixed} images of its batch")
            return fixed, {name: array.shape[1:] for name, array in plain.items()}
        first, second = (self._run(graph, session, images[i : i + 1]) for i in range(2))
        shapes = {name: array.shape[1:] for name, array in first.items()}
        if self.batch == 1:
            return 1, shapes
        try:
            both = self._run(graph, session, images)
        except InputError:
            independent = False
        else:
            independent = all(
                _equal(both[name], np.concatenate([first[name], second[name]]), graph.dtype) for name in shapes
            )
        if isinstance(self.batch, int):
            if not independent:
                raise InputError(
                    f"OnnxTeacher: {self.path} is right one image at a time only; batch must be 'auto' or 1"
                )
            return self.batch, shapes
        return None if independent else 1, shapes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that cached features depend on: the file, tapped tensors and preprocessing."""
        parts = [self._sha256, self._tensors, _callable_id(self.preprocess), self.resize]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of `images` (b, 3, h, w), each `(b, ...)` float32 on the images' device."""
        check_floating("OnnxTeacher", images=images)
        check_rank("OnnxTeacher", "images", images, "b 3 h w")
        if images.shape[1] != 3:
            raise InputError(f"OnnxTeacher: images must be (b, 3, h, w), got {tuple(images.shape)}")
        graph, session = self._session()
        array = self._prepare(graph, images)
        step = self.run_batch or max(len(array), 1)
        parts: dict[str, list[np.ndarray]] = {
            name: [] if len(array) else [np.zeros((0, *shape), np.float32)] for name, shape in self.shapes.items()
        }
        for start in range(0, len(array), step):
            chunk = array[start : start + step]
            count = len(chunk)
            if graph.shape[0] is not None and count < step:
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], step - count, axis=0)])
            try:
                features = self._run(graph, session, chunk)
            except InputError as error:
                where = f" (images {start} to {start + count - 1} of {len(array)})" if len(array) > step else ""
                raise InputError(f"{error}{where}") from error
            for name, feature in features.items():
                parts[name].append(feature[:count])
        whole = {name: part[0] if len(part) == 1 else np.concatenate(part) for name, part in parts.items()}
        return {name: torch.from_numpy(feature).to(images.device) for name, feature in whole.items()}

    def _prepare(self, graph: Graph, images: Tensor) -> np.ndarray:
        """The images as the array that the graph takes."""
        # One pass finds NaN, infinity and range, so that the checks cost little beside the graph.
        low, high = (float(end) for end in torch.aminmax(images)) if images.numel() else (0.0, 0.0)
        if not (isfinite(low) and isfinite(high)):
            raise InputError("OnnxTeacher: images must be finite, got NaN or infinity")
        x = images.float()
        if self.resize and self.input_size is not None:
            size = self.input_size if isinstance(self.input_size, tuple) else (self.input_size, self.input_size)
            if x.shape[2:] != size and len(x):
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        custom = not isinstance(self.preprocess, str)
        if not isinstance(self.preprocess, str):
            x = self.preprocess(x)
        elif max(-low, high) > MAX_PIXEL:
            raise InputError(f"OnnxTeacher: images must be in [-1, 1], got values up to {max(-low, high):g}")
        wanted = (len(images), *graph.shape[1:])
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        if len(shape) != 4 or any(want not in (None, got) for want, got in zip(wanted, shape, strict=True)):
            where = " after preprocess" if custom else ""
            hint = "" if self.resize or custom else "; resize=True resizes them"
            raise InputError(
                f"OnnxTeacher: images must be (b, {_show_shape(graph.shape[1:])}){where} for {self.path}, got "
                f"{shape or type(x).__name__}{hint}"
            )
        return np.ascontiguousarray(x.detach().cpu().numpy().astype(graph.dtype, copy=False))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": None}

    def __repr__(self) -> str:
        options = {"preprocess": "symmetric", "threads": None, "providers": None, "batch": "auto", "resize": False}
        given = [f"{name}={value!r}" for name, usual in options.items() if (value := getattr(self, name)) != usual]
        return f"OnnxTeacher({', '.join([repr(str(self.path)), repr(self.taps), *given])})"


def _show_shape(shape: Sequence[int | None]) -> str:
    return ", ".join(str(dim or "free") for dim in shape)


def _equal(a: np.ndarray, b: np.ndarray, dtype: type[np.generic]) -> bool:
    """Whether two results are equal up to the rounding of another batch size."""
    slack = 2e-2 if dtype is np.float16 else 1e-3
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= slack * np.abs(b).max(initial=0) + 1e-6)


def _probe_images(shape: tuple[int, ...]) -> np.ndarray:
    """Images in [-1, 1] that differ strongly: noise, then waves that get smoother and fainter."""
    batch, channels, height, width = shape
    noise = np.random.default_rng(0).uniform(-1, 1, shape)
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    waves = [np.sin(9 * (x + c * y) / (i + 1)) / (i + 1) for i in range(batch) for c in range(channels)]
    return np.concatenate([noise[:1], np.stack(waves).reshape(shape)[1:]]).astype(np.float32)


def _callable_id(function: object) -> str:
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
