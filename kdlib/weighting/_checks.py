"""Checks of the arguments of weightings."""

from collections.abc import Sequence

from torch import Tensor

from kdlib._checks import check_floating, check_rank, show_shape


def check_logits(owner: str, losses: Tensor, teachers: Sequence[Tensor]) -> None:
    """`losses` must be `(k, b)`, and each of the k teachers logits `(b, c)` on the same classes."""
    check_teachers(owner, losses, teachers)
    if any(teacher.dim() != 2 or teacher.shape[1] != teachers[0].shape[1] for teacher in teachers):
        shapes = ", ".join(show_shape(teacher) for teacher in teachers)
        raise ValueError(f"{owner}: teachers must be logits (b, c) on the same c classes, got {shapes}")


def check_max_weight(owner: str, max_weight: float, teachers: int) -> None:
    """Weights of at most `max_weight` each must be able to sum to one."""
    if teachers and max_weight * teachers < 1 - 1e-9:
        raise ValueError(f"{owner}: max_weight must be >= 1 / k for k = {teachers} teachers, got {max_weight!r}")


def check_teachers(owner: str, losses: Tensor, teachers: Sequence[Tensor] | None = None) -> None:
    """`losses` must be `(k, b)`; `teachers`, if given, must be k tensors `(b, d, ...)`."""
    check_floating(owner, losses=losses)
    check_rank(owner, "losses", losses, "k b")
    if teachers is None:
        return
    if len(teachers) != losses.shape[0]:
        raise ValueError(f"{owner}: teachers must be k = {losses.shape[0]} tensors, got {len(teachers)}")
    for index, teacher in enumerate(teachers):
        if teacher.dim() < 2 or teacher.shape[0] != losses.shape[1]:
            raise ValueError(
                f"{owner}: teachers[{index}] must be (b, d, ...) with b = {losses.shape[1]}, got {show_shape(teacher)}"
            )
