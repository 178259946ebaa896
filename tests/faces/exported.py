"""Our own backbones as ONNX graphs, the way exporters write them: BatchNorm folded into the convolution before it, or not."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper, save
from torch import Tensor, nn

from kdlib_faces.backbones import MBF, IResNet, MobileFaceNet


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


class Exporter:
    """Builds a graph node by node; `fold` folds a BatchNorm into the convolution before it."""

    def __init__(self, *, fold: bool, eps: float | None = None, flatten: str = "Flatten") -> None:
        self.fold, self.eps, self.flatten_as = fold, eps, flatten
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, value: Tensor | np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        array = value.detach().numpy() if isinstance(value, Tensor) else value
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], f"n{len(self.nodes)}", **attributes))
        return out

    def norm(self, x: str, norm: Any) -> str:
        eps = norm.eps if self.eps is None else self.eps
        # Another eps: the same function, its variance shifted by the difference.
        values = (norm.weight, norm.bias, norm.running_mean, norm.running_var + norm.eps - eps)
        return self.node("BatchNormalization", [x, *map(self.weight, values)], epsilon=eps)

    def conv(self, x: str, conv: nn.Conv2d, norm: Any) -> str:
        weight = conv.weight
        inputs = [weight]
        if self.fold:
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            inputs = [weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor]
        names = [self.weight(each) for each in inputs]
        attributes = {"strides": list(conv.stride), "pads": [*conv.padding, *conv.padding], "group": conv.groups}
        out = self.node("Conv", [x, *names], kernel_shape=list(conv.kernel_size), dilations=[1, 1], **attributes)
        return out if self.fold else self.norm(out, norm)

    def prelu(self, x: str, prelu: nn.PReLU) -> str:
        return self.node("PRelu", [x, self.weight(prelu.weight[:, None, None])])

    def block(self, x: str, block: Any) -> str:
        conv, norm, prelu = block.layers if hasattr(block, "layers") else (block.conv, block.bn, block.prelu)
        return self.prelu(self.conv(x, conv, norm), prelu)

    def unit(self, x: str, unit: Any) -> str:
        parts = unit.layers if hasattr(unit, "layers") else (unit.conv, unit.conv_dw, unit.project)
        last = parts[2].layers if hasattr(parts[2], "layers") else (parts[2].conv, parts[2].bn)
        out = self.conv(self.block(self.block(x, parts[0]), parts[1]), *last)
        return self.node("Add", [x, out]) if unit.residual else out

    def flatten(self, x: str) -> str:
        if self.flatten_as == "Flatten":
            return self.node("Flatten", [x], axis=1)
        if self.flatten_as == "Reshape":
            return self.node("Reshape", [x, self.weight(np.array([0, -1], np.int64))])
        # view(x.size(0), -1) as a tracer writes it
        shape = self.node("Shape", [x])
        first = self.node("Gather", [shape, self.weight(np.array(0, np.int64))], axis=0)
        rows = self.node("Unsqueeze", [first, self.weight(np.array([0], np.int64))])
        wanted = self.node("Concat", [rows, self.weight(np.array([-1], np.int64))], axis=0)
        return self.node("Reshape", [x, wanted])

    def linear(self, x: str, linear: nn.Linear, norm: Any) -> str:
        if linear.bias is None:
            return self.norm(self.node("MatMul", [x, self.weight(linear.weight.T.contiguous())]), norm)
        names = [self.weight(each) for each in (linear.weight, linear.bias)]
        return self.norm(self.node("Gemm", [x, *names], transB=1), norm)


def write(model: nn.Module, path: Path, *, size: int | None = 32, **options: Any) -> Path:
    """Write `model` to `path`; `size` None leaves the input size free."""
    to = Exporter(**options)
    if isinstance(model, IResNet):
        out = _iresnet(to, model)
    elif isinstance(model, MBF):
        out = _mbf(to, model)
    else:
        assert isinstance(model, MobileFaceNet)
        out = _mobilefacenet(to, model)
    shape = ["n", 3, size or "h", size or "w"]
    graph = helper.make_graph(
        to.nodes,
        "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["n", model.embedding_dim])],
        to.weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    made.ir_version = 8
    save(made, str(path))
    return path


def _iresnet(to: Exporter, model: IResNet) -> str:
    x = to.prelu(to.conv("images", model.conv1, model.bn1), model.prelu)
    for block in (*model.layer1, *model.layer2, *model.layer3, *model.layer4):
        y = to.conv(to.norm(x, block.bn1), block.conv1, block.bn2)
        y = to.conv(to.prelu(y, block.prelu), block.conv2, block.bn3)
        x = to.node("Add", [y, x if block.downsample is None else to.conv(x, *block.downsample)])
    return to.linear(to.flatten(to.norm(x, model.bn2)), model.fc, model.features)


def _mbf(to: Exporter, model: MBF) -> str:
    x = "images"
    for layer in model.layers:
        if isinstance(layer.layers[0], nn.Conv2d):
            x = to.block(x, layer)
        elif hasattr(layer, "residual"):
            x = to.unit(x, layer)
        else:
            for unit in layer.layers:
                x = to.unit(x, unit)
    x = to.block(x, model.conv_sep)
    tail = model.features.layers
    x = to.block(x, tail[0]) if len(tail[0].layers) == 3 else to.conv(x, *tail[0].layers)
    return to.linear(to.flatten(x), tail[2], tail[3])


def _mobilefacenet(to: Exporter, model: MobileFaceNet) -> str:
    x = to.block(to.block("images", model.conv1), model.conv2_dw)
    for halving, run in ((model.conv_23, model.conv_3), (model.conv_34, model.conv_4), (model.conv_45, model.conv_5)):
        x = to.unit(x, halving)
        for unit in run.model:
            x = to.unit(x, unit)
    x = to.conv(to.block(x, model.conv_6_sep), model.conv_6_dw.conv, model.conv_6_dw.bn)
    return to.linear(to.flatten(x), model.linear, model.bn)
