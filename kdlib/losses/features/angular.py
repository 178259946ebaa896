"""Angular distillation: the direction of the student's features as that of the teacher's."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdlib._checks import check_choice, check_pair
from kdlib._maths import Reduction, full_precision, hold_short, promote, reduce, unit_rows
from kdlib.losses._module import FunctionLoss

__all__ = ["AngularDistillLoss", "angular_distill"]

Form: TypeAlias = Literal["squared", "cosine", "chord", "angle"]
FORMS = ("squared", "cosine", "chord", "angle")


def angular_distill(
    student: Tensor,
    teacher: Tensor,
    *,
    form: Form = "squared",
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compare the directions of the student's and the teacher's features.

    With :math:`\hat s`, :math:`\hat t` the features of a sample, flattened and divided by their Euclidean length, and
    :math:`\cos = \langle \hat s, \hat t \rangle`:

    ===========  ========================================  ===================================================
    `form`       loss of a sample                          behavior
    ===========  ========================================  ===================================================
    `"squared"`  :math:`(1 - \cos)^2`, in [0, 4]           gradient vanishes quickly near alignment
    `"cosine"`   :math:`1 - \cos`, in [0, 2]               gradient proportional to the sine of the angle
    `"chord"`    :math:`\|\hat s - \hat t\|^2`, in [0, 4]  twice `"cosine"`
    `"angle"`    the angle in radians, in [0, pi]          gradient of the same length at every angle
    ===========  ========================================  ===================================================

    The loss does not depend on the length of either feature. Zero features are treated as orthogonal to everything
    (cosine 0, angle pi / 2, unit vector 0) and get no gradient.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features of the same shape; never receives a gradient.
        form: function of the angle, see the table.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, or `form` or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 2.0]])
        >>> [round(angular_distill(student, teacher, form=form).item(), 4) for form in FORMS]
        [0.0858, 0.2929, 0.5858, 0.7854]

    References:
        Duong et al., *ShrinkTeaNet: Million-scale Lightweight Face Recognition via Shrinking Teacher-Student
        Networks*, arXiv 1905.10620. Yan et al., *VarGFaceNet*, arXiv 1910.04985, quote the squared form from it in
        equation 4; the chord form is their equation 5. The two differ: near alignment the gradient of the first
        vanishes as the cube of the angle, that of the second as the angle.
    """
    check_choice("angular_distill", "form", form, FORMS)
    check_pair("angular_distill", student, teacher, "b d ...")
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        s, size = unit_rows(student.flatten(1))
        t, teacher_size = unit_rows(teacher.flatten(1))
        nonzero = (size > 0) & (teacher_size > 0)
        if form == "angle":
            # acos has an infinite slope at 0 and at pi; the ratio of the two diagonals is exact at both.
            difference = torch.where(nonzero, torch.linalg.vector_norm(s - t, dim=1), 1.0)
            total = torch.where(nonzero, torch.linalg.vector_norm(s + t, dim=1), 1.0)
            losses = 2 * torch.atan2(difference, total)
        else:
            # |s - t|^2 / 2 is 1 - cos without cancellation: never negative, and exactly 0 for equal rows.
            chord = (s - t).square().sum(1)
            cosine = torch.where(nonzero, chord / 2, 1.0)
            losses = {"chord": chord, "cosine": cosine, "squared": cosine.square()}[form]
        return reduce("angular_distill", hold_short(losses, size, origin), reduction, weight)


class AngularDistillLoss(FunctionLoss):
    """`angular_distill` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> AngularDistillLoss(form="cosine")(torch.eye(2), torch.eye(2).flip(0)).item()
        1.0
    """

    _function = staticmethod(angular_distill)

    def __init__(self, *, form: Form = "squared", reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        check_choice("AngularDistillLoss", "form", form, FORMS)
        self.form = form
