"""Copies the weights of an ONNX graph's layers into a native backbone."""

from collections.abc import Iterable
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from kdlib_faces.teachers.onnx.chain import Layers, Residual, Step

__all__ = ["Mismatch", "fill"]

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d


class Mismatch(Exception):
    """The graph differs from the network; the message names the layer."""


@runtime_checkable
class _Bottleneck(Protocol):
    """A unit of `MBF` or `MobileFaceNet`, in a residual sum or not."""

    residual: bool


@runtime_checkable
class _Block(Protocol):
    """A residual block of `IResNet`."""

    downsample: nn.Sequential | None


def fill(modules: Iterable[nn.Module], layers: Layers) -> None:
    """Copy the layers of a chain into modules, which must be registered in the order in which they run.

    A convolution or linear layer takes its bias, or a folded BatchNorm, into the BatchNorm behind it.

    Raises:
        Mismatch: A layer is missing, left over, or of another kind or shape.
    """
    filler = _Filler(layers)
    for module in modules:
        filler.fill(module)
    if filler.next is not None:
        raise filler.mismatch("the end")


class _Filler:
    def __init__(self, layers: Layers) -> None:
        self.rest = iter(layers)
        self.next = next(self.rest, None)
        self.before: Step | None = None  # the convolution or linear layer whose BatchNorm comes next

    def fill(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            self._fill_conv(module)
        elif isinstance(module, nn.Linear):
            self._take("flatten")
            self.before = self._take("linear")
            _copy(self.before, module.weight, self.before.weights["weight"])
            if module.bias is not None:
                _copy(self.before, module.bias, self.before.weights.pop("bias", torch.zeros_like(module.bias)))
        elif isinstance(module, BatchNorm):
            self._fill_norm(module)
        elif isinstance(module, nn.PReLU):
            step = self._take("prelu")
            slope = step.weights["weight"]
            _copy(step, module.weight, slope.expand(module.num_parameters) if len(slope) == 1 else slope)
        elif isinstance(module, _Bottleneck) and module.residual:
            self._fill_sum(list(module.children()), [])
        elif isinstance(module, _Block):
            shortcut: list[nn.Module] = [] if module.downsample is None else [module.downsample]
            self._fill_sum([child for child in module.children() if child not in shortcut], shortcut)
        else:
            for child in module.children():
                self.fill(child)

    def _fill_sum(self, body: list[nn.Module], shortcut: list[nn.Module]) -> None:
        item = self.next
        if not isinstance(item, Residual):
            raise self.mismatch("a residual sum")
        self.next = next(self.rest, None)
        fill(body, item.body)
        fill(shortcut, item.shortcut)

    def _fill_conv(self, conv: nn.Conv2d) -> None:
        step = self.before = self._take("conv")
        got, expected = (step.stride, step.padding, step.groups), (conv.stride[0], conv.padding[0], conv.groups)
        if got != expected:
            raise Mismatch(f"{step.node} has stride, padding and groups {got}, not {expected}")
        _copy(step, conv.weight, step.weights["weight"])

    def _fill_norm(self, norm: BatchNorm) -> None:
        """A BatchNorm of the graph, or, where it was folded into the layer before, one that only adds the folded bias."""
        zeros, ones = torch.zeros(norm.num_features), torch.ones(norm.num_features)
        before, self.before = self.before, None
        bias = zeros if before is None else before.weights.get("bias", zeros)
        if before is None or (isinstance(self.next, Step) and self.next.kind == "norm"):
            _set_norm(norm, self._take("norm"), bias)
        else:
            identity = {"weight": ones, "bias": bias, "mean": zeros, "var": ones - norm.eps}
            _set_norm(norm, Step("norm", before.node, identity, eps=norm.eps), zeros)

    def _take(self, kind: str) -> Step:
        item = self.next
        if not isinstance(item, Step) or item.kind != kind:
            raise self.mismatch(f"a {kind}")
        self.next = next(self.rest, None)
        return item

    def mismatch(self, expected: str) -> Mismatch:
        """The error for another layer than the expected one."""
        got = self.next
        here = "the end" if got is None else got.node if isinstance(got, Step) else f"a residual sum ({got.node})"
        return Mismatch(f"{here} where {expected} should be")


def _copy(step: Step, target: Tensor, value: Tensor) -> None:
    if value.shape != target.shape:
        raise Mismatch(f"{step.node} has weights {tuple(value.shape)}, not {tuple(target.shape)}")
    with torch.no_grad():
        target.copy_(value)


def _set_norm(norm: BatchNorm, step: Step, bias: Tensor) -> None:
    """Fill a BatchNorm whose input is shifted by `bias`; a different eps is absorbed by the weight."""
    mean, var, weights = norm.running_mean, norm.running_var, step.weights
    if mean is None or var is None:
        raise Mismatch(f"{step.node} has statistics, the network's BatchNorm has none")
    if not bool((weights["var"] >= 0).all()):
        raise Mismatch(f"{step.node} has a negative variance")
    factor = ((weights["var"].double() + norm.eps) / (weights["var"].double() + step.eps)).sqrt().float()
    _copy(step, mean, weights["mean"] - bias)
    _copy(step, var, weights["var"])
    _copy(step, norm.weight, weights["weight"] * factor)
    _copy(step, norm.bias, weights["bias"])
