"""Face networks in ONNX files as native, trainable backbones."""

import os
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_rank
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MBF, Backbone, IResNet, MBFFlat, MobileFaceNet
from kdlib_faces.backbones.input_spec import height_width
from kdlib_faces.backbones.input_statistics import input_statistics
from kdlib_faces.teachers.onnx.chain import Layers, Residual, Step, read_chain
from kdlib_faces.teachers.onnx.fill import Mismatch, fill
from kdlib_faces.teachers.onnx.graph import Graph, ImageSize, file_errors, read_graph
from kdlib_faces.teachers.onnx.runtime import as_vectors, find_embedding, make_session, run

__all__ = ["import_onnx", "restore_statistics"]

TOLERANCE = 1e-4
"""Maximum difference from the file's own outputs, relative to their largest value."""


def import_onnx(path: str | os.PathLike[str], *, verify: bool = True) -> Backbone:
    """Read an ONNX file as a native, trainable backbone.

    The family is recognized by the layers of the graph: insightface's IResNet of any depth, MBF with either tail, or
    MobileFaceNet, with BatchNorms of their own or folded into the convolutions. A folded BatchNorm cannot be recovered. It
    becomes one that only adds the folded shift (weight 1, mean 0, variance 1 - eps), so that the network has the layers and
    keys of its family and the outputs of the file in eval mode. To train it, keep its statistics (BatchNorm in eval mode, as
    `AgeTeacherConfig` does), or measure the true ones by `restore_statistics` first.

    Args:
        path: An `.onnx` file that takes RGB images, `(x - 127.5) / 127.5`.
        verify: Run the file on two images and refuse a network with other outputs.

    Returns:
        An `IResNet`, `MBF`, `MBFFlat` or `MobileFaceNet` in eval mode, `(b, 3, h, w)` to `(b, d)`.

    Raises:
        InputError: The file cannot be used, is none of these networks (the message names the first node that differs), or the
            imported network does not reproduce its outputs.

    Examples:
        With a file at hand::

            start = import_onnx("w600k_mbf.onnx")  # MBFFlat(embedding_dim=512, scale=2, blocks=(1, 4, 6, 2), ...)
            save_backbone(start, "start.pt")

        >>> import_onnx("no_such.onnx")
        Traceback (most recent call last):
        kdlib_faces._checks.InputError: the ONNX file no_such.onnx does not exist
    """
    graph = read_graph(path)
    if graph.dtype is not np.float32:
        raise _unknown(graph, f"its images are {np.dtype(graph.dtype)}, not float32")
    with file_errors(graph.path):
        layers = read_chain(graph)
        try:
            model = _match(graph, layers)
            fill([model], layers)
        except Mismatch as error:
            raise _unknown(graph, str(error)) from error
        except (TypeError, ValueError, RuntimeError) as error:  # sizes that no network of ours can have
            raise _unknown(graph, str(error).splitlines()[0]) from error
        model.eval()
        if verify:
            _verify(graph, model)
    return model


def restore_statistics(model: nn.Module, images: Tensor, *, batch: int = 64) -> None:
    """Set each BatchNorm to the statistics of real images without a change of the network's output in eval mode.

    A BatchNorm imported from a folded one has mean 0 and variance 1 whatever its input. Here it gets the mean and variance of
    its input over `images`, and a weight and bias that compensate for the change. The outputs of train mode are then close to
    those of eval mode.

    Args:
        model: Any network; changed in place.
        images: `(n, 3, h, w)` floats in the format of the network, a few hundred of them.
        batch: Images per forward pass.

    Raises:
        ValueError, TypeError: The images have another shape or type, or there are fewer than two.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        >>> images = torch.rand(8, 3, 6, 6)
        >>> before = model(images)
        >>> restore_statistics(model, images)
        >>> bool(model[1].running_mean.abs().sum() > 0), torch.allclose(model(images), before, atol=1e-5)
        (True, True)
    """
    check_floating("restore_statistics", images=images)
    check_rank("restore_statistics", "images", images, "b 3 h w")
    check_number("restore_statistics", "number of images", len(images), min=2, integer=True)
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm, (mean, var) in input_statistics(model, norms, torch.split(images, batch)).items():
        if norm.running_mean is not None and norm.running_var is not None and norm.affine:
            old = (norm.running_var.double() + norm.eps).sqrt()
            with torch.no_grad():
                norm.bias.add_((norm.weight.double() / old * (mean - norm.running_mean.double())).to(norm.bias.dtype))
                norm.weight.mul_(((var + norm.eps).sqrt() / old).to(norm.weight.dtype))
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)


def _unknown(graph: Graph, reason: str) -> InputError:
    return InputError(
        f"{graph.path} is not an IResNet, MBF or MobileFaceNet that can be imported: {reason}; "
        "OnnxTeacher runs any face network, without training it"
    )


def _match(graph: Graph, layers: Layers) -> Backbone:
    """A network of the graph's family and sizes, with random weights."""
    convs = [item for item in layers if isinstance(item, Step) and item.kind == "conv"]
    linear = next((item for item in reversed(layers) if isinstance(item, Step) and item.kind == "linear"), None)
    first = layers[0] if layers else None
    if not isinstance(first, Step) or first.kind != "conv":
        raise Mismatch(f"its first layer is {first.node if first else 'missing'}, not a convolution on the images")
    if linear is None:
        raise Mismatch("it has no linear layer that makes the embedding")
    c, (dim, inputs) = _channels(first), linear.weights["weight"].shape
    if first.stride == 1:
        return IResNet(
            _iresnet_stages(layers), embedding_dim=dim, width=c / 64, input_size=_size(graph, inputs // (8 * c))
        )
    runs = [0]
    for item in layers:
        if isinstance(item, Residual):
            runs[-1] += 1
        elif item.kind == "conv" and item.stride == 2:
            runs.append(0)
    if len(runs) != 5:
        raise Mismatch(f"it halves the grid {len(runs) - 1} times, not 4")
    blocks = (runs[1] or 1, *runs[2:])
    # A global depthwise convolution ends both networks, except the flat MBF.
    kernel = convs[-1].weights["weight"].shape[2:]
    pooled = convs[-1].groups == _channels(convs[-1]) and not convs[-1].padding
    cells = kernel.numel() if pooled else None
    head = [item for item in layers[:5] if isinstance(item, Residual) or item.kind == "conv"]
    depthwise = len(head) > 1 and isinstance(head[1], Step) and head[1].groups == c
    if depthwise and blocks == (1, 4, 6, 2):
        return MobileFaceNet(dim, width=c / 64, input_size=_size(graph, cells))
    if c % 64:
        raise Mismatch(f"{first.node} has {c} channels, an MBF has a multiple of 64")
    if pooled:
        return MBF(dim, scale=c // 64, blocks=blocks, input_size=_size(graph, cells))
    tail = _channels(convs[-1])
    size = _size(graph, inputs // max(1, tail))
    return MBFFlat(dim, scale=c // 64, blocks=blocks, input_size=size, tail_channels=tail)


def _size(graph: Graph, cells: int | None) -> ImageSize:
    """The declared side of the images, else 16 times the side of a square final grid of `cells`."""
    if graph.input_size is not None:
        return graph.input_size
    side = isqrt(cells or 49)
    if side * side != (cells or 49):
        raise Mismatch(f"its input size is free and its final grid of {cells} cells is not square")
    return 16 * side


def _channels(step: Step) -> int:
    return step.weights["weight"].shape[0]


def _iresnet_stages(layers: Layers) -> list[int]:
    """Blocks of each stage; a convolution in the shortcut begins a stage."""
    stages: list[int] = []
    for item in layers:
        if isinstance(item, Residual):
            if item.shortcut:
                stages.append(0)
            if not stages:
                raise Mismatch(f"a residual sum ({item.node}) before the first stage")
            stages[-1] += 1
    if len(stages) != 4:
        raise Mismatch(f"it has {len(stages)} stages with a convolution beside the sum, not 4")
    return stages


def _verify(graph: Graph, model: Backbone) -> None:
    """The outputs of the network must be those of the file, on two images one by one."""
    size = height_width("import_onnx", model.input_size)
    session = make_session(graph, [find_embedding(graph)])
    for seed in (0, 1):
        images = np.random.default_rng(seed).uniform(-1, 1, (1, 3, *size)).astype(np.float32)
        expected = as_vectors(run(graph, session, np.repeat(images, graph.shape[0] or 1, axis=0))[0])[:1]
        with torch.no_grad():
            outputs = model(torch.from_numpy(images)).numpy()
        if expected.shape != outputs.shape:
            raise _unknown(graph, f"it returns {expected.shape} for one image, the network {outputs.shape}")
        difference = float(np.abs(expected - outputs).max() / max(float(np.abs(expected).max()), 1e-12))
        if not difference <= TOLERANCE:
            raise _unknown(
                graph, f"its outputs differ from those of the network by {difference:.2g} of their largest value"
            )
