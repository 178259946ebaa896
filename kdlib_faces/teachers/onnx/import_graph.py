"""Teachers room: a face network in an ONNX file as a native backbone, to be fine-tuned. Touches onnx by `onnx_chain`.

What a file is, is told from the layers of its graph, never from its name: insightface's IResNet of any depth, MBF with
either tail, MobileFaceNet; with BatchNorms of their own or folded into the convolutions, as exporters leave them.

A folded BatchNorm cannot be taken out of a convolution again, and need not be: it is put back as one that changes nothing
but adds the folded shift (weight 1, mean 0, variance 1 - eps). The network then has the layers and keys of its family,
and gives what the file gives, in eval mode. To train it, either keep its statistics (`AgeTeacherConfig` does:
BatchNorm in eval mode), or let `restore_statistics` measure the true ones first, so that train mode starts where eval
mode is.
"""

import os
from collections.abc import Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_rank
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MBF, Backbone, IResNet, MBFFlat, MobileFaceNet
from kdlib_faces.teachers.onnx.chain import Residual, Step, read_chain
from kdlib_faces.teachers.onnx.cursor import Cursor, Mismatch
from kdlib_faces.teachers.onnx.graph import Graph, make_session, read_graph, run_session

__all__ = ["import_onnx", "restore_statistics"]

TOLERANCE = 1e-4
"""Largest difference to the file's own outputs, as a part of their largest value."""


def import_onnx(path: str | os.PathLike[str], *, verify: bool = True) -> Backbone:
    """Read an ONNX file as a native, trainable backbone.

    Args:
        path: an `.onnx` file that takes our images as they are: RGB, `(x - 127.5) / 127.5`.
        verify: run the file too, on two images, and refuse a network that gives anything else.

    Returns:
        An `IResNet`, `MBF`, `MBFFlat` or `MobileFaceNet` in eval mode, `(b, 3, h, w)` to `(b, d)`; it has `stages`, and
        `save_backbone` and `load_backbone` take it.

    Raises:
        InputError: the file is unusable, is none of these networks (the message names the first node that does not fit),
            or the imported network does not give the file's outputs.

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
    items = read_chain(graph)
    try:
        model = _build(graph, items)
    except Mismatch as error:
        raise _unknown(graph, str(error)) from error
    except (TypeError, ValueError, RuntimeError) as error:  # sizes that no network of ours can have
        raise _unknown(graph, str(error).splitlines()[0]) from error
    model.eval()
    if verify:
        _verify(graph, model)
    return model


def restore_statistics(model: nn.Module, images: Tensor, *, batch: int = 64) -> None:
    """Give each BatchNorm the statistics of real images, and leave what the network computes in eval mode as it is.

    A BatchNorm made of a folded one says mean 0 and variance 1 whatever its input. Here each gets the mean and variance
    that its input has over `images`, and a weight and shift that undo the change: train mode then starts near eval mode.

    Args:
        model: any network; changed in place.
        images: `(n, 3, h, w)` float, as the network takes them, a few hundred of them.
        batch: images in one forward.

    Raises:
        ValueError, TypeError: images that are none, or fewer than two.
    """
    check_floating("restore_statistics", images=images)
    check_rank("restore_statistics", "images", images, "b 3 h w")
    check_number("restore_statistics", "number of images", len(images), min=2, integer=True)
    sums: dict[nn.Module, list[Tensor]] = {}

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double().transpose(0, 1).flatten(1)
        count = torch.tensor(float(x.shape[1]), dtype=torch.float64)
        held = sums.setdefault(module, [torch.zeros(()).double() for _ in range(3)])
        for at, value in enumerate((count, x.sum(1), x.square().sum(1))):
            held[at] = held[at] + value

    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm1d | nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for part in torch.split(images, batch):
                model(part)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for norm in norms:
        if norm in sums and norm.running_mean is not None and norm.running_var is not None and norm.affine:
            count, total, squares = sums[norm]
            mean = total / count
            var = (squares / count - mean.square()).clamp(min=0)
            old = (norm.running_var.double() + norm.eps).sqrt()
            with torch.no_grad():
                norm.bias.add_((norm.weight.double() / old * (mean - norm.running_mean.double())).to(norm.bias.dtype))
                norm.weight.mul_(((var + norm.eps).sqrt() / old).to(norm.weight.dtype))
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)


def _unknown(graph: Graph, why: str) -> InputError:
    return InputError(
        f"{graph.path} is no IResNet, MBF or MobileFaceNet that can be imported: {why}; "
        "OnnxTeacher runs any face network, without training it"
    )


def _build(graph: Graph, items: Sequence[Step | Residual]) -> Backbone:
    """The native network of the graph's family, filled."""
    first = items[0] if items else None
    if not isinstance(first, Step) or first.kind != "conv":
        raise Mismatch(f"its first layer is {first.node if first else 'missing'}, not a convolution on the images")
    return _iresnet(graph, items, first) if first.stride == 1 else _mobile(graph, items, first)


def _size(graph: Graph, cells: int | None = None) -> int | tuple[int, int]:
    """The side of the images: as the graph declares it, else a sixteenth of a square final grid of `cells`."""
    if graph.input_size is not None:
        return graph.input_size
    side = isqrt(cells or 49)
    if side * side != (cells or 49):
        raise Mismatch(f"its input size is free and its final grid of {cells} cells is not square")
    return 16 * side


def _channels(step: Step) -> int:
    return step.weights["weight"].shape[0]


def _embedding(items: Sequence[Step | Residual]) -> Step:
    last = next((item for item in reversed(items) if isinstance(item, Step) and item.kind == "linear"), None)
    if last is None:
        raise Mismatch("it has no linear layer that makes the embedding")
    return last


def _iresnet(graph: Graph, items: Sequence[Step | Residual], first: Step) -> IResNet:
    stages: list[int] = []
    for item in items:
        if isinstance(item, Residual):
            if item.shortcut:
                stages.append(0)
            if not stages:
                raise Mismatch(f"a residual sum ({item.node}) before the first stage")
            stages[-1] += 1
    if len(stages) != 4:
        raise Mismatch(f"it has {len(stages)} stages with a convolution beside the sum, not 4")
    width, last = _channels(first), _embedding(items)
    dim, inputs = last.weights["weight"].shape
    size = _size(graph, inputs // (8 * width))
    net = IResNet(stages, embedding_dim=dim, width=width / 64, input_size=size)
    at = Cursor(items)
    at.conv(net.conv1, net.bn1)
    at.prelu(net.prelu)
    block: Any
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            fork = at.residual()
            body, beside = Cursor(fork.body), Cursor(fork.shortcut)
            body.norm(block.bn1)
            body.conv(block.conv1, block.bn2)
            body.prelu(block.prelu)
            body.conv(block.conv2, block.bn3)
            body.end()
            if block.downsample is not None:
                beside.conv(block.downsample[0], block.downsample[1])
            beside.end()
    at.norm(net.bn2)
    at.take("flatten")
    at.linear(net.fc, net.features)
    at.end()
    return net


def _mobile(graph: Graph, items: Sequence[Step | Residual], first: Step) -> Backbone:
    """MBF or MobileFaceNet: the runs of residual sums between the units that halve the grid tell the blocks."""
    runs = [0]
    for item in items:
        if isinstance(item, Residual):
            runs[-1] += 1
        elif item.kind == "conv" and item.stride == 2:
            runs.append(0)
    c, dim = _channels(first), _embedding(items).weights["weight"].shape[0]
    head = [item for item in items[:5] if not isinstance(item, Step) or item.kind == "conv"]
    if len(runs) != 5:
        raise Mismatch(f"it halves the grid {len(runs) - 1} times, not 4")
    counts = (runs[1] or 1, *runs[2:])
    depthwise = len(head) > 1 and isinstance(head[1], Step) and head[1].groups == c
    if depthwise and counts == (1, 4, 6, 2):
        return _mobilefacenet(graph, items, c, dim)
    if c % 64:
        raise Mismatch(f"{first.node} has {c} channels, an MBF has a multiple of 64")
    flat = any(isinstance(item, Step) and item.kind == "flatten" for item in items) and not _global(items)
    blocks: dict[str, Any] = {"embedding_dim": dim, "scale": c // 64, "blocks": counts}
    net: MBF
    if flat:
        last = [item for item in items if isinstance(item, Step) and item.kind == "conv"][-1]
        cells = _embedding(items).weights["weight"].shape[1] // max(1, _channels(last))
        net = MBFFlat(**blocks, input_size=_size(graph, cells), tail_channels=_channels(last))
    else:
        net = MBF(**blocks, input_size=_size(graph, _global(items)))
    walk = Cursor(items)
    layer: Any
    for layer in net.layers:
        if isinstance(layer.layers[0], nn.Conv2d):
            walk.block(layer)
        else:
            for unit in [layer] if hasattr(layer, "residual") else layer.layers:
                walk.bottleneck(unit)
    walk.block(net.conv_sep)
    tail: Any = net.features.layers
    if flat:
        walk.block(tail[0])
    else:
        walk.conv(*tail[0].layers)
    walk.take("flatten")
    walk.linear(tail[2], tail[3])
    walk.end()
    return net


def _global(items: Sequence[Step | Residual]) -> int | None:
    """Cells of the kernel of a global depthwise convolution; None without one."""
    for item in reversed(items):
        if isinstance(item, Step) and item.kind == "conv":
            weight = item.weights["weight"]
            return weight.shape[2] * weight.shape[3] if item.groups == weight.shape[0] and not item.padding else None
    return None


def _mobilefacenet(graph: Graph, items: Sequence[Step | Residual], c: int, dim: int) -> MobileFaceNet:
    net = MobileFaceNet(dim, width=c / 64, input_size=_size(graph, _global(items)))
    at = Cursor(items)
    at.block(net.conv1)
    at.block(net.conv2_dw)
    for halving, run in ((net.conv_23, net.conv_3), (net.conv_34, net.conv_4), (net.conv_45, net.conv_5)):
        at.bottleneck(halving)
        for unit in run.model:
            at.bottleneck(unit)
    at.block(net.conv_6_sep)
    at.conv(net.conv_6_dw.conv, net.conv_6_dw.bn)
    at.take("flatten")
    at.linear(net.linear, net.bn)
    at.end()
    return net


def _verify(graph: Graph, model: Any) -> None:
    """The network's outputs must be the file's, on two images one by one."""
    shape = (1, 3, *(model.input_size if isinstance(model.input_size, tuple) else (model.input_size,) * 2))
    session = make_session(graph, [graph.model.graph.output[0].name])
    for seed in (0, 1):
        images = np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)
        batch = graph.shape[0] or 1
        theirs = run_session(graph, session, np.repeat(images, batch, axis=0))[0][:1]
        with torch.no_grad():
            ours = model(torch.from_numpy(images)).numpy()
        if theirs.shape != ours.shape:
            raise _unknown(graph, f"it gives {theirs.shape} for one image, the network {ours.shape}")
        gap = float(np.abs(theirs - ours).max() / max(float(np.abs(theirs).max()), 1e-12))
        if not gap <= TOLERANCE:
            raise _unknown(graph, f"its outputs differ from those of the network by {gap:.2g} of their largest value")
