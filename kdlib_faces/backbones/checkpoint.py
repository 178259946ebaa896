"""Backbones room: what a checkpoint file is. Reads files that may be hostile; runs nothing in them.

The layout is told by keys and shapes, never by the file's name. A file either fills one of our networks exactly or is
described by every difference.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlib_faces._checks import InputError, show_name
from kdlib_faces._weights import Weights, read_weights
from kdlib_faces.backbones._arguments import InputSize
from kdlib_faces.backbones.complexity import count_macs, count_parameters
from kdlib_faces.backbones.input_spec import InputSpec
from kdlib_faces.backbones.layouts import LAYOUTS, Layout, foreign
from kdlib_faces.backbones.origins import find_origin
from kdlib_faces.backbones.registry import Backbone, build_backbone
from kdlib_faces.backbones.unwrap import Unwrapped, unwrap

__all__ = ["CheckpointInfo", "Found", "describe_checkpoint", "examine", "list_differences"]

OURS = "kdlib_faces"  # the key, or safetensors metadata entry, that marks a file of `save_backbone`
FORMATS = (1, 2)
LISTED = 50  # differences of each kind that an error lists; a whole foreign network has thousands


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint file is.

    Attributes:
        kind: `"PyTorch"` or `"safetensors"`.
        size: of the file, in bytes.
        layout: name of the layout; `"kdlib_faces"` for a file of `save_backbone`.
        about: whose layout it is, in words; with the project, where the wrapping tells it.
        wrappers: entries of a training checkpoint that were opened.
        prefix: what stood before each key.
        beside: keys of a margin head that stand beside the network and are left out.
        backbone: the network's name in the registry.
        network: the call that builds it.
        parameters: its parameters.
        macs: its multiply-adds for one image.
        keys: entries of the file's state dict.
        embedding_dim: of the network.
        stages: the module paths that serve as taps.
        input_spec: what the images must be.
        differences: kind to keys that do not fit; empty where the file fills the network.
    """

    kind: str
    size: int
    layout: str
    about: str
    wrappers: tuple[str, ...]
    prefix: str
    beside: tuple[str, ...]
    backbone: str
    network: str
    parameters: int
    macs: int
    keys: int
    embedding_dim: int
    stages: tuple[str, ...]
    input_spec: InputSpec
    differences: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Found:
    """A file that was recognized, before its values are taken.

    Attributes:
        owner: the error's first words.
        weights: the file.
        layout: None for a file of `save_backbone`.
        about: whose layout it is, in words.
        unwrapped: the state dict and what was around it.
        model: the network, without memory for its values.
        spec: what the images must be.
        names: our keys to the file's.
        differences: kind to keys that do not fit.
    """

    owner: str
    weights: Weights
    layout: Layout | None
    about: str
    unwrapped: Unwrapped
    model: Backbone
    spec: InputSpec
    names: dict[str, str]
    differences: dict[str, tuple[str, ...]]


def describe_checkpoint(path: str | os.PathLike[str], *, input_size: InputSize | None = None) -> CheckpointInfo:
    """What a checkpoint file is: its layout, its network, what wraps it, and every difference from the network.

    Args:
        path: the file.
        input_size: side of the square images, or (height, width), in pixels, where the file does not tell it.

    Returns:
        The description; a file of a known layout that does not fit is described too, with its differences. Values are
        not looked at.

    Raises:
        InputError: no such file, a damaged one, one that holds more than tensors and plain values, or of no known layout.

    Examples:
        >>> import tempfile
        >>> model = build_backbone("ir", layers=(1, 1, 1, 1), embedding_dim=16, width=0.125, input_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": model.state_dict()}, f"{folder}/weights.pt")
        ...     info = describe_checkpoint(f"{folder}/weights.pt")
        >>> info.layout, info.wrappers, info.keys, info.differences
        ('ir', ('state_dict',), 89, {})
    """
    found = examine(path, input_size=input_size)
    model = found.model
    try:
        macs = count_macs(model, model.input_size)
    except (RuntimeError, OverflowError) as error:  # sizes beyond what torch can count
        raise InputError(f"{found.owner} describes a network of sizes that cannot be: {model!r}") from error
    return CheckpointInfo(
        kind=found.weights.kind,
        size=found.weights.size,
        layout=OURS if found.layout is None else found.layout.name,
        about=found.about,
        wrappers=found.unwrapped.wrappers,
        prefix=found.unwrapped.prefix,
        beside=tuple(map(show_name, found.unwrapped.beside)),
        backbone=model.name,
        network=repr(model),
        parameters=count_parameters(model),
        macs=macs,
        keys=len(found.unwrapped.state),
        embedding_dim=model.embedding_dim,
        stages=model.stages,
        input_spec=found.spec,
        differences=found.differences,
    )


def examine(path: str | os.PathLike[str], *, input_size: InputSize | None = None) -> Found:
    """Recognize a file and compare its keys and shapes with the network's."""
    owner = f"load_backbone: {os.fspath(path)}"
    weights = read_weights(owner, Path(path))
    content = weights.content
    if not isinstance(content, Mapping):
        raise InputError(f"{owner} must hold a dict of tensors, got {type(content).__name__}")
    layout: Layout | None = None
    own = _own(owner, weights)
    if own is not None:
        name, arguments, told, state = own
        unwrapped, about = Unwrapped(state, (), (), "", ()), "a file of save_backbone"
    else:
        unwrapped = unwrap(content)
        layout, arguments = _recognize(owner, unwrapped.state)
        name, about = layout.backbone, "; ".join(filter(None, (layout.about, layout.variant(arguments))))
        told = {**layout.input(arguments)}
        origin = find_origin(layout.name, arguments, unwrapped)
        if origin is not None:
            about = f"{about}; wrapped as {origin.about} does"
            told.update(origin.input)
            if origin.certain:
                told["assumed"] = tuple(each for each in told.get("assumed", ()) if each not in dict(origin.input))
            arguments.update(origin.arguments)
    if input_size is not None:
        arguments["input_size"] = input_size
    if arguments.get("input_size", 0) is None:
        raise InputError(f"{owner} has no square final grid; say which input_size=(height, width) it was trained with")
    try:
        with torch.device("meta"):  # nothing is allocated on the word of the file
            model = build_backbone(name, **arguments)
        spec = InputSpec(**{**told, "size": model.input_size})
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: sizes beyond what torch can count
        raise InputError(
            f"{owner} does not describe a {show_name(name)}: {' '.join(str(error).split())[:300]}"
        ) from error
    wanted = model.state_dict()
    if layout is None:
        names = {key: key for key in wanted}
    else:
        shapes = {key: tuple(value.shape) for key, value in unwrapped.state.items() if isinstance(value, Tensor)}
        names = {key: layout.theirs(key, shapes) for key in wanted}
    differences = _differences(wanted, names, unwrapped.state, pointwise=layout is not None and layout.pointwise)
    return Found(owner, weights, layout, about, unwrapped, model, spec, names, differences)


def _own(owner: str, weights: Weights) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]] | None:
    """Name, arguments, input and state of a file of ours; None for another's."""
    content = weights.content
    if OURS in weights.metadata:
        try:
            told = json.loads(weights.metadata[OURS])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{owner}: the metadata {OURS!r} must be JSON") from error
        content = {**told, "state": content} if isinstance(told, dict) else {OURS: None}
    elif OURS not in content:
        return None
    if content.get(OURS) not in FORMATS:
        raise InputError(
            f"{owner} is of format {show_name(content.get(OURS))}; this version reads format {FORMATS[-1]}"
        )
    name, arguments, state = (content.get(key) for key in ("backbone", "arguments", "state"))
    images = content.get("input", {})
    if not (
        isinstance(name, str) and isinstance(arguments, dict) and isinstance(state, dict) and isinstance(images, dict)
    ):
        raise InputError(f"{owner} must hold 'backbone' (a name), 'arguments', 'input' and 'state' (dicts)")
    if not all(isinstance(key, str) for key in arguments) or "seed" in arguments:
        raise InputError(f"{owner} must hold 'arguments' of its backbone, got {', '.join(map(show_name, arguments))}")
    fields = {"color", "mean", "scale", "normalized", "assumed"}
    if not set(images) <= fields:
        raise InputError(
            f"{owner} must hold 'input' of {', '.join(sorted(fields))}, got {', '.join(map(show_name, images))}"
        )
    return name, dict(arguments), dict(images), {str(key): value for key, value in state.items()}


def _recognize(owner: str, state: Mapping[str, Any]) -> tuple[Layout, dict[str, Any]]:
    """Layout and arguments from keys and shapes."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    for layout in LAYOUTS:
        if layout.fits(shapes):
            try:
                return layout, layout.arguments(shapes)
            except (LookupError, ValueError, ZeroDivisionError) as error:
                # Ours tell what was counted; Python's own tell of an index.
                ours = isinstance(error, IndexError) and "out of range" not in str(error)
                why = f": {error.args[0]}" if ours else ""
                raise InputError(f"{owner} has the keys of {layout.about}, but not its shapes{why}") from error
    kind = foreign(state, shapes)
    first = ", ".join(f"'{show_name(key)}'" for key in list(state)[:5]) or "nothing"
    raise InputError(
        f"{owner} is of no layout that is read ({', '.join(each.name for each in LAYOUTS)})"
        f"{f'; it looks like {kind}' if kind else ''}; it begins with {first}"
    )


def _differences(
    wanted: Mapping[str, Tensor], names: Mapping[str, str], state: Mapping[str, Any], *, pointwise: bool
) -> dict[str, tuple[str, ...]]:
    """What the network has and the file has not, the reverse, and what is another shape or no tensor."""
    counters = {key for key in wanted if key.endswith("num_batches_tracked")}  # older files have none
    missing = tuple(names[key] for key in wanted if names[key] not in state and key not in counters)
    known = set(names.values())
    unexpected = tuple(show_name(key) for key in state if key not in known)
    shapes = []
    for key, target in wanted.items():
        name = names[key]
        if name not in state:
            continue
        value = state[name]
        if not isinstance(value, Tensor) or value.is_floating_point() != target.is_floating_point():
            shapes.append(f"{name} is no {'real' if target.is_floating_point() else 'whole-number'} tensor")
        elif value.layout != torch.strided or value.device.type != "cpu":
            shapes.append(f"{name} holds no values")
        elif tuple(value.shape) != _shape(target, pointwise):
            shapes.append(f"{name} is {tuple(value.shape)} in the file, {_shape(target, pointwise)} in the network")
    kinds = {"missing": missing, "unexpected": unexpected, "other shape": tuple(shapes)}
    return {kind: found for kind, found in kinds.items() if found}


def _shape(target: Tensor, pointwise: bool) -> tuple[int, ...]:
    """Shape in the file: a linear layer may be a 1x1 convolution there."""
    return (*target.shape, 1, 1) if pointwise and target.dim() == 2 else tuple(target.shape)


def list_differences(differences: Mapping[str, tuple[str, ...]]) -> str:
    """All of them on one line; of very many the number and the first.

    Examples:
        >>> list_differences({"missing": ("bn.bias",), "unexpected": ("head.w", "head.b")})
        'missing (1): bn.bias; unexpected (2): head.w, head.b'
    """
    return "; ".join(
        f"{kind} ({len(found)}): {', '.join(found[:LISTED])}{', ...' if len(found) > LISTED else ''}"
        for kind, found in differences.items()
    )
