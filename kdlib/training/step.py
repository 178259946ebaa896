"""The forward and backward passes of a training step."""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from kdlib.objective import ObjectiveOutput
from kdlib.training._checks import batch_of_one, diverged, listed, note_batch
from kdlib.training.batches import batch_size, sample_ids, to_device
from kdlib.training.checkpoint import CheckpointStore
from kdlib.training.config import TrainConfig
from kdlib.training.distributed import Processes, synchronize_if
from kdlib.training.run import Run
from kdlib.training.stream import Batch

__all__ = ["Readings", "accumulate", "moved"]

_TOO_FEW = "Expected more than 1 value per channel"
"""Start of the message of torch's batch normalization."""


class Readings:
    """The values of one step, copied from the device asynchronously and read by `fetch`.

    Args:
        values: The mean of :meth:`pack` over the batches of the step.
        output: An `ObjectiveOutput` with the same terms and weights.
        processes: The processes over which the values are averaged.

    Attributes:
        own: The total of this process, after `fetch`.
    """

    def __init__(self, values: Tensor, output: ObjectiveOutput, processes: Processes) -> None:
        self._names, self._counts = list(output.terms), {name: len(w) for name, w in output.weights.items()}
        # With several processes, the own total is the last value.
        alone = processes.count == 1
        self._values = values if alone else torch.cat([processes.average(values.clone()), values[:1]])
        self._copied = None
        if values.is_cuda:
            device, self._values = self._values, torch.empty(len(self._values), dtype=values.dtype, pin_memory=True)
            self._values.copy_(device, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._copied.record()
        self.own = 0.0

    @staticmethod
    def pack(output: ObjectiveOutput) -> Tensor:
        """Pack the total, the terms and the mean weights of an `ObjectiveOutput` into one 1-d tensor."""
        scalars = torch.stack([output.total, *output.terms.values()]).detach()
        return torch.cat([scalars, *(weight.detach().to(scalars).mean(dim=1) for weight in output.weights.values())])

    def fetch(self) -> tuple[float, dict[str, float], dict[str, tuple[float, ...]]]:
        """Return the total, the terms, and the mean weight of each teacher by term."""
        if self._copied is not None:
            self._copied.synchronize()
        values = iter(self._values.tolist())
        total = next(values)
        terms = {name: next(values) for name in self._names}
        weights = {name: tuple(next(values) for _ in range(n)) for name, n in self._counts.items()}
        self.own = next(values, total)
        return total, terms, weights


def accumulate(
    run: Run,
    forward: Callable[..., ObjectiveOutput],
    group: list[Batch],
    store: CheckpointStore,
    *,
    epoch: int,
    first: int,
) -> tuple[float, dict[str, float], dict[str, tuple[float, ...]]]:
    """Accumulate the gradients of the mean loss over a group of batches; return the mean total, terms and weights.

    The loss must be finite; the error names the batches and, if the targets contain them, the sample ids.
    """
    config, processes = run.config, run.processes
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.amp or "")
    if not run.distiller.training:  # a hook may have switched to eval mode
        run.distiller.train()
    values = None
    for index, batch in enumerate(group):
        left = len(group) - 1 - index
        inputs, targets = moved(batch, run.device, config)
        with synchronize_if(left == 0, forward):
            autocast = torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None)
            with processes.together(), autocast:
                try:
                    output = forward(inputs, targets, step=run.step)
                except Exception as error:
                    process = f" of process {processes.rank}" if processes.count > 1 else ""
                    if _TOO_FEW in str(error):
                        raise batch_of_one(first + index, epoch, batch_size(inputs), process) from error
                    note_batch(error, first + index, epoch, sample_ids([batch]), process, store.newest)
                    raise
            packed = Readings.pack(output)
            values = packed if values is None else values + packed
            if left == 0:
                # Copied before the backward pass and read after it, so that the device never waits for the host.
                readings = Readings(values if len(group) == 1 else values / len(group), output, processes)
            run.scaler.scale(output.total / len(group)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    total, terms, weights = readings.fetch()
    if isfinite(total):
        return total, terms, weights
    run.optimizer.zero_grad(set_to_none=True)
    batches = f"batch {first}" if len(group) == 1 else f"batches {first} to {first + len(group) - 1}"
    found = processes.gather((readings.own, batches, sample_ids(group)))
    bad = [(rank, *each) for rank, each in enumerate(found) if not isfinite(each[0])] or [(0, *found[0])]
    problem = f"loss must be finite, got {bad[0][1]} at step {run.step + 1}, epoch {epoch}, "
    problem += " and ".join(
        f"{batches} of the epoch{f' of process {rank}' if processes.count > 1 else ''}{listed(samples)}"
        for rank, _, batches, samples in bad
    )
    problem += f"; terms {', '.join(f'{name}={x:.6g}' for name, x in terms.items())}"
    samples = tuple(sample for *_, each in bad for sample in each)
    raise diverged(problem, terms, step=run.step + 1, epoch=epoch, newest=store.newest, samples=samples)


def moved(batch: Batch, device: torch.device, config: TrainConfig) -> Batch:
    """Move a batch to the device."""
    inputs, targets = batch
    return to_device(inputs, device, channels_last=config.channels_last), to_device(targets, device)
