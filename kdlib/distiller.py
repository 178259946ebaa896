"""The Module that runs a student, its teachers and an objective on a batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from kdlib._checks import (
    check_features,
    check_inferred,
    check_inputs,
    check_key,
    check_name,
    check_targets,
    check_teacher_inputs,
    check_term_teachers,
    check_type,
)
from kdlib._held import (
    fork_random_state,
    hold,
    input_names,
    is_unchanged,
    move,
    move_tensors,
    read_inputs,
    split_inputs,
    unchanged,
)
from kdlib.influence import InfluenceReport
from kdlib.objective import Objective, ObjectiveOutput
from kdlib.types import Features, HasTaps, StudentReader, Targets, Teacher, UpdatedTeacher

__all__ = ["Distiller"]


class Distiller(nn.Module):
    """Runs the student and its teachers on a batch and compares their features.

    Without teachers it trains a network on supervised terms alone. If a weight or a hyper-parameter is a schedule, each call
    in training mode needs `step=`. The state dict holds the last step besides the weights.

    Args:
        student: maps inputs to named features; usually a `StudentAdapter`.
        teachers: name to teacher: a `TeacherAdapter`, a `CachedTeacher` or any other `Teacher`. If its `inputs` names
            targets, a teacher is called with those targets in place of the inputs. Its features are brought to the
            device of the student's features. Teachers that change during training are
            an `EMATeacher` and a `SelfTeacher`.
        objective: the terms that are compared.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a term that names an unknown teacher or feature.

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
        ['objective._extra_state', 'student.model.bias', 'student.model.weight']
    """

    teachers: dict[str, Teacher]

    def __init__(self, student: nn.Module, teachers: Mapping[str, Teacher], objective: Objective) -> None:
        super().__init__()
        check_type("Distiller", "student", student, nn.Module, "a Module")
        check_type("Distiller", "teachers", teachers, Mapping, "a mapping of names to teachers")
        check_type("Distiller", "objective", objective, Objective, "an Objective")
        for name, teacher in teachers.items():
            wanted = "a Teacher, such as a TeacherAdapter around a model"
            check_type("Distiller", f"teachers[{name!r}]", teacher, Teacher, wanted)
        for name, term in objective.terms.items():
            _check_taps(name, "student", student, term.student)
            if term.teacher is None:
                continue
            check_term_teachers("Distiller", name, term.teachers or (), teachers)
            for key in term.teachers or teachers:
                _check_taps(name, f"teacher {key!r}", teachers[key], term.teacher)
                if term.project is not None:
                    check_key("Distiller", f"the name of a teacher that term {name!r} projects to", key)
        self.student = student
        self.objective = objective
        # Not registered as submodules: teachers are neither trained, saved nor switched to training mode.
        object.__setattr__(self, "teachers", dict(teachers))
        # Found once, because checks of Protocols take as long as a small layer.
        updated = {name: each for name, each in teachers.items() if isinstance(each, UpdatedTeacher)}
        self._updated, self._frozen = tuple(updated), tuple(name for name in teachers if name not in updated)
        self._readers = frozenset(name for name, teacher in teachers.items() if isinstance(teacher, StudentReader))
        self.updated_teachers = nn.ModuleDict()
        for name, teacher in updated.items():
            if isinstance(teacher, nn.Module):
                check_key("Distiller", "the name of a teacher that is saved", name)
                self.updated_teachers[name] = teacher
        for module in self._frozen_modules():
            module.eval()

    def extra_repr(self) -> str:
        """Return the names of the teachers, which are no submodules."""
        return f"teachers={list(self.teachers)}"

    def _teacher_modules(self) -> list[nn.Module]:
        return [teacher for teacher in self.teachers.values() if isinstance(teacher, nn.Module)]

    def _frozen_modules(self) -> list[nn.Module]:
        return [each for each in map(self.teachers.__getitem__, self._frozen) if isinstance(each, nn.Module)]

    def features(self, inputs: Any, targets: Targets | None = None) -> tuple[Features, dict[str, Features]]:
        """Run the student and every teacher; return the student's features and those of each teacher."""
        check_targets("Distiller", targets)
        student = self._call("student", self.student, inputs)
        for module in self._frozen_modules():
            if module.training:  # train() was called on the teacher itself
                module.eval()
        teachers: dict[str, Features] = {}
        devices = [x.device for x in student.values() if isinstance(x, Tensor)]
        device = devices[0] if devices else torch.device("cpu")
        for name, teacher in self.teachers.items():
            if name in self._readers and cast(StudentReader, teacher).reads_student:
                teachers[name] = teacher(student)
                continue
            check_teacher_inputs(name, input_names(teacher.inputs), targets or {})
            given = read_inputs(teacher.inputs, targets or {}, inputs)
            with torch.no_grad():
                features = self._call(f"teacher {name!r}", teacher, given)
                away = any(isinstance(x, Tensor) and x.device != device for x in features.values())
                teachers[name] = {key: move_tensors(x, device) for key, x in features.items()} if away else features
        return student, teachers

    def _call(self, owner: str, model: Callable[..., Features], inputs: Any) -> Features:
        """Call one of the models that share the inputs: none of them may change the inputs in place."""
        positional, named = split_inputs(inputs)
        held = [hold(x) if isinstance(x, Tensor) else (x, None) for x in (*positional, *named.values())]
        given, count = [x for x, _ in held], len(positional)
        features = model(*given[:count], **dict(zip(named, given[count:], strict=True)))
        check_features(owner, features)
        check_inputs(owner, not self.teachers or all(is_unchanged(x, version) for x, version in held))
        return features

    def forward(self, inputs: Any, targets: Targets | None = None, *, step: int | None = None) -> ObjectiveOutput:
        """Compare one batch.

        Args:
            inputs: a tensor, a tuple of the models' arguments or a mapping of keyword arguments.
            targets: name to target.
            step: number of training steps done so far, for the schedules; see `Objective.forward`.

        Raises:
            ValueError: a model changed the inputs in place, which the other models read too; or a weight or a
                hyper-parameter is a schedule, and the step is unknown or that of an earlier call.
        """
        student, teachers = self.features(inputs, targets)
        output: ObjectiveOutput = self.objective(student, teachers, targets or {}, step=step)
        return output

    @torch.no_grad()
    def infer(self, inputs: Any, targets: Targets | None = None) -> Self:
        """Create the inferred projections from one batch; changes no weight and no statistic.

        The student runs in training mode, in which its features are compared later, except for normalization and
        dropout layers.
        """
        if self.objective.inferred:
            return self
        modes = {each: each.training for part in (self.student, self.updated_teachers) for each in part.modules()}
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in modes
            for name, buffer in module.named_buffers(recurse=False)
            if not is_lazy(buffer)
        ]
        try:
            with fork_random_state(self._device()):
                for module in modes:
                    module.training = not isinstance(module, (_NormBase, _DropoutNd))
                features = self.features(inputs, targets)
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, name, buffer, value in buffers:
                setattr(module, name, buffer.copy_(value))
        self.objective.infer(*features)
        return self

    def _device(self) -> torch.device:
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def report(self, inputs: Any, targets: Targets | None = None, *, step: int | None = None) -> InfluenceReport:
        """Measure the influence of each term and teacher on the student, on one batch; see `Objective.report`.

        Runs in the current mode of the distiller; `step=None` uses the last step. Weights, statistics, `.grad` and the random state are unchanged
        afterwards. In a distributed run all processes must call it if a loss or norm communicates.

        Raises:
            RuntimeError: a projection is not inferred yet.
            ValueError: a weight or a hyper-parameter is a schedule, and the step is unknown.
        """
        with unchanged(self.student, *self._teacher_modules(), device=self._device()):
            student, teachers = self.features(inputs, targets)
            return self.objective.report(student, teachers, targets, step=step)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the student, projections, heads and learned weightings; none of a teacher.

        Raises:
            RuntimeError: a projection is not inferred yet.
        """
        check_inferred("Distiller", self.objective.inferred, "distiller.infer(inputs, targets)")
        updated = set(self.updated_teachers.parameters())
        yield from (parameter for parameter in self.parameters() if parameter not in updated)

    def update_teachers(self, *, step: int | None = None) -> None:
        """Update the teachers that follow the student, such as `EMATeacher`, after a step of the optimizer.

        `train` calls this. A loop of your own calls it after `optimizer.step()`.

        Args:
            step: the step, counted from 0; `None` lets each teacher count its updates.
        """
        for name in self._updated:
            cast(UpdatedTeacher, self.teachers[name]).update(self.student, step=step)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves _apply untyped
        for module in self._frozen_modules() if recurse else ():
            move(module, fn)
        return self


def _check_taps(term: str, owner: str, model: object, taps: str | Sequence[str]) -> None:
    """Check feature names where the model declares its taps; other models are checked in the first forward."""
    for tap in (taps,) if isinstance(taps, str) else taps:
        if isinstance(model, HasTaps):
            check_name(f"Distiller: term {term!r}", f"feature of the {owner}", tap, model.taps)
