"""Neuron selectivity transfer: maximum mean discrepancy between the channels of student and teacher."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib._checks import check_floating, check_same_batch
from kdlib._maths import Reduction, full_precision, hold_short, promote, reduce, rescale, unit_rows
from kdlib.losses._checks import check_layouts, check_map
from kdlib.losses._module import FunctionLoss

__all__ = ["NSTLoss", "nst"]


def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    layout: str | None = None,
    student_layout: str | None = None,
    teacher_layout: str | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the squared maximum mean discrepancy of the two sets of channels, with the kernel :math:`(x^T y)^2`.

    .. math::
        \frac{1}{C^2} \sum_{k,l} \langle t_k, t_l \rangle^2 + \frac{1}{c^2} \sum_{i,j} \langle s_i, s_j \rangle^2
        - \frac{2}{c\,C} \sum_{i,k} \langle s_i, t_k \rangle^2

    for a sample, with :math:`s_i` the map of the student's channel i of c, flattened and divided by its Euclidean
    length, and :math:`t_k` that of the teacher's channel k of C. Between 0 and 2. The loss does not depend on the order
    and the scale of the channels, and their numbers may differ. A channel of zeros, a dead unit, counts as a zero
    vector and gets no gradient. If the grids differ, both features are average-pooled to the smaller height and width.

    An equal form is :math:`\left\| \frac{1}{c} \sum_i s_i s_i^T - \frac{1}{C} \sum_k t_k t_k^T \right\|_F^2`. It is
    used where it needs fewer multiplications: with n = h w positions, `n (c + C)` instead of `c^2 + C^2 + c C`. No
    tensor is larger than `(b, n, n)` or `(b, c, C)`. The value of the first form has a rounding error of about 1e-7 in
    float32; values that this makes negative count as 0.

    Args:
        student: features `(b, c, h, w)`, or `(b, h, w, c)` with that layout.
        teacher: features `(b, C, H, W)`, with any number of channels and any grid; never receives a gradient.
        layout: `"bchw"` or `"bhwc"` for both sides; `None` is `"bchw"` unless the shape looks like `(b, h, w, c)`, which
            is an error.
        student_layout: the layout of the student, if not `layout`.
        teacher_layout: the layout of the teacher, if not `layout`.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: An input is no map, its layout is ambiguous, batch sizes differ, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]], [[0.0, 7.0]]]])
        >>> nst(student, teacher).item()
        2.0
        >>> nst(teacher, teacher.flip(1)).item()
        0.0
        >>> nst(torch.rand(4, 8, 14, 14), torch.rand(4, 64, 7, 7), reduction="none").shape
        torch.Size([4])

    References:
        Huang, Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, arXiv 1707.01219, with
        the polynomial kernel of degree 2 without offset. Values equal those of RepDistiller. Public code broadcasts to
        `(b, c, C, h w)`, which takes 40 times as long.
    """
    check_floating("nst", student=student, teacher=teacher)
    student = check_map("nst", "student", student, student_layout or layout, "student_layout")
    teacher = check_map("nst", "teacher", teacher, teacher_layout or layout, "teacher_layout")
    check_same_batch("nst", "student", student, "teacher", teacher)
    origin = student.dtype
    grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    with full_precision(student):
        student, teacher = promote(student, teacher)
        s_bcn, t_bcn = _unit_channels(student, grid, origin), _unit_channels(teacher, grid, origin)
        c_s, c_t, n = s_bcn.shape[1], t_bcn.shape[1], s_bcn.shape[2]
        if n * (c_s + c_t) <= c_s * c_s + c_t * c_t + c_s * c_t:
            moment_s = s_bcn.transpose(1, 2) @ s_bcn / c_s
            moment_t = t_bcn.transpose(1, 2) @ t_bcn / c_t
            losses = (moment_s - moment_t).square().sum((1, 2))
        else:
            losses = _mean_kernel(t_bcn, t_bcn) + _mean_kernel(s_bcn, s_bcn) - 2 * _mean_kernel(s_bcn, t_bcn)
            losses = losses.clamp(min=0)
        return reduce("nst", losses, reduction, weight)


def _unit_channels(features: Tensor, grid: tuple[int, int], origin: torch.dtype) -> Tensor:
    """Return the channel maps on the grid, flattened and with unit length, `(b, c, n)`."""
    batch, channels, height, width = features.shape
    rows, size = features.reshape(batch * channels, height * width), None
    if (height, width) != grid:
        rows, size = rescale(rows)  # the mean of large values could overflow
        rows = F.adaptive_avg_pool2d(rows.reshape(batch, channels, height, width), grid)
        rows = rows.reshape(batch * channels, grid[0] * grid[1])
    unit, length = unit_rows(rows)
    length = length if size is None else length * size
    return hold_short(unit, length.unsqueeze(1), origin).reshape(batch, channels, grid[0] * grid[1])


def _mean_kernel(x_bcn: Tensor, y_bcn: Tensor) -> Tensor:
    """Return the mean squared dot product between the channels of x and those of y, `(b,)`."""
    return (x_bcn @ y_bcn.transpose(1, 2)).square().mean((1, 2))


class NSTLoss(FunctionLoss):
    """`nst` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> NSTLoss()(torch.ones(2, 3, 1, 1), torch.ones(2, 5, 1, 1)).item()
        0.0
    """

    _function = staticmethod(nst)

    def __init__(
        self,
        *,
        layout: str | None = None,
        student_layout: str | None = None,
        teacher_layout: str | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        check_layouts("NSTLoss", layout=layout, student_layout=student_layout, teacher_layout=teacher_layout)
        self.layout, self.student_layout, self.teacher_layout = layout, student_layout, teacher_layout
