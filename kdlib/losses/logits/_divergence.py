"""The Kullback-Leibler divergence of two rows of probabilities, precise also where they are nearly equal."""

import torch
from torch import Tensor

__all__ = ["MIN_LOG", "divergence", "probability_gap"]

MIN_LOG = -1e30
"""Smaller log-probabilities count as this one, because differences could overflow to -inf, and 0 * -inf is NaN."""

MAX_SMALL = 0.25
"""Smaller divergences are computed from differences of logits, as those of log-probabilities cancel."""


def divergence(log_s: Tensor, log_t: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return KL(t || s) of each row `(n,)`, and the log-ratios `log s - log t` `(n, c)`.

    With p the probabilities t and d the differences of the logits, x = d - sum(p d) has the mean 0 under p, so
    :math:`\mathrm{KL} = \log \sum p e^x = \log(1 + \sum p (e^x - 1 - x))`, a sum without negative terms.

    Args:
        log_s: log-probabilities of the student, at least `MIN_LOG`.
        log_t: log-probabilities of the teacher, at least `MIN_LOG`.
        difference: `log_s - log_t` up to a constant of each row, without rounding errors of the logarithms.
    """
    p_t = log_t.exp()
    plain = (p_t * (log_t - log_s)).sum(1, keepdim=True)
    difference = difference.clamp(MIN_LOG, -MIN_LOG)
    x = difference - (p_t * difference).sum(1, keepdim=True)
    # e^x - 1 - x, by its series near 0; for large x, p e^x is the student's probability times e^KL.
    low = x.clamp(max=1)
    near = torch.where(low.abs() < torch.finfo(x.dtype).eps ** 0.25, low, 0.0)
    above = torch.where(near == 0, low.expm1() - low, near * near * (0.5 + near * (1 / 6 + near / 24)))
    terms = torch.where(x < 1, p_t * above, log_s.exp() * plain.clamp(max=1).exp() - p_t * (1 + x))
    value = torch.where(plain < MAX_SMALL, terms.sum(1, keepdim=True).clamp(min=0).log1p(), plain)
    return value.squeeze(1), x - value


def probability_gap(log_s: Tensor, log_t: Tensor, ratio: Tensor) -> Tensor:
    """Return the student's minus the teacher's probabilities `(n, c)`, precise where they are nearly equal."""
    p_t = log_t.exp()
    return torch.where(ratio.abs() < 1, p_t * ratio.clamp(-1, 1).expm1(), log_s.exp() - p_t)
