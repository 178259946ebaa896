"""Types shared by all packages: named features and targets, and the Protocols of the parts of a distillation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "Features", "FrozenModel", "GraphWeighting", "HasFingerprint", "HasTaps", "Loss", "PenalizedWeighting",
    "Projection", "Schedule", "ScheduledLoss", "Targets", "Teacher", "WeightedLoss", "Weighting",
]  # fmt: skip

Features: TypeAlias = Mapping[str, Tensor]
"""Output of an adapter: one tensor `(b, ...)` for each feature name."""

Targets: TypeAlias = Mapping[str, Tensor]
"""Values of a batch besides its inputs, such as identities, sample ids and views; each `(b, ...)`."""

Schedule: TypeAlias = Callable[[int], float]
"""Maps the step, a whole number from 0, to a value; `kdlib.schedules` has the usual ones."""


@runtime_checkable
class Loss(Protocol):
    """Compares a student tensor with a teacher (or target) tensor; returns a scalar or one value per sample, `(b,)`."""

    def __call__(self, student: Tensor, teacher: Tensor, /) -> Tensor: ...


@runtime_checkable
class WeightedLoss(Loss, Protocol):
    """A loss that also accepts `weight=`, per-sample weights `(b,)`, as all losses of kdlib do.

    An `Objective` reads `per_sample` once, when the term is created.
    """

    @property
    def per_sample(self) -> bool:
        """Whether the loss accepts `reduction="none"` and then returns `(b,)` values."""


@runtime_checkable
class ScheduledLoss(Loss, Protocol):
    """A loss that also accepts `step=`, the step at which its schedules are evaluated.

    An `Objective` reads `schedules` once, when the term is created, and passes the step if there are any.
    """

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The hyper-parameters that are schedules; if there are any, each call needs the step."""


@runtime_checkable
class Projection(Protocol):
    """Maps a student tensor into the teacher's feature space."""

    def __call__(self, student: Tensor, /) -> Tensor: ...


@runtime_checkable
class Weighting(Protocol):
    """Maps the losses `(k, b)` of k teachers to weights `(k, b)` whose columns sum to one."""

    def __call__(self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets) -> Tensor: ...


@runtime_checkable
class GraphWeighting(Weighting, Protocol):
    """A weighting that differentiates the losses.

    Where `needs_graph` is true, an `Objective` passes the losses with their graph and detaches the weights. All other
    weightings receive detached losses, and a graph in their weights is kept.
    """

    @property
    def needs_graph(self) -> bool:
        """Whether the losses must be passed with their graph."""


@runtime_checkable
class PenalizedWeighting(Weighting, Protocol):
    """A learned weighting with a loss term of its own."""

    def penalty(self, losses: Tensor) -> Tensor:
        """Scalar that an `Objective` adds to its total each time it computes weights; `losses` are detached."""


@runtime_checkable
class HasTaps(Protocol):
    """A model that declares which features it returns, so that names are checked before the first forward."""

    @property
    def taps(self) -> Mapping[str, object]:
        """Mapping whose keys are the names of the features."""


@runtime_checkable
class FrozenModel(HasTaps, Protocol):
    """An adapter around a frozen model that it does not register, such as `TeacherAdapter`."""

    @property
    def model(self) -> nn.Module:
        """The frozen model."""

    @property
    def preprocess(self) -> Callable[..., Any] | None:
        """The function that is called on the inputs first."""

    @property
    def dtype(self) -> torch.dtype | None:
        """Floating-point type of the model, if it is fixed."""


@runtime_checkable
class HasFingerprint(Protocol):
    """A module that identifies its weights and settings by a text of its own, which caches store and compare."""

    @property
    def fingerprint(self) -> str:
        """Text that differs whenever the outputs may differ."""


@runtime_checkable
class Teacher(Protocol):
    """A frozen model: maps inputs to named features. `TeacherAdapter` and `CachedTeacher` are teachers."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the targets that are passed in place of the inputs; empty for a teacher that takes the inputs."""

    def __call__(self, *inputs: Any, **named: Any) -> Features: ...
