"""The state of a training run: what checkpoints contain, and evaluations."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import cast

import torch
from torch import Tensor

from kdlib._gather import is_sharded
from kdlib.distiller import Distiller
from kdlib.training._checks import check_argument, checkpoint_error, diverged, read_metrics
from kdlib.training.checkpoint import (
    CheckpointState,
    CheckpointStore,
    EvaluationRow,
    RunState,
    TensorState,
    load_checkpoint,
)
from kdlib.training.config import Evaluate, TrainConfig
from kdlib.training.distributed import Processes
from kdlib.training.ema import EMA
from kdlib.training.events import BestWeights, Evaluation, StepValues
from kdlib.training.fingerprint import check_fingerprint, run_fingerprint
from kdlib.training.schedules import build_optimizer, lr_factor
from kdlib.training.sharded.files import Index, meta_tensors
from kdlib.training.sharded.gradients import clip_gradients, local
from kdlib.training.sharded.state import insert, not_finite, separate
from kdlib.training.sharded.store import check_shards, insert_shards, write_step
from kdlib.training.signals import DeferredSignals
from kdlib.training.stream import BatchStream, Position, Shardable

__all__ = ["Run", "private_randomness", "random_state", "set_random_state"]

_log = logging.getLogger("kdlib.training")


class Run:
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
        self.sharded = any(is_sharded(parameter) for parameter in self.parameters)
        check_argument(
            not self.sharded or config.amp != "float16",
            "amp must be None or 'bfloat16' for sharded parameters, got 'float16'",
        )
        self.optimizer = build_optimizer(self.parameters, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.ema = None if config.ema_decay is None else EMA(distiller.student, config.ema_decay)
        self.step = 0
        self.seconds = 0.0
        self.last: StepValues = {"epoch": 0, "total": float("nan"), "terms": {}, "weights": {}, "lr": 0.0}
        self.evaluations: list[Evaluation] = []
        self._best_weights: dict[str, object] = {}
        every = config.evaluate_every or stream.steps_per_epoch
        check_argument(
            config.evaluate is None or every is not None,
            "evaluate_every must be given when loader has no length, got None",
        )
        self._evaluate_every = every or 1
        self._shared = isinstance(stream.loader, Shardable)
        self.fingerprint = self._describe(total_steps)

    def _describe(self, total_steps: int) -> dict[str, object]:
        return {
            **run_fingerprint(self.config, self.distiller, self.optimizer, total_steps),
            "batches_per_epoch": self.stream.length,
            "processes": "any number" if self._shared or self.sharded else self.processes.count,
        }

    @property
    def improved(self) -> list[int]:
        """Steps at which the monitored metric improved, in order."""
        return [each.step for each in self.evaluations if each.improved]

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is to be evaluated and is not yet."""
        done = self.step == 0 or (bool(self.evaluations) and self.evaluations[-1].step == self.step)
        due = self.step % self._evaluate_every == 0 or self.step == self.total_steps
        return self.config.evaluate is not None and due and not done

    @property
    def stopped(self) -> bool:
        """Whether the last `patience` evaluations brought no improvement."""
        patience = self.config.patience
        if patience is None or any(each.improved for each in self.evaluations[-patience:]):
            return False
        return any(each.improved for each in self.evaluations)

    @property
    def finished(self) -> bool:
        """Whether the run has ended, including its last evaluation."""
        return (self.step >= self.total_steps or self.stopped) and not self.evaluation_due

    def tensors(self) -> list[Tensor]:
        """Return the weights, statistics and averages."""
        states = (self.distiller.state_dict(), self.ema.state_dict() if self.ema else {})
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def position(self) -> Position:
        """Return the position of this process."""
        return {"stream": self.stream.state_dict(), "rng": random_state(self.device)}

    def seek(self, position: Position) -> None:
        """Return to a position."""
        self.stream.load_state_dict(position["stream"])
        set_random_state(self.device, position["rng"])

    def update(self, last: StepValues) -> None:
        """Apply the accumulated gradients; `last` contains the values of the step."""
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.distiller.update_teachers(step=self.step)
        if self.ema is not None:
            self.ema.update(step=self.step)
        self.step += 1
        self.last = last

    def evaluate(self, evaluate: Evaluate, signals: DeferredSignals) -> Evaluation | None:
        """Evaluate the weights of this step; return `None` if a signal interrupted it."""
        metrics = None
        with self._evaluating():
            with self.processes.together():
                try:
                    with signals.interruptible():
                        result = evaluate(self.distiller)
                        if self.processes.rank == 0:
                            metrics = read_metrics(result, self.config.monitor, self.step)
                except Exception:
                    if not signals.pending:  # otherwise the signal may have ended a worker of a loader
                        raise
            metrics = self.processes.gather(metrics)[0]
            if metrics is None:
                return None
            improved = self._improves(metrics)
            if improved and self.config.checkpoint_dir is None:
                self._best_weights = {name: _on_cpu(x) for name, x in self.distiller.state_dict().items()}
        self.evaluations.append(Evaluation(self.step, self.last["epoch"], metrics, improved))
        return self.evaluations[-1]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Provide the averaged student in eval mode and without gradients; undo every change afterwards."""
        modes = [(module, module.training) for module in self.distiller.modules()]
        states, rng = self.stream.random_states(), random_state(self.device)
        buffers = [x for x in self.distiller.buffers() if x.is_floating_point()] if self.processes.count > 1 else []
        with nullcontext() if self.ema is None else self.ema.applied(), torch.no_grad():
            own = [x.clone() for x in buffers]
            self.processes.copy_first(buffers)
            self.distiller.eval()
            try:
                yield
            finally:
                for buffer, value in zip(buffers, own, strict=True):
                    buffer.copy_(value)
                for module, mode in modes:
                    module.training = mode
                self.stream.set_random_states(states)
                set_random_state(self.device, rng)

    def _improves(self, metrics: dict[str, float]) -> bool:
        """Compare the monitored metric with the best so far; a tie is no improvement."""
        monitor = self.config.monitor
        if monitor is None:
            return False
        best = [each.metrics[monitor] for each in self.evaluations if each.improved][-1:]
        return not best or (metrics[monitor] > best[0] if self.config.mode == "max" else metrics[monitor] < best[0])

    def best(self, store: CheckpointStore) -> BestWeights | None:
        """Return the best weights so far, from their checkpoint if there is one."""
        evaluation = next((each for each in reversed(self.evaluations) if each.improved), None)
        if evaluation is None or self.config.monitor is None:
            return None
        path, weights = None, self._best_weights
        if store.directory is not None:
            path = store.path_of(evaluation.step, self.improved)
            state = self._insert_shards(load_checkpoint(path), store, ("distiller", "ema"))
            student = next(name for name, module in self.distiller.named_modules() if module is self.distiller.student)
            average = {f"{student}.{name}": value for name, value in (state["ema"] or {}).items()}
            weights = {**state["distiller"], **average}
        return BestWeights(evaluation, evaluation.metrics[self.config.monitor], weights, path)

    def _tensor_state(self) -> TensorState:
        return {
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
        }

    def write_shards(self, store: CheckpointStore) -> Index | None:
        """Write the sharded tensors of this step, in all processes; return their index, `None` without any."""
        if store.directory is None or not self.sharded:
            return None
        tensors = separate(self._tensor_state())[1]
        weights = {str(keys[1]): local(x) for keys, x in tensors.items() if keys[0] == "distiller"}
        self._check_finite([name for names in self.processes.gather(not_finite(weights)) for name in names], store)
        return write_step(store.directory, self.step, tensors, self.processes)

    def _insert_shards(self, state: CheckpointState, store: CheckpointStore, names: Sequence[str]) -> CheckpointState:
        """Return a checkpoint with the shards of its entries `names`, read by all processes."""
        live = separate(self._tensor_state())[1]
        return insert_shards(store.directory, state, live, names, self.optimizer, self.processes)

    def save(self, store: CheckpointStore, seconds: float, positions: list[Position], shards: Index | None) -> None:
        """Write the checkpoint of this step unless a weight is NaN or infinite."""
        plain = cast(TensorState, separate(self._tensor_state())[0])
        self._check_finite(not_finite(plain["distiller"]), store)
        state: RunState = {
            **plain,
            "scaler": self.scaler.state_dict(),
            "stream": [each["stream"] for each in positions],
            "rng": [each["rng"] for each in positions],
            "last": self.last,
            "seconds": seconds,
            "evaluations": [cast(EvaluationRow, asdict(each)) for each in self.evaluations],
            "fingerprint": self.fingerprint,
            "shards": shards,
        }
        store.save(self.step, state, self.improved)

    def _check_finite(self, bad: list[str], store: CheckpointStore) -> None:
        """A finite loss can have a non-finite gradient, which the loss would only show after this checkpoint."""
        if bad:
            problem = f"weights must be finite at step {self.step}, got NaN or infinity in {', '.join(bad[:4])}"
            last = self.last
            raise diverged(problem, last["terms"], step=self.step, epoch=last["epoch"], newest=store.newest)

    def checkpoint(self, store: CheckpointStore, seconds: float, position: Position) -> None:
        """Write a checkpoint with the positions of all processes."""
        positions, shards = self.processes.gather(position), self.write_shards(store)
        with self.processes.together():
            if self.processes.rank == 0:
                self.save(store, seconds, positions, shards)

    def resume(self, store: CheckpointStore) -> int | None:
        """Load the newest checkpoint and return its step, or `None` without a checkpoint."""
        with self.processes.together():
            state = store.load(lambda state: check_shards(store.directory, state, self.processes))
        if state is None:
            return None
        saved, place = state["fingerprint"], store.directory
        total = saved.get("total_steps")
        expected = self.fingerprint if not isinstance(total, int) else self._describe(total)
        shards = state.get("shards")
        weights = state if shards is None else cast(CheckpointState, insert(state, meta_tensors(shards)))
        check_fingerprint(saved, expected, weights["distiller"], self.distiller.state_dict(), place)
        self.step, self.seconds, self.last = state["step"], state["seconds"], state["last"]
        check_argument(
            self.step <= self.total_steps,
            f"checkpoint_dir {place} must contain a run of at most {self.total_steps} steps, got one of {self.step}; "
            "raise epochs or max_steps, or use another directory",
        )
        names = ["evaluations", "distiller", "optimizer", "scaler", *(["ema"] if self.ema else [])]
        state = self._insert_shards(state, store, names)
        self._load(state, names, store)
        if self.improved:
            path = store.path_of(self.improved[-1], self.improved)
            if not path.exists():
                raise checkpoint_error(
                    f"checkpoint {path} must exist, since it contains the best weights of the run in {place}; restore "
                    "it or use another directory"
                )
        if not self.finished:
            self._load(state, ["stream", "rng"], store)
            self._warn_of_jump(total)
        return self.step

    def _load(self, state: CheckpointState, names: list[str], store: CheckpointStore) -> None:
        rank = self.processes.rank
        place = min(rank, len(state["stream"]) - 1)  # the run may have had fewer processes, all at the same position
        loads: dict[str, Callable[[], object]] = {
            "distiller": lambda: self.distiller.load_state_dict(state["distiller"]),
            "optimizer": lambda: self.optimizer.load_state_dict(state["optimizer"]),
            "scaler": lambda: self.scaler.load_state_dict(state["scaler"]),
            "ema": lambda: self.ema and self.ema.load_state_dict(state["ema"] or {}),
            "evaluations": lambda: self.evaluations.extend(Evaluation(**row) for row in state["evaluations"]),
            "stream": lambda: self.stream.load_state_dict(state["stream"][place]),
            "rng": lambda: set_random_state(self.device, state["rng"][place], rank - place),
        }
        for name in names:
            try:
                loads[name]()
            except Exception as error:  # such as an optimizer state of other groups
                raise checkpoint_error(f"{name} of checkpoint {store.newest} does not fit this run: {error}") from error

    def _warn_of_jump(self, total: object) -> None:
        """Warn if the learning rate is not continuous because the run has another length than before."""
        if not isinstance(total, int) or total == self.total_steps or self.step == 0:
            return
        before, now = (lr_factor(self.step - 1, steps, self.config) for steps in (total, self.total_steps))
        if before != now and self.processes.rank == 0:
            _log.warning(
                "train: the run goes on from step %d to %d instead of %d: its learning-rate schedule is that of %d steps, "
                "whose factor at this step is %.3g instead of %.3g",
                self.step, self.total_steps, total, self.total_steps, now, before,
            )  # fmt: skip


def _on_cpu(value: object) -> object:
    """Return a copy on the CPU."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


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


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of the default generators."""
    state = {"cpu": torch.default_generator.get_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(device: torch.device, state: dict[str, Tensor], offset: int = 0) -> None:
    """Set the state of the default generators; an `offset` other than 0 gives another one, which depends on `state`."""
    torch.default_generator.set_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if offset:
        torch.manual_seed(int(torch.randint(2**31, ())) + offset)
