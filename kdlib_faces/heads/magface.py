"""MagFace: softmax with a margin that grows with the norm of the embedding, and a regularizer (Meng et al., 2021)."""

import math

import torch
from torch import Tensor

from kdlib._checks import check_number
from kdlib._maths import Reduction, full_precision, reduce
from kdlib_faces.heads._margin import MarginHead, angle_to, check_call, lengths, margin_softmax, shift_angle

__all__ = ["MagFaceHead", "magface_loss"]


def magface_loss(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.45,
    max_margin: float = 0.8,
    min_norm: float = 10.0,
    max_norm: float = 110.0,
    norm_weight: float = 35.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy with an angular margin that grows with the norm of the embedding, plus a term for the norm.

    With :math:`\theta_j` the angle between an embedding z and the center of identity j, y the target identity, s the
    scale and :math:`a = \mathrm{clip}(\lVert z\rVert, l_a, u_a)`, the loss of one sample is

    .. math:: -\log \frac{e^{s\,\psi(\theta_y)}}{e^{s\,\psi(\theta_y)} + \sum_{j \ne y} e^{s \cos\theta_j}} +
              \lambda_g \left(\frac{1}{a} + \frac{a}{u_a^2}\right), \qquad
              \psi(\theta) = \cos(\theta + m(a)), \qquad
              m(a) = l_m + (u_m - l_m) \frac{a - l_a}{u_a - l_a}

    The second term decreases up to :math:`a = u_a` and so rewards large norms; the growing margin makes them costly for
    samples far from their center. The norm thus becomes a measure of quality. The gradient flows through the norm in
    both places, and a norm outside :math:`[l_a, u_a]` gets none. The second term is part of the returned loss, so values
    are not comparable to those of other heads; `norm_weight=0` leaves it out. Angles beyond :math:`\pi - m(a)` continue
    as in `arcface_loss`, and the gradient is exact and finite at every angle.

    Args:
        embeddings: `(b, d)`, not normalized. A zero embedding has cosine 0 to every center and gets no gradient.
        centers: `(n, d)`, one row per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        margin: :math:`l_m`, margin at the norm `min_norm`, in radians.
        max_margin: :math:`u_m`, margin at the norm `max_norm`, in radians, at most pi.
        min_norm: :math:`l_a`, above 0.
        max_norm: :math:`u_a`, above `min_norm`.
        norm_weight: :math:`\lambda_g`, at least 0. The authors' training script warns below :math:`s\,\frac{u_m - l_m}{u_a
            - l_a} \cdot \frac{u_a^2 l_a^2}{u_a^2 - l_a^2}`, which is 22.6 for the defaults.
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
        >>> embeddings, identities = 10 * torch.eye(2), torch.tensor([0, 1])
        >>> loss = magface_loss(embeddings, torch.eye(2), identities, scale=4.0, margin=0.0)
        >>> round(loss.item(), 4)  # log(1 + exp(-4)) + 35 * (1 / 10 + 10 / 110^2)
        3.5471

    References:
        Meng, Zhao, Huang, Zhou, "MagFace: A Universal Representation for Face Recognition and Quality Assessment", 2021,
        arXiv:2103.06627; the defaults are those of the authors' script. Difference: their code applies the margin only
        to angles below 90 degrees, where :math:`\psi` jumps.
    """
    check_call("magface_loss", embeddings, centers, identities)
    low, high, slope = float(min_norm), float(max_norm), float(max_margin) - float(margin)
    with full_precision(embeddings):
        norm = lengths(embeddings).clamp(low, high)

        def target(e_bd: Tensor, own_bd: Tensor) -> Tensor:
            return shift_angle(angle_to(e_bd, own_bd), margin + slope / (high - low) * (norm - low))

        losses = margin_softmax(
            "magface_loss", embeddings, centers, identities, target, scale=float(scale), reduction="none", weight=None,
            chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip
        return reduce("magface_loss", losses + norm_weight * (1 / norm + norm / high**2), reduction, weight)


class MagFaceHead(MarginHead):
    """`magface_loss` with learned class centers; see the function for the formula.

    The returned loss contains the term for the norms, with the weight `norm_weight`. The student must not normalize its
    embeddings, and its norms should lie between `min_norm` and `max_norm`.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: at the norm `min_norm`, in radians, from 0 to pi. A plain float attribute, which a schedule may set.
        max_margin: at the norm `max_norm`, in radians, from `margin` to pi.
        min_norm: norms below count as this one, above 0.
        max_norm: norms above count as this one, above `min_norm`.
        norm_weight: weight of the term for the norm, at least 0.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.

    Examples:
        >>> import torch
        >>> head = MagFaceHead(8, 3)
        >>> head
        MagFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.45, max_margin=0.8, min_norm=10.0,
        max_norm=110.0, norm_weight=35.0, reduction='mean', chunk_size=None)
        >>> head(torch.ones(2, 8), torch.tensor([0, 2])).shape
        torch.Size([])
    """

    _max_margin = math.pi

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.45,
        *,
        max_margin: float = 0.8,
        min_norm: float = 10.0,
        max_norm: float = 110.0,
        norm_weight: float = 35.0,
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
        owner = "MagFaceHead"
        check_number(owner, "max_margin", max_margin, min=self.margin, max=math.pi)
        check_number(owner, "min_norm", min_norm, above=0)
        check_number(owner, "max_norm", max_norm, above=float(min_norm))
        check_number(owner, "norm_weight", norm_weight, min=0)
        self.max_margin, self.norm_weight = float(max_margin), float(norm_weight)
        self.min_norm, self.max_norm = float(min_norm), float(max_norm)

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
        return magface_loss(
            embeddings, self.weight, identities, scale=self.scale, margin=self.margin, max_margin=self.max_margin,
            min_norm=self.min_norm, max_norm=self.max_norm, norm_weight=self.norm_weight,
            reduction=reduction or self.reduction, weight=weight, chunk_size=self.chunk_size, negatives=negatives,
        )  # fmt: skip
