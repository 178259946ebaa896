"""One term of an objective."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable, check_name, check_scheduled, check_shape, value_at
from kdlib.objective._checks import check_term, check_term_loss
from kdlib.types import Schedule, ScheduledLoss, Targets, WeightedLoss

__all__ = ["Term"]


@dataclass(repr=False, eq=False)
class Term:
    """One term of the objective.

    `Term(loss, student=tap, teacher=tap)` compares a student feature with a feature of each teacher. `Term(loss,
    student=tap, target=name)` compares it with a target of the batch (a supervised term). With both, the loss is called
    as `loss(student, teacher, target=targets[name])`.

    Args:
        loss: called as `loss(student, teacher)`; a Module of `kdlib.losses`, a head, or any callable that returns a
            scalar or `(b,)` values.
        student: feature of the student.
        teacher: feature of the teachers.
        teachers: names of the teachers to compare with; `None` for all.
        target: name of the target, in place of `teacher` or in addition to it.
        project: `None`; `"auto"`, one inferred projection per teacher; or a Module, copied for each further teacher.
        weight: a number of at least 0, or a schedule `step -> number` as in `kdlib.schedules`.
        sample_weight: name of a target `(b,)`, at least 0, that weights the samples within this term; 0 masks one. The
            loss must return `(b,)` values or be a `WeightedLoss`, as the losses of `kdlib` are.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or arguments that contradict each other.

    Examples:
        >>> from kdlib.losses import HintLoss
        >>> Term(HintLoss(), student="map", teacher="map", project="auto", weight=0.5)
        Term(HintLoss(reduction='mean'), student='map', teacher='map', project='auto', weight=0.5)
    """

    loss: Callable[..., Tensor]
    _: KW_ONLY
    student: str
    teacher: str | None = None
    teachers: Sequence[str] | None = None
    target: str | None = None
    project: str | nn.Module | None = None
    weight: float | Schedule = 1.0
    sample_weight: str | None = None
    _takes_weight: bool = field(init=False)
    _per_sample: bool = field(init=False)
    _takes_step: bool = field(init=False)

    def __post_init__(self) -> None:
        check_callable("Term", "loss", self.loss)
        check_term(self.student, self.teacher, self.teachers, self.target, self.project, self.sample_weight)
        self.weight = check_scheduled("Term", "weight", self.weight, min=0)
        self.teachers = None if self.teachers is None else tuple(self.teachers)
        self._takes_weight = isinstance(self.loss, WeightedLoss)
        self._per_sample = isinstance(self.loss, WeightedLoss) and self.loss.per_sample
        self._takes_step = isinstance(self.loss, ScheduledLoss) and bool(self.loss.schedules)

    def __repr__(self) -> str:
        given = [(each.name, getattr(self, each.name)) for each in fields(self)[1:] if each.init]
        options = [f"{name}={value!r}" for name, value in given if value != getattr(Term, name, None)]
        return f"Term({', '.join([repr(self.loss), *options])})"

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The weight and the hyper-parameters of the loss that are schedules."""
        weight = {"weight": self.weight} if callable(self.weight) else {}
        return weight | (dict(self.loss.schedules) if isinstance(self.loss, ScheduledLoss) else {})

    def weight_at(self, step: int | None) -> float:
        """Return the weight at a step, which may be `None` if the weight is a number."""
        return float(value_at("Term", "weight", self.weight, step, min=0))

    def values(
        self,
        name: str,
        student: Tensor,
        teacher: Tensor | None,
        targets: Targets,
        sample: Tensor | None,
        step: int | None,
    ) -> Tensor:
        """Return the losses times the sample weights: `(b,)` where the loss has a per-sample form, else a scalar."""
        options: dict[str, Any] = {}
        if self.target is not None:
            check_name(f"Objective: term {name!r}", "target", self.target, targets)
            if teacher is not None:
                options["target"] = targets[self.target]
        if self._per_sample and (teacher is not None or sample is not None):
            options["reduction"] = "none"
        if self._takes_weight and sample is not None:
            options["weight"] = sample
        if self._takes_step:
            options["step"] = step
        loss = self.loss(student, targets[str(self.target)] if teacher is None else teacher, **options)
        unweighted = sample is not None and not self._takes_weight
        check_term_loss(name, loss, student.shape[0], weighted=unweighted, teacher=teacher is not None)
        return loss * sample if unweighted and sample is not None else loss

    def sample_weights(self, name: str, student: Tensor, targets: Targets) -> Tensor | None:
        """Return the sample weights `(b,)` in float32 on the student's device, or None."""
        if self.sample_weight is None:
            return None
        check_name(f"Objective: term {name!r}", "target", self.sample_weight, targets)
        weights = targets[self.sample_weight]
        check_shape(f"Objective: term {name!r}", f"targets[{self.sample_weight!r}]", weights, "b", b=student.shape[0])
        return weights.to(device=student.device, dtype=torch.float32)
