"""Hierarchical context: mean squared error of feature maps at several levels of average pooling."""

from collections.abc import Sequence
from math import prod

from torch import Tensor
from torch.nn import functional as F

from kdlib._checks import check_pair
from kdlib._maths import Reduction, full_precision, hold_steep, promote, reduce
from kdlib.losses._checks import check_layouts, check_levels, check_map
from kdlib.losses._module import FunctionLoss

__all__ = ["HierarchicalContextLoss", "hierarchical_context"]


def hierarchical_context(
    student: Tensor,
    teacher: Tensor,
    *,
    levels: Sequence[int] = (4, 2, 1),
    layout: str | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the mean squared error of two feature maps at full resolution and average-pooled to coarser grids.

    .. math::
        \frac{\sum_{k=0}^{K} 2^{-k} \, \mathrm{mse}(P_k s, P_k t)}{\sum_{k=0}^{K} 2^{-k}}

    for a sample, with :math:`P_0` the identity and :math:`P_k` average pooling to the k-th grid. Level l has the grid
    (min(l, h), min(l, w)); levels with the grid of the map itself are omitted. Each coarser level has half the weight
    of the one before. Differences above 1e15 count as 1e15. A float16 student gets no gradient that overflows float16.

    Args:
        student: features `(b, c, h, w)`, or `(b, h, w, c)` with that layout, already projected into the teacher's space.
        teacher: features of the same shape; never receives a gradient.
        levels: sides of the coarser grids in the order of their weights, each at least 1; an empty sequence gives
            `hint`.
        layout: `"bchw"` or `"bhwc"`; `None` is `"bchw"` unless the shape looks like `(b, h, w, c)`, which is an error.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: An input is no map, its layout is ambiguous, shapes differ, a level is below 1, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor, or a level is not a whole number.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]]), torch.zeros(1, 1, 2, 2)
        >>> hierarchical_context(student, teacher).item()  # (1 + 0.25 / 2) / 1.5
        0.75

    References:
        Chen, Liu, Zhao, Jia, *Distilling Knowledge via Knowledge Review*, arXiv 2104.09044, the hierarchical context
        loss of ReviewKD. Values equal those of mdistiller for square maps; there only the height decides whether a
        level is omitted, and narrower maps are stretched. The pooling is done once, on the difference. `ReviewKDLoss` adds the
        fusion of each student stage with the deeper ones, the other half of the paper.
    """
    levels = check_levels("hierarchical_context", levels)
    check_pair("hierarchical_context", student, teacher, "b c h w")
    student = check_map("hierarchical_context", "student", student, layout)
    teacher = check_map("hierarchical_context", "teacher", teacher, layout)
    origin = student.dtype
    height, width = student.shape[2:]
    with full_precision(student):
        student, teacher = promote(student, teacher)
        count = max(prod(student.shape[1:]), 1)
        difference = hold_steep(student - teacher, count, origin)
        losses, factor, total = difference.square().sum((1, 2, 3)) / count, 1.0, 1.0
        for level in levels:
            grid = (min(level, height), min(level, width))
            if grid == (height, width) or 0 in grid:
                continue
            factor /= 2
            total += factor
            # Uneven windows overlap: a value may be in four of them.
            pooled = hold_steep(F.adaptive_avg_pool2d(difference, grid), count / 4, origin)
            losses = losses + factor * pooled.square().mean((1, 2, 3))
        return reduce("hierarchical_context", losses / total, reduction, weight)


class HierarchicalContextLoss(FunctionLoss):
    """`hierarchical_context` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> HierarchicalContextLoss()(torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)).item()
        1.0
    """

    _function = staticmethod(hierarchical_context)

    def __init__(
        self, *, levels: Sequence[int] = (4, 2, 1), layout: str | None = None, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(reduction=reduction)
        check_layouts("HierarchicalContextLoss", layout=layout)
        self.layout = layout
        self.levels = check_levels("HierarchicalContextLoss", levels)
