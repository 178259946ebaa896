"""The training loop: configuration, schedules, precision, averages, events, divergence and the log."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, Term
from kdlib.training import TrainConfig, TrainEvent, TrainingDiverged, load_checkpoint, read_log, train
from kdlib.training.ema import EMA
from kdlib.training.schedules import lr_factor
from tests.core.training_toys import Toy, batches, interrupt, same, weights


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "epochs or max_steps must be given"),
        ({"epochs": 0}, "epochs must be a whole number and >= 1, got 0"),
        ({"epochs": 1, "lr": 0}, "lr must be a finite number and > 0"),
        ({"epochs": 1, "lr": float("nan")}, "lr must be a finite number"),
        ({"epochs": 1, "optimizer": "lamb"}, "optimizer must be one of 'sgd', 'adamw', got 'lamb'"),
        ({"epochs": 1, "schedule": "linear"}, "schedule must be one of"),
        ({"epochs": 1, "amp": "int8"}, "amp must be one of"),
        ({"epochs": 1, "ema_decay": 1.5}, "ema_decay must be"),
        ({"epochs": 1, "keep": 0}, "keep must be"),
        ({"epochs": 1, "accumulate": 1.5}, "accumulate must be a whole number"),
        ({"epochs": 1, "clip_norm": -1}, "clip_norm must be"),
        ({"epochs": 1, "channels_last": 1}, "channels_last must be True or False"),
        ({"epochs": 1, "compile": "yes"}, "compile must be True or False"),
        ({"epochs": 1, "checkpoint_dir": 3}, "checkpoint_dir must be a path"),
        ({"epochs": 1, "momentum": 1.0}, "momentum must be a finite number and >= 0 and < 1, got 1.0"),
        ({"epochs": 1, "device": "cudda"}, "device must be a torch.device, its name or None, got 'cudda'"),
        ({"epochs": 1, "device": 3.5}, "device must be a torch.device, its name or None, got 3.5"),
    ],
)
def test_config_refuses_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig(**fields)


def test_config_repr_rebuilds_it() -> None:
    config = TrainConfig(max_steps=3, lr=0.5, amp="bfloat16", clip_norm=1.0)
    assert eval(repr(config)) == config


def test_schedules() -> None:
    def factors(**fields: Any) -> list[float]:
        config = TrainConfig(max_steps=4, **fields)
        return [lr_factor(step, 4, config) for step in range(4)]

    assert factors(schedule="constant") == [1, 1, 1, 1]
    assert factors(schedule="poly") == pytest.approx([1, 0.75**2, 0.5**2, 0.25**2])
    assert factors(schedule="cosine") == pytest.approx([1, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2])
    assert factors(schedule="poly", warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.25])
    assert factors(schedule=lambda step: step / 4, warmup_steps=2) == pytest.approx([0, 0.25, 0.5, 0.75])


def test_equals_a_handwritten_loop() -> None:
    data, ours, theirs = batches(), Toy(dropout=0.0), Toy(dropout=0.0)
    config = TrainConfig(epochs=2, lr=0.1, momentum=0.9, weight_decay=0.01, schedule="constant", clip_norm=0.5)
    result = train(ours, data, config)

    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for epoch in range(2):
        for index, (inputs, targets) in enumerate(data):
            optimizer.zero_grad()
            loss = theirs(inputs, targets, step=len(data) * epoch + index).total
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.student.parameters(), 0.5)
            optimizer.step()
    assert same(weights(ours), weights(theirs))
    assert (result.step, result.epoch, result.ema, result.resumed_from) == (10, 1, None, None)
    assert result.total == pytest.approx(loss.item())
    assert result.terms == {"hint": result.total}
    assert int(ours.objective.step) == 9
    assert not ours.training


def test_accumulated_step_is_the_mean_of_its_batches() -> None:
    """Without BatchNorm two accumulated halves equal one whole batch; the last step of an epoch has the odd batch."""
    halves, whole = Toy(dropout=0.0), Toy(dropout=0.0)
    for toy in (halves, whole):
        toy.layers[1] = nn.Identity()
    data, steps = batches(4), []
    joined = [(torch.cat([data[i][0], data[i + 1][0]]), {}) for i in (0, 2)]
    train(halves, data, TrainConfig(epochs=3, accumulate=2))
    train(whole, joined, TrainConfig(epochs=3))
    for name, value in weights(halves).items():
        torch.testing.assert_close(value, weights(whole)[name])
    train(Toy(), batches(5), TrainConfig(epochs=2, accumulate=2), hooks=[lambda event: steps.append(event.step)])
    assert steps == [1, 2, 3, 4, 5, 6]


def test_compiled_networks_train_alike_and_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student and teachers are compiled for the run; a network that the caller has compiled keeps its own."""
    compiled: list[nn.Module] = []

    def record(module: nn.Module) -> None:
        compiled.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", record)
    eager, fast, own = Toy(dropout=0.0), Toy(dropout=0.0), Toy(dropout=0.0)
    record(own.student)
    kept = own.student._compiled_call_impl
    compiled.clear()
    train(eager, batches(), TrainConfig(epochs=1, lr=0.1))
    train(fast, batches(), TrainConfig(epochs=1, lr=0.1, compile=True))
    assert compiled == [fast.student, *fast.teachers.values()]
    assert all(each._compiled_call_impl is None for each in compiled)
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(fast)[name], value)
    train(own, batches(), TrainConfig(epochs=1, lr=0.1, compile=True))
    assert own.student not in compiled[2:]
    assert own.student._compiled_call_impl is kept


def test_optimizers_and_factory() -> None:
    factory, named, adamw = Toy(), Toy(), Toy()
    before = weights(adamw)
    train(factory, batches(), TrainConfig(epochs=1, optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9)))
    train(named, batches(), TrainConfig(epochs=1, optimizer="sgd"))
    train(adamw, batches(), TrainConfig(epochs=1, optimizer="adamw", lr=0.01))
    assert same(weights(factory), weights(named))
    assert not same(weights(adamw), before)
    with pytest.raises(TypeError, match=r"the result of optimizer must be a torch.optim.Optimizer, got list"):
        train(Toy(), batches(), TrainConfig(epochs=1, optimizer=lambda groups: groups))  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_amp_trains_and_stays_finite(amp: str) -> None:
    toy, totals = Toy(dropout=0.0), []
    train(toy, batches(), TrainConfig(epochs=6, lr=0.05, amp=amp), hooks=[lambda event: totals.append(event.total)])
    assert totals[-1] < totals[0]
    assert all(value.dtype == torch.float32 for value in toy.parameters())


def test_channels_last_reaches_weights_and_images() -> None:
    layouts: list[bool] = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.register_forward_pre_hook(
        lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    terms = {"hint": Term(HintLoss(), student="out", target="wanted")}
    toy = Distiller(StudentAdapter(net, {"out": OUTPUT}), {}, Objective(terms))
    data = [(torch.ones(2, 3, 6, 6), {"wanted": torch.zeros(2, 4)})]
    train(toy, data, TrainConfig(epochs=2, channels_last=True))
    assert layouts == [True, True]
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_ema_follows_its_formula() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    ema, expected = EMA(layer, decay=0.2), 1.0
    for step in range(5):
        layer.weight.data.fill_(float(step))
        ema.update(step=step)
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.state_dict()["weight"].item() == pytest.approx(expected)


def test_ema_of_the_student_is_returned() -> None:
    toy = Toy()
    result = train(toy, batches(), TrainConfig(epochs=1, ema_decay=0.9))
    assert result.ema is not None
    assert not torch.equal(result.ema["model.0.weight"], toy.layers[0].weight)
    assert torch.equal(result.ema["model.1.num_batches_tracked"], toy.layers[1].num_batches_tracked)
    toy.student.load_state_dict(result.ema)


def test_events_and_log(tmp_path: Path) -> None:
    events: list[TrainEvent] = []
    config = TrainConfig(
        epochs=2, lr=0.1, schedule="constant", warmup_steps=2, log_path=tmp_path / "a" / "log.jsonl", log_every=3
    )
    train(Toy(), batches(), config, hooks=[events.append])
    assert [event.step for event in events] == list(range(1, 11))
    assert [event.epoch for event in events] == [0] * 5 + [1] * 5
    assert all(event.total_steps == 10 and event.images_per_second > 0 for event in events)
    assert [event.lr for event in events[:3]] == pytest.approx([0.05, 0.1, 0.1])
    assert events[0].weights == {"hint": (1.0,)}
    rows = read_log(tmp_path / "a" / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 6, 9, 10]
    assert set(rows[0]) == {"step", "epoch", "lr", "total", "terms", "weights", "seconds", "speed"}
    assert rows[0]["total"] == events[0].total
    assert rows[0]["terms"] == {"hint": events[0].total}


def test_neither_hooks_nor_the_callers_randomness_change_the_weights() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    quiet, evaluated, other = Toy(), Toy(), Toy()
    train(quiet, batches(), TrainConfig(epochs=1, seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    train(evaluated, batches(), TrainConfig(epochs=1, seed=3), hooks=[lambda event: evaluated.eval()])
    train(other, batches(), TrainConfig(epochs=1, seed=4))
    assert same(weights(quiet), weights(evaluated))
    assert not same(weights(quiet), weights(other))


def test_nan_loss_names_the_batch_and_keeps_the_weights(tmp_path: Path) -> None:
    data = batches()
    data[3][0][2] = float("nan")
    toy, seen = Toy(dropout=0.0), []
    config = TrainConfig(epochs=2, checkpoint_dir=tmp_path, checkpoint_every_steps=2)
    with pytest.raises(TrainingDiverged, match="got nan at step 4, epoch 0, batch 3 of the epoch") as caught:
        train(toy, data, config, hooks=[lambda event: seen.append(toy.layers[0].weight.clone())])
    assert "samples 24, 25, 26" in str(caught.value)
    assert "terms hint=nan" in str(caught.value)
    assert "step-000000002.pt" in str(caught.value)
    assert (caught.value.step, caught.value.epoch) == (4, 0)
    assert caught.value.samples == tuple(range(24, 32))
    assert torch.equal(toy.layers[0].weight, seen[-1])
    assert load_checkpoint(tmp_path / "step-000000002.pt")["step"] == 2


def test_an_error_of_the_forward_pass_names_the_batch_and_the_checkpoint(tmp_path: Path) -> None:
    toy = Toy()
    toy.layers[0].register_forward_pre_hook(lambda module, inputs: check(inputs[0]))

    def check(inputs: Tensor) -> None:
        if not inputs.isfinite().all():
            raise ArithmeticError("the input is NaN")

    data = batches()
    data[3][0][2] = float("nan")
    config = TrainConfig(epochs=2, checkpoint_dir=tmp_path, checkpoint_every_steps=2)
    with pytest.raises(ArithmeticError, match="the input is NaN") as caught:
        train(toy, data, config)
    (note,) = caught.value.__notes__
    assert note.startswith("in batch 3 of epoch 0 (samples 24, 25, 26")
    assert note.endswith("; the last good checkpoint is " + str(tmp_path / "step-000000002.pt"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_a_device_that_this_machine_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"device must be available, got cuda, but torch .* finds no accelerator"):
        train(Toy(), batches(), TrainConfig(epochs=1, device="cuda"))


def test_nan_gradient_of_a_finite_loss_reaches_no_checkpoint(tmp_path: Path) -> None:
    def root(weight: Tensor) -> Tensor:
        return weight + (weight * 0).pow(2).sum().sqrt()  # adds 0, with gradient 0 / 0

    class Root(HintLoss):
        calls = 0

        def forward(self, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
            self.calls += 1
            return super().forward(root(student) if self.calls == 4 else student, teacher, **options)

    toy = Toy()
    toy.objective = Objective({"hint": Term(Root(), student="out", teacher="out")})
    config = TrainConfig(epochs=1, checkpoint_dir=tmp_path, checkpoint_every_steps=1)
    with pytest.raises(TrainingDiverged, match="weights must be finite at step 4, got NaN or infinity in student"):
        train(toy, batches(), config)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000002.pt", "step-000000003.pt"]


def test_log_drops_steps_past_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    config = TrainConfig(
        epochs=1, checkpoint_dir=tmp_path / "run", checkpoint_every_steps=2, log_path=path, log_every=1
    )
    interrupt(config, 3)
    path.write_text(path.read_text() + '{"step": 4, "to')
    assert [row["step"] for row in read_log(path)] == [1, 2, 3]
    train(Toy(), batches(), config)
    assert [row["step"] for row in read_log(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", ["a letter", "[1, 2]\n", '{"name": 1}\n{"name": 2}\n'])
def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"must be a training log, got something else in line 1"):
        train(Toy(), batches(), TrainConfig(epochs=1, log_path=path))
    assert path.read_text() == content
