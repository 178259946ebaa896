"""Checkpoints of training: resuming bit for bit, differences, damage and signals."""

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

from kdlib import OUTPUT, AngularDistillLoss, Distiller, HintLoss, Objective, StudentAdapter, Term
from kdlib.training import CheckpointError, TrainConfig, TrainEvent, load_checkpoint, read_log, train
from tests.core.training_toys import Toy, batches, interrupt, same, shuffled, weights


@pytest.fixture(scope="module")
def straight() -> dict[str, Tensor]:
    """The weights of two uninterrupted epochs over `batches()`."""
    toy = Toy()
    train(toy, batches(), TrainConfig(epochs=2))
    return weights(toy)


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
        return [{**row, "seconds": 0, "speed": 0} for row in read_log(tmp_path / name)]

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
    first, second, called = Toy(), Toy(), []
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
    with pytest.raises(
        CheckpointError, match=r"none of the 1 checkpoints .* remove them .*step-000000003.pt cannot be"
    ):
        train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path))


def test_a_changed_byte_anywhere_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    """torch.load reads some of these files without an error and returns uninitialized memory as weights."""
    net = StudentAdapter(nn.Linear(2, 1), {"out": OUTPUT})
    toy = Distiller(net, {}, Objective({"hint": Term(HintLoss(), student="out", target="wanted")}))
    data = [(torch.ones(2, 2), {"wanted": torch.zeros(2, 1)})]
    path = train(toy, data, TrainConfig(epochs=1, checkpoint_dir=tmp_path)).checkpoint
    content = path.read_bytes()
    assert load_checkpoint(path)["step"] == 1
    torch.load(path, weights_only=True)  # other readers ignore the checksum
    with path.open("r+b") as file:
        for at, byte in enumerate(content):
            for changed in (byte ^ 1 << at % 8, byte ^ 0xFF) if at > len(content) - 200 else (byte ^ 1 << at % 8,):
                file.seek(at)
                file.write(bytes([changed]))
                file.flush()
                with pytest.raises(CheckpointError, match="cannot be read"):
                    load_checkpoint(path)
            file.seek(at)
            file.write(bytes([byte]))


def test_a_checkpoint_of_objects_is_refused_without_advice_to_load_it_otherwise(tmp_path: Path) -> None:
    torch.save({"step": nn.Linear(2, 1)}, tmp_path / "module.pt")
    with pytest.raises(
        CheckpointError, match=r"module.pt cannot be read: it holds more than tensors and plain values$"
    ):
        load_checkpoint(tmp_path / "module.pt")


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path) -> None:
    good = train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path)).checkpoint
    plain, bomb = tmp_path / "plain.pt", tmp_path / "bomb.pt"
    torch.save({**load_checkpoint(good), "zeros": torch.zeros(1 << 20)}, plain)
    assert load_checkpoint(plain)["zeros"].numel() == 1 << 20  # written by torch.save, without a checksum of the whole
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    assert bomb.stat().st_size < plain.stat().st_size / 100
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


def objective(loss: Any, name: str = "hint", **options: Any) -> Callable[[Toy], None]:
    """A change of the objective of a distiller."""

    def change(toy: Toy) -> None:
        toy.objective = Objective({name: Term(loss, student="out", teacher="out", **options)})

    return change


def rename(toy: Toy) -> None:
    """Rename a layer, so that the names of parameters differ but not their number."""
    toy.layers._modules["last"] = toy.layers._modules.pop("4")


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (None, {"lr": 0.2, "schedule": "poly"}, r"lr \(checkpoint 0.1, now 0.2\), schedule \(checkpoint 'cosine', now 'p"),
        (None, {"epochs": 2, "seed": 1}, r"seed \(checkpoint 0, now 1\); restore"),
        (rename, {}, r"student.model.4.weight \(checkpoint 'torch.float32 \(3, 8\)', now 'absent'\), student.model.last.bias"),
        (lambda toy: toy.double(), {}, r"student.model.0.bias \(checkpoint 'torch.float32 \(8,\)', now 'torch.float64"),
        (objective(AngularDistillLoss()), {}, r"term 'hint' \(checkpoint \"Term\(HintLoss.*now \"Term\(AngularDistillLoss"),
        (objective(HintLoss(), "other"), {}, r"term 'hint' \(.*, now None\), term 'other' \(checkpoint None, now"),
        (objective(nn.SmoothL1Loss(beta=0.5)), {}, r"now \"Term\(SmoothL1Loss\(\).* {'beta': 0.5, 'reduction': 'mean'}\""),
        (objective(HintLoss(), weight=lambda step: 1 + step), {}, r"term 'hint' .* weight \[1.0, 2.0, 3.0, 5.0\]"),
        (lambda toy: toy.teachers["big"].model.weight.data.add_(1), {}, r"teacher 'big' \(checkpoint 'Linear .*, now 'Linear "),
        (None, {"optimizer": torch.optim.Adam}, r"optimizer \(checkpoint 'sgd', now \"Adam \[{'weight_decay': 0.0005"),
    ],
)  # fmt: skip
def test_a_resumed_run_names_what_differs(tmp_path: Path, change: Any, fields: dict[str, Any], message: str) -> None:
    train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path))
    toy = Toy()
    if change is not None:
        change(toy)
    data = [(images.to(toy.layers[0].weight.dtype), targets) for images, targets in batches()]
    with pytest.raises(ValueError, match=f"must contain a run of this configuration, got different .*{message}"):
        train(toy, data, TrainConfig(**{"epochs": 1, "checkpoint_dir": tmp_path, **fields}))
    # What does not change the weights may differ.
    assert train(Toy(), batches(), TrainConfig(epochs=1, keep=5, checkpoint_dir=tmp_path)).resumed_from == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": None},
            "none of the 1 checkpoints .*step-000000005.pt cannot be used: optimizer missing or of a wrong",
        ),
        ({"optimizer": {}}, "optimizer of checkpoint .*step-000000005.pt does not fit this run: 'param_groups'"),
        ({"step": 2, "rng": []}, "rng of checkpoint .* does not fit this run: list index out of range"),
        (
            {"distiller": {**Toy().state_dict(), "more": torch.ones(1)}},
            'distiller of .* does not fit .*Unexpected.*"more"',
        ),
    ],
)
def test_a_checkpoint_without_a_part_names_it(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path)).checkpoint
    torch.save({**load_checkpoint(path), **changes}, path)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        train(Toy(), batches(), TrainConfig(epochs=1, checkpoint_dir=tmp_path))


@pytest.mark.parametrize("field", ["checkpoint_dir", "log_path"])
def test_a_place_that_cannot_be_written_fails_before_the_first_step(tmp_path: Path, field: str) -> None:
    (tmp_path / "file").write_text("")
    steps: list[TrainEvent] = []
    for place in (tmp_path / "file" / "in", tmp_path if field == "log_path" else tmp_path / "file"):
        with pytest.raises((CheckpointError, ValueError), match=f"train: {field} must be a writable .*, got {place}: "):
            train(Toy(), batches(), TrainConfig(epochs=1, **{field: place}), hooks=[steps.append])
    assert steps == []


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("place", "step"), [("hook", 3), ("first batch", 0), ("worker", 3)])
def test_a_signal_waits_for_the_checkpoint(
    tmp_path: Path, signum: signal.Signals, place: str, step: int, straight: dict[str, Tensor]
) -> None:
    """In a hook, in the loader before the first step, or where the signal also ends a worker of the loader."""

    class Loader(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            for at, batch in enumerate(super().__iter__()):
                if (place, at) in (("first batch", 0), ("worker", 3)):
                    signal.raise_signal(signum)
                if (place, at) == ("worker", 3):
                    raise RuntimeError("DataLoader worker exited unexpectedly")
                yield batch

    config = TrainConfig(epochs=2, checkpoint_dir=tmp_path)
    hooks = [lambda event: signal.raise_signal(signum) if (place, event.step) == ("hook", 3) else None]
    # A shell starts background jobs with SIGINT ignored, so both handlers are set.
    previous = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Toy(), Loader(batches()), config, hooks=hooks)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{step:09d}.pt"]
    resumed = Toy()
    assert train(resumed, batches(), config).resumed_from == step
    assert same(straight, weights(resumed))


def test_training_goes_on_if_the_handler_of_the_caller_returns(tmp_path: Path, straight: dict[str, Tensor]) -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    toy = Toy()
    try:
        hooks = [lambda event: signal.raise_signal(signal.SIGTERM) if event.step in (3, 7) else None]
        config = TrainConfig(epochs=2, checkpoint_dir=tmp_path, keep=9)
        assert train(toy, batches(), config, hooks=hooks).step == 10
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == [signal.SIGTERM] * 2
    assert same(straight, weights(toy))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000003.pt", "step-000000010.pt"]
