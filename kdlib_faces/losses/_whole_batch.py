"""Gathering of the batches of all processes into one."""

from torch import Tensor

from kdlib._gather import gather_rows

__all__ = ["whole_batch"]


def whole_batch(
    student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor | None, *, grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return all four as in a single process; with `grad`, the rows of this process keep their gradient."""
    return (
        gather_rows(student, grad=grad),
        gather_rows(teacher, grad=False),
        gather_rows(target.to(student.device).long(), grad=False),
        None if weight is None else gather_rows(weight.to(student.device), grad=False),
    )
