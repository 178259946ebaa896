"""Weights from the cross-entropy between each teacher's logits and the label (CA-MKD)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdlib._checks import check_below, check_name
from kdlib._maths import full_precision
from kdlib._repr import CallRepr
from kdlib.types import Targets
from kdlib.weighting._checks import check_logits

__all__ = ["ConfidenceWeighting"]

MIN_LOG = -1e30
"""Smaller log-probabilities are clamped to this one: very large logit gaps would make them -inf in float32."""


class ConfidenceWeighting(CallRepr):
    r"""Assigns larger weights to teachers whose logits have a lower cross-entropy with the label.

    With :math:`z_{k,i}` the logits of sample i by teacher k and :math:`y_i` its label,

    .. math:: w_{k,i} = \frac{1 - \mathrm{softmax}_k \bigl( \mathrm{CE}(z_{k,i}, y_i) \bigr)}{K - 1}

    The teachers must be logits on the student's classes; for embeddings see `CenterConfidenceWeighting`. The weights
    carry no gradient.

    A single teacher has weight 1. Equal teachers have weight 1 / K. No weight exceeds 1 / (K - 1): with three or more
    teachers, a useless one gets almost no weight and the others nearly equal weights; with two, the better one gets
    nearly all. A sample with a negative (unknown) label has uniform weights. Finite logits of any size give finite
    weights.

    Args:
        target: name of the labels in the targets.

    Examples:
        >>> import torch
        >>> weighting = ConfidenceWeighting()
        >>> right, even = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> targets = {"label": torch.tensor([0])}
        >>> weighting(torch.ones(2, 1), student=torch.ones(1, 4), teachers=[right, even], targets=targets)
        tensor([[0.6666],
                [0.3334]])

    References:
        Zhang, Chen, Wang, *Confidence-Aware Multi-Teacher Knowledge Distillation*, arXiv 2201.00007. Their code
        weights the logit and the feature loss of a teacher, and divides by K once more; here the columns sum to one.
    """

    def __init__(self, *, target: str = "label") -> None:
        super().__init__()
        self.target = target

    @torch.no_grad()
    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets | Tensor
    ) -> Tensor:
        """Return weights `(k, b)`; `student` is ignored.

        Args:
            losses: `(k, b)`; only the shape is used.
            teachers: k tensors of logits `(b, c)`.
            targets: labels `(b,)`, whole numbers below c, under the name `target`; or that tensor itself.

        Raises:
            ValueError: the target is missing, the teachers are not logits on the same classes, or a label is too large.
        """
        check_logits("ConfidenceWeighting", losses, teachers)
        if not isinstance(targets, Tensor):
            check_name("ConfidenceWeighting", "target", self.target, targets)
            targets = targets[self.target]
        k, b = losses.shape
        if k < 2:
            return torch.ones_like(losses)
        check_below("ConfidenceWeighting", "labels", targets, b, c=teachers[0].shape[1])
        with full_precision(losses):
            labels = targets.to(losses.device).long()
            at_label = labels.clamp(min=0).unsqueeze(1)
            logits = [teacher.to(torch.promote_types(teacher.dtype, torch.float32)) for teacher in teachers]
            log_p = torch.stack([each.log_softmax(1).gather(1, at_label).squeeze(1) for each in logits])
            weights = (1 - (-log_p.clamp(min=MIN_LOG)).softmax(0)) / (k - 1)
            return torch.where(labels >= 0, weights, 1 / k).to(losses.dtype)
