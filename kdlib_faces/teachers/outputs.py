"""Teachers room: what a teacher says of every training image, computed once. Touches one folder of `.npy` files.

Row `i` of each file holds image i, plain and mirrored. The files are memory-mapped, written block by block, and a small JSON
beside them counts the finished blocks, so that a run that was killed goes on at the block where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from kdlib_faces._checks import InputError
from kdlib_faces.data.images import to_float

__all__ = ["RecordedTeacher", "record", "weights_fingerprint"]

_BLOCK = 256


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's state: names, shapes and values.

    Examples:
        >>> weights_fingerprint(nn.Identity())[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class RecordedTeacher(nn.Module):
    """Stands where a teacher stands, and looks its outputs up.

    Args:
        arrays: feature name to an array `(n, 2, ...)`: image, then plain and mirrored.

    Attributes:
        reads: the targets that name what to look up: the image's row, and 1 where it is mirrored.

    Examples:
        >>> teacher = RecordedTeacher({"embedding": np.arange(8, dtype=np.float16).reshape(2, 2, 2)})
        >>> teacher(torch.tensor([1]), torch.tensor([0]))["embedding"]
        tensor([[4., 5.]])
    """

    reads = ("sample", "view")

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.arrays = arrays

    def forward(self, sample: Tensor, view: Tensor) -> dict[str, Tensor]:
        """Features of the images `sample` as seen in `view`, float32."""
        rows, side = sample.cpu().numpy(), view.cpu().numpy()
        for name, array in self.arrays.items():
            if len(rows) and (rows.min() < 0 or rows.max() >= len(array)):
                raise InputError(f"RecordedTeacher: no sample {int(rows.max())} in {name!r}, which has {len(array)}")
        return {
            name: torch.from_numpy(np.asarray(array[rows, side], dtype=np.float32)).to(sample.device)
            for name, array in self.arrays.items()
        }


def record(
    teacher: Callable[[Tensor], Any],
    images: Tensor,
    folder: str | os.PathLike[str],
    *,
    fingerprint: str,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] | None = None,
    label: str = "teacher outputs",
) -> RecordedTeacher:
    """Run a teacher over all images, plain and mirrored, or go on where an earlier run was stopped.

    Args:
        teacher: images `(b, 3, h, w)` in [-1, 1] to named features.
        images: `(n, 3, h, w)` uint8.
        folder: of this teacher and these images alone.
        fingerprint: what the outputs depend on beside the images: weights, taps, preprocessing.
        progress: wraps an iterable and a label.
        label: shown while it runs.

    Returns:
        The recorded teacher; float16 on disk.

    Raises:
        InputError: the folder holds outputs of another teacher or other images, or an output is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(str(tuple(images.shape)).encode())
    digest.update(images[:: max(1, len(images) // 512)].contiguous().numpy().tobytes())
    key, note = digest.hexdigest(), folder / "record.json"
    state: dict[str, Any] = {"fingerprint": key, "done": 0, "shapes": {}}
    if note.exists():
        try:
            state = json.loads(note.read_text())
        except ValueError as error:
            raise InputError(
                f"{note} is not readable ({error}); remove the folder to compute the outputs anew"
            ) from None
        if state.get("fingerprint") != key:
            raise InputError(
                f"{folder} holds the outputs of another teacher or of other images; remove it or use another output"
            )
    starts = range(int(state["done"]), len(images), _BLOCK)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in state["shapes"]}
    for start in progress(starts, label) if progress is not None and len(starts) else starts:
        pixels = to_float(images[start : start + _BLOCK])
        with torch.no_grad():
            both = [teacher(pixels), teacher(pixels.flip(3))]
        for name in both[0]:
            block = torch.stack([view[name].float() for view in both], dim=1)
            if not torch.isfinite(block).all():
                raise InputError(f"{label}: {name!r} is not finite for images {start} to {start + len(block) - 1}")
            if name not in arrays:
                shape = (len(images), *block.shape[1:])
                arrays[name] = open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
                state["shapes"][name] = list(shape)
            arrays[name][start : start + len(block)] = block.clamp(-65504, 65504).numpy()
        for array in arrays.values():
            array.flush()
        state["done"] = start + len(pixels)
        part = note.with_suffix(".part")
        part.write_text(json.dumps(state))
        os.replace(part, note)
    return RecordedTeacher({name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in state["shapes"]})
