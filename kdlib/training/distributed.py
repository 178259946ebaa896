"""Training with several processes started by `torchrun`."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kdlib._gather import is_sharded
from kdlib.objective import ObjectiveOutput
from kdlib.training._checks import ErrorReport, describe_error, received_error

__all__ = ["Processes", "synchronize_if", "synchronized_batch_norm", "wrap"]

_T = TypeVar("_T")


class Processes:
    """The processes of a run, which take every decision together; one process without a process group."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.count = dist.get_world_size() if several else 1
        # Decisions are exchanged between the hosts, so that they never wait for the devices.
        self._own = dist.new_group(backend="gloo") if self.count > 1 and dist.get_backend() != "gloo" else None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group for communication between the hosts; None for the default group."""
        return self._own

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
            reports: list[ErrorReport | None] = self.gather(None)
            rank, report = next((rank, each) for rank, each in enumerate(reports) if each is not None)
            raise received_error(rank, report)

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
        """Copy tensors of the first process to the others, such as statistics that each process computes on its own.

        Of sharded tensors, each process keeps its part.
        """
        if self.count > 1:
            for tensor in tensors:
                if not is_sharded(tensor):
                    dist.broadcast(tensor, 0)


def wrap(
    distiller: nn.Module, device: torch.device, *, find_unused_parameters: bool = False
) -> Callable[..., ObjectiveOutput]:
    """Return the distiller, wrapped in `DistributedDataParallel` if there are several processes.

    Teachers are frozen and identical on all processes, so tensors outside the distiller's state dict are not synchronized.
    Sharded parameters are not either: each process has its own part, whose gradient is that of all processes.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return distiller
    trained = set(distiller.state_dict())
    names = [name for name, _ in (*distiller.named_parameters(), *distiller.named_buffers())]
    sharded = {name for name, parameter in distiller.named_parameters() if is_sharded(parameter)}
    ignored = [name for name in names if name not in trained or name in sharded]
    if not any(p.requires_grad for name, p in distiller.named_parameters() if name not in ignored):
        return distiller
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


@contextmanager
def synchronized_batch_norm(distiller: nn.Module, *, active: bool) -> Iterator[None]:
    """BatchNorm layers of the distiller use the statistics of all processes within the block.

    `torch.nn.SyncBatchNorm` requires a GPU, and it replaces modules, whose hooks would be lost.
    """
    layers = [module for module in distiller.modules() if active and isinstance(module, _BatchNorm)]
    # Not a decorator, which would import torch's compiler with this module.
    normalize = torch.compiler.disable(_normalize) if layers else _normalize  # type: ignore[no-untyped-call]
    for layer in layers:
        layer.forward = partial(normalize, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _normalize(layer: _BatchNorm, x: Tensor) -> Tensor:
    """Forward of a BatchNorm layer, with the statistics of all processes in training mode."""
    if not layer.training:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        own = wide.mean(dims)
        spread = (wide - own.view(shape)).square().sum(dims)
        size = wide.new_full((1,), x.numel() / x.shape[1])
        rows: Tensor = _AllRows.apply(torch.cat([own, spread, size]))  # type: ignore[no-untyped-call]  # torch's own
        means, spreads = rows[:, :-1].view(len(rows), 2, -1).unbind(1)
        sizes = rows[:, -1:]
        count = sizes.sum()
        mean = (sizes * means).sum(0) / count
        # From the spread around each mean, since E[x^2] - E[x]^2 loses digits where the mean is large.
        variance = (spreads + sizes * (means - mean).square()).sum(0) / count
        _update_statistics(layer, mean.detach(), (variance * count / (count - 1)).detach())
        y = (wide - mean.view(shape)) * (variance + layer.eps).rsqrt().view(shape)
        if layer.weight is not None:
            y = y * layer.weight.view(shape) + layer.bias.view(shape)
        return y.to(x.dtype)


@torch.no_grad()
def _update_statistics(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    count = layer.num_batches_tracked
    if count is not None:
        count.add_(1)
    momentum = layer.momentum if layer.momentum is not None else 1.0 / float(count or 1)
    for running, value in ((layer.running_mean, mean), (layer.running_var, variance)):
        if running is not None:
            running.lerp_(value.to(running), momentum)


class _AllRows(torch.autograd.Function):
    """The vectors of all processes as rows, whose gradients are summed over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
