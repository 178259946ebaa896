"""Weights from the entropy of each teacher's probabilities (EBKD)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlib._maths import full_precision, safe_divisor
from kdlib.types import Targets
from kdlib.weighting._checks import check_logits

__all__ = ["EntropyWeighting"]

MIN_LOG = -1e30
"""Smaller log-probabilities are clamped to this one: 0 * -inf would be NaN."""


class EntropyWeighting(nn.Module):
    r"""Assigns larger weights to teachers whose probabilities have a lower entropy; needs no labels.

    With :math:`p_{k,i}` the softmax of the logits of sample i by teacher k and :math:`H_{k,i}` its entropy,

    .. math:: w_{k,i} = \frac{1 - H_{k,i} / \sum_j H_{j,i}}{K - 1}

    The division by K - 1, absent from the published code, makes the columns sum to one. The teachers must be logits on
    the same classes, because entropies over different numbers of classes are not comparable. The weights carry no
    gradient.

    A single teacher has weight 1. Equal teachers, and teachers that all have entropy 0, have weight 1 / K. No weight
    exceeds 1 / (K - 1). Constant logits, which have the highest entropy, get the smallest weight. A confident but wrong
    teacher, such as random logits of a large scale, gets a large weight; with labels, `ConfidenceWeighting` detects it.
    Finite logits of any size give finite weights.

    Examples:
        >>> import torch
        >>> weighting = EntropyWeighting()
        >>> confident, even = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> weighting(torch.ones(2, 1), student=torch.ones(1, 4), teachers=[confident, even], targets={})
        tensor([[0.9982],
                [0.0018]])

    References:
        Kwon et al., *Adaptive Knowledge Distillation Based on Entropy*, ICASSP 2020, as the baseline EBKD in the public
        code of Zhang, Chen, Wang, arXiv 2201.00007.
    """

    @torch.no_grad()
    def forward(self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets) -> Tensor:
        """Return weights `(k, b)`; `student` and `targets` are ignored.

        Args:
            losses: `(k, b)`; only the shape is used.
            teachers: k tensors of logits `(b, c)`.

        Raises:
            ValueError: the teachers are not logits on the same classes.
        """
        check_logits("EntropyWeighting", losses, teachers)
        k = losses.shape[0]
        if k < 2:
            return torch.ones_like(losses)
        with full_precision(losses):
            logits = [teacher.to(torch.promote_types(teacher.dtype, torch.float32)) for teacher in teachers]
            log_p = [each.log_softmax(1).clamp(min=MIN_LOG) for each in logits]
            entropy = torch.stack([-(each.exp() * each).sum(1) for each in log_p])
            total = entropy.sum(0)
            share = torch.where(total > 0, entropy / safe_divisor(total), 1 / k)
            return ((1 - share) / (k - 1)).to(losses.dtype)
