"""AdaDistill: margin softmax on class centers that adapt to the student (Boutros et al., 2024)."""

import math
from typing import Literal

import torch
from torch import Tensor

from kdlib._checks import (
    check_choice,
    check_finite,
    check_floating,
    check_number,
    check_pair,
    check_shape,
    check_weight,
)
from kdlib._maths import Reduction, full_precision, promoted_dtype, unit_rows
from kdlib_faces._checks import check_identities
from kdlib_faces.heads._margin import LossModule
from kdlib_faces.heads.arcface import arcface_loss
from kdlib_faces.heads.cosface import cosface_loss
from kdlib_faces.losses._whole_batch import whole_batch

__all__ = ["AdaptiveCentersLoss", "adapted_centers"]

MARGINS = {"arcface": 0.45, "cosface": 0.35}
MIN_COSINE = 1e-6


@torch.no_grad()
def adapted_centers(
    student: Tensor, teacher: Tensor, centers: Tensor, *, target: Tensor, weight: Tensor | None = None
) -> Tensor:
    r"""Return the center of each sample's identity after one batch.

    With :math:`w_y` the center of identity y, :math:`\hat t_i` the teacher's embedding of unit length and
    :math:`[x]` denoting x clamped to [1e-6, 1],

    .. math:: w_y \leftarrow \operatorname*{mean}_{i:\, y_i = y} \bigl(\alpha_i w_y + (1 - \alpha_i)\, \hat t_i \bigr),
              \qquad \alpha_i = \bigl[\cos(s_i, t_i) \, [\cos(w_y, t_i)]\bigr]

    The mean is over all samples of the identity in the batch, each with the center before the batch. One sample gives
    the published step, and the result does not depend on the order or the distribution of a batch over processes. If
    student and teacher agree on a sample close to the center, the center moves little. Centers are not normalized; a
    zero center belongs to an identity without samples so far and is replaced by its first samples.

    Args:
        student: embeddings `(b, d)`, not necessarily normalized; gets no gradient.
        teacher: embeddings of the same shape. A sample with a zero teacher embedding, or with a non-finite value on
            either side, is ignored.
        centers: `(n, d)`; not changed.
        target: identities `(b,)`, integers from 0 to n - 1.
        weight: `(b,)`; samples with weight 0 are ignored, all others count equally.

    Returns:
        `(b, d)` with equal rows for samples of one identity, so that `centers[target] = adapted_centers(...)` is the
        step. Float32, or float64 if given float64.

    Raises:
        ValueError: mismatched shapes, or an identity out of range.
        TypeError: embeddings that are not floating point, identities that are not integers.

    Examples:
        >>> import torch
        >>> centers = torch.tensor([[1.0, 0.0]])
        >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> adapted_centers(student, teacher, centers, target=torch.tensor([0]))  # alpha is 0.6 * 0.6
        tensor([[0.7440, 0.5120]])
    """
    owner = "adapted_centers"
    check_pair(owner, student, teacher, "b d")
    check_floating(owner, centers=centers)
    check_shape(owner, "centers", centers, "n d", d=student.shape[1])
    check_identities(owner, target, student.shape[0], centers.shape[0])
    check_weight(owner, weight, student.shape[0])
    target = target.to(student.device).long()
    with full_precision(student):
        dtype = promoted_dtype(student, teacher)
        own_bd = centers[target].to(dtype)
        if not len(target):
            return own_bd
        s_bd, t_bd, w_bd = (unit_rows(x.to(dtype))[0] for x in (student, teacher, own_bd))
        alpha = ((s_bd * t_bd).sum(1) * (w_bd * t_bd).sum(1).clamp(MIN_COSINE, 1)).clamp(MIN_COSINE, 1)
        counts = alpha.isfinite() & t_bd.any(1)
        if weight is not None:
            counts = counts & (weight > 0)
        step_bd = torch.where(counts.unsqueeze(1), (1 - alpha).unsqueeze(1) * (t_bd - own_bd), 0.0)
        same_bb = target.unsqueeze(1) == target.unsqueeze(0)
        number = (same_bb & counts).sum(1, keepdim=True).clamp(min=1)
        moved_bd = own_bd + same_bb.to(dtype) @ step_bd / number
        # Rows of one identity may differ in the last bit, so all use the first one.
        positions = torch.arange(len(target), device=target.device)
        return moved_bd[torch.where(same_bb, positions, len(target)).amin(1)]


class AdaptiveCentersLoss(LossModule):
    """ArcFace or CosFace of the student on centers that `adapted_centers` updates.

    In training mode each batch first updates the centers and then classifies the student by them; only the student is
    learned. In eval mode the centers are fixed. An identity without a center has cosine 0 to every embedding.

    The centers are in the space of one teacher, so use one such term per teacher, with a projection of the student if
    necessary. In a `Term` the identities are the `target`: `Term(AdaptiveCentersLoss(n, 512),
    student="embedding", teacher="embedding", target="identity")`. A term applies its `sample_weight`
    after the loss, so masked samples still update the centers; samples masked by `weight` here do not.

    Args:
        num_identities: number n of training identities.
        embedding_dim: dimensions d of the teacher's embeddings, and of the student's.
        head: `"arcface"` or `"cosface"`.
        scale: factor of the cosines.
        margin: `None` for the paper's, 0.45 radians with `"arcface"` and 0.35 with `"cosface"`.
        centers: initial centers `(n, d)`, not necessarily normalized; `None` for no centers.
        gather: update the centers with the samples of all processes, so that all processes have the same centers;
            without it each process uses its own samples.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Attributes:
        centers: buffer `(n, d)`, part of the state dict.

    Examples:
        >>> import torch
        >>> loss = AdaptiveCentersLoss(3, 2)
        >>> loss
        AdaptiveCentersLoss(num_identities=3, embedding_dim=2, head='arcface', scale=64.0, margin=0.45,
        gather=True, reduction='mean')
        >>> teacher = torch.tensor([[0.0, 5.0]])
        >>> value = loss(torch.tensor([[1.0, 0.0]]), teacher, target=torch.tensor([2]))
        >>> loss.centers[2]
        tensor([0.0000, 1.0000])

    References:
        Boutros, Štruc, Damer, *AdaDistill: Adaptive Knowledge Distillation for Deep Face Recognition*, ECCV 2024, arXiv
        2407.01332. The authors' code assigns the centers by index, so that only one of several samples of an identity
        in a batch counts, and each process has its own centers; here the mean of all samples is used.
    """

    centers: Tensor

    def __init__(
        self,
        num_identities: int,
        embedding_dim: int,
        *,
        head: Literal["arcface", "cosface"] = "arcface",
        scale: float = 64.0,
        margin: float | None = None,
        centers: Tensor | None = None,
        gather: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        owner = "AdaptiveCentersLoss"
        self._set_sizes(embedding_dim, num_identities, scale, reduction)
        check_choice(owner, "head", head, tuple(MARGINS))
        if margin is not None:
            check_number(owner, "margin", margin, min=0, max=math.pi if head == "arcface" else None)
        self.head, self.margin = head, MARGINS[head] if margin is None else float(margin)
        self.gather = gather
        self.register_buffer("centers", torch.zeros(self.num_identities, self.embedding_dim))
        if centers is not None:
            check_floating(owner, centers=centers)
            check_shape(owner, "centers", centers, "n d", n=num_identities, d=embedding_dim)
            check_finite(owner, centers=centers)
            self.centers.copy_(unit_rows(centers.detach().to(torch.promote_types(centers.dtype, torch.float32)))[0])

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Return the loss of `student` `(b, d)` of identities `target` `(b,)`; in training mode `teacher` updates the centers.

        `reduction=None` uses that of the constructor.
        """
        owner = "AdaptiveCentersLoss"
        check_pair(owner, student, teacher, "b d")
        check_shape(owner, "student", student, "b d", d=self.embedding_dim)
        check_identities(owner, target, student.shape[0], self.num_identities)
        check_weight(owner, weight, student.shape[0])
        target = target.to(student.device).long()
        if self.training:
            batch = (student.detach(), teacher.detach(), target, weight)
            s_bd, t_bd, own, counted = whole_batch(*batch, grad=False) if self.gather else batch
            with torch.no_grad():
                moved_bd = adapted_centers(s_bd, t_bd, self.centers, target=own, weight=counted)
                self.centers[own] = moved_bd.to(self.centers.dtype)
        face = arcface_loss if self.head == "arcface" else cosface_loss
        return face(
            student, self.centers, target, scale=self.scale, margin=self.margin,
            reduction=reduction or self.reduction, weight=weight,
        )  # fmt: skip
