"""Faces losses: AdaDistill, class centers that follow the teacher as fast as the student can. Touches tensors only.

Boutros, Štruc and Damer, AdaDistill, 2024: a margin softmax on running means of the teacher's embeddings, near the
single embedding while the student is far from the teacher, and near the center once it is close.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_choice,
    check_finite,
    check_floating,
    check_number,
    check_pair,
    check_shape,
    check_weight,
)
from kdlib._maths import REDUCTIONS, full_precision, unit_rows
from kdlib_faces._checks import check_identities
from kdlib_faces.heads._margin import Reduction
from kdlib_faces.heads.arcface import arcface_loss
from kdlib_faces.heads.cosface import cosface_loss
from kdlib_faces.losses._whole_batch import whole_batch

__all__ = ["AdaptiveCentersLoss", "adapted_centers"]

MARGINS = {"arcface": 0.45, "cosface": 0.35}
LEAST = 1e-6


@torch.no_grad()
def adapted_centers(
    student: Tensor, teacher: Tensor, centers: Tensor, *, target: Tensor, weight: Tensor | None = None
) -> Tensor:
    r"""The center of each sample's identity after one batch.

    With :math:`w_y` the center of identity y, :math:`\hat t_i` the teacher's embedding of unit length and
    :math:`[x]` for x held between 1e-6 and 1,

    .. math:: w_y \leftarrow \operatorname*{mean}_{i:\, y_i = y} \bigl(\alpha_i w_y + (1 - \alpha_i)\, \hat t_i \bigr),
              \qquad \alpha_i = \bigl[\cos(s_i, t_i) \, [\cos(w_y, t_i)]\bigr]

    The mean is over all samples of the identity in the batch, each against the center as it was before: one sample
    gives the published step, and neither the order nor the split of a batch over processes counts. A student like its
    teacher, on a sample that the center already stands for, moves it little. Centers are not brought to unit length:
    one of zeros stands for an identity not seen yet, which its first samples replace.

    Args:
        student: embeddings `(b, d)`, of any length; no gradient flows.
        teacher: embeddings of the same shape. A sample whose teacher embedding is zero, or that has a value that is not
            finite on either side, moves nothing.
        centers: `(n, d)`; not changed.
        target: identities `(b,)`, whole numbers from 0 to n - 1.
        weight: `(b,)`; samples of weight 0 move nothing, others count alike.

    Returns:
        `(b, d)`, equal rows for samples of one identity, so that `centers[target] = adapted_centers(...)` is the step.
        Float32, or float64 if given float64.

    Raises:
        ValueError: shapes that do not fit, or an identity out of range.
        TypeError: embeddings that are not floating point, identities that are not whole numbers.

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
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        own_bd = centers[target].to(dtype)
        if not len(target):
            return own_bd
        s_bd, t_bd, w_bd = (unit_rows(x.to(dtype))[0] for x in (student, teacher, own_bd))
        alpha = ((s_bd * t_bd).sum(1) * (w_bd * t_bd).sum(1).clamp(LEAST, 1)).clamp(LEAST, 1)
        counts = alpha.isfinite() & t_bd.any(1)
        if weight is not None:
            counts = counts & (weight > 0)
        step_bd = torch.where(counts.unsqueeze(1), (1 - alpha).unsqueeze(1) * (t_bd - own_bd), 0.0)
        same_bb = target.unsqueeze(1) == target.unsqueeze(0)
        number = (same_bb & counts).sum(1, keepdim=True).clamp(min=1)
        moved_bd = own_bd + same_bb.to(dtype) @ step_bd / number
        # Rows of one identity may differ in the last bit; all take the first one's.
        places = torch.arange(len(target), device=target.device)
        return moved_bd[torch.where(same_bb, places, len(target)).amin(1)]


class AdaptiveCentersLoss(nn.Module):
    """ArcFace or CosFace of the student on centers that `adapted_centers` moves; the step is described there.

    In training mode each batch moves the centers, and then the student is classified by them; nothing else is learned
    but the student. In evaluation mode the centers stay. Where an identity has no center yet it stands at a right
    angle to every embedding.

    The centers live in one teacher's space, which the student's embeddings enter, by a projection if need be: use one
    such term for each teacher. In a `Term` the identities are the `target`: `Term(AdaptiveCentersLoss(n, 512),
    student="embedding", teacher="embedding", target="identity")`. A term weighs samples after the loss, so one that its
    `sample_weight` masks still moves the centers; `weight` here does not let it.

    Args:
        num_identities: identities n of the training set.
        embedding_dim: dimensions d of the teacher's embeddings, and of the student's.
        head: `"arcface"` or `"cosface"`.
        scale: factor on the cosines.
        margin: `None` for the paper's, 0.45 radians with `"arcface"` and 0.35 with `"cosface"`.
        centers: the first centers `(n, d)`, of any length; `None` for none yet.
        gather: move the centers by the samples of all processes, so that all hold the same ones; without it each
            follows its own samples.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Attributes:
        centers: buffer `(n, d)`, part of the state dict.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of a wrong type.

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
        2407.01332. The authors' code writes the centers by index, so that of several samples of one identity in a batch
        one alone counts, and each process keeps centers of its own; here all count, by their mean.
    """

    per_sample: ClassVar[bool] = True
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
        check_number(owner, "num_identities", num_identities, min=1, integer=True)
        check_number(owner, "embedding_dim", embedding_dim, min=1, integer=True)
        check_choice(owner, "head", head, tuple(MARGINS))
        check_number(owner, "scale", scale, above=0)
        if margin is not None:
            check_number(owner, "margin", margin, min=0, max=math.pi if head == "arcface" else None)
        check_choice(owner, "reduction", reduction, REDUCTIONS)
        self.num_identities, self.embedding_dim, self.head = num_identities, embedding_dim, head
        self.scale, self.margin = float(scale), MARGINS[head] if margin is None else float(margin)
        self.gather, self.reduction = gather, reduction
        self.register_buffer("centers", torch.zeros(num_identities, embedding_dim))
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
        """The loss of `student` `(b, d)` of identities `target` `(b,)`; in training mode `teacher` moves the centers.

        `reduction=None` means the constructor's.
        """
        owner = "AdaptiveCentersLoss"
        check_pair(owner, student, teacher, "b d")
        check_shape(owner, "student", student, "b d", d=self.embedding_dim)
        check_identities(owner, target, student.shape[0], self.num_identities)
        check_weight(owner, weight, student.shape[0])
        target = target.to(student.device).long()
        if self.training:
            self._move(student.detach(), teacher.detach(), target, weight)
        face = arcface_loss if self.head == "arcface" else cosface_loss
        return face(
            student,
            self.centers,
            target,
            scale=self.scale,
            margin=self.margin,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    @torch.no_grad()
    def _move(self, student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor | None) -> None:
        """One step of the centers of the batch's identities."""
        if self.gather:
            student, teacher, target, weight = whole_batch(student, teacher, target, weight, grad=False)
        moved = adapted_centers(student, teacher, self.centers, target=target, weight=weight)
        self.centers[target] = moved.to(self.centers.dtype)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss, its centers left out."""
        return (
            f"num_identities={self.num_identities}, embedding_dim={self.embedding_dim}, head={self.head!r}, "
            f"scale={self.scale}, margin={self.margin}, gather={self.gather}, "
            f"reduction={self.reduction!r}"
        )
