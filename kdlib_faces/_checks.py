"""The only place on the faces side that words an error.

Everything a user can cause (a missing file, a wrong column, a corrupt graph) is an `InputError`: the command line
prints it as one line and exits with code 2; a library user catches it as the `ValueError` that it is.
"""

import torch
from torch import Tensor

from kdlib._checks import show_shape

__all__ = ["InputError", "check_identities", "report_key"]


class InputError(ValueError):
    """Something that came from outside is not usable; the message says what, where, and what was expected."""


def report_key(path: str, expected: str, got: object) -> InputError:
    """The error for one key of a report's run dict that is not what it must be."""
    shown = repr(got)
    return InputError(f"report: {path} must be {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")


def check_identities(owner: str, identities: Tensor, batch: int, num_identities: int) -> None:
    """`identities` must be `(b,)` whole numbers from 0 to `num_identities` - 1."""
    if not isinstance(identities, Tensor) or identities.is_floating_point() or identities.is_complex():
        got = identities.dtype if isinstance(identities, Tensor) else type(identities).__name__
        raise TypeError(f"{owner}: identities must be a tensor of whole numbers, got {got}")
    if tuple(identities.shape) != (batch,) or identities.dtype == torch.bool:
        raise ValueError(
            f"{owner}: identities must be (b,) = ({batch},) whole numbers, "
            f"got {show_shape(identities)} of {identities.dtype}"
        )
    if batch and not torch.compiler.is_compiling():
        low, high = (int(end) for end in torch.aminmax(identities))
        if low < 0 or high >= num_identities:
            raise ValueError(
                f"{owner}: identities must be from 0 to {num_identities - 1}, got {low if low < 0 else high}"
            )
