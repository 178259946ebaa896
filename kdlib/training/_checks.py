"""Checks and error messages of the training package."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from kdlib._checks import check_callable, check_choice, check_type, nearest
from kdlib.training.events import CheckpointError, TrainingDiverged

ACCELERATORS = ("cuda", "mps", "xpu")
"""Kinds of devices of which torch knows whether this machine has them."""


def check_argument(good: bool, message: str, *, owner: str = "train") -> None:
    """A condition on an argument must hold."""
    if not good:
        raise ValueError(f"{owner}: {message}")


def check_content(good: bool, message: str) -> None:
    """A condition on the content of a file must hold; the caller names the file."""
    if not good:
        raise ValueError(message)


def checkpoint_error(message: str) -> CheckpointError:
    """Return the error of an unreadable, unsuitable or unwritable checkpoint."""
    return CheckpointError(f"train: {message}")


def read_failure(error: Exception) -> str:
    """Return why a checkpoint cannot be read, as one line; the advice of torch would run code of the file."""
    text = " ".join(str(error).split())
    return "it holds more than tensors and plain values" if "Weights only load failed" in text else text


def check_pair(batch: object, source: str) -> None:
    """A batch must be a tuple or list `(inputs, targets)`: a tensor of two images would also unpack to a pair."""
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"train: {source} (inputs, targets), got a {type(batch).__name__}")
    if len(batch) != 2:
        raise ValueError(f"train: {source} (inputs, targets), got {len(batch)} items; set TrainConfig(split_batch=)")


def check_inputs(batch: Iterable[str], missing: Sequence[str], known: Sequence[str], *, found: bool) -> None:
    """A mapping must contain the required arguments of the student's `forward`, and at least one of its arguments."""
    if missing or not found:
        needed = ", ".join(map(repr, missing)) or f"one of {', '.join(map(repr, known))}"
        raise TypeError(
            f"train: loader yields mappings of {', '.join(map(repr, batch))}, but the student's forward needs {needed}; set "
            "TrainConfig(split_batch=) to a function from a batch to (inputs, targets)"
        )


class DivergenceFields(TypedDict):
    """Fields of :class:`TrainingDiverged`."""

    step: int
    epoch: int
    terms: Mapping[str, float]
    samples: tuple[int, ...]


class ErrorReport(NamedTuple):
    """An error as one process describes it to the others."""

    kind: str
    message: str
    notes: tuple[str, ...]
    divergence: DivergenceFields | None


def describe_error(error: Exception) -> ErrorReport:
    """Describe an error for other processes."""
    fields: DivergenceFields | None = None
    if isinstance(error, TrainingDiverged):
        fields = {"step": error.step, "epoch": error.epoch, "terms": error.terms, "samples": error.samples}
    notes: Sequence[str] = getattr(error, "__notes__", ())  # absent until the first note is added
    return ErrorReport(type(error).__name__, str(error), tuple(notes), fields)


def received_error(rank: int, report: ErrorReport) -> Exception:
    """Return the error that another process described; a class of the user's own becomes a RuntimeError."""
    error: Exception
    if report.divergence is not None:
        error = TrainingDiverged(report.message, **report.divergence)
    else:
        kinds = (ValueError, TypeError, IndexError, RuntimeError, OSError, CheckpointError)
        kind = {each.__name__: each for each in kinds}.get(report.kind)
        error = RuntimeError(f"{report.kind}: {report.message}") if kind is None else kind(report.message)
    for note in (*report.notes, f"This error was raised in process {rank}."):
        error.add_note(note)
    return error


def check_device(owner: str, device: object) -> None:
    """`device` must be None or valid for `torch.device`."""
    try:
        torch.device("cpu" if device is None else device)  # type: ignore[call-overload]  # checked here
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{owner}: device must be a torch.device, its name or None, got {device!r}") from error


def check_available(device: torch.device) -> None:
    """The accelerator must be one that torch can use on this machine."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device.type in ACCELERATORS and (found is None or found.type != device.type):
        usable = "no accelerator" if found is None else found.type
        raise ValueError(
            f"train: device must be available, got {device}, but torch {torch.__version__} finds {usable} on this machine; "
            "install its driver and a build of torch for it, or pass device=None"
        )


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
    return TrainingDiverged(f"train: {problem}; {_kept(newest)}", step=step, epoch=epoch, terms=terms, samples=samples)


def check_evaluation(
    owner: str, evaluate: object, every: int | None, monitor: object, mode: object, patience: int | None
) -> None:
    """Each argument of the evaluation needs the one on which it depends."""
    if evaluate is not None:
        check_callable(owner, "evaluate", evaluate)
    check_type(owner, "monitor", monitor, (str, NoneType), "the name of a metric or None")
    needs = (
        ("evaluate_every", every, "evaluate", evaluate),
        ("monitor", monitor, "evaluate", evaluate),
        ("mode", mode, "monitor", monitor),
        ("patience", patience, "monitor", monitor),
    )
    for name, value, other, needed in needs:
        if value is not None and needed is None:
            raise ValueError(f"{owner}: {other} must be given with {name}, got {name}={value!r} without it")
    if mode is not None:
        check_choice(owner, "mode", mode, ("max", "min"))


def read_metrics(result: object, monitor: str | None, step: int) -> dict[str, float]:
    """Return the metrics of an evaluation as Python numbers, which must be finite and contain the monitored one."""
    metrics = result if isinstance(result, Mapping) else {monitor or "metric": result}
    plain: dict[str, float] = {}
    for name, value in metrics.items():
        number = value.item() if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0 else value
        if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, (int, float)):
            got = f"{name!r}: {type(value).__name__}" if isinstance(result, Mapping) else f"a {type(result).__name__}"
            raise TypeError(f"train: evaluate must return a number or a mapping of names to numbers, got {got}")
        if not isfinite(number):
            raise ValueError(
                f"train: evaluate must return finite numbers, got {name}={number} after step {step}; leave out a metric "
                "that is undefined"
            )
        plain[name] = float(number)
    if monitor is not None and monitor not in plain:
        raise ValueError(f"train: evaluate must return the monitored metric {monitor!r}{nearest(monitor, plain)}")
    return plain


def note_batch(
    error: Exception, batch: int, epoch: int, samples: tuple[int, ...], process: str, newest: Path | None
) -> None:
    """Add to an error of the forward pass the batch in which it occurred, and the last good checkpoint."""
    error.add_note(f"in batch {batch} of epoch {epoch}{process}{listed(samples)}; {_kept(newest)}")


def listed(samples: tuple[int, ...]) -> str:
    """Return sample ids in parentheses for a message, the first 32 of many; empty without any."""
    shown = ", ".join(map(str, samples[:32])) + (", ..." if len(samples) > 32 else "")
    return f" (samples {shown})" if samples else ""


def _kept(newest: Path | None) -> str:
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"


def batch_of_one(batch: int, epoch: int, size: int, process: str) -> ValueError:
    """Return the error of a batch that is too small for BatchNorm."""
    return ValueError(
        f"train: BatchNorm in training mode needs more than one value per channel, but batch {batch} of epoch {epoch}"
        f"{process} has {size} sample{'' if size == 1 else 's'}; use DataLoader(drop_last=True) or another batch size"
    )


class Interrupted(BaseException):
    """Ends an evaluation when a signal arrives; not an Exception, so that the evaluation does not handle it."""


def interrupted() -> Interrupted:
    """Return the exception that ends an evaluation."""
    return Interrupted()
