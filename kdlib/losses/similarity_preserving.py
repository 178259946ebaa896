"""Losses: similarity preservation, samples alike for the teacher are alike for the student. Touches two tensors only.

Tung and Mori, 2019: match the matrices of dot products between the samples of a batch, each row of unit length.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_relation_reduction
from kdlib._maths import full_precision
from kdlib.losses._pairs import (
    gram_gradient,
    one_batch,
    scaled_rows,
    shortest_length,
    unit_gradient_,
    unit_rows_,
    with_gradient,
)

__all__ = ["SimilarityPreservingLoss", "similarity_preserving"]


def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    *,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of the two matrices of similarities between samples, each row of unit length.

    .. math::
        \frac{1}{b^2} \sum_{i,j} \left(\frac{G^s_{ij}}{\|G^s_i\|} - \frac{G^t_{ij}}{\|G^t_i\|}\right)^2, \qquad
        G_{ij} = \langle x_i, x_j \rangle, \qquad \|G_i\|^2 = \sum_j G_{ij}^2

    between 0 and 4 / b. The loss does not depend on the scale of either side as a whole, but it does on the lengths of
    samples next to each other and on a common offset. The numbers of features may differ. A sample of zeros has a row
    of zeros.

    With weights, let :math:`p = w / \sum w` and :math:`n = 1 / \sum p^2`, the effective number of samples (b where all
    weights are equal). Then the rows have :math:`\|G_i\|^2 = n \sum_j p_j G_{ij}^2`, and the loss is
    :math:`\sum_{i,j} p_i p_j (\cdot)^2`. A sample of weight 0 is as if absent.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, likewise; never receives a gradient.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number, none too. Every process gets the same value; the gradients are such that their mean over
            the processes, as `DistributedDataParallel` takes it, is that of the one batch.
        reduction: `"mean"` only: a relation has no per-sample form.
        weight: `(b,)`, at least 0; only its ratios count.

    Returns:
        A scalar, 0 where no sample has a weight. Float32, or float64 if given float64.

    Raises:
        ValueError: batch sizes differ, or a `reduction` other than `"mean"`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0], [1.0]])
        >>> round(similarity_preserving(student, teacher).item(), 4)
        0.2929
        >>> similarity_preserving(3 * student, student.flip(1)).item()
        0.0

    References:
        Tung, Mori, *Similarity-Preserving Knowledge Distillation*, arXiv 1907.09682, section 3.1. Values are those of
        RepDistiller; torchdistill divides each row by the sum of its magnitudes, so its value is another one. There is
        a gradient, but no second derivative, and no rule for `torch.func.vmap`.
    """
    check_floating("similarity_preserving", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("similarity_preserving", student, teacher, reduction, weight, gather)
        if student.numel() * teacher.numel() == 0:
            return student.sum() * 0.0
        asked = student.requires_grad and torch.is_grad_enabled()
        value, gradient = _with_gradient(student, teacher, share, shortest_length(origin), asked)
        return with_gradient(student, value, gradient)


def _with_gradient(
    student: Tensor, teacher: Tensor, share: Tensor, shortest: float, asked: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient `(b, d)` if asked for."""
    root, squares = share.sqrt(), share.square().sum()
    rows, largest, scale = scaled_rows(student, share)
    rows_t, _, _ = scaled_rows(teacher, share)
    # The weights of the columns go into the rows: these are sqrt(p_j) times those of the formula, of length 1.
    q_s, length = unit_rows_((rows @ rows.T).mul_(root))
    q_t, _ = unit_rows_((rows_t @ rows_t.T).mul_(root))
    gap = q_t.neg_().add_(q_s)
    value = share @ torch.linalg.vecdot(gap, gap) * squares
    if not asked:
        return value, value
    # A row's slope grows as one over the length of its sample.
    short = largest < torch.clamp(scale * 1e-30, min=shortest)
    slope = gap.mul_((2 * squares * torch.where(short, 0.0, share)).unsqueeze(1))
    slope = unit_gradient_(slope, q_s, length).mul_(root / scale)
    return value, gram_gradient(slope, rows)


class SimilarityPreservingLoss(nn.Module):
    """`similarity_preserving` as a Module; the formula and the arguments are there.

    Args:
        gather: make one batch of the rows of all processes.
        reduction: `"mean"` only.

    Raises:
        ValueError: a `reduction` other than `"mean"`.

    Examples:
        >>> import torch
        >>> loss = SimilarityPreservingLoss()
        >>> loss
        SimilarityPreservingLoss(gather=False, reduction='mean')
        >>> features = torch.rand(4, 8, 2, 2)
        >>> loss(features, features).item()
        0.0
    """

    per_sample: ClassVar[bool] = False

    def __init__(self, *, gather: bool = False, reduction: Literal["mean"] = "mean") -> None:
        super().__init__()
        check_relation_reduction("SimilarityPreservingLoss", reduction)
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
        return similarity_preserving(
            student, teacher, gather=self.gather, reduction=reduction or self.reduction, weight=weight
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"gather={self.gather!r}, reduction={self.reduction!r}"
