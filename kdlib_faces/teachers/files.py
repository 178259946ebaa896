"""Files of age-invariant teachers: writing, safe reading, and a description in text."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from kdlib_faces._checks import InputError
from kdlib_faces._weights import Weights, read_weights
from kdlib_faces.backbones import Backbone, build_backbone, load_backbone, save_backbone
from kdlib_faces.backbones.checkpoints.describe import find_differences, list_differences, with_header
from kdlib_faces.backbones.checkpoints.load import load_values
from kdlib_faces.backbones.checkpoints.save import write_weights
from kdlib_faces.teachers.age_attention import AttentiveAgeNet
from kdlib_faces.teachers.age_invariant import AgeInvariantNet
from kdlib_faces.teachers.input_options import InputOptions

__all__ = ["TeacherNet", "describe_teacher", "load_teacher", "save_teacher"]

TeacherNet: TypeAlias = Backbone | AgeInvariantNet | AttentiveAgeNet
"""A network that can be a teacher: `(b, 3, h, w)` images to `(b, d)` embeddings, with taps in `stages`."""

FORMAT = 1
KEY = "kdlib_faces_teacher"
# Name in the file: class, its option, and how it removes age.
KINDS: dict[str, tuple[type[AgeInvariantNet] | type[AttentiveAgeNet], str, str]] = {
    "dal": (AgeInvariantNet, "gain", "age branch subtracted from the embedding"),
    "mtlface": (AttentiveAgeNet, "initial_bias", "attended age part subtracted from the last map"),
}


def save_teacher(
    model: TeacherNet, path: str | os.PathLike[str], *, training: Mapping[str, object] | None = None
) -> None:
    """Write an age-invariant teacher or a plain backbone to a file, atomically.

    The file of an age-invariant teacher holds its backbone and the parts that remove age.

    Args:
        model: The teacher.
        path: The file to write, safetensors if it has this suffix.
        training: Summary of the training for the header, as values of JSON.

    Raises:
        TypeError: The model is another kind of module.
        InputError: The file cannot be written.

    Examples:
        >>> import tempfile
        >>> teacher = AgeInvariantNet(build_backbone("mobilefacenet", embedding_dim=8, width=0.25, input_size=32)).eval()
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_teacher(teacher, f"{folder}/teacher.safetensors")
        ...     again = load_teacher(f"{folder}/teacher.safetensors")
        >>> bool(torch.equal(again(images), teacher(images)))
        True
    """
    if isinstance(model, Backbone):
        save_backbone(model, path, training=training)
        return
    kind = next((name for name, (cls, _, _) in KINDS.items() if type(model) is cls), None)
    if kind is None:
        raise TypeError(
            f"save_teacher: model must be an age-invariant teacher or a backbone, got {type(model).__name__}"
        )
    backbone, option = model.backbone, KINDS[kind][1]
    header = {
        KEY: FORMAT,
        "kind": kind,
        "options": {option: getattr(model, option)},
        "backbone": backbone.family,
        "arguments": backbone.arguments,
        "input": backbone.input_spec.fields(),
        "embedding_dim": model.embedding_dim,
        **({} if training is None else {"training": dict(training)}),
    }
    write_weights("save_teacher", path, KEY, header, model.state_dict())


def load_teacher(path: str | os.PathLike[str]) -> TeacherNet:
    """Read a file of `save_teacher`, or any checkpoint that `load_backbone` reads.

    Args:
        path: The file.

    Returns:
        The network on the CPU in eval mode.

    Raises:
        InputError: As `load_backbone`, or the parts of a teacher file do not fit each other.

    Examples:
        >>> import tempfile
        >>> backbone = build_backbone("mobilefacenet", embedding_dim=8, width=0.25, input_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_teacher(AgeInvariantNet(backbone), f"{folder}/teacher.safetensors")
        ...     teacher = load_teacher(f"{folder}/teacher.safetensors")
        >>> type(teacher).__name__, teacher(torch.zeros(2, 3, 32, 32)).shape
        ('AgeInvariantNet', torch.Size([2, 8]))
    """
    file = _read(path)
    return load_backbone(path) if file is None else _build(path, file[1])


def describe_teacher(path: str | os.PathLike[str], input_options: InputOptions | None = None) -> str | None:
    """Describe a file of `save_teacher` in lines of text; None for any other file.

    Args:
        path: The file.
        input_options: Input options, which override those of the file.

    Returns:
        Rows of a name and a value, or None.

    Raises:
        InputError: The parts of a teacher file do not fit each other.
    """
    file = _read(path)
    if file is None:
        return None
    weights, content = file
    model, kind = _build(path, content), str(content["kind"])
    rows = {
        "file": f"{weights.kind}, {weights.size:,} bytes",
        "layout": f"kdlib_faces teacher, {kind}: {KINDS[kind][2]}",
        "network": repr(model.backbone) if kind == "dal" else str(content["backbone"]),
        "input": (input_options or InputOptions()).applied_to(model.input_spec).describe(),
        "output": f"(b, {model.embedding_dim}), not normalized",
        "parameters": f"{sum(each.numel() for each in model.parameters()):,}",
        "taps": ", ".join(model.stages),
        "weights": "complete, all finite",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def _read(path: str | os.PathLike[str]) -> tuple[Weights, Mapping[str, object]] | None:
    """A teacher file and its entries; None for any other file, whose errors `load_backbone` reports."""
    try:
        weights = read_weights("load_teacher", Path(path))
        content = with_header("load_teacher", weights, KEY)
    except InputError:
        return None
    return (weights, content) if KEY in content else None


def _build(path: str | os.PathLike[str], content: Mapping[str, object]) -> AgeInvariantNet | AttentiveAgeNet:
    """The teacher that the content describes, with its weights."""
    owner = f"load_teacher: {os.fspath(path)}"
    if content[KEY] != FORMAT:
        raise InputError(f"{owner} is of format {content[KEY]!r}; this version reads format {FORMAT}")
    kind, name, arguments, options, state = (
        content.get(key) for key in ("kind", "backbone", "arguments", "options", "state")
    )
    names = isinstance(kind, str) and isinstance(name, str)
    if not (names and isinstance(arguments, dict) and isinstance(options, dict) and isinstance(state, dict)):
        raise InputError(f"{owner} must hold 'kind', 'backbone' (names), 'arguments', 'options' and 'state' (dicts)")
    if kind not in KINDS:
        raise InputError(f"{owner} is a teacher of kind {kind!r}; this version reads {', '.join(KINDS)}")
    cls, option, _ = KINDS[kind]
    unknown = [*({"seed"} & set(arguments)), *(set(options) - {option})]
    if unknown:
        raise InputError(f"{owner} has unknown arguments: {', '.join(map(repr, unknown))}")
    try:
        with torch.device("meta"):  # the sizes in the file are not trusted: nothing is allocated for them
            model = cls(build_backbone(str(name), **arguments), **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{owner} does not describe a teacher: {' '.join(str(error).split())[:300]}") from error
    values = {str(key): value for key, value in state.items()}
    keys = {key: key for key in model.state_dict()}
    differences = find_differences(model.state_dict(), keys, values)
    if differences:
        raise InputError(f"{owner} does not fit its own description; {list_differences(differences)}")
    load_values(owner, model, keys, values, Path(path).stat().st_size)
    if isinstance(fields := content.get("input"), dict):
        try:
            model.backbone.input_spec = replace(model.backbone.input_spec, **fields)
        except (TypeError, ValueError) as error:
            raise InputError(f"{owner} does not describe its images: {error}") from error
    return model.eval()
