"""Stage 5: terms and their weighted sum. Knows tap names, losses, projections and weightings; no model and no file.

A `Term` names what it reads and how it is compared; losses themselves see tensors alone. An `Objective` adds the terms up,
and where a term has several teachers asks the weighting how far each is to be followed, sample by sample.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_callable,
    check_choice,
    check_inferred,
    check_key,
    check_name,
    check_number,
    check_schedule,
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
from kdlib.influence import Comparison, InfluenceReport, measure, unchanged
from kdlib.projections import infer_projection
from kdlib.types import Features, Targets
from kdlib.weighting import UniformWeighting

__all__ = ["Objective", "ObjectiveOutput", "Term"]


@dataclass(frozen=True)
class ObjectiveOutput:
    """What an objective returns.

    Args:
        total: scalar, the weighted sum of the terms, plus the penalty.
        terms: name to scalar, each before its weight.
        weights: name of each term with teachers to the `(k, b)` weights of its k teachers.
        penalty: scalar, what a learned weighting adds to the total; `None` for other weightings.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, Tensor]
    penalty: Tensor | None = None


class Term:
    """One part of the objective.

    `Term(loss, student=tap, teacher=tap)` compares a student feature with the same-named feature of each teacher;
    `Term(loss, student=tap, target=name)` compares it with a target of the batch (a supervised term). With both, the
    loss is called as `loss(student, teacher, target=targets[name])`.

    Args:
        loss: called as `loss(student, teacher)`; a Module of `kdlib.losses`, a head, or any callable that returns a
            scalar or `(b,)` values.
        student: feature of the student.
        teacher: feature of the teachers.
        teachers: names of the teachers that take part; `None` for all.
        target: name of the target, in place of `teacher` or beside it.
        project: `None`; `"auto"`, one inferred projection for each teacher; or a Module, copied for each further teacher.
        weight: a number, or a schedule `step -> number`.
        sample_weight: name of a target `(b,)`, at least 0, that weighs the samples within this term; 0 masks one. It
            needs a loss of `(b,)` values, or one that takes `weight=`, as the losses of `kdlib` do.

    Raises:
        TypeError, ValueError: arguments that do not go together.

    Examples:
        >>> from kdlib.losses import HintLoss
        >>> Term(HintLoss(), student="map", teacher="map", project="auto", weight=0.5)
        Term(HintLoss(reduction='mean'), student='map', teacher='map', project='auto', weight=0.5)
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        *,
        student: str,
        teacher: str | None = None,
        teachers: Sequence[str] | None = None,
        target: str | None = None,
        project: str | nn.Module | None = None,
        weight: float | Callable[[int], float] = 1.0,
        sample_weight: str | None = None,
    ) -> None:
        check_callable("Term", "loss", loss)
        check_type("Term", "student", student, str, "a str")
        for name, value in (("teacher", teacher), ("target", target), ("sample_weight", sample_weight)):
            check_type("Term", name, value, (str, NoneType), "a str or None")
        check_term(teacher, target, teachers, project)
        if isinstance(project, str):
            check_choice("Term", "project", project, ("auto",))
        check_type("Term", "project", project, (str, nn.Module, NoneType), "None, 'auto' or a Module")
        if not callable(weight):
            check_number("Term", "weight", weight, min=0)
        self.loss, self.student, self.teacher, self.target = loss, student, teacher, target
        self.teachers = None if teachers is None else tuple(teachers)
        self.project, self.weight, self.sample_weight = project, weight, sample_weight

    def __repr__(self) -> str:
        defaults = {
            "teacher": None, "teachers": None, "target": None, "project": None, "weight": 1.0, "sample_weight": None,
        }  # fmt: skip
        given = [f"{name}={getattr(self, name)!r}" for name in defaults if getattr(self, name) != defaults[name]]
        return f"Term({', '.join([repr(self.loss), f'student={self.student!r}', *given])})"

    def weight_at(self, step: int) -> float:
        """The weight at a step."""
        if not callable(self.weight):
            return float(self.weight)
        value = self.weight(step)
        value = float(value) if hasattr(value, "__float__") else value  # of NumPy, or a tensor
        check_schedule(step, value)
        return value


class Objective(nn.Module):
    """The weighted sum of named terms.

    `total = sum_t weight_t * sum_k mean_i w_tki * loss_t(P_tk s_i, f_ki)` over terms t, their teachers k and samples i;
    a supervised term has one loss and no w. Sample weights turn the mean over i into a weighted mean.

    Args:
        terms: name to term.
        weighting: `(k, b)` losses to `(k, b)` weights; `None` for equal weights. It is called for each term with
            teachers, or once for the term of `weigh_by`, with losses cut from the graph, masked samples at 0. Losses
            with their graph come to a weighting whose class says `needs_graph = True`; its weights are then detached.
            Others may learn: a graph in their weights is kept, and where they have a method `penalty(losses)`, what it
            returns is added to the total for each call.
        weigh_by: a term whose losses and features decide the weights of all terms; a term with fewer teachers takes
            their rows, scaled to sum to one. `None`: each term is weighed by its own.

    Raises:
        TypeError, ValueError: no term, or a name that is not there.

    Examples:
        >>> from kdlib.losses import HintLoss
        >>> objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out")})
        >>> out = objective({"out": torch.zeros(2, 3)}, {"big": {"out": torch.ones(2, 3)}}, {})
        >>> float(out.total), out.weights["hint"].tolist()
        (1.0, [[1.0, 1.0]])
    """

    def __init__(
        self, terms: Mapping[str, Term], weighting: nn.Module | None = None, *, weigh_by: str | None = None
    ) -> None:
        super().__init__()
        check_term_names(terms)
        if weighting is not None:
            check_callable("Objective", "weighting", weighting)
        for name, term in terms.items():
            check_type("Objective", f"terms[{name!r}]", term, Term, "a Term")
        if weigh_by is not None:
            check_name(
                "Objective", "term", weigh_by, [name for name, term in terms.items() if term.teacher is not None]
            )
        self.terms = dict(terms)
        self.weighting = UniformWeighting() if weighting is None else weighting
        self.weigh_by = weigh_by
        self.step = 0
        self.losses = nn.ModuleDict({n: t.loss for n, t in self.terms.items() if isinstance(t.loss, nn.Module)})
        self.projections = nn.ModuleDict()

    def set_step(self, step: int) -> None:
        """Where the schedules of the weights stand."""
        self.step = step

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={term.weight!r}" for name, term in self.terms.items())

    @property
    def inferred(self) -> bool:
        """Whether every projection is there."""
        return all(term.project is None or name in self.projections for name, term in self.terms.items())

    def infer(self, student_features: Features, teacher_features: Mapping[str, Features]) -> None:
        """Make the projections that are not there yet, from one batch of features."""
        for name, term in self.terms.items():
            if term.project is None or name in self.projections:
                continue
            student = _feature("student", student_features, term.student, name)
            made: dict[str, nn.Module] = {}
            for who in self._teachers_of(name, teacher_features):
                check_key("Objective", f"the name of a teacher that term {name!r} projects to", who)
                teacher = _feature(f"teacher {who!r}", teacher_features[who], str(term.teacher), name)
                if isinstance(term.project, nn.Module):
                    made[who] = (copy.deepcopy(term.project) if made else term.project).to(student.device)
                else:
                    made[who] = infer_projection(student.detach(), teacher).to(student.device)
            self.projections[name] = nn.ModuleDict(made)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        heads = {name: f"{prefix}projections.{name}." for name in self.terms if name not in self.projections}
        late = [name for name, head in heads.items() if any(key.startswith(head) for key in state_dict)]
        if strict and late:
            error_msgs.append(late_projections(late))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(
        self,
        student_features: Features,
        teacher_features: Mapping[str, Features] | None = None,
        targets: Targets | None = None,
    ) -> ObjectiveOutput:
        """Compare one batch."""
        check_targets("Objective", targets)
        teacher_features = {} if teacher_features is None else teacher_features
        if not self.inferred:
            self.infer(student_features, teacher_features)
        compared, penalties = self._compare(student_features, teacher_features, {} if targets is None else targets)
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
        """What each term and teacher does to the student on one batch: losses, gradients, and how these agree.

        Gradients are taken at the student's features, through projections and losses alone; the weights count as given,
        and a weighting's penalty, which does not reach the student, is left out. Nothing is changed: no buffer, no
        `.grad`, no random state. The modules stay in their mode.

        Raises:
            RuntimeError: projections are still to be inferred.
        """
        check_inferred("Objective", self.inferred, "infer or forward")
        leaves = {
            name: feature.detach().requires_grad_(feature.is_floating_point())
            for name, feature in student_features.items()
        }
        device = next(iter(leaves.values())).device
        with unchanged(self, device=device), torch.enable_grad():
            compared, _ = self._compare(leaves, teacher_features or {}, targets or {})
            weighed = {name: (term.weight_at(self.step), term.student) for name, term in self.terms.items()}
            return measure(self.step, compared, weighed)

    def _compare(
        self, student_features: Features, teacher_features: Mapping[str, Features], targets: Targets
    ) -> tuple[dict[str, Comparison], list[Tensor]]:
        """Every term on one batch, in the order of the terms, and the penalties of the weighting."""
        found: dict[str, Comparison] = {}
        penalties: list[Tensor] = []
        lead: tuple[list[str], Tensor] | None = None
        for name in sorted(self.terms, key=lambda name: name != self.weigh_by):
            term = self.terms[name]
            student = _feature("student", student_features, term.student, name)
            sample = self._sample_weight(name, student, targets)
            if term.teacher is None:
                found[name] = Comparison(student, self._loss(name, student, None, targets, sample), sample=sample)
                continue
            who = self._teachers_of(name, teacher_features)
            facing = [
                _feature(f"teacher {each!r}", teacher_features[each], term.teacher, name).detach() for each in who
            ]
            pairs = [(self._projected(name, each, student), face) for each, face in zip(who, facing, strict=True)]
            losses = torch.stack([self._loss(name, mine, face, targets, sample) for mine, face in pairs])
            if lead is None:
                each_sample = losses if losses.dim() == 2 else losses[:, None].expand(-1, student.shape[0])
                weights = self._weigh(each_sample, student, facing, targets)
                if callable(penalty := getattr(self.weighting, "penalty", None)):
                    penalties.append(penalty(each_sample.detach()))
                lead = (who, weights) if name == self.weigh_by else None
            else:
                weights = _rows(lead, who, name)
            found[name] = Comparison(student, losses, tuple(who), weights, sample)
        return {name: found[name] for name in self.terms}, penalties

    def _weigh(self, losses: Tensor, student: Tensor, teachers: list[Tensor], targets: Targets) -> Tensor:
        """What the weighting says of losses `(k, b)`."""
        live = bool(getattr(self.weighting, "needs_graph", False))
        weights: Tensor = self.weighting(
            losses if live else losses.detach(), student=student, teachers=teachers, targets=targets
        )
        check_weights_of(losses, weights)
        return weights.detach() if live else weights

    def _projected(self, name: str, who: str, student: Tensor) -> Tensor:
        if self.terms[name].project is None:
            return student
        bank: Any = self.projections[name]
        check_name(f"Objective: term {name!r}", "projection for teacher", who, bank.keys())
        projected: Tensor = bank[who](student)
        return projected

    def _loss(
        self, name: str, student: Tensor, teacher: Tensor | None, targets: Targets, sample: Tensor | None
    ) -> Tensor:
        """`(b,)` losses, times the sample weights, where the loss has a per-sample form; else a scalar."""
        term = self.terms[name]
        per_sample = getattr(term.loss, "per_sample", None)
        options: dict[str, Any] = {}
        if term.target is not None:
            check_name(f"Objective: term {name!r}", "target", term.target, targets)
            if teacher is None:
                teacher = targets[term.target]
            else:
                options["target"] = targets[term.target]
        if per_sample and (term.teacher is not None or sample is not None):
            options["reduction"] = "none"
        if per_sample is not None and sample is not None:
            options["weight"] = sample
        loss = term.loss(student, teacher, **options)
        each = sample is not None and "weight" not in options
        check_term_loss(name, loss, student.shape[0], each=each, teacher=term.teacher is not None)
        if each and sample is not None:
            loss = loss * sample
        return loss

    def _sample_weight(self, name: str, student: Tensor, targets: Targets) -> Tensor | None:
        """`(b,)` weights in float32 on the student's device."""
        wanted = self.terms[name].sample_weight
        if wanted is None:
            return None
        check_name(f"Objective: term {name!r}", "target", wanted, targets)
        check_shape(f"Objective: term {name!r}", f"targets[{wanted!r}]", targets[wanted], "b", b=student.shape[0])
        return targets[wanted].to(device=student.device, dtype=torch.float32)

    def _teachers_of(self, name: str, teacher_features: Mapping[str, Features]) -> list[str]:
        term = self.terms[name]
        who = list(teacher_features) if term.teachers is None else list(term.teachers)
        for each in who:
            check_name(f"Objective: term {name!r}", "teacher", each, teacher_features)
        check_term_teachers("Objective", name, (), who)
        return who


def _feature(owner: str, features: Features, tap: str, term: str) -> Tensor:
    check_name(f"Objective: term {term!r}", f"feature of the {owner}", tap, features)
    return features[tap]


def _rows(lead: tuple[list[str], Tensor], who: list[str], term: str) -> Tensor:
    names, share = lead
    for each in who:
        check_name(f"Objective: term {term!r}", "teacher in the term that decides the weights", each, names)
    rows = share[[names.index(each) for each in who]]
    total = rows.sum(0, keepdim=True)
    return torch.where(total > 0, rows / total.clamp(min=1e-12), torch.full_like(rows, 1.0 / len(who)))
