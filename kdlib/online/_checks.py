"""Argument checks that only online methods use."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kdlib._checks import check_key, check_name, check_type, show_shape
from kdlib.objective import Objective

__all__ = [
    "check_head", "check_initialized", "check_new_name", "check_objectives", "check_same_tensors",
    "check_students",
]  # fmt: skip


def check_initialized(owner: str, student: nn.Module) -> None:
    """The weights of a student that is copied must exist."""
    lazy = [name for name, x in [*student.named_parameters(), *student.named_buffers()] if is_lazy(x)]
    if lazy:
        raise ValueError(f"{owner}: student must be initialized, got a lazy {lazy[0]!r}; run it on one batch first")


def check_same_tensors(owner: str, means: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """A student must have the weights of the one that was copied, by name and shape."""
    odd = means.keys() ^ values.keys()
    odd |= {name for name in means.keys() & values.keys() if means[name].shape != values[name].shape}
    if odd:
        name = min(odd)
        kept, given = ("none" if each is None else show_shape(each) for each in (means.get(name), values.get(name)))
        raise ValueError(
            f"{owner}: student must have the weights of the student that was copied, got {len(odd)} that differ, such as "
            f"{name!r} (copied {kept}, now {given})"
        )


def check_students(students: Mapping[str, object]) -> None:
    """`students` must be a mapping of at least two names to Modules."""
    check_type("MutualDistiller", "students", students, Mapping, "a mapping of names to students")
    if len(students) < 2:
        raise ValueError(f"MutualDistiller: students must be at least two, got {len(students)}; use Distiller for one")
    for name, student in students.items():
        check_key("MutualDistiller", "a student's name", name)
        check_type("MutualDistiller", f"students[{name!r}]", student, nn.Module, "a Module that returns named features")
        if "/" in name:
            raise ValueError(f"MutualDistiller: a student's name must be text without '/', got {name!r}")
    if len({id(student) for student in students.values()}) < len(students):
        raise ValueError("MutualDistiller: students must be distinct Modules, got one of them twice")


def check_objectives(objective: object, students: Mapping[str, nn.Module], teachers: Mapping[str, object]) -> None:
    """`objective` must be an `Objective` or one per student; the names of teachers and students must differ."""
    each = objective if isinstance(objective, Mapping) else {"": objective}
    for name, value in each.items():
        label = f"objective[{name!r}]" if isinstance(objective, Mapping) else "objective"
        check_type("MutualDistiller", label, value, Objective, "an Objective, or a mapping of students to Objectives")
    if isinstance(objective, Mapping):
        for name in students:
            check_name("MutualDistiller", "objective for the student", name, objective)
        for name in objective:
            check_name("MutualDistiller", "student", name, students)
    for name in teachers:
        if name in students:
            raise ValueError(f"MutualDistiller: teachers and students must have different names, got {name!r} twice")


def check_head(name: str, head: object) -> None:
    """A head must be a pair of a feature and a Module."""
    if not (isinstance(head, tuple) and len(head) == 2 and isinstance(head[0], str)):
        raise TypeError(f"AuxiliaryHeads: heads[{name!r}] must be a pair (feature, Module), got {head!r}")
    check_type("AuxiliaryHeads", f"heads[{name!r}][1]", head[1], nn.Module, "a Module")


def check_new_name(name: str, taken: object) -> None:
    """A head must not have the name of a feature of the student."""
    if isinstance(taken, Mapping) and name in taken:
        raise ValueError(f"AuxiliaryHeads: a head must have a name of its own, got {name!r}, a feature of the student")
