"""Saving of backbones to files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from kdlib._atomic import atomic_write
from kdlib_faces._checks import InputError
from kdlib_faces.backbones.checkpoints.describe import FORMAT, OWN_KEY
from kdlib_faces.backbones.checkpoints.narrow import removed_modules
from kdlib_faces.backbones.networks.base import Backbone

__all__ = ["save_backbone", "write_weights"]


def save_backbone(
    model: Backbone, path: str | os.PathLike[str], *, training: Mapping[str, object] | None = None
) -> None:
    """Write a backbone with its name, arguments and `input_spec`, atomically, to a file for `load_backbone`.

    Args:
        model: a backbone of this package, or a narrower copy of one by `kdlib.compression.shrink`.
        path: the file. The suffix `.safetensors` writes safetensors, which readers without PyTorch open too; any other
            suffix writes a PyTorch file.
        training: summary of the training for the header, as values of JSON.

    Raises:
        TypeError: `model` is another kind of module; save its `state_dict()` with torch instead.
        InputError: the file cannot be written.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.backbones import build_backbone, load_backbone
        >>> student = build_backbone("mobilefacenet", embedding_dim=64, width=0.25, input_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_backbone(student, f"{folder}/student.safetensors")
        ...     load_backbone(f"{folder}/student.safetensors")
        MobileFaceNet(embedding_dim=64, width=0.25, input_size=32)
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"save_backbone: model must be a kdlib_faces backbone, got {type(model).__name__}")
    header: dict[str, object] = {
        OWN_KEY: FORMAT,
        "backbone": model.family,
        "arguments": model.arguments,
        "input": model.input_spec.fields(),
        "embedding_dim": model.embedding_dim,
        **({} if training is None else {"training": dict(training)}),
    }
    removed = removed_modules(model)
    if removed is not None:
        header["removed"] = removed
    write_weights("save_backbone", path, OWN_KEY, header, model.state_dict())


def write_weights(
    owner: str, path: str | os.PathLike[str], key: str, header: Mapping[str, object], state: Mapping[str, Tensor]
) -> None:
    """Write tensors and a header atomically; in a safetensors file, the header is the JSON of the metadata entry `key`."""
    target = Path(path)
    values = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    try:
        with atomic_write(target, durable=True) as file:
            if target.suffix == ".safetensors":
                file.write(to_safetensors(values, {key: json.dumps(header)}))
            else:
                torch.save({**header, "state": values}, file)
    except OSError as error:
        raise InputError(f"{owner}: cannot write {target}: {error.strerror or error}") from error
