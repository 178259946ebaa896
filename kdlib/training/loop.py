"""The training loop."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from math import isfinite
from typing import Any

import torch

from kdlib._checks import check_type
from kdlib.adapters import TeacherAdapter
from kdlib.distiller import Distiller
from kdlib.training._checks import check_argument, check_available, check_train
from kdlib.training.batches import batch_size, splitter
from kdlib.training.checkpoint import CheckpointStore
from kdlib.training.config import TrainConfig
from kdlib.training.distributed import Processes, synchronized_batch_norm, wrap
from kdlib.training.events import Hook, Meter, TrainEvent, TrainResult
from kdlib.training.fingerprint import check_same
from kdlib.training.log import LogRow, append_log
from kdlib.training.run import Run, private_randomness
from kdlib.training.schedules import lr_factor, set_lr
from kdlib.training.signals import DeferredSignals
from kdlib.training.step import accumulate, moved
from kdlib.training.stream import Batch, BatchStream, Shardable

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
    or a signal in one process ends all of them, with the same message and the same checkpoint. If the loader has
    `shard(rank, count)`, it is called before the first batch, and the loader must then yield one of `count` equal parts of
    each batch. The batches of such a run do not depend on the number of processes, so any number of them can resume it.
    Parameters may be sharded over the processes (`fully_shard`, sharded class centers); each process then also writes its
    part of a checkpoint.

    Args:
        distiller: Student, teachers and objective; trained in place.
        loader: Yields the batches of one epoch: `(inputs, targets)` or what `TrainConfig.split_batch` describes. It must
            have a length if `max_steps` is not given. `set_epoch(epoch)` is called on the loader and its samplers if they
            have it; `iter_from(batch)`, if the loader has it, avoids skipping batches when a run resumes in an epoch.
        config: Configuration of the run.
        hooks: Callables that receive a :class:`TrainEvent` after every step.

    Returns:
        The result. The distiller contains the final weights and is in eval mode; `result.best` contains the best ones. For
        a finished run, the same result is returned immediately, unless `config` has more `epochs` or `max_steps`: then it
        continues, with the learning-rate schedule of the new length.

    Raises:
        TrainingDiverged: The loss is NaN or infinite. The weights are those before the step, and checkpoints are kept;
            running statistics, such as those of BatchNorm, include the batch.
        CheckpointError: A checkpoint cannot be written, or no existing checkpoint can be read.
        ValueError: The checkpoints belong to another configuration, objective, network or teacher (the message names what
            differs), the log cannot be written, the loader is empty, BatchNorm received a batch of one, or a metric is not
            finite. An error of `config.evaluate` or its metrics leaves a checkpoint, which a resumed run evaluates first.
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
    with closing(processes), randomness, compiled(distiller, config), deferred as signals:
        with processes.together():
            if isinstance(loader, Shardable):
                loader.shard(processes.rank, processes.count)
            stream = BatchStream(loader, config.accumulate, exact=processes.count > 1)
            total_steps = stream.steps(config.epochs, config.max_steps)
        _same_everywhere(
            processes,
            stream.length,
            "loader must have the same number of batches in every process, got {}; use a DistributedSampler",
        )
        if not distiller.objective.inferred:
            with processes.together():
                batch = split(stream.peek())
            distiller.infer(*moved(batch, device, config))
        distiller.train()
        forward = wrap(distiller, device, find_unused_parameters=config.find_unused_parameters)
        with processes.together():
            store = CheckpointStore(config)
            run = Run(distiller, stream, config, device, total_steps, processes)
            resumed_from = run.resume(store)
            if processes.rank == 0 and not run.finished:
                store.check_writable()
        decisions = {"evaluate": config.evaluate is not None, "evaluate_every": config.evaluate_every}
        check_same(processes.gather({**run.fingerprint, **decisions, "patience": config.patience}))
        _same_everywhere(
            processes, run.step, "checkpoint_dir must be one directory shared by all processes, got steps {}"
        )
        meter = Meter(run.step, run.seconds)

        with ExitStack() as stack:
            # After the projections have been created.
            active = config.sync_batch_norm and processes.count > 1
            stack.enter_context(synchronized_batch_norm(distiller, active=active))
            with processes.together():
                path = config.log_path if processes.rank == 0 and not run.finished else None
                reported = run.step - run.evaluation_due  # a step is reported with its evaluation
                log = stack.enter_context(append_log(path, last_step=reported))
            while not run.finished:
                evaluating = run.evaluation_due
                with processes.together(4) as votes:
                    position = run.position()
                    with meter.waiting():
                        resting = evaluating or bool(signals.pending)
                        epoch, first, group = (0, 0, []) if resting else _take(stream, split, signals)
                    votes[:] = signals.pending, store.due_by_time(), len(group), -len(group)
                stop, due, most, fewest = votes
                if stop:
                    run.checkpoint(store, meter.seconds, position)
                    signals.deliver(stop)
                    run.seek(position)  # the caller's handler has returned, so training goes on
                    continue
                check_argument(
                    most == -fewest,
                    "loader must have the same number of batches in every process, got an epoch that ends earlier in one",
                )
                evaluation = None
                if evaluating and config.evaluate is not None:
                    try:
                        with meter.evaluating():
                            evaluation = run.evaluate(config.evaluate, signals)
                    except Exception:
                        run.checkpoint(store, meter.seconds, position)  # a resumed run evaluates this step first
                        raise
                    if evaluation is None:
                        continue
                else:
                    lr = set_lr(run.optimizer, lr_factor(run.step, total_steps, config))
                    total, terms, weights = accumulate(run, forward, group, store, epoch=epoch, first=first)
                    run.update({"epoch": epoch, "total": total, "terms": terms, "weights": weights, "lr": lr})
                    meter.images += processes.count * sum(batch_size(inputs) for inputs, _ in group)
                meter.tick()
                if run.evaluation_due:  # before which a signal may arrive
                    continue
                improved = evaluation is not None and evaluation.improved
                saving = due or store.due_by_step(run.step) or improved or run.finished
                positions = processes.gather(run.position()) if saving else []
                shards = run.write_shards(store) if saving else None
                logging = evaluation or run.step == 1 or run.step % config.log_every == 0 or run.finished
                with processes.together():
                    if processes.rank == 0 and (logging or saving or hooks):
                        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
                        event = meter.event(run.step, total_steps, run.last, evaluation, memory=memory)
                        if logging:
                            log(_row(event))  # before the checkpoint: a resumed run removes rows, but adds none
                        if saving:
                            run.save(store, meter.seconds, positions, shards)
                        for hook in hooks:
                            hook(event)
                if saving and store.directory is not None:
                    store.newest = store.path_of(run.step, run.improved)
        # Each process has its own statistics, such as those of BatchNorm; the result is that of the checkpoint.
        processes.copy_first(value for value in run.tensors() if value.is_floating_point())
        with processes.together():
            best = run.best(store)
        del forward
    distiller.eval()
    return TrainResult(
        step=run.step,
        epoch=run.last["epoch"],
        total=run.last["total"],
        terms=run.last["terms"],
        ema=run.ema.state_dict() if run.ema else None,
        seconds=meter.seconds,
        resumed_from=resumed_from,
        checkpoint=store.newest,
        evaluations=tuple(run.evaluations),
        best=best,
        stopped_early=run.step < total_steps,
    )


def _same_everywhere(processes: Processes, value: object, problem: str) -> None:
    """Check that a value is the same in every process; `{}` in `problem` stands for the values."""
    values = processes.gather(value)
    check_argument(len(set(values)) == 1, problem.format(values))


def _take(
    stream: BatchStream, split: Callable[[Any], tuple[Any, Any]], signals: DeferredSignals
) -> tuple[int, int, list[Batch]]:
    """Return the epoch, the first batch in it and the batches of the next step; none if a signal arrives meanwhile."""
    try:
        epoch, first, group = stream.take()
        return epoch, first, [split(batch) for batch in group]
    except Exception:
        if not signals.pending:  # otherwise the signal may have ended a worker of the loader too
            raise
        return 0, 0, []


def _place(distiller: Distiller, config: TrainConfig) -> torch.device:
    """Move the distiller to the device of `config`; return the device."""
    current = next((p.device for p in distiller.parameters() if p.requires_grad), torch.device("cpu"))
    device = current if config.device is None else torch.device(config.device)
    check_available(device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    distiller.to(device)
    if config.channels_last:
        distiller.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return device


@contextmanager
def compiled(distiller: Distiller, config: TrainConfig) -> Iterator[None]:
    """Compile the networks of a distiller within the block if the configuration says so."""
    teachers = [each for each in distiller.teachers.values() if isinstance(each, TeacherAdapter)]
    candidates = [distiller.student, *teachers] if config.compile else []
    networks = [each for each in candidates if each._compiled_call_impl is None]  # others were compiled by the caller
    for network in networks:
        network.compile()
    try:
        yield
    finally:
        for network in networks:
            network._compiled_call_impl = None


def _row(event: TrainEvent) -> LogRow:
    row: LogRow = {
        "step": event.step,
        "epoch": event.epoch,
        "lr": event.lr,
        "total": event.total,
        "terms": {name: value if isfinite(value) else None for name, value in event.terms.items()},
        "seconds": round(event.seconds, 3),
        "speed": {
            "images_per_second": round(event.images_per_second, 1),
            "step_seconds": round(event.step_seconds, 5),
            "data_wait": round(event.data_wait, 4),
            "memory": event.memory,
        },
    }
    if event.weights:
        row["weights"] = {name: list(values) for name, values in event.weights.items()}
    if event.evaluation is not None:
        row["metrics"] = dict(event.evaluation.metrics)
        row["improved"] = event.evaluation.improved
    return row
