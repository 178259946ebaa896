"""Faces losses, private: one batch of the rows of all processes. Touches tensors and the process group."""

from torch import Tensor

from kdlib._gather import gather_rows

__all__ = ["whole_batch"]


def whole_batch(
    student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor | None, *, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All four as they would be in a single process; `grad` says whether the student's own rows get a gradient."""
    return (
        gather_rows(student, grad=grad),
        gather_rows(teacher, grad=False),
        gather_rows(target.to(student.device).long(), grad=False),
        None if weight is None else gather_rows(weight.to(student.device), grad=False),
    )
