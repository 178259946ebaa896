"""Losses: angular distillation, the student's features in the teacher's direction. Touches two tensors only.

Duong et al., ShrinkTeaNet, 2019: distil the direction of a feature and leave its length free.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_pair
from kdlib._maths import REDUCTIONS, full_precision, hold_short, promote, reduce, unit_rows

__all__ = ["AngularDistillLoss", "angular_distill"]

FORMS = ("squared", "cosine", "chord", "angle")


def angular_distill(
    student: Tensor,
    teacher: Tensor,
    *,
    form: Literal["squared", "cosine", "chord", "angle"] = "squared",
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""How far the student's features point away from the teacher's.

    With :math:`\hat s`, :math:`\hat t` the features of one sample, flattened and divided by their Euclidean length, and
    :math:`\cos = \langle \hat s, \hat t \rangle`:

    ===========  ========================================  ===================================================
    `form`       loss of one sample                        behavior
    ===========  ========================================  ===================================================
    `"squared"`  :math:`(1 - \cos)^2`, in [0, 4]           lets go of a sample that is nearly aligned
    `"cosine"`   :math:`1 - \cos`, in [0, 2]               gradient proportional to the sine of the angle
    `"chord"`    :math:`\|\hat s - \hat t\|^2`, in [0, 4]  twice `"cosine"`
    `"angle"`    the angle in radians, in [0, pi]          gradient of one length at every angle
    ===========  ========================================  ===================================================

    The loss does not depend on the length of either feature. A feature of zeros has no direction: its cosine to
    anything is taken as 0 (angle pi / 2), its unit vector as 0, and it gets no gradient.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features of the same shape; never receives a gradient.
        form: which function of the angle, see the table.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, or an unknown `form` or `reduction`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 2.0]])
        >>> [round(angular_distill(student, teacher, form=form).item(), 4) for form in FORMS]
        [0.0858, 0.2929, 0.5858, 0.7854]

    References:
        Duong et al., *ShrinkTeaNet: Million-scale Lightweight Face Recognition via Shrinking Teacher-Student
        Networks*, arXiv 1905.10620. The squared form is the one that Yan et al., *VarGFaceNet*, arXiv 1910.04985,
        equation 4, quotes from it; the chord form is their equation 5. The two are not equal: near alignment the
        gradient of the first vanishes as the cube of the angle, that of the second as the angle.
    """
    check_choice("angular_distill", "form", form, FORMS)
    check_pair("angular_distill", student, teacher, "b d ...")
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        s, size = unit_rows(student.flatten(1))
        t, teacher_size = unit_rows(teacher.flatten(1))
        # A row without a direction stands at a right angle to every other.
        directed = (size > 0) & (teacher_size > 0)
        if form == "angle":
            # acos has an infinite slope at 0 and at pi; the ratio of the two diagonals is exact at both.
            difference = torch.where(directed, torch.linalg.vector_norm(s - t, dim=1), 1.0)
            total = torch.where(directed, torch.linalg.vector_norm(s + t, dim=1), 1.0)
            losses = 2 * torch.atan2(difference, total)
        else:
            # |s - t|^2 / 2 is 1 - cos without its cancellation: never negative, and exactly 0 for equal rows.
            chord = (s - t).square().sum(1)
            gap = torch.where(directed, chord / 2, 1.0)
            losses = {"chord": chord, "cosine": gap, "squared": gap.square()}[form]
        return reduce("angular_distill", hold_short(losses, size, origin), reduction, weight)


class AngularDistillLoss(nn.Module):
    """`angular_distill` as a Module; the formula and the arguments are there.

    Args:
        form: `"squared"`, `"cosine"`, `"chord"` or `"angle"`.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: an unknown `form` or `reduction`.

    Examples:
        >>> import torch
        >>> loss = AngularDistillLoss(form="cosine")
        >>> loss
        AngularDistillLoss(form='cosine', reduction='mean')
        >>> loss(torch.eye(2), torch.eye(2).flip(0)).item()
        1.0
    """

    per_sample: ClassVar[bool] = True

    def __init__(
        self,
        *,
        form: Literal["squared", "cosine", "chord", "angle"] = "squared",
        reduction: Literal["mean", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_choice("AngularDistillLoss", "form", form, FORMS)
        check_choice("AngularDistillLoss", "reduction", reduction, REDUCTIONS)
        self.form = form
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, d, ...)` against `teacher`; `reduction=None` means the constructor's."""
        return angular_distill(student, teacher, form=self.form, reduction=reduction or self.reduction, weight=weight)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"form={self.form!r}, reduction={self.reduction!r}"
