"""Losses: attentive similarity, the student attends to the teacher's channels and places. Touches two tensors only.

After Shin et al., A-SKD, 2022: match channel and spatial attention maps of a face network by their cosine.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import (
    check_choice,
    check_floating,
    check_number,
    check_pair,
    check_rank,
    check_same_batch,
    check_shares,
)
from kdlib._maths import REDUCTIONS, full_precision, hold_short, promote, reduce, unit_rows
from kdlib.losses._energy import scaled_energy

__all__ = ["AttentiveSimilarityLoss", "attentive_similarity", "channel_attention_map"]


def channel_attention_map(features: Tensor) -> Tensor:
    r"""Which channels of a feature map carry energy: :math:`A_c = \frac{1}{h w} \sum_{y,x} F_{c,y,x}^2`.

    The counterpart of `attention_map`, which says at which places.

    Args:
        features: `(b, c, h, w)`.

    Returns:
        `(b, c)`, at least 0, not normalized. Float32, or float64 if given float64.

    Raises:
        ValueError: `features` is not `(b, c, h, w)`.
        TypeError: not a floating-point tensor.

    Examples:
        >>> import torch
        >>> channel_attention_map(torch.tensor([[[[1.0, -3.0]], [[0.0, 2.0]]]]))
        tensor([[5., 2.]])
    """
    check_floating("channel_attention_map", features=features)
    check_rank("channel_attention_map", "features", features, "b c h w")
    with full_precision(features):
        return promote(features, features)[0].square().mean((2, 3))


def attentive_similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    channel: float = 1.0,
    spatial: float = 1.0,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""How far the student's channel and spatial attention point away from the teacher's.

    .. math:: \lambda_c \, (1 - \cos(A^c_s, A^c_t)) + \lambda_s \, (1 - \cos(A^s_s, A^s_t))

    for one sample, with :math:`A^c` the `channel_attention_map` of its features (c numbers) and :math:`A^s` their
    `attention_map` (h w numbers); each part is between 0 and its factor, as no map is negative. The loss does not
    depend on the scale of either feature. Features of zeros have no direction: their cosine to anything is taken as
    0, and they get no gradient. Where the grids differ, both spatial maps are average-pooled to the smaller height
    and the smaller width. A gradient of the gradient and `torch.func.grad` work, `torch.func.vmap` does not.

    Args:
        student: features `(b, c, h, w)`.
        teacher: features `(b, c, H, W)`, of as many channels and any grid; never receives a gradient.
        channel: factor :math:`\lambda_c`, at least 0; 0 leaves the part out, and the numbers of channels may differ.
        spatial: factor :math:`\lambda_s`, at least 0; 0 leaves the part out.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: not `(b, c, h, w)`, batch sizes or numbers of channels differ, a factor below 0, both 0, or an
            unknown `reduction`.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
        >>> student[0, 0, 0, 0] = teacher[0, 0, 0, 1] = 3.0
        >>> attentive_similarity(student, teacher).item()
        1.0
        >>> attentive_similarity(student, teacher, spatial=0.0).item()
        0.0

    References:
        Shin et al., *Teaching Where to Look: Attention Similarity Knowledge Distillation for Low Resolution Face
        Recognition*, arXiv 2209.14498. Its maps are those that CBAM modules inside both networks learn; ours are the
        energies of any features, so that networks without such modules can take part: our definition. To compare
        learned maps, tap them and use `angular_distill` with `form="cosine"` on each. Its code weighs the sum over
        all blocks by 5.
    """
    check_number("attentive_similarity", "channel", channel, min=0)
    check_number("attentive_similarity", "spatial", spatial, min=0)
    check_shares("attentive_similarity", "channel, spatial", (channel, spatial))
    check_floating("attentive_similarity", student=student, teacher=teacher)
    check_rank("attentive_similarity", "student", student, "b c h w")
    check_rank("attentive_similarity", "teacher", teacher, "b c h w")
    check_same_batch("attentive_similarity", "student", student, "teacher", teacher)
    if channel and student.shape[1] != teacher.shape[1]:
        check_pair("attentive_similarity", student, teacher, "b c h w")
    origin = student.dtype
    dtype = torch.promote_types(torch.promote_types(origin, teacher.dtype), torch.float32)
    grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    with full_precision(student):
        spatial_s, channel_s, size = scaled_energy(student, dtype, channels=channel > 0)
        spatial_t, channel_t, _ = scaled_energy(teacher.detach(), dtype, channels=channel > 0)
        losses = channel * _gap(channel_s, channel_t) if channel else torch.zeros_like(size)
        if spatial:
            a_s = F.adaptive_avg_pool2d(spatial_s.unsqueeze(1), grid)
            a_t = F.adaptive_avg_pool2d(spatial_t.unsqueeze(1), grid)
            losses = losses + spatial * _gap(a_s.flatten(1), a_t.flatten(1))
        return reduce("attentive_similarity", hold_short(losses, size, origin), reduction, weight)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """`(b,)`: one minus the cosine of each pair of rows, as half the squared chord, which has no cancellation."""
    (unit_a, size_a), (unit_b, size_b) = unit_rows(a), unit_rows(b)
    return torch.where((size_a > 0) & (size_b > 0), (unit_a - unit_b).square().sum(1) / 2, 1.0)


class AttentiveSimilarityLoss(nn.Module):
    """`attentive_similarity` as a Module; the formula and the arguments are there.

    Args:
        channel: factor of the channel part, at least 0.
        spatial: factor of the spatial part, at least 0.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: a factor below 0, both 0, or an unknown `reduction`.

    Examples:
        >>> import torch
        >>> loss = AttentiveSimilarityLoss(channel=0.5)
        >>> loss
        AttentiveSimilarityLoss(channel=0.5, spatial=1.0, reduction='mean')
        >>> features = torch.rand(2, 3, 4, 4)
        >>> loss(features, 10 * features).item() < 1e-12
        True
    """

    per_sample: ClassVar[bool] = True

    def __init__(
        self, *, channel: float = 1.0, spatial: float = 1.0, reduction: Literal["mean", "none"] = "mean"
    ) -> None:
        super().__init__()
        check_number("AttentiveSimilarityLoss", "channel", channel, min=0)
        check_number("AttentiveSimilarityLoss", "spatial", spatial, min=0)
        check_shares("AttentiveSimilarityLoss", "channel, spatial", (channel, spatial))
        check_choice("AttentiveSimilarityLoss", "reduction", reduction, REDUCTIONS)
        self.channel = channel
        self.spatial = spatial
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
        return attentive_similarity(
            student,
            teacher,
            channel=self.channel,
            spatial=self.spatial,
            reduction=reduction or self.reduction,
            weight=weight,
        )

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss."""
        return f"channel={self.channel!r}, spatial={self.spatial!r}, reduction={self.reduction!r}"
