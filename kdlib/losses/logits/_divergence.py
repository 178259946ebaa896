"""Probabilities of logits and their Kullback-Leibler divergence, precise also where they are nearly equal."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdlib._checks import readable

__all__ = ["DIVERGENCES", "MIN_LOG", "Difference", "Divergence", "centered", "divergence", "probability_gap", "soften"]

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"]
Difference: TypeAlias = Callable[[], Tensor]

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


def divergence(log_s: Tensor, log_t: Tensor, difference: Difference) -> tuple[Tensor, Tensor | None]:
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
    if readable(plain) and not bool((plain < MAX_SMALL).any()):
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


@dataclass(frozen=True)
class Measure:
    """A divergence of the student's probabilities s from the teacher's t, along dimension 1.

    Both functions take `log_s`, `log_t` and `difference` as `divergence` does, and the share of t in a mixture.

    Args:
        value: the divergence of each row, `(n, c, ...)` to `(n, ...)`.
        slope: its derivative by the student's logits, `(n, c, ...)`.
    """

    value: Callable[[Tensor, Tensor, Difference, float], Tensor]
    slope: Callable[[Tensor, Tensor, Difference, float], Tensor]


def _forward(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    return divergence(log_s, log_t, difference)[0]


def _forward_slope(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    return probability_gap(log_s, log_t, divergence(log_s, log_t, difference)[1])


def _reverse(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    return divergence(log_t, log_s, lambda: -difference())[0]


def _reverse_slope(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    value, ratio = divergence(log_t, log_s, lambda: -difference())
    ratio = log_t - log_s if ratio is None else ratio
    return log_s.exp() * (-ratio - value.unsqueeze(1))


def _jensen_shannon(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    ratio = _ratio(log_s, log_t, difference)
    middle = torch.logaddexp(log_s, log_t) - math.log(2)
    from_t = divergence(middle, log_t, lambda: _log_mixture(ratio, 0.5))[0]
    return (from_t + divergence(middle, log_s, lambda: _log_mixture(-ratio, 0.5))[0]) / 2


def _jensen_shannon_slope(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    ratio = _ratio(log_s, log_t, difference)
    return _centered(log_s, _log_mixture(-ratio, 0.5)) / -2


def _skewed(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    ratio = _ratio(log_s, log_t, difference)
    mixture = torch.logaddexp(log_s + math.log1p(-share), log_t + math.log(share))
    return divergence(mixture, log_t, lambda: _log_mixture(ratio, 1 - share))[0]


def _skewed_slope(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Tensor:
    to_t = _log_mixture(_ratio(log_s, log_t, difference), 1 - share)
    return _centered(log_s, (-to_t).expm1()) * -(1 - share)


def _ratio(log_s: Tensor, log_t: Tensor, difference: Difference) -> Tensor:
    """Return `log s - log t`, precise where it is near 0."""
    ratio = divergence(log_s, log_t, difference)[1]
    return log_s - log_t if ratio is None else ratio


def _log_mixture(ratio: Tensor, share: float) -> Tensor:
    """Return log(share e^ratio + 1 - share), precise where the ratio is near 0."""
    near = (share * ratio.clamp(-1, 1).expm1()).log1p()
    far = torch.logaddexp(ratio + math.log(share), torch.full_like(ratio, math.log1p(-share)))
    return torch.where(ratio.abs() < 1, near, far)


def _centered(log_s: Tensor, x: Tensor) -> Tensor:
    """Return p_s (x - sum(p_s x))."""
    p_s = log_s.exp()
    return p_s * (x - (p_s * x).sum(1, keepdim=True))


DIVERGENCES: dict[Divergence, Measure] = {
    "forward_kl": Measure(_forward, _forward_slope),
    "reverse_kl": Measure(_reverse, _reverse_slope),
    "jensen_shannon": Measure(_jensen_shannon, _jensen_shannon_slope),
    "skewed_kl": Measure(_skewed, _skewed_slope),
}
"""Each divergence with its value and its derivative."""
