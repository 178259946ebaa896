"""Attention transfer: the spatial attention maps of the student as those of the teacher."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank, check_same_batch
from kdlib._maths import Reduction, full_precision, hold_short, promote, promoted_dtype, reduce, rescale, unit_rows
from kdlib.losses._checks import check_map
from kdlib.losses._module import FunctionLoss
from kdlib.losses.features._energy import scaled_energy

__all__ = ["AttentionTransferLoss", "attention_map", "attention_transfer"]


def attention_map(features: Tensor, p: float = 2) -> Tensor:
    r"""Compute the spatial attention map :math:`A = \frac{1}{c} \sum_c |F_c|^p` of features.

    Args:
        features: `(b, c, h, w)`.
        p: exponent, at least 1; a larger one gives more weight to the strongest channel.

    Returns:
        `(b, h, w)`, at least 0, not normalized. Float32, or float64 if given float64.

    Raises:
        ValueError: `features` is not `(b, c, h, w)`, or `p` is below 1.
        TypeError: `features` is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> attention_map(torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]]))
        tensor([[[5., 2.]]])

    References:
        Zagoruyko, Komodakis, *Paying More Attention to Attention*, arXiv 1612.03928, section 3.1.
    """
    check_number("attention_map", "p", p, min=1)
    check_floating("attention_map", features=features)
    check_rank("attention_map", "features", features, "b c h w")
    with full_precision(features):
        features = promote(features, features)[0]
        return (features.square() if p == 2 else features.abs().pow(p)).mean(1)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, p: float = 2, reduction: Reduction = "mean", weight: Tensor | None = None
) -> Tensor:
    r"""Compute the squared distance of the student's and the teacher's attention maps, each flattened and of unit norm.

    .. math:: \left\| \frac{\mathrm{vec} A_s}{\|A_s\|} - \frac{\mathrm{vec} A_t}{\|A_t\|} \right\|^2

    with :math:`A` the `attention_map` of a sample; between 0 and 2. The numbers of channels may differ. If the grids
    differ, both maps are average-pooled to the smaller height and the smaller width. A map of zeros, where every unit
    is dead, counts as a zero vector and gets no gradient. The loss does not depend on the scale of either feature.

    With `p=2`, only the gradient takes memory of the size of the features: they are processed in chunks that fit the
    processor's cache, and nothing else is saved for the backward pass. Second derivatives and `torch.func.grad` are
    supported, `torch.func.vmap` is not.

    Args:
        student: features `(b, c, h, w)`, or an attention map `(b, h, w)` with values of at least 0.
        teacher: the same, with any number of channels and any grid; never receives a gradient.
        p: exponent of the attention maps, at least 1; does not apply to inputs that are attention maps.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: An input is neither `(b, c, h, w)` nor `(b, h, w)`, batch sizes differ, `p` is below 1, or
            `reduction` is unknown.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[0.0, 0.0], [0.0, 5.0]]]])
        >>> attention_transfer(student, teacher).item()
        2.0
        >>> attention_transfer(torch.rand(4, 8, 14, 14), torch.rand(4, 64, 7, 7), reduction="none").shape
        torch.Size([4])

    References:
        Zagoruyko, Komodakis, *Paying More Attention to Attention*, arXiv 1612.03928. Public code takes the mean over
        the `h * w` positions instead of the sum, so our value is theirs times `h * w` and does not shrink with the
        grid. It also pools signed features, which may cancel, where we pool the maps.
    """
    check_number("attention_transfer", "p", p, min=1)
    check_floating("attention_transfer", student=student, teacher=teacher)
    check_map("attention_transfer", student=student, teacher=teacher)
    check_same_batch("attention_transfer", "student", student, "teacher", teacher)
    origin = student.dtype
    dtype = promoted_dtype(student, teacher)
    with full_precision(student):
        (a_s, size), (a_t, _) = _scaled_map(student, p, dtype), _scaled_map(teacher.detach(), p, dtype)
        grid = (min(a_s.shape[1], a_t.shape[1]), min(a_s.shape[2], a_t.shape[2]))
        a_s = F.adaptive_avg_pool2d(a_s.unsqueeze(1), grid)
        a_t = F.adaptive_avg_pool2d(a_t.unsqueeze(1), grid)
        (q_s, _), (q_t, _) = unit_rows(a_s.flatten(1)), unit_rows(a_t.flatten(1))
        losses = (q_s - q_t).square().sum(1)
        return reduce("attention_transfer", hold_short(losses, size, origin), reduction, weight)


class AttentionTransferLoss(FunctionLoss):
    """`attention_transfer` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> features = torch.rand(2, 3, 4, 4)
        >>> AttentionTransferLoss()(features, 10 * features).item() < 1e-12
        True
    """

    _function = staticmethod(attention_transfer)

    def __init__(self, *, p: float = 2, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        check_number("AttentionTransferLoss", "p", p, min=1)
        self.p = p


def _scaled_map(features: Tensor, p: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the attention map `(b, h, w)` of the samples divided by their largest magnitudes, and these `(b,)`."""
    if p == 2 and features.dim() == 4:
        energy, _, largest = scaled_energy(features, dtype)
        return energy, largest
    scaled, largest = rescale(features.to(dtype))
    return (attention_map(scaled, p) if scaled.dim() == 4 else scaled), largest
