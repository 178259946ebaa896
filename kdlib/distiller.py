"""Stage 5, put together: student, teachers and objective as one Module. Runs models; touches no file and no optimizer."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import nn

from kdlib._checks import (
    check_features,
    check_inferred,
    check_key,
    check_name,
    check_reads,
    check_targets,
    check_term_teachers,
    check_type,
)
from kdlib.influence import InfluenceReport, unchanged
from kdlib.objective import Objective, ObjectiveOutput
from kdlib.types import Features, Targets

__all__ = ["Distiller"]


class Distiller(nn.Module):
    """Runs the student and its teachers on a batch and compares them.

    Works without teachers too: then the same training loop trains a network on supervised terms alone.

    Args:
        student: inputs to named features; a `StudentAdapter`.
        teachers: name to teacher: a `TeacherAdapter`, or anything that maps inputs to named features and is frozen. A
            teacher with an attribute `reads`, a tuple of target names, is called with those targets in place of inputs.
        objective: what is compared.

    Raises:
        TypeError, ValueError: something that is no Module, or a term that reads a teacher that is not there.

    Examples:
        >>> from kdlib import OUTPUT, HintLoss, StudentAdapter, TeacherAdapter
        >>> from kdlib.objective import Term
        >>> student = StudentAdapter(nn.Linear(4, 2), {"out": OUTPUT})
        >>> teacher = TeacherAdapter(nn.Linear(4, 2), {"out": OUTPUT})
        >>> terms = {"hint": Term(HintLoss(), student="out", teacher="out")}
        >>> distiller = Distiller(student, {"big": teacher}, Objective(terms))
        >>> bool(distiller(torch.randn(3, 4)).total.requires_grad)
        True
        >>> sorted(distiller.state_dict())
        ['student.model.bias', 'student.model.weight']
    """

    def __init__(self, student: nn.Module, teachers: Mapping[str, nn.Module], objective: Objective) -> None:
        super().__init__()
        check_type("Distiller", "student", student, nn.Module, "a Module")
        check_type("Distiller", "teachers", teachers, Mapping, "a mapping of names to Modules")
        check_type("Distiller", "objective", objective, Objective, "an Objective")
        for name, teacher in teachers.items():
            check_type("Distiller", f"teachers[{name!r}]", teacher, nn.Module, "a Module")
        for name, term in objective.terms.items():
            if term.teacher is not None:
                check_term_teachers("Distiller", name, term.teachers or (), teachers)
        for name, term in objective.terms.items():
            _check_tap(name, "student", student, term.student)
            if term.teacher is not None:
                for who in teachers if term.teachers is None else term.teachers:
                    _check_tap(name, f"teacher {who!r}", teachers[who], term.teacher)
                    if term.project is not None:
                        check_key("Distiller", f"the name of a teacher that term {name!r} projects to", who)
        self.student = student
        self.objective = objective
        # Outside the module tree: a teacher is no part of what is trained, saved or switched to train mode.
        object.__setattr__(self, "teachers", dict(teachers))
        for teacher in teachers.values():
            teacher.eval()

    teachers: dict[str, nn.Module]

    def features(self, inputs: Any, targets: Targets | None = None) -> tuple[Features, dict[str, Features]]:
        """Run the student and every teacher."""
        check_targets("Distiller", targets)
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        student = self.student(*given)
        check_features("student", student)
        return student, {
            name: self._ask(name, teacher, given, targets or {}) for name, teacher in self.teachers.items()
        }

    def _ask(self, name: str, teacher: nn.Module, inputs: tuple[Any, ...], targets: Targets) -> Features:
        reads = getattr(teacher, "reads", None)
        if reads:
            check_reads(name, reads, targets)
            inputs = tuple(targets[key] for key in reads)
        if teacher.training:  # somebody has called train() on the teacher itself
            teacher.eval()
        with torch.no_grad():
            features: Features = teacher(*inputs)
        check_features(f"teacher {name!r}", features)
        return features

    def forward(self, inputs: Any, targets: Targets | None = None) -> ObjectiveOutput:
        """Compare one batch; `inputs` is a tensor or a tuple of the models' arguments."""
        student, teachers = self.features(inputs, targets)
        output: ObjectiveOutput = self.objective(student, teachers, targets or {})
        return output

    @torch.no_grad()
    def infer(self, inputs: Any, targets: Targets | None = None) -> Self:
        """Make the projections that are inferred, from one batch; changes no weight and no statistic."""
        if not self.objective.inferred:
            modes = {module: module.training for module in self.student.modules()}
            self.student.eval()
            try:
                self.objective.infer(*self.features(inputs, targets))
            finally:
                for module, mode in modes.items():
                    module.training = mode
        return self

    @torch.no_grad()
    def report(self, inputs: Any, targets: Targets | None = None) -> InfluenceReport:
        """What each term and teacher does to the student on one batch; see `Objective.report`.

        Runs in the mode that the distiller is in, and changes nothing: no weight, statistic, `.grad` or random state.
        Under several processes every one must call it where losses or norms talk to each other.

        Raises:
            RuntimeError: projections are still to be inferred.
        """
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        with unchanged(self.student, *self.teachers.values(), device=device):
            student, teachers = self.features(inputs, targets)
            return self.objective.report(student, teachers, targets)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the student, the projections, the heads and the learned weightings; none of a teacher.

        Raises:
            RuntimeError: projections are still to be inferred.
        """
        check_inferred("Distiller", self.objective.inferred, "distiller.infer(inputs, targets)")
        yield from self.parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # likewise
        if recurse:
            for teacher in self.teachers.values():
                teacher._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped
        return self


def _check_tap(term: str, owner: str, model: nn.Module, tap: str) -> None:
    """An adapter and a cache know their names; another module tells with its first features."""
    known = getattr(model, "taps", None)
    if isinstance(known, Mapping):
        check_name(f"Distiller: term {term!r}", f"feature of the {owner}", tap, known)
