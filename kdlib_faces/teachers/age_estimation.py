"""Teachers room: age read from features, as a loss that makes them speak of age, or, reversed, makes them silent.

Deep expectation (Rothe, Timofte, Van Gool, 2015) as MTLFace uses it: a softmax over 101 years whose expected value is the age,
and a classifier of coarse groups on top of it. Touches tensors alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_same_batch

__all__ = ["AgeEstimationLoss", "reverse_gradient"]

YEARS = 101


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def reverse_gradient(x: Tensor) -> Tensor:
    """`x` itself; its gradient comes back with the other sign (Ganin and Lempitsky, ICML 2015).

    Examples:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x).sum().backward()
        >>> x.grad
        tensor([-1., -1.])
    """
    out: Tensor = _Reverse.apply(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out


class AgeEstimationLoss(nn.Module):
    """`MSE(sum_k k p_k, age) / scale^2 + CE(groups of p's logits, group)`; where only groups are known, the CE alone.

    Maps are averaged over their grid; a hidden layer, then the logits of 101 years, then those of the groups. Images of
    unknown age are left out, and a batch without a known age gives 0 with a graph.

    Args:
        channels: length of the features, or channels of the maps.
        boundaries: years where one age group ends and the next begins.
        groups: number of groups, for targets that are groups in place of years.
        reverse: the features get the reversed gradient, so that the age cannot be read from them; the reader itself still
            learns to.
        hidden: width of the hidden layer.
        scale: years that make an error of 1. MTLFace has 1; its weight .001 then goes with errors of hundreds.

    Shape:
        features `(b, c)` or `(b, c, h, w)`; ages `(b,)`: years as floats (NaN where unknown) or groups as int64 (-1 where
        unknown).

    Raises:
        TypeError, ValueError: unusable sizes, or ages that do not go with the features.

    Examples:
        >>> loss = AgeEstimationLoss(8)
        >>> bool(loss(torch.randn(3, 8, 2, 2), torch.tensor([3.0, 40.0, float("nan")])) > 0)
        True
        >>> float(loss(torch.randn(1, 8), torch.tensor([float("nan")])).detach())
        0.0

    References:
        arXiv:2103.01520 and its public code, from which the 101 years, the groups at 10 to 60 and the reversal are.
    """

    def __init__(
        self,
        channels: int,
        *,
        boundaries: Sequence[float] = (10, 20, 30, 40, 50, 60),
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
        self.reverse, self.scale, self.by_group = reverse, scale, groups is not None
        self.register_buffer("boundaries", torch.tensor([float(edge) for edge in boundaries]))
        self.register_buffer("years", torch.arange(float(YEARS)))
        self.reader = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, YEARS))
        self.grouper = nn.Linear(YEARS, len(boundaries) + 1 if groups is None else groups)

    def forward(self, features: Tensor, ages: Tensor) -> Tensor:
        """One loss for the batch."""
        check_floating("AgeEstimationLoss", features=features)
        check_same_batch("AgeEstimationLoss", "features", features, "ages", ages)
        if features.dim() not in (2, 4):
            raise ValueError(f"AgeEstimationLoss: features must be (b, c) or (b, c, h, w), got {tuple(features.shape)}")
        x = reverse_gradient(features) if self.reverse else features
        logits = self.reader(x.float().flatten(2).mean(2) if x.dim() == 4 else x.float())
        if ages.is_floating_point():
            known = ages.isfinite()
            years = ages.nan_to_num(0.0).float()
            groups = torch.bucketize(years, self.get_buffer("boundaries"), right=True)
        else:
            known, groups, years = ages >= 0, ages.clamp(min=0), None
        each = F.cross_entropy(self.grouper(logits), groups, reduction="none")
        if years is not None:
            expected = logits.softmax(1) @ self.get_buffer("years")
            each = each + ((expected - years) / self.scale).square()
        return (each * known).sum() / known.sum().clamp(min=1)

    @torch.no_grad()
    def years_of(self, features: Tensor) -> Tensor:
        """The expected age of each image, `(b,)` years."""
        x = features.float().flatten(2).mean(2) if features.dim() == 4 else features.float()
        expected: Tensor = self.reader(x).softmax(1) @ self.get_buffer("years")
        return expected
