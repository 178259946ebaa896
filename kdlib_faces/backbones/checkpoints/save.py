"""Saving of backbones to files."""

import json
import os
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as to_safetensors

from kdlib._atomic import atomic_write
from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces.backbones.checkpoints.describe import FORMAT
from kdlib_faces.backbones.checkpoints.narrow import removed_modules
from kdlib_faces.backbones.networks.base import Backbone

__all__ = ["save_backbone"]


def save_backbone(
    model: Backbone, path: str | os.PathLike[str], *, format: Literal["torch", "safetensors"] = "torch"
) -> None:
    """Write a backbone with its name, arguments and `input_spec`, atomically, to a file for `load_backbone`.

    Args:
        model: a backbone of this package, or a narrower copy of one by `kdlib.compression.shrink`.
        path: the file.
        format: `"torch"`, or `"safetensors"` for readers without PyTorch.

    Raises:
        TypeError: `model` is another kind of module; save its `state_dict()` with torch instead.
        ValueError: unknown format.
        InputError: the file cannot be written.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.backbones import build_backbone, load_backbone
        >>> student = build_backbone("mobilefacenet", embedding_dim=64, width=0.25, input_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_backbone(student, f"{folder}/student.pt")
        ...     load_backbone(f"{folder}/student.pt")
        MobileFaceNet(embedding_dim=64, width=0.25, input_size=32)
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"save_backbone: model must be a kdlib_faces backbone, got {type(model).__name__}")
    check_choice("save_backbone", "format", format, ("torch", "safetensors"))
    target = Path(path)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    spec = model.input_spec
    header: dict[str, object] = {
        "kdlib_faces": FORMAT,
        "backbone": model.family,
        "arguments": model.arguments,
        "input": {
            "color": spec.color,
            "mean": spec.mean,
            "scale": spec.scale,
            "normalized": spec.normalized,
            "assumed": list(spec.assumed),
        },
    }
    removed = removed_modules(model)
    if removed is not None:
        header["removed"] = removed
    try:
        with atomic_write(target, durable=True) as file:
            if format == "torch":
                torch.save({**header, "state": state}, file)
            else:
                file.write(to_safetensors(state, {"kdlib_faces": json.dumps(header)}))
    except OSError as error:
        raise InputError(f"save_backbone: cannot write {target}: {error.strerror or error}") from error
