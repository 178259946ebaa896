"""Outputs of a teacher for all training images, plain and mirrored, computed once and cached on disk."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlib.cache import CachedTeacher, CacheError, Fingerprint, TeacherCache, model_fingerprint
from kdlib_faces._checks import InputError, describe_error
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.images import to_float
from kdlib_faces.progress import progress_to

__all__ = ["cache_outputs", "read_outputs"]

_BATCH = 128


def cache_outputs(
    teacher: nn.Module,
    images: Tensor | FaceImages,
    folder: str | os.PathLike[str],
    *,
    fingerprint: str | None = None,
    label: str = "teacher outputs",
    quiet: bool = True,
    device: torch.device | None = None,
) -> CachedTeacher:
    """Run a teacher over all images, plain and mirrored, and resume an interrupted run.

    Args:
        teacher: Images `(b, 3, h, w)` in [-1, 1] to named features.
        images: `(n, 3, h, w)` uint8.
        folder: Folder of the cache, for this teacher and these images only.
        fingerprint: Text that identifies the weights, taps and preprocessing of the teacher; None derives it from the
            weights and taps.
        label: Text of the progress bar.
        quiet: Show no progress.
        device: Device to which the teacher is moved; None leaves it on the CPU.

    Returns:
        A teacher that reads the cache, float16 on disk. Sample `i` is image `i`; view 1 is the mirrored image.

    Raises:
        InputError: The folder holds outputs of another teacher or other images, or an output is not finite.

    Examples:
        >>> import tempfile
        >>> class Mean(nn.Module):
        ...     def forward(self, images):
        ...         return {"embedding": images.mean((2, 3))}
        >>> images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache_outputs(Mean(), images, folder)(torch.tensor([1]), torch.tensor([0]))["embedding"]
        tensor([[1., 1., 1.]])
    """
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images[torch.arange(0, len(images), max(1, len(images) // 512))].contiguous().numpy().tobytes())
    data, weights = digest.hexdigest(), fingerprint or model_fingerprint(teacher)

    def fetch(samples: Tensor, view: int) -> Tensor:
        pixels = to_float(images[samples])
        return (pixels.flip(3) if view else pixels).to(device)

    teacher.to(device)
    with progress_to(label, quiet=quiet) as show:
        try:
            cache = TeacherCache.build(
                Path(folder),
                teacher,
                fetch,
                samples=len(images),
                views=2,
                fingerprint=Fingerprint(weights, "", data),
                batch_size=_BATCH,
                progress=show,
            )
        except CacheError as error:
            raise InputError(f"{Path(folder)}: {error}") from error
        except ValueError as error:
            raise InputError(f"{label}: {describe_error(error)}") from error
    return CachedTeacher(cache)


def read_outputs(
    teacher: Callable[[Tensor, Tensor], dict[str, Tensor]], name: str, samples: Tensor, view: int = 0
) -> Tensor:
    """Read one feature of many cached images, in blocks.

    Args:
        teacher: A teacher of `cache_outputs`, or a `MappedTeacher` on one.
        name: Name of the feature.
        samples: `(n,)` int64 ids of the images.
        view: 1 for the mirrored images.

    Returns:
        `(n, ...)` float32.

    Examples:
        >>> def teacher(samples, view):
        ...     return {"embedding": samples[:, None] + 0.5 * view[:, None]}
        >>> read_outputs(teacher, "embedding", torch.arange(3), view=1).flatten()
        tensor([0.5000, 1.5000, 2.5000])
    """
    parts = [teacher(part, torch.full_like(part, view))[name] for part in torch.split(samples, _BATCH)]
    return torch.cat(parts)
