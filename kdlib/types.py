"""The words that every room shares: named features, and what a loss, a projection and a weighting look like."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

__all__ = ["Features", "Loss", "Projection", "Targets", "Weighting"]

Features: TypeAlias = Mapping[str, Tensor]
"""What an adapter returns: one tensor, batch first, for each tap name."""

Targets: TypeAlias = Mapping[str, Tensor]
"""What the data loader knows of a batch beside its inputs: identities, sample ids, views; each `(b, ...)`."""


@runtime_checkable
class Loss(Protocol):
    """A student tensor and a teacher (or target) tensor to a scalar, or to `(b,)` values, one a sample."""

    def __call__(self, student: Tensor, teacher: Tensor, /) -> Tensor: ...


@runtime_checkable
class Projection(Protocol):
    """A student tensor into the teacher's space."""

    def __call__(self, student: Tensor, /) -> Tensor: ...


@runtime_checkable
class Weighting(Protocol):
    """`(k, b)` losses of k teachers to `(k, b)` weights whose columns sum to one."""

    def __call__(self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets) -> Tensor: ...
