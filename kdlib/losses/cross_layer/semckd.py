"""SemCKD: every layer of the student learns from all layers of the teacher, weighted by learned attention."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_number, check_weight
from kdlib._maths import FAR, Reduction, directions, full_precision, reduce
from kdlib.losses._checks import check_batch_limit, check_channels, check_layers
from kdlib.losses._layers import (
    affine,
    channels_last,
    convolve,
    kept,
    mean_square_error,
    normalize,
    pool_to_smaller,
    promote_layers,
)
from kdlib.losses._module import LossModule

__all__ = ["SemCKDLoss"]


class SemCKDLoss(LossModule):
    r"""Mean squared errors between all layers of the student and of the teacher, weighted by learned attention.

    .. math::
        \frac{1}{S} \sum_{l=1}^{S} \sum_{m=1}^{T} \alpha_{lm} \, \mathrm{mse}(P_{lm} s_l, t_m), \qquad
        \alpha_{lm} = \mathrm{softmax}_m \langle q_l, k_m \rangle

    for a sample, with S layers s of the student and T layers t of the teacher. The projection :math:`P_{lm}` to the
    channels of the teacher's layer has a 1x1, a 3x3 and a 1x1 convolution, with BatchNorm and ReLU between them and
    twice the teacher's channels. If two grids differ, the larger feature is average-pooled to the smaller height and
    the smaller width. The queries :math:`q_l` and the keys :math:`k_m` are unit vectors, computed by a network of two
    linear layers for each layer. The attention selects for each sample and each layer of the student the layers of the
    teacher that it can learn from.

    By default, these networks read the mean of each channel over the positions. With `batch_size`, they read the inner
    products of the sample's features with those of all samples of the batch, as in the paper. Then the attention of a
    sample depends on the other samples and on their order.

    Samples of weight 0 take no part in the statistics of BatchNorm. The networks have parameters, which the optimizer
    must receive; they are not part of the deployed student. Computations use float32 even if the parameters have half
    precision.

    Args:
        student_channels: c of each of the student's layers, `(b, c, h, w)` or `(b, c)`.
        teacher_channels: the same of the teacher; the numbers of layers may differ.
        query_dim: dimensions of queries and keys, at least 1.
        batch_size: the largest batch, for attention by the paper's similarities; smaller batches are filled up with
            zeros. `None` for attention by channel means.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Examples:
        >>> import torch
        >>> loss = SemCKDLoss([8, 16], [16, 32, 64])
        >>> loss
        SemCKDLoss((8, 16), (16, 32, 64), query_dim=16, batch_size=None, reduction='mean')
        >>> students = [torch.rand(4, 8, 8, 8), torch.rand(4, 16, 4, 4)]
        >>> teachers = [torch.rand(4, 16, 8, 8), torch.rand(4, 32, 4, 4), torch.rand(4, 64, 2, 2)]
        >>> loss(students, teachers).shape
        torch.Size([])
        >>> loss.attention(students, teachers).sum(2).shape  # each row sums to 1
        torch.Size([4, 2])

    References:
        Chen, Mei, Zhang, Wang, Wang, Feng, Chen, *Cross-Layer Distillation with Semantic Calibration*, arXiv
        2012.03236. The paper's networks read one row of the similarity matrix of the batch, which fixes the batch size
        and gives weights to positions of a batch in random order; with `batch_size` our values are those of the
        authors' code, in which `query_dim` is a quarter of the batch size. Channel means, the default, are our choice;
        they keep the samples apart but for BatchNorm.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        query_dim: int = 16,
        batch_size: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        owner = "SemCKDLoss"
        self.student_channels = check_channels(owner, "student_channels", student_channels)
        self.teacher_channels = check_channels(owner, "teacher_channels", teacher_channels)
        self.query_dim = check_number(owner, "query_dim", query_dim, min=1, integer=True)
        if batch_size is not None:
            check_number(owner, "batch_size", batch_size, min=1, integer=True)
        self.batch_size = batch_size
        self.queries = nn.ModuleList(_Embedding(batch_size or c, query_dim) for c in self.student_channels)
        self.keys = nn.ModuleList(_Embedding(batch_size or c, query_dim) for c in self.teacher_channels)
        self.projections = nn.ModuleList(
            nn.ModuleList(_Projection(s, t) for t in self.teacher_channels) for s in self.student_channels
        )

    def attention(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Return the weights `(b, S, T)` of the teacher's layers for each layer of the student."""
        check_layers("SemCKDLoss", students, self.student_channels, teachers, self.teacher_channels)
        check_batch_limit("SemCKDLoss", students[0].shape[0], self.batch_size)
        with full_precision(students[0]):
            return self._attention(*promote_layers(students, teachers))

    def forward(
        self,
        students: Sequence[Tensor],
        teachers: Sequence[Tensor],
        *,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Compare the layers of both sides, each `(b, c, h, w)` or `(b, c)`; `reduction=None` uses the constructor's."""
        owner = "SemCKDLoss"
        check_layers(owner, students, self.student_channels, teachers, self.teacher_channels)
        check_weight(owner, weight, students[0].shape[0])
        check_batch_limit(owner, students[0].shape[0], self.batch_size)
        keep = kept(weight)
        with full_precision(students[0]):
            s, t = promote_layers(students, teachers)
            errors = []
            for x, projections in zip(s, self.projections, strict=True):
                for y, project in zip(t, cast(nn.ModuleList, projections), strict=True):
                    pooled, target = pool_to_smaller(x, y)
                    errors.append(mean_square_error(project(pooled, keep), target))
            attention = self._attention(s, t).flatten(1)
            losses = (attention * torch.stack(errors, 1)).sum(1) / len(s)
            return reduce(owner, losses, reduction or self.reduction, weight)

    def _attention(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        q, k = (
            torch.stack([embed(self._described(x)) for embed, x in zip(networks, layers, strict=True)], 1)
            for networks, layers in ((self.queries, students), (self.keys, teachers))
        )
        return (q @ k.transpose(1, 2)).softmax(2)

    def _described(self, x: Tensor) -> Tensor:
        """Return what queries and keys read: `(b, c)` or `(b, batch_size)`."""
        if self.batch_size is None:
            return x.mean((2, 3))
        rows = x.flatten(1)
        return F.pad((rows @ rows.T).clamp(-FAR, FAR), (0, self.batch_size - x.shape[0]))


class _Embedding(nn.Module):
    """Two linear layers and division by the length."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 2 * outputs), nn.Linear(2 * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, inputs)` to `(b, outputs)`."""
        x = affine(self.second, affine(self.first, x).relu())
        return directions(x, x.dtype)[0]


class _Projection(nn.Module):
    """Three convolutions with BatchNorm and ReLU between them."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        width = 2 * teacher_channels
        self.first = nn.Conv2d(student_channels, width, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.third = nn.Conv2d(width, teacher_channels, 1, bias=False)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """`(b, student_channels, h, w)` to `(b, teacher_channels, h, w)`."""
        x = normalize(self.first_norm, convolve(self.first, channels_last(x)), keep).relu_()
        x = normalize(self.second_norm, convolve(self.second, x), keep).relu_()
        return convolve(self.third, x).contiguous()
