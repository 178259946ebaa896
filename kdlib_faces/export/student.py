"""Saving of a trained student."""

import os
from collections.abc import Mapping
from pathlib import Path

from kdlib.distiller import Distiller
from kdlib_faces._checks import InputError
from kdlib_faces.teachers import TeacherNet, save_teacher

__all__ = ["save_student"]


def save_student(
    model: TeacherNet | Distiller, path: str | os.PathLike[str], *, training: Mapping[str, object] | None = None
) -> Path:
    """Write a student to a safetensors file that every command and `load_backbone` read.

    The header holds the name and the arguments of the network, its input specification, the embedding dimension, the
    training summary and, for a network made narrower, its removed modules. Nothing in the file is a pickle.

    Args:
        model: A backbone, an age-invariant teacher, or a distiller whose student is one of them.
        path: The `.safetensors` file.
        training: Summary of the training, as values of JSON.

    Returns:
        The path.

    Raises:
        TypeError: The model is another kind of module.
        InputError: The path has another suffix, or cannot be written.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.backbones import MobileFaceNet, load_backbone
        >>> student = MobileFaceNet(embedding_dim=16, width=0.25, input_size=32)
        >>> file = Path(tempfile.mkdtemp()) / "student.safetensors"
        >>> load_backbone(save_student(student, file))
        MobileFaceNet(embedding_dim=16, width=0.25, input_size=32)
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"save_student: path must end in .safetensors, got {os.fspath(path)}")
    network = model.student.model if isinstance(model, Distiller) else model
    save_teacher(network, path, training=training)  # type: ignore[arg-type]  # checked there
    return Path(path)
