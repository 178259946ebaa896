"""AdaFace: softmax with a margin that depends on the norm of the embedding (Kim et al., 2022)."""

import math

import torch
from torch import Tensor

from kdlib._checks import check_number, check_weight
from kdlib._maths import Reduction, full_precision
from kdlib_faces.heads._margin import (
    MarginHead,
    angle_to,
    check_call,
    counted_rows,
    lengths,
    margin_softmax,
    move,
    shift_angle,
)
from kdlib_faces.heads._streamed import whole_batch

__all__ = ["AdaFaceHead", "adaface_loss"]


def adaface_loss(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.4,
    concentration: float = 0.333,
    norm_mean: Tensor | float = 20.0,
    norm_std: Tensor | float = 100.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy over cosines, with an angular and a cosine margin set by the norm of the embedding.

    The norm of an embedding z stands for the quality of the image. With :math:`\theta_j` the angle between z and the
    center of identity j, y the target identity, s the scale, m the margin, h the concentration, and :math:`\mu` and
    :math:`\sigma` the mean and the standard deviation of norms in training, the loss of one sample is

    .. math:: -\log \frac{e^{s\,\psi}}{e^{s\,\psi} + \sum_{j \ne y} e^{s \cos\theta_j}}, \qquad
              \psi = \cos(\theta_y - m \hat z) - m (1 + \hat z), \qquad
              \hat z = \mathrm{clip}\!\left(h\,\frac{\lVert z\rVert - \mu}{\sigma + 0.001}, -1, 1\right)

    At :math:`\hat z = -1` (a small norm) this is `arcface_loss`, at 0 `cosface_loss`; toward 1 the angular margin is
    negative, which emphasizes hard samples of good quality. :math:`\hat z` gets no gradient. An angle :math:`\theta_y -
    m \hat z` beyond pi continues as in `arcface_loss`; below 0 it counts as 0, so that :math:`\psi` never increases with
    the angle. The angle is computed from its cosine and its sine, so the gradient is exact and finite at every angle.

    Args:
        embeddings: `(b, d)`, not normalized. A zero embedding has cosine 0 to every center and gets no gradient.
        centers: `(n, d)`, one row per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        margin: m, from 0 to pi; in radians where it is an angle.
        concentration: h, at least 0: with 0.333, about two thirds of normal norms have :math:`|\hat z| < 0.333`.
        norm_mean: :math:`\mu`, a number or a scalar tensor.
        norm_std: :math:`\sigma`, a number or a scalar tensor.
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
        >>> embeddings, identities = 20 * torch.eye(2), torch.tensor([0, 1])
        >>> loss = adaface_loss(embeddings, torch.eye(2), identities, scale=4.0, margin=0.25)
        >>> round(loss.item(), 4)  # at the mean norm: log(1 + exp(-4 * (1 - 0.25)))
        0.0486

    References:
        Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", 2022, arXiv:2204.00964; the defaults and
        the 0.001 are those of the authors' code. Differences: their code clamps cosines to 0.999 and angles to 0.001 from
        0 and pi, where the target then has no gradient.
    """
    check_call("adaface_loss", embeddings, centers, identities)
    margin = float(margin)
    with full_precision(embeddings):
        with torch.no_grad():
            quality = (concentration * (lengths(embeddings) - norm_mean) / (norm_std + 1e-3)).clamp(-1, 1)

        def target(e_bd: Tensor, own_bd: Tensor) -> Tensor:
            return shift_angle(angle_to(e_bd, own_bd), -margin * quality) - margin * (1 + quality)

        return margin_softmax(
            "adaface_loss", embeddings, centers, identities, target, scale=float(scale), reduction=reduction,
            weight=weight, chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip


class AdaFaceHead(MarginHead):
    """`adaface_loss` with learned class centers and running statistics of the norms; see the function for the formula.

    In training mode each batch first updates the statistics and then uses them; in eval mode they are fixed. Samples
    whose norm is not finite and samples masked by `weight` do not enter them, and a batch with fewer than two others
    leaves them as they are. Each process of a distributed run uses its own batches. `DistributedDataParallel` copies
    the buffers of the first process to the others before each forward pass, unless `broadcast_buffers=False`.
    Keep the head in float32, also under autocast: converted to half precision, buffers lose steps of one percent.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: from 0 to pi. A plain float attribute, which a schedule may set.
        concentration: h of the formula, at least 0.
        momentum: weight of a batch in the running statistics, above 0 and at most 1.
        max_norm: larger norms count as this one in the running statistics.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.
        norm_mean: buffer, the running mean of norms, initially 20 as in the authors' code. Embeddings that end in a
            BatchNorm of 512 dimensions have norms of about that size; set it for networks with other norms.
        norm_std: buffer, the running standard deviation of norms, initially 100.

    Examples:
        >>> import torch
        >>> head = AdaFaceHead(8, 3)
        >>> head
        AdaFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.4, concentration=0.333, momentum=0.01,
        max_norm=100.0, reduction='mean', chunk_size=None)
        >>> loss = head(30 * torch.eye(8)[:2], torch.tensor([0, 2]))
        >>> round(head.norm_mean.item(), 4), round(head.norm_std.item(), 4)  # 1 % of the way to 30 and to 0
        (20.1, 99.0)
    """

    norm_mean: Tensor
    norm_std: Tensor
    _max_margin = math.pi

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.4,
        *,
        concentration: float = 0.333,
        momentum: float = 0.01,
        max_norm: float = 100.0,
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
        check_number("AdaFaceHead", "concentration", concentration, min=0)
        check_number("AdaFaceHead", "momentum", momentum, above=0, max=1)
        check_number("AdaFaceHead", "max_norm", max_norm, above=0)
        self.concentration, self.momentum, self.max_norm = float(concentration), float(momentum), float(max_norm)
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))

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
        if self.training:
            check_call("AdaFaceHead", embeddings, self.weight, identities)
            check_weight("AdaFaceHead", weight, embeddings.shape[0])
            self._update(embeddings.detach(), weight)
        return adaface_loss(
            embeddings, self.weight, identities, scale=self.scale, margin=self.margin,
            concentration=self.concentration, norm_mean=self.norm_mean, norm_std=self.norm_std,
            reduction=reduction or self.reduction, weight=weight, chunk_size=self.chunk_size, negatives=negatives,
        )  # fmt: skip

    @torch.no_grad()
    def _update(self, embeddings: Tensor, weight: Tensor | None) -> None:
        with full_precision(embeddings):
            norms = lengths(embeddings)
            counted, norms = (whole_batch(x, self.weight)[0] for x in (counted_rows(norms, weight), norms))
            norms, count = norms.clamp(max=self.max_norm), counted.sum()
            mean = torch.where(counted, norms, 0).sum() / count
            variance = torch.where(counted, (norms - mean).square(), 0).sum() / (count - 1)
            move(self.norm_mean, mean, self.momentum, count > 1)
            move(self.norm_std, variance.sqrt(), self.momentum, count > 1)
