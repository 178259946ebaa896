"""Negatives that are sampled in each step, for very many identities (Partial FC, An et al., 2022)."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_number, check_type
from kdlib._maths import Reduction
from kdlib_faces._checks import check_parameter
from kdlib_faces.heads._margin import MarginHead, check_call
from kdlib_faces.heads._random import normal_numbers
from kdlib_faces.heads._streamed import local_part, whole_batch

__all__ = ["SampledHead", "skip_rows_without_gradient"]


class SampledHead(nn.Module):
    """A margin head whose negatives are a random part of the identities, as in Partial FC.

    In training mode each process keeps the centers of all identities of the batch and draws others until it has the
    part `rate` of its centers; only these are compared to, and only these receive a gradient. The logits and the
    products take `rate` times the time and memory. In eval mode all identities count. The draw depends on `seed`, the
    number of batches so far and the rank of the process alone: torch's generators are not used, and a run that continues
    from a state dict continues with the same negatives.

    The gradient is dense, with zeros in the other rows. Optimizers with momentum or weight decay move these rows too;
    `skip_rows_without_gradient` makes any of them leave weights and momentum of these rows as they are.

    Args:
        head: a head, before or after `shard_head`.
        rate: part of the identities that count in a step, above 0 and at most 1; 1 is the head itself.
        seed: seed of the draws.

    Attributes:
        head: the head, with the class centers.
        batches: buffer, the number of batches in training mode.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> from kdlib_faces.heads import CosFaceHead
        >>> head = SampledHead(CosFaceHead(8, 100), rate=0.1)
        >>> head(torch.ones(2, 8), torch.tensor([3, 70])).backward()
        >>> rows = head.head.weight.grad.any(1).nonzero().flatten()
        >>> len(rows), 3 in rows, 70 in rows
        (10, True, True)

    References:
        An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial
        FC", CVPR 2022, arXiv:2203.15565. The authors recommend a rate of 0.1 for millions of identities.
    """

    batches: Tensor
    per_sample: ClassVar[bool] = True

    def __init__(self, head: MarginHead, rate: float, *, seed: int = 0) -> None:
        super().__init__()
        check_type("SampledHead", "head", head, MarginHead, "a margin head")
        self.head = head
        self.rate = float(check_number("SampledHead", "rate", rate, above=0, max=1))
        self.seed = int(check_number("SampledHead", "seed", seed, min=0, max=2**63 - 1, integer=True))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=head.weight.device))

    def extra_repr(self) -> str:
        """Return the arguments besides the head."""
        return f"rate={self.rate}, seed={self.seed}"

    def forward(
        self,
        embeddings: Tensor,
        identities: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Return the loss of embeddings `(b, d)` and `identities` `(b,)`, as the head does."""
        negatives = None
        if self.training and self.rate < 1:
            centers = self.head.weight
            check_call("SampledHead", embeddings, centers, identities, "n k d" if centers.dim() == 3 else "n d")
            negatives = self.sample(identities)
            self.batches.add_(1)
        loss: Tensor = self.head(embeddings, identities, weight=weight, reduction=reduction, negatives=negatives)
        return loss

    @torch.no_grad()
    def sample(self, identities: Tensor) -> Tensor:
        """Return the indices `(m,)` of the centers of this process that count for the next batch, ascending."""
        part = local_part(self.head.weight)
        count = len(part.rows)
        everyone, _ = whole_batch(identities.long(), self.head.weight)
        local = torch.unique(everyone - part.first)
        local = local[(local >= 0) & (local < count)]
        # Another seed for the first identity of each process, which holds others.
        draws = normal_numbers(count, self.batches, self.seed + part.first * 2**20)
        draws[local] = torch.inf
        return draws.topk(min(count, max(round(self.rate * count), len(local)))).indices.sort().values


def skip_rows_without_gradient(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Make an optimizer leave the rows of a parameter unchanged whose gradient is zero, as Partial FC does.

    In each step the optimizer receives the other rows alone, with their momentum and other state, and the results are
    written back. Weight decay and momentum then act on a class center only in the steps in which it was sampled. The
    number of steps that AdamW counts is that of all steps. This works with optimizers whose state is one number per
    weight or per parameter, such as SGD, Adam and AdamW, and saves them time and memory.

    Args:
        optimizer: changed in place, by hooks around its step.
        parameter: one of its parameters, such as `head.weight`, plain or sharded.

    Raises:
        ValueError: the optimizer does not have the parameter.
        TypeError: `optimizer` is not an optimizer, or `parameter` is not a parameter.

    Examples:
        >>> weight = nn.Parameter(torch.ones(3, 2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=1.0)
        >>> skip_rows_without_gradient(optimizer, weight)
        >>> weight[1].sum().backward()
        >>> optimizer.step()
        >>> weight[:, 0]
        tensor([1.0000, 0.8000, 1.0000], grad_fn=<SelectBackward0>)
    """
    check_parameter("skip_rows_without_gradient", optimizer, parameter)
    swapped: list[tuple[Tensor, nn.Parameter, list[Tensor], int]] = []

    def before(*_: object) -> None:
        if parameter.grad is None:
            return
        grad = _local(parameter.grad)
        active = grad.flatten(1).any(1).nonzero().flatten()
        part = nn.Parameter(_local(parameter.detach())[active])
        part.grad = grad[active]
        state = optimizer.state.get(parameter, {})
        if state:
            optimizer.state[part] = {
                name: _local(x)[active] if _is_whole(x, parameter) else x for name, x in state.items()
            }
        for group in optimizer.param_groups:
            for index, each in enumerate(group["params"]):
                if each is parameter:
                    group["params"][index] = part
                    swapped.append((active, part, group["params"], index))

    @torch.no_grad()
    def after(*_: object) -> None:
        while swapped:
            active, part, parameters, index = swapped.pop()
            parameters[index] = parameter
            _local(parameter.detach())[active] = part.detach()
            state = optimizer.state[parameter]
            for name, value in optimizer.state.pop(part, {}).items():
                if isinstance(value, Tensor) and value.shape == part.shape:
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, dtype=value.dtype)
                    _local(state[name])[active] = value
                else:
                    state[name] = value

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _is_whole(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _local(tensor: Tensor) -> Tensor:
    """Return a plain tensor, or the local rows of a sharded one, which share its memory."""
    return local_part(tensor).rows
