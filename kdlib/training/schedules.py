"""Learning-rate schedules and the optimizer."""

from collections.abc import Iterable

import torch
from torch import nn

from kdlib._checks import check_number, check_type
from kdlib.schedules import cosine, linear, linear_warmup
from kdlib.training._checks import check_argument
from kdlib.training.config import TrainConfig
from kdlib.training.sharded.gradients import by_mesh

__all__ = ["build_optimizer", "lr_factor", "parameter_groups", "set_lr"]


def lr_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning-rate factor of step `step`, counted from 0.

    With w warm-up steps, n total steps and progress p = (step - w) / (n - w), the factor is (step + 1) / w below step w,
    afterwards `"cosine"` (1 + cos(pi p)) / 2, `"poly"` (1 - p)^2, `"constant"` 1. A schedule `step -> factor` counts from
    step 0 and is multiplied by the warm-up.

    Examples:
        >>> config = TrainConfig(max_steps=6, warmup_steps=2)
        >>> [round(lr_factor(step, 6, config), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    warmup = config.warmup_steps
    ramp = linear_warmup(1.0, warmup)(step + 1) if warmup else 1.0
    if callable(config.schedule):
        factor = check_number("TrainConfig", f"schedule({step})", config.schedule(step), min=0)
        return ramp * float(factor)
    if step < warmup:
        return ramp
    done, steps = step - warmup, max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return cosine(1.0, 0.0, steps)(done)
    if config.schedule == "poly":
        return linear(1.0, 0.0, steps)(done) ** 2
    return 1.0


def parameter_groups(parameters: Iterable[nn.Parameter], config: TrainConfig) -> list[dict[str, object]]:
    """Return two groups: matrices and kernels with weight decay, 1-d parameters (biases, norm scales, slopes) without.

    Sharded parameters have groups of their own, because fused steps do not mix them with others.
    """
    groups: list[tuple[list[nn.Parameter], float]] = []
    for same in by_mesh(parameters):
        groups.append(([p for p in same if p.dim() > 1], config.weight_decay))
        groups.append(([p for p in same if p.dim() <= 1], 0.0))
    return [{"params": group, "lr": config.lr, "weight_decay": decay} for group, decay in groups if group]


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer of `config` on :func:`parameter_groups`; each group stores its `initial_lr`."""
    groups = parameter_groups(parameters, config)
    check_argument(bool(groups), "distiller.trainable_parameters() must return at least one parameter, got none")
    optimizer: torch.optim.Optimizer
    if callable(config.optimizer):
        optimizer = config.optimizer(groups)
        check_type("train", "the result of optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    elif config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Multiply the initial learning rate of each group by `factor`; return that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
