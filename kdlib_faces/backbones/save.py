"""Backbones room: networks to files. Writes one file, whole or not at all."""

import json
import os
from pathlib import Path
from typing import Literal

import torch

from kdlib._checks import check_choice
from kdlib_faces._checks import InputError
from kdlib_faces._safetensors import write_safetensors
from kdlib_faces.backbones.registry import Backbone

__all__ = ["save_backbone"]

FORMAT = 2


def save_backbone(
    model: Backbone, path: str | os.PathLike[str], *, format: Literal["torch", "safetensors"] = "torch"
) -> None:
    """Write a backbone with its name, arguments and `input_spec`, so that `load_backbone` needs the file alone.

    The file appears whole or not at all: it is written beside its place and moved there.

    Args:
        model: one of our own backbones.
        path: the file; its folder must exist.
        format: `"torch"`, or `"safetensors"` for readers without PyTorch.

    Raises:
        TypeError: another kind of module; save its `state_dict()` with torch.
        ValueError: an unknown format.
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
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    spec = model.input_spec
    told = {
        "kdlib_faces": FORMAT,
        # A name for one depth does not take the depth as an argument.
        "backbone": getattr(model, "family", model.name),
        "arguments": model.arguments,
        "input": {
            "color": spec.color,
            "mean": spec.mean,
            "scale": spec.scale,
            "normalized": spec.normalized,
            "assumed": list(spec.assumed),
        },
    }
    try:
        with part.open("wb") as file:
            if format == "torch":
                torch.save({**told, "state": state}, file)
            else:
                write_safetensors(file, state, {"kdlib_faces": json.dumps(told)})
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise InputError(f"save_backbone: cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
