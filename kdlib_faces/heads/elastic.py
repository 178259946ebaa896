"""ElasticFace: ArcFace or CosFace with a random margin for each sample (Boutros et al., 2022)."""

import math
from typing import Literal

import torch
from torch import Tensor

from kdlib._checks import check_choice, check_number, check_shape, check_weight
from kdlib._gather import is_sharded
from kdlib._maths import Reduction, full_precision
from kdlib_faces.heads._margin import MarginHead, angle_to, check_call, margin_softmax, shift_angle
from kdlib_faces.heads._random import normal_numbers, process_rank
from kdlib_faces.heads._streamed import whole_batch

__all__ = ["ElasticFaceHead", "elasticface_loss"]

MARGINS = {"arcface": 0.5, "cosface": 0.35}


def elasticface_loss(
    embeddings: Tensor,
    centers: Tensor,
    identities: Tensor,
    *,
    noise: Tensor | None = None,
    scale: float = 64.0,
    margin: float | None = None,
    std: float = 0.05,
    form: Literal["arcface", "cosface"] = "arcface",
    sort: bool = False,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    chunk_size: int | None = None,
    negatives: Tensor | None = None,
) -> Tensor:
    r"""Softmax cross-entropy over cosines, with a margin per sample that deviates at random from a mean margin.

    With :math:`\theta_j` the angle between an embedding and the center of identity j, y the target identity, s the
    scale, m the margin, :math:`\sigma` its standard deviation and :math:`\varepsilon` standard normal noise, the loss of
    one sample is

    .. math:: -\log \frac{e^{s\,\psi(\theta_y)}}{e^{s\,\psi(\theta_y)} + \sum_{j \ne y} e^{s \cos\theta_j}}, \qquad
              \psi(\theta) = \begin{cases} \cos(\theta + m + \sigma\varepsilon) & \text{arcface} \\
              \cos\theta - m - \sigma\varepsilon & \text{cosface} \end{cases}

    With `sort`, which the paper names ElasticFace+, the random margins are assigned by difficulty: the sample with the
    smallest target cosine of the batch gets the largest margin. Angles beyond :math:`\pi` continue as in `arcface_loss`;
    angles below 0, from a negative margin, count as 0. Without noise, or with `std=0`, this is `arcface_loss` or
    `cosface_loss`. The gradient is exact and finite at every angle.

    Args:
        embeddings: `(b, d)`, not necessarily normalized. A zero embedding has cosine 0 to every center and gets no
            gradient.
        centers: `(n, d)`, one row per identity, not necessarily normalized.
        identities: `(b,)`, integers from 0 to n - 1.
        noise: :math:`\varepsilon` `(b,)`, such as `torch.randn(b)`; None for the margin m in every sample.
        scale: s, factor of the cosines.
        margin: m, in radians with `"arcface"`; None for 0.5 with `"arcface"` and 0.35 with `"cosface"`.
        std: :math:`\sigma`, in the unit of the margin, at least 0.
        form: `"arcface"` or `"cosface"`.
        sort: assign large margins to samples far from their center.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, weight per sample; 0 masks it.
        chunk_size: identities whose logits exist at once. The value is the same; the memory does not grow with n. There
            is then no second derivative. None computes all logits at once.
        negatives: `(m,)`, distinct indices of the centers that count as negatives; None for all.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 for float64 inputs, also under autocast.

    Raises:
        ValueError: mismatched shapes, an identity out of range, an unknown form or an unknown reduction.
        TypeError: embeddings are not floating point, or identities are not integers.

    Examples:
        >>> import torch
        >>> centers, noise = torch.eye(2), torch.tensor([1.0, -1.0])
        >>> options = {"scale": 4.0, "margin": 0.25, "std": 0.05, "form": "cosface", "reduction": "none"}
        >>> losses = elasticface_loss(centers, centers, torch.tensor([0, 1]), noise=noise, **options)
        >>> [round(loss, 4) for loss in losses.tolist()]  # log(1 + exp(-4 * (1 - 0.3))) and 0.2
        [0.059, 0.04]

    References:
        Boutros, Damer, Kirchbuchner, Kuijper, "ElasticFace: Elastic Margin Loss for Deep Face Recognition", CVPR Workshops
        2022, arXiv:2109.09416; the defaults are those of the configurations in the authors' repository. Differences:
        their code differentiates an arc cosine, whose gradient is infinite at 0 and pi, has no branch beyond pi, and with
        sorting indexes the sorted margins by the order of the cosines, which does not give the largest margin to the
        smallest cosine.
    """
    check_call("elasticface_loss", embeddings, centers, identities)
    check_choice("elasticface_loss", "form", form, tuple(MARGINS))
    if noise is not None:
        check_shape("elasticface_loss", "noise", noise, "b", b=embeddings.shape[0])
    mean = MARGINS[form] if margin is None else float(margin)

    def target(e_bd: Tensor, own_bd: Tensor) -> Tensor:
        angle = angle_to(e_bd, own_bd)
        margins = torch.full_like(angle, mean)
        if noise is not None:
            margins = margins + float(std) * noise.detach().to(margins)
        if sort:
            order = angle.detach().argsort()
            margins = torch.empty_like(margins).scatter(0, order, margins.sort().values)
        return shift_angle(angle, margins) if form == "arcface" else angle.cos() - margins

    with full_precision(embeddings):
        return margin_softmax(
            "elasticface_loss", embeddings, centers, identities, target, scale=float(scale), reduction=reduction,
            weight=weight, chunk_size=chunk_size, negatives=negatives,
        )  # fmt: skip


class ElasticFaceHead(MarginHead):
    """`elasticface_loss` with learned class centers and random margins; see the function for the formula.

    In training mode each batch gets new margins, which depend on `seed`, the number of batches so far and the rank of
    the process alone: torch's generators are not used, and a run that continues from a state dict continues with the
    same margins. In eval mode every sample has the margin `margin`.

    Args:
        embedding_dim: dimensions d of the embeddings.
        num_identities: number n of training identities.
        scale: factor of the cosines.
        margin: mean margin, from 0 to pi, in radians with `"arcface"`; None for 0.5 with `"arcface"` and 0.35 with
            `"cosface"`. A plain float attribute, which a schedule may set.
        std: standard deviation of the margins, at least 0.
        form: `"arcface"` or `"cosface"`.
        sort: assign large margins to samples far from their center (ElasticFace+).
        seed: seed of the margins.
        reduction: `"mean"` or `"none"`; `forward` may override it.
        chunk_size: identities whose logits exist at once, for many identities; None computes all logits at once.
        generator: generator of the initial centers; None uses torch's global generator.

    Attributes:
        weight: centers `(n, d)`, initially normal with an expected squared norm of one.
        batches: buffer, the number of batches in training mode.

    Examples:
        >>> import torch
        >>> head = ElasticFaceHead(8, 3)
        >>> head
        ElasticFaceHead(embedding_dim=8, num_identities=3, scale=64.0, margin=0.5, std=0.05, form='arcface', sort=False,
        seed=0, reduction='mean', chunk_size=None)
        >>> embeddings, identities = torch.ones(2, 8), torch.tensor([0, 2])
        >>> head(embeddings, identities).equal(head(embeddings, identities))
        False
        >>> head.batches
        tensor(2)
    """

    batches: Tensor
    _max_margin = math.pi

    def __init__(
        self,
        embedding_dim: int,
        num_identities: int,
        scale: float = 64.0,
        margin: float | None = None,
        *,
        std: float = 0.05,
        form: Literal["arcface", "cosface"] = "arcface",
        sort: bool = False,
        seed: int = 0,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        owner = "ElasticFaceHead"
        check_choice(owner, "form", form, tuple(MARGINS))
        margin = MARGINS[form] if margin is None else margin
        super().__init__(
            embedding_dim,
            num_identities,
            scale,
            margin,
            reduction=reduction,
            chunk_size=chunk_size,
            generator=generator,
        )
        check_number(owner, "std", std, min=0)
        check_number(owner, "seed", seed, min=0, max=2**63 - 1, integer=True)
        self.std, self.form, self.sort, self.seed = float(std), form, bool(sort), int(seed)
        self.register_buffer("batches", torch.tensor(0))

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
        noise = None
        if self.training:
            check_call("ElasticFaceHead", embeddings, self.weight, identities)
            check_weight("ElasticFaceHead", weight, embeddings.shape[0])
            noise = self._noise(embeddings)
            self.batches.add_(1)
        return elasticface_loss(
            embeddings, self.weight, identities, noise=noise, scale=self.scale, margin=self.margin, std=self.std,
            form=self.form, sort=self.sort, reduction=reduction or self.reduction, weight=weight, chunk_size=self.chunk_size, negatives=negatives,
        )  # fmt: skip

    def _noise(self, embeddings: Tensor) -> Tensor:
        if not is_sharded(self.weight):
            return normal_numbers(embeddings.shape[0], self.batches, self.seed + process_rank() * 2**40)
        rows, first = whole_batch(embeddings[:, :0], self.weight)
        return normal_numbers(len(rows), self.batches, self.seed)[first : first + len(embeddings)]
