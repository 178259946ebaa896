"""Recipes room: says in plain text what the backbones cost and what a file is. Reads files; writes none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdlib_faces._checks import InputError

__all__ = ["backbones", "file", "parse_size", "taps"]


def backbones() -> str:
    """The table of all backbones: parameters, trainable ones, multiply-adds, entries of the state dict.

    Examples:
        >>> print(backbones().splitlines()[0].split()[:3])
        ['backbone', 'embedding', 'input']
    """
    from kdlib_faces.backbones.complexity import describe_backbones

    head = f"{'backbone':<18}{'embedding':>10}{'input':>7}{'parameters':>14}{'trainable':>14}{'MACs':>17}{'keys':>6}"
    lines = [head]
    for row in describe_backbones():
        size = row.input_size if isinstance(row.input_size, int) else "x".join(map(str, row.input_size))
        lines.append(
            f"{row.name:<18}{row.embedding_dim:>10}{size:>7}{row.parameters:>14,}{row.trainable:>14,}"
            f"{row.macs:>17,}{row.state_keys:>6}"
        )
    lines.append("MACs: multiply-adds of convolutions and linear layers at one image; BatchNorm and PReLU not counted.")
    return "\n".join(lines)


def file(path: Path, input_size: int | tuple[int, int] | None = None) -> str:
    """What a file is: an ONNX network, our own or a published checkpoint, or a face list.

    Of a checkpoint: layout, wrapping, network, input, output, counts, taps, and every difference where it does not fit.

    Args:
        path: the file.
        input_size: side of a checkpoint's images, or (height, width), where the file does not tell it.

    Raises:
        InputError: none of these, or broken.
    """
    if not path.exists():
        raise InputError(f"{path}: file not found")
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".csv" or path.is_dir():
        return _list(path)
    from kdlib_faces.teachers.files import describe_teacher

    return describe_teacher(path) or _weights(path, input_size)


def _weights(path: Path, input_size: int | tuple[int, int] | None) -> str:
    from kdlib_faces.backbones import describe_checkpoint, load_backbone

    info = describe_checkpoint(path, input_size=input_size)
    around = [f"opened {' / '.join(info.wrappers)}"] if info.wrappers else []
    around += [f"stripped {info.prefix!r}"] if info.prefix else []
    around += [f"left out {', '.join(info.beside)}"] if info.beside else []
    lengths = {
        True: "of unit length where it was published, not here",
        False: "not normalized",
        None: "not normalized; some projects of this layout do it, some do not",
    }
    told = {
        "file": f"{info.kind}, {info.size:,} bytes",
        "layout": f"{info.layout}: {info.about}",
        "wrapping": "; ".join(around) or "none",
        "network": f"{info.backbone}: {info.network}",
        "input": info.input_spec.describe(),
        "output": f"(b, {info.embedding_dim}), {lengths[info.input_spec.normalized]}",
        "parameters": f"{info.parameters:,}",
        "MACs": f"{info.macs:,}",
        "keys": f"{info.keys:,}",
        "taps": ", ".join(info.stages),
    }
    lines = [f"{name:<12}{value}" for name, value in told.items()]
    if info.differences:
        lines.append("does not fit the network; differences:")
        for kind, keys in info.differences.items():
            lines.append(f"  {kind} ({len(keys)})")
            lines += [f"    {key}" for key in keys]
        return "\n".join(lines)
    try:
        load_backbone(path, input_size=input_size)
    except InputError as error:
        lines.append(f"{'weights':<12}cannot be used: {error}")
    else:
        lines.append(f"{'weights':<12}all there, all finite")
    return "\n".join(lines)


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """A side in pixels, or height and width.

    Raises:
        InputError: neither.

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


def taps(path: Path, names: Sequence[str], input_size: int | tuple[int, int] | None = None) -> str:
    """The shapes of taps of a network file, for one image; what a recipe's tap settings may name.

    Args:
        path: the file.
        names: of the taps.
        input_size: as for `file`.

    Raises:
        InputError: no network, or no tap of that name; the message lists the nearest.
    """
    if not path.exists():
        raise InputError(f"{path}: file not found")
    wanted = {name: name for name in names}
    if path.suffix == ".onnx":
        from kdlib_faces.teachers.onnx.session import OnnxTeacher

        shapes = OnnxTeacher(path, wanted).shapes
        return "\n".join(f"{name}  (b, {', '.join(map(str, shape))})" for name, shape in shapes.items())
    import torch

    from kdlib import StudentAdapter
    from kdlib_faces.backbones import load_backbone
    from kdlib_faces.teachers import load_teacher

    model: Any = load_teacher(path) if input_size is None else load_backbone(path, input_size=input_size)
    sides = (model.input_size,) * 2 if isinstance(model.input_size, int) else tuple(model.input_size)
    with torch.inference_mode():
        features = StudentAdapter(model, wanted)(torch.zeros(1, 3, *sides))
    return "\n".join(f"{name}  (b, {', '.join(map(str, x.shape[1:]))})" for name, x in features.items())


def _onnx(path: Path) -> str:
    from kdlib_faces.teachers.onnx.session import describe_graph, list_taps, suggest_taps

    about = describe_graph(path)
    lines = [f"{name:<14}{about[name]}" for name in ("inputs", "outputs", "opset", "embedding_dim", "input_size")]
    lines += [f"{'parameters':<14}{about['parameters']:,}"]
    lines += [f"{'MACs':<14}{about['macs']:,}" if about["macs"] else f"{'MACs':<14}not countable"]
    best = {tensor: name for name, tensor in suggest_taps(path).items()}
    lines.append("taps (shape for one image; a * marks the last sum at its resolution):")
    for tap in list_taps(path):
        lines.append(f"  {'*' if tap.name in best else ' '} {tuple(tap.shape)!s:<20}{tap.op:<20}{tap.name}")
    return "\n".join(lines)


def _list(path: Path) -> str:
    from kdlib_faces.data.lists import read_faces

    faces = read_faces([path])
    lines = [f"images        {len(faces):,}", f"identities    {faces.num_identities:,}"]
    if faces.ages is not None:
        known = faces.ages[np.isfinite(faces.ages)]
        lines.append(f"ages          {len(known):,} known, {known.min():g} to {known.max():g} years")
    if faces.age_groups is not None:
        counts = {name: int((faces.age_groups == at).sum()) for at, name in enumerate(faces.group_names)}
        lines.append(f"age groups    {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    return "\n".join(lines)
