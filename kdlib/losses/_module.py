"""Base classes of the loss Modules."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from kdlib._checks import check_choice, check_relation_reduction, check_step, value_at
from kdlib._maths import REDUCTIONS, MeanOnly, Reduction
from kdlib._repr import CallRepr
from kdlib.types import Schedule

__all__ = ["FunctionLoss", "LossModule", "RelationLoss", "ScheduledModule", "as_module"]


class ScheduledModule(CallRepr):
    """A loss of which some hyper-parameters may be schedules."""

    _schedulable: ClassVar[tuple[str, ...]] = ()
    """Hyper-parameters above 0 that may be schedules."""

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """The hyper-parameters that are schedules."""
        return {name: getattr(self, name) for name in self._schedulable if callable(getattr(self, name))}

    def _at(self, step: int | None) -> dict[str, float]:
        """Return the values of the schedulable hyper-parameters at a step, which may be `None` if all are numbers."""
        owner = type(self).__name__
        step = step if step is None else check_step(owner, step)
        return {name: value_at(owner, name, getattr(self, name), step, above=0) for name in self._schedulable}


_WITH_FUNCTION: list[type["_Loss"]] = []
"""The Modules of functions in `kdlib.functional`."""


class _Loss(ScheduledModule):
    """A loss whose constructor stores the hyper-parameters of `_function` as attributes of the same name."""

    _function: ClassVar[Callable[..., Tensor]]
    _arguments: ClassVar[tuple[str, ...]]

    masked: ClassVar[bool] = False
    """Whether `mask=` is accepted."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._arguments = tuple(signature(cls).parameters)
        cls.masked = "mask" in signature(cls.forward).parameters
        if "_function" in vars(cls):
            _WITH_FUNCTION.append(cls)

    def _call(
        self,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor | None,
        reduction: str | None,
        step: int | None = None,
        **inputs: Tensor | None,
    ) -> Tensor:
        options: dict[str, Any] = {**{name: getattr(self, name) for name in self._arguments}, **self._at(step)}
        options["reduction"] = reduction or options["reduction"]
        return type(self)._function(student, teacher, weight=weight, **inputs, **options)


class LossModule(_Loss):
    """A loss with one value per sample."""

    per_sample: bool = True
    """Whether `reduction="none"` is accepted."""

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice(type(self).__name__, "reduction", reduction, REDUCTIONS)
        self.reduction = reduction


class FunctionLoss(LossModule):
    """A loss with one value per sample that compares two tensors."""

    def forward(
        self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: Reduction | None = None
    ) -> Tensor:
        """Compare `student` with `teacher`; `reduction=None` uses the constructor's."""
        return self._call(student, teacher, weight, reduction)


class RelationLoss(_Loss):
    """A loss with one value per batch, which can use the rows of all processes."""

    per_sample: bool = False
    """Whether `reduction="none"` is accepted."""

    def __init__(self, *, gather: bool = False, reduction: MeanOnly = "mean") -> None:
        super().__init__()
        check_relation_reduction(type(self).__name__, reduction)
        self.gather = gather
        self.reduction = reduction

    def forward(
        self, student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, reduction: MeanOnly | None = None
    ) -> Tensor:
        """Compare `student` with `teacher`; `reduction=None` uses the constructor's."""
        return self._call(student, teacher, weight, reduction)


def as_module(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the Module of a function of `kdlib.functional`, or of a `functools.partial` that sets its hyper-parameters.

    Other losses are returned as they are.
    """
    function, options = (loss.func, loss.keywords) if isinstance(loss, partial) and not loss.args else (loss, {})
    for kind in _WITH_FUNCTION:
        own = kind._function
        public = vars(sys.modules[own.__module__]).get(own.__name__)  # the function with checked arguments
        if (function is own or function is public) and options.keys() <= {*kind._arguments}:
            return kind(**options)
    return loss
