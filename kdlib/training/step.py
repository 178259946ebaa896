"""Helpers of a training step: device transfer, reading of values, random state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Readings", "batch_size", "private_randomness", "random_state", "sample_ids", "to_device"]


class Readings:
    """The values of one step, copied from the device asynchronously and read by `fetch`.

    Args:
        values: 1-d tensor: the total, the terms, the mean weights.
        layout: Names of the terms; name and number of teachers of each weighted term.
    """

    def __init__(self, values: Tensor, layout: tuple[list[str], list[tuple[str, int]]]) -> None:
        self._layout = layout
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._copied.record()
        else:
            self._values = values

    @staticmethod
    def pack(output: Any) -> tuple[Tensor, tuple[list[str], list[tuple[str, int]]]]:
        """Pack an `ObjectiveOutput` into one 1-d tensor and its layout."""
        scalars = torch.stack([output.total, *output.terms.values()]).detach()
        means = [weight.detach().to(scalars).mean(dim=1) for weight in output.weights.values()]
        layout = (list(output.terms), [(name, weight.shape[0]) for name, weight in output.weights.items()])
        return (torch.cat([scalars, *means]) if means else scalars), layout

    def fetch(self) -> tuple[float, dict[str, float], dict[str, tuple[float, ...]]]:
        """Return the total, the terms, and the mean weight of each teacher by term."""
        if self._copied is not None:
            self._copied.synchronize()
        total, *rest = self._values.tolist()
        names, weighted = self._layout
        terms = dict(zip(names, rest, strict=False))
        weights, at = {}, len(names)
        for name, count in weighted:
            weights[name] = tuple(rest[at : at + count])
            at += count
        return total, terms, weights


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


def batch_size(inputs: Any) -> int:
    """Return the batch size: the first dimension of the first tensor."""
    if isinstance(inputs, (tuple, list)):
        inputs = inputs[0]
    return int(inputs.shape[0])


def sample_ids(group: list[tuple[Any, Any]]) -> tuple[int, ...]:
    """Return the sample ids of a group of batches, if their targets contain them."""
    samples: list[int] = []
    for _, targets in group:
        ids = targets.get("sample") if isinstance(targets, Mapping) else None
        if isinstance(ids, Tensor):
            samples += [int(value) for value in ids.flatten().tolist()]
    return tuple(samples)


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
