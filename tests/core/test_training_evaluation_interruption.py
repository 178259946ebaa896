"""Interruptions and errors in an evaluation during training, and damage of the best checkpoint."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdlib import Distiller, HintLoss, Objective, Term
from kdlib.training import CheckpointError, TrainConfig, TrainEvent, read_log, train
from tests.core.training_toys import Toy, batches, measured, same, weights


@pytest.fixture
def terminated() -> Any:
    """Let SIGTERM raise KeyboardInterrupt."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, previous)


def run_config(tmp_path: Path, evaluate: Callable[[Distiller], Any], name: str = "run") -> TrainConfig:
    return TrainConfig(
        epochs=3, evaluate=evaluate, monitor="error", mode="min", ema_decay=0.7, log_every=1,
        checkpoint_dir=tmp_path / name, log_path=tmp_path / f"{name}.jsonl",
    )  # fmt: skip


@pytest.mark.parametrize("place", ["evaluation", "worker of the evaluation", "step before", "error", "metric"])
@pytest.mark.usefixtures("terminated")
def test_an_interrupted_evaluation_is_repeated(tmp_path: Path, place: str) -> None:
    """A signal ends it at once, and the checkpoint has the weights of the step: nothing is computed twice."""
    calls: list[str] = []

    def evaluate(distiller: Distiller) -> Any:
        calls.append("evaluate")
        if len(calls) == 2 and place != "step before":
            if place == "error":
                raise OSError("cannot read the validation set")
            if place == "metric":
                return {"error": float("nan")}
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:  # an evaluation that handles its errors
                pytest.fail("the signal must not be handled here")
            calls.append("goes on")
        return measured(distiller)

    class Loss(HintLoss):
        steps = 0

        def forward(self, *features: Any, **options: Any) -> Any:
            self.steps += 1
            if self.steps == 10 and place == "step before":
                signal.raise_signal(signal.SIGTERM)
            return super().forward(*features, **options)

    if place == "worker of the evaluation":
        # The worker ends by the same signal before this process receives it.
        def evaluate(distiller: Distiller) -> Any:  # type: ignore[no-redef]
            calls.append("evaluate")
            if len(calls) == 2:
                try:
                    signal.raise_signal(signal.SIGTERM)
                except BaseException:
                    raise RuntimeError("DataLoader worker exited unexpectedly") from None
            return measured(distiller)

    straight, broken, resumed, seen = Toy(), Toy(), Toy(), []
    whole = train(straight, batches(), run_config(tmp_path, measured, "whole"))
    broken.objective = Objective({"hint": Term(Loss(), student="out", teacher="out")})
    resumed.objective = Objective({"hint": Term(Loss(), student="out", teacher="out")})
    errors: dict[str, tuple[type[BaseException], str | None]] = {
        "error": (OSError, "cannot read the validation set"),
        "metric": (ValueError, "train: evaluate must return finite numbers, got error=nan after step 10; leave out a"),
    }
    kind, message = errors.get(place, (KeyboardInterrupt, None))
    with pytest.raises(kind, match=message):
        train(broken, batches(), run_config(tmp_path, evaluate), hooks=[seen.append])
    assert calls == ["evaluate"] * (1 if place == "step before" else 2)
    assert [event.step for event in seen] == list(range(1, 10))  # step 10 is reported with its evaluation
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best-000000005.pt", "step-000000010.pt"]
    seen.clear()
    result = train(resumed, batches(), run_config(tmp_path, measured), hooks=[seen.append])
    assert (result.resumed_from, [event.step for event in seen]) == (10, [10, 11, 12, 13, 14, 15])
    assert result.evaluations == whole.evaluations
    assert same(weights(resumed), weights(straight))
    assert same(result.ema, whole.ema)
    assert same(dict(result.best.weights), dict(whole.best.weights))
    rows, wanted = (
        [{**row, "seconds": 0, "speed": 0} for row in read_log(tmp_path / f"{name}.jsonl")] for name in ("run", "whole")
    )
    assert rows == wanted


def test_an_evaluation_starts_again_if_the_handler_of_the_caller_returns(tmp_path: Path) -> None:
    received: list[int] = []
    calls: list[int] = []

    def evaluate(distiller: Distiller) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return measured(distiller)

    previous = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    toy, straight = Toy(), Toy()
    try:
        result = train(toy, batches(), run_config(tmp_path, evaluate))
    finally:
        signal.signal(signal.SIGTERM, previous)
    whole = train(straight, batches(), run_config(tmp_path, measured, "whole"))
    assert (received, len(calls)) == ([signal.SIGTERM], 4)
    assert result.evaluations == whole.evaluations
    assert same(weights(toy), weights(straight))


def test_damage_of_the_best_checkpoint(tmp_path: Path) -> None:
    """The run before a damaged one still has its own best weights; without its best weights no run resumes."""
    values = [1, 3, 2, 2, 4, 0, 0, 0, 0, 0]
    config = TrainConfig(
        epochs=2, evaluate=lambda distiller: values[int(distiller.objective.step)], evaluate_every=1, monitor="score",
        mode="max", checkpoint_dir=tmp_path, checkpoint_every_steps=1, keep=2,
    )  # fmt: skip

    class Stopped(Exception):
        pass

    def stop(event: TrainEvent) -> None:
        if event.step == 5:
            raise Stopped

    def listed() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    with pytest.raises(Stopped):
        train(Toy(), batches(), config, hooks=[stop])
    assert listed() == ["best-000000002.pt", "best-000000005.pt", "step-000000004.pt"]
    (tmp_path / "best-000000005.pt").write_bytes(b"damaged")
    values[4] = 0  # the repeated evaluation has another result
    result = train(Toy(), batches(), config)
    assert (result.resumed_from, result.best.evaluation.step) == (4, 2)
    assert listed() == ["best-000000002.pt", "step-000000009.pt", "step-000000010.pt"]
    (tmp_path / "best-000000002.pt").unlink()
    with pytest.raises(CheckpointError, match=r"best-000000002.pt must exist, since it contains the best weights"):
        train(Toy(), batches(), config)


def test_schedules_have_the_step_of_the_checkpoint_in_a_repeated_evaluation(tmp_path: Path) -> None:
    """The validation loss of an objective whose weight depends on the step is that of a run without interruption."""
    broken = ["the validation set"]

    def evaluate(distiller: Distiller) -> float:
        if broken:
            raise OSError("cannot read the validation set")
        return distiller(*batches(1, seed=7)[0]).total.item()

    def build() -> Toy:
        toy = Toy()
        toy.objective = Objective(
            {"hint": Term(HintLoss(), student="out", teacher="out", weight=lambda step: 1 + step)}
        )
        return toy

    config = TrainConfig(epochs=2, evaluate=evaluate, monitor="loss", checkpoint_dir=tmp_path)
    with pytest.raises(OSError, match="cannot read the validation set"):
        train(build(), batches(), config)
    broken.clear()
    result = train(build(), batches(), config)
    assert result.resumed_from == 5
    assert (
        result.evaluations
        == train(build(), batches(), TrainConfig(epochs=2, evaluate=evaluate, monitor="loss")).evaluations
    )
