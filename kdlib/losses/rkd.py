"""Losses: relational knowledge distillation, distances and angles as the teacher's. Touches two tensors only.

Park et al., 2019: transfer how the samples of a batch lie to each other, not where each one lies.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_relation_reduction
from kdlib._maths import full_precision
from kdlib.losses._pairs import one_batch, shortest_length, with_gradient
from kdlib.losses._rkd import angle_with_gradient, distance_with_gradient

__all__ = ["RKDAngleLoss", "RKDDistanceLoss", "rkd_angle", "rkd_distance"]


def rkd_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    chunk_size: int | None = None,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""How far the distances between the student's samples are from those between the teacher's.

    .. math::
        \frac{1}{b^2} \sum_{i,j} h\left(\frac{d^s_{ij}}{\mu_s} - \frac{d^t_{ij}}{\mu_t}\right), \qquad
        d_{ij} = \|x_i - x_j\|, \qquad \mu = \frac{1}{b (b - 1)} \sum_{i \ne j} d_{ij}

    with h the smooth absolute value, :math:`h(u) = u^2 / 2` up to 1 and :math:`|u| - 1/2` beyond. The loss does not
    depend on the scale or the place of either side, and the numbers of features may differ. Where all rows of a side
    are equal, its distances count as 0.

    With weights, a pair counts :math:`w_i w_j`: both means become :math:`\sum w_i w_j (\cdot) / \sum w_i w_j`, the
    first over all pairs, :math:`\mu` over those of two samples. A sample of weight 0 is as if absent.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, likewise; never receives a gradient.
        chunk_size: rows of the distance matrices compared at a time; `None` is all. The value is the same.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number, none too. Every process gets the same value; the gradients are such that their mean over
            the processes, as `DistributedDataParallel` takes it, is that of the one batch.
        reduction: `"mean"` only: a relation has no per-sample form.
        weight: `(b,)`, at least 0; only its ratios count.

    Returns:
        A scalar, 0 where there are not two samples with a weight. Float32, or float64 if given float64.

    Raises:
        ValueError: batch sizes differ, `chunk_size` below 1, or a `reduction` other than `"mean"`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        >>> round(rkd_distance(student, teacher).item(), 4)
        0.0139
        >>> rkd_distance(5 * teacher + 1000, teacher).item() < 1e-12
        True

    References:
        Park, Kim, Lu, Cho, *Relational Knowledge Distillation*, arXiv 1904.05068, section 3.2.1. Public code often
        takes distances by expanded squares, which a common offset of 100 puts off by a third, and lets the square
        root of what rounding leaves on the diagonal enter the mean; here neither does. There is a gradient, but no
        second derivative, and no rule for `torch.func.vmap`.
    """
    _check_chunk("rkd_distance", chunk_size)
    check_floating("rkd_distance", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("rkd_distance", student, teacher, reduction, weight, gather)
        asked = student.requires_grad and torch.is_grad_enabled()
        arguments = (student.detach(), teacher, share, chunk_size or 0, shortest_length(origin), asked)
        return with_gradient(student, *distance_with_gradient(*arguments))


def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    chunk_size: int | None = None,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""How far the angles that the student's samples form are from those that the teacher's form.

    .. math::
        \frac{1}{b^3} \sum_{i,j,k} h\left(c^s_{ijk} - c^t_{ijk}\right), \qquad
        c_{ijk} = \left\langle \frac{x_j - x_i}{d_{ij}}, \frac{x_k - x_i}{d_{ik}} \right\rangle
        = \frac{d_{ij}^2 + d_{ik}^2 - d_{jk}^2}{2 \, d_{ij} d_{ik}}

    with :math:`d_{ij} = \|x_i - x_j\|` and h the smooth absolute value, :math:`h(u) = u^2 / 2` up to 1 and
    :math:`|u| - 1/2` beyond. A cosine at a vertex that coincides with one of the other two points is 0. The loss does
    not depend on the scale, the place or the turn of either side, and the numbers of features may differ.

    With weights, a triple counts :math:`w_i w_j w_k`, and the mean is :math:`\sum w_i w_j w_k (\cdot) / (\sum w)^3`.
    A sample of weight 0 is as if absent.

    The cosines are taken from the distances, so no difference vectors `(b, b, d)` are made, and the gradient with
    them, a few vertices at a time, so the memory is that of a few matrices `(b, b)`. It is exact: nothing is sampled.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, likewise; never receives a gradient.
        chunk_size: vertices i taken at a time; `None` picks what suits the device. The value is the same up to
            rounding.
        gather: make one batch of the rows of all processes, as in `rkd_distance`.
        reduction: `"mean"` only: a relation has no per-sample form.
        weight: `(b,)`, at least 0; only its ratios count.

    Returns:
        A scalar, 0 where there are not two samples with a weight. Float32, or float64 if given float64.

    Raises:
        ValueError: batch sizes differ, `chunk_size` below 1, or a `reduction` other than `"mean"`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
        >>> round(rkd_angle(student, teacher).item(), 4)
        0.1296
        >>> rkd_angle(student.flip(1) * 7 + 1000, student).item() < 1e-12
        True

    References:
        Park, Kim, Lu, Cho, *Relational Knowledge Distillation*, arXiv 1904.05068, section 3.2.2; values are those of
        public code, which makes the difference vectors. There is a gradient, but no second derivative, and no rule
        for `torch.func.vmap`.
    """
    _check_chunk("rkd_angle", chunk_size)
    check_floating("rkd_angle", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("rkd_angle", student, teacher, reduction, weight, gather)
        asked = student.requires_grad and torch.is_grad_enabled()
        arguments = (student.detach(), teacher, share, chunk_size or 0, shortest_length(origin), asked)
        return with_gradient(student, *angle_with_gradient(*arguments))


def _check_chunk(owner: str, chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_number(owner, "chunk_size", chunk_size, min=1, integer=True)


class RKDDistanceLoss(nn.Module):
    """`rkd_distance` as a Module; the formula and the arguments are there.

    Args:
        chunk_size: rows compared at a time; `None` is all.
        gather: make one batch of the rows of all processes.
        reduction: `"mean"` only.

    Raises:
        ValueError: `chunk_size` below 1, or a `reduction` other than `"mean"`.

    Examples:
        >>> import torch
        >>> loss = RKDDistanceLoss()
        >>> loss
        RKDDistanceLoss(chunk_size=None, gather=False, reduction='mean')
        >>> features = torch.rand(4, 8)
        >>> loss(features, features).item()
        0.0
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self, *, chunk_size: int | None = None, gather: bool = False, reduction: Literal["mean"] = "mean"
    ) -> None:
        super().__init__()
        _check_chunk("RKDDistanceLoss", chunk_size)
        check_relation_reduction("RKDDistanceLoss", reduction)
        self.chunk_size = chunk_size
        self.gather = gather
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, d, ...)` against `teacher`; `reduction=None` means the constructor's."""
        return rkd_distance(
            student,
            teacher,
            chunk_size=self.chunk_size,
            gather=self.gather,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"chunk_size={self.chunk_size!r}, gather={self.gather!r}, reduction={self.reduction!r}"


class RKDAngleLoss(nn.Module):
    """`rkd_angle` as a Module; the formula and the arguments are there.

    Args:
        chunk_size: vertices taken at a time; `None` picks what suits the device.
        gather: make one batch of the rows of all processes.
        reduction: `"mean"` only.

    Raises:
        ValueError: `chunk_size` below 1, or a `reduction` other than `"mean"`.

    Examples:
        >>> import torch
        >>> loss = RKDAngleLoss(chunk_size=16)
        >>> loss
        RKDAngleLoss(chunk_size=16, gather=False, reduction='mean')
        >>> features = torch.rand(4, 8)
        >>> loss(features, features).item()
        0.0
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self, *, chunk_size: int | None = None, gather: bool = False, reduction: Literal["mean"] = "mean"
    ) -> None:
        super().__init__()
        _check_chunk("RKDAngleLoss", chunk_size)
        check_relation_reduction("RKDAngleLoss", reduction)
        self.chunk_size = chunk_size
        self.gather = gather
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, d, ...)` against `teacher`; `reduction=None` means the constructor's."""
        return rkd_angle(
            student,
            teacher,
            chunk_size=self.chunk_size,
            gather=self.gather,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"chunk_size={self.chunk_size!r}, gather={self.gather!r}, reduction={self.reduction!r}"
