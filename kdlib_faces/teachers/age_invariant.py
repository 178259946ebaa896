"""Teachers room: an age-invariant teacher, a backbone whose embedding is split into identity and age.

Decorrelated adversarial learning (Wang et al., CVPR 2019): a small branch takes what speaks of age out of the embedding, the
rest is the identity, and the two are made uncorrelated under the linear map that shows their correlation best. Touches
tensors alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank, check_same_batch
from kdlib_faces.teachers.age_estimation import reverse_gradient

__all__ = ["AgeFactorLoss", "AgeInvariantNet", "canonical_correlation"]


class AgeInvariantNet(nn.Module):
    """A backbone and an age branch: `x_age = R(x)`, `x_identity = x - x_age`.

    Args:
        backbone: images to embeddings `(b, d)`, with an attribute `embedding_dim`.
        gain: factor on the first weights of the branch's last layer. With 1, a new branch takes a random third of the
            embedding away, which a backbone that is trained already has to recover from; 0.01 starts near `x`. Ours.

    Shape:
        images `(b, 3, h, w)`; returns the identity part `(b, d)`. Both parts `(b, 2, d)`, identity and age, pass through
        the submodule `parts`, for a tap.

    Examples:
        >>> from kdlib import OUTPUT, StudentAdapter
        >>> from kdlib_faces.backbones import MobileFaceNet
        >>> net = AgeInvariantNet(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32)).eval()
        >>> taps = StudentAdapter(net, {"embedding": OUTPUT, "parts": "parts"})
        >>> {name: tuple(value.shape) for name, value in taps(torch.zeros(2, 3, 32, 32)).items()}
        {'embedding': (2, 16), 'parts': (2, 2, 16)}

    References:
        Wang, Gong, Li, Liu: Decorrelated Adversarial Learning for Age-Invariant Face Recognition, CVPR 2019.
    """

    def __init__(self, backbone: nn.Module, *, gain: float = 1.0) -> None:
        super().__init__()
        check_number("AgeInvariantNet", "gain", gain, above=0)
        dim: Any = getattr(backbone, "embedding_dim", None)
        check_number("AgeInvariantNet", "backbone.embedding_dim", dim, min=1, integer=True)
        self.backbone = backbone
        self.embedding_dim: int = dim
        self.input_size: Any = getattr(backbone, "input_size", None)
        self.stages = tuple(f"backbone.{stage}" for stage in getattr(backbone, "stages", ()))
        self.gain = gain
        last = nn.Linear(dim, dim)
        with torch.no_grad():
            last.weight.mul_(gain)
            last.bias.mul_(gain)
        self.parts = nn.Identity()
        self.age_branch = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last, nn.ReLU())

    @property
    def input_spec(self) -> Any:
        """What the backbone wants its images to be; None where it does not say."""
        return getattr(self.backbone, "input_spec", None)

    def forward(self, images: Tensor) -> Tensor:
        """The identity part of each image's embedding."""
        embedding = self.backbone(images)
        age = self.age_branch(embedding)
        both: Tensor = self.parts(torch.stack([embedding - age, age], dim=1))
        return both[:, 0]


def canonical_correlation(identity: Tensor, age: Tensor, direction: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Squared correlation over the batch of both parts along one direction.

    `rho^2 = Cov(v_i, v_a)^2 / ((Var v_i + eps) (Var v_a + eps))`, with `v = x w`.

    Args:
        identity: `(b, d)`.
        age: `(b, d)`.
        direction: `(d,)`, `w`.
        eps: keeps a part that does not vary from dividing by zero.

    Returns:
        Scalar in [0, 1].

    Examples:
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> round(float(canonical_correlation(x, -x, torch.ones(1))), 4)
        1.0
    """
    check_floating("canonical_correlation", identity=identity, age=age)
    check_rank("canonical_correlation", "identity", identity, "b d")
    unit = F.normalize(direction.float(), dim=0, eps=1e-6)
    first, second = identity.float() @ unit, age.float() @ unit
    first, second = first - first.mean(), second - second.mean()
    covariance = (first * second).mean()
    return covariance.square() / ((first.square().mean() + eps) * (second.square().mean() + eps))


class AgeFactorLoss(nn.Module):
    """Age read from the age part, and no correlation of it with the identity part.

    `CE(A x_age, group) + decorrelation * rho^2`, where the direction of `rho` is learned to raise it while the features
    are learned to lower it.

    Args:
        embedding_dim: d.
        boundaries: years where one age group ends and the next begins.
        groups: number of coarse groups, for targets that are groups in place of years.
        decorrelation: weight of the second part.

    Shape:
        parts `(b, 2, d)`; ages `(b,)`: years as floats (NaN where unknown) or groups as int64 (-1 where unknown).

    Raises:
        TypeError, ValueError: unusable sizes, or ages that do not go with the parts.

    Examples:
        >>> loss = AgeFactorLoss(4)
        >>> value = loss(torch.randn(6, 2, 4), torch.tensor([3.0, 25.0, 70.0, float("nan"), 44.0, 12.0]))
        >>> bool(value > 0)
        True
    """

    def __init__(
        self,
        embedding_dim: int,
        *,
        boundaries: Sequence[float] = (10, 20, 30, 40, 50, 60),
        groups: int | None = None,
        decorrelation: float = 0.1,
    ) -> None:
        super().__init__()
        check_number("AgeFactorLoss", "embedding_dim", embedding_dim, min=1, integer=True)
        check_number("AgeFactorLoss", "decorrelation", decorrelation, min=0)
        if groups is not None:
            check_number("AgeFactorLoss", "groups", groups, min=2, integer=True)
        self.decorrelation = decorrelation
        self.register_buffer("boundaries", torch.tensor([float(edge) for edge in boundaries]))
        self.classifier = nn.Linear(embedding_dim, len(boundaries) + 1 if groups is None else groups)
        generator = torch.Generator().manual_seed(0)
        self.direction = nn.Parameter(torch.randn(embedding_dim, generator=generator))

    def forward(self, parts: Tensor, ages: Tensor) -> Tensor:
        """One loss for the batch; images of unknown age take part in the decorrelation alone."""
        check_rank("AgeFactorLoss", "parts", parts, "b parts d")
        check_same_batch("AgeFactorLoss", "parts", parts, "ages", ages)
        identity, age = parts.float().unbind(dim=1)
        if ages.is_floating_point():
            known = ages.isfinite()
            groups = torch.bucketize(ages.nan_to_num(0.0), self.get_buffer("boundaries"), right=True)
        else:
            known, groups = ages >= 0, ages.clamp(min=0)
        each = F.cross_entropy(self.classifier(age), groups, reduction="none")
        reading = (each * known).sum() / known.sum().clamp(min=1)
        return reading + self.decorrelation * canonical_correlation(identity, age, reverse_gradient(self.direction))
