"""Checks and error messages of the training package."""

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


# Configuration and arguments of `train`.


def check_length(owner: str, epochs: int | None, max_steps: int | None) -> None:
    """`epochs` or `max_steps` must be given."""
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
    """`distiller` must have the attributes of a `Distiller`, which a compiled one also has."""
    parts = ("student", "teachers", "objective", "trainable_parameters")
    if not isinstance(distiller, nn.Module) or not all(hasattr(distiller, part) for part in parts):
        raise TypeError(f"train: distiller must be a Distiller, got {type(distiller).__name__}")


def check_device(owner: str, device: Any) -> None:
    """`device` must be None or valid for `torch.device`."""
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{owner}: device must be a torch.device, its name or None, got {device!r}") from error


def check_hooks(hooks: object) -> None:
    """Hooks must be a sequence of callables."""
    check_type("train", "hooks", hooks, Sequence, "a sequence of callables")
    for index, hook in enumerate(hooks):  # type: ignore[arg-type, var-annotated]  # checked in the line before
        check_callable("train", f"hooks[{index}]", hook)


def check_parameters(groups: Sequence[object]) -> None:
    """There must be trainable parameters."""
    if not groups:
        raise ValueError("train: distiller.trainable_parameters() must return at least one parameter, got none")


def check_optimizer(optimizer: object) -> None:
    """A callable `optimizer` must return an optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"train: optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")


# Loader.


def check_loader(loader: object) -> None:
    """A loader must be iterable, possibly by `__getitem__`."""
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise TypeError(f"train: loader must be an iterable of batches, got {type(loader).__name__}")


def check_batch(batch: object) -> None:
    """A loader must yield `(inputs, targets)` as a tuple or list: a tensor of two images would also unpack to a pair."""
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"train: loader must yield (inputs, targets), got a {type(batch).__name__}")
    if len(batch) != 2:
        raise ValueError(f"train: loader must yield (inputs, targets), got {len(batch)} items")
    check_targets("train: loader", batch[1])


def no_batch() -> ValueError:
    """Error for a loader that yields nothing."""
    return ValueError("train: loader must yield at least one batch, got none")


def no_length() -> ValueError:
    """Error for a loader without a length if only `epochs` is given."""
    return ValueError("train: loader must have a length when max_steps is not given, got one without")


def check_no_more(more: bool, length: int | None) -> None:
    """A loader must not yield more batches than its length."""
    if more:
        raise ValueError(f"train: loader must yield len(loader) = {length} batches, got more")


def empty_epoch(epoch: int) -> ValueError:
    """Error for a loader that can only be iterated once."""
    return ValueError(f"train: loader must yield batches in every epoch, got none in epoch {epoch}")


def check_skipped(wanted: int, skipped: int) -> None:
    """A run that resumes within an epoch must be able to skip the batches taken before."""
    if skipped < wanted:
        raise ValueError(f"train: loader must yield the {wanted} batches of the interrupted epoch again, got {skipped}")


def check_generators(wanted: int, found: int) -> None:
    """A saved position contains the state of torch's generator and of each generator of the loader."""
    if wanted != found:
        raise ValueError(f"train: loader must have {wanted - 1} generators as before, got {found - 1}")


# Files.


def check_stored(archive: zipfile.ZipFile, size: int) -> None:
    """The uncompressed size must not exceed the file size, because torch.save does not compress."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > size:
        raise ValueError(f"it would unpack to {unpacked} bytes from {size}")


def check_checksum(altered: str | None) -> None:
    """All parts of a checkpoint must match their checksums; `altered` names one that does not."""
    if altered is not None:
        raise ValueError(f"the checksum of {altered} does not match")


def unreadable(path: object, error: Exception) -> CheckpointError:
    """Error for a file that is truncated, damaged, or not a checkpoint."""
    return CheckpointError(f"train: checkpoint {path} cannot be read: {error}")


def check_format(path: object, state: object, number: int) -> None:
    """A checkpoint must have the current format."""
    if not isinstance(state, dict) or state.get("format") != number:
        got = f"format {state.get('format')!r}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise CheckpointError(f"train: checkpoint {path} must have format {number}, got {got}")


def none_readable(directory: Path | None, count: int) -> CheckpointError:
    """Error if no checkpoint is readable: a new run must not overwrite them."""
    return CheckpointError(
        f"train: none of the {count} checkpoints in {directory} can be read; remove them to start from the beginning"
    )


def unwritable(path: Path, error: Exception, newest: Path | None) -> CheckpointError:
    """Error for a full disk or a missing permission."""
    kept = f"{newest} is kept" if newest else "there is no earlier checkpoint"
    # torch's archive writer hides the system's error in the context.
    cause = error.__context__ if isinstance(error.__context__, OSError) else error
    return CheckpointError(f"train: checkpoint {path} cannot be written: {cause}; {kept}")


def check_fingerprint(saved: Mapping[str, object], current: Mapping[str, object], place: object) -> None:
    """A resumed run must have the same fingerprint; the error names each differing field with both values."""
    differing = [name for name in sorted({*saved, *current}) if saved.get(name) != current.get(name)]
    if differing:
        pairs = ", ".join(f"{name} (checkpoint {saved.get(name)!r}, now {current.get(name)!r})" for name in differing)
        raise ValueError(
            f"train: checkpoint_dir {place} must contain a run of this configuration, got different {pairs}; "
            "restore these settings or use another directory"
        )


def check_same_steps(steps: Sequence[int]) -> None:
    """All processes must resume from the same step."""
    if len(set(steps)) > 1:
        raise ValueError(
            f"train: checkpoint_dir must be one directory shared by all processes, got steps {list(steps)}"
        )


def check_same_names(saved: Mapping[str, object], own: Mapping[str, object]) -> None:
    """The names of an average must match the module's state dict."""
    missing, unknown = (sorted({*a} - {*b}) for a, b in ((own, saved), (saved, own)))
    if missing or unknown:
        raise ValueError(
            "EMA: state must have the names of the module's state dict, got missing "
            f"{missing[:4] or 'none'} and unexpected {unknown[:4] or 'none'}"
        )


def no_row(path: Path, line: int) -> ValueError:
    """Error for a line that is not a row of a log."""
    return ValueError(f"train: {path} must be a training log, got something else in line {line}")


# Values of a run.


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
    """Error for a non-finite loss, with the batches and, if known, the sample ids."""
    shown = ", ".join(str(sample) for sample in samples[:32]) + (", ..." if len(samples) > 32 else "")
    which = f"batch {first}" if batches == 1 else f"batches {first} to {first + batches - 1}"
    values = ", ".join(f"{name}={value:.6g}" for name, value in terms.items())
    return TrainingDiverged(
        f"train: loss must be finite, got {total} at step {step}, epoch {epoch}, {which} of the epoch"
        f"{f' (samples {shown})' if samples else ''}; terms {values}; {_kept(newest)}",
        step=step,
        epoch=epoch,
        terms=terms,
        samples=samples,
    )


def check_finite_weights(
    bad: Sequence[str], terms: Mapping[str, float], *, step: int, epoch: int, newest: Path | None
) -> None:
    """All weights must be finite; `bad` names those that are not."""
    if bad:
        raise TrainingDiverged(
            f"train: weights must be finite at step {step}, got NaN or infinity in {', '.join(bad[:4])}; {_kept(newest)}",
            step=step,
            epoch=epoch,
            terms=terms,
        )


def _kept(newest: Path | None) -> str:
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
