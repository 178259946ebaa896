"""Recipes room: a frozen teacher from a file, with the taps that a recipe reads. Reads weights; touches no images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdlib import OUTPUT, TeacherAdapter
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import BACKBONES, build_backbone

__all__ = ["onnx_taps", "open_teacher", "teacher_taps"]


def teacher_taps(model: Any, stage: int) -> dict[str, Any]:
    """Taps of a teacher with named stages, an age-invariant one included."""
    return {"embedding": OUTPUT, "map": model.stages[stage]}


def onnx_taps(path: str, stage: int = 2) -> dict[str, Any]:
    """Taps of an ONNX teacher: its embedding, and the last map of the grid that a network's stage of that number has.

    A stage halves the sides: of 112 pixels the one of number 2 leaves a grid of 14. The nearest that the graph has is taken.

    Args:
        path: the file.
        stage: counted from 0.

    Raises:
        InputError: a graph without square feature maps, or no graph.
    """
    from kdlib_faces.teachers.onnx.session import describe_graph, suggest_taps

    maps = {int(name[3:]): tensor for name, tensor in suggest_taps(path).items() if name[3:].isdigit()}
    if not maps:
        raise InputError(f"{path}: no square feature map to distil from; is it a convolutional network?")
    side = describe_graph(path)["input_size"]
    grid = (side if isinstance(side, int) else 112) / 2 ** (stage + 1)
    return {"embedding": None, "map": maps[min(maps, key=lambda found: abs(found - grid))]}


def open_teacher(source: str, reads: Mapping[str, str], *, stage: int, untrained: Mapping[str, Any]) -> nn.Module:
    """A frozen teacher that takes the student's images: RGB in [-1, 1], whatever size, order and range it wants itself.

    Args:
        source: a checkpoint, an `.onnx` file, or a backbone's name for an untrained one (dry runs).
        reads: features that are read of it, each with the setting that leaves its term out.
        stage: which of the four stages is `"map"`.
        untrained: arguments of an untrained one.

    Raises:
        InputError: a file that cannot be used.
    """
    from kdlib_faces.teachers import OnnxTeacher, load_teacher

    if source.endswith(".onnx"):
        taps: dict[str, Any] = {"embedding": None}
        if "map" in reads:
            try:
                taps = onnx_taps(source, stage)
            except InputError as error:
                raise InputError(f"{error} {reads['map']}=0 leaves out the term that reads one") from error
        return OnnxTeacher(source, taps, resize=True)
    if source in BACKBONES:
        model: Any = build_backbone(source, **untrained)
    elif Path(source).is_dir():
        raise InputError(
            f"{source} is a folder; a cache of a teacher's outputs is taken by `kdlib-faces train`, which knows the images "
            "that it must be of"
        )
    else:
        model = load_teacher(source)
    return TeacherAdapter(model, teacher_taps(model, stage), preprocess=model.input_spec)
