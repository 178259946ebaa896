"""Triplet distillation: a triplet loss with margins from the teacher's distances (Feng et al., 2019)."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdlib._checks import check_batches, check_choice, check_number, check_rank, check_relation_reduction, check_weight
from kdlib._maths import full_precision
from kdlib_faces._checks import check_identities_or_triplets
from kdlib_faces.heads._margin import LossModule, unit_pair
from kdlib_faces.losses._whole_batch import whole_batch

__all__ = ["TripletDistillLoss", "triplet_distill"]

DISTANCES = ("squared", "angle")
MININGS = ("hardest", "semihard")

Distance = Literal["squared", "angle"]
Mining = Literal["hardest", "semihard"]


def triplet_distill(
    student: Tensor,
    teacher: Tensor,
    *,
    target: Tensor,
    min_margin: float = 0.2,
    max_margin: float = 0.5,
    distance: Distance = "squared",
    mining: Mining = "hardest",
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Triplet loss of the student, with a larger margin for triplets that the teacher separates more.

    With an anchor a, another sample p of its identity, a sample n of another identity, and the distance D of two
    normalized embeddings,

    .. math:: L_{apn} = \max(D^s_{ap} - D^s_{an} + m_{apn}, 0), \qquad
              m_{apn} = (M_{\max} - M_{\min}) \frac{g_{apn}}{\max g} + M_{\min}, \qquad
              g_{apn} = \max(D^t_{an} - D^t_{ap}, 0)

    and the mean over the triplets. The maximum is over all triplets of the call; if it is 0, all margins are the
    minimum. If identities are given, the triplets are all ordered genuine pairs a, p, each with one negative chosen by
    the student's distances: for `"hardest"` the nearest to the anchor; for `"semihard"` the nearest that is farther
    than p, or the farthest if there is none. A batch without genuine pairs, or with one identity, gives 0 with a graph.
    Zero embeddings are treated as orthogonal to all others and get no gradient.

    A sample with weight 0 is excluded from all triplets. Otherwise a triplet has the weight :math:`w_a w_p w_n`: `sum(w
    L) / sum(w)`. Mining and the maximum only depend on which weights are above 0.

    Memory is `(b, b)` for any d; no tensor has the size of all triplets.

    Args:
        student: embeddings `(b, d)`, not necessarily normalized.
        teacher: embeddings `(b, D)`; gets no gradient.
        target: identities `(b,)`, any integers; or triplets `(t, 3)`, rows of anchor, positive and negative.
        min_margin: :math:`M_{\min}`, at least 0, in the unit of the distance.
        max_margin: :math:`M_{\max}`, at least `min_margin`.
        distance: `"squared"` Euclidean distance, from 0 to 4; or `"angle"`, in radians, from 0 to pi.
        mining: `"hardest"` or `"semihard"`; ignored if triplets are given.
        gather: treat the rows of all processes of the default process group as one batch; the processes may have
            different numbers of rows, and all get the same value. Only for identities.
        reduction: only `"mean"`: a relation has no per-sample form.
        weight: `(b,)`, at least 0, weight per sample; 0 masks it.

    Returns:
        A scalar. Float32, or float64 for float64 inputs, also under autocast.

    Raises:
        ValueError: mismatched shapes, a row out of range, an unknown `distance`, `mining` or `reduction`.
        TypeError: embeddings that are not floating point, a target that is not integer.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> loss = triplet_distill(student, teacher, target=torch.tensor([[0, 1, 2]]))
        >>> round(loss.item(), 4)  # 2.0 - 0.8 plus the maximum margin, as this triplet has the largest gap
        1.7
        >>> round(triplet_distill(student, teacher, target=torch.tensor([7, 7, 9])).item(), 4)
        1.9

    References:
        Feng, Wang, Hu, Yu, Wang, Wang, *Triplet Distillation for Deep Face Recognition*, arXiv 1905.04457. Mining in
        the batch is our addition. No arc cosine is differentiated: the angle is computed from the two diagonals,
        :math:`2\,\mathrm{atan2}(\|a - b\|, \|a + b\|)`, exact at 0 and at pi.
    """
    owner = "triplet_distill"
    _check_arguments(owner, min_margin, max_margin, distance, mining)
    min_margin, max_margin = float(min_margin), float(max_margin)
    check_relation_reduction(owner, reduction)
    check_batches(owner, "b d", student=student, teacher=teacher)
    check_identities_or_triplets(owner, target, student.shape[0])
    check_weight(owner, weight, student.shape[0])
    target = target.to(student.device).long()
    with full_precision(student):
        if gather:
            check_rank(owner, "target, with gather,", target, "b")
            student, teacher, target, weight = whole_batch(student, teacher, target, weight, grad=True)
        s_bd, t_bd = unit_pair(student, teacher.detach(), 8.0)
        if not len(s_bd):
            return s_bd.sum()
        w = s_bd.new_ones(len(s_bd)) if weight is None else weight.to(s_bd.dtype)
        d_s, d_t = _distances(s_bd, distance), _distances(t_bd, distance)
        if target.dim() == 2:
            a, p, n = target.unbind(1)
        else:
            # Every cell (a, p) of the matrix is treated as a triplet; invalid ones have weight 0.
            positions = torch.arange(len(w), device=w.device)
            a, p = positions.unsqueeze(1), positions.unsqueeze(0)
            same = target.unsqueeze(1) == target.unsqueeze(0)
            other = ~same & (w > 0)
            n = _negatives(d_s.detach(), other, mining)
            w = torch.where(w > 0, w, 0.0)
        share = w[a] * w[p] * w[n]
        if target.dim() == 1:
            share = torch.where(same & (a != p) & other.any(1, keepdim=True), share, 0.0)
        gap = torch.where(share > 0, d_t[a, n] - d_t[a, p], 0.0).clamp(min=0)
        largest = gap.amax() if gap.numel() else gap.sum()
        margin = (max_margin - min_margin) * gap / torch.where(largest > 0, largest, 1.0) + min_margin
        losses = (d_s[a, p] - d_s[a, n] + margin).relu()
        total = share.sum()
        return (share * losses).sum() / torch.where(total > 0, total, 1.0)


def _negatives(d_bb: Tensor, other: Tensor, mining: Mining) -> Tensor:
    """Return the row of the negative for each anchor and positive `(b, b)`; arbitrary if an anchor has none."""
    ordered = torch.where(other, d_bb, torch.inf).sort(stable=True, dim=1)
    sorted_bb: Tensor = ordered.values
    order: Tensor = ordered.indices
    if mining == "hardest":
        return order[:, :1].expand_as(order)
    # The first entry of the sorted row that is farther than the positive, or the last negative.
    index = torch.searchsorted(sorted_bb, d_bb, right=True)
    return order.gather(1, torch.minimum(index, other.sum(1, keepdim=True) - 1).clamp(min=0))


def _distances(x_bd: Tensor, distance: Distance) -> Tensor:
    """Return all distances `(b, b)` between normalized or zero rows."""
    if distance == "squared":
        # Distances do not depend on the mean; subtracting it avoids cancellation.
        x_bd = x_bd - x_bd.detach().mean(0)
        square = x_bd.square().sum(1)
        return square.unsqueeze(1) + square.unsqueeze(0) - 2 * (x_bd @ x_bd.T)
    # The expanded form would be inaccurate for close rows.
    exact = "donot_use_mm_for_euclid_dist"
    nonzero = (x_bd.detach() != 0).any(1)
    both = nonzero.unsqueeze(1) & nonzero.unsqueeze(0)
    difference = torch.where(both, torch.cdist(x_bd, x_bd, compute_mode=exact), 1.0)
    total = torch.where(both, torch.cdist(x_bd, -x_bd, compute_mode=exact), 1.0)
    angles: Tensor = 2 * torch.atan2(difference, total)
    return angles


class TripletDistillLoss(LossModule):
    """`triplet_distill` as a Module; see the function for the formula and the arguments.

    In a `Term` the identities or the triplets are the `target`: `Term(TripletDistillLoss(), student="embedding",
    teacher="embedding", target="identity")`.

    Args:
        min_margin: at least 0, in the unit of the distance.
        max_margin: at least `min_margin`.
        distance: `"squared"` or `"angle"`.
        mining: `"hardest"` or `"semihard"`.
        gather: treat the rows of all processes as one batch.

    Examples:
        >>> import torch
        >>> loss = TripletDistillLoss(distance="angle")
        >>> loss
        TripletDistillLoss(min_margin=0.2, max_margin=0.5, distance='angle', mining='hardest', gather=False)
        >>> loss(torch.eye(4), torch.eye(4), target=torch.arange(4)).item()  # no genuine pair
        0.0
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self,
        *,
        min_margin: float = 0.2,
        max_margin: float = 0.5,
        distance: Distance = "squared",
        mining: Mining = "hardest",
        gather: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments("TripletDistillLoss", min_margin, max_margin, distance, mining)
        self.min_margin, self.max_margin = float(min_margin), float(max_margin)
        self.distance, self.mining, self.gather = distance, mining, gather

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: Literal["mean"] | None = None,
    ) -> Tensor:
        """Return the loss of `student` `(b, d)` against `teacher` `(b, D)`, of identities `(b,)` or triplets `(t, 3)`."""
        return triplet_distill(
            student, teacher, target=target, min_margin=self.min_margin, max_margin=self.max_margin,
            distance=self.distance, mining=self.mining, gather=self.gather, reduction=reduction or "mean", weight=weight,
        )  # fmt: skip


def _check_arguments(owner: str, low: float, high: float, distance: str, mining: str) -> None:
    largest = math.pi if distance == "angle" else 4
    check_choice(owner, "distance", distance, DISTANCES)
    check_choice(owner, "mining", mining, MININGS)
    check_number(owner, "min_margin", low, min=0, max=largest)
    check_number(owner, "max_margin", high, min=low, max=largest)
