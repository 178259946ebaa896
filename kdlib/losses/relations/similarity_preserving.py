"""Similarity preservation: the matrix of dot products between samples as the teacher's, with rows of unit length."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kdlib._checks import check_floating
from kdlib._maths import MeanOnly, full_precision, shortest_length, unit_rows
from kdlib.losses._module import RelationLoss
from kdlib.losses._relations import one_batch, power_of_two

__all__ = ["SimilarityPreservingLoss", "similarity_preserving"]


def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    *,
    gather: bool = False,
    reduction: MeanOnly = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the squared distance of the two matrices of similarities between samples, with rows of unit length.

    .. math::
        \frac{1}{b^2} \sum_{i,j} \left(\frac{G^s_{ij}}{\|G^s_i\|} - \frac{G^t_{ij}}{\|G^t_i\|}\right)^2, \qquad
        G_{ij} = \langle x_i, x_j \rangle, \qquad \|G_i\|^2 = \sum_j G_{ij}^2

    between 0 and 4 / b. The loss does not depend on the scale of either side as a whole, but it depends on the relative
    lengths of samples and on a common offset. The numbers of features may differ. A zero sample has a row of zeros.

    With weights, let :math:`p = w / \sum w` and :math:`n = 1 / \sum p^2`, the effective number of samples (b where all
    weights are equal). Then the rows have :math:`\|G_i\|^2 = n \sum_j p_j G_{ij}^2`, and the loss is
    :math:`\sum_{i,j} p_i p_j (\cdot)^2`. A sample of weight 0 has no influence.

    Args:
        student: features `(b, d, ...)`, flattened after the first dimension.
        teacher: features `(b, D, ...)`, the same; never receives a gradient.
        gather: use the rows of all processes as one batch, as in `rkd_distance`.
        reduction: `"mean"` only, because a relation has no per-sample form.
        weight: `(b,)`, at least 0; only the ratios matter.

    Returns:
        A scalar, 0 if all weights are 0. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The batch sizes differ, or `reduction` is not `"mean"`.
        TypeError: An input is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.tensor([[1.0], [1.0]])
        >>> round(similarity_preserving(student, teacher).item(), 4)
        0.2929
        >>> similarity_preserving(3 * student, student.flip(1)).item()
        0.0

    References:
        Tung, Mori, *Similarity-Preserving Knowledge Distillation*, arXiv 1907.09682, section 3.1. Values equal those
        of RepDistiller; torchdistill divides each row by the sum of its magnitudes, so its values differ.
    """
    check_floating("similarity_preserving", student=student)
    origin = student.dtype
    with full_precision(student):
        student, teacher, share = one_batch("similarity_preserving", student, teacher, reduction, weight, gather)
        if student.numel() * teacher.numel() == 0:
            return student.sum() * 0.0
        difference = _unit_similarities(student, share, origin) - _unit_similarities(teacher, share, origin)
        return share @ difference.square().sum(1) * share.square().sum()


def _unit_similarities(x: Tensor, share: Tensor, origin: torch.dtype) -> Tensor:
    """Return the dot products `(b, b)`, in rows of unit length; column j also has the factor sqrt(share_j)."""
    # One divisor for all rows, a constant to autograd, so that squares neither overflow nor vanish.
    magnitudes = x.detach()
    largest = torch.where(share > 0, torch.maximum(magnitudes.amax(1), -magnitudes.amin(1)), 0.0)
    scale = power_of_two(largest)
    factor = torch.where(share > 0, 1 / scale, 0.0).unsqueeze(1)
    similarities = _dot_products(x, factor) * share.sqrt()
    # The gradient of a row grows as 1 / length of its sample.
    short = (largest < torch.clamp(scale * 1e-30, min=shortest_length(origin))).unsqueeze(1)
    return torch.where(short, unit_rows(similarities.detach())[0], unit_rows(similarities.masked_fill(short, 1))[0])


def _dot_products(x: Tensor, scale: Tensor) -> Tensor:
    """Return the dot products `(b, b)` of the rows `x * scale`."""
    if torch.compiler.is_compiling():  # it instantiates the Function, which torch deprecates
        rows = x * scale
        return rows @ rows.T
    product: Tensor = _DotProducts.apply(x, scale)  # type: ignore[no-untyped-call]  # torch has no types here
    return product


class _DotProducts(Function):
    """`_dot_products` with a gradient that takes one matrix product instead of two.

    The backward pass consists of differentiable operations, so second derivatives and `torch.func.vmap` work.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        rows = x * scale
        return rows @ rows.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        return ((slope + slope.T) * scale) @ (x * scale), None


class SimilarityPreservingLoss(RelationLoss):
    """`similarity_preserving` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    Examples:
        >>> import torch
        >>> features = torch.rand(4, 8, 2, 2)
        >>> SimilarityPreservingLoss()(features, features).item()
        0.0
    """

    _function = staticmethod(similarity_preserving)
