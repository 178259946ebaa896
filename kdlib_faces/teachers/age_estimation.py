"""A loss that estimates age from features, with or without gradient reversal."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_same_batch

__all__ = ["AGE_BOUNDARIES", "AgeEstimationLoss", "group_ages", "mean_of_known", "reverse_gradient"]

AGE_BOUNDARIES = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
"""Years at which MTLFace ends one age group and begins the next."""

YEARS = 101


def group_ages(ages: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the age groups `(b,)` int64 and a mask `(b,)` of known ages.

    Args:
        ages: `(b,)` years as floats (NaN where unknown), or groups as integers (-1 where unknown).
        boundaries: Years at which a group ends and the next begins.
    """
    if ages.is_floating_point():
        return torch.bucketize(ages.nan_to_num(0.0).float(), boundaries, right=True), ages.isfinite()
    return ages.clamp(min=0), ages >= 0


def mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Mean of the values `(b,)` whose age is known; 0 with a graph where none is."""
    return (values * known).sum() / known.sum().clamp(min=1)


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def reverse_gradient(x: Tensor) -> Tensor:
    """Return `x` and negate its gradient in the backward pass (Ganin and Lempitsky, ICML 2015).

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x).sum().backward()
        >>> x.grad
        tensor([-1., -1.])
    """
    return cast(Tensor, _ReverseGradient.apply(x))  # type: ignore[no-untyped-call]  # torch leaves it untyped


class AgeEstimationLoss(nn.Module):
    """Age estimation by deep expectation: `MSE(sum_k k p_k, age) / scale^2 + CE(age group)`.

    A hidden layer is followed by logits of 101 years, whose softmax is `p`, and a linear classifier of age groups on those
    logits. Maps are averaged over their grid first. Where ages are given as groups, the cross-entropy stands alone. Images
    of unknown age are left out; a batch without a known age gives 0 with a graph.

    Args:
        channels: Length of the features, or channels of the maps.
        boundaries: Years at which one age group ends and the next begins.
        groups: Number of age groups, where targets are groups instead of years.
        reverse: Reverse the gradient of the features, so that they are trained to hide age while the estimator still learns.
        hidden: Width of the hidden layer.
        scale: Years that count as an error of 1. MTLFace uses 1, with a loss weight of .001 for errors of hundreds.

    Shape:
        features `(b, c)` or `(b, c, h, w)`; ages `(b,)`: years as floats (NaN where unknown) or groups as int64 (-1 where
        unknown).

    Raises:
        TypeError, ValueError: A size is out of range, or ages and features do not match.

    Examples:
        >>> loss = AgeEstimationLoss(8)
        >>> bool(loss(torch.randn(3, 8, 2, 2), torch.tensor([3.0, 40.0, float("nan")])) > 0)
        True
        >>> float(loss(torch.randn(1, 8), torch.tensor([float("nan")])).detach())
        0.0

    References:
        Rothe, Timofte, Van Gool: DEX: Deep EXpectation of apparent age from a single image, ICCV Workshops 2015.
        arXiv:2103.01520 (MTLFace) and its public code, the source of the 101 years, the boundaries and the reversal.
    """

    boundaries: Tensor
    years: Tensor

    def __init__(
        self,
        channels: int,
        *,
        boundaries: Sequence[float] = AGE_BOUNDARIES,
        groups: int | None = None,
        reverse: bool = False,
        hidden: int = 512,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        owner = "AgeEstimationLoss"
        check_number(owner, "channels", channels, min=1, integer=True)
        check_number(owner, "hidden", hidden, min=1, integer=True)
        check_number(owner, "scale", scale, above=0)
        if groups is not None:
            check_number(owner, "groups", groups, min=2, integer=True)
        self.reverse, self.scale = reverse, scale
        self.register_buffer("boundaries", torch.tensor(boundaries, dtype=torch.float32))
        self.register_buffer("years", torch.arange(float(YEARS)))
        self.estimator = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, YEARS))
        self.classifier = nn.Linear(YEARS, len(boundaries) + 1 if groups is None else groups)

    def forward(self, features: Tensor, ages: Tensor) -> Tensor:
        """Return the scalar loss of the batch."""
        check_floating("AgeEstimationLoss", features=features)
        check_same_batch("AgeEstimationLoss", "features", features, "ages", ages)
        if features.dim() not in (2, 4):
            raise ValueError(f"AgeEstimationLoss: features must be (b, c) or (b, c, h, w), got {tuple(features.shape)}")
        x = (reverse_gradient(features) if self.reverse else features).float()
        logits = self.estimator(x.flatten(2).mean(2) if x.dim() == 4 else x)
        groups, known = group_ages(ages, self.boundaries)
        values = F.cross_entropy(self.classifier(logits), groups, reduction="none")
        if ages.is_floating_point():
            expected = logits.softmax(1) @ self.years
            values = values + ((expected - ages.nan_to_num(0.0).float()) / self.scale).square()
        return mean_of_known(values, known)
