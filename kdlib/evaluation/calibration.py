"""Stage 7: does a network know how often it is right? One number on logits and classes. Touches tensors alone."""

import torch
from torch import Tensor

from kdlib._checks import check_floating, check_number, check_rank
from kdlib.losses._checks import check_target

__all__ = ["calibration_error"]


@torch.no_grad()
def calibration_error(logits: Tensor, target: Tensor, *, bins: int = 15) -> Tensor:
    r"""How far the confidence of the chosen class is from the share of right choices (expected calibration error).

    With the samples in M bins of equal width by their confidence :math:`c_i`, the largest probability of
    softmax(logits), bin m holding those in :math:`((m - 1) / M, m / M]`, and :math:`a_i` 1 where the class of the largest
    logit is the target and else 0,

    .. math:: \sum_m \frac{|B_m|}{b} \Bigl| \operatorname*{mean}_{i \in B_m} a_i - \operatorname*{mean}_{i \in B_m} c_i
              \Bigr|

    Ask it of the student and of its teacher: a student may choose as its teacher does and be far surer of it. The
    number hangs on how many samples and bins there are; compare like with like.

    Args:
        logits: `(b, c)`.
        target: `(b,)` classes, whole numbers from 0 to c - 1.
        bins: M, at least 1.

    Returns:
        Scalar in [0, 1]; 0 of an empty batch. In the dtype of the logits, computed in float64.

    Raises:
        TypeError, ValueError: tensors of other kinds or shapes, a class out of range, no bin.

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
    check_number(owner, "bins", bins, min=1, integer=True)
    if not logits.numel():
        return logits.new_zeros(())
    confidence, choice = logits.double().softmax(1).max(1)
    right = (choice == target.to(choice.device)).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    # The bin's share times the difference of its means is the difference of its sums over b.
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device).index_add_(0, place, right - confidence)
    error: Tensor = gaps.abs().sum() / len(logits)
    return error.to(logits.dtype)
