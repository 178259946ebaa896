"""Backbones room: what a network costs. Reads a model, changes nothing in it.

The convention of multiply-adds: convolutions and linear layers only, one multiply-add each, no factor 2. BatchNorm
(which folds into the convolution before it), PReLU and additions are not counted. Published figures that count them
are higher: MobileFaceNet of 512 dimensions is 221.16 M here and 227.6 M where BatchNorm is counted.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdlib._checks import check_number
from kdlib_faces.backbones._arguments import InputSize, height_width
from kdlib_faces.backbones.registry import BACKBONES, build_backbone

__all__ = ["BackboneRow", "count_macs", "count_parameters", "describe_backbones", "latency_ms"]


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameter values; with `trainable`, of those that get a gradient only.

    Args:
        model: any module.
        trainable: leave frozen parameters out.

    Returns:
        The count; a shared parameter counts once.

    Examples:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_macs(model: nn.Module, input_size: InputSize) -> int:
    """Multiply-adds of one image through the convolutions and linear layers of `model`.

    Runs on the meta device, so nothing is computed and no weight is copied; the model is left as it was.

    Args:
        model: a module that takes (b, 3, h, w).
        input_size: side of a square image, or (height, width), in pixels.

    Returns:
        The count for a batch of one.

    Raises:
        ValueError: `input_size` is no size, or not the one that the model was built for.

    Examples:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), 10)  # 8 * 10 * 10 outputs of 3 * 3 * 3 products
        21600
    """
    height, width = height_width("count_macs", input_size)
    total = 0

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * (module.weight[0].numel() if isinstance(module.weight, Tensor) else 0)

    state = {key: value.to("meta") for key, value in (*model.named_parameters(), *model.named_buffers())}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    modes = {module: module.training for module in model.modules()}
    hooks = [m.register_forward_hook(count) for m in modes if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        model.eval()  # BatchNorm refuses to train on a batch of one
        with torch.no_grad():
            functional_call(model, state, torch.zeros(1, 3, height, width, dtype=dtype, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return total


def latency_ms(model: nn.Module, input_size: InputSize, *, batch: int = 1, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of one forward in milliseconds, on the device and with the threads that are set.

    Args:
        model: a module that takes (b, 3, h, w); run in eval mode and put back as it was.
        input_size: side of a square image, or (height, width), in pixels.
        batch: images in one forward.
        repeats: timed forwards.
        warmup: forwards before the clock starts.

    Returns:
        Milliseconds a forward of the whole batch.

    Raises:
        ValueError: a count below one.

    Examples:
        >>> latency_ms(nn.Conv2d(3, 4, 3), 16, repeats=3) > 0
        True
    """
    height, width = height_width("latency_ms", input_size)
    check_number("latency_ms", "batch", batch, min=1, integer=True)
    check_number("latency_ms", "repeats", repeats, min=1, integer=True)
    check_number("latency_ms", "warmup", warmup, min=0, integer=True)
    first = next(model.parameters(), torch.zeros(0))
    images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(first.device, first.dtype)
    wait: Callable[[], None] = torch.cuda.synchronize if first.device.type == "cuda" else lambda: None
    modes = {module: module.training for module in model.modules()}
    times = []
    try:
        model.eval()
        with torch.inference_mode():
            for turn in range(warmup + repeats):
                wait()
                start = time.perf_counter()
                model(images)
                wait()
                if turn >= warmup:
                    times.append(time.perf_counter() - start)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return 1000 * statistics.median(times)


@dataclass(frozen=True)
class BackboneRow:
    """One line of the table of backbones: counts at 112 pixels."""

    name: str
    embedding_dim: int
    input_size: InputSize
    parameters: int
    trainable: int
    macs: int
    state_keys: int


def describe_backbones() -> list[BackboneRow]:
    """Every backbone of the registry at 112 pixels and 512 dimensions, and the paper's MobileFaceNet of 128.

    Returns:
        One row each. Built on the meta device: no weight is allocated.

    Examples:
        >>> row = describe_backbones()[0]
        >>> row.name, row.embedding_dim, row.parameters, row.macs
        ('mobilefacenet', 128, 1003136, 220965376)
    """
    rows = []
    named = [name for name in BACKBONES if name not in ("iresnet", "ir")]  # these two have no depth of their own
    for name, embedding_dim in [("mobilefacenet", 128), *[(name, 512) for name in named]]:
        with torch.device("meta"):
            model = build_backbone(name, embedding_dim=embedding_dim)
        rows.append(
            BackboneRow(
                name=name,
                embedding_dim=embedding_dim,
                input_size=model.input_size,
                parameters=count_parameters(model),
                trainable=count_parameters(model, trainable=True),
                macs=count_macs(model, model.input_size),
                state_keys=len(model.state_dict()),
            )
        )
    return rows
