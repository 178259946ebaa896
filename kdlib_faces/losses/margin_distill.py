"""MarginDistillation: ArcFace on the teacher's centers with a margin per sample (Svitov and Alyamkin, 2020)."""

import math
from typing import Any

import torch
from torch import Tensor

from kdlib._checks import (
    check_floating,
    check_number,
    check_pair,
    check_rank,
    check_shape,
    check_weight,
    check_whole_numbers,
)
from kdlib._maths import Reduction, full_precision, unit_rows
from kdlib_faces._checks import check_class_centers, check_every_identity, check_identities, check_set
from kdlib_faces.heads._margin import LossModule, add_angular_margin, softmax_loss, unit_pair

__all__ = ["MarginDistillLoss", "centers_from", "margin_distill"]


def margin_distill(
    student: Tensor,
    teacher: Tensor,
    centers: Tensor,
    *,
    target: Tensor,
    scale: float = 64.0,
    min_margin: float = 0.2,
    max_margin: float = 0.5,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""ArcFace on the teacher's frozen centers, with a larger margin for samples that the teacher puts closer to the center.

    With :math:`W_j` the teacher's center of identity j, y the identity of sample i, and :math:`\theta_j` the angle
    between the student's embedding and :math:`W_j`,

    .. math:: m_i = (M_{\max} - M_{\min}) \frac{d_i}{\max_k d_k} + M_{\min}, \qquad d_i = \max(\cos(t_i, W_y), 0)

    .. math:: L_i = -\log \frac{e^{s\,\psi(\theta_y, m_i)}}{e^{s\,\psi(\theta_y, m_i)} + \sum_{j \ne y} e^{s
              \cos\theta_j}}

    with :math:`\psi(\theta, m) = \cos(\theta + m)`, and its linear continuation beyond :math:`\pi - m`, as in
    `kdlib_faces.heads.arcface_loss`. The maximum is over the samples of the call with a weight above 0. The loss of a
    sample therefore depends on its batch, and each process of a distributed run uses its own maximum. If no teacher
    cosine is above 0, all margins are the minimum. Equal margins give ArcFace on frozen centers.

    Args:
        student: embeddings `(b, d)`, not necessarily normalized. A zero embedding has cosine 0 to every center and gets
            no gradient.
        teacher: embeddings of the same shape, in the space of `centers`; gets no gradient.
        centers: the teacher's class weights `(n, d)`, not necessarily normalized; get no gradient.
        target: identities `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        min_margin: :math:`M_{\min}`, in radians, from 0 to pi.
        max_margin: :math:`M_{\max}`, in radians, from `min_margin` to pi.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight per sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 for float64 inputs, also under autocast.

    Raises:
        ValueError: mismatched shapes, an identity out of range, a margin out of range, an unknown reduction.
        TypeError: embeddings that are not floating point, identities that are not integers.

    Examples:
        >>> import torch
        >>> centers, target = torch.eye(2), torch.tensor([0, 1])
        >>> teacher = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # cosines to the target centers: 1 and 0.8
        >>> losses = margin_distill(centers, teacher, centers, target=target, scale=4.0, reduction="none")
        >>> [round(loss, 4) for loss in losses.tolist()]  # margins 0.5 and 0.44
        [0.0294, 0.0265]

    References:
        Svitov, Alyamkin, *MarginDistillation: distillation for margin-based softmax*, arXiv 2003.02586; the centers
        are the teacher's and frozen. A negative :math:`d_i` is clamped to 0 here, which keeps every margin within its
        bounds; the published formula has no such bound. No arc cosine is differentiated, so the gradient is exact and
        finite at every angle.
    """
    owner = "margin_distill"
    check_pair(owner, student, teacher, "b d")
    check_floating(owner, centers=centers)
    check_shape(owner, "centers", centers, "n d", d=student.shape[1])
    check_identities(owner, target, student.shape[0], centers.shape[0])
    check_weight(owner, weight, student.shape[0])
    _check_margins(owner, scale, min_margin, max_margin)
    scale, min_margin, max_margin = float(scale), float(min_margin), float(max_margin)
    target = target.to(student.device).long()
    with full_precision(student):
        s_bd, c_nd = unit_pair(student, centers.detach(), scale)
        center_bd = c_nd[target]
        d = (unit_rows(teacher.detach().to(s_bd.dtype))[0] * center_bd).sum(1).clamp(min=0)
        counted = d if weight is None else torch.where(weight > 0, d, 0.0)
        largest = counted.amax() if len(d) else d.sum()
        share = torch.where(largest > 0, d / torch.where(largest > 0, largest, 1.0), 0.0).clamp(max=1)
        margin = (max_margin - min_margin) * share + min_margin
        target_cosine = add_angular_margin(s_bd, center_bd, margin.cos(), margin.sin())
        return softmax_loss(owner, s_bd @ c_nd.T, target_cosine, target, scale, reduction, weight)


def centers_from(embeddings: Tensor, identities: Tensor, *, num_identities: int | None = None) -> Tensor:
    """Estimate the center of each identity: the direction of the mean of its normalized embeddings.

    Replaces a teacher's class weights if these are not available.

    Args:
        embeddings: `(n, d)`, not necessarily normalized, without gradient; zero rows are ignored.
        identities: `(n,)`, integers from 0.
        num_identities: number of identities; `None` for the largest plus one.

    Returns:
        `(num_identities, d)`, normalized rows, float32 or float64.

    Raises:
        ValueError: mismatched shapes, or an identity without any embedding.
        TypeError: embeddings that are not floating point, identities that are not integers.

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
    num_identities = check_number("centers_from", "num_identities", num_identities, min=0, integer=True)
    check_identities("centers_from", identities, embeddings.shape[0], num_identities)
    with torch.no_grad(), full_precision(embeddings):
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        sums = torch.zeros(num_identities, embeddings.shape[1], dtype=dtype, device=embeddings.device)
        # In chunks, so that a whole training set is not copied.
        for part, ids in zip(torch.split(embeddings, 2**15), torch.split(identities, 2**15), strict=True):
            sums.index_add_(0, ids, unit_rows(part.to(dtype))[0])
        check_every_identity("centers_from", sums.any(1))
        return unit_rows(sums)[0]


class MarginDistillLoss(LossModule):
    """`margin_distill` with the teacher's centers as a buffer; see the function for the formula and the arguments.

    In a `Term` the identities are the `target`: `Term(MarginDistillLoss(n, 512, centers=w), student="embedding",
    teacher="embedding", target="identity")`. The centers belong to one teacher, so use one such term per teacher. A
    term applies its `sample_weight` after the loss, so masked samples still count in the maximum cosine.

    Args:
        num_identities: number n of training identities.
        embedding_dim: dimensions d of the teacher's embeddings, and of the student's.
        scale: factor of the cosines.
        min_margin: in radians, from 0 to pi.
        max_margin: in radians, from `min_margin` to pi.
        centers: the teacher's class weights `(n, d)`; `None` if `set_centers` or `centers_from` is called before the
            first loss.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Attributes:
        centers: buffer `(n, d)`, part of the state dict, with normalized rows; zeros until set.

    Examples:
        >>> import torch
        >>> loss = MarginDistillLoss(3, 8, centers=torch.ones(3, 8))
        >>> loss
        MarginDistillLoss(num_identities=3, embedding_dim=8, scale=64.0, min_margin=0.2, max_margin=0.5,
        reduction='mean')
        >>> loss(torch.ones(2, 8), torch.ones(2, 8), target=torch.tensor([0, 2])).shape
        torch.Size([])
    """

    centers: Tensor

    def __init__(
        self,
        num_identities: int,
        embedding_dim: int,
        *,
        scale: float = 64.0,
        min_margin: float = 0.2,
        max_margin: float = 0.5,
        centers: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self._set_sizes(embedding_dim, num_identities, scale, reduction)
        _check_margins("MarginDistillLoss", scale, min_margin, max_margin)
        self.min_margin, self.max_margin = float(min_margin), float(max_margin)
        self.register_buffer("centers", torch.zeros(self.num_identities, self.embedding_dim))
        self._ready = False
        if centers is not None:
            self.set_centers(centers)

    @torch.no_grad()
    def set_centers(self, centers: Tensor) -> None:
        """Set the centers to the teacher's class weights `(n, d)`, whose rows must not be zero."""
        check_class_centers("MarginDistillLoss", centers, self.num_identities, self.embedding_dim)
        self.centers.copy_(unit_rows(centers.to(torch.promote_types(centers.dtype, torch.float32)))[0])
        self._ready = True

    def centers_from(self, embeddings: Tensor, identities: Tensor) -> None:
        """Estimate the centers from teacher embeddings `(m, d)` of `identities` `(m,)`; every identity must occur."""
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
        """Return the loss of `student` `(b, d)` against `teacher`, of identities `target` `(b,)`."""
        check_set("MarginDistillLoss", self._ready)
        return margin_distill(
            student, teacher, self.centers, target=target, scale=self.scale, min_margin=self.min_margin,
            max_margin=self.max_margin, reduction=reduction or self.reduction, weight=weight,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = bool(self.centers.any())


def _check_margins(owner: str, scale: float, low: float, high: float) -> None:
    check_number(owner, "scale", scale, above=0)
    check_number(owner, "min_margin", low, min=0, max=math.pi)
    check_number(owner, "max_margin", high, min=low, max=math.pi)
