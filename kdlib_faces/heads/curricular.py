"""CurricularFace: ArcFace whose hard negatives weigh more as training proceeds (Huang et al., 2020)."""

import math
from functools import partial

import torch
from torch import Tensor

from kdlib._checks import check_number, check_weight
from kdlib._maths import Reduction, full_precision
from kdlib_faces.heads._margin import (
    MarginHead,
    add_angular_margin,
    check_call,
    counted_rows,
    margin_softmax,
    move,
    unit_pair,
)
from kdlib_faces.heads._streamed import own_centers, whole_batch

__all__ = ["CurricularFaceHead", "curricularface_loss"]


def curricularface_loss(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    scale: float = 64.0,
    margin: float = 0.5,
    t: Tensor | float = 0.0,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""ArcFace in which the cosines of hard negatives are modulated by the progress of training.

    With :math:`\theta_j` the angle between an embedding and the center of identity j, y the target identity, s the
    scale, :math:`\psi` as in `arcface_loss` and t the running mean of the target cosines, the loss of one sample is

    .. math:: -\log \frac{e^{s\,\psi(\theta_y)}}{e^{s\,\psi(\theta_y)} + \sum_{j \ne y} e^{s\,N(\theta_j)}}, \qquad
              N(\theta_j) = \begin{cases} \cos\theta_j & \cos\theta_j \le \psi(\theta_y) \\
              \cos\theta_j\,(t + \cos\theta_j) & \text{otherwise} \end{cases}

    A negative is hard if its cosine exceeds the target's with the margin. Early in training t is near 0, and a hard
    negative counts less than in `arcface_loss`; where :math:`t + \cos\theta_j > 1`, it counts more. N jumps where a
    negative becomes hard, so the loss as a whole is not monotone in :math:`\theta_y`, while :math:`\psi` is. t gets no
    gradient. The gradient is finite at every angle.

    Args:
        embeddings: `(b, d)`, not necessarily normalized. A zero embedding has cosine 0 to every center and gets no
            gradient.
        centers: `(n, d)`, one row per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        margin: m of :math:`\psi`, in radians, from 0 to pi.
        t: a number or a scalar tensor from -1 to 1.
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
        >>> centers = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> embeddings, identities = torch.tensor([[0.6, 0.8]]), torch.tensor([0])
        >>> losses = [curricularface_loss(embeddings, centers, identities, scale=4.0, margin=0.0, t=t) for t in (0.0, 1.0)]
        >>> [round(loss.item(), 4) for loss in losses]  # log(1 + exp(4 * (t + 1 - 0.6)))
        [1.7839, 5.6037]

    References:
        Huang, Wang, Tai, Liu, Shen, Li, Li, Huang, "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face
        Recognition", 2020, arXiv:2004.00288. Difference: beyond :math:`\pi - m` the authors' code subtracts m sin m from
        the target cosine, and compares negatives to the increasing cosine of :math:`\theta_y + m`.
    """
    check_call("curricularface_loss", embeddings, centers, identities)
    cos_m, sin_m = math.cos(float(margin)), math.sin(float(margin))

    def modulate(cosines: Tensor, target_cosine: Tensor) -> Tensor:
        return torch.where(cosines > target_cosine.unsqueeze(1), cosines * (t + cosines), cosines)

    with full_precision(embeddings):
        return margin_softmax(
            "curricularface_loss", embeddings, centers, identities,
            partial(add_angular_margin, cos_m=cos_m, sin_m=sin_m), modulate=modulate, scale=float(scale),
            reduction=reduction, weight=weight, chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip


class CurricularFaceHead(MarginHead):
    """`curricularface_loss` with learned class centers and a running t; see the function for the formula.

    In training mode each batch first updates t by the mean of its target cosines and then uses it; in eval mode it is
    fixed. Samples whose cosine is not finite and samples masked by `weight` do not enter it. A term applies its
    `sample_weight` after the loss, so samples masked there do. Each process of a distributed run uses its own batches.
    `DistributedDataParallel` copies the buffers of the first process to the others before each forward pass, unless
    `broadcast_buffers=False`.
    Keep the head in float32, also under autocast: converted to half precision, buffers lose steps of one percent.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: in radians, from 0 to pi. A plain float attribute, which a schedule may set.
        momentum: weight of a batch in t, above 0 and at most 1.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.
        t: buffer, the running mean of the target cosines, initially 0.

    Examples:
        >>> import torch
        >>> head = CurricularFaceHead(8, 3)
        >>> head
        CurricularFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.5, momentum=0.01, reduction='mean', chunk_size=None)
        >>> loss = head(head.weight.detach()[:2], torch.tensor([0, 1]))
        >>> round(head.t.item(), 4)
        0.01
    """

    t: Tensor
    _max_margin = math.pi

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.5,
        *,
        momentum: float = 0.01,
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
        check_number("CurricularFaceHead", "momentum", momentum, above=0, max=1)
        self.momentum = float(momentum)
        self.register_buffer("t", torch.tensor(0.0))

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
            check_call("CurricularFaceHead", embeddings, self.weight, identities)
            check_weight("CurricularFaceHead", weight, embeddings.shape[0])
            self._update(embeddings.detach(), identities.long(), weight)
        return curricularface_loss(
            embeddings, self.weight, identities, scale=self.scale, margin=self.margin, t=self.t,
            reduction=reduction or self.reduction, weight=weight, chunk_size=self.chunk_size, negatives=negatives,
        )  # fmt: skip

    @torch.no_grad()
    def _update(self, embeddings: Tensor, identities: Tensor, weight: Tensor | None) -> None:
        with full_precision(embeddings):
            e_bd, own_bd = unit_pair(embeddings, own_centers(self.weight, identities), self.scale)
            cosines = (e_bd * own_bd).sum(1)
            counted, cosines = (whole_batch(x, self.weight)[0] for x in (counted_rows(cosines, weight), cosines))
            count = counted.sum()
            move(self.t, torch.where(counted, cosines, 0).sum() / count, self.momentum, count > 0)
