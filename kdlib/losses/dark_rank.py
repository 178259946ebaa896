"""Losses: DarkRank, each sample's nearest neighbors in the teacher's order. Touches two tensors only.

Chen, Wang and Zhang, 2018: transfer how the other samples of a batch rank by their similarity to each one.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_relation_reduction
from kdlib._maths import full_precision
from kdlib.losses._pairs import (
    one_batch,
    power_of_two,
    shortest_length,
    squared_distances,
    unit_gradient_,
    unit_rows_,
    with_gradient,
)

__all__ = ["DarkRankLoss", "dark_rank"]

FAR = 1e30
"""A larger score counts as this one, without gradient."""
PLACES = 2**20
"""A power of two: the numbers that the last digits of a distance give way to."""


def dark_rank(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 3.0,
    beta: float = 3.0,
    length: int = 4,
    normalize: bool = False,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""How unlikely the student finds the teacher's order of each sample's nearest neighbors.

    .. math::
        -\frac{1}{b} \sum_i \sum_{k=1}^{L} \log
        \frac{\exp S_{i \pi_i(k)}}{\sum_{l=k}^{L} \exp S_{i \pi_i(l)}}, \qquad
        S_{ij} = -\alpha \|s_i - s_j\|^\beta

    with :math:`\pi_i(1)` to :math:`\pi_i(L)` the L samples that the teacher has nearest to sample i, from near to far, i
    itself left out; so there are at most b - 1. Distances that are equal to nine digits are in the order of the batch.
    The numbers of features may differ. The least value is not 0 for a student equal to the teacher, but it falls towards
    0 as the distances in the list grow apart; a student of equal rows has :math:`\log L!`.

    The loss depends on the scale of the student, not on that of the teacher. The published constants are for embeddings
    of unit length, whose distances are up to 2: give such ones, or `normalize=True`. Scores below -1e30 count as -1e30.
    A student in half precision gets no gradient that its dtype cannot hold.

    With weights, the mean over the samples i is the weighted one, and a sample of weight 0 is as if absent: it is in
    nobody's list either.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, likewise; never receives a gradient.
        alpha: factor on the scores, above 0; a larger one makes the order sharper.
        beta: exponent of the distances, above 0; a larger one sees the far ones more.
        length: L, how many neighbors make the list, at least 2; the time grows with it.
        normalize: divide each row of both sides by its length first; a row of zeros stays one and gets no gradient.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number, none too. Every process gets the same value; the gradients are such that their mean over
            the processes, as `DistributedDataParallel` takes it, is that of the one batch.
        reduction: `"mean"` only: a relation has no per-sample form.
        weight: `(b,)`, at least 0; only its ratios count.

    Returns:
        A scalar, 0 where there are not three samples with a weight. Float32, or float64 if given float64.

    Raises:
        ValueError: batch sizes differ, `alpha` or `beta` not above 0, `length` below 2, or a `reduction` other than
            `"mean"`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.zeros(3, 2), torch.tensor([[0.0], [1.0], [3.0]])
        >>> round(dark_rank(student, teacher).item(), 4)  # each of three orders one of two
        0.6931
        >>> dark_rank(teacher, teacher, alpha=1.0, beta=1.0).item() < 0.6931
        True

    References:
        Chen, Wang, Zhang, *DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer*, arXiv
        1707.01220, the hard form, by the likelihood of one order (ListMLE). Values are those of public code (the
        authors of RKD), which sorts with the sample itself and drops the first place: where another sample has the same
        row it may drop that one. The soft form, over all L! orders, is not here. There is a gradient, but no second
        derivative, and no rule for `torch.func.vmap`.
    """
    _check_order("dark_rank", alpha, beta, length)
    check_floating("dark_rank", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("dark_rank", student, teacher, reduction, weight, gather)
        asked = student.requires_grad and torch.is_grad_enabled()
        limits = [shortest_length(origin), torch.finfo(origin).max / 4]
        arguments = (share, float(alpha), float(beta), length, normalize, limits, asked)
        return with_gradient(student, *_with_gradient(student.detach(), teacher, *arguments))


@torch.library.custom_op("kdlib::dark_rank", mutates_args=())
def _with_gradient(
    student: Tensor,
    teacher: Tensor,
    share: Tensor,
    alpha: float,
    beta: float,
    length: int,
    normalize: bool,
    limits: list[float],
    asked: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient `(b, d)` if asked for. One operation, opaque to a compiler."""
    kept = share.nonzero().squeeze(1)
    out = torch.zeros_like(student) if asked else student.new_empty(0)
    if kept.shape[0] < 3 or student.shape[1] * teacher.shape[1] == 0:
        return student.new_zeros(()), out
    wide = torch.float32 if student.device.type == "mps" else torch.float64  # a Metal device has no float64
    rows, rows_t, share = (x[kept].to(wide) for x in (student, teacher, share))
    row_length = None
    if normalize:
        (rows, row_length), (rows_t, _) = unit_rows_(rows), unit_rows_(rows_t)
    scale = power_of_two(rows)
    rows, rows_t = rows / scale, rows_t / power_of_two(rows_t)
    neighbors = _nearest_others(rows_t, length, wide)
    # By differences, a place of the lists at a time: exact, and less work than all pairs where lists are short.
    apart = torch.stack([torch.linalg.vector_norm(rows - rows[of], dim=1) for of in neighbors.unbind(1)], 1)
    # By logarithms, as a power leaves every dtype soon.
    log_distance = apart.log() + scale.log()
    log_size = log_distance * beta + math.log(alpha)
    scores = log_size.clamp(max=math.log(FAR)).exp_().neg_()
    rest = scores.flip(1).logcumsumexp(1).flip(1)  # of the place and those behind it
    value = share @ (rest - scores).sum(1)
    if not asked:
        return value.to(student.dtype), out
    # Every place up to its own draws a sample with its probability there, and its own place has drawn it.
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device).log().to(wide)
    slope = (scores + (-rest).logcumsumexp(1)).minimum(places).exp_().sub_(1).mul_(share.unsqueeze(1))
    # d score / d distance, over the scaled distance, which leaves unit vectors between the rows. Those at one place have
    # no direction from each other.
    log_steep = (log_size - log_distance + math.log(beta)).clamp_(max=math.log(torch.finfo(wide).max) / 2)
    slope = slope.mul_(log_steep.exp_().neg_()).div_(apart)
    slope.masked_fill_((apart == 0) | (log_size >= math.log(FAR)), 0)
    gradient = torch.zeros_like(rows)
    for of, steep in zip(neighbors.unbind(1), slope.unbind(1), strict=True):
        pull = (rows - rows[of]).mul_(steep.unsqueeze(1))
        gradient.add_(pull).index_add_(0, of, pull, alpha=-1)
    if row_length is not None:
        gradient = unit_gradient_(gradient, rows * scale, row_length, limits[0])
    out[kept] = gradient.masked_fill_(~(gradient.abs() <= limits[1]), 0).to(student.dtype)
    return value.to(student.dtype), out


@_with_gradient.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    share: Tensor,
    alpha: float,
    beta: float,
    length: int,
    normalize: bool,
    limits: list[float],
    asked: bool,
) -> tuple[Tensor, Tensor]:
    return student.new_empty(()), torch.empty_like(student) if asked else student.new_empty(0)


def _nearest_others(rows: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`(b, min(length, b - 1))`: the places of each row's nearest other rows, from near to far."""
    squares = squared_distances(rows, dtype)[0].fill_diagonal_(torch.inf)
    length = min(length, rows.shape[0] - 1)
    if dtype != torch.float64 or rows.shape[0] > PLACES:
        return squares.argsort(dim=1, stable=True)[:, :length]
    # Numbers of at least 0 are in the order of their bits. The last ones give way to the place, so that rounding does
    # not order what is equally far, as all unit rows are from one of zeros; and all are different, so no sort is needed.
    key = (squares.view(torch.int64) + PLACES // 2).bitwise_and_(-PLACES)
    key.bitwise_or_(torch.arange(rows.shape[0], device=rows.device))
    return key.topk(length, dim=1, largest=False)[1]


def _check_order(owner: str, alpha: float, beta: float, length: int) -> None:
    check_number(owner, "alpha", alpha, above=0)
    check_number(owner, "beta", beta, above=0)
    check_number(owner, "length", length, min=2, integer=True)


class DarkRankLoss(nn.Module):
    """`dark_rank` as a Module; the formula and the arguments are there.

    Args:
        alpha: factor on the scores, above 0.
        beta: exponent of the distances, above 0.
        length: how many neighbors make the list, at least 2.
        normalize: divide each row of both sides by its length first.
        gather: make one batch of the rows of all processes.
        reduction: `"mean"` only.

    Raises:
        ValueError: `alpha` or `beta` not above 0, `length` below 2, or a `reduction` other than `"mean"`.

    Examples:
        >>> import torch
        >>> loss = DarkRankLoss()
        >>> loss
        DarkRankLoss(alpha=3.0, beta=3.0, length=4, normalize=False, gather=False, reduction='mean')
        >>> round(loss(torch.ones(8, 2), torch.randn(8, 16)).item(), 4)  # log 4!
        3.1781
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self,
        *,
        alpha: float = 3.0,
        beta: float = 3.0,
        length: int = 4,
        normalize: bool = False,
        gather: bool = False,
        reduction: Literal["mean"] = "mean",
    ) -> None:
        super().__init__()
        _check_order("DarkRankLoss", alpha, beta, length)
        check_relation_reduction("DarkRankLoss", reduction)
        self.alpha = alpha
        self.beta = beta
        self.length = length
        self.normalize = normalize
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
        return dark_rank(
            student,
            teacher,
            alpha=self.alpha,
            beta=self.beta,
            length=self.length,
            normalize=self.normalize,
            gather=self.gather,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return (
            f"alpha={self.alpha!r}, beta={self.beta!r}, length={self.length!r}, normalize={self.normalize!r}, "
            f"gather={self.gather!r}, reduction={self.reduction!r}"
        )
