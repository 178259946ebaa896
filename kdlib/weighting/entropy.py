"""Weighting: trust the teacher that is sure of itself. Touches teachers' logits.

Entropy-based multi-teacher distillation (EBKD): the lower the entropy of a teacher's probabilities, the more it weighs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib._maths import full_precision
from kdlib.weighting._checks import check_logits, check_teachers

__all__ = ["EntropyWeighting"]

LEAST_LOG = -1e30
"""A smaller log-probability counts as this one: 0 * -inf would be NaN."""


class EntropyWeighting(nn.Module):
    r"""Weights from the entropy of each teacher's probabilities; no label is needed.

    With :math:`p_{k,i}` the softmax of the logits of sample i by teacher k and :math:`H_{k,i}` its entropy,

    .. math:: w_{k,i} = \frac{1 - H_{k,i} / \sum_j H_{j,i}}{K - 1}

    The division by K - 1, absent from the published code, makes the columns sum to one. The teachers are logits on one
    set of classes: entropies over different numbers of classes do not compare. No gradient flows.

    One teacher weighs 1. Equal teachers weigh 1 / K, so do teachers that are all wholly sure (every entropy 0). No
    teacher weighs more than 1 / (K - 1). Constant logits, the highest entropy, weigh the least. A teacher that is sure
    and wrong weighs much: random logits of a large scale are not found out; where there are labels,
    `ConfidenceWeighting` finds them. Finite logits of any size give finite weights.

    Examples:
        >>> import torch
        >>> weighting = EntropyWeighting()
        >>> sure, even = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> weighting(torch.ones(2, 1), student=torch.ones(1, 4), teachers=[sure, even], targets={})
        tensor([[0.9982],
                [0.0018]])

    References:
        Kwon et al., *Adaptive Knowledge Distillation Based on Entropy*, ICASSP 2020, as the baseline EBKD in the public
        code of Zhang, Chen, Wang, arXiv 2201.00007.
    """

    @torch.no_grad()
    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)`.

        Args:
            losses: `(k, b)`; only the shape is looked at.
            student: not looked at.
            teachers: k tensors of logits `(b, c)`.
            targets: not looked at.

        Raises:
            ValueError: teachers that are no logits on one set of classes.
        """
        check_teachers("EntropyWeighting", losses, teachers)
        check_logits("EntropyWeighting", teachers)
        k = losses.shape[0]
        if k < 2:
            return torch.ones_like(losses)
        with full_precision(losses):
            logits = [teacher.to(torch.promote_types(teacher.dtype, torch.float32)) for teacher in teachers]
            log_p = [each.log_softmax(1).clamp(min=LEAST_LOG) for each in logits]
            entropy = torch.stack([-(each.exp() * each).sum(1) for each in log_p])
            total = entropy.sum(0)
            share = torch.where(total > 0, entropy / torch.where(total > 0, total, 1.0), 1 / k)
            return ((1 - share) / (k - 1)).to(losses.dtype)
