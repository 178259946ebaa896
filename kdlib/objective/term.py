"""One term of an objective."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_name, check_same_batch, check_scheduled, check_shape, value_at
from kdlib.losses._module import as_module
from kdlib.objective._checks import check_loss_of_term, check_masked, check_taps, check_term, check_term_loss
from kdlib.types import Schedule, ScheduledLoss, Side, Targets, WeightedLoss

__all__ = ["Term", "first"]


@dataclass(repr=False, eq=False)
class Term:
    """One term of the objective.

    `Term(loss, student=tap, teacher=tap)` compares a student feature with a feature of each teacher. `Term(loss,
    student=tap, target=name)` compares it with a target of the batch (a supervised term). With both, the loss is called
    as `loss(student, teacher, target=targets[name])`.

    A list of taps stands for several layers: the loss is called with a list of tensors on that side, in the order of the
    taps, as a `CrossLayerLoss`.

    Args:
        loss: called as `loss(student, teacher)`: a Module of `kdlib.losses`, a head, or any callable that returns a
            scalar or `(b,)` values. A function of `kdlib.functional`, also in a `functools.partial` with its
            hyper-parameters, is replaced by its Module.
        student: tap of the student, or a list of taps.
        teacher: tap of the teachers, or a list of taps.
        teachers: names of the teachers to compare with; `None` for all.
        target: name of the target, in place of `teacher` or in addition to it.
        project: `None`; `"auto"`, one inferred projection per teacher; or a Module, copied for each further teacher. For
            lists of taps, `"auto"` projects each student tap to the teacher tap at its place, and the Module is an
            `nn.ModuleList` with one projection for each student tap.
        weight: a number of at least 0, or a schedule `step -> number` as in `kdlib.schedules`.
        sample_weight: name of a target `(b,)`, at least 0, that weights the samples within this term; 0 masks one. The
            loss must return `(b,)` values or be a `WeightedLoss`, as the losses of `kdlib` are.
        mask: name of a target `(b, ...)`, boolean or whole numbers, of which False or 0 leaves out a position, such as an
            attention mask. The loss is called with `mask=`, boolean, as a `MaskedLoss`. Where it has a per-sample form, a
            sample counts by the number of its positions that are kept, so that the term is a mean over positions.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or arguments that contradict each other.

    Examples:
        >>> from functools import partial
        >>> from kdlib.functional import soft_target
        >>> from kdlib.losses import HintLoss
        >>> Term(HintLoss(), student="map", teacher="map", project="auto", weight=0.5)
        Term(HintLoss(reduction='mean'), student='map', teacher='map', project='auto', weight=0.5)
        >>> Term(partial(soft_target, dim=-1), student="logits", teacher="logits", mask="attention_mask").loss.dim
        -1
        >>> def deepest(student, teacher):
        ...     return (student[-1] - teacher[-1]).square().mean(1)
        >>> Term(deepest, student=["layer2", "layer3"], teacher=["layer1", "layer4"]).student
        ('layer2', 'layer3')
    """

    loss: Callable[..., Tensor]
    _: KW_ONLY
    student: str | Sequence[str]
    teacher: str | Sequence[str] | None = None
    teachers: Sequence[str] | None = None
    target: str | None = None
    project: str | nn.Module | None = None
    weight: float | Schedule = 1.0
    sample_weight: str | None = None
    mask: str | None = None
    _takes_weight: bool = field(init=False)
    _per_sample: bool = field(init=False)
    _takes_step: bool = field(init=False)

    def __post_init__(self) -> None:
        check_loss_of_term(self.loss)
        self.student = student = check_taps("student", self.student)
        self.teacher = teacher = None if self.teacher is None else check_taps("teacher", self.teacher)
        names = {"target": self.target, "sample_weight": self.sample_weight, "mask": self.mask}
        check_term(student, teacher, self.teachers, self.project, **names)
        self.weight = check_scheduled("Term", "weight", self.weight, min=0)
        self.teachers = None if self.teachers is None else tuple(self.teachers)
        self.loss = as_module(self.loss)
        if self.mask is not None:
            check_masked(self.loss)
        self._takes_weight = isinstance(self.loss, WeightedLoss)
        self._per_sample = isinstance(self.loss, WeightedLoss) and self.loss.per_sample
        self._takes_step = isinstance(self.loss, ScheduledLoss) and bool(self.loss.schedules)

    def __repr__(self) -> str:
        given = [(each.name, getattr(self, each.name)) for each in fields(self)[1:] if each.init]
        options = [f"{name}={value!r}" for name, value in given if value != getattr(Term, name, None)]
        return f"Term({', '.join([repr(self.loss), *options])})"

    @property
    def cross_layer(self) -> bool:
        """Whether a side has a list of taps."""
        return not (isinstance(self.student, str) and isinstance(self.teacher, str | None))

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
        student: Side,
        teacher: Side | None,
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
        if self.mask is not None:
            options["mask"] = self._mask(name, student, targets)
        if self._per_sample and (teacher is not None or sample is not None):
            options["reduction"] = "none"
        if self._takes_weight and sample is not None:
            options["weight"] = sample
        if self._takes_step:
            options["step"] = step
        loss = self.loss(student, targets[str(self.target)] if teacher is None else teacher, **options)
        unweighted = sample is not None and not self._takes_weight
        check_term_loss(name, loss, first(student).shape[0], weighted=unweighted, teacher=teacher is not None)
        return loss * sample if unweighted and sample is not None else loss

    def sample_weights(self, name: str, student: Side, targets: Targets) -> Tensor | None:
        """Return the sample weights `(b,)` in float32 on the student's device, or None.

        With a mask they include the share of the positions of each sample, 1 for a mean one.
        """
        lead, owner = first(student), f"Objective: term {name!r}"
        weights = None
        if self.sample_weight is not None:
            check_name(owner, "target", self.sample_weight, targets)
            weights = targets[self.sample_weight]
            check_shape(owner, f"targets[{self.sample_weight!r}]", weights, "b", b=lead.shape[0])
            weights = weights.to(device=lead.device, dtype=torch.float32)
        if self.mask is None or not self._per_sample:
            return weights
        kept = self._mask(name, student, targets).reshape(lead.shape[0], -1).sum(1, dtype=torch.float32)
        share = kept / kept.mean().clamp(min=torch.finfo(kept.dtype).tiny)
        return share if weights is None else weights * share

    def _mask(self, name: str, student: Side, targets: Targets) -> Tensor:
        """Return the mask, boolean and on the student's device."""
        owner, lead = f"Objective: term {name!r}", first(student)
        check_name(owner, "target", str(self.mask), targets)
        mask = targets[str(self.mask)]
        check_same_batch(owner, "the student's feature", lead, f"targets[{self.mask!r}]", mask)
        return mask.to(lead.device) if mask.dtype == torch.bool else mask.to(lead.device) != 0


def first(side: Side) -> Tensor:
    """Return the feature, or the first of several."""
    return side if isinstance(side, Tensor) else side[0]
