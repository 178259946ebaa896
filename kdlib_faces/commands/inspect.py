"""The command `kdlib-faces inspect`: the costs of all backbones, or the contents of a file, as text."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from kdlib import StudentAdapter
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import describe_backbones, describe_checkpoint, load_backbone
from kdlib_faces.backbones.input_spec import height_width
from kdlib_faces.commands.inspect_data import describe_data
from kdlib_faces.teachers import InputOptions, load_teacher
from kdlib_faces.teachers.files import describe_teacher
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.teachers.onnx.inspect import describe_graph, list_taps, suggest_taps
from kdlib_faces.teachers.open import RECOGNIZED, open_onnx

__all__ = ["backbones", "file", "main", "parse_size", "taps"]

ImageSize: TypeAlias = int | tuple[int, int]

LENGTHS = {
    True: "of unit length where it was published, not here",
    False: "not normalized",
    None: "not normalized; some projects of this layout normalize, some do not",
}


def main(options: Namespace, command: str) -> None:
    """Print a table of all backbones, the description of a file, or the shapes of its taps."""
    size, (images,) = parse_size(options.input_size), inputs_of_models(options.input, 1)
    if options.file is None:
        print(backbones())
    elif options.tap:
        print(taps(options.file, options.tap, size, images))
    else:
        print(file(options.file, size, images))


def backbones() -> str:
    """Return a table of all backbones: parameters, trainable parameters, multiply-adds, entries of the state dict.

    Examples:
        >>> print(backbones().splitlines()[0].split()[:3])
        ['backbone', 'embedding', 'input']
    """
    head = f"{'backbone':<18}{'embedding':>10}{'input':>7}{'parameters':>14}{'trainable':>14}{'MACs':>17}{'keys':>6}"
    lines = [head]
    for row in describe_backbones():
        size = row.input_size if isinstance(row.input_size, int) else "x".join(map(str, row.input_size))
        lines.append(
            f"{row.name:<18}{row.embedding_dim:>10}{size:>7}{row.parameters:>14,}{row.trainable:>14,}"
            f"{row.macs:>17,}{row.state_keys:>6}"
        )
    lines.append(
        "MACs: multiply-adds of convolutions and linear layers for one image; BatchNorm and PReLU not counted."
    )
    return "\n".join(lines)


def file(path: Path, input_size: ImageSize | None = None, input_options: InputOptions = RECOGNIZED) -> str:
    """Describe a file: an ONNX network, a checkpoint of ours or of a public project, a list, a `.bin` set or records.

    For a checkpoint: layout, wrapping, network, input, output, counts, taps, and all differences from the network. For images:
    counts, and the sizes and broken files of a decoded sample.

    Args:
        path: The file.
        input_size: Side of a checkpoint's images, or (height, width), where the file does not contain it; for images, the size
            that a network reads, by default 112.
        input_options: Input options, which override what the file implies.

    Raises:
        InputError: The file is none of these, or damaged.
    """
    if not path.exists():
        raise InputError(f"{path}: file not found")
    if path.suffix == ".onnx":
        return _describe_onnx(path, input_options)

    height = input_size[0] if isinstance(input_size, tuple) else input_size
    if (described := describe_data(path, height or 112)) is not None:
        return described

    return describe_teacher(path, input_options) or _describe_checkpoint(path, input_size, input_options)


def _describe_checkpoint(path: Path, input_size: ImageSize | None, input_options: InputOptions) -> str:
    info = describe_checkpoint(path, input_size=input_size)
    wrapping = [f"opened {' / '.join(info.wrappers)}"] if info.wrappers else []
    wrapping += [f"stripped {info.prefix!r}"] if info.prefix else []
    wrapping += [f"left out {', '.join(info.beside)}"] if info.beside else []
    rows = {
        "file": f"{info.kind}, {info.size:,} bytes",
        "layout": f"{info.layout}: {info.about}",
        "wrapping": "; ".join(wrapping) or "none",
        "network": f"{info.backbone}: {info.network}",
        "input": input_options.applied_to(info.input_spec).describe(),
        "output": f"(b, {info.embedding_dim}), {LENGTHS[info.input_spec.normalized]}",
        "parameters": f"{info.parameters:,}",
        "MACs": f"{info.macs:,}",
        "keys": f"{info.keys:,}",
        "taps": ", ".join(info.stages),
    }
    lines = [f"{name:<12}{value}" for name, value in rows.items()]
    if info.differences:
        lines.append("does not fit the network; differences:")
        for kind, keys in info.differences.items():
            lines += [f"  {kind} ({len(keys)})", *(f"    {key}" for key in keys)]
        return "\n".join(lines)
    try:
        load_backbone(path, input_size=input_size)
    except InputError as error:
        lines.append(f"{'weights':<12}cannot be used: {error}")
    else:
        lines.append(f"{'weights':<12}complete, all finite")
    return "\n".join(lines)


def parse_size(text: str | None) -> ImageSize | None:
    """Parse a side in pixels, or height and width.

    Examples:
        >>> parse_size("112x96"), parse_size("112")
        ((112, 96), 112)
    """
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and 0 < int(side) < 10_000 for side in sides):
        raise InputError(f"--input-size must be pixels, as 112 or 112x96 (height x width), got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def taps(
    path: Path, names: Sequence[str], input_size: ImageSize | None = None, input_options: InputOptions = RECOGNIZED
) -> str:
    """Return the shapes of taps of a network file for one image, one line each; see `file` for the last two arguments.

    Raises:
        InputError: The file is not a network, or has no tap of that name; the message lists the nearest.
    """
    if not path.exists():
        raise InputError(f"{path}: file not found")
    if path.suffix == ".onnx":
        shapes = open_onnx(path, {name: name for name in names}, input_options=input_options).shapes
    else:
        model = load_teacher(path) if input_size is None else load_backbone(path, input_size=input_size)
        with torch.inference_mode():
            features = StudentAdapter(model, {name: name for name in names})(
                torch.zeros(1, 3, *height_width("inspect", model.input_size))
            )
        shapes = {name: tuple(feature.shape[1:]) for name, feature in features.items()}
    return "\n".join(f"{name}  (b, {', '.join(map(str, shape))})" for name, shape in shapes.items())


def _describe_onnx(path: Path, input_options: InputOptions) -> str:
    info = describe_graph(path, input_options.layout)
    spec = open_onnx(path, input_options=input_options).image_format
    rows = {
        "inputs": info["inputs"],
        "outputs": info["outputs"],
        "opset": info["opset"],
        "embedding_dim": info["embedding_dim"],
        "input_size": info["input_size"],
        "images": info["images"] if spec is None or input_options == RECOGNIZED else f"{spec.describe()} (stated)",
        "parameters": f"{info['parameters']:,}",
        "MACs": f"{info['macs']:,}" if info["macs"] else "not countable",
    }
    lines = [f"{name:<14}{value}" for name, value in rows.items()]
    suggested = set(suggest_taps(path, input_options.layout).values())
    lines.append("taps (shape for one image; a * marks the last sum at its resolution):")
    lines += [
        f"  {'*' if tap.name in suggested else ' '} {tuple(tap.shape)!s:<20}{tap.op:<20}{tap.name}"
        for tap in list_taps(path, input_options.layout)
    ]
    return "\n".join(lines)
