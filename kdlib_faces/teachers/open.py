"""Frozen teachers from files, with the taps that a recipe reads."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from kdlib import OUTPUT, Tap, TeacherAdapter
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import BACKBONES, Backbone, build_backbone
from kdlib_faces.teachers.files import TeacherNet, load_teacher
from kdlib_faces.teachers.input_options import InputOptions
from kdlib_faces.teachers.onnx.graph import Layout, read_graph
from kdlib_faces.teachers.onnx.import_graph import import_onnx
from kdlib_faces.teachers.onnx.inspect import describe_graph, suggest_taps
from kdlib_faces.teachers.onnx.preprocessing import recognize_input
from kdlib_faces.teachers.onnx.runtime import OnnxTap, providers_for
from kdlib_faces.teachers.onnx.session import OnnxTeacher

__all__ = ["load_network", "load_pretrained", "onnx_taps", "open_onnx", "open_teacher", "stage_taps"]

RECOGNIZED = InputOptions()
CPU = torch.device("cpu")


def stage_taps(model: TeacherNet, stage: int) -> dict[str, str | Tap]:
    """Taps of a network's embedding and of one of its stages, as the features `"embedding"` and `"map"`."""
    return {"embedding": OUTPUT, "map": model.stages[stage]}


def onnx_taps(path: str, stage: int = 2, layout: Layout | None = None) -> dict[str, str | None]:
    """Taps of an ONNX graph's embedding, and of its last map on the grid of a network's stage.

    Stage `s` of a network has `1 / 2^(s + 1)` of the image's height: at 112 pixels, stage 2 has 14 rows. The map of the graph
    with the nearest number of rows is taken.

    Args:
        path: The `.onnx` file.
        stage: Number of the stage, from 0.
        layout: As for `OnnxTeacher`.

    Returns:
        `"embedding"` and `"map"` to the names of tensors; None stands for the output of the graph.

    Raises:
        InputError: The file is not an ONNX graph, or the graph has no feature maps.
    """
    maps = {int(name[3:].split("x")[0]): tensor for name, tensor in suggest_taps(path, layout).items()}
    if not maps:
        raise InputError(f"{path}: no feature map to distill from; is it a convolutional network?")
    size = describe_graph(path, layout)["input_size"] or 112
    grid = (size if isinstance(size, int) else size[0]) / 2 ** (stage + 1)
    return {"embedding": None, "map": maps[min(maps, key=lambda each: abs(each - grid))]}


def open_onnx(
    path: str | os.PathLike[str],
    taps: Mapping[str, OnnxTap] | None = None,
    *,
    input_options: InputOptions = RECOGNIZED,
    resize: bool = False,
    device: torch.device = CPU,
) -> OnnxTeacher:
    """Open an ONNX graph as a teacher whose images are converted by the input options, or as its first operations imply.

    Args:
        path: The `.onnx` file.
        taps: As for `OnnxTeacher`.
        input_options: Input options; a field that is None is recognized from the graph.
        resize: As for `OnnxTeacher`.
        device: Device on which onnxruntime runs the graph.

    Raises:
        InputError: As `OnnxTeacher`, or this onnxruntime does not run on the device.
    """
    preprocess = None
    if (input_options.color, input_options.mean, input_options.scale) != (None, None, None):
        preprocess = input_options.applied_to(recognize_input(read_graph(path, input_options.layout)))
    return OnnxTeacher(
        path, taps, preprocess=preprocess, layout=input_options.layout, providers=providers_for(device), resize=resize
    )


def load_network(path: str | os.PathLike[str], input_options: InputOptions = RECOGNIZED) -> TeacherNet:
    """Read a checkpoint or a teacher file.

    Args:
        path: The file.
        input_options: Input options, which override what the layout of the file implies.

    Returns:
        The network on the CPU in eval mode.

    Raises:
        InputError: As `load_teacher`, or `input_options` has a layout, which only ONNX graphs have.
    """
    if input_options.layout is not None:
        raise InputError(f"{os.fspath(path)}: layout={input_options.layout} applies to ONNX graphs only")
    network = load_teacher(path)
    backbone = network if isinstance(network, Backbone) else network.backbone
    backbone.input_spec = input_options.applied_to(backbone.input_spec)
    return network


def load_pretrained(path: str | os.PathLike[str], input_options: InputOptions = RECOGNIZED) -> TeacherNet:
    """Read a network for fine-tuning: an `.onnx` file of a known family, a teacher file or a checkpoint.

    Args:
        path: The file.
        input_options: Input options, which override what the file implies.

    Returns:
        The network on the CPU in eval mode.

    Raises:
        InputError: As `import_onnx` and `load_network`.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.backbones import MobileFaceNet, save_backbone
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_backbone(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32), f"{folder}/net.pt")
        ...     net = load_pretrained(f"{folder}/net.pt", InputOptions(color="bgr"))
        >>> net, net.input_spec.color
        (MobileFaceNet(embedding_dim=16, width=0.25, input_size=32), 'bgr')
    """
    if Path(path).suffix.lower() != ".onnx":
        return load_network(path, input_options)
    network = import_onnx(path)
    network.input_spec = input_options.applied_to(network.input_spec)
    return network


def open_teacher(
    source: str,
    features: Mapping[str, str],
    *,
    stage: int,
    input_size: int,
    embedding_dim: int,
    seed: int,
    input_options: InputOptions = RECOGNIZED,
    device: torch.device = CPU,
) -> nn.Module:
    """Open a frozen teacher that takes the student's images (RGB, in [-1, 1]) and converts them to its own format.

    Args:
        source: A checkpoint, an `.onnx` file, or the name of a backbone for an untrained teacher (dry runs).
        features: The features to read, `"embedding"` and `"map"`, each with the setting that removes its term.
        stage: Number of the stage that is `"map"`, 0 to 3.
        input_size: Side of the images of an untrained teacher, pixels.
        embedding_dim: Embedding dimension of an untrained teacher.
        seed: Seed of the weights of an untrained teacher.
        input_options: Input options, which override what the file implies.
        device: Device of an ONNX graph; a network moves with the distiller.

    Returns:
        A teacher that returns `"embedding"` and `"map"`; an ONNX graph returns the map only if `features` names it.

    Raises:
        InputError: The file cannot be used.
    """
    if source.endswith(".onnx"):
        taps: dict[str, str | None] = {"embedding": None}
        if "map" in features:
            try:
                taps = onnx_taps(source, stage, input_options.layout)
            except InputError as error:
                raise InputError(f"{error} {features['map']}=0 removes the term that reads it") from error
        return open_onnx(source, taps, input_options=input_options, resize=True, device=device)
    if Path(source).is_dir() and source not in BACKBONES:
        raise InputError(
            f"{source} is a folder; only `kdlib-faces train` reads caches of teacher outputs, since it has the training images"
        )
    model: TeacherNet = (
        build_backbone(source, seed=seed, input_size=input_size, embedding_dim=embedding_dim)
        if source in BACKBONES
        else load_network(source, input_options)
    )
    return TeacherAdapter(model, stage_taps(model, stage), preprocess=model.input_spec)
