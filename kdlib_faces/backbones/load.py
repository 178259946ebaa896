"""Backbones room: networks to files and back. Reads files that may be hostile, by `weights_only=True` only.

Two layouts are read: the one `save_backbone` writes, which names its network, and the bare state dicts of the three
families as their own projects publish them, told apart by their keys and shapes, never by the file name. Everything is
strict: a checkpoint that does not fill the whole network, or has more than it, is an error that lists the differences.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.backbones._arguments import InputSize
from kdlib_faces.backbones.iresnet import IResNet
from kdlib_faces.backbones.registry import Backbone, build_backbone

__all__ = ["load_backbone", "save_backbone"]

FORMAT = 1
LISTED = 5  # differences of each kind that an error lists
WRAPPERS = ("state_dict", "state_dict_backbone", "net_state_dict")
PREFIXES = ("module.", "backbone.")
HEAD = "head."  # a margin head saved beside `backbone.`
SIGNATURES = {
    "mobilefacenet": ("conv1.conv.weight", "conv_45.conv_dw.conv.weight", "conv_6_dw.conv.weight", "linear.weight"),
    "mbf": ("layers.0.layers.0.weight", "features.layers.0.layers.0.weight", "features.layers.2.weight"),
    "iresnet": ("conv1.weight", "layer1.0.bn3.weight", "fc.weight", "features.weight"),
}
FOREIGN = {
    "input_layer.0.weight": "the IR / IR-SE layout of face.evoLVe and AdaFace, a different network",
    "output_layer.linear.weight": "a MobileFaceNet without weights in its last BatchNorm, a different network",
    "dw_conv1.conv.weight": "a sequential MobileFaceNet for 112x96 images, a different layout",
    "layer1.0.bn1.weight": "a ResNet that is not insightface's IResNet",
}


def save_backbone(model: Backbone, path: str | os.PathLike[str]) -> None:
    """Write a backbone with its name and arguments, so that `load_backbone` needs the file alone.

    The file appears whole or not at all: it is written beside its place and moved there.

    Args:
        model: one of our own backbones.
        path: the file; its folder must exist.

    Raises:
        TypeError: another kind of module; save its `state_dict()` with torch.
        InputError: the file cannot be written.

    Examples:
        >>> import tempfile
        >>> student = build_backbone("mobilefacenet", embedding_dim=64, width=0.25, input_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_backbone(student, f"{folder}/student.pt")
        ...     load_backbone(f"{folder}/student.pt")
        MobileFaceNet(embedding_dim=64, width=0.25, input_size=32)
    """
    if not isinstance(model, Backbone):
        raise TypeError(f"save_backbone: model must be a kdlib_faces backbone, got {type(model).__name__}")
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    name = "iresnet" if isinstance(model, IResNet) else model.name
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    content = {"kdlib_faces": FORMAT, "backbone": name, "arguments": model.arguments, "state": state}
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise InputError(f"save_backbone: cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def load_backbone(path: str | os.PathLike[str], *, input_size: InputSize | None = None) -> Backbone:
    """Read a backbone from a file of `save_backbone`, or from a bare state dict of one of the three families.

    Read as state dicts: MobileFaceNet in the naming of the common PyTorch port, insightface's `mbf` and `iresnet`,
    each of any depth, width and embedding; also inside a `state_dict`, `state_dict_backbone` or `net_state_dict` entry
    and behind the prefixes `module.` and `backbone.`. The network gets the weights as float32, in eval mode. What the
    images must be (channel order, normalisation) is not in a state dict: ask the checkpoint's authors.

    Args:
        path: the file.
        input_size: side of the square images, or (height, width), in pixels. None reads it from the file: a bare state
            dict tells the final grid only, so sixteen times that; 112 for a grid of 7.

    Returns:
        The network on the CPU, (b, 3, h, w) to (b, d), not normalised.

    Raises:
        InputError: no such file; a truncated one; one that holds other things than tensors and plain values (nothing
            in it is run); an unknown layout; or weights that do not fit, with the list of differences.
    """
    owner = f"load_backbone: {os.fspath(path)}"
    content = _read(owner, Path(path))
    if not isinstance(content, Mapping):
        raise InputError(f"{owner} must hold a dict of tensors, got {type(content).__name__}")
    if "kdlib_faces" in content:
        name, arguments, state = _own(owner, content)
    else:
        state = _unwrap(content)
        name, arguments = _recognise(owner, state)
    if input_size is not None:
        arguments["input_size"] = input_size
    if arguments.get("input_size", 0) is None:
        raise InputError(f"{owner} has no square final grid; say which input_size=(height, width) it was trained with")
    try:
        with torch.device("meta"):  # nothing is allocated on the word of the file
            model = build_backbone(name, **arguments)
    except (InputError, RuntimeError) as error:  # RuntimeError: sizes beyond what torch can count
        raise InputError(f"{owner} does not describe a {name}: {error}") from error
    fitted = _fit(owner, name, model.state_dict(), state, Path(path).stat().st_size)
    model.load_state_dict(fitted, assign=True)
    return model.eval()


def _read(owner: str, path: Path) -> Any:
    """The content of the file, of tensors and plain values only."""
    if not path.is_file():
        raise InputError(f"{owner} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with path.open("rb") as file:
            head = file.read(256).lstrip()
    except OSError as error:
        raise InputError(f"{owner} cannot be read: {error.strerror or error}") from error
    if not head:
        raise InputError(f"{owner} is empty")
    if head[:1] == b"<":
        raise InputError(f"{owner} is a web page, not a checkpoint; the download was answered by an HTML or XML text")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{owner} is a Git LFS pointer, not a checkpoint; fetch the file itself")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes from outside can make the reader raise nearly anything
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise InputError(
                f"{owner} holds more than tensors: loading it would call {found[1]}, which was refused; "
                "save model.state_dict() instead"
            ) from error
        raise InputError(f"{owner} is damaged, cut short, or no PyTorch checkpoint ({type(error).__name__})") from error


def _own(owner: str, content: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Name, arguments and state of a file of ours."""
    if content["kdlib_faces"] != FORMAT:
        raise InputError(f"{owner} is of format {content['kdlib_faces']!r}; this version reads format {FORMAT}")
    name, arguments, state = (content.get(key) for key in ("backbone", "arguments", "state"))
    if not isinstance(name, str) or not isinstance(arguments, dict) or not isinstance(state, dict):
        raise InputError(f"{owner} must hold 'backbone' (a name), 'arguments' and 'state' (dicts)")
    if not all(isinstance(key, str) for key in arguments) or "seed" in arguments:
        raise InputError(f"{owner} must hold 'arguments' of its backbone, got {list(arguments)}")
    return name, dict(arguments), state


def _unwrap(content: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict inside a training checkpoint, without the prefixes that wrappers put before each key."""
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    state = {str(key): value for key, value in inner.items()}
    for prefix in PREFIXES:
        rest = [key for key in state if not key.startswith(prefix)]
        if len(rest) < len(state) and all(key.startswith(HEAD) for key in rest):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _recognise(owner: str, state: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Family and arguments from keys and shapes."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    for name, keys in SIGNATURES.items():
        if all(key in shapes for key in keys):
            try:
                return name, _arguments(name, shapes)
            except (IndexError, ZeroDivisionError) as error:
                raise InputError(f"{owner} has the keys of a {name}, but not its shapes") from error
    known = next((f"; it looks like {text}" for key, text in FOREIGN.items() if key in shapes), "")
    first = ", ".join(repr(key) for key in list(state)[:LISTED]) or "nothing"
    raise InputError(f"{owner} is no MobileFaceNet, mbf or iresnet checkpoint{known}; it begins with {first}")


def _arguments(name: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments that a state dict of a known family implies."""

    def blocks(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d{1,4})\.")
        return 1 + max((int(found[1]) for key in shapes if (found := pattern.match(key))), default=-1)

    if name == "iresnet":
        stem, (embedding_dim, inputs) = shapes["conv1.weight"][0], shapes["fc.weight"][:2]
        cells = inputs // (8 * stem)
        side = math.isqrt(cells)
        # A grid of 7 by 6 and one of 6 by 7 have the same weights: only a square can be told from a count of cells.
        size = (16 * side, 16 * side) if side * side == cells else None
        layers = tuple(blocks(f"layer{stage}") for stage in (1, 2, 3, 4))
        return {"layers": layers, "embedding_dim": embedding_dim, "width": stem / 64, "input_size": size}
    if name == "mbf":
        first = 1 if "layers.1.layers.0.weight" in shapes else blocks("layers.1.layers")
        counts = (first, *(blocks(f"layers.{stage}.layers") for stage in (3, 5, 7)))
        rows, columns = shapes["features.layers.0.layers.0.weight"][2], shapes["features.layers.0.layers.0.weight"][3]
        return {
            "embedding_dim": shapes["features.layers.2.weight"][0],
            "scale": shapes["layers.0.layers.0.weight"][0] // 64,
            "blocks": counts,
            "input_size": (16 * rows, 16 * columns),
        }
    rows, columns = shapes["conv_6_dw.conv.weight"][2], shapes["conv_6_dw.conv.weight"][3]
    return {
        "embedding_dim": shapes["linear.weight"][0],
        "width": shapes["conv1.conv.weight"][0] / 64,
        "input_size": (16 * rows, 16 * columns),
    }


def _fit(
    owner: str, name: str, wanted: Mapping[str, Tensor], state: Mapping[str, Any], file_size: int
) -> dict[str, Tensor]:
    """`state` as the tensors that the network wants, or the list of what differs."""
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # older files have none
    missing = [key for key in wanted if key not in state and key not in counters]
    unexpected = [str(key) for key in state if key not in wanted]
    shapes = []
    for key, target in wanted.items():
        value = state.get(key, target)
        if not isinstance(value, Tensor) or value.is_floating_point() != target.is_floating_point():
            shapes.append(f"{key} is no {'real' if target.is_floating_point() else 'whole-number'} tensor")
        elif value.shape != target.shape:
            shapes.append(f"{key} is {tuple(value.shape)} in the file, {tuple(target.shape)} in the network")
        elif key in state and (value.layout != torch.strided or value.device.type != "cpu"):
            shapes.append(f"{key} holds no values")
    kinds = {"missing": missing, "unexpected": unexpected, "other shape": shapes}
    if any(kinds.values()):
        lines = [
            f"{kind} ({len(found)}): {', '.join(found[:LISTED])}{', ...' if len(found) > LISTED else ''}"
            for kind, found in kinds.items()
            if found
        ]
        raise InputError(f"{owner} does not fit {name}; {'; '.join(lines)}")
    if sum(state[key].nbytes for key in wanted if key in state) > file_size:
        raise InputError(f"{owner} claims more values than its {file_size} bytes can hold")
    fitted = {}
    for key, target in wanted.items():
        value = state.get(key, torch.zeros((), dtype=target.dtype)).detach()
        fitted[key] = value.to(target.dtype, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(fitted[key]).all():
            raise InputError(f"{owner} holds NaN or infinite values in {key}")
    return fitted
