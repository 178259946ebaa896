"""Teachers room: age-invariant teachers to files and back, whole or not at all. Reads by `weights_only=True` only.

A teacher is more than the backbone it was made from: the branch that takes age out of the embedding, or the attention that takes
it out of the last map, are part of what it says. Such a file holds all of it; a plain backbone is saved as one.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlib_faces._checks import InputError
from kdlib_faces._weights import read_weights
from kdlib_faces.backbones import Backbone, build_backbone, load_backbone, save_backbone
from kdlib_faces.teachers.age_attention import AttentiveAgeNet
from kdlib_faces.teachers.age_invariant import AgeInvariantNet

__all__ = ["describe_teacher", "load_pretrained", "load_teacher", "save_teacher"]

FORMAT = 1
KEY = "kdlib_faces_teacher"
KINDS: dict[str, tuple[type[nn.Module], str]] = {
    "dal": (AgeInvariantNet, "gain"),
    "mtlface": (AttentiveAgeNet, "start"),
}
LISTED = 5


def save_teacher(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write an `AgeInvariantNet`, an `AttentiveAgeNet` or a plain backbone with everything that its embedding needs.

    The file appears whole or not at all.

    Args:
        model: the teacher; its backbone must be one of ours.
        path: the file; its folder must exist.

    Raises:
        TypeError: another kind of module.
        InputError: the file cannot be written.

    Examples:
        >>> import tempfile
        >>> teacher = AgeInvariantNet(build_backbone("mobilefacenet", embedding_dim=8, width=0.25, input_size=32)).eval()
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_teacher(teacher, f"{folder}/teacher.pt")
        ...     again = load_teacher(f"{folder}/teacher.pt")
        >>> bool(torch.equal(again(images), teacher(images)))
        True
    """
    kind = next((name for name, (cls, _) in KINDS.items() if type(model) is cls), None)
    if kind is None:
        if not isinstance(model, Backbone):
            raise TypeError(
                f"save_teacher: model must be an age-invariant teacher or a backbone, got {type(model).__name__}"
            )
        save_backbone(model, path)
        return
    backbone: Any = model.backbone
    if not isinstance(backbone, Backbone):
        raise TypeError(f"save_teacher: the backbone must be a kdlib_faces backbone, got {type(backbone).__name__}")
    option = KINDS[kind][1]
    content = {
        KEY: FORMAT,
        "kind": kind,
        "options": {option: getattr(model, option)},
        "backbone": _family(backbone),
        "arguments": backbone.arguments,
        "input": _told(getattr(backbone, "input_spec", None)),
        "state": {key: value.detach().cpu() for key, value in model.state_dict().items()},
    }
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise InputError(f"save_teacher: cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def load_teacher(path: str | os.PathLike[str]) -> Any:
    """Read a teacher of `save_teacher`, or whatever `load_backbone` reads.

    Args:
        path: the file.

    Returns:
        The network on the CPU in eval mode, with `embedding_dim`, `input_size` and `stages`.

    Raises:
        InputError: as `load_backbone`; or a teacher's file whose parts do not fit each other.
    """
    owner = f"load_teacher: {os.fspath(path)}"
    content = _content(path)
    if content is None:
        return load_backbone(path)
    if content[KEY] != FORMAT:
        raise InputError(f"{owner} is of format {content[KEY]!r}; this version reads format {FORMAT}")
    keys = ("kind", "backbone", "arguments", "options", "state")
    parts: list[Any] = [content.get(key) for key in keys]
    kind, name, arguments, options, state = parts
    texts = isinstance(kind, str) and isinstance(name, str)
    if not texts or not all(isinstance(each, dict) for each in (arguments, options, state)):
        raise InputError(f"{owner} must hold 'kind', 'backbone' (names), 'arguments', 'options' and 'state' (dicts)")
    if kind not in KINDS:
        raise InputError(f"{owner} is a teacher of kind {kind!r}; this version knows {', '.join(KINDS)}")
    cls, option = KINDS[kind]
    try:
        if "seed" in arguments or set(options) - {option}:
            raise InputError(f"it says too much: {', '.join(map(repr, [*arguments, *options]))}")
        with torch.device("meta"):  # nothing is allocated on the word of the file
            model: Any = cls(build_backbone(name, **arguments), **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{owner} does not describe a teacher: {' '.join(str(error).split())[:300]}") from error
    _check_state(owner, model.state_dict(), state, Path(path).stat().st_size)
    model.load_state_dict(state, assign=True)
    spec = getattr(model.backbone, "input_spec", None)
    told = content.get("input")
    if is_dataclass(spec) and not isinstance(spec, type) and isinstance(told, dict):
        try:
            model.backbone.input_spec = replace(spec, **told)
        except (TypeError, ValueError) as error:
            raise InputError(f"{owner} does not describe its images: {error}") from error
    return model.eval()


def describe_teacher(path: str | os.PathLike[str]) -> str | None:
    """What a file of `save_teacher` is, in lines of text; None for any other file.

    Raises:
        InputError: a teacher's file whose parts do not fit each other.
    """
    content = _content(path)
    if content is None:
        return None
    model = load_teacher(path)
    ways = {
        "dal": "age branch subtracted from the embedding",
        "mtlface": "attended age part subtracted from the last map",
    }
    spec = getattr(model, "input_spec", None)
    told = {
        "file": f"PyTorch, {Path(path).stat().st_size:,} bytes",
        "layout": f"kdlib_faces teacher, {content['kind']}: {ways[content['kind']]}",
        "network": repr(model.backbone) if content["kind"] == "dal" else str(content["backbone"]),
        "input": "as its backbone's" if spec is None else spec.describe(),
        "output": f"(b, {model.embedding_dim}), not normalized",
        "parameters": f"{sum(each.numel() for each in model.parameters()):,}",
        "taps": ", ".join(model.stages),
        "weights": "all there, all finite",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in told.items())


def load_pretrained(path: str | os.PathLike[str]) -> Any:
    """A network to go on training from: an `.onnx` file of a known family, a teacher's file, or a checkpoint.

    Raises:
        InputError: as `import_onnx` and `load_teacher`.
    """
    if Path(path).suffix.lower() == ".onnx":
        from kdlib_faces.teachers.onnx.import_graph import import_onnx

        return import_onnx(path)
    return load_teacher(path)


def _content(path: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """What a teacher's file holds; None for any other file, whose faults are worded by those who read such files."""
    try:
        content = read_weights("load_teacher", Path(path)).content
    except InputError:
        return None
    return content if isinstance(content, Mapping) and KEY in content else None


def _family(backbone: Any) -> str:
    """The name under which the arguments rebuild a backbone: a name for one depth takes no depth."""
    found: str = getattr(backbone, "family", "iresnet" if type(backbone).__name__ == "IResNet" else backbone.name)
    return found


def _told(spec: Any) -> dict[str, Any] | None:
    """An input specification as plain values; its size is among the backbone's arguments."""
    if not is_dataclass(spec) or isinstance(spec, type):
        return None
    values = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name != "size"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_state(owner: str, wanted: Mapping[str, Tensor], state: Mapping[str, Any], file_size: int) -> None:
    missing = [key for key in wanted if key not in state]
    unexpected = [str(key) for key in state if key not in wanted]
    shapes = []
    for key, target in wanted.items():
        value = state.get(key)
        if value is None:
            continue
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.dtype == target.dtype
        if not plain or value.shape != target.shape:
            shapes.append(f"{key} must be {tuple(target.shape)} {target.dtype}")
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            shapes.append(f"{key} holds NaN or infinity")
        elif key.endswith("running_var") and bool((value < 0).any()):
            shapes.append(f"{key} holds variances below 0")
    kinds = {"missing": missing, "unexpected": unexpected, "unusable": shapes}
    if any(kinds.values()):
        lines = [f"{name} ({len(keys)}): {', '.join(keys[:LISTED])}" for name, keys in kinds.items() if keys]
        raise InputError(f"{owner} does not fit its own description; {'; '.join(lines)}")
    if sum(state[key].nbytes for key in wanted) > file_size:
        raise InputError(f"{owner} claims more values than its {file_size} bytes can hold")
