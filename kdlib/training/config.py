"""Configuration of the training loop."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, TypedDict

import torch

from kdlib._checks import check_callable, check_choice, check_number, check_type
from kdlib.distiller import Distiller
from kdlib.training._checks import check_argument, check_device, check_evaluation
from kdlib.types import Schedule

__all__ = ["Evaluate", "OptimizerFactory", "SplitBatch", "TrainConfig"]

Evaluate = Callable[[Distiller], float | Mapping[str, float]]
"""Maps the distiller in training to metrics by name, or to a single number."""

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Builds an optimizer from parameter groups, each with `params`, `lr` and `weight_decay`."""

SplitBatch = Callable[[Any], tuple[Any, Mapping[str, Any] | None]]
"""Maps a batch to inputs and targets."""

_PLACES = (
    "evaluate",
    "evaluate_every",
    "patience",
    "device",
    "checkpoint_dir",
    "checkpoint_every_steps",
    "checkpoint_every_seconds",
    "keep",
    "log_path",
    "log_every",
)
"""Fields that do not change the weights of a step, so a run may be resumed with other values."""


class _Bounds(TypedDict, total=False):
    """Limits of a number, as `check_number` takes them."""

    above: float
    min: float
    max: float
    below: float
    integer: bool


_COUNT: _Bounds = {"min": 1, "integer": True}
_BOUNDS: dict[str, _Bounds] = {
    **dict.fromkeys(("epochs", "max_steps", "accumulate", "checkpoint_every_steps", "keep", "log_every"), _COUNT),
    **dict.fromkeys(("evaluate_every", "patience"), _COUNT),
    "lr": {"above": 0},
    "clip_norm": {"above": 0},
    "checkpoint_every_seconds": {"above": 0},
    "momentum": {"min": 0, "below": 1},
    "weight_decay": {"min": 0},
    "warmup_steps": {"min": 0, "integer": True},
    "ema_decay": {"min": 0, "max": 1},
    "seed": {"min": 0, "max": 2**63 - 1, "integer": True},
}
_OPTIONAL = (
    "epochs",
    "max_steps",
    "clip_norm",
    "ema_decay",
    "checkpoint_every_steps",
    "checkpoint_every_seconds",
    "evaluate_every",
    "patience",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, optimizer, schedule, precision, checkpoints and log of a training run.

    A *step* is one update of the weights, from the gradients of `accumulate` batches. The run ends after `epochs` or
    `max_steps`, whichever comes first.

    Args:
        epochs: Number of passes over the loader. A larger number continues a finished run.
        max_steps: Number of steps. A larger number continues a finished run.
        lr: Base learning rate, which the schedule multiplies by a factor.
        optimizer: `"sgd"`, `"adamw"`, or a callable from parameter groups to an optimizer.
        momentum: Momentum of `"sgd"`, and the first beta of `"adamw"`.
        weight_decay: Weight decay of parameters with two or more dimensions; biases and norm scales (1-d) have none.
        warmup_steps: Number of steps over which the factor rises linearly to 1.
        schedule: `"cosine"` to 0, `"poly"` (1 - progress)^2, `"constant"`, or a function of the step to the factor, at
            least 0, as in `kdlib.schedules`. The named ones count from the end of the warm-up to the last step; a function
            counts from step 0 and is multiplied by the warm-up.
        accumulate: Batches per step. The last step of an epoch uses the remaining batches.
        clip_norm: Maximum L2 norm of all gradients together; `None` disables clipping.
        amp: `None`, `"bfloat16"` or `"float16"` (with loss scaling): autocast dtype of the forward pass.
        channels_last: Use the channels-last memory format for 4-d weights and images.
        compile: Run the student and the teachers that are adapters through `torch.compile`; the objective stays eager. Steps
            are the same up to rounding.
        ema_decay: Decay of an exponential moving average of the student; at step n, min(ema_decay, (1 + n) / (10 + n)).
            `None` disables it.
        find_unused_parameters: DDP only: detect parameters that receive no gradient in a step.
        sync_batch_norm: DDP only: BatchNorm in training mode normalizes by the statistics of the batches of all processes
            together, which costs one exchange per layer. It is then the same as in one process with the whole batch.
        split_batch: A function from a batch of the loader to `(inputs, targets)`. Inputs are a tensor, a tuple of positional
            arguments or a mapping of keyword arguments of the models; targets are a mapping of names to tensors or `None`.
            `None` accepts such pairs, pairs `(inputs, tensor)` with the tensor as target `"target"`, and mappings: the
            entries that the student's `forward` names are the inputs, and the whole mapping is the targets.
        evaluate: A function from the distiller to metrics: a mapping of names to numbers, or one number, which is named
            like `monitor` (`"metric"` without it). It is called after steps, in eval mode, without gradients and with the
            averaged student if `ema_decay` is set; modes and random states are restored afterwards. Under DDP all processes
            call it, with the statistics of the first one, and the metrics of the first one count.
        evaluate_every: Steps between evaluations; `None` evaluates after every epoch. The last step is always evaluated.
        monitor: Name of the metric by which the best weights are kept; `None` keeps none.
        mode: `"max"` or `"min"`: whether a larger or a smaller value of `monitor` is better. `None` is replaced by `"min"`
            for names that contain `loss`, `error` or `perplexity`, and by `"max"` for all others.
        patience: Number of successive evaluations without an improvement of `monitor` after which the run ends. `None`
            never ends it early.
        seed: Seed of dropout, shuffling and the initialization of inferred projections.
        device: Device to train on; `None` uses the device of the trainable parameters.
        checkpoint_dir: Directory for the checkpoints of this run only. If it contains a checkpoint, the run resumes from it.
        checkpoint_every_steps: Steps between checkpoints; `None` uses only the seconds.
        checkpoint_every_seconds: Seconds between checkpoints; `None` uses only the steps. The last step always writes one.
        keep: Number of newest checkpoints kept on disk. The one with the best weights is kept in addition.
        log_path: JSON-lines file with one row per `log_every` steps.
        log_every: Steps between rows; the first and the last step are always written.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or neither `epochs` nor `max_steps` is given.

    Examples:
        >>> TrainConfig(epochs=2, lr=0.05, warmup_steps=10)
        TrainConfig(epochs=2, lr=0.05, warmup_steps=10)
        >>> TrainConfig(epochs=2, schedule="linear")
        Traceback (most recent call last):
        ValueError: TrainConfig: schedule must be one of 'cosine', 'poly', 'constant', got 'linear'
    """

    epochs: int | None = None
    max_steps: int | None = None
    lr: float = 0.1
    optimizer: str | OptimizerFactory = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_steps: int = 0
    schedule: str | Schedule = "cosine"
    accumulate: int = 1
    clip_norm: float | None = None
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    ema_decay: float | None = None
    find_unused_parameters: bool = False
    sync_batch_norm: bool = False
    split_batch: SplitBatch | None = None
    evaluate: Evaluate | None = None
    evaluate_every: int | None = None
    monitor: str | None = None
    mode: str | None = None
    patience: int | None = None
    seed: int = 0
    device: str | torch.device | None = None
    checkpoint_dir: str | PathLike[str] | None = None
    checkpoint_every_steps: int | None = None
    checkpoint_every_seconds: float | None = 600.0
    keep: int = 2
    log_path: str | PathLike[str] | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        owner = "TrainConfig"
        given = self.epochs is not None or self.max_steps is not None
        check_argument(given, "epochs or max_steps must be given, got neither", owner=owner)
        for name, bounds in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                check_number(owner, name, value, **bounds)
        if not callable(self.optimizer):
            check_choice(owner, "optimizer", self.optimizer, ("sgd", "adamw"))
        if not callable(self.schedule):
            check_choice(owner, "schedule", self.schedule, ("cosine", "poly", "constant"))
        if self.split_batch is not None:
            check_callable(owner, "split_batch", self.split_batch)
        if self.amp is not None:
            check_choice(owner, "amp", self.amp, ("bfloat16", "float16"))
        for name in ("channels_last", "compile", "find_unused_parameters", "sync_batch_norm"):
            check_type(owner, name, getattr(self, name), bool, "True or False")
        for name in ("checkpoint_dir", "log_path"):
            check_type(owner, name, getattr(self, name), (str, PathLike, type(None)), "a path or None")
        check_device(owner, self.device)
        check_evaluation(owner, self.evaluate, self.evaluate_every, self.monitor, self.mode, self.patience)
        if self.monitor is not None and self.mode is None:
            falling = any(word in self.monitor.lower() for word in ("loss", "error", "perplexity"))
            object.__setattr__(self, "mode", "min" if falling else "max")

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return f"TrainConfig({', '.join(f'{name}={x!r}' for name, x in given.items() if x != defaults[name])})"

    def fingerprint(self) -> dict[str, int | float | str | bool | None]:
        """Return the fields that determine the weights of a step, as plain values; callables by their name."""
        names = [field.name for field in fields(self) if field.name not in _PLACES]
        return {name: _plain(getattr(self, name)) for name in names}


def _plain(value: object) -> int | float | str | bool | None:
    if value is None or isinstance(value, (int, float, str)):
        return value
    name = getattr(value, "__qualname__", None)
    # An object, such as a schedule, is described by its `repr`.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)) if name is None else f"{value.__module__}.{name}"
