"""Combined margin: softmax with multiplicative and additive angular margins and a cosine margin (Deng et al., 2019)."""

import math

import torch
from torch import Tensor

from kdlib._checks import check_number
from kdlib._maths import Reduction, full_precision
from kdlib_faces.heads._margin import MarginHead, angle_to, check_call, margin_softmax, shift_angle

__all__ = ["CombinedMarginHead", "combined_margin_loss"]


def combined_margin_loss(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.3,
    cosine_margin: float = 0.2,
    angle_factor: float = 1.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy over cosines, with the three margins of SphereFace, ArcFace and CosFace on the target.

    With :math:`\theta_j` the angle between an embedding and the center of identity j, y the target identity, s the
    scale, :math:`m_1` the angle factor, :math:`m_2` the margin and :math:`m_3` the cosine margin, the loss of one sample
    is

    .. math:: -\log \frac{e^{s\,(\psi(\theta_y) - m_3)}}{e^{s\,(\psi(\theta_y) - m_3)} + \sum_{j \ne y}
              e^{s \cos\theta_j}}, \qquad
              \psi(\theta) = \begin{cases} \cos(m_1 \theta + m_2) & m_1 \theta + m_2 \le \pi \\
              \cos\theta - \cos\frac{\pi - m_2}{m_1} - 1 & \text{otherwise} \end{cases}

    The second form of :math:`\psi` is continuous with the first and keeps decreasing. :math:`(1, m, 0)` is
    `arcface_loss`, :math:`(1, 0, m)` is `cosface_loss`. The angle is computed from its cosine and its sine, where the
    sine is the norm of the component orthogonal to the center, so the gradient is exact and finite at every angle.

    Args:
        embeddings: `(b, d)`, not necessarily normalized. A zero embedding has cosine 0 to every center and gets no
            gradient.
        centers: `(n, d)`, one row per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        margin: :math:`m_2`, added to the target angle, in radians, from 0 to pi.
        cosine_margin: :math:`m_3`, subtracted from the target cosine, at least 0.
        angle_factor: :math:`m_1`, factor of the target angle, at least 1.
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
        >>> loss = combined_margin_loss(centers, centers, torch.tensor([0, 1]), scale=4.0, margin=0.3)
        >>> round(loss.item(), 4)  # log(1 + exp(-4 * (cos(0.3) - 0.2)))
        0.0476

    References:
        Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
        arXiv:1801.07698, which names all three margins; the defaults are those of the configuration `combined` of
        insightface. Differences from other code: insightface's PyTorch head implements only :math:`(1, m_2, 0)` and
        :math:`m_3 > 0` alone; SphereFace continues an angle beyond pi by further periods of the cosine.
    """
    check_call("combined_margin_loss", embeddings, centers, identities)
    margin, factor, cosine_margin = float(margin), float(angle_factor), float(cosine_margin)

    def target(e_bd: Tensor, own_bd: Tensor) -> Tensor:
        return shift_angle(angle_to(e_bd, own_bd), margin, factor) - cosine_margin

    with full_precision(embeddings):
        return margin_softmax(
            "combined_margin_loss", embeddings, centers, identities, target, scale=float(scale), steepness=factor,
            reduction=reduction, weight=weight, chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip


class CombinedMarginHead(MarginHead):
    """`combined_margin_loss` with learned class centers; see the function for the formula.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: added to the target angle, in radians, from 0 to pi. A plain float attribute, which a schedule may set.
        cosine_margin: subtracted from the target cosine, at least 0.
        angle_factor: factor of the target angle, at least 1.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.

    Examples:
        >>> import torch
        >>> head = CombinedMarginHead(8, 3)
        >>> head
        CombinedMarginHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.3, cosine_margin=0.2,
        angle_factor=1.0, reduction='mean', chunk_size=None)
        >>> head(torch.ones(2, 8), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    _max_margin = math.pi

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.3,
        *,
        cosine_margin: float = 0.2,
        angle_factor: float = 1.0,
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
        check_number("CombinedMarginHead", "cosine_margin", cosine_margin, min=0)
        check_number("CombinedMarginHead", "angle_factor", angle_factor, min=1)
        self.cosine_margin, self.angle_factor = float(cosine_margin), float(angle_factor)

    def forward(
        self,
        embeddings: Tensor,
        identities: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of embeddings `(b, d)` and `identities` `(b,)`; `reduction=None` uses that of the constructor."""
        return combined_margin_loss(
            embeddings, self.weight, identities, scale=self.scale, margin=self.margin,
            cosine_margin=self.cosine_margin, angle_factor=self.angle_factor,
            reduction=reduction or self.reduction, weight=weight, chunk_size=self.chunk_size, negatives=negatives,
        )  # fmt: skip
