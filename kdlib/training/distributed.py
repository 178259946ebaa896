"""Training with several processes started by `torchrun`."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdlib.training._checks import check_argument

__all__ = ["average", "check_same_step", "free_wrapper", "rank", "synchronize_if", "world_size", "wrap"]


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def wrap(distiller: nn.Module, device: torch.device, *, find_unused_parameters: bool = False) -> Callable[..., Any]:
    """Return the distiller, wrapped in `DistributedDataParallel` if there are several processes.

    Teachers are frozen and identical on all processes, so tensors outside the distiller's state dict are not synchronized.
    """
    if world_size() == 1:
        return distiller
    trained = set(distiller.state_dict())
    names = [name for name, _ in (*distiller.named_parameters(), *distiller.named_buffers())]
    ignored = [name for name in names if name not in trained]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]  # torch's own
        distiller, ignored
    )
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(distiller, device_ids=ids, find_unused_parameters=find_unused_parameters)


def free_wrapper() -> None:
    """Free the unreferenced result of `wrap`.

    DDP is part of reference cycles and keeps the process group alive. If it is only freed at interpreter exit, gloo's
    threads outlive `destroy_process_group` and occasionally abort the finished process.
    """
    if world_size() > 1:
        gc.collect()


def synchronize_if(last: bool, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Average gradients over processes only in the last backward pass of a step."""
    if last or not isinstance(forward, DistributedDataParallel):
        return nullcontext()
    return forward.no_sync()


def average(values: Tensor) -> Tensor:
    """Return the mean over processes, so that all processes see the same loss and stop together."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def check_same_step(step: int, device: torch.device) -> None:
    """Require that all processes resumed from the same step; afterwards the first process may write."""
    if world_size() == 1:
        return
    steps = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(steps, torch.tensor([step], device=device))
    values = [int(value) for value in steps]
    check_argument(
        len(set(values)) == 1, f"checkpoint_dir must be one directory shared by all processes, got steps {values}"
    )
