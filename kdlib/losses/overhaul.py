"""Losses: overhaul of feature distillation, pre-activations as the teacher's where it fires. Touches tensors only.

Heo et al., 2019: a ReLU with a margin on the teacher, and a squared distance that leaves alone what is below it already.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_choice, check_floating, check_rank, check_same_batch, check_shape
from kdlib._maths import REDUCTIONS, full_precision, promote, reduce
from kdlib.losses._checks import check_affine, check_margin
from kdlib.losses._squares import mean_square

__all__ = ["OverhaulLoss", "overhaul", "overhaul_margin"]

RARE = 1e-3
"""Where a value is negative with a smaller probability, its mean below zero is not taken, as in the authors' code."""
HUGE = 1e30
"""A larger value counts as this one before a mean over places, which must not leave float32."""


def overhaul_margin(norm: nn.Module) -> Tensor:
    r"""The margin of each channel for `overhaul`: the mean of a BatchNorm's output where it is negative.

    .. math::
        E[x \mid x < 0] = \beta - |\gamma| \, \frac{\varphi(\beta / |\gamma|)}{\Phi(-\beta / |\gamma|)}

    for a normal :math:`x` with mean :math:`\beta` and standard deviation :math:`|\gamma|`, the bias and the weight of the
    layer, with :math:`\varphi` the density and :math:`\Phi` the distribution function of the standard normal. Where x is
    negative with a probability of 0.001 or less, the margin is :math:`-3 |\gamma|`.

    Args:
        norm: the teacher's BatchNorm before the activation whose input `overhaul` compares; anything with a `weight`
            and a `bias` `(c,)`.

    Returns:
        `(c,)`, at most 0, without a graph, on the layer's device. Float32, or float64 if the layer is.

    Raises:
        TypeError: a layer without a weight and a bias of one length, as BatchNorm with `affine=False` is.

    Examples:
        >>> norm = nn.BatchNorm2d(3)
        >>> norm.bias.data = torch.tensor([0.0, -1.0, 4.0])
        >>> overhaul_margin(norm)
        tensor([-0.7979, -1.2876, -3.0000])

    References:
        See `overhaul`; values are those of the authors' code. A layer of weight 0 divides by it there; here such a
        channel has its constant, where that is negative.
    """
    check_affine("overhaul_margin", norm)
    weight, bias = (getattr(norm, name).detach() for name in ("weight", "bias"))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64  # a Metal device has no float64
    with full_precision(weight):
        deviation, mean = weight.to(wide).abs(), bias.to(wide)
        ratio = mean / torch.where(deviation > 0, deviation, 1.0)
        log_probability = torch.special.log_ndtr(-ratio)
        below = mean - deviation * torch.exp(-ratio.square() / 2 - math.log(2 * math.pi) / 2 - log_probability)
        margin = torch.where(log_probability > math.log(RARE), below, -3 * deviation)
        return torch.where(deviation > 0, margin, mean).clamp(max=0).to(dtype)


def overhaul(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float | Tensor,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of pre-activations where the teacher fires or the student does and the teacher does not.

    .. math::
        \frac{1}{n} \sum_i \begin{cases}
            0 & \text{where } s_i \le t'_i \le 0 \\
            (s_i - t'_i)^2 & \text{elsewhere}
        \end{cases}, \qquad t'_i = \max(t_i, m_{c(i)})

    over the n values of one sample, with :math:`m_c \le 0` the margin of value i's channel. Both sides are features
    before the activation. Where the teacher is silent, the student only has to be silent too. Where the grids differ,
    the larger map is average-pooled to the smaller height and width, before the margin. Differences above 1e15 count as
    1e15. A float16 student gets no gradient that float16 cannot hold.

    Args:
        student: pre-activations `(b, c, h, w)` or `(b, d)`, already projected onto the teacher's channels.
        teacher: likewise, of as many channels, on any grid; never receives a gradient.
        margin: `(c,)` or one number for all channels, at most 0, in units of the teacher's features;
            `overhaul_margin` gives that of a BatchNorm.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: not `(b, c, h, w)` or `(b, d)`, batch sizes or channels differ, a `margin` above 0 or of another
            length, or an unknown `reduction`.
        TypeError: not floating-point tensors, or a `margin` that is neither a number nor a tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[-3.0, 1.0, 1.0, 0.0]]), torch.tensor([[-9.0, -9.0, 4.0, -0.5]])
        >>> overhaul(student, teacher, margin=-1.0).item()  # (0 + 4 + 9 + 0.25) / 4
        3.3125
        >>> overhaul(torch.rand(4, 8, 7, 7), torch.rand(4, 8, 14, 14), margin=-torch.ones(8), reduction="none").shape
        torch.Size([4])

    References:
        Heo, Kim, Yun, Park, Kwak, Choi, *A Comprehensive Overhaul of Feature Distillation*, arXiv 1904.01866. Public
        code (mdistiller) takes the sum over the values where we take the mean, and halves it for each stage before the
        last: its number is ours times n at the last stage. It resamples the teacher to the student's grid also where
        the teacher's is the smaller, which repeats its values; here the student is pooled instead, as in our other
        losses of maps. The paper projects by a 1x1 convolution and BatchNorm, which is what `project="auto"` makes.
    """
    check_floating("overhaul", student=student, teacher=teacher)
    layout = "b d" if student.dim() == 2 else "b c h w"
    check_rank("overhaul", "student", student, layout)
    check_rank("overhaul", "teacher", teacher, layout)
    check_same_batch("overhaul", "student", student, "teacher", teacher)
    check_shape("overhaul", "teacher", teacher, layout, **{layout.split()[1]: student.shape[1]})
    check_margin("overhaul", margin, student.shape[1])
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        if student.shape != teacher.shape:
            grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = (F.adaptive_avg_pool2d(x.clamp(-HUGE, HUGE), grid) for x in (student, teacher))
        if isinstance(margin, Tensor):
            margin = margin.detach().to(teacher).reshape(-1, *[1] * (teacher.dim() - 2))
        target = torch.clamp(teacher, min=margin)
        gap = student - target
        silent = (target <= 0) & (gap <= 0)
        return reduce("overhaul", mean_square(torch.where(silent, 0.0, gap), origin), reduction, weight)


class OverhaulLoss(nn.Module):
    """`overhaul` as a Module; the formula and the arguments are there.

    A margin of many channels moves with the Module to a device. It is an argument as others are, not a part of the
    state dict.

    Args:
        margin: `(c,)` or a number, at most 0; `overhaul_margin(norm)` of the teacher's BatchNorm.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: a `margin` above 0 or of another shape, or an unknown `reduction`.
        TypeError: a `margin` that is neither a number nor a floating-point tensor.

    Examples:
        >>> import torch
        >>> loss = OverhaulLoss(overhaul_margin(nn.BatchNorm2d(8)))
        >>> loss(torch.zeros(2, 8, 7, 7), -torch.ones(2, 8, 7, 7)).item() < 0.64  # 0.7979 squared
        True
        >>> OverhaulLoss(-0.5)
        OverhaulLoss(margin=-0.5, reduction='mean')
    """

    per_sample: ClassVar[bool] = True
    margin: float | Tensor

    def __init__(self, margin: float | Tensor, *, reduction: Literal["mean", "none"] = "mean") -> None:
        super().__init__()
        check_margin("OverhaulLoss", margin, None)
        check_choice("OverhaulLoss", "reduction", reduction, REDUCTIONS)
        if isinstance(margin, Tensor):
            self.register_buffer("margin", margin.detach().clone(), persistent=False)
        else:
            self.margin = margin
        self.reduction = reduction

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, c, h, w)` or `(b, d)` against `teacher`; `reduction=None`: the constructor's."""
        return overhaul(student, teacher, margin=self.margin, reduction=reduction or self.reduction, weight=weight)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the loss; margins to six digits, of many channels the first and the last."""
        shown = repr(self.margin)
        if isinstance(self.margin, Tensor):
            values = [repr(float(f"{value:.6g}")) for value in self.margin.flatten().tolist()]
            values = values if len(values) <= 6 else [*values[:2], "...", values[-1]]
            shown = f"torch.tensor([{', '.join(values)}])"
        return f"margin={shown}, reduction={self.reduction!r}"
