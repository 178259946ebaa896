"""Checks of arguments and inputs that several packages share, and the error that they raise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_dtype_whole,
    check_finite,
    check_floating,
    check_number,
    check_shape,
    check_type,
    check_whole_numbers,
    readable,
    show_shape,
)
from kdlib._gather import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "InputError", "NotFiniteError", "check_class_centers", "check_class_shards", "check_every_identity", "check_identities", "check_identities_or_triplets",
    "check_mesh", "check_parameter", "check_rates", "check_set", "counted", "describe_error", "report_key", "show_name",
]  # fmt: skip


class InputError(ValueError):
    """A file, setting or argument of the user is not valid, such as a missing file, a wrong column or a corrupt graph.

    The command line prints it as one line and exits with code 2.
    """


class NotFiniteError(InputError):
    """An output of a network is NaN or infinite.

    Args:
        problem: What the network returns.
        row: Position of the first such image in the batch, from 0.
    """

    def __init__(self, problem: str, row: int) -> None:
        super().__init__(f"{problem} for image {row} of the batch")
        self.problem, self.row = problem, row


def counted(number: int, noun: str, nouns: str = "") -> str:
    """Return a number with its noun, by default with an s for any number but 1.

    Examples:
        >>> counted(1, "file"), counted(2000, "file"), counted(0, "identity", "identities")
        ('1 file', '2,000 files', '0 identities')
    """
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def describe_error(error: BaseException) -> str:
    """Return the message of an error and its notes, such as the batch in which it occurred, as one line."""
    notes: list[str] = getattr(error, "__notes__", [])  # absent until the first note is added
    return "; ".join(" ".join(text.split()) for text in (str(error), *notes))


def show_name(name: object, limit: int = 120) -> str:
    """Return a name from a file in a form that is safe to print: one line of at most `limit` characters, no terminal codes."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def report_key(path: str, expected: str, got: object) -> InputError:
    """Return the error for a wrong value at `path` of report.json."""
    shown = repr(got)
    return InputError(f"report: {path} must be {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def check_identities(owner: str, identities: Tensor, batch: int, num_identities: int) -> None:
    """Check that `identities` are `(b,)` whole numbers from 0 to `num_identities` - 1; values only on the CPU."""
    check_dtype_whole(owner, "identities", identities)
    check_shape(owner, "identities", identities, "b", b=batch)
    if batch and readable(identities):
        low, high = (int(end) for end in torch.aminmax(identities))
        if low < 0 or high >= num_identities:
            raise ValueError(
                f"{owner}: identities must be from 0 to {num_identities - 1}, got {low if low < 0 else high}; number them "
                f"from 0, and set num_identities to at least {high + 1}"
            )


def check_class_centers(owner: str, centers: Tensor, num_identities: int, dim: int) -> None:
    """Check that `centers` are `(n, d)`, finite, and without zero rows, which have no direction."""
    check_floating(owner, centers=centers)
    check_shape(owner, "centers", centers, "n d", n=num_identities, d=dim)
    check_finite(owner, centers=centers)
    empty = (centers == 0).all(1)
    if empty.any():
        raise ValueError(f"{owner}: centers must have no row of zeros, got row {int(empty.nonzero()[0])}")


def check_class_shards(owner: str, centers: "DTensor") -> None:
    """Check that a DTensor of class centers is sharded along the identities, on a mesh of one dimension."""
    placements = centers.placements
    if len(placements) != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{owner}: centers must be sharded along dimension 0 of one mesh dimension, got placements {placements}; use "
            "shard_head(head, mesh)"
        )


def check_mesh(owner: str, weight: Tensor, mesh: object) -> None:
    """Check that the weight of a head is not yet sharded, and that a mesh has one dimension."""
    if is_sharded(weight):
        raise ValueError(f"{owner}: head must not be sharded yet, got a sharded weight")
    dimensions = getattr(mesh, "ndim", None)
    if dimensions is None:
        raise TypeError(f"{owner}: mesh must be a DeviceMesh, got {type(mesh).__name__}; use init_device_mesh")
    if dimensions != 1:
        raise ValueError(f"{owner}: mesh must have one dimension, got {dimensions}; index it by a name, as mesh['dp']")


def check_parameter(owner: str, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Check that an optimizer has a parameter."""
    check_type(owner, "optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    check_type(owner, "parameter", parameter, nn.Parameter, "a torch.nn.Parameter")
    if not any(each is parameter for group in optimizer.param_groups for each in group["params"]):
        raise ValueError(f"{owner}: parameter must be one of the optimizer's, got another; shard a head before that")


def check_every_identity(owner: str, counts: Tensor) -> None:
    """Check that each identity occurs: `counts` `(n,)` are at least 1."""
    missing = (counts == 0).nonzero().flatten()
    if len(missing):
        raise ValueError(
            f"{owner}: every identity from 0 to {len(counts) - 1} must have an embedding of some length, "
            f"got none of {len(missing)} of them, first of {int(missing[0])}"
        )


def check_set(owner: str, ready: bool) -> None:
    """Check that the centers were given or estimated before the loss is computed."""
    if not ready:
        raise ValueError(
            f"{owner}: centers must be there before the first loss, got none; "
            f"give centers=, or call centers_from(embeddings, identities)"
        )


def check_identities_or_triplets(owner: str, target: Tensor, batch: int) -> None:
    """Check that `target` holds identities `(b,)`, or triplets `(t, 3)` of rows from 0 to b - 1."""
    if not isinstance(target, Tensor) or target.dim() != 2:
        check_whole_numbers(owner, "target", target, batch)
        return
    check_dtype_whole(owner, "target", target)
    if target.shape[1] != 3:
        raise ValueError(f"{owner}: target must be identities (b,) or triplets (t, 3), got {show_shape(target)}")
    if len(target) and readable(target):
        low, high = (int(end) for end in torch.aminmax(target))
        if low < 0 or high >= batch:
            raise ValueError(f"{owner}: triplets must be rows from 0 to {batch - 1}, got {low if low < 0 else high}")


def check_rates(owner: str, rates: object) -> None:
    """Check that `rates` is a sequence or array of false positive rates, each above 0 and at most 1."""
    if isinstance(rates, (str, bytes)) or not isinstance(rates, (Sequence, np.ndarray)):
        raise TypeError(f"{owner}: rates must be a sequence of numbers, got {type(rates).__name__}")
    if not len(rates):
        raise ValueError(f"{owner}: rates must hold at least one number, got {rates!r}")
    for index, rate in enumerate(rates):
        check_number(owner, f"rates[{index}]", rate, above=0, max=1)
