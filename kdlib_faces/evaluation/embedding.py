"""Evaluation room: a model and images to embeddings, in batches. The one file of the room that runs torch, loaded when called."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kdlib._checks import check_number
from kdlib_faces.evaluation._checks import require, to_numpy
from kdlib_faces.evaluation.protocol import EvaluationProtocol, R, evaluate
from kdlib_faces.progress import progress as show

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["embed_batch", "embed_images", "eval_mode", "evaluate_images"]

OWNER = "embed_images"


def embed_images(
    model: Callable[..., Any],
    images: Any,
    *,
    flip: bool = True,
    normalize: bool = True,
    batch_size: int = 64,
    preprocess: "Callable[[Tensor], Tensor] | None" = None,
    device: Any = "cpu",
    out: npt.NDArray[Any] | None = None,
    progress: bool = False,
) -> npt.NDArray[Any]:
    """Embeddings of images with the flip test: f(x) + f(mirrored x) as the model gives them, then one L2 norm.

    Images are taken as uint8, a batch at a time, from memory, a memory map or an iterator, so that memory does not grow
    with their number beyond the embeddings themselves; with `out`, not even by those. The model is put in eval mode
    while it runs, each of its modules back into its own afterwards.

    Args:
        model: (b, c, h, w) tensor to (b, d) tensor, or to named features with one `"embedding"`. One with an
            `input_spec`, as backbones have, gets its images by it.
        images: (n, c, h, w) uint8 array, memory map or tensor; or a sequence or iterator of such batches, of any sizes.
        flip: add the mirrored image's embedding before the norm.
        normalize: make rows unit at the end; templates want False.
        batch_size: images in one forward.
        preprocess: (b, c, h, w) uint8 tensor to what the model takes, in place of (x - 127.5) / 127.5 and its
            `input_spec`. Some weights want BGR (AdaFace) or another scale: where the model does not say so itself, it
            is said here.
        device: where the model is.
        out: (n, d) array or memory map to write into, in place of a new float32 array.
        progress: show how far it is.

    Returns:
        (n, d) embeddings, float32, or `out`.

    Raises:
        ValueError: images that are not uint8, an embedding that is not finite or, with `normalize`, zero: its row is
            named, and the model's modes are restored.

    Examples:
        >>> pixels = np.arange(5 * 3 * 2 * 2, dtype=np.uint8).reshape(5, 3, 2, 2)
        >>> rows = embed_images(lambda x: x.flatten(1), pixels, batch_size=2)
        >>> rows.shape, np.allclose(np.linalg.norm(rows, axis=1), 1)
        ((5, 12), True)
    """
    import torch

    check_number(OWNER, "batch_size", batch_size, min=1, integer=True)
    parts: list[npt.NDArray[np.float32]] = []
    given, done = out, 0
    total = getattr(images, "shape", (None,))[0]
    batches = None if total is None else -(-total // batch_size)
    label = "embeddings" if total is None else f"embeddings of {total} images, batches"
    with eval_mode(model):
        for batch in show(_batches(images, batch_size), label, total=batches, quiet=not progress):
            block = embed_batch(model, torch.from_numpy(batch).to(device), flip=flip, preprocess=preprocess)
            _check(block, done, normalize)
            if normalize:
                block = (block / np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
            if out is None and total is not None:
                out = np.empty((total, block.shape[1]), dtype=np.float32)
            if out is None:
                parts.append(block)
            else:
                require(
                    out.ndim == 2 and out.shape[1] == block.shape[1] and done + len(block) <= out.shape[0],
                    OWNER,
                    f"out must be (n, {block.shape[1]}) with a row for each image, got {out.shape}",
                )
                out[done : done + len(block)] = block
            done += len(block)
    require(done > 0, OWNER, "images must hold one, got none")
    if out is None:
        return np.concatenate(parts)
    if given is None:
        return out
    require(done == out.shape[0], OWNER, f"out must have one row for each of {done} images, got {out.shape[0]}")
    return out


def embed_batch(
    model: Callable[..., Any],
    pixels: "Tensor",
    *,
    flip: bool = True,
    preprocess: "Callable[[Tensor], Tensor] | None" = None,
) -> npt.NDArray[np.float32]:
    """What `embed_images` makes of one batch before the norm; the model's mode is left as it is.

    Args:
        model: see `embed_images`.
        pixels: (b, c, h, w) uint8, where the model is.
        flip: see `embed_images`.
        preprocess: see `embed_images`.

    Returns:
        (b, d) float32.
    """
    import torch

    with torch.inference_mode():
        if preprocess is None:
            inputs = pixels.float().sub_(127.5).div_(127.5)
            spec = getattr(model, "input_spec", None)
            inputs = inputs if spec is None else spec(inputs)
        else:
            inputs = preprocess(pixels)
        rows = _rows(model(inputs), len(pixels))
        if flip:
            rows = rows + _rows(model(inputs.flip(-1)), len(pixels))
        found: npt.NDArray[np.float32] = rows.float().cpu().numpy()
        return found


def evaluate_images(model: Callable[..., Any], images: Any, protocol: EvaluationProtocol[R], **options: Any) -> R:
    """Evaluate a model on images by a protocol: `evaluate(embed_images(model, images, ...), protocol)`.

    Args:
        model: see `embed_images`.
        images: see `embed_images`.
        protocol: see `evaluate`.
        options: of `embed_images`.

    Returns:
        The protocol's result.

    Examples:
        >>> from kdlib_faces.evaluation import LeaveOneOutProtocol
        >>> pixels = np.full((4, 1, 2, 2), 255, dtype=np.uint8)
        >>> pixels[2:, :, 0] = 0
        >>> evaluate_images(lambda x: x.flatten(1), pixels, LeaveOneOutProtocol([0, 0, 1, 1], ranks=(1,))).rates[1].value
        1.0
    """
    return evaluate(embed_images(model, images, **options), protocol)


def _batches(images: Any, batch_size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """uint8 batches (at most batch_size, c, h, w), copied, so that a read-only memory map can be given."""
    whole = hasattr(images, "shape") and len(images.shape) == 4
    chunks: Iterable[Any] = [images] if whole else images
    shape = None
    for number, chunk in enumerate(chunks):
        array = chunk if isinstance(chunk, np.ndarray) else to_numpy(chunk)
        what = "images" if whole else f"images, batch {number},"
        if array.dtype != np.uint8:
            raise TypeError(f"{OWNER}: {what} must be uint8, got dtype {array.dtype}")
        require(array.ndim == 4, OWNER, f"{what} must be (b, c, h, w), got {array.shape}")
        shape = array.shape[1:] if shape is None else shape
        require(array.shape[1:] == shape, OWNER, f"{what} must be (b, {', '.join(map(str, shape))}), got {array.shape}")
        for start in range(0, len(array), batch_size):
            yield np.array(array[start : start + batch_size])


def _rows(output: Any, count: int) -> "Tensor":
    if isinstance(output, Mapping):
        require("embedding" in output, OWNER, f"the model must return 'embedding', got {', '.join(map(repr, output))}")
        output = output["embedding"]
    shape = tuple(output.shape) if hasattr(output, "shape") else type(output).__name__
    require(
        isinstance(shape, tuple) and len(shape) == 2 and shape[0] == count,
        OWNER,
        f"the model must return embeddings ({count}, d), got {shape}",
    )
    return output  # type: ignore[no-any-return]  # a tensor, as its shape says


def _check(block: npt.NDArray[np.float32], offset: int, normalize: bool) -> None:
    bad = np.flatnonzero(~np.isfinite(block).all(axis=1))
    require(bad.size == 0, OWNER, f"embeddings must be finite, got image {offset + bad[:1].sum()} that is not")
    zero = np.flatnonzero(~block.any(axis=1))
    require(
        zero.size == 0 or not normalize,
        OWNER,
        f"embeddings must be non-zero to be made unit, got image {offset + zero[:1].sum()} that is not",
    )


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Every module in eval mode inside, and as it was afterwards, also after an error."""
    modules = list(model.modules()) if hasattr(model, "modules") else []
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
