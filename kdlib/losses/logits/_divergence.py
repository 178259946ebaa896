"""Probabilities of logits and their Kullback-Leibler divergence, precise also where they are nearly equal."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kdlib._checks import readable

__all__ = [
    "DIVERGENCES", "MIN_LOG", "Difference", "Divergence", "Measured", "centered", "divergence", "log_probabilities",
    "probability_gap", "soften",
]  # fmt: skip

Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"]
Difference: TypeAlias = Callable[[], Tensor]

MIN_LOG = -1e30
"""Smaller log-probabilities count as this one, because differences could overflow to -inf, and 0 * -inf is NaN."""

MAX_SMALL = 1e-2
"""Smaller divergences are computed from differences of logits, as those of log-probabilities cancel."""


class Measured(NamedTuple):
    """A divergence of the student's probabilities from the teacher's, along dimension 1.

    Args:
        value: the divergence of each row, `(n, ...)` of logits `(n, c, ...)`.
        slope: computes its derivative by the student's softened logits, `(n, c, ...)`.
    """

    value: Tensor
    slope: Callable[[], Tensor]


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Return `logits / temperature` `(n, c)`, minus a constant of each row if the quotient could overflow."""
    if temperature == 1:
        return logits
    return logits / temperature if temperature > 1 else centered(logits, temperature)


def centered(logits: Tensor, temperature: float) -> Tensor:
    """Return `(logits - max) / temperature` `(n, c)`, at most 0 and finite; the maximum is a constant to autograd."""
    softened = (logits - logits.detach().amax(1, keepdim=True)) / temperature
    return softened.clamp(min=torch.finfo(logits.dtype).min)


def log_probabilities(softened: Tensor) -> Tensor:
    """Return the log-probabilities of softened logits `(n, c)`, at least `MIN_LOG`."""
    return softened.log_softmax(1).clamp(min=MIN_LOG)


def divergence(
    log_s: Tensor, log_t: Tensor, difference: Difference, p_t: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    r"""Return KL(t || s) of each row `(n,)`, and precise log-ratios `log s - log t` `(n, c)` if a row needs them.

    With p the probabilities t and d the differences of the logits, x = d - sum(p d) has the mean 0 under p, so
    :math:`\mathrm{KL} = \log \sum p e^x = \log(1 + \sum p (e^x - 1 - x))`, a sum without negative terms.

    Args:
        log_s: log-probabilities of the student, at least `MIN_LOG`.
        log_t: log-probabilities of the teacher, at least `MIN_LOG`.
        difference: returns `log_s - log_t` up to a constant of each row, without the rounding errors of logarithms.
        p_t: probabilities of the teacher, if they are known.
    """
    p_t = log_t.exp() if p_t is None else p_t
    plain = (log_t - log_s).mul_(p_t).sum(1, keepdim=True)  # in place: two matrices at a time instead of three
    # The rest takes four times as long. On an accelerator, reading the values would force a wait.
    if _known(plain) and not bool(plain.amin() < MAX_SMALL):
        return plain.squeeze(1), None
    d = difference().clamp(MIN_LOG, -MIN_LOG)
    x = d - (p_t * d).sum(1, keepdim=True)
    terms = p_t * _remainder(x.clamp(-1, 1))
    # Beyond -1 and 1, what e^x - 1 - x exceeds its value there. A comparison takes longer than all of this.
    if not _known(x) or bool(x.amin() < -1):
        below = (x + 1).clamp(max=0)
        terms = terms + p_t * (below.expm1() / math.e - below)
    if not _known(x) or bool(x.amax() > 1):
        # p e^x is the student's probability times e^KL, where e^x alone could overflow.
        above = (log_s.exp() * plain.clamp(max=1).exp() - math.e * p_t).clamp(min=0)
        terms = terms + above - p_t * (x - 1).clamp(min=0)
    value = torch.where(plain < MAX_SMALL, terms.sum(1, keepdim=True).clamp(min=0).log1p(), plain)
    return value.squeeze(1), x - value


def _known(x: Tensor) -> bool:
    """Return whether a decision may depend on the values: on an accelerator, reading them would force a wait."""
    return x.numel() > 0 and readable(x)


def _remainder(x: Tensor) -> Tensor:
    """Return e^x - 1 - x for magnitudes up to 1 by its series, as the difference would cancel."""
    order = 10 if torch.finfo(x.dtype).eps > 1e-10 else 18
    series = torch.full_like(x, 1 / math.factorial(order))
    for k in range(order - 1, 1, -1):
        series = series * x + 1 / math.factorial(k)
    return series * x * x


def probability_gap(log_s: Tensor, p_t: Tensor, ratio: Tensor | None) -> Tensor:
    """Return the student's minus the teacher's probabilities `p_t` `(n, c)`, precise where they are nearly equal."""
    p_s = log_s.exp()
    if ratio is None:
        return p_s - p_t
    # Up to a ratio of e from the ratio; what exceeds it from the probabilities.
    return p_t * ratio.clamp(max=1).expm1() + (p_s - math.e * p_t).clamp(min=0)


def _forward(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Measured:
    p_t = log_t.exp()
    value, ratio = divergence(log_s, log_t, difference, p_t)
    return Measured(value, lambda: probability_gap(log_s, p_t, ratio))


def _reverse(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Measured:
    value, ratio = divergence(log_t, log_s, lambda: -difference())
    return Measured(value, lambda: log_s.exp() * ((log_s - log_t if ratio is None else -ratio) - value.unsqueeze(1)))


def _jensen_shannon(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Measured:
    ratio = _ratio(log_s, log_t, difference)
    middle = torch.logaddexp(log_s, log_t) - math.log(2)
    from_t = divergence(middle, log_t, lambda: _log_mixture(ratio, 0.5))[0]
    value = (from_t + divergence(middle, log_s, lambda: _log_mixture(-ratio, 0.5))[0]) / 2
    return Measured(value, lambda: _centered(log_s, _log_mixture(-ratio, 0.5)) / -2)


def _skewed(log_s: Tensor, log_t: Tensor, difference: Difference, share: float) -> Measured:
    ratio = _ratio(log_s, log_t, difference)
    mixture = torch.logaddexp(log_s + math.log1p(-share), log_t + math.log(share))
    value = divergence(mixture, log_t, lambda: _log_mixture(ratio, 1 - share))[0]
    return Measured(value, lambda: _centered(log_s, (-_log_mixture(ratio, 1 - share)).expm1()) * -(1 - share))


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


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor, Difference, float], Measured]] = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "jensen_shannon": _jensen_shannon,
    "skewed_kl": _skewed,
}
"""Each divergence by `log_s`, `log_t` and `difference` as in `divergence`, and the teacher's share of a mixture."""
