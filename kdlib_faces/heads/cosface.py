"""CosFace: softmax with an additive cosine margin (Wang et al., 2018)."""

import torch
from torch import Tensor

from kdlib._maths import Reduction, full_precision
from kdlib_faces.heads._margin import MarginHead, check_call, margin_softmax

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
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy over cosines, with a margin subtracted from the cosine of the target identity.

    With :math:`\theta_j` the angle between an embedding and the center of identity j, y the target identity, s the
    scale and m the margin, the loss of one sample is

    .. math:: -\log \frac{e^{s(\cos\theta_y - m)}}{e^{s(\cos\theta_y - m)} + \sum_{j \ne y} e^{s \cos\theta_j}}

    Args:
        embeddings: `(b, d)`, not necessarily normalized. A zero embedding has cosine 0 to every center and gets no
            gradient.
        centers: `(n, d)`, one row per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        margin: m, subtracted from the target cosine, at least 0.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, weight per sample; 0 masks it.
        chunk_size: identities whose logits exist at once. The value is the same; the memory does not grow with n. There
            is then no second derivative. None computes all logits at once.
        negatives: `(m,)`, distinct indices of the centers that count as negatives; None for all.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 for float64 inputs, also under autocast.

    Raises:
        ValueError: mismatched shapes, an identity out of range, or an unknown reduction.
        TypeError: embeddings are not floating point, or identities are not integers.

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
    margin = float(margin)
    with full_precision(embeddings):
        return margin_softmax(
            "cosface_loss", embeddings, centers, identities, lambda e_bd, own_bd: (e_bd * own_bd).sum(1) - margin,
            scale=float(scale), reduction=reduction, weight=weight, chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip


class CosFaceHead(MarginHead):
    """`cosface_loss` with learned class centers; see the function for the formula.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: subtracted from the target cosine, at least 0. A plain float attribute, which a schedule may set.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.

    Examples:
        >>> import torch
        >>> head = CosFaceHead(8, 3)
        >>> head
        CosFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.35, reduction='mean', chunk_size=None)
        >>> head(torch.ones(2, 8), torch.tensor([0, 2]), reduction="none").shape
        torch.Size([2])
    """

    _loss = staticmethod(cosface_loss)

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.35,
        *,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            embedding_dim,
            num_identities,
            scale,
            margin,
            reduction=reduction,
            chunk_size=chunk_size,
            generator=generator,
        )
