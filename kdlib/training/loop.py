"""The training loop."""

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from kdlib._checks import check_type
from kdlib.distiller import Distiller
from kdlib.training import distributed
from kdlib.training._checks import check_batch, check_fingerprint, check_train, diverged
from kdlib.training.checkpoint import CheckpointStore
from kdlib.training.config import TrainConfig
from kdlib.training.ema import EMA
from kdlib.training.events import Hook, TrainEvent, TrainResult
from kdlib.training.log import append_log
from kdlib.training.schedules import build_optimizer, lr_factor, set_lr
from kdlib.training.signals import DeferredSignals
from kdlib.training.step import Readings, batch_size, private_randomness, random_state, sample_ids, to_device
from kdlib.training.stream import Batch, BatchStream

__all__ = ["train"]


def train(
    distiller: Distiller, loader: Iterable[Batch], config: TrainConfig, *, hooks: Sequence[Hook] = ()
) -> TrainResult:
    """Train a distiller, resuming from its newest checkpoint if there is one.

    On the CPU, an interrupted and resumed run gives bit-identical weights: a checkpoint contains the weights, the
    optimizer, the average, the position in the epoch and the random states. This requires batches that depend only on the
    epoch, their position in it and torch's random state, and the same number of threads. The global random state of the
    caller is not changed.

    Under `torchrun` (with an initialized process group) gradients are averaged over processes, and only the first process
    writes files and calls hooks. The loader must give each process its own part of the data.

    Args:
        distiller: Student, teachers and objective; trained in place.
        loader: Yields `(inputs, targets)` for one epoch: inputs is a tensor or a tuple of tensors, targets a mapping of
            tensors or `None`. It must have a length if `max_steps` is not given. `set_epoch(epoch)` is called on the
            loader and its samplers if they have it; `iter_from(batch)`, if the loader has it, avoids skipping batches
            when a run resumes within an epoch.
        config: Configuration of the run.
        hooks: Callables that receive a :class:`TrainEvent` after every step.

    Returns:
        The result. The distiller contains the final weights and is in eval mode. For a finished run, the same result is
        returned immediately.

    Raises:
        TrainingDiverged: The loss is NaN or infinite. The weights are those before the step, and checkpoints are kept;
            running statistics, such as those of BatchNorm, include the batch.
        CheckpointError: A checkpoint cannot be written, or no existing checkpoint can be read.
        ValueError: The checkpoints belong to another configuration, or the loader is empty.
        TypeError: An argument or a batch has the wrong type.
        KeyboardInterrupt: Ctrl-C, after the current step and a checkpoint. SIGTERM likewise ends the process.

    Examples:
        >>> from kdlib import HintLoss, Objective, OUTPUT, StudentAdapter, TeacherAdapter, Term
        >>> student = StudentAdapter(torch.nn.Linear(4, 2), {"out": OUTPUT})
        >>> teacher = TeacherAdapter(torch.nn.Linear(4, 2), {"out": OUTPUT})
        >>> objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out")})
        >>> loader = [(torch.randn(8, 4), {}) for _ in range(5)]
        >>> result = train(Distiller(student, {"teacher": teacher}, objective), loader, TrainConfig(epochs=2))
        >>> result.step
        10
    """
    check_train(distiller, loader, hooks)
    check_type("train", "config", config, TrainConfig, "a TrainConfig")
    rank, world = distributed.rank(), distributed.world_size()
    device = _place(distiller, config)
    deferred = DeferredSignals(active=config.checkpoint_dir is not None and world == 1)
    with private_randomness(device, config.seed + rank), deferred as signals:
        stream = BatchStream(loader, config.accumulate)
        total_steps = stream.steps(config.epochs, config.max_steps)
        store = CheckpointStore(config)
        if not distiller.objective.inferred:
            distiller.infer(*_moved(stream.peek(), device, config))
        distiller.train()
        run = _Run(distiller, stream, config, device, total_steps)
        resumed_from = run.resume(store)
        distributed.check_same_step(run.step, device)
        forward = distributed.wrap(distiller, device, find_unused_parameters=config.find_unused_parameters)
        logging = config.log_path if rank == 0 and run.step < total_steps else None
        start, images, seconds = monotonic(), 0, run.seconds

        with append_log(logging, last_step=run.step) as log:
            while run.step < total_steps:
                epoch, first, group = stream.take()
                lr = set_lr(run.optimizer, lr_factor(run.step, total_steps, config))
                total, terms, weights = _accumulate(run, forward, group, config)
                _check_loss(total, terms, run, store, group, epoch=epoch, first=first)
                run.update(epoch, total, terms)

                images += world * sum(batch_size(inputs) for inputs, _ in group)
                elapsed = monotonic() - start
                seconds = run.seconds + elapsed
                event = TrainEvent(run.step, total_steps, epoch, total, terms, weights, lr, images / elapsed, seconds)
                if run.step == 1 or run.step % config.log_every == 0 or run.step == total_steps:
                    log(_row(event))
                stopping = signals.pending  # read once: a later signal is handled after the next step
                if rank == 0:
                    if store.due(run.step) or run.step == total_steps or stopping:
                        run.save(store, seconds)
                    for hook in hooks:
                        hook(event)
                if stopping:
                    signals.deliver()
        del forward
        distributed.free_wrapper()
    distiller.eval()
    ema = run.ema.state_dict() if run.ema else None
    last = run.last
    return TrainResult(run.step, last["epoch"], last["total"], last["terms"], ema, seconds, resumed_from, store.newest)


class _Run:
    """The state of a run that checkpoints contain."""

    def __init__(
        self, distiller: Distiller, stream: BatchStream, config: TrainConfig, device: torch.device, total_steps: int
    ) -> None:
        self.distiller = distiller
        self.stream = stream
        self.config = config
        self.device = device
        self.parameters = [p for p in distiller.trainable_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.ema = None if config.ema_decay is None else EMA(distiller.student, config.ema_decay)
        self.step = 0
        self.seconds = 0.0
        self.last: dict[str, Any] = {"epoch": 0, "total": float("nan"), "terms": {}}
        self.fingerprint = {
            **config.fingerprint(),
            "total_steps": total_steps,
            "batches_per_epoch": stream.length,
            "processes": distributed.world_size(),
            "parameters": sum(p.numel() for p in self.parameters),
        }

    def update(self, epoch: int, total: float, terms: dict[str, float]) -> None:
        """Apply the accumulated gradients."""
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(step=self.step)
        self.step += 1
        self.last = {"epoch": epoch, "total": total, "terms": terms}

    def save(self, store: CheckpointStore, seconds: float) -> None:
        """Write the checkpoint of this step unless a weight is NaN or infinite."""
        weights = self.distiller.state_dict()
        # A finite loss can have a non-finite gradient, which the loss would only show after this checkpoint.
        bad = [name for name, x in weights.items() if isinstance(x, Tensor) and not torch.isfinite(x).all()]
        if bad:
            problem = f"weights must be finite at step {self.step}, got NaN or infinity in {', '.join(bad[:4])}"
            last = self.last
            raise diverged(problem, last["terms"], step=self.step, epoch=last["epoch"], newest=store.newest)
        state = {
            "distiller": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "stream": self.stream.state_dict(),
            "rng": random_state(self.device),
            "last": self.last,
            "seconds": seconds,
            "fingerprint": self.fingerprint,
        }
        store.save(self.step, state)

    def resume(self, store: CheckpointStore) -> int | None:
        """Load the newest checkpoint and return its step, or `None` without a checkpoint."""
        state = store.load()
        if state is None:
            return None
        check_fingerprint(state["fingerprint"], self.fingerprint, store.directory)
        self.distiller.load_state_dict(state["distiller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step, self.seconds, self.last = state["step"], state["seconds"], state["last"]
        if self.step < int(self.fingerprint["total_steps"] or 0):
            self.stream.load_state_dict(state["stream"])
            if distributed.rank() == 0:
                random_state(self.device, state["rng"])
        return self.step


def _accumulate(
    run: _Run, forward: Callable[..., Any], group: list[Batch], config: TrainConfig
) -> tuple[float, dict[str, float], dict[str, tuple[float, ...]]]:
    """Accumulate the gradients of the mean loss over a group of batches; return the mean total, terms and weights."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.amp or "")
    run.distiller.objective.set_step(run.step)
    if not run.distiller.training:  # a hook may have switched to eval mode
        run.distiller.train()
    values = None
    for left, batch in zip(range(len(group) - 1, -1, -1), group, strict=True):
        inputs, targets = _moved(batch, run.device, config)
        with distributed.synchronize_if(left == 0, forward):
            with torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None):
                output = forward(inputs, targets)
            packed = Readings.pack(output)
            values = packed if values is None else values + packed
            if left == 0:
                # Copied before the backward pass and read after it, so that the device never waits for the host.
                readings = Readings(distributed.average(values / len(group)), output)
            run.scaler.scale(output.total / len(group)).backward()
    return readings.fetch()


def _check_loss(
    total: float,
    terms: dict[str, float],
    run: _Run,
    store: CheckpointStore,
    group: list[Batch],
    *,
    epoch: int,
    first: int,
) -> None:
    """Require a finite loss; the error names the batches and, if the targets contain them, the sample ids."""
    if isfinite(total):
        return
    run.optimizer.zero_grad(set_to_none=True)
    step, samples = run.step + 1, sample_ids(group)
    ids = ", ".join(map(str, samples[:32])) + (", ..." if len(samples) > 32 else "")
    batches = f"batch {first}" if len(group) == 1 else f"batches {first} to {first + len(group) - 1}"
    problem = (
        f"loss must be finite, got {total} at step {step}, epoch {epoch}, {batches} of the epoch"
        f"{f' (samples {ids})' if samples else ''}; terms {', '.join(f'{name}={x:.6g}' for name, x in terms.items())}"
    )
    raise diverged(problem, terms, step=step, epoch=epoch, newest=store.newest, samples=samples)


def _place(distiller: Distiller, config: TrainConfig) -> torch.device:
    """Move the distiller to the device of `config`; return the device."""
    current = next((p.device for p in distiller.parameters() if p.requires_grad), torch.device("cpu"))
    device = current if config.device is None else torch.device(config.device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    distiller.to(device)
    if config.channels_last:
        distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return device


def _moved(batch: Batch, device: torch.device, config: TrainConfig) -> Batch:
    check_batch(batch)
    inputs, targets = batch
    return to_device(inputs, device, channels_last=config.channels_last), to_device(targets, device)


def _row(event: TrainEvent) -> dict[str, Any]:
    row: dict[str, Any] = {"step": event.step, "epoch": event.epoch, "lr": event.lr, "total": event.total}
    row["terms"] = {name: value if isfinite(value) else None for name, value in event.terms.items()}
    if event.weights:
        row["weights"] = {name: list(values) for name, values in event.weights.items()}
    row["seconds"] = round(event.seconds, 3)
    return row
