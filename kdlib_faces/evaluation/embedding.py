"""From images to embeddings: batches, mirrored images and normalization."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, TypeAlias, TypedDict, Unpack, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kdlib._modes import eval_mode
from kdlib_faces.evaluation._checks import check_each, check_whole, require, to_numpy
from kdlib_faces.evaluation._types import AnyArray, SingleArray
from kdlib_faces.evaluation.protocol import EvaluationProtocol, R, evaluate
from kdlib_faces.progress import progress as show

OWNER = "embed_images"
EmbeddingModel: TypeAlias = Callable[[Tensor], Tensor | Mapping[str, Tensor]]
"""(b, c, h, w) to (b, d), or to named features with one `"embedding"`."""
Images: TypeAlias = AnyArray | Tensor | Iterable[AnyArray | Tensor]
Preprocess: TypeAlias = Callable[[Tensor], Tensor]


class _EmbedOptions(TypedDict, total=False):
    """Keyword arguments of `embed_images`, described there."""

    flip: bool
    normalize: bool
    batch_size: int
    preprocess: Preprocess | None
    device: torch.device | str
    out: AnyArray | None
    progress: bool


@runtime_checkable
class _HasInputSpec(Protocol):
    """A model that states how it takes images, as backbones do."""

    input_spec: Preprocess | None


def embed_images(
    model: EmbeddingModel,
    images: Images,
    *,
    flip: bool = True,
    normalize: bool = True,
    batch_size: int = 64,
    preprocess: Preprocess | None = None,
    device: torch.device | str = "cpu",
    out: AnyArray | None = None,
    progress: bool = False,
) -> AnyArray:
    """Embeddings of images with the flip test: f(x) + f(mirrored x) as the model returns them, then L2 normalization.

    Images are uint8 and read in batches from memory, a memory map or an iterator, so that memory does not grow with their
    number beyond the embeddings themselves, and with `out` not even by those. The model is in eval mode while it runs;
    the mode of each of its modules is restored afterwards.

    Args:
        model: (b, c, h, w) tensor to (b, d) tensor, or to named features with one `"embedding"`. Images for a model with
            an `input_spec`, as backbones have, are converted by it.
        images: (n, c, h, w) uint8 array, memory map or tensor; or a sequence or iterator of such batches, of any sizes.
        flip: Add the mirrored image's embedding before normalization.
        normalize: Normalize rows; templates need False.
        batch_size: Images in one forward.
        preprocess: (b, c, h, w) uint8 tensor to the model's input, instead of (x - 127.5) / 127.5 and its `input_spec`.
            Some weights need BGR (AdaFace) or another scale; use it if the model does not declare this itself.
        device: Device of the model.
        out: (n, d) array or memory map to write to, instead of a new float32 array.
        progress: Show progress.

    Returns:
        (n, d) embeddings, float32, or `out`.

    Raises:
        ValueError: Images are not uint8, or an embedding is not finite or, with `normalize`, zero (the message gives its
            row).

    Examples:
        >>> pixels = np.arange(5 * 3 * 2 * 2, dtype=np.uint8).reshape(5, 3, 2, 2)
        >>> rows = embed_images(lambda x: x.flatten(1), pixels, batch_size=2)
        >>> rows.shape, np.allclose(np.linalg.norm(rows, axis=1), 1)
        ((5, 12), True)
    """
    batch_size = check_whole(OWNER, "batch_size", batch_size, min=1)
    if out is not None and out.dtype.kind != "f":
        raise TypeError(f"{OWNER}: out must be an array of floating-point numbers, got dtype {out.dtype}")
    parts: list[SingleArray] = []
    target, done = out, 0
    total = len(images) if isinstance(images, (np.ndarray, Tensor)) else None
    batches = None if total is None else -(-total // batch_size)
    label = "embeddings" if total is None else f"embeddings of {total} images, batches"
    with eval_mode(model):
        for batch in show(_batches(images, batch_size), label, total=batches, quiet=not progress):
            block = embed_batch(model, torch.from_numpy(batch).to(device), flip=flip, preprocess=preprocess)
            check_each(OWNER, "embeddings", np.isfinite(block).all(axis=1), "finite", "image", done)
            if normalize:
                check_each(OWNER, "embeddings", block.any(axis=1), "non-zero to be normalized", "image", done)
                block = (block / np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
            if target is None and total is not None:
                target = np.empty((total, block.shape[1]), dtype=np.float32)
            if target is None:
                parts.append(block)
            else:
                fits = target.ndim == 2 and target.shape[1] == block.shape[1] and done + len(block) <= len(target)
                wanted = f"(n, {block.shape[1]}) with a row for each image"
                require(fits, OWNER, f"out must be {wanted}, got {target.shape}")
                with np.errstate(over="ignore"):
                    target[done : done + len(block)] = block
                held = np.isfinite(target[done : done + len(block)]).all(axis=1)
                check_each(OWNER, f"embeddings as {target.dtype}", held, "finite", "image", done)
            done += len(block)
    require(done > 0, OWNER, "images must hold one, got none")
    target = np.concatenate(parts) if target is None else target
    require(done == len(target), OWNER, f"out must have one row for each of {done} images, got {len(target)}")
    return target


def embed_batch(
    model: EmbeddingModel, pixels: Tensor, *, flip: bool = True, preprocess: Preprocess | None = None
) -> SingleArray:
    """Embeddings (b, d), float32, before normalization, of uint8 images (b, c, h, w) on the device of the model.

    The arguments are those of `embed_images`; the model's mode is not changed.
    """
    with torch.inference_mode():
        if preprocess is None:
            inputs = pixels.float().sub_(127.5).div_(127.5)
            spec = model.input_spec if isinstance(model, _HasInputSpec) else None
            inputs = inputs if spec is None else spec(inputs)
        else:
            inputs = preprocess(pixels)
        rows = _rows(model(inputs), len(pixels))
        if flip:
            rows = rows + _rows(model(inputs.flip(-1)), len(pixels))
        embeddings: SingleArray = rows.float().cpu().numpy()
        return embeddings


def evaluate_images(
    model: EmbeddingModel, images: Images, protocol: EvaluationProtocol[R], **options: Unpack[_EmbedOptions]
) -> R:
    """Evaluate a model on images by a protocol: `evaluate(embed_images(model, images, ...), protocol)`.

    Args:
        model: See `embed_images`.
        images: See `embed_images`.
        protocol: See `evaluate`.
        options: Options of `embed_images`.

    Returns:
        The result of the protocol.

    Raises:
        ValueError: As `embed_images` and `evaluate`.

    Examples:
        >>> from kdlib_faces.evaluation import LeaveOneOutProtocol
        >>> pixels = np.full((4, 1, 2, 2), 255, dtype=np.uint8)
        >>> pixels[2:, :, 0] = 0
        >>> evaluate_images(lambda x: x.flatten(1), pixels, LeaveOneOutProtocol([0, 0, 1, 1], ranks=(1,))).rates[1].value
        1.0
    """
    return evaluate(embed_images(model, images, **options), protocol)


def _batches(images: Images, batch_size: int) -> Iterator[AnyArray]:
    """uint8 batches (at most batch_size, c, h, w), copied, so that a read-only memory map can be given."""
    whole = isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4
    shape = None
    for number, chunk in enumerate([images] if whole else images):
        array = to_numpy(chunk)
        what = "images" if whole else f"images, batch {number},"
        if array.dtype != np.uint8:
            raise TypeError(f"{OWNER}: {what} must be uint8, got dtype {array.dtype}")
        require(array.ndim == 4, OWNER, f"{what} must be (b, c, h, w), got {array.shape}")
        shape = array.shape[1:] if shape is None else shape
        require(array.shape[1:] == shape, OWNER, f"{what} must be (b, {', '.join(map(str, shape))}), got {array.shape}")
        for start in range(0, len(array), batch_size):
            yield np.array(array[start : start + batch_size])


def _rows(output: Tensor | Mapping[str, Tensor], count: int) -> Tensor:
    if isinstance(output, Mapping):
        require("embedding" in output, OWNER, f"the model must return 'embedding', got {', '.join(map(repr, output))}")
        output = output["embedding"]
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    good = isinstance(shape, tuple) and len(shape) == 2 and shape[0] == count
    require(good, OWNER, f"the model must return embeddings ({count}, d), got {shape}")
    return output
