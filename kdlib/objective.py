"""Terms of a distillation objective and their weighted sum."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_callable,
    check_inferred,
    check_key,
    check_name,
    check_number,
    check_shape,
    check_targets,
    check_term,
    check_term_loss,
    check_term_names,
    check_term_teachers,
    check_type,
    check_weights_of,
    late_projections,
)
from kdlib._held import unchanged
from kdlib.influence import Comparison, InfluenceReport, measure
from kdlib.projections import infer_projection
from kdlib.types import Features, GraphWeighting, PenalizedWeighting, Targets, WeightedLoss, Weighting
from kdlib.weighting import UniformWeighting

__all__ = ["Objective", "ObjectiveOutput", "Term"]


@dataclass(frozen=True)
class ObjectiveOutput:
    """Result of an objective on one batch.

    Args:
        total: scalar, the weighted sum of the terms, plus the penalty.
        terms: term name to scalar, before its weight.
        weights: name of each term with teachers to the `(k, b)` weights of its k teachers.
        penalty: scalar that a learned weighting adds to the total; `None` for other weightings.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, Tensor]
    penalty: Tensor | None = None


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
        weight: a number, or a schedule `step -> number`.
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
    weight: float | Callable[[int], float] = 1.0
    sample_weight: str | None = None
    _takes_weight: bool = field(init=False)
    _per_sample: bool = field(init=False)

    def __post_init__(self) -> None:
        check_callable("Term", "loss", self.loss)
        check_term(self.student, self.teacher, self.teachers, self.target, self.project, self.sample_weight)
        if not callable(self.weight):
            self.weight = check_number("Term", "weight", self.weight, min=0)
        self.teachers = None if self.teachers is None else tuple(self.teachers)
        self._takes_weight = isinstance(self.loss, WeightedLoss)
        self._per_sample = isinstance(self.loss, WeightedLoss) and self.loss.per_sample

    def __repr__(self) -> str:
        given = [(each.name, getattr(self, each.name)) for each in fields(self)[1:] if each.init]
        options = [f"{name}={value!r}" for name, value in given if value != getattr(Term, name, None)]
        return f"Term({', '.join([repr(self.loss), *options])})"

    def weight_at(self, step: int) -> float:
        """Return the weight at a step."""
        if not callable(self.weight):
            return float(self.weight)
        return float(check_number("Term", f"weight({step})", self.weight(step), min=0))

    def values(
        self, name: str, student: Tensor, teacher: Tensor | None, targets: Targets, sample: Tensor | None
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


class Objective(nn.Module):
    """The weighted sum of named terms.

    `total = sum_t weight_t * sum_k mean_i w_tki * loss_t(P_tk s_i, f_ki)` over terms t, their teachers k and samples i;
    a supervised term has one loss and no w. Sample weights turn the mean over i into a weighted mean.

    Args:
        terms: name to term.
        weighting: maps `(k, b)` losses to `(k, b)` weights; `None` for equal weights. It is called for each term with
            teachers, or once for the term `weigh_by`, with detached losses in which masked samples are 0. A
            `GraphWeighting` receives the losses with their graph, and its weights are detached. The penalty of a
            `PenalizedWeighting` is added to the total at each call.
        weigh_by: a term whose losses and features decide the weights of all terms; a term with fewer teachers uses
            their rows, scaled to sum to one. `None`: each term is weighted by its own losses.

    Raises:
        TypeError, ValueError: no term, or an unknown name.

    Examples:
        >>> from kdlib.losses import HintLoss
        >>> objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out")})
        >>> out = objective({"out": torch.zeros(2, 3)}, {"big": {"out": torch.ones(2, 3)}}, {})
        >>> float(out.total), out.weights["hint"].tolist()
        (1.0, [[1.0, 1.0]])
    """

    weighting: Weighting

    def __init__(
        self, terms: Mapping[str, Term], weighting: Weighting | None = None, *, weigh_by: str | None = None
    ) -> None:
        super().__init__()
        check_term_names(terms)
        for name, term in terms.items():
            check_type("Objective", f"terms[{name!r}]", term, Term, "a Term")
        if weighting is not None:
            check_callable("Objective", "weighting", weighting)
        if weigh_by is not None:
            with_teachers = [name for name, term in terms.items() if term.teacher is not None]
            check_name("Objective", "term", weigh_by, with_teachers)
        self.terms = dict(terms)
        self.weighting = UniformWeighting() if weighting is None else weighting
        self.weigh_by = weigh_by
        self.step = 0
        self.losses = nn.ModuleDict({n: t.loss for n, t in self.terms.items() if isinstance(t.loss, nn.Module)})
        self.projections = nn.ModuleDict()

    def set_step(self, step: int) -> None:
        """Set the step at which the schedules of the weights are evaluated."""
        self.step = check_number("Objective", "step", step, min=0, integer=True)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={term.weight!r}" for name, term in self.terms.items())

    @property
    def inferred(self) -> bool:
        """Whether every projection has been created."""
        return all(term.project is None or name in self.projections for name, term in self.terms.items())

    def infer(self, student_features: Features, teacher_features: Mapping[str, Features]) -> None:
        """Create the missing projections from one batch of features."""
        for name, term in self.terms.items():
            if term.project is None or name in self.projections:
                continue
            student = _feature("student", student_features, term.student, name)
            projections: dict[str, nn.Module] = {}
            for key, teacher in self._teachers(name, teacher_features).items():
                check_key("Objective", f"the name of a teacher that term {name!r} projects to", key)
                if isinstance(term.project, nn.Module):
                    projections[key] = copy.deepcopy(term.project) if projections else term.project
                else:
                    projections[key] = infer_projection(student.detach(), teacher)
            self.projections[name] = nn.ModuleDict(projections).to(student.device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        heads = {name: f"{prefix}projections.{name}." for name in self.terms if name not in self.projections}
        late = [name for name, head in heads.items() if any(key.startswith(head) for key in state_dict)]
        if strict and late:
            lists[-1].append(late_projections(late))  # the error messages
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def forward(
        self,
        student_features: Features,
        teacher_features: Mapping[str, Features] | None = None,
        targets: Targets | None = None,
    ) -> ObjectiveOutput:
        """Compare one batch.

        Args:
            student_features: features of the student.
            teacher_features: teacher name to features.
            targets: targets of the batch.
        """
        check_targets("Objective", targets)
        if not self.inferred:
            self.infer(student_features, teacher_features or {})
        compared, penalties = self._compare(student_features, teacher_features or {}, targets or {})
        values = {name: each.value() for name, each in compared.items()}
        parts = [*(self.terms[name].weight_at(self.step) * value for name, value in values.items()), *penalties]
        total = torch.stack([part.float() if part.dtype != torch.float64 else part for part in parts]).sum()
        weights = {name: each.weights for name, each in compared.items() if each.weights is not None}
        return ObjectiveOutput(total, values, weights, torch.stack(penalties).sum() if penalties else None)

    def report(
        self,
        student_features: Features,
        teacher_features: Mapping[str, Features] | None = None,
        targets: Targets | None = None,
    ) -> InfluenceReport:
        """Measure the influence of each term and teacher on the student, on one batch: losses, gradients and cosines.

        Gradients are taken at the student's features, through projections and losses only; the weights are constant,
        and the penalty of a weighting, which does not reach the student, is left out. Buffers, `.grad` and the random
        state are unchanged afterwards. The modules keep their mode.

        Raises:
            RuntimeError: a projection is not inferred yet.
        """
        check_inferred("Objective", self.inferred, "infer or forward")
        leaves = {
            name: feature.detach().requires_grad_(feature.is_floating_point())
            for name, feature in student_features.items()
        }
        device = next(iter(leaves.values())).device
        with unchanged(self, device=device), torch.enable_grad():
            compared, _ = self._compare(leaves, teacher_features or {}, targets or {})
            weighted = {name: (term.weight_at(self.step), term.student) for name, term in self.terms.items()}
            return measure(self.step, compared, weighted)

    def _compare(
        self, student_features: Features, teacher_features: Mapping[str, Features], targets: Targets
    ) -> tuple[dict[str, Comparison], list[Tensor]]:
        """Compare every term on one batch, in the order of the terms; also return the penalties of the weighting."""
        compared: dict[str, Comparison] = {}
        penalties: list[Tensor] = []
        lead: Comparison | None = None
        for name in sorted(self.terms, key=lambda name: name != self.weigh_by):
            term = self.terms[name]
            student = _feature("student", student_features, term.student, name)
            sample = term.sample_weights(name, student, targets)
            if term.teacher is None:
                compared[name] = Comparison(student, term.values(name, student, None, targets, sample), sample=sample)
                continue
            teachers = self._teachers(name, teacher_features)
            projected = {key: self._project(name, key, student) for key in teachers}
            losses = torch.stack([term.values(name, projected[k], x, targets, sample) for k, x in teachers.items()])
            if lead is None:
                per_sample = losses if losses.dim() == 2 else losses[:, None].expand(-1, student.shape[0])
                weights = self._weights(per_sample, student, [*teachers.values()], targets)
                if isinstance(self.weighting, PenalizedWeighting):
                    penalties.append(self.weighting.penalty(per_sample.detach()))
            else:
                weights = _rows(lead, [*teachers], name)
            compared[name] = Comparison(student, losses, tuple(teachers), weights, sample)
            if name == self.weigh_by:
                lead = compared[name]
        return {name: compared[name] for name in self.terms}, penalties

    def _weights(self, losses: Tensor, student: Tensor, teachers: list[Tensor], targets: Targets) -> Tensor:
        with_graph = isinstance(self.weighting, GraphWeighting) and self.weighting.needs_graph
        given = losses if with_graph else losses.detach()
        weights = self.weighting(given, student=student, teachers=teachers, targets=targets)
        check_weights_of(losses, weights)
        return weights.detach() if with_graph else weights

    def _project(self, name: str, teacher: str, student: Tensor) -> Tensor:
        if self.terms[name].project is None:
            return student
        projections = cast(nn.ModuleDict, self.projections[name])
        check_name(f"Objective: term {name!r}", "projection for teacher", teacher, projections.keys())
        return cast(Tensor, projections[teacher](student))

    def _teachers(self, name: str, teacher_features: Mapping[str, Features]) -> dict[str, Tensor]:
        """Return the detached feature of each teacher of a term."""
        term = self.terms[name]
        check_term_teachers("Objective", name, term.teachers or (), teacher_features)
        return {
            key: _feature(f"teacher {key!r}", teacher_features[key], str(term.teacher), name).detach()
            for key in term.teachers or teacher_features
        }


def _feature(owner: str, features: Features, tap: str, term: str) -> Tensor:
    check_name(f"Objective: term {term!r}", f"feature of the {owner}", tap, features)
    return features[tap]


def _rows(lead: Comparison, teachers: list[str], term: str) -> Tensor:
    """Return the weights of some teachers in the term `weigh_by`, scaled so that each column sums to one."""
    for name in teachers:
        check_name(f"Objective: term {term!r}", "teacher in the term that decides the weights", name, lead.teachers)
    rows = cast(Tensor, lead.weights)[[lead.teachers.index(name) for name in teachers]]
    total = rows.sum(0, keepdim=True)
    return torch.where(total > 0, rows / total.clamp(min=1e-12), torch.full_like(rows, 1.0 / len(teachers)))
