"""Heads room: CosFace, an additive cosine margin. Touches embeddings, class centers and identities only.

Wang et al., CosFace, 2018: lower the cosine to the own class center by a constant before the softmax.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib._maths import full_precision
from kdlib_faces.heads._margin import Reduction, check_call, check_head, softmax_loss, unit_pair

__all__ = ["CosFaceHead", "cosface_loss"]


def cosface_loss(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.35,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy over cosines, the own identity's cosine lowered by a margin.

    With :math:`\theta_j` the angle between an embedding and the center of identity j, y its own identity, s the scale
    and m the margin, the loss of one sample is

    .. math:: -\log \frac{e^{s(\cos\theta_y - m)}}{e^{s(\cos\theta_y - m)} + \sum_{j \ne y} e^{s \cos\theta_j}}

    Args:
        embeddings: `(b, d)`, of any length. One of zeros counts as at a right angle to every center, and gets no
            gradient.
        centers: `(n, d)`, one row an identity, of any length.
        identities: `(b,)`, whole numbers from 0 to n - 1.
        scale: s, factor on the cosines.
        margin: m, subtracted from the own cosine, at least 0.
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
        >>> loss = cosface_loss(centers, centers, torch.tensor([0, 1]), scale=4.0, margin=0.25)
        >>> round(loss.item(), 4)  # log(1 + exp(-4 * (1 - 0.25)))
        0.0486

    References:
        Wang, Wang, Zhou, Ji, Gong, Zhou, Li, Liu, "CosFace: Large Margin Cosine Loss for Deep Face Recognition", 2018,
        arXiv:1801.09414. insightface trains with a margin of 0.4.
    """
    check_call("cosface_loss", embeddings, centers, identities)
    identities = identities.long()
    with full_precision(embeddings):
        e_bd, c_nd = unit_pair(embeddings, centers, scale)
        cosines = e_bd @ c_nd.T
        moved = cosines.gather(1, identities.unsqueeze(1)).squeeze(1) - margin
        return softmax_loss("cosface_loss", cosines, moved, identities, scale, reduction, weight)


class CosFaceHead(nn.Module):
    """`cosface_loss` with learned class centers; the formula and the arguments are there.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: identities n of the training set.
        scale: factor on the cosines.
        margin: subtracted from the own cosine, at least 0. The attribute is a plain float and may be set by a schedule.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        generator: draws the first centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, at first normal with an expected squared length of one.

    Raises:
        ValueError: an argument outside its range.
        TypeError: an argument of a wrong type.

    Examples:
        >>> import torch
        >>> head = CosFaceHead(8, 3)
        >>> head
        CosFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.35, reduction='mean')
        >>> head(torch.ones(2, 8), torch.tensor([0, 2]), reduction="none").shape
        torch.Size([2])
    """

    per_sample: ClassVar[bool] = True

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.35,
        *,
        reduction: Reduction = "mean",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_head("CosFaceHead", embedding_dim, num_identities, scale, reduction)
        check_number("CosFaceHead", "margin", margin, min=0)
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
        return cosface_loss(
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
