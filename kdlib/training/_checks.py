"""Training room: the checks of a run, its loader, its checkpoints and its numbers. Words errors; opens no file."""

import zipfile
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdlib._checks import check_callable, check_targets, check_type
from kdlib.training.events import CheckpointError, TrainingDiverged

__all__ = [
    "check_batch",
    "check_checksum",
    "check_device",
    "check_fingerprint",
    "check_distiller",
    "check_finite_weights",
    "check_flag",
    "check_format",
    "check_generators",
    "check_hooks",
    "check_length",
    "check_loader",
    "check_no_more",
    "check_optimizer",
    "check_parameters",
    "check_path",
    "check_same_names",
    "check_same_steps",
    "check_skipped",
    "check_stored",
    "diverged",
    "empty_epoch",
    "no_batch",
    "no_length",
    "no_row",
    "none_readable",
    "unreadable",
    "unwritable",
]


# The configuration and what it is applied to.


def check_length(owner: str, epochs: int | None, max_steps: int | None) -> None:
    """A run must have an end."""
    if epochs is None and max_steps is None:
        raise ValueError(f"{owner}: epochs or max_steps must be given, got neither")


def check_flag(owner: str, name: str, value: object) -> None:
    """`value` must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def check_path(owner: str, name: str, value: object) -> None:
    """`value` must be a path or None."""
    if not isinstance(value, (str, PathLike, type(None))):
        raise TypeError(f"{owner}: {name} must be a path, got {value!r}")


def check_distiller(distiller: object) -> None:
    """What is trained must have the parts of a distiller; a compiled one has them too."""
    parts = ("student", "teachers", "objective", "trainable_parameters")
    if not isinstance(distiller, nn.Module) or not all(hasattr(distiller, part) for part in parts):
        raise TypeError(f"train: distiller must be a Distiller, got {type(distiller).__name__}")


def check_device(owner: str, device: Any) -> None:
    """`device` must be None, or what torch takes for a device."""
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{owner}: device must be a torch.device, its name or None, got {device!r}") from error


def check_hooks(hooks: object) -> None:
    """Hooks must be a sequence of callables."""
    check_type("train", "hooks", hooks, Sequence, "a sequence of callables")
    for index, hook in enumerate(hooks):  # type: ignore[arg-type, var-annotated]  # a sequence, as was just checked
        check_callable("train", f"hooks[{index}]", hook)


def check_parameters(groups: Sequence[object]) -> None:
    """There must be something to train."""
    if not groups:
        raise ValueError("train: distiller.trainable_parameters() must hold a parameter, got none")


def check_optimizer(optimizer: object) -> None:
    """What a callable has built must be an optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"train: optimizer must build a torch.optim.Optimizer, got {type(optimizer).__name__}")


# The loader.


def check_loader(loader: object) -> None:
    """A loader must be something to iterate over; Python takes `__getitem__` for that too."""
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"train: loader must be an iterable of batches, got {type(loader).__name__}")


def check_batch(batch: object) -> None:
    """A loader must yield inputs and named targets: a tensor of two images would come apart like a pair."""
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"train: loader must yield (inputs, targets), got a {type(batch).__name__}")
    if len(batch) != 2:
        raise ValueError(f"train: loader must yield (inputs, targets), got {len(batch)} items")
    check_targets("train: loader", batch[1])


def no_batch() -> ValueError:
    """A loader that yields nothing."""
    return ValueError("train: loader must yield at least one batch, got none")


def no_length() -> ValueError:
    """A loader that does not say how many batches an epoch has, where the length of the run hangs on it."""
    return ValueError("train: loader must have a length when max_steps is not given, got one without")


def check_no_more(more: bool, length: int | None) -> None:
    """A loader must not yield more batches than it says."""
    if more:
        raise ValueError(f"train: loader must yield len(loader) = {length} batches, got more")


def empty_epoch(epoch: int) -> ValueError:
    """A loader that is run out after its first epoch."""
    return ValueError(f"train: loader must yield batches in every epoch, got none in epoch {epoch}")


def check_skipped(wanted: int, skipped: int) -> None:
    """A run that goes on in mid-epoch must find the batches that it had taken."""
    if skipped < wanted:
        raise ValueError(f"train: loader must yield the {wanted} batches that it had, got {skipped}")


def check_generators(wanted: int, found: int) -> None:
    """A saved position has the state of each generator of the loader, besides that of torch's own."""
    if wanted != found:
        raise ValueError(f"train: loader must have {wanted - 1} generators as before, got {found - 1}")


# Files.


def check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """What an archive unpacks to must not be larger than itself: torch compresses nothing."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise ValueError(f"it would unpack {unpacked} bytes out of {size}")


def check_checksum(altered: str | None) -> None:
    """No part of a checkpoint must differ from its checksum; `altered` names one that does."""
    if altered is not None:
        raise ValueError(f"checksum of {altered} differs")


def unreadable(path: object, error: Exception) -> CheckpointError:
    """A file that is cut short, altered, or of another kind."""
    return CheckpointError(f"train: checkpoint {path} cannot be read: {error}")


def check_format(path: object, state: object, number: int) -> None:
    """A checkpoint must be of the one format that there is."""
    if not isinstance(state, dict) or state.get("format") != number:
        got = f"format {state.get('format')!r}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"train: checkpoint {path} must be of format {number}, got {got}")


def none_readable(directory: Path | None, count: int) -> CheckpointError:
    """Checkpoints of which none can be read: a run must not begin anew over them."""
    return CheckpointError(
        f"train: none of the {count} checkpoints in {directory} can be read; remove them to start from the beginning"
    )


def unwritable(path: Path, error: Exception, newest: Path | None) -> CheckpointError:
    """A full disk, or a directory without leave to write."""
    kept = f"{newest} is kept" if newest else "there is none before it"
    # torch's archive writer hides the system's word behind its own.
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return CheckpointError(f"train: checkpoint {path} cannot be written: {cause}; {kept}")


def check_fingerprint(saved: Mapping[str, object], current: Mapping[str, object], place: object) -> None:
    """A run goes on only as it began.

    Raises:
        ValueError: Some fields differ; the message names each with both values.
    """
    differing = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    if differing:
        pairs = ", ".join(f"{name} (checkpoint {saved.get(name)!r}, now {current.get(name)!r})" for name in differing)
        raise ValueError(
            f"train: checkpoint_dir {place} must hold a run of this configuration, got other {pairs}; "
            "restore these or take another directory"
        )


def check_same_steps(steps: Sequence[int]) -> None:
    """All processes must have found the same checkpoint."""
    if len(set(steps)) > 1:
        raise ValueError(f"train: checkpoint_dir must be one directory that all processes see, got steps {list(steps)}")


def check_same_names(saved: Mapping[str, object], own: Mapping[str, object]) -> None:
    """An average belongs to the module that it was taken of."""
    missing, unknown = (sorted({*a} - {*b}) for a, b in ((own, saved), (saved, own)))
    if missing or unknown:
        raise ValueError(
            "EMA: state must have the names of the module's state dict, got one without "
            f"{missing[:4] or 'nothing'} and with {unknown[:4] or 'nothing'} besides"
        )


def no_row(path: Path, line: int) -> ValueError:
    """A line that is no row of a log."""
    return ValueError(f"train: {path} must be a training log, got something else in line {line}")


# The numbers of a run.


def diverged(
    total: float,
    terms: Mapping[str, float],
    *,
    step: int,
    epoch: int,
    first: int,
    batches: int,
    samples: tuple[int, ...],
    newest: Path | None,
) -> TrainingDiverged:
    """A loss that is no number: in which batches, and in which samples where these are known."""
    shown = ", ".join(str(sample) for sample in samples[:32]) + (", ..." if len(samples) > 32 else "")
    which = f"batch {first}" if batches == 1 else f"batches {first} to {first + batches - 1}"
    values = ", ".join(f"{name}={value:.6g}" for name, value in terms.items())
    return TrainingDiverged(
        f"train: loss must be finite, got {total} at step {step}, epoch {epoch}, {which} of it"
        f"{f' (samples {shown})' if samples else ''}; terms {values}; {_kept(newest)}",
        step=step,
        epoch=epoch,
        terms=terms,
        samples=samples,
    )


def check_finite_weights(
    bad: Sequence[str], terms: Mapping[str, float], *, step: int, epoch: int, newest: Path | None
) -> None:
    """No weight may be NaN or infinite; `bad` names those that are."""
    if bad:
        raise TrainingDiverged(
            f"train: weights must be finite at step {step}, got NaN or infinity in {', '.join(bad[:4])}; {_kept(newest)}",
            step=step,
            epoch=epoch,
            terms=terms,
        )


def _kept(newest: Path | None) -> str:
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
