"""Weighting: trust the teacher whose logits agree with the label. Touches teachers' logits and targets.

Zhang et al., CA-MKD, 2022: the lower a teacher's cross-entropy on a sample, the more it weighs there.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib._checks import check_name
from kdlib._maths import full_precision
from kdlib.weighting._checks import check_labels, check_logits, check_teachers

__all__ = ["ConfidenceWeighting"]

LEAST_LOG = -1e30
"""A smaller log-probability counts as this one: gaps near the end of float32 would make it -inf."""


class ConfidenceWeighting(nn.Module):
    r"""Weights from each teacher's cross-entropy with the label.

    With :math:`z_{k,i}` the logits of sample i by teacher k and :math:`y_i` its label,

    .. math:: w_{k,i} = \frac{1 - \mathrm{softmax}_k \bigl( \mathrm{CE}(z_{k,i}, y_i) \bigr)}{K - 1}

    The teachers are logits on the student's classes; for embeddings see `CenterConfidenceWeighting`. No gradient flows.

    One teacher weighs 1. Equal teachers weigh 1 / K. No teacher weighs more than 1 / (K - 1), so of three or more
    teachers a useless one is left out and the rest become nearly equal; of two, the better one takes nearly all. A
    sample whose label is negative (unknown) gets uniform weights. Finite logits of any size give finite weights.

    Args:
        target: name of the labels in the targets.

    Examples:
        >>> import torch
        >>> weighting = ConfidenceWeighting()
        >>> weighting
        ConfidenceWeighting(target='label')
        >>> right, even = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> targets = {"label": torch.tensor([0])}
        >>> weighting(torch.ones(2, 1), student=torch.ones(1, 4), teachers=[right, even], targets=targets)
        tensor([[0.6666],
                [0.3334]])

    References:
        Zhang, Chen, Wang, *Confidence-Aware Multi-Teacher Knowledge Distillation*, arXiv 2201.00007. Their code weighs
        the logit and the feature loss of a teacher so, and divides by K once more; here the columns sum to one.
    """

    def __init__(self, *, target: str = "label") -> None:
        super().__init__()
        self.target = target

    @torch.no_grad()
    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)`.

        Args:
            losses: `(k, b)`; only the shape is looked at.
            student: not looked at.
            teachers: k tensors of logits `(b, c)`.
            targets: labels `(b,)`, whole numbers below c, under the name `target`; or that tensor itself.

        Raises:
            ValueError: no such target, teachers that are no logits on one set of classes, or labels out of range.
        """
        check_teachers("ConfidenceWeighting", losses, teachers)
        check_logits("ConfidenceWeighting", teachers)
        if not isinstance(targets, Tensor):
            check_name("ConfidenceWeighting", "target", self.target, targets)
            targets = targets[self.target]
        k, b = losses.shape
        if k < 2:
            return torch.ones_like(losses)
        check_labels("ConfidenceWeighting", targets, b, teachers[0].shape[1])
        with full_precision(losses):
            labels = targets.to(losses.device).long()
            at_label = labels.clamp(min=0).unsqueeze(1)
            logits = [teacher.to(torch.promote_types(teacher.dtype, torch.float32)) for teacher in teachers]
            log_p = torch.stack([each.log_softmax(1).gather(1, at_label).squeeze(1) for each in logits])
            weights = (1 - (-log_p.clamp(min=LEAST_LOG)).softmax(0)) / (k - 1)
            return torch.where(labels >= 0, weights, 1 / k).to(losses.dtype)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the weighting."""
        return f"target={self.target!r}"
