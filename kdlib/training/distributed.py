"""Training with several processes started by `torchrun`."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdlib._held import is_sharded
from kdlib.objective import ObjectiveOutput
from kdlib.training._checks import check_argument, describe_error, received_error

__all__ = ["Processes", "synchronize_if", "wrap"]

_T = TypeVar("_T")


class Processes:
    """The processes of a run, which take every decision together; one process without a process group."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.count = dist.get_world_size() if several else 1
        # Decisions are exchanged between the hosts, so that they never wait for the devices.
        self._own = dist.new_group(backend="gloo") if self.count > 1 and dist.get_backend() != "gloo" else None

    def close(self) -> None:
        """Free what DDP and this object hold.

        DDP is part of reference cycles and keeps the process group alive. If it is only freed at interpreter exit, gloo's
        threads outlive `destroy_process_group` and occasionally abort the finished process.
        """
        if self.count > 1:
            gc.collect()
        if self._own is not None:
            dist.destroy_process_group(self._own)

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[_T | None] = [None] * self.count
        dist.all_gather_object(values, value, group=self._own)
        return cast(list[_T], values)

    @contextmanager
    def together(self, count: int = 0) -> Iterator[list[int]]:
        """Raise an error of one process in all processes, and exchange `count` whole numbers.

        Yields:
            A list of zeros, to which the block assigns; afterwards it contains the largest values of all processes.
        """
        votes = [0] * count
        if self.count == 1:
            yield votes
            return
        try:
            yield votes
        except Exception as error:
            self._largest([1, *votes])
            self.gather(describe_error(error))
            raise
        failed, *votes[:] = self._largest([0, *votes])
        if failed:
            errors: list[tuple[str, str, dict[str, object]] | None] = self.gather(None)
            rank, other = next((rank, each) for rank, each in enumerate(errors) if each is not None)
            raise received_error(rank, *other)

    def _largest(self, values: list[int]) -> list[int]:
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._own)
        return [int(value) for value in largest]

    def average(self, values: Tensor) -> Tensor:
        """Return the mean over processes, so that all processes see the same loss and stop together."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Copy tensors of the first process to the others, such as statistics that each process computes on its own."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def wrap(
    distiller: nn.Module, device: torch.device, *, find_unused_parameters: bool = False
) -> Callable[..., ObjectiveOutput]:
    """Return the distiller, wrapped in `DistributedDataParallel` if there are several processes.

    Teachers are frozen and identical on all processes, so tensors outside the distiller's state dict are not synchronized.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return distiller
    check_argument(
        not any(is_sharded(parameter) for parameter in distiller.parameters()),
        "distiller must not be sharded, got DTensor parameters; use a loop of your own with fully_shard, or fully_shard the "
        "models of the teachers only",
    )
    trained = set(distiller.state_dict())
    names = [name for name, _ in (*distiller.named_parameters(), *distiller.named_buffers())]
    ignored = [name for name in names if name not in trained]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]  # torch's own
        distiller, ignored
    )
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(distiller, device_ids=ids, find_unused_parameters=find_unused_parameters)


def synchronize_if(last: bool, forward: Callable[..., ObjectiveOutput]) -> AbstractContextManager[None]:
    """Average gradients over processes only in the last backward pass of a step."""
    if last or not isinstance(forward, DistributedDataParallel):
        return nullcontext()
    return forward.no_sync()
