"""Checks and error messages of the training package."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from kdlib._checks import check_callable, check_targets, check_type
from kdlib.training.events import TrainingDiverged


def check_argument(good: bool, message: str, *, owner: str = "train") -> None:
    """A condition on an argument must hold."""
    if not good:
        raise ValueError(f"{owner}: {message}")


def check_device(owner: str, device: object) -> None:
    """`device` must be None or valid for `torch.device`."""
    try:
        torch.device("cpu" if device is None else device)  # type: ignore[call-overload]  # checked here
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{owner}: device must be a torch.device, its name or None, got {device!r}") from error


def check_train(distiller: object, loader: object, hooks: object) -> None:
    """Check the arguments of `train`; a compiled distiller has the attributes of a `Distiller` but not its class."""
    parts = ("student", "teachers", "objective", "trainable_parameters")
    if not isinstance(distiller, nn.Module) or not all(hasattr(distiller, part) for part in parts):
        raise TypeError(f"train: distiller must be a Distiller, got {type(distiller).__name__}")
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):  # the older iterator protocol
        raise TypeError(f"train: loader must be an iterable of batches, got {type(loader).__name__}")
    check_type("train", "hooks", hooks, Sequence, "a sequence of callables")
    for index, hook in enumerate(hooks):  # type: ignore[arg-type, var-annotated]  # checked in the line before
        check_callable("train", f"hooks[{index}]", hook)


def check_batch(batch: object) -> None:
    """A loader must yield `(inputs, targets)` as a tuple or list: a tensor of two images would also unpack to a pair."""
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"train: loader must yield (inputs, targets), got a {type(batch).__name__}")
    if len(batch) != 2:
        raise ValueError(f"train: loader must yield (inputs, targets), got {len(batch)} items")
    check_targets("train: loader", batch[1])


def check_fingerprint(saved: Mapping[str, object], current: Mapping[str, object], place: object) -> None:
    """A resumed run must have the same fingerprint; the error names each differing field with both values."""
    differing = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    if differing:
        pairs = ", ".join(f"{name} (checkpoint {saved.get(name)!r}, now {current.get(name)!r})" for name in differing)
        raise ValueError(
            f"train: checkpoint_dir {place} must contain a run of this configuration, got different {pairs}; "
            "restore these settings or use another directory"
        )


def diverged(
    problem: str,
    terms: Mapping[str, float],
    *,
    step: int,
    epoch: int,
    newest: Path | None,
    samples: tuple[int, ...] = (),
) -> TrainingDiverged:
    """Return the error of a non-finite loss or weight; the message ends with the last good checkpoint."""
    kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
    return TrainingDiverged(f"train: {problem}; {kept}", step=step, epoch=epoch, terms=terms, samples=samples)
