"""Evaluation during training: metrics, the best weights and early stopping."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, Term
from kdlib.training import Evaluation, TrainConfig, TrainEvent, load_checkpoint, read_log, train
from tests.core.training_toys import Toy, batches, measured, same, weights

STEPS = 10  # two epochs of five batches


class Scripted:
    """An evaluation that returns given values in order, and keeps the weights that it saw."""

    def __init__(self, *values: float, name: str = "accuracy") -> None:
        self.values, self.name = values, name
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, distiller: Distiller) -> dict[str, float]:
        self.seen.append(weights(distiller))
        return {self.name: self.values[len(self.seen) - 1], "other": 0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluate": 3}, "TrainConfig: evaluate must be callable, got int"),
        (
            {"evaluate_every": 2},
            "TrainConfig: evaluate must be given with evaluate_every, got evaluate_every=2 without",
        ),
        ({"evaluate": measured, "evaluate_every": 0}, "evaluate_every must be a whole number and >= 1, got 0"),
        ({"monitor": "loss"}, "TrainConfig: evaluate must be given with monitor, got monitor='loss' without it"),
        ({"evaluate": measured, "monitor": 3}, "monitor must be the name of a metric or None, got int"),
        ({"evaluate": measured, "monitor": "loss", "mode": "low"}, "mode must be one of 'max', 'min', got 'low'"),
        ({"evaluate": measured, "mode": "max"}, "TrainConfig: monitor must be given with mode"),
        ({"evaluate": measured, "patience": 2}, "TrainConfig: monitor must be given with patience"),
    ],
)
def test_config_refuses_incomplete_evaluations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(epochs=1, **fields)


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("accuracy", "max"), ("val_loss", "min"), ("Top-1 Error", "min"), ("perplexity", "min"), ("tar@far=1e-3", "max")],
)
def test_the_mode_follows_from_the_name_unless_it_is_given(monitor: str, mode: str) -> None:
    config = TrainConfig(epochs=1, evaluate=measured, monitor=monitor)
    assert config.mode == mode
    assert f"mode={mode!r}" in repr(config)
    for given in ("max", "min"):
        assert TrainConfig(epochs=1, evaluate=measured, monitor=monitor, mode=given).mode == given


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"epochs": 2}, [5, 10]),
        ({"epochs": 2, "accumulate": 2}, [3, 6]),
        ({"max_steps": 7}, [5, 7]),
        ({"epochs": 2, "evaluate_every": 4}, [4, 8, 10]),
        ({"epochs": 2, "evaluate_every": 20}, [10]),
    ],
)
def test_evaluations_are_in_result_events_and_log(tmp_path: Path, fields: dict[str, Any], steps: list[int]) -> None:
    events: list[TrainEvent] = []
    script = Scripted(0.1, 0.3, 0.2)
    config = TrainConfig(
        **fields, evaluate=script, monitor="accuracy", mode="max", log_path=tmp_path / "log.jsonl", log_every=100
    )
    result = train(Toy(), batches(), config, hooks=[events.append])
    assert [each.step for each in result.evaluations] == steps
    assert [event.step for event in events] == list(range(1, result.step + 1))
    assert [event.evaluation for event in events if event.evaluation] == list(result.evaluations)
    assert result.evaluations[0] == Evaluation(
        steps[0], events[steps[0] - 1].epoch, {"accuracy": 0.1, "other": 0.5}, True
    )
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == sorted({1, *steps})
    assert [(row["metrics"], row["improved"]) for row in rows[1:]] == [
        (each.metrics, each.improved) for each in result.evaluations
    ]
    assert "metrics" not in rows[0]
    assert not result.stopped_early


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), torch.tensor(0.25), 1])
def test_a_number_is_named_like_the_monitored_metric(value: Any) -> None:
    plain = train(Toy(), batches(), TrainConfig(epochs=1, evaluate=lambda _: value))
    assert plain.evaluations == (Evaluation(5, 0, {"metric": float(value)}, False),)
    assert plain.best is None
    named = train(Toy(), batches(), TrainConfig(epochs=1, evaluate=lambda _: value, monitor="loss", mode="min"))
    assert named.evaluations == (Evaluation(5, 0, {"loss": float(value)}, True),)
    assert type(named.evaluations[0].metrics["loss"]) is float


def test_an_evaluation_changes_nothing() -> None:
    """It runs in eval mode without gradients; modes, weights and random states are as without it."""
    data = TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(1)))

    def loader() -> Any:
        own = torch.Generator().manual_seed(3)
        return DataLoader(
            data, batch_size=8, shuffle=True, generator=own, collate_fn=lambda x: (torch.stack([y for (y,) in x]), {})
        )

    modes: list[bool] = []

    def evaluate(distiller: Distiller) -> float:
        assert not any(module.training for module in distiller.modules())
        assert not torch.is_grad_enabled()
        torch.rand(5)
        return sum(distiller(*batch).total.item() for batch in watched)

    class Watching(Toy):
        def forward(self, *batch: Any, **options: Any) -> Any:
            modes.append(self.layers[3].training and self.layers[1].training)
            return super().forward(*batch, **options)

    quiet, toy, watched = Toy(), Watching(), loader()
    fields: dict[str, Any] = {"epochs": 2, "ema_decay": 0.8}
    first = train(quiet, loader(), TrainConfig(**fields))
    second = train(toy, watched, TrainConfig(**fields, evaluate=evaluate, evaluate_every=3))
    assert same(weights(quiet), weights(toy))
    assert same(first.ema, second.ema)
    assert modes == ([True] * 3 + [False] * 5) * 3 + [True] + [False] * 5


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [("max", (1, 3, 2, 3, 0), 1), ("min", (1, 3, 0.5, 0.5, 0.6), 2), ("max", (-1, -2, -3, -4, -5), 0)],
)
def test_the_best_weights_are_kept(
    tmp_path: Path, stored: bool, mode: str, values: tuple[float, ...], best: int
) -> None:
    script, toy = Scripted(*values), Toy()
    config = TrainConfig(
        max_steps=STEPS, evaluate=script, evaluate_every=2, monitor="accuracy", mode=mode, keep=1,
        checkpoint_every_steps=1, checkpoint_dir=tmp_path if stored else None,
    )  # fmt: skip
    result = train(toy, batches(), config)
    step = 2 * best + 2
    assert (result.best.value, result.best.evaluation) == (values[best], result.evaluations[best])
    assert result.best.evaluation.step == step
    assert same(dict(result.best.weights), script.seen[best])
    assert same(weights(toy), script.seen[-1])  # the distiller contains the final weights
    files = [path.name for path in sorted(tmp_path.iterdir())]
    assert files == ([f"best-{step:09d}.pt", f"step-{STEPS:09d}.pt"] if stored else [])
    if stored:
        assert result.best.checkpoint == tmp_path / files[0]
        assert same(load_checkpoint(result.best.checkpoint)["distiller"], script.seen[best])
    toy.load_state_dict(result.best.weights)
    assert same(weights(toy), script.seen[best])
    assert "tensor" not in repr(result.best)


@pytest.mark.parametrize("stored", [True, False])
def test_the_averaged_weights_are_evaluated(tmp_path: Path, stored: bool) -> None:
    """Also with tied weights, which appear twice in the state dict."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    def build() -> Distiller:
        torch.manual_seed(3)
        terms = {"hint": Term(HintLoss(), student="out", target="wanted")}
        return Distiller(StudentAdapter(Tied(), {"out": OUTPUT}), {}, Objective(terms))

    data = [(x, {"wanted": x.flip(1)}) for x, _ in batches()]
    script, evaluated, quiet = Scripted(1, 2, 1), build(), build()
    fields: dict[str, Any] = {"max_steps": 9, "ema_decay": 0.9, "lr": 0.05}
    half = train(build(), data, TrainConfig(**fields | {"max_steps": 6}, schedule=lambda step: 1.0))
    first = train(quiet, data, TrainConfig(**fields, schedule=lambda step: 1.0))
    config = TrainConfig(
        **fields, schedule=lambda step: 1.0, evaluate=script, evaluate_every=3, monitor="accuracy", mode="max",
        checkpoint_dir=tmp_path if stored else None,
    )  # fmt: skip
    result = train(evaluated, data, config)
    assert same(weights(evaluated), weights(quiet))
    assert same(result.ema, first.ema)
    student = {
        name.removeprefix("student."): value for name, value in result.best.weights.items() if "student." in name
    }
    assert same(student, half.ema)
    assert same(dict(result.best.weights), script.seen[1])


@pytest.mark.parametrize("seed", range(6))
def test_best_and_early_stop_agree_with_a_search_in_the_list(tmp_path: Path, seed: int) -> None:
    """Also if the run is interrupted after every second step, at which no checkpoint may be due."""
    draw = torch.Generator().manual_seed(seed)
    values = [int(x) for x in torch.randint(0, 6, (15,), generator=draw)]
    patience, mode = 1 + seed % 3, ("max", "min")[seed % 2]
    pick = max if mode == "max" else min
    stop = next((n for n in range(1, 16) if n - 1 - values[:n].index(pick(values[:n])) >= patience), 15)

    def evaluate(distiller: Distiller) -> float:
        return values[int(distiller.objective.step)]

    config = TrainConfig(
        epochs=3, evaluate=evaluate, evaluate_every=1, monitor="score", mode=mode, patience=patience, keep=1,
        checkpoint_dir=tmp_path, checkpoint_every_steps=3,
    )  # fmt: skip

    class Stopped(Exception):
        pass

    calls: list[int] = []

    def fail(event: TrainEvent) -> None:
        calls.append(event.step)
        if len(calls) % 3 == 0:
            raise Stopped

    for _ in range(40):
        try:
            result = train(Toy(), batches(), config, hooks=[fail])
            break
        except Stopped:
            pass
    assert (result.step, len(result.evaluations), result.stopped_early) == (stop, stop, stop < 15)
    best = values[:stop].index(pick(values[:stop]))
    assert (result.best.evaluation.step, result.best.value) == (best + 1, values[best])
    names = {f"best-{best + 1:09d}.pt"} | ({f"step-{stop:09d}.pt"} if best + 1 < stop else set())
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_run_that_stopped_early_returns_at_once_and_goes_on_with_more_patience(tmp_path: Path) -> None:
    values = [5, 4, 3, 6, 2, 2, 2, 2, 2, 2]

    def config(patience: int | None, folder: str) -> TrainConfig:
        return TrainConfig(
            epochs=2, evaluate=lambda distiller: values[int(distiller.objective.step)], evaluate_every=1,
            monitor="score", mode="max", patience=patience, checkpoint_dir=tmp_path / folder,
        )  # fmt: skip

    stopped, again, more, straight = Toy(), Toy(), Toy(), Toy()
    result = train(stopped, batches(), config(2, "run"))
    assert (result.step, result.stopped_early, result.best.evaluation.step) == (3, True, 1)
    second = train(again, batches(), config(2, "run"), hooks=[lambda event: pytest.fail("a step was taken")])
    assert (second.resumed_from, second.stopped_early, second.evaluations) == (3, True, result.evaluations)
    assert same(dict(second.best.weights), dict(result.best.weights))
    assert same(weights(stopped), weights(again))
    rest = train(more, batches(), config(None, "run"))
    whole = train(straight, batches(), config(None, "whole"))
    assert (rest.resumed_from, rest.step, rest.stopped_early) == (3, 10, False)
    assert rest.evaluations == whole.evaluations
    assert rest.best.evaluation.step == 4
    assert same(weights(more), weights(straight))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "train: evaluate must return a number or a mapping of names to numbers, got a NoneType"),
        ([0.5], "evaluate must return a number or a mapping of names to numbers, got a list"),
        ({"loss": "low"}, "evaluate must return a number or a mapping of names to numbers, got 'loss': str"),
        ({"loss": True}, "evaluate must return a number or a mapping of names to numbers, got 'loss': bool"),
        (torch.zeros(2), "evaluate must return a number or a mapping of names to numbers, got a Tensor"),
        ({"accuracy": 1.0}, "evaluate must return the monitored metric 'acc'; the nearest are 'accuracy'"),
        ({}, "evaluate must return the monitored metric 'acc'; there are none"),
        (float("inf"), "evaluate must return finite numbers, got acc=inf after step 5"),
        ({"acc": 1, "extra": torch.tensor(float("nan"))}, "finite numbers, got extra=nan after step 5; leave out"),
    ],
)
def test_results_that_are_no_metrics(result: Any, message: str) -> None:
    config = TrainConfig(epochs=1, evaluate=lambda _: result, monitor="acc", mode="max")
    with pytest.raises((TypeError, ValueError), match=message):
        train(Toy(), batches(), config)


def test_a_loader_without_a_length_needs_evaluate_every() -> None:
    with pytest.raises(ValueError, match="evaluate_every must be given when loader has no length, got None"):
        train(Toy(), (x for x in batches()), TrainConfig(max_steps=4, evaluate=measured))
    config = TrainConfig(max_steps=4, evaluate=measured, evaluate_every=3)
    assert [each.step for each in train(Toy(), (x for x in batches()), config).evaluations] == [3, 4]


def test_a_finished_run_is_evaluated_and_monitored_later(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    fields: dict[str, Any] = {"schedule": "constant", "checkpoint_dir": tmp_path / "run", "log_path": log}
    train(Toy(), batches(), TrainConfig(epochs=1, **fields))
    plain = train(Toy(), batches(), TrainConfig(epochs=1, evaluate=measured, **fields))
    assert [(each.step, each.improved) for each in plain.evaluations] == [(5, False)]
    assert [(row["step"], row.get("metrics")) for row in read_log(log)] == [
        (1, None),
        (5, plain.evaluations[0].metrics),
    ]
    config = TrainConfig(epochs=3, evaluate=measured, monitor="error", mode="min", patience=1, **fields)
    assert [(each.step, each.improved) for each in train(Toy(), batches(), config).evaluations][:2] == [
        (5, False),
        (10, True),
    ]
    with pytest.raises(
        ValueError, match=r"got different mode \(checkpoint 'min', now None\), monitor \(checkpoint 'err"
    ):
        train(Toy(), batches(), TrainConfig(epochs=4, **fields))
