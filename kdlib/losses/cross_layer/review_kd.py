"""ReviewKD: each layer of the student, fused with the deeper ones, learns from a layer of the teacher."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_number, check_weight
from kdlib._maths import Reduction, full_precision, reduce
from kdlib.losses._checks import check_channels, check_layers, check_levels, check_same_layers
from kdlib.losses._layers import convolve, kept, normalize, promote_layers
from kdlib.losses._module import LossModule
from kdlib.losses.features.hierarchical_context import hierarchical_context

__all__ = ["ReviewKDLoss"]


class ReviewKDLoss(LossModule):
    r"""`hierarchical_context` of fused layers: the shallow layers of the teacher are reviewed by the deep ones of the student.

    .. math::
        \sum_{l=1}^{L} \mathrm{hierarchical\_context}(C_l(f_l), t_l), \qquad
        f_L = A_L s_L, \qquad f_l = z^1_l \odot A_l s_l + z^2_l \odot U f_{l+1}

    for a sample, with the layers s of the student and t of the teacher from the shallowest to the deepest. A is a 1x1
    convolution to `hidden` channels with BatchNorm, U nearest-neighbor resizing to the grid of :math:`s_l`, and the two
    attention maps :math:`z_l = \sigma(W_l [A_l s_l, U f_{l+1}])` with values from 0 to 1 come from a 1x1 convolution. If
    the grids of :math:`s_l` and :math:`t_l` differ, :math:`f_l` is resized to that of :math:`t_l`. :math:`C_l` is a 3x3
    convolution to the channels of the teacher with BatchNorm.

    Samples of weight 0 take no part in the statistics of BatchNorm. The layers of the fusion have parameters, which the
    optimizer must receive; they are not part of the deployed student. Computations use float32 even if the parameters
    have half precision.

    Args:
        student_channels: c of each of the student's layers, `(b, c, h, w)` or `(b, c)`, the shallowest first.
        teacher_channels: the same of the teacher, as many.
        hidden: channels of the fused features; `None` for those of the student's last layer, at most 512.
        levels: sides of the coarser grids of `hierarchical_context`.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, or different numbers of layers.

    Examples:
        >>> import torch
        >>> loss = ReviewKDLoss([8, 16, 16], [16, 32, 64])
        >>> loss
        ReviewKDLoss((8, 16, 16), (16, 32, 64), hidden=None, levels=(4, 2, 1), reduction='mean')
        >>> students = [torch.rand(4, 8, 8, 8), torch.rand(4, 16, 4, 4), torch.rand(4, 16)]  # the last one is pooled
        >>> teachers = [torch.rand(4, 16, 8, 8), torch.rand(4, 32, 8, 8), torch.rand(4, 64)]
        >>> loss(students, teachers).shape
        torch.Size([])

    References:
        Chen, Liu, Zhao, Jia, *Distilling Knowledge via Knowledge Review*, arXiv 2104.09044. Values equal those of the
        authors' code for square grids. The attention maps are computed before the deeper features are enlarged, without
        concatenation, which is the same. The authors start with a weight of 0 that grows linearly over the first epochs.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        hidden: int | None = None,
        levels: Sequence[int] = (4, 2, 1),
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        owner = "ReviewKDLoss"
        self.student_channels = check_channels(owner, "student_channels", student_channels)
        self.teacher_channels = check_channels(owner, "teacher_channels", teacher_channels)
        check_same_layers(owner, self.student_channels, self.teacher_channels)
        if hidden is not None:
            check_number(owner, "hidden", hidden, min=1, integer=True)
        self.hidden, self.levels = hidden, check_levels(owner, levels)
        width = min(512, self.student_channels[-1]) if hidden is None else hidden
        last = len(self.student_channels) - 1
        self.fusions = nn.ModuleList(
            _Fusion(s, width, t, fuse=k < last)
            for k, (s, t) in enumerate(zip(self.student_channels, self.teacher_channels, strict=True))
        )

    def forward(
        self,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        *,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Compare the layers of both sides, each `(b, c, h, w)` or `(b, c)`; `reduction=None` uses the constructor's."""
        owner = "ReviewKDLoss"
        check_layers(owner, students, self.student_channels, teachers, self.teacher_channels)
        check_weight(owner, weight, students[0].shape[0])
        keep = kept(weight)
        with full_precision(students[0]):
            s, t = promote_layers(students, teachers)
            fused, parts = None, []
            for fusion, x, y in reversed([*zip(self.fusions, s, t, strict=True)]):
                compared, fused = fusion(x, fused, (y.shape[2], y.shape[3]), keep)
                parts.append(hierarchical_context(compared, y, levels=self.levels, layout="bchw", reduction="none"))
            return reduce(owner, torch.stack(parts).sum(0), reduction or self.reduction, weight)


class _Fusion(nn.Module):
    """Attention-based fusion of a layer with the features of the deeper ones."""

    def __init__(self, student_channels: int, hidden: int, teacher_channels: int, *, fuse: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(student_channels, hidden, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(hidden)
        self.attention = nn.Conv2d(2 * hidden, 2, 1) if fuse else None
        self.second = nn.Conv2d(hidden, teacher_channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(teacher_channels)
        for layer in (self.first, self.second):
            nn.init.kaiming_uniform_(layer.weight, a=1)

    def forward(
        self, student: Tensor, deeper: Tensor | None, grid: tuple[int, int], keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the features to compare `(b, teacher_channels, *grid)` and the fused ones `(b, hidden, *grid)`."""
        x = normalize(self.first_norm, convolve(self.first, student), keep)
        if self.attention is not None and deeper is not None:
            size = (x.shape[2], x.shape[3])
            (own, other), bias = self.attention.weight.to(x.dtype).chunk(2, 1), cast(Tensor, self.attention.bias)
            # Convolution and nearest-neighbor resizing commute: the deeper features are read on their own grid.
            maps = F.conv2d(x, own, bias.to(x.dtype)) + resize(F.conv2d(deeper, other), size)
            z = maps.sigmoid()
            x = x * z[:, :1] + resize(deeper, size) * z[:, 1:]
        x = resize(x, grid)
        return normalize(self.second_norm, convolve(self.second, x), keep), x


def resize(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize `(b, c, h, w)` by nearest neighbors."""
    return x if tuple(x.shape[2:]) == grid else F.interpolate(x, grid, mode="nearest")
