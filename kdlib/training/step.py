"""Helpers of a training step: device transfer, reading of values, random state."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Readings", "private_randomness", "random_state", "to_device"]


class Readings:
    """The values of one step, copied from the device asynchronously and read by `fetch`.

    Args:
        values: The mean of :meth:`pack` over the batches of the step.
        output: An `ObjectiveOutput` with the same terms and weights.
        average: Averages values over processes, in place.

    Attributes:
        own: The total of this process, after `fetch`.
    """

    def __init__(self, values: Tensor, output: Any, average: Callable[[Tensor], Tensor]) -> None:
        self._names, self._counts = list(output.terms), {name: len(w) for name, w in output.weights.items()}
        own = values[:1].clone()
        self._values, self._copied = torch.cat([own, average(values)]), None
        if values.is_cuda:
            device, self._values = self._values, torch.empty(len(self._values), dtype=values.dtype, pin_memory=True)
            self._values.copy_(device, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._copied.record()
        self.own = 0.0

    @staticmethod
    def pack(output: Any) -> Tensor:
        """Pack the total, the terms and the mean weights of an `ObjectiveOutput` into one 1-d tensor."""
        scalars = torch.stack([output.total, *output.terms.values()]).detach()
        return torch.cat([scalars, *(weight.detach().to(scalars).mean(dim=1) for weight in output.weights.values())])

    def fetch(self) -> tuple[float, dict[str, float], dict[str, tuple[float, ...]]]:
        """Return the total, the terms, and the mean weight of each teacher by term."""
        if self._copied is not None:
            self._copied.synchronize()
        self.own, total, *rest = self._values.tolist()
        values = iter(rest)
        terms = {name: next(values) for name in self._names}
        return total, terms, {name: tuple(next(values) for _ in range(n)) for name, n in self._counts.items()}


def to_device(value: Any, device: torch.device, *, channels_last: bool = False) -> Any:
    """Move the tensors of a batch to the device, through tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if channels_last and value.dim() == 4 and value.is_floating_point():
            return value.to(device, non_blocking=True, memory_format=torch.channels_last)
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: to_device(item, device, channels_last=channels_last) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_device(item, device, channels_last=channels_last) for item in value)
    return value


@contextmanager
def private_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the default generators within the block and restore their state afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def random_state(device: torch.device, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state of the default generators, after setting it to `state` if given."""
    cuda = device.type == "cuda"
    if state is not None:
        torch.default_generator.set_state(state["cpu"])
        if cuda and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    current = {"cpu": torch.default_generator.get_state()}
    return {**current, "cuda": torch.cuda.get_rng_state(device)} if cuda else current
