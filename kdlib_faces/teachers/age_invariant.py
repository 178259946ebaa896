"""An age-invariant teacher that subtracts an age branch from its embedding, trained by decorrelated adversarial learning."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank, check_same_batch
from kdlib_faces.backbones import Backbone, InputSpec
from kdlib_faces.teachers.age_estimation import AGE_BOUNDARIES, group_ages, mean_of_known, reverse_gradient

__all__ = ["AgeFactorLoss", "AgeInvariantNet", "canonical_correlation"]


class AgeInvariantNet(nn.Module):
    """A backbone with an age branch `R`: `x_age = R(x)`, `x_identity = x - x_age`.

    Args:
        backbone: Images to embeddings `(b, d)`.
        gain: Factor on the initial weights of the branch's last layer. At 1 a new branch removes a random third of the
            embedding, from which a trained backbone must recover; 0.01 starts near `x`. This option is ours.

    Attributes:
        stages: Tap paths of the backbone's stages.

    Shape:
        images `(b, 3, h, w)`; returns the identity part `(b, d)`. Both parts `(b, 2, d)`, identity and age, are the output of
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

    def __init__(self, backbone: Backbone, *, gain: float = 1.0) -> None:
        super().__init__()
        check_number("AgeInvariantNet", "gain", gain, above=0)
        dim = backbone.embedding_dim
        self.backbone = backbone
        self.embedding_dim = dim
        self.input_size = backbone.input_size
        self.stages = tuple(f"backbone.{stage}" for stage in backbone.stages)
        self.gain = gain
        last = nn.Linear(dim, dim)
        with torch.no_grad():
            last.weight.mul_(gain)
            last.bias.mul_(gain)
        self.parts = nn.Identity()
        self.age_branch = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last, nn.ReLU())

    @property
    def input_spec(self) -> InputSpec:
        """The image format of the backbone."""
        return self.backbone.input_spec

    def forward(self, images: Tensor) -> Tensor:
        """Return the identity part of the embeddings."""
        embedding = self.backbone(images)
        age = self.age_branch(embedding)
        parts: Tensor = self.parts(torch.stack([embedding - age, age], dim=1))
        return parts[:, 0]


def canonical_correlation(identity: Tensor, age: Tensor, direction: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Squared correlation over the batch of both parts along one direction.

    `rho^2 = Cov(v_i, v_a)^2 / ((Var v_i + eps) (Var v_a + eps))`, with `v = x w / ||w||`.

    Args:
        identity: Identity part `(b, d)`.
        age: Age part `(b, d)`.
        direction: Direction `w`, `(d,)`.
        eps: Added to both variances, so that a constant part gives 0.

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
    """Classify age groups from the age part and decorrelate it from the identity part: `CE(A x_age, group) + w rho^2`.

    The direction of the correlation `rho` (`canonical_correlation`) is trained to raise it while the features are trained
    to lower it. Images of unknown age take part in the decorrelation alone.

    Args:
        embedding_dim: Dimension `d` of both parts.
        boundaries: Years at which one age group ends and the next begins.
        groups: Number of age groups, where targets are groups instead of years.
        decorrelation: Weight `w` of the decorrelation.

    Shape:
        parts `(b, 2, d)`; ages `(b,)`: years as floats (NaN where unknown) or groups as int64 (-1 where unknown).

    Raises:
        TypeError, ValueError: A size is out of range, or ages and parts do not match.

    Examples:
        >>> loss = AgeFactorLoss(4)
        >>> value = loss(torch.randn(6, 2, 4), torch.tensor([3.0, 25.0, 70.0, float("nan"), 44.0, 12.0]))
        >>> bool(value > 0)
        True
    """

    boundaries: Tensor

    def __init__(
        self,
        embedding_dim: int,
        *,
        boundaries: Sequence[float] = AGE_BOUNDARIES,
        groups: int | None = None,
        decorrelation: float = 0.1,
    ) -> None:
        super().__init__()
        check_number("AgeFactorLoss", "embedding_dim", embedding_dim, min=1, integer=True)
        check_number("AgeFactorLoss", "decorrelation", decorrelation, min=0)
        if groups is not None:
            check_number("AgeFactorLoss", "groups", groups, min=2, integer=True)
        self.decorrelation = decorrelation
        self.register_buffer("boundaries", torch.tensor(boundaries, dtype=torch.float32))
        self.classifier = nn.Linear(embedding_dim, len(boundaries) + 1 if groups is None else groups)
        self.direction = nn.Parameter(torch.randn(embedding_dim, generator=torch.Generator().manual_seed(0)))

    def forward(self, parts: Tensor, ages: Tensor) -> Tensor:
        """Return the scalar loss of the batch."""
        check_rank("AgeFactorLoss", "parts", parts, "b parts d")
        check_same_batch("AgeFactorLoss", "parts", parts, "ages", ages)
        identity, age = parts.float().unbind(dim=1)
        groups, known = group_ages(ages, self.boundaries)
        values = F.cross_entropy(self.classifier(age), groups, reduction="none")
        correlation = canonical_correlation(identity, age, reverse_gradient(self.direction))
        return mean_of_known(values, known) + self.decorrelation * correlation
