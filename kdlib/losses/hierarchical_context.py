"""Losses: hierarchical context, feature maps equal at full resolution and at coarser grids. Touches two tensors only.

Chen et al., 2021: the loss of ReviewKD, which compares maps at several levels of average pooling.
"""

from collections.abc import Sequence
from math import prod
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_choice, check_pair
from kdlib._maths import REDUCTIONS, full_precision, promote, reduce
from kdlib.losses._checks import check_levels
from kdlib.losses._squares import hold_steep

__all__ = ["HierarchicalContextLoss", "hierarchical_context"]


def hierarchical_context(
    student: Tensor,
    teacher: Tensor,
    *,
    levels: Sequence[int] = (4, 2, 1),
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error of two feature maps, at full resolution and average-pooled to coarser grids.

    .. math::
        \frac{\sum_{k=0}^{K} 2^{-k} \, \mathrm{mse}(P_k s, P_k t)}{\sum_{k=0}^{K} 2^{-k}}

    for one sample, with :math:`P_0` the identity and :math:`P_k` average pooling to the k-th grid: level l makes the grid
    (min(l, h), min(l, w)), and a level that would leave the map as it is is left out. So every coarser level counts half
    of the one before, and a map of one place is compared once. Differences above 1e15 count as 1e15. A float16 student
    gets no gradient that float16 cannot hold.

    Args:
        student: features `(b, c, h, w)`, already projected into the teacher's space.
        teacher: features of the same shape; never receives a gradient.
        levels: sides of the coarser grids in the order of their weights, each at least 1; none leaves `hint`.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: not `(b, c, h, w)`, shapes differ, a level below 1, or an unknown `reduction`.
        TypeError: not floating-point tensors, or `levels` that are no whole numbers.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]]), torch.zeros(1, 1, 2, 2)
        >>> hierarchical_context(student, teacher).item()  # (1 + 0.25 / 2) / 1.5
        0.75

    References:
        Chen, Liu, Zhao, Jia, *Distilling Knowledge via Knowledge Review*, arXiv 2104.09044, the hierarchical context
        loss; values are those of mdistiller for square maps. There a level is left out by the height alone, and a map
        narrower than it is stretched. The pooling is done once, on the difference. The paper's other half, the fusion
        of each student stage with the deeper ones, is no loss: such a network is a projection (`project=` of a `Term`)
        where it reads one stage.
    """
    check_levels("hierarchical_context", levels)
    check_pair("hierarchical_context", student, teacher, "b c h w")
    origin = student.dtype
    height, width = student.shape[2:]
    with full_precision(student):
        student, teacher = promote(student, teacher)
        count = max(prod(student.shape[1:]), 1)
        gap = hold_steep(student - teacher, count, origin)
        losses, part, whole = gap.square().sum((1, 2, 3)) / count, 1.0, 1.0
        for level in levels:
            grid = (min(level, height), min(level, width))
            if grid == (height, width) or 0 in grid:
                continue
            part /= 2
            whole += part
            # Uneven windows overlap: a value may lie in four of them.
            pooled = hold_steep(F.adaptive_avg_pool2d(gap, grid), count / 4, origin)
            losses = losses + part * pooled.square().mean((1, 2, 3))
        return reduce("hierarchical_context", losses / whole, reduction, weight)


class HierarchicalContextLoss(nn.Module):
    """`hierarchical_context` as a Module; the formula and the arguments are there.

    Args:
        levels: sides of the coarser grids, each at least 1.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: a level below 1, or an unknown `reduction`.
        TypeError: `levels` that are no whole numbers.

    Examples:
        >>> import torch
        >>> loss = HierarchicalContextLoss()
        >>> loss
        HierarchicalContextLoss(levels=(4, 2, 1), reduction='mean')
        >>> loss(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)).item()
        1.0
    """

    per_sample: ClassVar[bool] = True

    def __init__(self, *, levels: Sequence[int] = (4, 2, 1), reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        check_levels("HierarchicalContextLoss", levels)
        check_choice("HierarchicalContextLoss", "reduction", reduction, REDUCTIONS)
        self.levels = tuple(levels)
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, c, h, w)` against `teacher`; `reduction=None` means the constructor's."""
        return hierarchical_context(
            student, teacher, levels=self.levels, reduction=reduction or self.reduction, weight=weight
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"levels={self.levels!r}, reduction={self.reduction!r}"
