"""Attentive similarity: cosine of the channel and spatial attention maps of student and teacher."""

import torch
from torch import Tensor

from kdlib._checks import check_floating, check_number, check_pair, check_same_batch, check_shares
from kdlib._maths import Reduction, full_precision, hold_short, promote, promoted_dtype, reduce, unit_rows
from kdlib.losses._checks import check_layouts, check_map
from kdlib.losses._layers import pool_to_smaller
from kdlib.losses._module import FunctionLoss
from kdlib.losses.features._energy import scaled_energy

__all__ = ["AttentiveSimilarityLoss", "attentive_similarity", "channel_attention_map"]


def channel_attention_map(features: Tensor, *, layout: str | None = None) -> Tensor:
    r"""Compute the channel attention map :math:`A_c = \frac{1}{h w} \sum_{y,x} F_{c,y,x}^2` of features.

    Args:
        features: `(b, c, h, w)`, or `(b, h, w, c)` with that layout.
        layout: `"bchw"` or `"bhwc"`; `None` is `"bchw"` unless the shape looks like `(b, h, w, c)`, which is an error.

    Returns:
        `(b, c)`, at least 0, not normalized. Float32, or float64 if given float64.

    Raises:
        ValueError: `features` is no map, or its layout is ambiguous.
        TypeError: `features` is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> channel_attention_map(torch.tensor([[[[1.0, -3.0]], [[0.0, 2.0]]]]))
        tensor([[5., 2.]])
    """
    check_floating("channel_attention_map", features=features)
    features = check_map("channel_attention_map", "features", features, layout)
    with full_precision(features):
        return promote(features, features)[0].square().mean((2, 3))


def attentive_similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    channel: float = 1.0,
    spatial: float = 1.0,
    layout: str | None = None,
    student_layout: str | None = None,
    teacher_layout: str | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute one minus the cosine of the student's and the teacher's channel and spatial attention maps.

    .. math:: \lambda_c \, (1 - \cos(A^c_s, A^c_t)) + \lambda_s \, (1 - \cos(A^s_s, A^s_t))

    for a sample, with :math:`A^c` the `channel_attention_map` of its features (c values) and :math:`A^s` their
    `attention_map` (h w values). Each part is between 0 and its factor, because the maps are not negative. The loss
    does not depend on the scale of either feature. Zero features are treated as orthogonal to everything (cosine 0) and
    get no gradient. If the grids differ, both spatial maps are average-pooled to the smaller height and the smaller
    width. Second derivatives and `torch.func.grad` are supported, `torch.func.vmap` is not.

    Args:
        student: features `(b, c, h, w)`, or `(b, h, w, c)` with that layout.
        teacher: features `(b, c, H, W)`, with the same number of channels and any grid; never receives a gradient.
        channel: factor :math:`\lambda_c`, at least 0. 0 omits the part, and the numbers of channels may differ.
        spatial: factor :math:`\lambda_s`, at least 0. 0 omits the part.
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
        ValueError: An input is no map, its layout is ambiguous, batch sizes or numbers of channels differ, a factor is
            below 0, both are 0, or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

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
        Recognition*, arXiv 2209.14498. The paper compares maps that are learned by CBAM modules inside both networks.
        Ours are the energies of any features, which is our definition, so that networks without such modules can be
        used. To compare learned maps, tap them and use `angular_distill` with `form="cosine"` on each. The paper's code
        multiplies the sum over all blocks by 5.
    """
    check_number("attentive_similarity", "channel", channel, min=0)
    check_number("attentive_similarity", "spatial", spatial, min=0)
    check_shares("attentive_similarity", "channel, spatial", (channel, spatial))
    check_floating("attentive_similarity", student=student, teacher=teacher)
    student = check_map("attentive_similarity", "student", student, student_layout or layout, "student_layout")
    teacher = check_map("attentive_similarity", "teacher", teacher, teacher_layout or layout, "teacher_layout")
    check_same_batch("attentive_similarity", "student", student, "teacher", teacher)
    if channel and student.shape[1] != teacher.shape[1]:
        check_pair("attentive_similarity", student, teacher, "b c h w")
    origin = student.dtype
    dtype = promoted_dtype(student, teacher)
    with full_precision(student):
        spatial_s, channel_s, size = scaled_energy(student, dtype, channels=channel > 0)
        spatial_t, channel_t, _ = scaled_energy(teacher.detach(), dtype, channels=channel > 0)
        losses = channel * _one_minus_cosine(channel_s, channel_t) if channel else torch.zeros_like(size)
        if spatial:
            a_s, a_t = pool_to_smaller(spatial_s.unsqueeze(1), spatial_t.unsqueeze(1))
            losses = losses + spatial * _one_minus_cosine(a_s.flatten(1), a_t.flatten(1))
        return reduce("attentive_similarity", hold_short(losses, size, origin), reduction, weight)


def _one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return one minus the cosine of each pair of rows, `(b,)`, as half the squared chord, which does not cancel."""
    (unit_a, size_a), (unit_b, size_b) = unit_rows(a), unit_rows(b)
    return torch.where((size_a > 0) & (size_b > 0), (unit_a - unit_b).square().sum(1) / 2, 1.0)


class AttentiveSimilarityLoss(FunctionLoss):
    """`attentive_similarity` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> features = torch.rand(2, 3, 4, 4)
        >>> AttentiveSimilarityLoss(channel=0.5)(features, 10 * features).item() < 1e-12
        True
    """

    _function = staticmethod(attentive_similarity)

    def __init__(
        self,
        *,
        channel: float = 1.0,
        spatial: float = 1.0,
        layout: str | None = None,
        student_layout: str | None = None,
        teacher_layout: str | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        check_number("AttentiveSimilarityLoss", "channel", channel, min=0)
        check_number("AttentiveSimilarityLoss", "spatial", spatial, min=0)
        check_shares("AttentiveSimilarityLoss", "channel, spatial", (channel, spatial))
        check_layouts(
            "AttentiveSimilarityLoss", layout=layout, student_layout=student_layout, teacher_layout=teacher_layout
        )
        self.channel, self.spatial = channel, spatial
        self.layout, self.student_layout, self.teacher_layout = layout, student_layout, teacher_layout
