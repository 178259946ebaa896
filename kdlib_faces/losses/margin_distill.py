"""Faces losses: MarginDistillation, the teacher's centers and a margin by its own confidence. Touches tensors only.

Svitov and Alyamkin, MarginDistillation, 2020: the student classifies by the teacher's class weights, and by a wider
margin where the teacher itself is close to the center.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_choice,
    check_floating,
    check_number,
    check_pair,
    check_rank,
    check_shape,
    check_weight,
    check_whole_numbers,
)
from kdlib._maths import REDUCTIONS, full_precision, unit_rows
from kdlib_faces._checks import check_class_centers, check_every_identity, check_identities, check_set
from kdlib_faces.heads._margin import Reduction, softmax_loss, unit_pair

__all__ = ["MarginDistillLoss", "centers_from", "margin_distill"]


def margin_distill(
    student: Tensor,
    teacher: Tensor,
    centers: Tensor,
    *,
    target: Tensor,
    scale: float = 64.0,
    least_margin: float = 0.2,
    most_margin: float = 0.5,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""ArcFace on the teacher's frozen centers, each sample's margin by how close the teacher puts it to its center.

    With :math:`W_j` the teacher's center of identity j, y the identity of sample i, and :math:`\theta_j` the angle
    between the student's embedding and :math:`W_j`,

    .. math:: m_i = (M_{\max} - M_{\min}) \frac{d_i}{\max_k d_k} + M_{\min}, \qquad d_i = \max(\cos(t_i, W_y), 0)

    .. math:: L_i = -\log \frac{e^{s\,\psi(\theta_y, m_i)}}{e^{s\,\psi(\theta_y, m_i)} + \sum_{j \ne y} e^{s
              \cos\theta_j}}

    with :math:`\psi(\theta, m) = \cos(\theta + m)`, and its straight continuation beyond :math:`\pi - m`, exactly as in
    `kdlib_faces.heads.arcface_loss`. The maximum is over the samples of this call with a weight above 0; a sample's
    loss so depends on its batch, and each process of a distributed run takes the maximum of its own. Where no teacher
    cosine is above 0 every margin is the least one. Equal margins give ArcFace on frozen centers.

    Args:
        student: embeddings `(b, d)`, of any length. One of zeros counts as at a right angle to every center, and gets
            no gradient.
        teacher: embeddings of the same shape, in the space of `centers`; never receives a gradient.
        centers: the teacher's class weights `(n, d)`, of any length; never receive a gradient.
        target: identities `(b,)`, whole numbers from 0 to n - 1.
        scale: s, factor on the cosines.
        least_margin: :math:`M_{\min}`, in radians, from 0 to pi.
        most_margin: :math:`M_{\max}`, in radians, from `least_margin` to pi.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64, under autocast too.

    Raises:
        ValueError: shapes that do not fit, an identity out of range, a margin out of range, an unknown reduction.
        TypeError: embeddings that are not floating point, identities that are not whole numbers.

    Examples:
        >>> import torch
        >>> centers, target = torch.eye(2), torch.tensor([0, 1])
        >>> teacher = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # cosines to the own center 1 and 0.8
        >>> losses = margin_distill(centers, teacher, centers, target=target, scale=4.0, reduction="none")
        >>> [round(loss, 4) for loss in losses.tolist()]  # margins 0.5 and 0.44
        [0.0294, 0.0265]

    References:
        Svitov, Alyamkin, *MarginDistillation: distillation for margin-based softmax*, arXiv 2003.02586; the centers
        are the teacher's and stay frozen. A negative :math:`d_i` counts as 0 here, which keeps every margin in its
        bounds; the formula as published has no such bound. Arc cosines are never differentiated: the gradient is
        exact and finite at every angle.
    """
    owner = "margin_distill"
    check_pair(owner, student, teacher, "b d")
    check_floating(owner, centers=centers)
    check_shape(owner, "centers", centers, "n d", d=student.shape[1])
    check_identities(owner, target, student.shape[0], centers.shape[0])
    check_weight(owner, weight, student.shape[0])
    _check_margins(owner, scale, least_margin, most_margin)
    target = target.to(student.device).long()
    with full_precision(student):
        s_bd, c_nd = unit_pair(student, centers.detach(), scale)
        own_bd = c_nd[target]
        d = (unit_rows(teacher.detach().to(s_bd.dtype))[0] * own_bd).sum(1).clamp(min=0)
        counted = d if weight is None else torch.where(weight > 0, d, 0.0)
        largest = counted.amax() if len(d) else d.sum()
        share = torch.where(largest > 0, d / torch.where(largest > 0, largest, 1.0), 0.0).clamp(max=1)
        margin = (most_margin - least_margin) * share + least_margin

        cosine = (s_bd * own_bd).sum(1)
        directed = (s_bd.detach() != 0).any(1)
        sine = torch.where(directed, torch.linalg.vector_norm(s_bd - cosine.unsqueeze(1) * own_bd, dim=1), 1.0)
        inside = cosine * margin.cos() - sine * margin.sin()
        moved = torch.where(cosine >= -margin.cos(), inside, cosine + margin.cos() - 1)
        return softmax_loss(owner, s_bd @ c_nd.T, moved, target, scale, reduction, weight)


def centers_from(embeddings: Tensor, identities: Tensor, *, num_identities: int | None = None) -> Tensor:
    """The center of each identity: the direction of the mean of its embeddings, each of unit length first.

    Stands in for a teacher's class weights where these were not kept.

    Args:
        embeddings: `(n, d)`, of any length, without gradient; a row of zeros does not count.
        identities: `(n,)`, whole numbers from 0.
        num_identities: how many identities there are; `None`: the largest plus one.

    Returns:
        `(num_identities, d)`, rows of unit length, float32 or float64.

    Raises:
        ValueError: shapes that do not fit, or an identity without any embedding.
        TypeError: embeddings that are not floating point, identities that are not whole numbers.

    Examples:
        >>> import torch
        >>> centers_from(torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 5.0]]), torch.tensor([0, 0, 1]))
        tensor([[0.7071, 0.7071],
                [0.0000, 1.0000]])
    """
    check_floating("centers_from", embeddings=embeddings)
    check_rank("centers_from", "embeddings", embeddings, "n d")
    check_whole_numbers("centers_from", "identities", identities, embeddings.shape[0])
    identities = identities.to(embeddings.device).long()
    if num_identities is None:
        num_identities = int(identities.max()) + 1 if len(identities) else 0
    check_number("centers_from", "num_identities", num_identities, min=0, integer=True)
    check_identities("centers_from", identities, embeddings.shape[0], num_identities)
    with torch.no_grad(), full_precision(embeddings):
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        sums = torch.zeros(num_identities, embeddings.shape[1], dtype=dtype, device=embeddings.device)
        # In parts, so that a whole training set is not copied.
        for part, own in zip(torch.split(embeddings, 2**15), torch.split(identities, 2**15), strict=True):
            sums.index_add_(0, own, unit_rows(part.to(dtype))[0])
        check_every_identity("centers_from", sums.any(1))
        return unit_rows(sums)[0]


class MarginDistillLoss(nn.Module):
    """`margin_distill` with the teacher's centers as a buffer; the formula and the arguments are there.

    In a `Term` it reads the identities as `target`: `Term(MarginDistillLoss(n, 512, centers=w), student="embedding",
    teacher="embedding", target="identity")`. The centers are one teacher's: use one such term for each teacher. A term
    weighs samples after the loss, so one that its `sample_weight` masks still counts in the largest cosine.

    Args:
        num_identities: identities n of the training set.
        embedding_dim: dimensions d of the teacher's embeddings, and of the student's.
        scale: factor on the cosines.
        least_margin: in radians, from 0 to pi.
        most_margin: in radians, from `least_margin` to pi.
        centers: the teacher's class weights `(n, d)`; `None`: set them by `set_centers` or `centers_from` before the
            first loss.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Attributes:
        centers: buffer `(n, d)`, part of the state dict, rows of unit length; zeros until set.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of a wrong type.

    Examples:
        >>> import torch
        >>> loss = MarginDistillLoss(3, 8, centers=torch.ones(3, 8))
        >>> loss
        MarginDistillLoss(num_identities=3, embedding_dim=8, scale=64.0, least_margin=0.2, most_margin=0.5,
        reduction='mean')
        >>> loss(torch.ones(2, 8), torch.ones(2, 8), target=torch.tensor([0, 2])).shape
        torch.Size([])
    """

    per_sample: ClassVar[bool] = True
    centers: Tensor

    def __init__(
        self,
        num_identities: int,
        embedding_dim: int,
        *,
        scale: float = 64.0,
        least_margin: float = 0.2,
        most_margin: float = 0.5,
        centers: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_number("MarginDistillLoss", "num_identities", num_identities, min=1, integer=True)
        check_number("MarginDistillLoss", "embedding_dim", embedding_dim, min=1, integer=True)
        _check_margins("MarginDistillLoss", scale, least_margin, most_margin)
        check_choice("MarginDistillLoss", "reduction", reduction, REDUCTIONS)
        self.num_identities, self.embedding_dim = num_identities, embedding_dim
        self.scale, self.least_margin, self.most_margin = float(scale), float(least_margin), float(most_margin)
        self.reduction = reduction
        self.register_buffer("centers", torch.zeros(num_identities, embedding_dim))
        self._ready = False
        if centers is not None:
            self.set_centers(centers)

    @torch.no_grad()
    def set_centers(self, centers: Tensor) -> None:
        """Take the teacher's class weights `(n, d)`, of any length but zero."""
        check_class_centers("MarginDistillLoss", centers, self.num_identities, self.embedding_dim)
        self.centers.copy_(unit_rows(centers.to(torch.promote_types(centers.dtype, torch.float32)))[0])
        self._ready = True

    def centers_from(self, embeddings: Tensor, identities: Tensor) -> None:
        """Estimate the centers from teacher embeddings `(m, d)` of `identities` `(m,)`, which hold every identity."""
        self.set_centers(centers_from(embeddings, identities, num_identities=self.num_identities))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, d)` against `teacher`, of identities `target` `(b,)`."""
        check_set("MarginDistillLoss", self._ready)
        return margin_distill(
            student,
            teacher,
            self.centers,
            target=target,
            scale=self.scale,
            least_margin=self.least_margin,
            most_margin=self.most_margin,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss, its centers left out."""
        return (
            f"num_identities={self.num_identities}, embedding_dim={self.embedding_dim}, scale={self.scale}, "
            f"least_margin={self.least_margin}, most_margin={self.most_margin}, reduction={self.reduction!r}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = bool(self.centers.any())


def _check_margins(owner: str, scale: float, least: float, most: float) -> None:
    check_number(owner, "scale", scale, above=0)
    check_number(owner, "least_margin", least, min=0, max=math.pi)
    check_number(owner, "most_margin", most, min=least, max=math.pi)
