"""Teachers room: a person young and the same person old, brought together. What made an age-invariant teacher of few images.

A contrastive loss over the far pairs of a batch, and a pull that holds the weights to those the training began with. Touches
tensors and parameters alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_floating, check_number, check_rank, check_same_batch

__all__ = ["CrossAgePairLoss", "L2SPLoss"]


class CrossAgePairLoss(nn.Module):
    """`-log exp(s cos(x_i, x_j)) / (exp(s cos(x_i, x_j)) + sum_k exp(s cos(x_i, x_k)))`, mean over all far pairs.

    A far pair `(i, j)` is of one identity and of two age groups, or at least `min_age_gap` years apart; `k` runs over all images of
    other identities, of any age and of unknown age too: those as old as `i` look most like it. A batch without a far pair
    gives 0 with a graph.

    Args:
        min_age_gap: least years between the images of a far pair, where ages are years.
        scale: s, the inverse temperature.
        groups: the target holds age groups in place of years.

    Raises:
        TypeError, ValueError: values out of range, or a target that does not go with the embeddings.

    Shape:
        embeddings `(b, d)`; target `(b, 2)`: identity and age in years (NaN where unknown), or identity and age group
        (negative where unknown).

    Examples:
        >>> embeddings = torch.eye(4)[[0, 0, 1, 2]].requires_grad_()
        >>> target = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
        >>> far = CrossAgePairLoss(groups=True)(embeddings, target)
        >>> bool(far > 0)
        True
    """

    def __init__(self, *, min_age_gap: float = 10.0, scale: float = 16.0, groups: bool = False) -> None:
        super().__init__()
        check_number("CrossAgePairLoss", "min_age_gap", min_age_gap, min=0)
        check_number("CrossAgePairLoss", "scale", scale, above=0)
        self.min_age_gap, self.scale, self.groups = min_age_gap, scale, groups

    def forward(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """One loss for the batch."""
        check_floating("CrossAgePairLoss", embeddings=embeddings, target=target)
        check_rank("CrossAgePairLoss", "embeddings", embeddings, "b d")
        check_same_batch("CrossAgePairLoss", "embeddings", embeddings, "target", target)
        if target.dim() != 2 or target.shape[1] != 2:
            raise ValueError(f"CrossAgePairLoss: target must be (b, 2), identity and age, got {tuple(target.shape)}")
        who, when = target.unbind(1)
        known = (when >= 0) & when.isfinite()
        apart = (when[:, None] - when[None]).abs()
        far = (apart > 0.5 if self.groups else apart >= self.min_age_gap) & known[:, None] & known[None]
        same = who[:, None] == who[None]
        unit = F.normalize(embeddings.float(), dim=1, eps=1e-6)
        logits = self.scale * unit @ unit.T
        others = logits.masked_fill(same, -torch.inf)
        # A row without a stranger has nothing to be told from: logsumexp of -inf alone has no gradient.
        pair = far & same & ~same.all(1, keepdim=True)
        rows, columns = pair.nonzero(as_tuple=True)
        if not len(rows):
            return embeddings.float().sum() * 0.0
        strangers = torch.logsumexp(others[rows], dim=1)
        positive = logits[rows, columns]
        return F.softplus(strangers - positive).mean()

    def __repr__(self) -> str:
        return f"CrossAgePairLoss(min_age_gap={self.min_age_gap!r}, scale={self.scale!r}, groups={self.groups!r})"


class L2SPLoss(nn.Module):
    """`sum_p ||p - p_0||^2 / sum_p ||p_0||^2` over parameters and their values when this was made (L2-SP).

    A loss that reads neither embeddings nor targets: as a `Term`, it holds a fine-tuned network to its start.

    Args:
        parameters: those that are trained.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> pull = L2SPLoss(layer.parameters())
        >>> with torch.no_grad():
        ...     _ = layer.weight.mul_(2), layer.bias.mul_(2)
        >>> round(float(pull().detach()), 4)
        1.0

    References:
        Li, Grandvalet, Davoine: Explicit Inductive Bias for Transfer Learning with Convolutional Networks, ICML 2018.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        held = [parameter for parameter in parameters if parameter.requires_grad]
        # Neither is a parameter or a buffer of this module: the network owns the first, the second is its past.
        object.__setattr__(self, "_held", [(each, each.detach().clone()) for each in held])

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        held: Any = self._held
        for parameter, start in held:
            yield parameter, start.to(parameter.device)

    def forward(self, *_: Any) -> Tensor:
        """The relative squared distance from the start."""
        moved, size = torch.zeros(()), torch.zeros(())
        for parameter, start in self._pairs():
            moved = moved.to(parameter.device) + (parameter - start).float().square().sum()
            size = size.to(parameter.device) + start.float().square().sum()
        return moved / size.clamp(min=1e-12)
