"""Checks of arguments and inputs that several packages share, and the error that they raise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib._checks import (
    check_finite,
    check_floating,
    check_number,
    check_shape,
    check_whole_numbers,
    readable,
    show_shape,
)

__all__ = [
    "InputError", "check_class_centers", "check_every_identity", "check_identities", "check_identities_or_triplets",
    "check_rates", "check_relation", "check_set", "report_key", "show_name",
]  # fmt: skip


class InputError(ValueError):
    """A file, setting or argument of the user is not valid, such as a missing file, a wrong column or a corrupt graph.

    The command line prints it as one line and exits with code 2.
    """


def show_name(name: object) -> str:
    """Return a name from a file in a form that is safe to print: one short line without terminal codes."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:117]}..."


def report_key(path: str, expected: str, got: object) -> InputError:
    """Return the error for a wrong value at `path` of report.json."""
    shown = repr(got)
    return InputError(f"report: {path} must be {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def check_identities(owner: str, identities: Tensor, batch: int, num_identities: int) -> None:
    """Check that `identities` are `(b,)` whole numbers from 0 to `num_identities` - 1; values only on the CPU."""
    if not isinstance(identities, Tensor) or identities.is_floating_point() or identities.is_complex():
        got = identities.dtype if isinstance(identities, Tensor) else type(identities).__name__
        raise TypeError(f"{owner}: identities must be a tensor of whole numbers, got {got}")
    if tuple(identities.shape) != (batch,) or identities.dtype == torch.bool:
        raise ValueError(
            f"{owner}: identities must be (b,) = ({batch},) whole numbers, "
            f"got {show_shape(identities)} of {identities.dtype}"
        )
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
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{owner}: target must be whole numbers, got {target.dtype}")
    if target.shape[1] != 3:
        raise ValueError(f"{owner}: target must be identities (b,) or triplets (t, 3), got {show_shape(target)}")
    if len(target) and readable(target):
        low, high = (int(end) for end in torch.aminmax(target))
        if low < 0 or high >= batch:
            raise ValueError(f"{owner}: triplets must be rows from 0 to {batch - 1}, got {low if low < 0 else high}")


def check_rates(owner: str, rates: Any) -> None:
    """Check that `rates` is a sequence or array of false positive rates, each above 0 and at most 1."""
    if isinstance(rates, (str, bytes)) or not isinstance(rates, (Sequence, np.ndarray)):
        raise TypeError(f"{owner}: rates must be a sequence of numbers, got {type(rates).__name__}")
    if not len(rates):
        raise ValueError(f"{owner}: rates must hold at least one number, got {rates!r}")
    for index, rate in enumerate(rates):
        check_number(owner, f"rates[{index}]", rate, above=0, max=1)


def check_relation(owner: str, reduction: str) -> None:
    """Check that the reduction is the mean: a loss over pairs or triplets has one value per batch."""
    if reduction != "mean":
        raise ValueError(f"{owner}: reduction must be 'mean': a relation has no per-sample form, got {reduction!r}")
