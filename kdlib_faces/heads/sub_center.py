"""Sub-center ArcFace: several centers per identity, for training data with wrong labels (Deng et al., 2020)."""

import math
from functools import partial

import torch
from torch import Tensor

from kdlib._checks import check_number
from kdlib._maths import Reduction, full_precision
from kdlib_faces.heads._margin import MarginHead, add_angular_margin, check_call, margin_softmax

__all__ = ["SubCenterArcFaceHead", "sub_center_arcface_loss"]


def sub_center_arcface_loss(
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
    r"""ArcFace in which an identity has K centers, of which the nearest one counts.

    With :math:`\theta_{jk}` the angle between an embedding and center k of identity j, y the target identity and s the
    scale, the loss of one sample is that of `arcface_loss`,

    .. math:: -\log \frac{e^{s\,\psi(\theta_y)}}{e^{s\,\psi(\theta_y)} + \sum_{j \ne y} e^{s \cos\theta_j}}, \qquad
              \theta_j = \min_k \theta_{jk}

    A sample needs to be close to one center of its identity only. Most images of an identity gather at one dominant
    center, and images with a wrong label at the others, where they do not disturb it. Only the nearest center of each
    identity gets a gradient. With K = 1 the loss is `arcface_loss`. The cosines to all centers take `b * n * K` values.

    Args:
        embeddings: `(b, d)`, not necessarily normalized. A zero embedding has cosine 0 to every center and gets no
            gradient.
        centers: `(n, k, d)`, K centers per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        scale: s, factor of the cosines.
        margin: m of :math:`\psi`, in radians, from 0 to pi.
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
        >>> centers = torch.eye(4).reshape(2, 2, 4)  # two identities with two centers each
        >>> embeddings = torch.eye(4)[[1, 2]]
        >>> loss = sub_center_arcface_loss(embeddings, centers, torch.tensor([0, 1]), scale=4.0, margin=0.0)
        >>> round(loss.item(), 4)  # log(1 + exp(-4)): each is at a center of its identity
        0.0181

    References:
        Deng, Guo, Liu, Gong, Zafeiriou, "Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces",
        ECCV 2020. The authors train with K = 3, then drop the centers that are not dominant and the images more than 75
        degrees from the dominant one, and train `arcface_loss` on the rest. Difference: see `arcface_loss` for the
        angles beyond :math:`\pi - m`.
    """
    check_call("sub_center_arcface_loss", embeddings, centers, identities, "n k d")
    cos_m, sin_m = math.cos(float(margin)), math.sin(float(margin))
    with full_precision(embeddings):
        return margin_softmax(
            "sub_center_arcface_loss", embeddings, centers, identities,
            partial(add_angular_margin, cos_m=cos_m, sin_m=sin_m), scale=float(scale), reduction=reduction,
            weight=weight, chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip


class SubCenterArcFaceHead(MarginHead):
    """`sub_center_arcface_loss` with learned centers; see the function for the formula.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: in radians, from 0 to pi. A plain float attribute, which a schedule may set.
        sub_centers: number K of centers per identity.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, k, d)`, initially normal with an expected squared norm of one.

    Examples:
        >>> import torch
        >>> head = SubCenterArcFaceHead(8, 3)
        >>> head
        SubCenterArcFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.5, sub_centers=3,
        reduction='mean', chunk_size=None)
        >>> head.weight.shape, head(torch.ones(2, 8), torch.tensor([0, 2])).shape
        (torch.Size([3, 3, 8]), torch.Size([]))
    """

    _loss = staticmethod(sub_center_arcface_loss)
    _max_margin = math.pi

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float = 0.5,
        *,
        sub_centers: int = 3,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_number("SubCenterArcFaceHead", "sub_centers", sub_centers, min=1, integer=True)
        super().__init__(
            embedding_dim, num_identities, scale, margin,
            reduction=reduction, chunk_size=chunk_size, generator=generator, sub_centers=int(sub_centers),
        )  # fmt: skip
        self.sub_centers = int(sub_centers)
