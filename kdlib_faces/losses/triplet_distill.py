"""Faces losses: triplet distillation, margins by how far the teacher holds two identities apart. Touches tensors only.

Feng et al., Triplet Distillation for Deep Face Recognition, 2019: a triplet loss whose margin the teacher sets.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_floating, check_number, check_rank, check_same_batch, check_weight
from kdlib._maths import full_precision
from kdlib_faces._checks import check_identities_or_triplets, check_relation
from kdlib_faces.heads._margin import unit_pair
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
    least_margin: float = 0.2,
    most_margin: float = 0.5,
    distance: Distance = "squared",
    mining: Mining = "hardest",
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Triplet loss of the student, the margin of each triplet by how far the teacher holds it apart.

    With a an anchor, p another sample of its identity, n one of another identity, and D the distance of two embeddings
    of unit length,

    .. math:: L_{apn} = \max(D^s_{ap} - D^s_{an} + m_{apn}, 0), \qquad
              m_{apn} = (M_{\max} - M_{\min}) \frac{g_{apn}}{\max g} + M_{\min}, \qquad
              g_{apn} = \max(D^t_{an} - D^t_{ap}, 0)

    and the mean over the triplets. The maximum is over all triplets of the call; where it is 0 every margin is the
    least one. Given identities, the triplets are every ordered pair a, p of one identity, each with one negative by
    the student's distances: for `"hardest"` the one nearest to the anchor; for `"semihard"` the nearest of those that
    are farther from it than p, and the farthest of all where there is none. A batch without a pair, or of one identity,
    gives 0 with a graph. Embeddings of zeros have a zero unit vector and a right angle to all, and get no gradient.

    A sample of weight 0 is in no triplet, as if it were absent. Otherwise a triplet counts
    :math:`w_a w_p w_n`: `sum(w L) / sum(w)`. Mining and the maximum look at which weights are above 0 alone.

    Memory is `(b, b)`, whatever d; nothing is of the size of all triplets.

    Args:
        student: embeddings `(b, d)`, of any length.
        teacher: embeddings `(b, D)`; never receives a gradient.
        target: identities `(b,)`, any whole numbers; or triplets `(t, 3)`, rows of anchor, positive and negative.
        least_margin: :math:`M_{\min}`, at least 0, in the unit of the distance.
        most_margin: :math:`M_{\max}`, at least `least_margin`.
        distance: `"squared"`, the squared Euclidean one, from 0 to 4; or `"angle"`, in radians, from 0 to pi.
        mining: `"hardest"` or `"semihard"`; not looked at where triplets are given.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number; every process gets its value. For identities alone.
        reduction: `"mean"` alone: a relation has no per-sample form.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar. Float32, or float64 if given float64, under autocast too.

    Raises:
        ValueError: shapes that do not fit, a row out of range, an unknown `distance`, `mining` or `reduction`.
        TypeError: embeddings that are not floating point, a target that is not whole numbers.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> loss = triplet_distill(student, teacher, target=torch.tensor([[0, 1, 2]]))
        >>> round(loss.item(), 4)  # 2.0 - 0.8 and the most margin, as this triplet is the widest of its batch
        1.7
        >>> round(triplet_distill(student, teacher, target=torch.tensor([7, 7, 9])).item(), 4)
        1.9

    References:
        Feng, Wang, Hu, Yu, Wang, Wang, *Triplet Distillation for Deep Face Recognition*, arXiv 1905.04457. Mining in
        the batch is ours. An arc cosine is not differentiated: the angle is taken from the two diagonals,
        :math:`2\,\mathrm{atan2}(\|a - b\|, \|a + b\|)`, exact at 0 and at pi.
    """
    owner = "triplet_distill"
    _check_arguments(owner, least_margin, most_margin, distance, mining)
    check_relation(owner, reduction)
    check_floating(owner, student=student, teacher=teacher)
    check_rank(owner, "student", student, "b d")
    check_rank(owner, "teacher", teacher, "b d")
    check_same_batch(owner, "student", student, "teacher", teacher)
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
            # Every cell (a, p) of the matrix is a triplet; those that are none count 0.
            places = torch.arange(len(w), device=w.device)
            a, p = places.unsqueeze(1), places.unsqueeze(0)
            same = target.unsqueeze(1) == target.unsqueeze(0)
            other = ~same & (w > 0)
            n = _negatives(d_s.detach(), other, mining)
            w = torch.where(w > 0, w, 0.0)
        share = w[a] * w[p] * w[n]
        if target.dim() == 1:
            share = torch.where(same & (a != p) & other.any(1, keepdim=True), share, 0.0)
        gap = torch.where(share > 0, d_t[a, n] - d_t[a, p], 0.0).clamp(min=0)
        largest = gap.amax() if gap.numel() else gap.sum()
        margin = (most_margin - least_margin) * gap / torch.where(largest > 0, largest, 1.0) + least_margin
        losses = (d_s[a, p] - d_s[a, n] + margin).relu()
        total = share.sum()
        return (share * losses).sum() / torch.where(total > 0, total, 1.0)


def _negatives(d_bb: Tensor, other: Tensor, mining: Mining) -> Tensor:
    """The row of the negative of each anchor and positive `(b, b)`; any row where an anchor has none."""
    ordered = torch.where(other, d_bb, torch.inf).sort(stable=True, dim=1)
    sorted_bb: Tensor = ordered.values
    order: Tensor = ordered.indices
    if mining == "hardest":
        return order[:, :1].expand_as(order)
    # The first place in the sorted row that is farther than the positive; the last negative where there is none.
    place = torch.searchsorted(sorted_bb, d_bb, right=True)
    return order.gather(1, torch.minimum(place, other.sum(1, keepdim=True) - 1).clamp(min=0))


def _distances(x_bd: Tensor, distance: Distance) -> Tensor:
    """All distances `(b, b)` between rows of length one or zero."""
    if distance == "squared":
        # What the rows have in common would drown what they differ in; a distance does not see it.
        x_bd = x_bd - x_bd.detach().mean(0)
        square = x_bd.square().sum(1)
        return square.unsqueeze(1) + square.unsqueeze(0) - 2 * (x_bd @ x_bd.T)
    # Without the expanded form, whose rounding is a wide angle for near rows.
    exact = "donot_use_mm_for_euclid_dist"
    directed = (x_bd.detach() != 0).any(1)
    both = directed.unsqueeze(1) & directed.unsqueeze(0)
    difference = torch.where(both, torch.cdist(x_bd, x_bd, compute_mode=exact), 1.0)
    total = torch.where(both, torch.cdist(x_bd, -x_bd, compute_mode=exact), 1.0)
    angles: Tensor = 2 * torch.atan2(difference, total)
    return angles


class TripletDistillLoss(nn.Module):
    """`triplet_distill` as a Module; the formula and the arguments are there.

    In a `Term` it reads the identities, or the triplets, as `target`: `Term(TripletDistillLoss(), student="embedding",
    teacher="embedding", target="identity")`.

    Args:
        least_margin: at least 0, in the unit of the distance.
        most_margin: at least `least_margin`.
        distance: `"squared"` or `"angle"`.
        mining: `"hardest"` or `"semihard"`.
        gather: make one batch of the rows of all processes.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of a wrong type.

    Examples:
        >>> import torch
        >>> loss = TripletDistillLoss(distance="angle")
        >>> loss
        TripletDistillLoss(least_margin=0.2, most_margin=0.5, distance='angle', mining='hardest', gather=False)
        >>> loss(torch.eye(4), torch.eye(4), target=torch.arange(4)).item()  # no two of one identity
        0.0
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self,
        *,
        least_margin: float = 0.2,
        most_margin: float = 0.5,
        distance: Distance = "squared",
        mining: Mining = "hardest",
        gather: bool = False,
    ) -> None:
        super().__init__()
        _check_arguments("TripletDistillLoss", least_margin, most_margin, distance, mining)
        self.least_margin, self.most_margin = float(least_margin), float(most_margin)
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
        """The loss of `student` `(b, d)` against `teacher` `(b, D)`, of identities `(b,)` or triplets `(t, 3)`."""
        return triplet_distill(
            student,
            teacher,
            target=target,
            least_margin=self.least_margin,
            most_margin=self.most_margin,
            distance=self.distance,
            mining=self.mining,
            gather=self.gather,
            reduction=reduction or "mean",
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return (
            f"least_margin={self.least_margin}, most_margin={self.most_margin}, distance={self.distance!r}, "
            f"mining={self.mining!r}, gather={self.gather}"
        )


def _check_arguments(owner: str, least: float, most: float, distance: str, mining: str) -> None:
    largest = math.pi if distance == "angle" else 4
    check_choice(owner, "distance", distance, DISTANCES)
    check_choice(owner, "mining", mining, MININGS)
    check_number(owner, "least_margin", least, min=0, max=largest)
    check_number(owner, "most_margin", most, min=least, max=largest)
