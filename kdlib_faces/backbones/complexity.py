"""Parameters, multiply-adds and latency of a network.

Multiply-adds count convolutions and linear layers only, one per product, without a factor of 2. BatchNorm (which can be
folded into the preceding convolution), PReLU and additions are not counted. Published figures that include them are
higher: MobileFaceNet with 512 dimensions has 221.16 M here, and 227.6 M with BatchNorm.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from kdlib._checks import check_number
from kdlib._modes import eval_mode
from kdlib_faces.backbones.input_spec import InputSize, height_width
from kdlib_faces.backbones.registry import BACKBONES, build_backbone

__all__ = ["BackboneRow", "count_macs", "count_parameters", "describe_backbones", "latency_ms"]


def count_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Count the parameters; with `trainable`, only those that require a gradient.

    Args:
        model: any module.
        trainable: exclude frozen parameters.

    Returns:
        The count; a shared parameter is counted once.

    Examples:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_macs(model: nn.Module, input_size: InputSize) -> int:
    """Count the multiply-adds of one image in the convolutions and linear layers of `model`.

    Runs on the meta device: nothing is computed, no weight is copied, and the model is not changed.

    Args:
        model: a module that accepts (b, 3, h, w).
        input_size: side of a square image, or (height, width), in pixels.

    Returns:
        The count for a batch of one.

    Raises:
        ValueError: `input_size` is invalid or not the size of the model.

    Examples:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), 10)  # 8 * 10 * 10 outputs of 3 * 3 * 3 products
        21600
    """
    height, width = height_width("count_macs", input_size)
    total = 0

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * (module.weight[0].numel() if isinstance(module.weight, Tensor) else 0)

    state = {key: value.to("meta") for key, value in (*model.named_parameters(), *model.named_buffers())}
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with eval_mode(model), torch.no_grad(), _SkipBatchNorm():
            functional_call(model, state, torch.zeros(1, 3, height, width, dtype=dtype, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return total


class _SkipBatchNorm(TorchFunctionMode):
    """Return the input of a BatchNorm: on the meta device its many small steps would take most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is F.batch_norm else func(*args, **(kwargs or {}))


def latency_ms(model: nn.Module, input_size: InputSize, *, batch: int = 1, repeats: int = 20, warmup: int = 3) -> float:
    """Measure the median time of a forward pass in milliseconds, on the model's device with the current threads.

    Args:
        model: a module that accepts (b, 3, h, w); run in eval mode, and restored to its mode.
        input_size: side of a square image, or (height, width), in pixels.
        batch: images per forward pass.
        repeats: timed forward passes.
        warmup: forward passes before the measurement.

    Returns:
        Milliseconds per forward pass of the whole batch.

    Raises:
        ValueError: a count is below one.

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
    synchronize: Callable[[], None] = torch.cuda.synchronize if first.device.type == "cuda" else lambda: None
    times = []
    with eval_mode(model), torch.inference_mode():
        for _ in range(warmup + repeats):
            synchronize()
            start = time.perf_counter()
            model(images)
            synchronize()
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[warmup:])


@dataclass(frozen=True)
class BackboneRow:
    """One row of the table of backbones: counts at 112 pixels.

    Attributes:
        name: Name in the registry, or that of the paper's network.
        embedding_dim: Dimensions of the embedding.
        input_size: Side of the images, or (height, width), in pixels.
        parameters: Number of parameters.
        trainable: Number of those with a gradient.
        macs: Multiply-adds for one image.
        state_keys: Number of entries of the state dict.
    """

    name: str
    embedding_dim: int
    input_size: InputSize
    parameters: int
    trainable: int
    macs: int
    state_keys: int


def describe_backbones() -> list[BackboneRow]:
    """Describe every backbone of the registry at 112 pixels and 512 dimensions, and the paper's MobileFaceNet with 128.

    The networks are built on the meta device, so no weight is allocated.

    Returns:
        One row per network.

    Examples:
        >>> row = describe_backbones()[0]
        >>> row.name, row.embedding_dim, row.parameters, row.macs
        ('mobilefacenet', 128, 1003136, 220965376)
    """
    rows = []
    named = [name for name in BACKBONES if name not in ("iresnet", "ir")]  # these two require a depth
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
