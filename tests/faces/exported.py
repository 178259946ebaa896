"""Our own backbones as ONNX files, with BatchNorms folded into the convolutions or not."""

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, shifts and slopes as training leaves them, so that no mistake with them can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                size = (module.num_features,)
                module.running_mean.copy_(0.2 * torch.randn(size, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
                module.weight.copy_(0.7 + 0.6 * torch.rand(size, generator=generator))
                module.bias.copy_(0.2 * torch.randn(size, generator=generator))
            elif isinstance(module, nn.PReLU):
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator))
            elif isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan**0.5)
    return model.eval()


def write(
    model: nn.Module,
    path: Path,
    *,
    fold: bool,
    size: int | None = 32,
    eps: float | None = None,
    flatten: str = "Flatten",
) -> Path:
    """Export `model` to `path`.

    Args:
        model: A network for images of 32 pixels.
        path: The file.
        fold: Fold each BatchNorm into the convolution before it.
        size: Declared size of the images; None leaves it free.
        eps: Write the same BatchNorms with this eps, the variances shifted by the difference.
        flatten: Operation that flattens the last map: `"Flatten"`, `"Reshape"`, or `"view"`, a reshape to a computed shape.
    """
    model = copy.deepcopy(model)
    for norm in model.modules() if eps is not None else ():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.running_var += norm.eps - eps
            norm.eps = eps
    free = {0: "n"} if size else {0: "n", 2: "h", 3: "w"}
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.zeros(2, 3, 32, 32),), str(path), dynamo=False, input_names=["images"],
            dynamic_axes={"images": free}, opset_version=13, training=mode,
        )  # fmt: skip
    if flatten != "Flatten":
        _replace_flatten(path, computed=flatten == "view")
    return path


def _replace_flatten(path: Path, *, computed: bool) -> None:
    file = onnx.load(str(path))
    at, node = next((at, node) for at, node in enumerate(file.graph.node) if node.op_type == "Flatten")
    x, y = node.input[0], node.output[0]
    constants = {"first": np.array(0), "axes": np.array([0]), "rest": np.array([-1]), "fixed": np.array([0, -1])}
    new = [helper.make_node("Reshape", [x, "shape" if computed else "fixed"], [y])]
    if computed:  # view(x.size(0), -1) as a tracer writes it
        new[:0] = [
            helper.make_node("Shape", [x], ["dims"]), helper.make_node("Gather", ["dims", "first"], ["rows"], axis=0),
            helper.make_node("Unsqueeze", ["rows", "axes"], ["row"]),
            helper.make_node("Concat", ["row", "rest"], ["shape"], axis=0),
        ]  # fmt: skip
    file.graph.node.remove(node)
    for offset, each in enumerate(new):
        file.graph.node.insert(at + offset, each)
    file.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.save(file, str(path))
