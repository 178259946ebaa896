"""Soft targets: divergence of the softened class probabilities of student and teacher."""

from functools import partial

import torch
from torch import Tensor

from kdlib._checks import check_choice, check_number, check_scheduled, check_type
from kdlib._maths import Reduction, full_precision, shortest_length
from kdlib.losses._checks import check_logits
from kdlib.losses._module import LossModule
from kdlib.losses.logits._chunked import by_rows
from kdlib.losses.logits._divergence import DIVERGENCES, Divergence, Measured, centered, log_probabilities, soften
from kdlib.losses.logits._positions import as_positions, reduce_positions
from kdlib.losses.logits._standardize import standardized
from kdlib.types import Schedule

__all__ = ["SoftTargetLoss", "check_options", "measure", "soft_target"]


def soft_target(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    divergence: Divergence = "forward_kl",
    skew: float = 0.1,
    standardize: bool = False,
    dim: int = 1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Compute the divergence of the student's softened probabilities from the teacher's.

    .. math:: T^2 \, D(p^t, p^s), \qquad p = \mathrm{softmax}(z / T)

    at each position, with :math:`\mathrm{KL}(p \,\|\, q) = \sum_c p_c (\log p_c - \log q_c)` over the classes and

    =================== ============================================================================================
    `"forward_kl"`      :math:`\mathrm{KL}(p^t \,\|\, p^s)`
    `"reverse_kl"`      :math:`\mathrm{KL}(p^s \,\|\, p^t)`
    `"jensen_shannon"`  :math:`\frac{1}{2} \mathrm{KL}(p^t \,\|\, m) + \frac{1}{2} \mathrm{KL}(p^s \,\|\, m)`, with
                        :math:`m = \frac{1}{2} (p^t + p^s)`
    `"skewed_kl"`       :math:`\mathrm{KL}(p^t \,\|\, \lambda p^t + (1 - \lambda) p^s)`, with :math:`\lambda` = `skew`
    =================== ============================================================================================

    The factor :math:`T^2` keeps the size of the gradient when T changes. Large logits are processed a chunk at a time:
    only the gradient takes memory of their size.

    With `standardize`, the logits z of both sides are replaced by :math:`(z - \bar z) / \sigma`, with mean
    :math:`\bar z` and standard deviation :math:`\sigma` over the classes of a position. The student then has to match the
    relations between the classes, not the range of the teacher's logits. Equal logits become 0 and get no gradient, and
    neither do logits whose deviation is below :math:`10^{-12}` times T (:math:`5 \cdot 10^{-4}` for float16).

    Args:
        student: logits `(b, c)`, or of any shape with the classes at `dim`: tokens `(b, n, c)` with `dim=-1`, pixels
            `(b, c, h, w)`.
        teacher: logits of the same shape; never receives a gradient.
        temperature: T, above 0; larger values give softer probabilities.
        divergence: one of the four above.
        skew: share of the teacher in the mixture of `"skewed_kl"`, above 0 and below 1.
        standardize: whether to divide the logits of each position by their standard deviation, before T.
        dim: dimension of the classes; not 0.
        mask: boolean, of the shape of the logits without `dim`; False leaves a position out, such as padding.
        reduction: `"mean"` over all positions that are not masked, or `"none"`, the mean of each sample.
        weight: `(b,)`, at least 0, weight of each sample; 0 masks it.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)` over positions, or 0 if all weights are 0. `(b,)` for
        `"none"`, multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, a number is out of range, or `divergence` or `reduction` is unknown.
        TypeError: An input is not a floating-point tensor, or `mask` is not boolean.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log()
        >>> round(soft_target(student, teacher, temperature=1.0).item(), 4)
        0.6931
        >>> round(soft_target(student, teacher, temperature=1.0, divergence="jensen_shannon").item(), 4)
        0.2158
        >>> narrow, wide = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.0, 10.0, 30.0]])
        >>> round(soft_target(narrow, wide, standardize=True).item(), 4)
        0.0
        >>> tokens = torch.zeros(2, 5, 100)  # (b, n, c)
        >>> soft_target(tokens, tokens, dim=-1, mask=torch.ones(2, 5, dtype=torch.bool)).item()
        0.0

    References:
        Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, arXiv 1503.02531, section 2. This is
        `torch.nn.KLDivLoss(reduction="batchmean")` times T squared; its `"mean"` also divides by the number of classes.
        Skewed divergence: Ko, Kim, Chen, Yun, *DistiLLM*, arXiv 2402.03898. Standardization: Sun, Ren, Li, Wang, Cao,
        *Logit Standardization in Knowledge Distillation*, arXiv 2403.01427, algorithms 1 and 2, where the standard
        deviation divides by the number of classes c. The authors' code divides by c - 1 and adds 1e-7.
    """
    check_number("soft_target", "temperature", temperature, above=0)
    check_options("soft_target", divergence, skew, standardize, dim)
    check_logits("soft_target", student, teacher, dim, mask)
    with full_precision(student):
        positions = as_positions(student, teacher, dim)
        origin = student.dtype if standardize else None
        compared = partial(measure, temperature=temperature, divergence=divergence, skew=skew, origin=origin)
        losses = by_rows(compared, positions.student, positions.teacher) * temperature
        return reduce_positions("soft_target", losses, positions.shape, mask, reduction, weight)


class SoftTargetLoss(LossModule):
    """`soft_target` as a Module: the constructor takes its hyper-parameters, `forward` its tensors.

    `temperature` may be a schedule, as in `kdlib.schedules`; each call then needs `step=`.

    Examples:
        >>> import torch
        >>> SoftTargetLoss(temperature=2.0)(torch.zeros(2, 3), torch.ones(2, 3)).item()
        0.0
    """

    _function = staticmethod(soft_target)
    _schedulable = ("temperature",)

    def __init__(
        self,
        *,
        temperature: float | Schedule = 4.0,
        divergence: Divergence = "forward_kl",
        skew: float = 0.1,
        standardize: bool = False,
        dim: int = 1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        check_scheduled("SoftTargetLoss", "temperature", temperature, above=0)
        check_options("SoftTargetLoss", divergence, skew, standardize, dim)
        self.temperature, self.divergence, self.skew = temperature, divergence, skew
        self.standardize, self.dim = standardize, dim

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Compare `student` with `teacher`; `reduction=None` uses the constructor's."""
        return self._call(student, teacher, weight, reduction, step, mask=mask)


def check_options(owner: str, divergence: object, skew: object, standardize: object, dim: object = 1) -> None:
    """Check the hyper-parameters other than the temperature, which may be a schedule."""
    check_choice(owner, "divergence", divergence, tuple(DIVERGENCES))
    check_number(owner, "skew", skew, above=0, below=1)
    check_type(owner, "standardize", standardize, bool, "a bool")
    check_number(owner, "dim", dim, integer=True)


def measure(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    divergence: Divergence,
    skew: float,
    origin: torch.dtype | None,
) -> Measured:
    """Return T times the divergence of each row `(n, ...)`, and its derivative by the student's logits `(n, c, ...)`.

    With `origin`, the dtype of the student as the user passed it, the logits are standardized first.
    """
    if origin is None:
        return _compare(student, teacher, temperature, divergence, skew)
    shortest = shortest_length(origin) * max(temperature, 1)
    ours, theirs = standardized(student, shortest), standardized(teacher, shortest)
    value, slope = _compare(ours.scores, theirs.scores, temperature, divergence, skew)
    return Measured(value, lambda: ours.pull(slope()))


def _compare(student: Tensor, teacher: Tensor, temperature: float, divergence: Divergence, skew: float) -> Measured:
    log_s, log_t = (log_probabilities(soften(x, temperature)) for x in (student, teacher))
    difference = lambda: centered(student, temperature) - centered(teacher, temperature)  # noqa: E731
    value, slope = DIVERGENCES[divergence](log_s, log_t, difference, skew)
    return Measured(value * temperature, slope)
