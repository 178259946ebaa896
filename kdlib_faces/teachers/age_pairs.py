"""A contrastive loss over cross-age pairs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank, check_same_batch

__all__ = ["CrossAgePairLoss"]


class CrossAgePairLoss(nn.Module):
    """`-log exp(s cos(x_i, x_j)) / (exp(s cos(x_i, x_j)) + sum_k exp(s cos(x_i, x_k)))`, mean over all cross-age pairs.

    A cross-age pair `(i, j)` is two images of one identity from two age groups, or at least `min_age_gap` years apart. `k`
    runs over all images of other identities, of any and of unknown age. A batch without a cross-age pair gives 0 with a
    graph.

    Args:
        min_age_gap: Minimum age difference of a pair in years, where ages are years.
        scale: Inverse temperature `s`.
        groups: The target holds age groups instead of years.

    Raises:
        TypeError, ValueError: An argument is out of range, or target and embeddings do not match.

    Shape:
        embeddings `(b, d)`; target `(b, 2)`: identity and age in years (NaN where unknown), or identity and age group
        (negative where unknown).

    Examples:
        >>> embeddings = torch.eye(4)[[0, 0, 1, 2]].requires_grad_()
        >>> target = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
        >>> bool(CrossAgePairLoss(groups=True)(embeddings, target) > 0)
        True
    """

    def __init__(self, *, min_age_gap: float = 10.0, scale: float = 16.0, groups: bool = False) -> None:
        super().__init__()
        check_number("CrossAgePairLoss", "min_age_gap", min_age_gap, min=0)
        check_number("CrossAgePairLoss", "scale", scale, above=0)
        self.min_age_gap, self.scale, self.groups = min_age_gap, scale, groups

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Return the scalar loss of the batch."""
        check_floating("CrossAgePairLoss", embeddings=embeddings, target=target)
        check_rank("CrossAgePairLoss", "embeddings", embeddings, "b d")
        check_same_batch("CrossAgePairLoss", "embeddings", embeddings, "target", target)
        if target.dim() != 2 or target.shape[1] != 2:
            raise ValueError(f"CrossAgePairLoss: target must be (b, 2), identity and age, got {tuple(target.shape)}")
        identities, ages = target.unbind(1)
        known = (ages >= 0) & ages.isfinite()
        difference = (ages[:, None] - ages[None]).abs()
        cross_age = (difference > 0.5 if self.groups else difference >= self.min_age_gap) & known[:, None] & known[None]
        same = identities[:, None] == identities[None]
        unit = F.normalize(embeddings.float(), dim=1, eps=1e-6)
        logits = self.scale * unit @ unit.T
        negatives = logits.masked_fill(same, -torch.inf)
        # A row without negatives is left out: logsumexp of -inf alone has no gradient.
        rows, columns = (cross_age & same & ~same.all(1, keepdim=True)).nonzero(as_tuple=True)
        if not len(rows):
            return embeddings.float().sum() * 0.0
        return F.softplus(torch.logsumexp(negatives[rows], dim=1) - logits[rows, columns]).mean()

    def __repr__(self) -> str:
        return f"CrossAgePairLoss(min_age_gap={self.min_age_gap!r}, scale={self.scale!r}, groups={self.groups!r})"
