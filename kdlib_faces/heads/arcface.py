"""ArcFace: softmax with an additive angular margin (Deng et al., 2019)."""

import math
from functools import partial

import torch
from torch import Tensor

from kdlib._maths import Reduction, full_precision
from kdlib_faces.heads._margin import MarginHead, add_angular_margin, check_call, margin_softmax

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
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy over cosines, with a margin added to the angle of the target identity.

    With :math:`\theta_j` the angle between an embedding and the center of identity j, y the target identity, s the
    scale and m the margin, the loss of one sample is

    .. math:: -\log \frac{e^{s\,\psi(\theta_y)}}{e^{s\,\psi(\theta_y)} + \sum_{j \ne y} e^{s \cos\theta_j}}, \qquad
              \psi(\theta) = \begin{cases} \cos(\theta + m) & \theta \le \pi - m \\
              \cos\theta + \cos m - 1 & \theta > \pi - m \end{cases}

    Beyond :math:`\pi - m` the first form would increase again and reward a worse embedding; the second form keeps
    decreasing and is continuous with the first. :math:`\cos(\theta + m)` is computed as :math:`\cos\theta \cos m -
    \sin\theta \sin m`, where the sine is the norm of the component orthogonal to the center. Neither an arc cosine nor
    a root of :math:`1 - \cos^2` is differentiated, so the gradient is exact and finite at every angle.

    Args:
        embeddings: `(b, d)`, not necessarily normalized. A zero embedding has cosine 0 to every center and gets no
            gradient.
        centers: `(n, d)`, one row per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        margin: m, in radians, from 0 to pi.
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
        >>> identities = torch.tensor([0, 1])
        >>> plain = arcface_loss(centers, centers, identities, scale=4.0, margin=0.0)
        >>> hard = arcface_loss(centers, centers, identities, scale=4.0, margin=0.5)
        >>> round(plain.item(), 4), round(hard.item(), 4)
        (0.0181, 0.0294)

    References:
        Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
        arXiv:1801.07698. Differences from other code: insightface's PyTorch head has no branch beyond
        :math:`\pi - m` and passes the gradient straight through the margin, with factor s at any angle; heads that
        differentiate an arc cosine have an infinite gradient at 0 and pi.
    """
    check_call("arcface_loss", embeddings, centers, identities)
    cos_m, sin_m = math.cos(float(margin)), math.sin(float(margin))
    with full_precision(embeddings):
        return margin_softmax(
            "arcface_loss", embeddings, centers, identities, partial(add_angular_margin, cos_m=cos_m, sin_m=sin_m),
            scale=float(scale), reduction=reduction, weight=weight, chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip


class ArcFaceHead(MarginHead):
    """`arcface_loss` with learned class centers; see the function for the formula.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: in radians, from 0 to pi. A plain float attribute, which a schedule may set.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.

    Examples:
        >>> import torch
        >>> head = ArcFaceHead(8, 3)
        >>> head
        ArcFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.5, reduction='mean', chunk_size=None)
        >>> head(torch.ones(2, 8), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    _loss = staticmethod(arcface_loss)
    _max_margin = math.pi

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.5,
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
