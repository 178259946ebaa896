"""Teachers room: the layers of an ONNX graph, taken in order into modules of torch. Touches weights; builds no network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlib_faces.teachers.onnx.chain import Residual, Step

__all__ = ["Cursor", "Mismatch"]


class Mismatch(Exception):
    """The graph is not the network that it was taken for; says where."""


class Cursor:
    """Walks a chain of layers and moves their weights into native modules, or says what does not fit."""

    def __init__(self, items: Sequence[Step | Residual]) -> None:
        self.items, self.at = items, 0

    def peek(self, kind: str, ahead: int = 0) -> Step | None:
        at = self.at + ahead
        item = self.items[at] if at < len(self.items) else None
        return item if isinstance(item, Step) and item.kind == kind else None

    def take(self, kind: str) -> Step:
        found = self.peek(kind)
        if found is None:
            raise Mismatch(f"{self.where()} where a {kind} should be")
        self.at += 1
        return found

    def where(self) -> str:
        if self.at >= len(self.items):
            return "the chain ends"
        item = self.items[self.at]
        return item.node if isinstance(item, Step) else f"a residual sum ({item.node})"

    def residual(self) -> Residual:
        item = self.items[self.at] if self.at < len(self.items) else None
        if not isinstance(item, Residual):
            raise Mismatch(f"{self.where()} where a residual sum should be")
        self.at += 1
        return item

    def end(self) -> None:
        if self.at < len(self.items):
            raise Mismatch(f"{self.where()} where the chain should end")

    def conv(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        """A convolution and its BatchNorm, folded into it or not."""
        step = self.take("conv")
        wanted = (conv.stride[0], conv.padding[0], conv.groups)
        if (step.stride, step.padding, step.groups) != wanted:
            got = (step.stride, step.padding, step.groups)
            raise Mismatch(f"{step.node} has stride, padding and groups {got}, not {wanted}")
        _copy(step, conv.weight, step.weights["weight"])
        self._norm_of(step, norm)

    def linear(self, linear: nn.Linear, norm: nn.BatchNorm1d) -> None:
        """The embedding layer and its BatchNorm."""
        step = self.take("linear")
        _copy(step, linear.weight, step.weights["weight"])
        if linear.bias is not None:
            bias = step.weights.pop("bias", None)
            _copy(step, linear.bias, torch.zeros_like(linear.bias) if bias is None else bias)
        self._norm_of(step, norm)

    def _norm_of(self, step: Step, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        bias = step.weights.get("bias", torch.zeros(norm.num_features))
        if self.peek("norm"):
            _set_norm(norm, self.take("norm"), bias)
            return
        ones, zeros = torch.ones(norm.num_features), torch.zeros(norm.num_features)
        plain = {"weight": ones, "bias": bias, "mean": zeros, "var": ones - norm.eps}
        _set_norm(norm, Step("norm", step.node, plain, eps=norm.eps), zeros)

    def norm(self, norm: nn.BatchNorm2d) -> None:
        _set_norm(norm, self.take("norm"), torch.zeros(norm.num_features))

    def prelu(self, prelu: nn.PReLU) -> None:
        step = self.take("prelu")
        slope = step.weights["weight"]
        _copy(step, prelu.weight, slope.expand(prelu.num_parameters) if len(slope) == 1 else slope)

    def block(self, block: Any) -> None:
        """Convolution, BatchNorm, PReLU of `MBF` or `MobileFaceNet`."""
        conv, norm, prelu = block.layers if hasattr(block, "layers") else (block.conv, block.bn, block.prelu)
        self.conv(conv, norm)
        self.prelu(prelu)

    def bottleneck(self, unit: Any) -> None:
        """1x1, depthwise, linear 1x1, in a residual sum where the unit is one."""
        first, second, last = unit.layers if hasattr(unit, "layers") else (unit.conv, unit.conv_dw, unit.project)
        inside = self
        if unit.residual:
            fork = self.residual()
            Cursor(fork.shortcut).end()
            inside = Cursor(fork.body)
        inside.block(first)
        inside.block(second)
        inside.conv(*(last.layers if hasattr(last, "layers") else (last.conv, last.bn)))
        if unit.residual:
            inside.end()


def _copy(step: Step, target: Tensor, value: Tensor) -> None:
    if value.shape != target.shape:
        raise Mismatch(f"{step.node} has weights {tuple(value.shape)}, not {tuple(target.shape)}")
    with torch.no_grad():
        target.copy_(value)


def _set_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, step: Step, bias: Tensor) -> None:
    """A BatchNorm behind a shift by `bias`; another eps than ours goes into the weight."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise Mismatch(f"{step.node} has statistics, the network's BatchNorm has none")
    weights = step.weights
    if not bool((weights["var"] >= 0).all()):
        raise Mismatch(f"{step.node} has a negative variance")
    factor = ((weights["var"].double() + norm.eps) / (weights["var"].double() + step.eps)).sqrt().float()
    _copy(step, mean, weights["mean"] - bias)
    _copy(step, var, weights["var"])
    _copy(step, norm.weight, weights["weight"] * factor)
    _copy(step, norm.bias, weights["bias"])
