"""Expected calibration error."""

import torch
from torch import Tensor

from kdlib._checks import check_floating, check_number, check_rank, check_target

__all__ = ["calibration_error"]


@torch.no_grad()
def calibration_error(logits: Tensor, target: Tensor, *, bins: int = 15) -> Tensor:
    r"""Compute the expected calibration error: the difference between confidence and accuracy, averaged over bins.

    The confidence :math:`c_i` of a sample is the largest probability of softmax(logits). Bin m of M contains the
    samples with a confidence in :math:`((m - 1) / M, m / M]`. With :math:`a_i` 1 where the class of the largest logit
    is the target, else 0,

    .. math:: \sum_m \frac{|B_m|}{b} \Bigl| \operatorname*{mean}_{i \in B_m} a_i - \operatorname*{mean}_{i \in B_m} c_i
              \Bigr|

    Compute it for the student and for the teacher: a student can predict the same classes with a much higher
    confidence. The value depends on the numbers of samples and bins; compare only values with equal numbers.

    Args:
        logits: `(b, c)`.
        target: `(b,)` classes, whole numbers from 0 to c - 1.
        bins: M, at least 1.

    Returns:
        Scalar in [0, 1], in the dtype of the logits, computed in float64; 0 for an empty batch.

    Raises:
        TypeError, ValueError: wrong dtypes or shapes, a class out of range, or `bins` below 1.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, -9.0]])  # confidence 1/2, 1/2, 1
        >>> calibration_error(logits, torch.tensor([0, 1, 0])).round(decimals=4)  # right 1 of 2, and 1 of 1
        tensor(0.)
        >>> calibration_error(logits, torch.tensor([0, 1, 1])).round(decimals=4)
        tensor(0.3333)

    References:
        Guo, Pleiss, Sun, Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017, arXiv 1706.04599.
    """
    owner = "calibration_error"
    check_floating(owner, logits=logits)
    check_rank(owner, "logits", logits, "b c")
    check_target(owner, target, *logits.shape)
    bins = check_number(owner, "bins", bins, min=1, integer=True)
    if not logits.numel():
        return logits.new_zeros(())
    confidence, choice = logits.double().softmax(1).max(1)
    correct = (choice == target.to(choice.device)).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    # A bin's share times the difference between its means equals the difference between its sums, divided by b.
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, index, correct - confidence)
    error: Tensor = gaps.abs().sum() / len(logits)
    return error.to(logits.dtype)
