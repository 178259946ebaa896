"""Gathering of rows from all processes, with gradient: a private module that kdlib and kdlib_faces share on purpose."""

import sys
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import Function

from kdlib._checks import check_gathered

__all__ = ["all_rows", "gather_rows", "is_sharded"]

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""Processes send the index of their dtype in this list."""


def gather_rows(x: Tensor, *, grad: bool) -> Tensor:
    """Gather the rows of all processes of the default process group, in the order of their ranks.

    Processes may hold different numbers of rows, including none. All of them must call this function, with rows of the
    same shape and dtype. Without a process group, or with a single process, `x` is returned unchanged.

    With `grad`, the gradient of `x` is that of its own rows in the gathered batch, times the number of processes. If
    every process computes the same loss from the gathered rows, the mean of the gradients over the processes, as
    computed by `DistributedDataParallel`, is the gradient of that loss. The backward pass does not communicate, so a
    process may omit it.

    Args:
        x: `(b, ...)`, of any floating-point or whole-number dtype or bool.
        grad: whether the rows of `x` receive a gradient; otherwise the result is detached.

    Returns:
        `(sum of b, ...)`, the same in every process.

    Raises:
        ValueError: The rows of two processes differ in shape or dtype; raised in every process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x if grad else x.detach()
    if not grad:
        return all_rows(x.detach())[0]
    gathered: Tensor = _GatherRows.apply(x)  # type: ignore[no-untyped-call]  # torch has no types here
    return gathered


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as the parameters of `fully_shard` are."""
    module = sys.modules.get("torch.distributed.tensor")  # its import takes seconds; without it there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def all_rows(x: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """Return the rows of all processes of a group, without gradient, and the index of our first row."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    shape = (list(x.shape[1:]) + [0] * 6)[:6]
    header = torch.tensor([x.shape[0], DTYPES.index(x.dtype), x.dim(), *shape], device=x.device)
    headers = [torch.empty_like(header) for _ in range(world)]
    dist.all_gather(headers, header, group=group)
    sizes = torch.stack(headers).tolist()
    check_gathered("gather_rows", [(tuple(row[3 : 2 + row[2]]), str(DTYPES[row[1]])) for row in sizes])
    counts = [row[0] for row in sizes]
    # Bytes in blocks of equal size, because not every backend supports all dtypes and uneven blocks.
    width = prod(x.shape[1:]) * x.element_size()
    block = torch.zeros(max(counts), width, dtype=torch.uint8, device=x.device)
    block[: x.shape[0]] = x.contiguous().view(-1).view(torch.uint8).reshape(x.shape[0], width)
    blocks = [torch.empty_like(block) for _ in range(world)]
    dist.all_gather(blocks, block, group=group)
    rows = torch.cat([each[:count] for each, count in zip(blocks, counts, strict=True)])
    return rows.view(-1).view(x.dtype).reshape(sum(counts), *x.shape[1:]), sum(counts[:rank])


class _GatherRows(Function):
    """Returns all rows; the gradient is that of our own rows, times the number of processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows, first = all_rows(x)
        ctx.own = slice(first, first + x.shape[0])
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient[ctx.own] * dist.get_world_size()
