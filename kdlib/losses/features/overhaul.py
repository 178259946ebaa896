"""Overhaul of feature distillation: a squared distance of pre-activations with a margin below zero."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from kdlib._checks import check_batches, check_floating, check_shape
from kdlib._maths import Reduction, full_precision, mean_square, promote, reduce, safe_divisor
from kdlib.losses._checks import check_affine, check_layouts, check_map, check_margin
from kdlib.losses._module import FunctionLoss

__all__ = ["OverhaulLoss", "overhaul", "overhaul_margin"]

RARE = 1e-3
"""If negative values have at most this probability, their mean is not used, as in the authors' code."""
HUGE = 1e30
"""Values are clamped to this magnitude before a mean over positions, which could overflow float32."""


def overhaul_margin(norm: nn.Module) -> Tensor:
    r"""Compute the margin of each channel for `overhaul`: the mean of a BatchNorm's output where it is negative.

    .. math::
        E[x \mid x < 0] = \beta - |\gamma| \, \frac{\varphi(\beta / |\gamma|)}{\Phi(-\beta / |\gamma|)}

    for a normal :math:`x` with mean :math:`\beta`, the bias of the layer, and standard deviation :math:`|\gamma|`, from
    its weight. :math:`\varphi` and :math:`\Phi` are the density and the distribution function of the standard normal.
    If x is negative with a probability of at most 0.001, the margin is :math:`-3 |\gamma|`.

    Args:
        norm: the teacher's BatchNorm before the activation whose input `overhaul` compares, or any module with a
            `weight` and a `bias` `(c,)`.

    Returns:
        `(c,)`, at most 0, without a graph, on the layer's device. Float32, or float64 if the layer is.

    Raises:
        TypeError: The layer has no weight and bias of the same length, as BatchNorm with `affine=False`.

    Examples:
        >>> norm = nn.BatchNorm2d(3)
        >>> norm.bias.data = torch.tensor([0.0, -1.0, 4.0])
        >>> overhaul_margin(norm)
        tensor([-0.7979, -1.2876, -3.0000])

    References:
        See `overhaul`; values equal those of the authors' code. For a weight of 0, their code divides by zero; here the
        margin of such a channel is its constant output if that is negative, otherwise 0.
    """
    check_affine("overhaul_margin", norm)
    weight, bias = (getattr(norm, name).detach() for name in ("weight", "bias"))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64  # Metal devices have no float64
    with full_precision(weight):
        deviation, mean = weight.to(wide).abs(), bias.to(wide)
        ratio = mean / safe_divisor(deviation)
        log_probability = torch.special.log_ndtr(-ratio)
        below = mean - deviation * torch.exp(-ratio.square() / 2 - math.log(2 * math.pi) / 2 - log_probability)
        margin = torch.where(log_probability > math.log(RARE), below, -3 * deviation)
        return torch.where(deviation > 0, margin, mean).clamp(max=0).to(dtype)


def overhaul(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float | Tensor,
    layout: str | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the squared distance of pre-activations, except where both sides are inactive.

    .. math::
        \frac{1}{n} \sum_i \begin{cases}
            0 & \text{where } s_i \le t'_i \le 0 \\
            (s_i - t'_i)^2 & \text{elsewhere}
        \end{cases}, \qquad t'_i = \max(t_i, m_{c(i)})

    over the n values of a sample, with :math:`m_c \le 0` the margin of the channel of value i. Both sides are features
    before the activation. Where the teacher is not active, the loss is 0 for all student values up to
    :math:`t'_i`. If the grids differ, the larger map is average-pooled to the smaller height and width before the
    margin is applied. Differences above 1e15 count as 1e15. A float16 student gets no gradient that overflows float16.

    Args:
        student: pre-activations `(b, c, h, w)`, `(b, h, w, c)` with that layout, or `(b, d)`, already projected onto the
            teacher's channels.
        teacher: the same, with as many channels and any grid; never receives a gradient.
        margin: `(c,)` or one number for all channels, at most 0, in units of the teacher's features;
            `overhaul_margin` computes it from a BatchNorm.
        layout: `"bchw"` or `"bhwc"` of maps; `None` is `"bchw"` unless the shape looks like `(b, h, w, c)`, which is an
            error.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: An input is neither a map nor `(b, d)`, its layout is ambiguous, batch sizes or channels differ, `margin` is above 0
            or has another length, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor, or `margin` is neither a number nor a tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[-3.0, 1.0, 1.0, 0.0]]), torch.tensor([[-9.0, -9.0, 4.0, -0.5]])
        >>> overhaul(student, teacher, margin=-1.0).item()  # (0 + 4 + 9 + 0.25) / 4
        3.3125
        >>> overhaul(torch.rand(4, 8, 7, 7), torch.rand(4, 8, 14, 14), margin=-torch.ones(8), reduction="none").shape
        torch.Size([4])

    References:
        Heo, Kim, Yun, Park, Kwak, Choi, *A Comprehensive Overhaul of Feature Distillation*, arXiv 1904.01866. Public
        code (mdistiller) uses the sum over the values instead of the mean, and halves it for each stage before the
        last: its value is ours times n at the last stage. It always resamples the teacher to the student's grid, which
        repeats values if the teacher's grid is smaller; here the student is pooled instead, as in our other losses of
        maps. The paper projects by a 1x1 convolution and BatchNorm, which is the projection of `project="auto"`.
    """
    check_floating("overhaul", student=student)
    shape = "b d" if student.dim() == 2 else "b c h w"
    check_batches("overhaul", shape, student=student, teacher=teacher)
    if student.dim() == 4:
        student = check_map("overhaul", "student", student, layout)
        teacher = check_map("overhaul", "teacher", teacher, layout)
    check_shape("overhaul", "teacher", teacher, shape, **{shape.split()[1]: student.shape[1]})
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
        difference = student - target
        inactive = (target <= 0) & (difference <= 0)
        return reduce("overhaul", mean_square(torch.where(inactive, 0.0, difference), origin), reduction, weight)


class OverhaulLoss(FunctionLoss):
    """`overhaul` as a Module; see there for the formula and the errors.

    A margin `(c,)` moves with the Module to a device. It is a constructor argument and not part of the state dict.

    Args:
        margin: `(c,)` or a number, at most 0; `overhaul_margin(norm)` of the teacher's BatchNorm.
        layout: `"bchw"` or `"bhwc"` of maps, or `None`.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Examples:
        >>> import torch
        >>> OverhaulLoss(overhaul_margin(nn.BatchNorm2d(1)))(torch.zeros(2, 1), -torch.ones(2, 1)).item()  # 2 / pi
        0.6366...
        >>> OverhaulLoss(-0.5)
        OverhaulLoss(margin=-0.5, reduction='mean')
    """

    _function = staticmethod(overhaul)
    margin: float | Tensor

    def __init__(self, margin: float | Tensor, *, layout: str | None = None, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        check_layouts("OverhaulLoss", layout=layout)
        self.layout = layout
        check_margin("OverhaulLoss", margin, None)
        if isinstance(margin, Tensor):
            self.register_buffer("margin", margin.detach().clone(), persistent=False)
        else:
            self.margin = margin

    @override
    def extra_repr(self) -> str:
        """Return the arguments; margins have six digits, and only the first and the last of many channels are shown."""
        margin = repr(self.margin)
        if isinstance(self.margin, Tensor):
            values = [repr(float(f"{value:.6g}")) for value in self.margin.flatten().tolist()]
            values = values if len(values) <= 6 else [*values[:2], "...", values[-1]]
            margin = f"torch.tensor([{', '.join(values)}])"
        layout = "" if self.layout is None else f", layout={self.layout!r}"
        return f"margin={margin}{layout}, reduction={self.reduction!r}"
