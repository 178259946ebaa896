"""The weighted sum of terms."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_callable,
    check_inferred,
    check_key,
    check_name,
    check_step,
    check_targets,
    check_term_teachers,
    check_type,
)
from kdlib._held import unchanged
from kdlib.influence import Comparison, InfluenceReport, measure
from kdlib.objective._checks import (
    check_cross_layer,
    check_step_given,
    check_term_names,
    check_weights_of,
    late_projections,
)
from kdlib.objective.term import Term, first
from kdlib.projections import infer_projection
from kdlib.types import CrossLayerWeighting, Features, GraphWeighting, PenalizedWeighting, Side, Targets, Weighting
from kdlib.weighting import UniformWeighting

__all__ = ["Objective", "ObjectiveOutput"]

UNKNOWN = -1
"""Stands in a state dict for a step that was never given."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """Result of an objective on one batch.

    Args:
        total: scalar, the weighted sum of the terms, plus the penalty.
        terms: term name to scalar, before its weight.
        weights: name of each term with teachers to the `(k, b)` weights of its k teachers.
        penalty: scalar that a learned weighting adds to the total; `None` for other weightings.

    Examples:
        >>> output = ObjectiveOutput(torch.tensor(1.5), {"hint": torch.tensor(3.0)}, {})
        >>> float(output.total), float(output.terms["hint"]), output.penalty
        (1.5, 3.0, None)
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, Tensor]
    penalty: Tensor | None = None


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
        for name, term in terms.items():
            if term.cross_layer and term.teacher is not None and weigh_by in (None, name):
                check_cross_layer(name, self.weighting)
        self._step: int | None = None
        self._given = False
        self._kind = _WeightingKind(self.weighting)
        self.losses = nn.ModuleDict({n: t.loss for n, t in self.terms.items() if isinstance(t.loss, nn.Module)})
        self.projections = nn.ModuleDict()

    @property
    def step(self) -> int | None:
        """The step of the last call or of the loaded state dict; `None` before the first."""
        return self._step

    @property
    def scheduled(self) -> tuple[str, ...]:
        """What depends on the step, such as `"weight of term 'kd'"`."""
        return tuple(f"{each} of term {name!r}" for name, term in self.terms.items() for each in term.schedules)

    def get_extra_state(self) -> Tensor:
        """Return the step as the tensor that a state dict holds."""
        # On the CPU whatever the default device: the step is a Python number, and loading it waits for no accelerator.
        return torch.tensor(UNKNOWN if self._step is None else self._step, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Read the step from a state dict."""
        step = UNKNOWN if state.is_meta else int(state)
        self._step, self._given = None if step == UNKNOWN else step, False

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
            student = _side("student", student_features, term.student, name)
            projections: dict[str, nn.Module] = {}
            for key, teacher in self._teachers(name, teacher_features).items():
                check_key("Objective", f"the name of a teacher that term {name!r} projects to", key)
                if isinstance(term.project, nn.Module):
                    projections[key] = copy.deepcopy(term.project) if projections else term.project
                elif isinstance(student, Tensor):
                    projections[key] = infer_projection(student.detach(), first(teacher))
                else:
                    pairs = zip(student, teacher, strict=True)
                    projections[key] = nn.ModuleList(infer_projection(s.detach(), t) for s, t in pairs)
            self.projections[name] = nn.ModuleDict(projections).to(first(student).device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        heads = {name: f"{prefix}projections.{name}." for name in self.terms if name not in self.projections}
        late = [name for name, head in heads.items() if any(key.startswith(head) for key in state_dict)]
        if strict and late:
            lists[-1].append(late_projections(late))  # the error messages
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        lists[0][:] = [key for key in lists[0] if key != f"{prefix}_extra_state"]  # a file without a step is complete

    def forward(
        self,
        student_features: Features,
        teacher_features: Mapping[str, Features] | None = None,
        targets: Targets | None = None,
        *,
        step: int | None = None,
    ) -> ObjectiveOutput:
        """Compare one batch.

        Args:
            student_features: features of the student.
            teacher_features: teacher name to features.
            targets: targets of the batch.
            step: number of training steps done so far, for the schedules; it becomes `step` and part of the state dict.
                `None` uses the last step, in eval mode or of a loaded state dict. In training mode, once a call has
                given its step, all must.

        Raises:
            ValueError: a weight or a hyper-parameter is a schedule, and the step is unknown or that of an earlier call.
        """
        if step is not None:
            self._step, self._given = check_step("Objective", step), True
        elif self.scheduled:
            step = self._last_step(stale=self._given and self.training)
        check_targets("Objective", targets)
        if not self.inferred:
            self.infer(student_features, teacher_features or {})
        compared, penalties = self._compare(student_features, teacher_features or {}, targets or {}, step)
        values = {name: each.value() for name, each in compared.items()}
        parts = [*(self.terms[name].weight_at(step) * value for name, value in values.items()), *penalties]
        total = torch.stack([part.float() if part.dtype != torch.float64 else part for part in parts]).sum()
        weights = {name: each.weights for name, each in compared.items() if each.weights is not None}
        return ObjectiveOutput(total, values, weights, torch.stack(penalties).sum() if penalties else None)

    def report(
        self,
        student_features: Features,
        teacher_features: Mapping[str, Features] | None = None,
        targets: Targets | None = None,
        *,
        step: int | None = None,
    ) -> InfluenceReport:
        """Measure the influence of each term and teacher on the student, on one batch: losses, gradients and cosines.

        Gradients are taken at the student's features, through projections and losses only; the weights are constant,
        and the penalty of a weighting, which does not reach the student, is left out. Buffers, `.grad`, the step and the
        random state are unchanged afterwards. The modules keep their mode. `step=None` uses the last step.

        Raises:
            RuntimeError: a projection is not inferred yet.
            ValueError: a weight or a hyper-parameter is a schedule, and the step is unknown.
        """
        step = check_step("Objective", step) if step is not None else self._last_step()
        check_inferred("Objective", self.inferred, "infer or forward")
        leaves = {
            name: feature.detach().requires_grad_(feature.is_floating_point())
            for name, feature in student_features.items()
        }
        device = next(iter(leaves.values())).device
        with unchanged(self, device=device), torch.enable_grad():
            compared, _ = self._compare(leaves, teacher_features or {}, targets or {}, step)
            weighted = {name: (term.weight_at(step), _label(term.student)) for name, term in self.terms.items()}
            return measure(step, compared, weighted)

    def _last_step(self, *, stale: bool = False) -> int | None:
        """Return the last step, which schedules need."""
        scheduled = self.scheduled
        if scheduled:
            check_step_given(scheduled, self._step, stale=stale)
        return self._step

    def _compare(
        self, student_features: Features, teacher_features: Mapping[str, Features], targets: Targets, step: int | None
    ) -> tuple[dict[str, Comparison], list[Tensor]]:
        """Compare every term on one batch, in the order of the terms; also return the penalties of the weighting."""
        compared: dict[str, Comparison] = {}
        penalties: list[Tensor] = []
        lead: Comparison | None = None
        for name in sorted(self.terms, key=lambda name: name != self.weigh_by):
            term = self.terms[name]
            student = _side("student", student_features, term.student, name)
            sample = term.sample_weights(name, student, targets)
            if term.teacher is None:
                values = term.values(name, student, None, targets, sample, step)
                compared[name] = Comparison(student, values, sample=sample)
                continue
            teachers = self._teachers(name, teacher_features)
            projected = {key: self._project(name, key, student) for key in teachers}
            losses = torch.stack(
                [term.values(name, projected[key], x, targets, sample, step) for key, x in teachers.items()]
            )
            if lead is None:
                per_sample = losses if losses.dim() == 2 else losses[:, None].expand(-1, first(student).shape[0])
                weights = self._weights(per_sample, student, [*teachers.values()], targets)
                penalized = self._weighting_kind().penalized
                if penalized is not None:
                    penalties.append(penalized.penalty(per_sample.detach()))
            else:
                weights = _rows(lead, [*teachers], name)
            compared[name] = Comparison(student, losses, tuple(teachers), weights, sample)
            if name == self.weigh_by:
                lead = compared[name]
        return {name: compared[name] for name in self.terms}, penalties

    def _weights(self, losses: Tensor, student: Side, teachers: list[Side], targets: Targets) -> Tensor:
        graph = self._weighting_kind().graph
        with_graph = graph is not None and graph.needs_graph
        given = losses if with_graph else losses.detach()
        weighting = cast(CrossLayerWeighting, self.weighting)  # called with lists only where it accepts them
        weights = weighting(given, student=student, teachers=teachers, targets=targets)
        check_weights_of(losses, weights)
        return weights.detach() if with_graph else weights

    def _weighting_kind(self) -> "_WeightingKind":
        if self._kind.weighting is not self.weighting:  # assigned since
            self._kind = _WeightingKind(self.weighting)
        return self._kind

    def _project(self, name: str, teacher: str, student: Side) -> Side:
        if self.terms[name].project is None:
            return student
        projections = cast(nn.ModuleDict, self.projections[name])
        check_name(f"Objective: term {name!r}", "projection for teacher", teacher, projections.keys())
        own = projections[teacher]
        if isinstance(student, Tensor):
            return cast(Tensor, own(student))
        return [each(x) for each, x in zip(cast(nn.ModuleList, own), student, strict=True)]

    def _teachers(self, name: str, teacher_features: Mapping[str, Features]) -> dict[str, Side]:
        """Return the detached feature, or features, of each teacher of a term."""
        term = self.terms[name]
        check_term_teachers("Objective", name, term.teachers or (), teacher_features)
        sides: dict[str, Side] = {}
        for key in term.teachers or teacher_features:
            side = _side(f"teacher {key!r}", teacher_features[key], term.teacher or (), name)
            sides[key] = side.detach() if isinstance(side, Tensor) else [each.detach() for each in side]
        return sides


class _WeightingKind:
    """What a weighting is beyond a `Weighting`, found once: checks of Protocols take as long as a small layer."""

    def __init__(self, weighting: Weighting) -> None:
        self.weighting = weighting
        self.penalized = weighting if isinstance(weighting, PenalizedWeighting) else None
        self.graph = weighting if isinstance(weighting, GraphWeighting) else None


def _side(owner: str, features: Features, taps: str | Sequence[str], term: str) -> Side:
    """Return the feature of a tap, or a list of the features of several taps."""
    for tap in (taps,) if isinstance(taps, str) else taps:
        check_name(f"Objective: term {term!r}", f"feature of the {owner}", tap, features)
    return features[taps] if isinstance(taps, str) else [features[tap] for tap in taps]


def _label(taps: str | Sequence[str]) -> str:
    return taps if isinstance(taps, str) else ", ".join(taps)


def _rows(lead: Comparison, teachers: list[str], term: str) -> Tensor:
    """Return the weights of some teachers in the term `weigh_by`, scaled so that each column sums to one."""
    for name in teachers:
        check_name(f"Objective: term {term!r}", "teacher in the term that decides the weights", name, lead.teachers)
    rows = cast(Tensor, lead.weights)[[lead.teachers.index(name) for name in teachers]]
    total = rows.sum(0, keepdim=True)
    return torch.where(total > 0, rows / total.clamp(min=1e-12), torch.full_like(rows, 1.0 / len(teachers)))
