"""Recognition of checkpoint files by keys and shapes, and their differences from a network."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdlib_faces._checks import InputError, show_name
from kdlib_faces._weights import Weights, read_weights
from kdlib_faces.backbones.checkpoints.layouts import LAYOUTS, Layout, describe_foreign
from kdlib_faces.backbones.checkpoints.narrow import narrow_backbone
from kdlib_faces.backbones.checkpoints.origins import find_origin
from kdlib_faces.backbones.checkpoints.unwrap import Unwrapped, unwrap
from kdlib_faces.backbones.complexity import count_macs, count_parameters
from kdlib_faces.backbones.input_spec import InputSize, InputSpec
from kdlib_faces.backbones.networks.base import Arguments, Backbone
from kdlib_faces.backbones.registry import build_backbone

__all__ = ["CheckpointInfo", "RecognizedFile", "describe_checkpoint", "examine", "find_differences", "list_differences"]

OWN_KEY = "kdlib_faces"  # the key, or safetensors metadata entry, of files of `save_backbone`
FORMAT = 2
COUNTER = "num_batches_tracked"  # of a BatchNorm
MAX_LISTED = 50  # maximum number of differences of each kind in an error message


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint file.

    Attributes:
        kind: `"PyTorch"` or `"safetensors"`.
        size: file size in bytes.
        layout: name of the layout; `"kdlib_faces"` for a file of `save_backbone`.
        about: description of the layout, with the project if the wrapper identifies it.
        wrappers: entries of a training checkpoint that were unwrapped.
        prefix: removed prefix of the keys.
        beside: ignored keys, of a margin head or another network.
        backbone: name of the network.
        network: the call that builds the network.
        parameters: number of parameters.
        macs: multiply-adds for one image.
        keys: number of entries of the state dict.
        embedding_dim: dimensions of the embedding.
        stages: module paths for use as taps.
        input_spec: input specification.
        differences: kind of difference to keys; empty if the file fits the network.
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
class RecognizedFile:
    """A recognized file before its values are loaded; the network is on the meta device."""

    owner: str  # beginning of error messages
    weights: Weights
    layout: Layout | None  # None for a file of `save_backbone`
    about: str
    unwrapped: Unwrapped
    model: Backbone
    spec: InputSpec
    names: dict[str, str]  # keys of the network to keys of the file
    differences: dict[str, tuple[str, ...]]


def describe_checkpoint(path: str | os.PathLike[str], *, input_size: InputSize | None = None) -> CheckpointInfo:
    """Describe a checkpoint file: layout, network, wrappers, and every difference from the network.

    Args:
        path: the file.
        input_size: side of the square images, or (height, width), in pixels, if the file does not determine it.

    Returns:
        The description. A file of a known layout that does not fit is described with its differences. Values are not
        read.

    Raises:
        InputError: the file is missing, damaged, a whole pickled module, or has no known layout.

    Examples:
        >>> import tempfile
        >>> model = build_backbone("ir", layers=(1, 1, 1, 1), embedding_dim=16, width=0.125, input_size=32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": model.state_dict()}, f"{folder}/weights.pt")
        ...     info = describe_checkpoint(f"{folder}/weights.pt")
        >>> info.layout, info.wrappers, info.keys, info.differences
        ('ir', ('state_dict',), 89, {})
    """
    file = examine(path, input_size=input_size)
    model = file.model
    try:
        macs = count_macs(model, model.input_size)
    except (RuntimeError, OverflowError) as error:  # sizes beyond what torch can count
        raise InputError(f"{file.owner} describes a network of impossible size: {model!r}") from error
    return CheckpointInfo(
        kind=file.weights.kind,
        size=file.weights.size,
        layout=OWN_KEY if file.layout is None else file.layout.name,
        about=file.about,
        wrappers=file.unwrapped.wrappers,
        prefix=file.unwrapped.prefix,
        beside=tuple(map(show_name, file.unwrapped.beside)),
        backbone=model.name,
        network=repr(model),
        parameters=count_parameters(model),
        macs=macs,
        keys=len(file.unwrapped.state),
        embedding_dim=model.embedding_dim,
        stages=model.stages,
        input_spec=file.spec,
        differences=file.differences,
    )


def examine(path: str | os.PathLike[str], *, input_size: InputSize | None = None) -> RecognizedFile:
    """Recognize a file and compare its keys and shapes with those of the network."""
    owner = f"load_backbone: {os.fspath(path)}"
    weights = read_weights(owner, Path(path))
    content = weights.content
    if not isinstance(content, Mapping):
        raise InputError(f"{owner} must contain a dict of tensors, got {type(content).__name__}")
    layout: Layout | None = None
    own, removed = _own(owner, weights), None
    if own is not None:
        name, arguments, spec_fields, state, removed = own
        unwrapped, about = Unwrapped(state, (), (), "", ()), "a file of save_backbone"
        about += "" if removed is None else ", narrower than its arguments"
    else:
        unwrapped = unwrap(content)
        layout, arguments = _recognize(owner, unwrapped.state)
        name, about = layout.backbone, "; ".join(filter(None, (layout.about, layout.variant(arguments))))
        spec_fields = dict(layout.input(arguments))
        origin = find_origin(layout.name, arguments, unwrapped)
        if origin is not None:
            about = f"{about}; wrapped as in {origin.about}"
            spec_fields.update(origin.input)
            if origin.certain:
                spec_fields["assumed"] = tuple(
                    each for each in spec_fields.get("assumed", ()) if each not in origin.input
                )
            arguments.update(origin.arguments)
    if input_size is not None:
        arguments["input_size"] = input_size
    if arguments.get("input_size", 0) is None:
        raise InputError(f"{owner} has no square final grid; say which input_size=(height, width) it was trained with")
    try:
        with torch.device("meta"):  # nothing is allocated on the word of the file
            model = build_backbone(name, **arguments)
            if removed is not None:
                model = narrow_backbone(model, unwrapped.state, removed)
        spec = InputSpec(**{**spec_fields, "size": model.input_size})
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
    differences = find_differences(wanted, names, unwrapped.state, pointwise=layout is not None and layout.pointwise)
    return RecognizedFile(owner, weights, layout, about, unwrapped, model, spec, names, differences)


def _own(owner: str, weights: Weights) -> tuple[str, Arguments, Arguments, Arguments, object] | None:
    """Return name, arguments, input specification, state and removed modules of a file of `save_backbone`, else None."""
    content = with_header(owner, weights, OWN_KEY)
    if OWN_KEY not in content:
        return None
    if content.get(OWN_KEY) != FORMAT:
        raise InputError(f"{owner} has format {show_name(content.get(OWN_KEY))}; this version reads format {FORMAT}")
    name, arguments, state = (content.get(key) for key in ("backbone", "arguments", "state"))
    images = content.get("input", {})
    if not (
        isinstance(name, str) and isinstance(arguments, dict) and isinstance(state, dict) and isinstance(images, dict)
    ):
        raise InputError(f"{owner} must contain 'backbone' (a name), 'arguments', 'input' and 'state' (dicts)")
    if not all(isinstance(key, str) for key in arguments) or "seed" in arguments:
        raise InputError(
            f"{owner} must contain 'arguments' of its backbone, got {', '.join(map(show_name, arguments))}"
        )
    fields = {"color", "mean", "scale", "normalized", "assumed"}
    if not set(images) <= fields:
        raise InputError(
            f"{owner} must contain 'input' with {', '.join(sorted(fields))}, got {', '.join(map(show_name, images))}"
        )
    state = {str(key): value for key, value in state.items()}
    return name, dict(arguments), dict(images), state, content.get("removed")


def with_header(owner: str, weights: Weights, key: str) -> Mapping[str, object]:
    """Return the entries of a file; of a safetensors file with a header `key`, the header and the tensors as `"state"`."""
    if key not in weights.metadata:
        return weights.content if isinstance(weights.content, Mapping) else {}
    try:
        header = json.loads(weights.metadata[key])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{owner}: the metadata {key!r} must be JSON") from error
    return {**header, "state": weights.content} if isinstance(header, dict) else {key: None}


def _recognize(owner: str, state: Mapping[str, object]) -> tuple[Layout, Arguments]:
    """Return layout and arguments from keys and shapes."""
    shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
    for layout in LAYOUTS:
        if layout.fits(shapes):
            try:
                return layout, layout.arguments(shapes)
            except (LookupError, ValueError, ZeroDivisionError) as error:
                # Only errors raised by the layout describe the file; Python's own describe an index.
                own = isinstance(error, IndexError) and "out of range" not in str(error)
                why = f": {error.args[0]}" if own else ""
                raise InputError(f"{owner} has the keys of {layout.about}, but other shapes{why}") from error
    kind = describe_foreign(state, shapes)
    first = ", ".join(f"'{show_name(key)}'" for key in list(state)[:5]) or "nothing"
    raise InputError(
        f"{owner} has no known layout{f'; it looks like {kind}' if kind else ''}; it starts with {first}; known layouts are "
        f"{', '.join(each.name for each in LAYOUTS)}"
    )


def find_differences(
    wanted: Mapping[str, Tensor], names: Mapping[str, str], state: Mapping[str, object], *, pointwise: bool = False
) -> dict[str, tuple[str, ...]]:
    """Return missing keys, unexpected keys, and keys with another shape or without a tensor."""
    needed = {key: target for key, target in wanted.items() if not key.endswith(COUNTER)}  # older files have none
    missing = tuple(names[key] for key in needed if names[key] not in state)
    known = set(names.values())
    unexpected = tuple(show_name(key) for key in state if key not in known and isinstance(state[key], Tensor))
    shapes = []
    for key, target in needed.items():
        name = names[key]
        if name not in state:
            continue
        value = state[name]
        if not isinstance(value, Tensor) or value.is_floating_point() != target.is_floating_point():
            shapes.append(f"{name} is not {'a floating-point' if target.is_floating_point() else 'an integer'} tensor")
        elif value.layout != torch.strided or value.device.type != "cpu":
            shapes.append(f"{name} has no values")
        elif tuple(value.shape) != _shape(target, pointwise):
            shapes.append(f"{name} is {tuple(value.shape)} in the file, {_shape(target, pointwise)} in the network")
    kinds = {"missing": missing, "unexpected": unexpected, "other shape": tuple(shapes)}
    return {kind: keys for kind, keys in kinds.items() if keys}


def _shape(target: Tensor, pointwise: bool) -> tuple[int, ...]:
    """Return the expected shape in the file, where a linear layer may be a 1x1 convolution."""
    return (*target.shape, 1, 1) if pointwise and target.dim() == 2 else tuple(target.shape)


def list_differences(differences: Mapping[str, tuple[str, ...]]) -> str:
    """List all differences on one line; of very many, the number and the first ones.

    Examples:
        >>> list_differences({"missing": ("bn.bias",), "unexpected": ("head.w", "head.b")})
        'missing (1): bn.bias; unexpected (2): head.w, head.b'
    """
    return "; ".join(
        f"{kind} ({len(keys)}): {', '.join(keys[:MAX_LISTED])}{', ...' if len(keys) > MAX_LISTED else ''}"
        for kind, keys in differences.items()
    )
