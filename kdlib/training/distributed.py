"""Training room: what changes when `torchrun` has started several processes. Touches the default process group."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdlib.training._checks import check_same_steps

__all__ = ["average", "check_same_step", "let_go", "rank", "synchronize_if", "world_size", "wrap"]


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def wrap(distiller: nn.Module, device: torch.device, *, find_unused_parameters: bool = False) -> Callable[..., Any]:
    """The distiller itself, or the same under `DistributedDataParallel`.

    Teachers are frozen and the same everywhere: what is not in the distiller's state dict is neither broadcast nor
    watched.
    """
    if world_size() == 1:
        return distiller
    kept = set(distiller.state_dict())
    names = [name for name, _ in (*distiller.named_parameters(), *distiller.named_buffers())]
    ignored = [name for name in names if name not in kept]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]  # torch's own
        distiller, ignored
    )
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(distiller, device_ids=ids, find_unused_parameters=find_unused_parameters)


def let_go() -> None:
    """Free what `wrap` made, once nothing holds it.

    It lies in reference cycles and holds the process group: left to the end of the interpreter, gloo's threads outlive
    `destroy_process_group` and abort the process, now and then, after its work is done.
    """
    if world_size() > 1:
        gc.collect()


def synchronize_if(last: bool, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Gradients are averaged over processes in the last backward of a step only."""
    if last or not isinstance(forward, DistributedDataParallel):
        return nullcontext()
    return forward.no_sync()


def average(values: Tensor) -> Tensor:
    """The mean over processes, so that all of them see one loss and stop together."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def check_same_step(step: int, device: torch.device) -> None:
    """All processes must have found the same checkpoint; also the moment from which the first may write."""
    if world_size() == 1:
        return
    steps = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(steps, torch.tensor([step], device=device))
    check_same_steps([int(value) for value in steps])
