"""`OnnxTeacher`: a face network in an ONNX file as a frozen teacher."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from inspect import signature
from math import isfinite
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import OUTPUT
from kdlib._checks import check_callable, check_choice, check_floating, check_number, check_rank
from kdlib_faces._checks import InputError, NotFiniteError
from kdlib_faces.backbones import InputSpec
from kdlib_faces.teachers.onnx.graph import Graph, Layout, file_errors, read_graph, show_shape
from kdlib_faces.teachers.onnx.preprocessing import callable_id, recognize_input
from kdlib_faces.teachers.onnx.probe import cosine_of, equal, noise_and_waves
from kdlib_faces.teachers.onnx.runtime import (
    OnnxTap,
    Provider,
    Session,
    as_vectors,
    check_declared_batch,
    find_tensor,
    make_session,
    run,
)

__all__ = ["OnnxTeacher"]

Preprocess: TypeAlias = Callable[[Tensor], Tensor]
Arrays: TypeAlias = dict[str, np.ndarray]

MAX_PIXEL = 8.0
"""Maximum pixel of images in [-1, 1]: augmented images exceed 1, but images in 0..255 are far above."""

ALIKE, FARTHER = 0.99, 40
"""Cosine of the embeddings of noise and waves above which other pixels are tried, and the factor by which they must separate
the two better for a warning. Trained networks are below .8 on the images that they take. Where they subtract 127.5 from
[-1, 1], they are above .99, and the factor is above 90. Untrained networks may be above .98 on any images."""

# Sessions made before a fork. Their threads do not exist in the child process, so they must never be destroyed.
_ABANDONED: list[Session] = []


class OnnxTeacher(nn.Module):
    """A frozen teacher in an ONNX file: `teacher(images) -> {feature name: (b, ...)}`.

    It takes the place of a `kdlib.TeacherAdapter`. Tapped tensors become outputs in memory; the file is never written.

    Images run in one batch where the graph allows it, whatever batch it declares. The constructor compares a run of two images
    with two runs of one. Where they differ (reshapes made for one image), images run one by one. A graph that only runs on
    the batch that it declares gets that many at a time, the last run padded.

    The images are converted to those that the graph takes. Their pixel range is recognized from its first operations: a graph
    that begins by subtracting 127.5 gets pixels from 0 to 255. A warning is given if two very different images have nearly the
    same embedding, and would not with another pixel range: the conversion is then wrong.

    The module has no parameters and an empty state dict. Copies, pickles and forked workers hold the path and open the graph
    again when first called; they refuse a file that has changed since.

    Args:
        path: An `.onnx` file with one image input, `(b, c, h, w)` or `(b, h, w, c)`.
        taps: Feature name to a tensor name, a node name, or None (or `kdlib.OUTPUT`) for the embedding, the first output that
            is a vector for each image; default `{"embedding": None}`. `list_taps` and `suggest_taps` list the candidates.
        preprocess: An `InputSpec` of what the graph takes: `InputSpec(mean=0.0, scale=1.0)` for pixels from 0 to 255, with
            `color="bgr"` for BGR. Any other callable maps RGB images in [-1, 1], `(b, 3, h, w)`, to `(b, c, h, w)` for the
            graph. None recognizes the pixel range. Pickling requires a named function.
        layout: `"bchw"` or `"bhwc"`, the order of the input's dimensions; None derives it from the file.
        threads: Threads of onnxruntime; None takes as many as torch uses when the graph is opened.
        providers: onnxruntime execution providers in order of preference, each a name or a pair of name and options, such as
            `("CUDAExecutionProvider", {"device_id": 1})`; None runs on the CPU.
        batch: Maximum number of images in one run, or `"auto"`.
        resize: Scale images of another size to cover the input size of the graph and center-crop them, as `InputSpec` does,
            before `preprocess`; otherwise another size is an error.

    Attributes:
        image_format: The images that the graph takes; None with another callable.
        input_size: Side of the images in pixels; (h, w) where not square, None where the graph leaves it free.
        shapes: Shape of each feature of one image, without the batch dimension.
        run_batch: Images in one run of the graph; None for any number.
        inputs: None: the teacher reads images.

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

    inputs: ClassVar[None] = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        taps: Mapping[str, OnnxTap] | None = None,
        *,
        preprocess: Preprocess | None = None,
        layout: Layout | None = None,
        threads: int | None = None,
        providers: Sequence[Provider] | None = None,
        batch: int | str = "auto",
        resize: bool = False,
    ) -> None:
        super().__init__()
        if preprocess is not None:
            check_callable("OnnxTeacher", "preprocess", preprocess)
        if layout is not None:
            check_choice("OnnxTeacher", "layout", layout, ("bchw", "bhwc"))
        if threads is not None:
            check_number("OnnxTeacher", "threads", threads, min=1, integer=True)
        if batch != "auto":
            check_number("OnnxTeacher", "batch", batch, min=1, integer=True)
        self.path = Path(path)
        self.preprocess = preprocess
        self.layout = layout
        self.threads = threads
        self.providers = providers if providers is None or isinstance(providers, str) else list(providers)
        self.batch = batch
        self.resize = bool(resize)
        graph = read_graph(self.path, layout)
        self._location = self.path.absolute()
        self._sha256 = graph.sha256
        self.input_size = graph.input_size
        if self.resize and self.input_size is None:
            raise InputError(f"OnnxTeacher: {self.path} has a free input size; resize=True has nothing to resize to")
        self.image_format = preprocess if isinstance(preprocess, InputSpec) else None
        if (preprocess is None or self.image_format) and graph.shape[1] not in (None, 3):
            raise InputError(
                f"OnnxTeacher: {self.path} must take images of 3 channels, got ({show_shape(graph.declared)}) in the layout "
                f"{graph.layout!r}; give another layout, or a callable preprocess"
            )
        self.taps: dict[str, OnnxTap] = {"embedding": None} if taps is None else dict(taps)
        if not self.taps:
            raise InputError("OnnxTeacher: taps must name at least one feature, got none")
        self._open: tuple[int, Graph, Session] | None = None
        with file_errors(self.path):
            if preprocess is None:
                self.image_format = recognize_input(graph)
            self._tensors = {name: find_tensor(graph, name, tap) for name, tap in self.taps.items()}
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
        graph = read_graph(self._location, self.layout)
        if graph.sha256 != self._sha256:
            raise InputError(f"OnnxTeacher: {self.path} has changed since this teacher was made")
        return self._make_session(graph)

    def _run(self, graph: Graph, session: Session, images: np.ndarray) -> dict[str, np.ndarray]:
        """One run of the graph; each feature must be batch first, floating point and finite."""
        names = list(dict.fromkeys(self._tensors.values()))
        arrays = dict(zip(names, run(graph, session, images), strict=True))
        features = {}
        for name, tensor in self._tensors.items():
            array = arrays[tensor]
            if self.taps[name] in (None, OUTPUT) and array.ndim:
                array = as_vectors(array)
            if array.ndim < 2 or array.shape[0] != len(images) or not np.issubdtype(array.dtype, np.floating):
                raise InputError(
                    f"OnnxTeacher: tap {name!r}: {tensor!r} must be floating point (b, ...) with b = {len(images)}, "
                    f"got {array.shape} {array.dtype} from {self.path}"
                )
            features[name] = array.astype(np.float32, copy=False)
            finite = np.isfinite(features[name]).reshape(len(array), -1).all(1)
            if not finite.all():
                problem = f"OnnxTeacher: tap {name!r}: {self.path} returns NaN or infinity"
                raise NotFiniteError(problem, int(np.argmin(finite)))
        return features

    def _probe(self, graph: Graph, session: Session) -> tuple[int | None, dict[str, tuple[int, ...]]]:
        """The images of a run (None: any number), and the shape of each feature of one image."""
        images = self._probe_images(graph)
        first, second, batch = self._run_both(graph, session, images)
        if batch == 1 and graph.shape[0] != 1 and self.batch != 1:
            with suppress(InputError):
                both = self._run(graph, session, images)
                pairs = {name: np.concatenate([first[name], second[name]]) for name in first}
                batch = None if all(equal(both[name], pairs[name], graph.dtype) for name in pairs) else 1
        if batch is not None and self.batch not in ("auto", batch):
            raise InputError(
                f"OnnxTeacher: {self.path} gives right results in batches of {batch} only; batch must be 'auto' or {batch}, "
                f"got {self.batch}"
            )
        self._warn_if_alike(graph, session, first, second)
        shapes = {name: array.shape[1:] for name, array in first.items()}
        return (self.batch if batch is None and isinstance(self.batch, int) else batch), shapes

    def _run_both(self, graph: Graph, session: Session, images: np.ndarray) -> tuple[Arrays, Arrays, int | None]:
        """Features of both images, and the batch in which they were run: 1, or the declared one if the graph needs it."""
        try:
            return self._run(graph, session, images[:1]), self._run(graph, session, images[1:]), 1
        except InputError:
            if graph.shape[0] in (None, 1):
                raise
        batch = check_declared_batch(graph)
        order = [0] + [1] * (batch - 1)
        one, other = (self._run(graph, session, images[each]) for each in (order, [1 - at for at in order]))
        # Neither the place in the batch nor the other images may matter.
        if not all(equal(one[name][:2], other[name][1::-1], graph.dtype) for name in one):
            raise InputError(f"OnnxTeacher: {self.path} mixes the {batch} images of its batch")
        return (
            {name: array[:1] for name, array in one.items()},
            {name: array[1:2] for name, array in one.items()},
            batch,
        )

    def _probe_images(self, graph: Graph) -> np.ndarray:
        """Two very different images as the graph takes them; as they are where a callable expects another size."""
        _, channels, height, width = graph.sample_shape(2)
        try:
            return self._prepare(graph, torch.from_numpy(noise_and_waves(3, height, width)))
        except Exception:  # the first real images will raise it again
            return noise_and_waves(channels, height, width).astype(graph.dtype)

    def _warn_if_alike(self, graph: Graph, session: Session, first: Arrays, second: Arrays) -> None:
        """Warn if the embeddings of both images are nearly equal, and would not be with other pixels."""
        name = next((name for name, tap in self.taps.items() if tap in (None, OUTPUT)), None)
        cosine = 0.0 if name is None else cosine_of(first[name], second[name])
        if name is None or cosine < ALIKE or graph.shape[1] not in (None, 3):
            return
        given = self.image_format
        images = torch.from_numpy(noise_and_waves(3, *graph.sample_shape(2)[2:]))
        for mean, scale in ((0.0, 1.0), (0.0, 255.0), (127.5, 127.5)):
            self.image_format = InputSpec(mean=mean, scale=scale)
            try:
                one, other, _ = self._run_both(graph, session, self._prepare(graph, images))
            except InputError:
                continue
            finally:
                self.image_format = given
            if 1 - (better := cosine_of(one[name], other[name])) > FARTHER * (1 - cosine):
                warnings.warn(
                    f"OnnxTeacher: {self.path} gives nearly the same {name} for very different images (cosine {cosine:.4f}), but "
                    f"not for pixels with mean={mean:g} and scale={scale:g} ({better:.2f}): give preprocess=InputSpec(mean={mean}, "
                    f"scale={scale}), or --input mean={mean:g},scale={scale:g} on the command line",
                    stacklevel=4,
                )
                return

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that cached features depend on: the file, tapped tensors and preprocessing."""
        spec = self.image_format
        images = callable_id(self.preprocess) if spec is None else [spec.color, spec.mean, spec.scale, self.layout]
        parts = [self._sha256, self._tensors, images, self.resize]
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
            if step == graph.shape[0] and count < step:
                chunk = np.concatenate([chunk, np.repeat(chunk[-1:], step - count, axis=0)])
            try:
                features = self._run(graph, session, chunk)
            except NotFiniteError as error:
                raise NotFiniteError(error.problem, start + error.row) from error
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
        if self.resize and self.input_size is not None and len(x):
            x = InputSpec(size=self.input_size)(x)
        if self.image_format is not None:
            if max(-low, high) > MAX_PIXEL:
                raise InputError(f"OnnxTeacher: images must be in [-1, 1], got values up to {max(-low, high):g}")
            x = replace(self.image_format, size=(x.shape[2], x.shape[3]))(x)
        elif self.preprocess is not None:
            x = self.preprocess(x)
        wanted = (len(images), *graph.shape[1:])
        shape = tuple(x.shape) if isinstance(x, Tensor) else ()
        if len(shape) != 4 or any(want not in (None, got) for want, got in zip(wanted, shape, strict=True)):
            custom = self.image_format is None
            where = " after preprocess" if custom else ""
            hint = "" if self.resize or custom else "; resize=True resizes them"
            raise InputError(
                f"OnnxTeacher: images must be (b, {show_shape(graph.shape[1:])}){where} for {self.path}, got "
                f"{shape or type(x).__name__}{hint}"
            )
        array = x.detach().cpu().numpy()
        if not issubclass(graph.dtype, np.floating):
            array = array.round().clip(0, 255)
        return np.ascontiguousarray(array.astype(graph.dtype, copy=False))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": None}

    def __repr__(self) -> str:
        _, _, *options = signature(OnnxTeacher).parameters.values()
        values = [(each, getattr(self, each.name)) for each in options]
        given = [f"{each.name}={value!r}" for each, value in values if value != each.default]
        return f"OnnxTeacher({', '.join([repr(str(self.path)), repr(self.taps), *given])})"
