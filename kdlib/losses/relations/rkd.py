"""Relational knowledge distillation: distances and angles between samples as the teacher's."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdlib._checks import check_floating, check_number
from kdlib._maths import MeanOnly, full_precision, shortest_length
from kdlib.losses._module import RelationLoss
from kdlib.losses._relations import one_batch, with_gradient
from kdlib.losses.relations._rkd import (
    angle_operation,
    angle_with_gradient,
    distance_operation,
    distance_with_gradient,
)

__all__ = ["RKDAngleLoss", "RKDDistanceLoss", "rkd_angle", "rkd_distance"]


def rkd_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    chunk_size: int | None = None,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compare the distances between the student's samples with those between the teacher's.

    .. math::
        \frac{1}{b^2} \sum_{i,j} h\left(\frac{d^s_{ij}}{\mu_s} - \frac{d^t_{ij}}{\mu_t}\right), \qquad
        d_{ij} = \|x_i - x_j\|, \qquad \mu = \frac{1}{b (b - 1)} \sum_{i \ne j} d_{ij}

    with h the smooth absolute value, :math:`h(u) = u^2 / 2` up to 1 and :math:`|u| - 1/2` beyond. The loss does not
    depend on the scale and the position of either side, and the numbers of features may differ. If all rows of a side
    are equal, its distances count as 0.

    With weights, a pair has the weight :math:`w_i w_j`. Both means become
    :math:`\sum w_i w_j (\cdot) / \sum w_i w_j`, the first over all pairs, :math:`\mu` over pairs of two different
    samples. A sample of weight 0 has no influence.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, the same; never receives a gradient.
        chunk_size: rows of the distance matrices that are compared at a time; `None` is all. The value is the same.
        gather: use the rows of all processes of the default process group as one batch. Every process gets the same
            value. The mean of the gradients over the processes, as computed by `DistributedDataParallel`, is that of
            this batch. Processes may hold different numbers of rows, including none.
        reduction: `"mean"` only, because a relation has no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if fewer than two samples have a weight. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The batch sizes differ, `chunk_size` is below 1, or `reduction` is not `"mean"`.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        >>> round(rkd_distance(student, teacher).item(), 4)
        0.0139
        >>> rkd_distance(5 * teacher + 1000, teacher).item() < 1e-12
        True

    References:
        Park, Kim, Lu, Cho, *Relational Knowledge Distillation*, arXiv 1904.05068, section 3.2.1. Public code often
        computes distances by expanded squares, which a common offset of 100 changes by a third, and includes rounding
        errors of the diagonal in the mean; this function does neither. The gradient is hand-written, because pairs of
        near rows need differences. Second derivatives and `torch.func.vmap` raise an error.
    """
    # To a compiler, it is one operation.
    compare = distance_operation if torch.compiler.is_compiling() else distance_with_gradient
    return _compare("rkd_distance", compare, student, teacher, chunk_size, gather, reduction, weight)


def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    chunk_size: int | None = None,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compare the angles between the student's samples with those between the teacher's.

    .. math::
        \frac{1}{b^3} \sum_{i,j,k} h\left(c^s_{ijk} - c^t_{ijk}\right), \qquad
        c_{ijk} = \left\langle \frac{x_j - x_i}{d_{ij}}, \frac{x_k - x_i}{d_{ik}} \right\rangle
        = \frac{d_{ij}^2 + d_{ik}^2 - d_{jk}^2}{2 \, d_{ij} d_{ik}}

    with :math:`d_{ij} = \|x_i - x_j\|` and h the smooth absolute value, :math:`h(u) = u^2 / 2` up to 1 and
    :math:`|u| - 1/2` beyond. A cosine at a vertex that coincides with one of the other two points is 0. The loss does
    not depend on the scale, the position and the rotation of either side, and the numbers of features may differ.

    With weights, a triple has the weight :math:`w_i w_j w_k`, and the mean is
    :math:`\sum w_i w_j w_k (\cdot) / (\sum w)^3`. A sample of weight 0 has no influence.

    The cosines are computed from the distances without difference vectors `(b, b, d)`, together with the gradient and
    a few vertices at a time. The memory is that of a few matrices `(b, b)`. The result is exact: no triple is skipped. On an
    accelerator, where values are not read, two samples nearer than about 2e-14 of the largest distance count as equal
    (1e-5 on Metal devices, which have no float64).

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, the same; never receives a gradient.
        chunk_size: vertices i that are processed at a time; `None` chooses by device. The value is the same up to
            rounding.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because a relation has no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if fewer than two samples have a weight. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The batch sizes differ, `chunk_size` is below 1, or `reduction` is not `"mean"`.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
        >>> round(rkd_angle(student, teacher).item(), 4)
        0.1296
        >>> rkd_angle(student.flip(1) * 7 + 1000, student).item() < 1e-12
        True

    References:
        Park, Kim, Lu, Cho, *Relational Knowledge Distillation*, arXiv 1904.05068, section 3.2.2; values equal those of
        public code, which computes the difference vectors. The gradient is hand-written, which saves time and memory.
        Second derivatives and `torch.func.vmap` raise an error.
    """
    compare = angle_operation if torch.compiler.is_compiling() else angle_with_gradient
    return _compare("rkd_angle", compare, student, teacher, chunk_size, gather, reduction, weight)


def _check_chunk(owner: str, chunk_size: int | None) -> None:
    if chunk_size is not None:
        check_number(owner, "chunk_size", chunk_size, min=1, integer=True)


def _compare(
    owner: str,
    operation: Callable[..., tuple[Tensor, Tensor]],
    student: Tensor,
    teacher: Tensor,
    chunk_size: int | None,
    gather: bool,
    reduction: str,
    weight: Tensor | None,
) -> Tensor:
    """Return the loss that `operation` computes together with its gradient."""
    _check_chunk(owner, chunk_size)
    check_floating(owner, student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch(owner, student, teacher, reduction, weight, gather)
        needs_grad = student.requires_grad and torch.is_grad_enabled()
        arguments = (student.detach(), teacher, share, chunk_size or 0, shortest_length(origin), needs_grad)
        return with_gradient(student, *operation(*arguments))


class _RKDLoss(RelationLoss):
    def __init__(self, *, chunk_size: int | None = None, gather: bool = False, reduction: MeanOnly = "mean") -> None:
        super().__init__(gather=gather, reduction=reduction)
        _check_chunk(type(self).__name__, chunk_size)
        self.chunk_size = chunk_size


class RKDDistanceLoss(_RKDLoss):
    """`rkd_distance` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> features = torch.rand(4, 8)
        >>> RKDDistanceLoss()(features, features).item()
        0.0
    """

    _function = staticmethod(rkd_distance)


class RKDAngleLoss(_RKDLoss):
    """`rkd_angle` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> features = torch.rand(4, 8)
        >>> RKDAngleLoss(chunk_size=16)(features, features).item()
        0.0
    """

    _function = staticmethod(rkd_angle)
