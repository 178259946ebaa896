"""Types shared by all packages: named features and targets, and the Protocols of the parts of a distillation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "CrossLayerLoss", "CrossLayerWeighting", "Features", "FrozenModel", "GraphWeighting", "HasFingerprint", "HasTaps",
    "Loss", "MaskedLoss", "PassesInputs", "PenalizedWeighting", "Projection", "Schedule", "ScheduledLoss", "Side",
    "StudentReader", "Targets", "Teacher", "TeacherInputs", "UpdatedTeacher", "WeightedLoss", "Weighting",
]  # fmt: skip

Features: TypeAlias = Mapping[str, Tensor]
"""Output of an adapter: one tensor `(b, ...)` for each feature name."""

Targets: TypeAlias = Mapping[str, Tensor]
"""Values of a batch besides its inputs, such as identities, sample ids and views; each `(b, ...)`."""

Side: TypeAlias = Tensor | Sequence[Tensor]
"""One side of a comparison: a feature, or the features of several layers in the order of the taps."""

Schedule: TypeAlias = Callable[[int], float]
"""Maps the step, a whole number from 0, to a value; `kdlib.schedules` has the usual ones."""

TeacherInputs: TypeAlias = str | Sequence[str] | Mapping[str, str] | None
"""Targets that a teacher reads in place of the inputs of the batch.

- `None`: none, the teacher takes the inputs of the batch;
- a name: that entry, which is a tensor, a tuple of arguments or a mapping of keyword arguments as the inputs are;
- a sequence of names: those entries as positional arguments;
- a mapping of keyword argument to name: those entries as keyword arguments.
"""


@runtime_checkable
class Loss(Protocol):
    """Compares a student tensor with a teacher (or target) tensor; returns a scalar or one value per sample, `(b,)`.

    Examples:
        >>> from kdlib import HintLoss
        >>> isinstance(HintLoss(), Loss)
        True
    """

    def __call__(self, student: Tensor, teacher: Tensor, /) -> Tensor: ...


class CrossLayerLoss(Protocol):
    """Compares features of several layers, each `(b, ...)`; a term with lists of taps calls it with lists.

    Examples:
        >>> from kdlib import HintLoss
        >>> def all_layers(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        ...     return sum(HintLoss()(s, t) for s, t in zip(student, teacher))
        >>> all_layers([torch.zeros(2, 3)] * 2, [torch.ones(2, 3)] * 2).item()
        2.0
    """

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor], /) -> Tensor: ...


@runtime_checkable
class WeightedLoss(Protocol):
    """A loss that also accepts `weight=`, per-sample weights `(b,)`, as all losses of kdlib do.

    A loss that returns `(b,)` values needs no declaration: the objective weights the values itself. A Module with an
    attribute `per_sample` declares that it takes `weight=` and, if it is true, `reduction="none"`. A `Term` reads it
    once, when it is created.

    Examples:
        >>> from kdlib import HintLoss, PKTLoss
        >>> HintLoss().per_sample, PKTLoss().per_sample
        (True, False)
    """

    def __call__(self, student: Any, teacher: Any, /) -> Tensor: ...

    @property
    def per_sample(self) -> bool:
        """Whether the loss accepts `reduction="none"` and then returns `(b,)` values."""


@runtime_checkable
class MaskedLoss(Protocol):
    """A loss of dense features, such as logits of tokens or pixels, that also accepts `mask=`.

    The mask is boolean `(b, ...)`; False leaves a position out. With `reduction="none"`, the value of a sample is the mean
    over the positions that the mask keeps. A loss without the attribute `masked` is called with the mask of its term and
    must accept it.

    Examples:
        >>> from kdlib import HintLoss, SoftTargetLoss
        >>> SoftTargetLoss().masked, HintLoss().masked
        (True, False)
    """

    def __call__(self, student: Any, teacher: Any, /, *, mask: Tensor | None = None) -> Tensor: ...

    @property
    def masked(self) -> bool:
        """Whether the loss accepts `mask=`; a term with a mask refuses a loss that does not."""


@runtime_checkable
class ScheduledLoss(Protocol):
    """A loss that also accepts `step=`, the step at which its schedules are evaluated.

    A `Term` reads `schedules` once, when it is created, and passes the step if there are any.

    Examples:
        >>> from kdlib import SoftTargetLoss
        >>> from kdlib.schedules import linear
        >>> list(SoftTargetLoss(temperature=linear(4.0, 1.0, 100)).schedules)
        ['temperature']
    """

    def __call__(self, student: Any, teacher: Any, /) -> Tensor: ...

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The hyper-parameters that are schedules; if there are any, each call needs the step."""


@runtime_checkable
class Projection(Protocol):
    """Maps a student tensor into the teacher's feature space.

    Examples:
        >>> isinstance(nn.Linear(64, 128), Projection)
        True
    """

    def __call__(self, student: Tensor, /) -> Tensor: ...


@runtime_checkable
class Weighting(Protocol):
    """Maps the losses `(k, b)` of k teachers to weights `(k, b)` whose columns sum to one.

    Examples:
        >>> from kdlib import UniformWeighting
        >>> isinstance(UniformWeighting(), Weighting)
        True
    """

    def __call__(self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets) -> Tensor: ...


@runtime_checkable
class GraphWeighting(Weighting, Protocol):
    """A weighting that differentiates the losses.

    Where `needs_graph` is true, an `Objective` passes the losses with their graph and detaches the weights. All other
    weightings receive detached losses, and a graph in their weights is kept.

    Examples:
        >>> from kdlib import GradientWeighting
        >>> isinstance(GradientWeighting(), GraphWeighting)
        True
    """

    @property
    def needs_graph(self) -> bool:
        """Whether the losses must be passed with their graph."""


@runtime_checkable
class PenalizedWeighting(Weighting, Protocol):
    """A learned weighting with a loss term of its own.

    Examples:
        >>> from kdlib import UncertaintyWeighting, UniformWeighting
        >>> isinstance(UncertaintyWeighting(2), PenalizedWeighting), isinstance(UniformWeighting(), PenalizedWeighting)
        (True, False)
    """

    def penalty(self, losses: Tensor) -> Tensor:
        """Scalar that an `Objective` adds to its total each time it computes weights; `losses` are detached."""


@runtime_checkable
class CrossLayerWeighting(Protocol):
    """A weighting that accepts terms with lists of taps.

    Where `cross_layer` is true, `student` and each of `teachers` may be a list of features. Other weightings are called
    for terms with one tap on each side only.

    Examples:
        >>> from kdlib import UniformWeighting
        >>> isinstance(UniformWeighting(), CrossLayerWeighting)
        True
    """

    def __call__(self, losses: Tensor, *, student: Side, teachers: Sequence[Side], targets: Targets) -> Tensor: ...

    @property
    def cross_layer(self) -> bool:
        """Whether the student and the teachers may be lists of features."""


@runtime_checkable
class HasTaps(Protocol):
    """A model that declares which features it returns, so that names are checked before the first forward.

    Examples:
        >>> from kdlib import OUTPUT, StudentAdapter
        >>> isinstance(StudentAdapter(nn.Linear(4, 2), {"out": OUTPUT}), HasTaps)
        True
    """

    @property
    def taps(self) -> Mapping[str, object]:
        """Mapping whose keys are the names of the features."""


@runtime_checkable
class PassesInputs(Protocol):
    """A student that passes its inputs unchanged to another one, such as `AuxiliaryHeads`.

    Examples:
        >>> from kdlib import OUTPUT, StudentAdapter
        >>> isinstance(StudentAdapter(nn.Linear(4, 2), {"out": OUTPUT}), PassesInputs)
        False
    """

    @property
    def receiver(self) -> nn.Module:
        """The student that receives the inputs; the arguments of its `forward` are the entries of a mapping that `train` passes as inputs."""


@runtime_checkable
class FrozenModel(HasTaps, Protocol):
    """An adapter around a frozen model that it does not register, such as `TeacherAdapter`.

    Examples:
        >>> from kdlib import OUTPUT, TeacherAdapter
        >>> isinstance(TeacherAdapter(nn.Linear(4, 2), {"out": OUTPUT}), FrozenModel)
        True
    """

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
    """A module that identifies its weights and settings by a text of its own, which caches store and compare.

    Examples:
        >>> isinstance(nn.Linear(4, 2), HasFingerprint)
        False
    """

    @property
    def fingerprint(self) -> str:
        """Text that differs whenever the outputs may differ."""


@runtime_checkable
class Teacher(Protocol):
    """A frozen model: maps inputs to named features. `TeacherAdapter` and `CachedTeacher` are teachers.

    Examples:
        >>> from kdlib import OUTPUT, TeacherAdapter
        >>> isinstance(TeacherAdapter(nn.Linear(4, 2), {"out": OUTPUT}), Teacher)
        True
    """

    @property
    def inputs(self) -> TeacherInputs:
        """The targets that it reads in place of the inputs of the batch; `None` for a teacher that takes these."""

    def __call__(self, *inputs: Any, **named: Any) -> Features: ...


@runtime_checkable
class UpdatedTeacher(Teacher, Protocol):
    """A teacher whose weights follow the student's, such as `EMATeacher`.

    A `Distiller` registers it if it is a Module, so that its weights are part of the state dict, and excludes its
    parameters from `trainable_parameters()`.

    Examples:
        >>> from kdlib import OUTPUT, EMATeacher, StudentAdapter
        >>> isinstance(EMATeacher(StudentAdapter(nn.Linear(4, 2), {"out": OUTPUT})), UpdatedTeacher)
        True
    """

    def update(self, student: nn.Module, *, step: int | None = None) -> None:
        """Update the weights after a step of the optimizer; `step` counts from 0."""


@runtime_checkable
class StudentReader(Teacher, Protocol):
    """A teacher that is computed from the student's features, such as `SelfTeacher`.

    Examples:
        >>> from kdlib import SelfTeacher
        >>> isinstance(SelfTeacher({"shallow": "deep"}), StudentReader)
        True
    """

    @property
    def reads_student(self) -> bool:
        """Whether it is called with the student's features, a mapping, in place of the inputs."""
