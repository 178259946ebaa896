"""Mutual distillation: several students that are trained together and teach each other."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from kdlib._checks import check_type
from kdlib.distiller import Distiller
from kdlib.influence import Comparison
from kdlib.objective import Objective, Term
from kdlib.online._checks import check_objectives, check_students
from kdlib.types import Features, HasTaps, Targets, Teacher, Weighting

__all__ = ["MutualDistiller"]


class MutualDistiller(Distiller):
    r"""Trains several students on the same batches, each with the features of the others as teachers.

    .. math:: \sum_k \Bigl( \sum_t \lambda_t \sum_{j \ne k} \frac{1}{b} \sum_i w_{tkji} \, L_t(s_{ki}, s_{ji}) \Bigr)

    over the students k, the terms t of the objective, the peers j of a student and the samples i. Each student is
    trained by an `Objective` as it would be in a `Distiller` with its peers as teachers: terms compare it with all
    peers, or with those that `teachers=` of a `Term` names; the weighting gives each peer a weight, which sum to one;
    and no gradient reaches a peer. Every student runs once per batch.

    It is a `Distiller`: `train`, `infer`, `report` and `trainable_parameters` work alike. Names of terms are
    `"student/term"`.

    Args:
        students: name to student, at least two; usually a `StudentAdapter` each.
        objective: the terms of each student, with a copy of losses, projections and weighting for each; or a mapping of
            each student's name to an objective of its own.
        teachers: name to frozen `Teacher`, which every student follows besides its peers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, fewer than two students, a name that is used twice or
            unknown.

    Examples:
        >>> import torch
        >>> from kdlib import OUTPUT, SoftTargetLoss, StudentAdapter, Term
        >>> students = {name: StudentAdapter(nn.Linear(4, 3), {"logits": OUTPUT}) for name in ("a", "b")}
        >>> terms = {
        ...     "ce": Term(nn.CrossEntropyLoss(), student="logits", target="label"),
        ...     "peers": Term(SoftTargetLoss(temperature=1.0), student="logits", teacher="logits"),
        ... }
        >>> distiller = MutualDistiller(students, Objective(terms))
        >>> output = distiller(torch.randn(2, 4), {"label": torch.tensor([0, 2])})
        >>> sorted(output.terms), tuple(output.weights["a/peers"].shape)
        (['a/ce', 'a/peers', 'b/ce', 'b/peers'], (1, 2))

    References:
        Zhang, Xiang, Hospedales, Lu, *Deep Mutual Learning*, arXiv 1706.00384. There the students take turns and each
        sees the updated others; here all are updated at once.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        objective: Objective | Mapping[str, Objective],
        *,
        teachers: Mapping[str, Teacher] | None = None,
    ) -> None:
        check_students(students)
        check_type(
            "MutualDistiller", "teachers", teachers, (Mapping, type(None)), "a mapping of names to teachers or None"
        )
        check_objectives(objective, students, teachers or {})
        objectives = (
            objective
            if isinstance(objective, Mapping)
            else {name: copy.deepcopy(objective) if index else objective for index, name in enumerate(students)}
        )
        peers = {name: _Peer(name, student) for name, student in students.items()}
        super().__init__(
            _Students(students),
            {**peers, **(teachers or {})},
            _JointObjective(objectives, [*students, *(teachers or {})]),
        )

    @property
    def students(self) -> Mapping[str, nn.Module]:
        """The students by name."""
        return dict(self.student.named_children())


class _Students(nn.Module):
    """Runs every student on the batch and joins their features as `"student/feature"`."""

    taps: Mapping[str, object]

    def __init__(self, students: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, student in students.items():
            self.add_module(name, student)
        declared = {name: each.taps for name, each in students.items() if isinstance(each, HasTaps)}
        if len(declared) == len(students):
            self.taps = {f"{name}/{tap}": None for name, taps in declared.items() for tap in taps}

    @property
    def receiver(self) -> nn.Module:
        """The first student: all take the same inputs."""
        return next(self.children())

    def forward(self, *inputs: Any, **named: Any) -> Features:
        return {f"{name}/{tap}": x for name, each in self.named_children() for tap, x in each(*inputs, **named).items()}


class _Peer:
    """A student as a teacher of the others."""

    inputs: ClassVar[None] = None
    reads_student: ClassVar[bool] = True

    def __init__(self, name: str, student: nn.Module) -> None:
        self.name = name
        if isinstance(student, HasTaps):
            self.taps = dict.fromkeys(student.taps)

    def __call__(self, students: Features) -> Features:
        return _part(students, self.name)

    @property
    def fingerprint(self) -> str:
        return f"peer {self.name!r}"


@dataclass(frozen=True)
class _Weightings:
    """The weightings of all students, which their objectives check and call."""

    students: dict[str, Weighting]
    cross_layer: ClassVar[bool] = True

    def __call__(self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets) -> Tensor:
        return losses


class _JointObjective(Objective):
    """One objective per student, on joined features; the terms are those of all students."""

    def __init__(self, objectives: Mapping[str, Objective], names: list[str]) -> None:
        joined: dict[str, Term] = {}
        for student, objective in objectives.items():
            for name, term in objective.terms.items():
                others = term.teachers or [other for other in names if other != student]
                taps = [
                    f"{student}/{tap}" for tap in ([term.student] if isinstance(term.student, str) else term.student)
                ]
                joined[f"{student}/{name}"] = replace(
                    term,
                    student=taps[0] if isinstance(term.student, str) else taps,
                    teachers=None if term.teacher is None else others,
                )
        super().__init__(joined, _Weightings({name: each.weighting for name, each in objectives.items()}))
        self.losses = nn.ModuleDict()  # registered by the objectives of the students
        self.objectives = nn.ModuleDict(objectives)

    def _each(self) -> list[tuple[str, Objective]]:
        return [(name, each) for name, each in self.objectives.items() if isinstance(each, Objective)]

    @property
    def inferred(self) -> bool:
        return all(each.inferred for _, each in self._each())

    def infer(self, student_features: Features, teacher_features: Mapping[str, Features]) -> None:
        for name, each in self._each():
            each.infer(_part(student_features, name), _without(teacher_features, name))

    def _compare(
        self, student_features: Features, teacher_features: Mapping[str, Features], targets: Targets, step: int | None
    ) -> tuple[dict[str, Comparison], list[Any]]:
        compared, penalties = {}, []
        for name, each in self._each():
            own, others = _part(student_features, name), _without(teacher_features, name)
            result, more = each._compare(own, others, targets, step)
            compared.update({f"{name}/{term}": value for term, value in result.items()})
            penalties += more
        return compared, penalties


def _part(features: Features, name: str) -> Features:
    """Return the features of one student under its own names."""
    return {key.removeprefix(f"{name}/"): x for key, x in features.items() if key.startswith(f"{name}/")}


def _without(features: Mapping[str, Features], name: str) -> dict[str, Features]:
    return {key: each for key, each in features.items() if key != name}
