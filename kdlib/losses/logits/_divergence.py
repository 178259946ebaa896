"""Probabilities of logits and their Kullback-Leibler divergence, precise also where they are nearly equal."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdlib._checks import readable

__all__ = ["MIN_LOG", "centered", "divergence", "probability_gap", "soften"]

MIN_LOG = -1e30
"""Smaller log-probabilities count as this one, because differences could overflow to -inf, and 0 * -inf is NaN."""

MAX_SMALL = 1e-2
"""Smaller divergences are computed from differences of logits, as those of log-probabilities cancel."""


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return `logits / temperature` `(n, c)`, minus a constant of each row if the quotient could overflow."""
    return logits / temperature if temperature >= 1 else centered(logits, temperature)


def centered(logits: Tensor, temperature: float) -> Tensor:
    """Return `(logits - max) / temperature` `(n, c)`, at most 0 and finite; the maximum is a constant to autograd."""
    softened = (logits - logits.detach().amax(1, keepdim=True)) / temperature
    return softened.clamp(min=torch.finfo(logits.dtype).min)


def divergence(log_s: Tensor, log_t: Tensor, difference: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
    r"""Return KL(t || s) of each row `(n,)`, and precise log-ratios `log s - log t` `(n, c)` if a row needs them.

    With p the probabilities t and d the differences of the logits, x = d - sum(p d) has the mean 0 under p, so
    :math:`\mathrm{KL} = \log \sum p e^x = \log(1 + \sum p (e^x - 1 - x))`, a sum without negative terms.

    Args:
        log_s: log-probabilities of the student, at least `MIN_LOG`.
        log_t: log-probabilities of the teacher, at least `MIN_LOG`.
        difference: returns `log_s - log_t` up to a constant of each row, without the rounding errors of logarithms.
    """
    p_t = log_t.exp()
    plain = (log_t - log_s).mul_(p_t).sum(1, keepdim=True)  # in place: two matrices at a time instead of three
    # The rest takes four times as long. On an accelerator, reading the values would force a wait.
    if plain.device.type == "cpu" and readable(plain) and not bool((plain < MAX_SMALL).any()):
        return plain.squeeze(1), None
    d = difference().clamp(MIN_LOG, -MIN_LOG)
    x = d - (p_t * d).sum(1, keepdim=True)
    # e^x - 1 - x, by its series near 0; for large x, p e^x is the student's probability times e^KL.
    low = x.clamp(max=1)
    near = torch.where(low.abs() < torch.finfo(x.dtype).eps ** 0.25, low, 0.0)
    above = torch.where(near == 0, low.expm1() - low, near * near * (0.5 + near * (1 / 6 + near / 24)))
    terms = torch.where(x < 1, p_t * above, log_s.exp() * plain.clamp(max=1).exp() - p_t * (1 + x))
    value = torch.where(plain < MAX_SMALL, terms.sum(1, keepdim=True).clamp(min=0).log1p(), plain)
    return value.squeeze(1), x - value


def probability_gap(log_s: Tensor, log_t: Tensor, ratio: Tensor | None) -> Tensor:
    """Return the student's minus the teacher's probabilities `(n, c)`, precise where they are nearly equal."""
    p_t = log_t.exp()
    if ratio is None:
        return log_s.exp() - p_t
    return torch.where(ratio.abs() < 1, p_t * ratio.clamp(-1, 1).expm1(), log_s.exp() - p_t)
