"""The training loop: schedules, precision, averages, checkpoints, logs, failures, resuming bit for bit."""

import os
import resource
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib.training import CheckpointError, TrainConfig, TrainEvent, TrainingDiverged, load_checkpoint, read_log, train
from kdlib.training.ema import EMA
from kdlib.training.schedules import lr_factor


class Toy(Distiller):
    """A small student with dropout and BatchNorm, and a linear teacher."""

    def __init__(self, seed: int = 0, *, dropout: float = 0.2) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Dropout(dropout), nn.Linear(8, 3)
            student = StudentAdapter(nn.Sequential(*layers), {"out": OUTPUT})
            teacher = TeacherAdapter(nn.Linear(6, 3), {"out": OUTPUT})
        super().__init__(student, {"big": teacher}, Objective({"hint": Term(HintLoss(), student="out", teacher="out")}))

    @property
    def layers(self) -> nn.Sequential:
        return self.student.model


def batches(count: int = 5, size: int = 8, seed: int = 1) -> list[tuple[Tensor, dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.arange(count * size).view(count, size)
    return [(torch.randn(size, 6, generator=draw), {"sample": ids[i]}) for i in range(count)]


def weights(distiller: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in distiller.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    pass


def stop_after(step: int) -> Callable[[TrainEvent], None]:
    """A hook that raises after a step, like an interruption at that step."""

    def hook(event: TrainEvent) -> None:
        if event.step == step:
            raise Stopped

    return hook


def interrupt(config: TrainConfig, step: int, loader: Any = None) -> None:
    """Train until a step."""
    with pytest.raises(Stopped):
        train(Toy(), batches() if loader is None else loader, config, hooks=[stop_after(step)])


@pytest.fixture(scope="module")
def straight() -> dict[str, Tensor]:
    """The weights of two uninterrupted epochs over `batches()`."""
    toy = Toy()
    train(toy, batches(), TrainConfig(epochs=2))
    return weights(toy)


# ------------------------------------------------------------------------------------------------- configuration


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
    assert factors(schedule=lambda step, total: step / total, warmup_steps=2) == pytest.approx([0, 0.25, 0.5, 0.75])


# --------------------------------------------------------------------------------------------------- the step


def test_equals_a_handwritten_loop() -> None:
    data, ours, theirs = batches(), Toy(dropout=0.0), Toy(dropout=0.0)
    config = TrainConfig(epochs=2, lr=0.1, momentum=0.9, weight_decay=0.01, schedule="constant", clip_norm=0.5)
    result = train(ours, data, config)

    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(2):
        for inputs, targets in data:
            optimizer.zero_grad()
            loss = theirs(inputs, targets).total
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
    assert set(rows[0]) == {"step", "epoch", "lr", "total", "terms", "weights", "seconds"}
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


# ----------------------------------------------------------------------------------------------------- loaders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distiller": nn.Linear(6, 3)}, "train: distiller must be a Distiller, got Linear"),
        ({"config": {"epochs": 1}}, "train: config must be a TrainConfig, got dict"),
        ({"loader": None}, "train: loader must be an iterable of batches, got NoneType"),
        ({"hooks": print}, "train: hooks must be a sequence of callables, got builtin_function_or_method"),
        ({"hooks": [3]}, r"train: hooks\[0\] must be callable, got int"),
        # A tensor of two images would unpack to inputs and targets.
        ({"loader": [torch.zeros(2, 6)]}, r"train: loader must yield \(inputs, targets\), got a Tensor"),
        ({"loader": [(torch.zeros(2, 6), {}, {})]}, r"train: loader must yield \(inputs, targets\), got 3 items"),
        # As a loader over a TensorDataset yields.
        (
            {"loader": [[torch.zeros(2, 6), torch.zeros(2)]]},
            "train: loader: targets must be a mapping of names to tensors or None, got Tensor",
        ),
    ],
)
def test_train_names_the_argument_that_is_wrong(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"distiller": Toy(), "loader": batches(1), "config": TrainConfig(epochs=1), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        train(given.pop("distiller"), given.pop("loader"), given.pop("config"), **given)


def test_lengths() -> None:
    assert train(Toy(), batches(), TrainConfig(epochs=5, max_steps=7)).step == 7
    assert train(Toy(), batches(), TrainConfig(max_steps=12)).epoch == 2

    class Unsized:
        def __iter__(self) -> Any:
            return iter(batches(3))

    assert train(Toy(), Unsized(), TrainConfig(max_steps=7)).epoch == 2

    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield from batches(3)

    assert train(Toy(), DataLoader(Endless(), batch_size=None), TrainConfig(max_steps=4)).step == 4
    with pytest.raises(ValueError, match="loader must have a length when max_steps is not given"):
        train(Toy(), Unsized(), TrainConfig(epochs=1))
    with pytest.raises(ValueError, match="loader must yield at least one batch"):
        train(Toy(), [], TrainConfig(epochs=1))


@pytest.mark.parametrize("place", ["loader", "sampler", "batch_sampler", "sampler of the batch_sampler"])
def test_the_epoch_is_set_on_loader_and_samplers(place: str) -> None:
    class Listening(list):  # type: ignore[type-arg]
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    class Order(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    class Batches(torch.utils.data.BatchSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    images, sampler = [image for batch, _ in batches(2) for image in batch], Order(range(16))
    options: dict[str, Any] = {
        "sampler": {"sampler": sampler, "batch_size": 8},
        "batch_sampler": {"batch_sampler": Batches(range(16), 8, False)},
        "sampler of the batch_sampler": {"batch_sampler": torch.utils.data.BatchSampler(sampler, 8, False)},
    }
    collate = {"collate_fn": lambda items: (torch.stack(items), {})}
    loader = Listening(batches(2)) if place == "loader" else DataLoader(images, **options[place], **collate)
    train(Toy(), loader, TrainConfig(epochs=3))
    assert sorted(set(epochs)) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- resume


def shuffled(kind: str) -> Any:
    """A loader whose order depends on torch's randomness, or on a generator of its own."""
    draw = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(36, 6, generator=draw))
    own = torch.Generator().manual_seed(9) if kind == "own" else None
    return DataLoader(data, batch_size=8, shuffle=True, generator=own, collate_fn=_collate)


def _collate(items: Any) -> Any:
    return torch.stack([item[0] for item in items]), {}


@pytest.mark.parametrize("kind", ["global", "own"])
@pytest.mark.parametrize("stop", [2, 3, 5, 8])
def test_resume_is_bit_exact(tmp_path: Path, kind: str, stop: int) -> None:
    """Mid-epoch and at an epoch's end, with dropout, BatchNorm, momentum, an average, accumulation and a shuffle."""
    fields: dict[str, Any] = {
        "epochs": 3, "accumulate": 2, "ema_decay": 0.9, "warmup_steps": 2, "checkpoint_every_steps": 1, "log_every": 1
    }  # fmt: skip
    through, resumed = Toy(), Toy()
    whole = train(through, shuffled(kind), TrainConfig(**fields, log_path=tmp_path / "whole.jsonl"))
    config = TrainConfig(**fields, checkpoint_dir=tmp_path / "run", log_path=tmp_path / "log.jsonl")
    interrupt(config, stop, shuffled(kind))
    for value in resumed.parameters():
        value.data.fill_(3.0)  # the initial weights must not matter
    torch.manual_seed(1234)  # nor the caller's randomness
    rest = train(resumed, shuffled(kind), config)
    assert (rest.resumed_from, rest.step, rest.total) == (stop, 9, whole.total)
    assert same(weights(through), weights(resumed))
    assert same(whole.ema, rest.ema)

    def rows(name: str) -> list[dict[str, Any]]:
        return [{**row, "seconds": 0} for row in read_log(tmp_path / name)]

    assert rows("log.jsonl") == rows("whole.jsonl")


def test_resume_uses_iter_from(tmp_path: Path, straight: dict[str, Tensor]) -> None:
    positions = []

    class Seeking(list):  # type: ignore[type-arg]
        def iter_from(self, batch: int) -> Any:
            positions.append(batch)
            return iter(self[batch:])

    config = TrainConfig(epochs=2, checkpoint_dir=tmp_path, checkpoint_every_steps=1)
    interrupt(config, 7, Seeking(batches()))
    resumed = Toy()
    train(resumed, Seeking(batches()), config)
    assert positions == [2]
    assert same(straight, weights(resumed))


def test_finished_run_returns_at_once(tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, ema_decay=0.5, checkpoint_dir=tmp_path / "run", log_path=tmp_path / "log.jsonl")
    first, second, called = Toy(), Toy(seed=3), []
    done = train(first, batches(), config)
    written = (tmp_path / "log.jsonl").read_bytes()
    again = train(second, batches(), config, hooks=[called.append])
    assert called == []
    assert same(weights(first), weights(second))
    assert same(done.ema, again.ema)
    assert again.resumed_from == again.step == 10
    assert (again.total, again.terms, again.epoch) == (done.total, done.terms, done.epoch)
    assert again.checkpoint == done.checkpoint
    assert (tmp_path / "log.jsonl").read_bytes() == written


def test_checkpoints_by_steps_and_by_seconds(tmp_path: Path) -> None:
    toy = Toy()
    result = train(toy, batches(), TrainConfig(epochs=2, checkpoint_dir=tmp_path, checkpoint_every_steps=1, keep=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:09d}.pt" for step in (8, 9, 10)]
    assert result.checkpoint == tmp_path / "step-000000010.pt"
    assert same(load_checkpoint(result.checkpoint)["distiller"], weights(toy))
    config = TrainConfig(epochs=1, checkpoint_dir=tmp_path / "timed", checkpoint_every_seconds=1e-6, keep=9)
    train(Toy(), batches(), config)
    assert len(list((tmp_path / "timed").iterdir())) == 5


# ------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "foreign"])
def test_damaged_newest_falls_back(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, straight: dict[str, Tensor]
) -> None:
    config = TrainConfig(epochs=2, checkpoint_dir=tmp_path, checkpoint_every_steps=1)
    interrupt(config, 6)
    newest = tmp_path / "step-000000006.pt"
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        newest.write_bytes(b"")
    elif damage == "flip":  # torch.load reads this one without a word
        content[content.index(load_checkpoint(newest)["distiller"]["student.model.0.weight"].numpy().tobytes())] ^= 1
        newest.write_bytes(content)
        assert torch.load(newest, weights_only=True)["step"] == 6
    else:
        torch.save({"weights": 1}, newest)
    resumed = Toy()
    assert train(resumed, batches(), config).resumed_from == 5
    assert "step-000000006.pt cannot be read" in caplog.text or "must have format" in caplog.text
    assert same(straight, weights(resumed))


def test_no_readable_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "step-000000003.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* can be read; remove them"):
        train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path))


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    good, bomb = tmp_path / "good.pt", tmp_path / "bomb.pt"
    torch.save({"format": 1, "weights": torch.zeros(1 << 20)}, good)
    assert load_checkpoint(good)["weights"].numel() == 1 << 20
    with zipfile.ZipFile(good) as stored, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert bomb.stat().st_size < good.stat().st_size / 100
    with pytest.raises(CheckpointError, match=r"bomb.pt cannot be read: it would unpack to \d+ bytes from \d+"):
        load_checkpoint(bomb)


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "step-000000001.pt")
    with pytest.raises(CheckpointError):
        train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path))
    assert not (tmp_path / "owned").exists()


def test_other_configuration_is_named(tmp_path: Path) -> None:
    train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path))
    with pytest.raises(
        ValueError, match=r"lr \(checkpoint 0.1, now 0.2\), schedule \(checkpoint 'cosine', now 'poly'\)"
    ):
        train(Toy(), batches(), TrainConfig(epochs=1, lr=0.2, schedule="poly", checkpoint_dir=tmp_path))
    with pytest.raises(ValueError, match=r"batches_per_epoch \(checkpoint 5, now 4\)"):
        train(Toy(), batches(4), TrainConfig(epochs=1, checkpoint_dir=tmp_path))
    # What does not change the weights may differ.
    assert train(Toy(), batches(), TrainConfig(epochs=1, keep=5, checkpoint_dir=tmp_path)).resumed_from == 5


def test_full_disk_keeps_the_last_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, Tensor]
) -> None:
    config = TrainConfig(epochs=2, checkpoint_dir=tmp_path, checkpoint_every_steps=2)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    hooks = [lambda event: monkeypatch.setattr(os, "fsync", full) if event.step == 5 else None]
    with pytest.raises(CheckpointError, match=r"No space left on device; .*step-000000004.pt is kept"):
        train(Toy(), batches(), config, hooks=hooks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002.pt", "step-000000004.pt"]
    monkeypatch.undo()
    resumed = Toy()
    assert train(resumed, batches(), config).resumed_from == 4
    assert same(straight, weights(resumed))


def test_refused_write_is_a_clear_error(tmp_path: Path) -> None:
    """A real refusal by the system, in the middle of the archive."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"cannot be written: .*File too large; there is no earlier checkpoint"
        ):
            train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- divergence


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


# --------------------------------------------------------------------------------------------------------- log


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


# ----------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_checkpoint(tmp_path: Path, signum: signal.Signals, straight: dict[str, Tensor]) -> None:
    config = TrainConfig(epochs=2, checkpoint_dir=tmp_path)
    # A shell starts background jobs with SIGINT ignored, so both handlers are set.
    previous = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Toy(), batches(), config, hooks=[lambda e: signal.raise_signal(signum) if e.step == 3 else None])
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000004.pt"]
    resumed = Toy()
    assert train(resumed, batches(), config).resumed_from == 4
    assert same(straight, weights(resumed))
