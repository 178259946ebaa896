"""DarkRank: the order of each sample's nearest neighbors as the teacher's."""

import math

import torch
from torch import Tensor

from kdlib._checks import check_floating, check_number, readable
from kdlib._maths import MeanOnly, directions, full_precision, safe_divisor, unit_rows
from kdlib.losses._module import RelationLoss
from kdlib.losses._relations import one_batch, power_of_two, squared_distances

__all__ = ["DarkRankLoss", "dark_rank"]

MAX_SCORE = 1e30
"""Scores of a larger magnitude count as this one and get no gradient."""
MAX_BATCH = 2**20
"""A power of two: the lowest bits of a distance are replaced by an index below this number, to break ties."""


def dark_rank(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 3.0,
    beta: float = 3.0,
    length: int = 4,
    normalize: bool = False,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the negative log-likelihood of the teacher's order of each sample's nearest neighbors for the student.

    .. math::
        -\frac{1}{b} \sum_i \sum_{k=1}^{L} \log
        \frac{\exp S_{i \pi_i(k)}}{\sum_{l=k}^{L} \exp S_{i \pi_i(l)}}, \qquad
        S_{ij} = -\alpha \|s_i - s_j\|^\beta

    with :math:`\pi_i(1)` to :math:`\pi_i(L)` the L samples that are nearest to sample i for the teacher, near to far,
    without i itself; at most b - 1. Distances that are equal to nine digits keep the order of the batch. The numbers of
    features may differ. The loss of a student equal to the teacher is not 0, but approaches 0 as the distances in the
    list differ more; that of a student of equal rows is :math:`\log L!`.

    The loss depends on the scale of the student, not on that of the teacher. The published constants are for embeddings
    of unit length, whose distances are at most 2: pass such embeddings, or `normalize=True`. Scores below -1e30 count
    as -1e30. A float16 student gets no gradient that overflows float16.

    With weights, the mean over the samples i is weighted. A sample of weight 0 has no influence and is in no list.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, the same; never receives a gradient.
        alpha: factor of the scores, above 0; a larger one makes the order sharper.
        beta: exponent of the distances, above 0; a larger one gives more weight to far samples.
        length: L, the number of neighbors in a list, at least 2; the time grows with it.
        normalize: divide each row of both sides by its length first; zero rows stay zero and get no gradient.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because a relation has no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if fewer than three samples have a weight. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The batch sizes differ, `alpha` or `beta` is not above 0, `length` is below 2, or `reduction` is not
            `"mean"`.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.zeros(3, 2), torch.tensor([[0.0], [1.0], [3.0]])
        >>> round(dark_rank(student, teacher).item(), 4)  # log 2 for each of the three lists
        0.6931
        >>> dark_rank(teacher, teacher, alpha=1.0, beta=1.0).item() < 0.6931
        True

    References:
        Chen, Wang, Zhang, *DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer*, arXiv
        1707.01220, the hard form, by the likelihood of one order (ListMLE). Values equal those of public code (by the
        authors of RKD), which sorts all samples and drops the first place: if another sample has the same row, it may
        drop that one instead of the sample itself. The soft form, over all L! orders, is not available.
    """
    _check_order("dark_rank", alpha, beta, length)
    check_floating("dark_rank", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("dark_rank", student, teacher, reduction, weight, gather)
        if student.shape[0] < 3 or student.numel() * teacher.numel() == 0:
            return student.sum() * 0.0
        dtype = student.dtype
        wide = torch.float32 if student.device.type == "mps" else torch.float64  # Metal devices have no float64
        absent = share == 0
        rows, rows_t = (x.to(wide).masked_fill(absent.unsqueeze(1), 0) for x in (student, teacher))
        if normalize:
            (rows, _), (rows_t, _) = directions(rows, origin), unit_rows(rows_t)
        scale = power_of_two(rows.detach())
        rows, rows_t = rows / scale, rows_t / power_of_two(rows_t)
        nearest = _nearest_operation if torch.compiler.is_compiling() else _nearest_rows
        neighbors = nearest(rows_t, absent, length)
        others = (~absent).sum() - 1
        # Lists of a single neighbor have no order and count as empty.
        missing = torch.arange(neighbors.shape[1], device=rows.device) >= torch.where(others > 1, others, 0)
        distance = torch.stack([_distances(rows, rows[k]) for k in neighbors.unbind(1)], 1)
        # Logarithms, because powers overflow easily.
        log_distance = safe_divisor(distance).log()
        log_size = (log_distance + scale.log()) * beta + math.log(alpha)
        log_slope = log_size - log_distance + math.log(beta)
        # With these limits the gradient of a row fits the student's dtype, and that of a scaled row fits `wide`.
        steep = log_slope - scale.log() > math.log(torch.finfo(origin).max / (4 * length))
        steep = steep | (log_slope > math.log(torch.finfo(wide).max) / 2) | (log_size > math.log(MAX_SCORE))
        log_size = torch.where(steep, log_size.detach(), log_size)
        scores = -log_size.clamp(max=math.log(MAX_SCORE)).exp()
        scores = torch.where(missing, -4 * MAX_SCORE, torch.where(distance == 0, 0.0, scores))
        rest = torch.stack([scores[:, k:].logsumexp(1) for k in range(scores.shape[1])], 1)
        losses = torch.where(missing, 0.0, rest - scores).sum(1)
        return (share.to(wide) @ losses).to(dtype)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distances of corresponding rows `(b,)`; equal rows have no direction and get no gradient.

    Differences are exact, and for short lists they are less work than the dot products of all pairs.
    """
    difference = x - y
    equal = (difference == 0).all(1, keepdim=True)
    length = torch.linalg.vector_norm(torch.where(equal, 1.0, difference), dim=1)
    return torch.where(equal.squeeze(1), 0.0, length)


def _nearest_rows(rows: Tensor, absent: Tensor, length: int) -> Tensor:
    """Return the indices of the nearest other rows that are not absent, near to far, `(b, min(length, b - 1))`."""
    if readable(rows):
        present = (~absent).nonzero().squeeze(1)
        squares = torch.full((len(rows), len(rows)), torch.inf, dtype=rows.dtype, device=rows.device)
        squares[present.unsqueeze(1), present] = squared_distances(rows[present], rows.dtype)[0]
        squares.fill_diagonal_(torch.inf)
    else:
        left_out = torch.eye(len(rows), dtype=torch.bool, device=rows.device) | absent | absent.unsqueeze(1)
        squares = squared_distances(rows, rows.dtype)[0].masked_fill(left_out, torch.inf)
    length = min(length, rows.shape[0] - 1)
    if rows.dtype != torch.float64 or rows.shape[0] > MAX_BATCH:
        return squares.argsort(dim=1, stable=True)[:, :length].contiguous()
    # Numbers of at least 0 have the order of their bits. The lowest bits are replaced by the index, so that rounding
    # does not order equal distances. All keys then differ, so an unstable selection is sufficient.
    key = (squares.view(torch.int64) + MAX_BATCH // 2).bitwise_and_(-MAX_BATCH)
    key.bitwise_or_(torch.arange(rows.shape[0], device=rows.device))
    return key.topk(length, dim=1, largest=False)[1]


# One operation to a compiler, which could not read which pairs need differences.
_nearest_operation = torch.library.custom_op("kdlib::nearest_rows", _nearest_rows, mutates_args=())


@_nearest_operation.register_fake
def _(rows: Tensor, absent: Tensor, length: int) -> Tensor:
    return rows.new_empty((rows.shape[0], min(length, rows.shape[0] - 1)), dtype=torch.int64)


def _check_order(owner: str, alpha: float, beta: float, length: int) -> None:
    check_number(owner, "alpha", alpha, above=0)
    check_number(owner, "beta", beta, above=0)
    check_number(owner, "length", length, min=2, integer=True)


class DarkRankLoss(RelationLoss):
    """`dark_rank` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> round(DarkRankLoss()(torch.ones(8, 2), torch.randn(8, 16)).item(), 4)  # log 4!
        3.1781
    """

    _function = staticmethod(dark_rank)

    def __init__(
        self,
        *,
        alpha: float = 3.0,
        beta: float = 3.0,
        length: int = 4,
        normalize: bool = False,
        gather: bool = False,
        reduction: MeanOnly = "mean",
    ) -> None:
        super().__init__(gather=gather, reduction=reduction)
        _check_order("DarkRankLoss", alpha, beta, length)
        self.alpha, self.beta, self.length, self.normalize = alpha, beta, length, normalize
