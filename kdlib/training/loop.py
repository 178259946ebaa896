"""The training loop."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from math import isfinite
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from kdlib._checks import check_type
from kdlib.distiller import Distiller
from kdlib.training._checks import check_argument, check_train, checkpoint_error, diverged
from kdlib.training.batches import batch_size, sample_ids, splitter
from kdlib.training.checkpoint import CheckpointStore
from kdlib.training.config import TrainConfig
from kdlib.training.distributed import Processes, synchronize_if, wrap
from kdlib.training.ema import EMA
from kdlib.training.events import Hook, TrainEvent, TrainResult
from kdlib.training.fingerprint import check_fingerprint, check_same, run_fingerprint
from kdlib.training.log import append_log
from kdlib.training.schedules import build_optimizer, lr_factor, set_lr
from kdlib.training.signals import DeferredSignals
from kdlib.training.step import Readings, private_randomness, random_state, to_device
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
    writes files and calls hooks. The loader must give each process its own part of the data, of the same length. An error
    or a signal in one process ends all of them, with the same message and the same checkpoint.

    Args:
        distiller: Student, teachers and objective; trained in place.
        loader: Yields the batches of one epoch: `(inputs, targets)` or what `TrainConfig.split_batch` describes. It must
            have a length if `max_steps` is not given. `set_epoch(epoch)` is called on the loader and its samplers if they
            have it; `iter_from(batch)`, if the loader has it, avoids skipping batches when a run resumes in an epoch.
        config: Configuration of the run.
        hooks: Callables that receive a :class:`TrainEvent` after every step.

    Returns:
        The result. The distiller contains the final weights and is in eval mode. For a finished run, the same result is
        returned immediately.

    Raises:
        TrainingDiverged: The loss is NaN or infinite. The weights are those before the step, and checkpoints are kept;
            running statistics, such as those of BatchNorm, include the batch.
        CheckpointError: A checkpoint cannot be written, or no existing checkpoint can be read.
        ValueError: The checkpoints belong to another configuration, objective, network or teacher (the message names what
            differs), the log cannot be written, or the loader is empty.
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
    device, split = _place(distiller, config), splitter(distiller, config)
    processes = Processes()
    deferred = DeferredSignals(active=config.checkpoint_dir is not None, repeated=processes.count > 1)
    randomness = private_randomness(device, config.seed + processes.rank)
    with closing(processes), randomness, deferred as signals:
        with processes.together():
            stream = BatchStream(loader, config.accumulate, exact=processes.count > 1)
            total_steps = stream.steps(config.epochs, config.max_steps)
        lengths = processes.gather(stream.length)
        check_argument(
            len(set(lengths)) == 1,
            f"loader must have the same number of batches in every process, got {lengths}; use a DistributedSampler",
        )
        if not distiller.objective.inferred:
            with processes.together():
                batch = split(stream.peek())
            distiller.infer(*_moved(batch, device, config))
        distiller.train()
        forward = wrap(distiller, device, find_unused_parameters=config.find_unused_parameters)
        with processes.together():
            store = CheckpointStore(config)
            run = _Run(distiller, stream, config, device, total_steps, processes)
            resumed_from = run.resume(store)
            if processes.rank == 0 and run.step < total_steps:
                store.check_writable()
        check_same(processes.gather(run.fingerprint))
        steps = processes.gather(run.step)
        check_argument(
            len(set(steps)) == 1, f"checkpoint_dir must be one directory shared by all processes, got steps {steps}"
        )
        start, images, seconds = monotonic(), 0, run.seconds

        with ExitStack() as stack:
            with processes.together():
                path = config.log_path if processes.rank == 0 and run.step < total_steps else None
                log = stack.enter_context(append_log(path, last_step=run.step))
            while run.step < total_steps:
                with processes.together(4) as votes:
                    group: list[Batch] = []
                    position = run.position()
                    try:
                        if not signals.pending:
                            epoch, first, group = stream.take()
                            group = [split(batch) for batch in group]
                    except Exception:
                        if not signals.pending:  # otherwise the signal may have ended a worker of the loader too
                            raise
                    votes[:] = signals.pending, store.due_by_time(), len(group), -len(group)
                stop, due, most, fewest = votes
                if stop:
                    positions = processes.gather(position)
                    with processes.together():
                        if processes.rank == 0:
                            run.save(store, seconds, positions)
                    signals.deliver(stop)
                    run.seek(position)  # the caller's handler has returned, so training goes on
                    continue
                same = most == -fewest
                check_argument(
                    same,
                    "loader must have the same number of batches in every process, got an epoch that ends earlier in one",
                )
                lr = set_lr(run.optimizer, lr_factor(run.step, total_steps, config))
                total, terms, weights = _accumulate(run, forward, group, store, epoch=epoch, first=first)
                run.update(epoch, total, terms)
                images += processes.count * sum(batch_size(inputs) for inputs, _ in group)
                elapsed = monotonic() - start
                seconds = run.seconds + elapsed
                saving = due or store.due_by_step(run.step) or run.step == total_steps
                positions = processes.gather(run.position()) if saving else []
                with processes.together():
                    if processes.rank == 0:
                        rate = images / elapsed
                        event = TrainEvent(run.step, total_steps, epoch, total, terms, weights, lr, rate, seconds)
                        if run.step == 1 or run.step % config.log_every == 0 or run.step == total_steps:
                            log(_row(event))  # before the checkpoint: a resumed run removes rows, but adds none
                        if saving:
                            run.save(store, seconds, positions)
                        for hook in hooks:
                            hook(event)
                if saving and store.directory is not None:
                    store.newest = store.path_of(run.step)
        # Each process has its own statistics, such as those of BatchNorm; the result is that of the checkpoint.
        processes.copy_first(value for value in run.tensors() if value.is_floating_point())
        del forward
    distiller.eval()
    ema = run.ema.state_dict() if run.ema else None
    last = run.last
    return TrainResult(run.step, last["epoch"], last["total"], last["terms"], ema, seconds, resumed_from, store.newest)


class _Run:
    """The state of a run that checkpoints contain."""

    def __init__(
        self,
        distiller: Distiller,
        stream: BatchStream,
        config: TrainConfig,
        device: torch.device,
        total_steps: int,
        processes: Processes,
    ) -> None:
        self.distiller, self.stream, self.config = distiller, stream, config
        self.device, self.total_steps, self.processes = device, total_steps, processes
        self.parameters = [p for p in distiller.trainable_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.ema = None if config.ema_decay is None else EMA(distiller.student, config.ema_decay)
        self.step = 0
        self.seconds = 0.0
        self.last: dict[str, Any] = {"epoch": 0, "total": float("nan"), "terms": {}}
        self.fingerprint = {
            **run_fingerprint(config, distiller, self.optimizer, total_steps),
            "batches_per_epoch": stream.length,
            "processes": processes.count,
        }

    def tensors(self) -> list[Tensor]:
        """Return the weights, statistics and averages."""
        states = (self.distiller.state_dict(), self.ema.state_dict() if self.ema else {})
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def position(self) -> dict[str, Any]:
        """Return the position in the loader and the random states of this process."""
        return {"stream": self.stream.state_dict(), "rng": random_state(self.device)}

    def seek(self, position: dict[str, Any]) -> None:
        """Return to a position."""
        self.stream.load_state_dict(position["stream"])
        random_state(self.device, position["rng"])

    def update(self, epoch: int, total: float, terms: dict[str, float]) -> None:
        """Apply the accumulated gradients."""
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.distiller.update_teachers(step=self.step)
        if self.ema is not None:
            self.ema.update(step=self.step)
        self.step += 1
        self.last = {"epoch": epoch, "total": total, "terms": terms}

    def save(self, store: CheckpointStore, seconds: float, positions: list[dict[str, Any]]) -> None:
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
            "stream": [each["stream"] for each in positions],
            "rng": [each["rng"] for each in positions],
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
        live = self.distiller.state_dict()
        check_fingerprint(state["fingerprint"], self.fingerprint, state["distiller"], live, store.directory)
        self.step, self.seconds, self.last = state["step"], state["seconds"], state["last"]
        loads: dict[str, Callable[[Any], object]] = {
            "distiller": self.distiller.load_state_dict,
            "optimizer": self.optimizer.load_state_dict,
            "scaler": self.scaler.load_state_dict,
        }
        if self.ema is not None:
            loads["ema"] = self.ema.load_state_dict
        if self.step < self.total_steps:
            rank = self.processes.rank
            loads["stream"] = lambda positions: self.stream.load_state_dict(positions[rank])
            loads["rng"] = lambda states: random_state(self.device, states[rank])
        for name, load in loads.items():
            try:
                load(state[name])
            except Exception as error:  # such as an optimizer state of other groups
                raise checkpoint_error(f"{name} of checkpoint {store.newest} does not fit this run: {error}") from error
        return self.step


def _accumulate(
    run: _Run, forward: Callable[..., Any], group: list[Batch], store: CheckpointStore, *, epoch: int, first: int
) -> tuple[float, dict[str, float], dict[str, tuple[float, ...]]]:
    """Accumulate the gradients of the mean loss over a group of batches; return the mean total, terms and weights.

    The loss must be finite; the error names the batches and, if the targets contain them, the sample ids.
    """
    config, processes = run.config, run.processes
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(config.amp or "")
    if not run.distiller.training:  # a hook may have switched to eval mode
        run.distiller.train()
    values = None
    for left, batch in zip(range(len(group) - 1, -1, -1), group, strict=True):
        inputs, targets = _moved(batch, run.device, config)
        with synchronize_if(left == 0, forward):
            autocast = torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None)
            with processes.together(), autocast:
                output = forward(inputs, targets, step=run.step)
            packed = Readings.pack(output)
            values = packed if values is None else values + packed
            if left == 0:
                # Copied before the backward pass and read after it, so that the device never waits for the host.
                readings = Readings(values / len(group), output, processes.average)
            run.scaler.scale(output.total / len(group)).backward()
    total, terms, weights = readings.fetch()
    if isfinite(total):
        return total, terms, weights
    run.optimizer.zero_grad(set_to_none=True)
    batches = f"batch {first}" if len(group) == 1 else f"batches {first} to {first + len(group) - 1}"
    found = processes.gather((readings.own, batches, sample_ids(group)))
    bad = [(rank, *each) for rank, each in enumerate(found) if not isfinite(each[0])] or [(0, *found[0])]
    problem = f"loss must be finite, got {bad[0][1]} at step {run.step + 1}, epoch {epoch}, "
    problem += " and ".join(
        f"{batches} of the epoch"
        f"{f' of process {rank}' if processes.count > 1 else ''}"
        f"{f' (samples {_listed(samples)})' if samples else ''}"
        for rank, _, batches, samples in bad
    )
    problem += f"; terms {', '.join(f'{name}={x:.6g}' for name, x in terms.items())}"
    samples = tuple(sample for *_, each in bad for sample in each)
    raise diverged(problem, terms, step=run.step + 1, epoch=epoch, newest=store.newest, samples=samples)


def _listed(samples: tuple[int, ...]) -> str:
    return ", ".join(map(str, samples[:32])) + (", ..." if len(samples) > 32 else "")


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
    inputs, targets = batch
    return to_device(inputs, device, channels_last=config.channels_last), to_device(targets, device)


def _row(event: TrainEvent) -> dict[str, Any]:
    row: dict[str, Any] = {"step": event.step, "epoch": event.epoch, "lr": event.lr, "total": event.total}
    row["terms"] = {name: value if isfinite(value) else None for name, value in event.terms.items()}
    if event.weights:
        row["weights"] = {name: list(values) for name, values in event.weights.items()}
    row["seconds"] = round(event.seconds, 3)
    return row
