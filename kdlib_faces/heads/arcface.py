"""Heads room: ArcFace, an additive angular margin. Touches embeddings, class centers and identities only.

Deng et al., ArcFace, 2019: turn each embedding away from its class center by an angle before the softmax.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib._maths import full_precision
from kdlib_faces.heads._margin import Reduction, check_call, check_head, softmax_loss, unit_pair

__all__ = ["ArcFaceHead", "arcface_loss"]


def arcface_loss(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.5,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy over cosines, the own identity's angle enlarged by a margin.

    With :math:`\theta_j` the angle between an embedding and the center of identity j, y its own identity, s the scale
    and m the margin, the loss of one sample is

    .. math:: -\log \frac{e^{s\,\psi(\theta_y)}}{e^{s\,\psi(\theta_y)} + \sum_{j \ne y} e^{s \cos\theta_j}}, \qquad
              \psi(\theta) = \begin{cases} \cos(\theta + m) & \theta \le \pi - m \\
              \cos\theta + \cos m - 1 & \theta > \pi - m \end{cases}

    Beyond :math:`\pi - m` the first form would rise again and reward a worse embedding; the second one falls on, and
    meets the first without a jump. :math:`\cos(\theta + m)` is taken as :math:`\cos\theta \cos m - \sin\theta \sin m`
    with the sine as the length of the embedding's part across the center. So no arc cosine and no root of
    :math:`1 - \cos^2` is differentiated: the gradient is the exact one and is finite at every angle.

    Args:
        embeddings: `(b, d)`, of any length. One of zeros counts as at a right angle to every center, and gets no
            gradient.
        centers: `(n, d)`, one row an identity, of any length.
        identities: `(b,)`, whole numbers from 0 to n - 1.
        scale: s, factor on the cosines.
        margin: m, in radians, from 0 to pi.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64, under autocast too.

    Raises:
        ValueError: shapes that do not fit, an identity out of range, an unknown reduction.
        TypeError: embeddings that are not floating point, identities that are not whole numbers.

    Examples:
        >>> import torch
        >>> centers = torch.eye(2)
        >>> identities = torch.tensor([0, 1])
        >>> plain = arcface_loss(centers, centers, identities, scale=4.0, margin=0.0)
        >>> hard = arcface_loss(centers, centers, identities, scale=4.0, margin=0.5)
        >>> round(plain.item(), 4), round(hard.item(), 4)
        (0.0181, 0.0294)

    References:
        Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
        arXiv:1801.07698. Where we differ from other code: insightface's PyTorch head has no branch beyond
        :math:`\pi - m` and passes the gradient straight through the margin, so with factor s whatever the angle; heads
        that differentiate an arc cosine have an infinite gradient at 0 and pi.
    """
    check_call("arcface_loss", embeddings, centers, identities)
    identities = identities.long()
    with full_precision(embeddings):
        e_bd, c_nd = unit_pair(embeddings, centers, scale)
        own_bd = c_nd[identities]
        cosine = (e_bd * own_bd).sum(1)
        across_bd = e_bd - cosine.unsqueeze(1) * own_bd
        directed = (e_bd.detach() != 0).any(1)
        sine = torch.where(directed, torch.linalg.vector_norm(across_bd, dim=1), 1.0)
        inside = cosine * math.cos(margin) - sine * math.sin(margin)
        beyond = cosine + math.cos(margin) - 1
        moved = torch.where(cosine >= -math.cos(margin), inside, beyond)
        return softmax_loss("arcface_loss", e_bd @ c_nd.T, moved, identities, scale, reduction, weight)


class ArcFaceHead(nn.Module):
    """`arcface_loss` with learned class centers; the formula and the arguments are there.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: identities n of the training set.
        scale: factor on the cosines.
        margin: in radians, from 0 to pi. The attribute is a plain float and may be set by a schedule.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        generator: draws the first centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, at first normal with an expected squared length of one.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of a wrong type.

    Examples:
        >>> import torch
        >>> head = ArcFaceHead(8, 3)
        >>> head
        ArcFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.5, reduction='mean')
        >>> head(torch.ones(2, 8), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    per_sample: ClassVar[bool] = True

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.5,
        *,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_head("ArcFaceHead", embedding_dim, num_identities, scale, reduction)
        check_number("ArcFaceHead", "margin", margin, min=0, max=math.pi)
        self.embedding_dim = embedding_dim
        self.num_identities = num_identities
        self.scale = float(scale)
        self.margin = float(margin)
        self.reduction = reduction
        self.weight = nn.Parameter(torch.empty(num_identities, embedding_dim))
        nn.init.normal_(self.weight, std=embedding_dim**-0.5, generator=generator)

    def forward(
        self,
        embeddings: Tensor,
        identities: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """The loss of embeddings `(b, d)` of `identities` `(b,)`; `reduction=None` means the constructor's."""
        return arcface_loss(
            embeddings,
            self.weight,
            identities,
            scale=self.scale,
            margin=self.margin,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the head."""
        return (
            f"embedding_dim={self.embedding_dim}, num_identities={self.num_identities}, scale={self.scale}, "
            f"margin={self.margin}, reduction={self.reduction!r}"
        )
