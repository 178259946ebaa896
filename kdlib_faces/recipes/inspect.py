"""Recipes room: says in plain text what the backbones cost and what a file is. Reads files; writes none."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdlib_faces._checks import InputError

__all__ = ["backbones", "file", "taps"]


def backbones() -> str:
    """The table of all backbones: parameters, trainable ones, multiply-adds, entries of the state dict.

    Examples:
        >>> print(backbones().splitlines()[0].split()[:3])
        ['backbone', 'embedding', 'input']
    """
    from kdlib_faces.backbones.complexity import describe_backbones

    head = f"{'backbone':<16}{'embedding':>10}{'input':>7}{'parameters':>14}{'trainable':>14}{'MACs':>17}{'keys':>6}"
    lines = [head]
    for row in describe_backbones():
        size = row.input_size if isinstance(row.input_size, int) else "x".join(map(str, row.input_size))
        lines.append(
            f"{row.name:<16}{row.embedding_dim:>10}{size:>7}{row.parameters:>14,}{row.trainable:>14,}"
            f"{row.macs:>17,}{row.state_keys:>6}"
        )
    lines.append("MACs: multiply-adds of convolutions and linear layers at one image; BatchNorm and PReLU not counted.")
    return "\n".join(lines)


def file(path: Path) -> str:
    """What a file is: an ONNX network, our own or a published checkpoint, or a face list.

    Raises:
        InputError: none of these, or broken.
    """
    if not path.exists():
        raise InputError(f"{path}: file not found")
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".csv" or path.is_dir():
        return _list(path)
    from kdlib_faces.backbones import load_backbone
    from kdlib_faces.backbones.complexity import count_macs, count_parameters

    model = load_backbone(path)
    return (
        f"{model!r}\nparameters {count_parameters(model):,}\nMACs {count_macs(model, model.input_size):,}\n"
        f"taps {', '.join(model.stages)}"
    )


def taps(path: Path, names: Sequence[str]) -> str:
    """The shapes of taps of a network file, for one image; what a recipe's tap settings may name.

    Raises:
        InputError: no network, or no tap of that name; the message lists the nearest.
    """
    if not path.exists():
        raise InputError(f"{path}: file not found")
    wanted = {name: name for name in names}
    if path.suffix == ".onnx":
        from kdlib_faces.teachers.onnx import OnnxTeacher

        shapes = OnnxTeacher(path, wanted).shapes
        return "\n".join(f"{name}  (b, {', '.join(map(str, shape))})" for name, shape in shapes.items())
    import torch

    from kdlib import StudentAdapter
    from kdlib_faces.backbones import load_backbone

    model = load_backbone(path)
    sides = (model.input_size,) * 2 if isinstance(model.input_size, int) else tuple(model.input_size)
    with torch.inference_mode():
        features = StudentAdapter(model, wanted)(torch.zeros(1, 3, *sides))
    return "\n".join(f"{name}  (b, {', '.join(map(str, x.shape[1:]))})" for name, x in features.items())


def _onnx(path: Path) -> str:
    from kdlib_faces.teachers.onnx import describe_graph, list_taps, suggest_taps

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
    from kdlib_faces.data.listing import read_faces

    faces = read_faces([path])
    lines = [f"images        {len(faces):,}", f"identities    {faces.num_identities:,}"]
    if faces.ages is not None:
        known = faces.ages[np.isfinite(faces.ages)]
        lines.append(f"ages          {len(known):,} known, {known.min():g} to {known.max():g} years")
    if faces.age_groups is not None:
        counts = {name: int((faces.age_groups == at).sum()) for at, name in enumerate(faces.group_names)}
        lines.append(f"age groups    {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    return "\n".join(lines)
