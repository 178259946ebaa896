"""Training that goes on for more steps than its checkpoint was written for."""

import math
from pathlib import Path
from typing import Any

import pytest

from kdlib import HintLoss, Objective, Term
from kdlib.training import TrainConfig, train
from tests.core.training_toys import Toy, batches, interrupt, same, shuffled, weights


@pytest.mark.parametrize(
    "fields", [{"schedule": "constant"}, {"schedule": "constant", "warmup_steps": 3, "accumulate": 2}]
)
def test_a_finished_run_goes_on_as_if_it_had_never_ended(tmp_path: Path, fields: dict[str, Any], caplog: Any) -> None:
    """With a constant learning rate, 1 + 1 + 2 epochs equal 4, with dropout, shuffling, momentum and averages."""
    fields = {**fields, "ema_decay": 0.9}
    straight, events = Toy(), []
    whole = train(straight, shuffled("own"), TrainConfig(epochs=4, **fields))
    for epochs in (1, 2, 4):
        toy = Toy(seed=epochs)
        toy.load_state_dict(Toy().state_dict())
        toy.teachers = Toy().teachers
        config = TrainConfig(epochs=epochs, checkpoint_dir=tmp_path, **fields)
        result = train(toy, shuffled("own"), config, hooks=[lambda event: events.append(event.step)])
    assert events == list(range(1, whole.step + 1))
    assert (result.resumed_from, result.step, result.total) == (whole.step // 2, whole.step, whole.total)
    assert same(weights(toy), weights(straight))
    assert same(result.ema, whole.ema)
    assert caplog.text == ""


def test_a_run_that_goes_on_has_the_schedule_of_its_new_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The learning rate is that of 5 steps up to step 5 and that of 12 steps from there on."""
    rates: list[float] = []
    toy, straight = Toy(), Toy()
    for steps in (5, 12):
        config = TrainConfig(max_steps=steps, checkpoint_dir=tmp_path)
        train(toy, batches(), config, hooks=[lambda event: rates.append(event.lr)])
    factors = [(1 + math.cos(math.pi * step / (5 if step < 5 else 12))) / 2 for step in range(12)]
    assert rates == pytest.approx([0.1 * factor for factor in factors])
    train(straight, batches(), TrainConfig(max_steps=12, schedule=lambda step: factors[step]))
    assert same(weights(toy), weights(straight))
    assert (
        "the run goes on from step 5 to 12 instead of 5: its learning-rate schedule is that of 12 steps" in caplog.text
    )
    assert "whose factor at this step is 0.75 instead of 0.0955" in caplog.text


def test_an_interrupted_run_may_be_shortened_but_not_below_its_checkpoint(tmp_path: Path) -> None:
    config = {"checkpoint_dir": tmp_path, "checkpoint_every_steps": 2}
    interrupt(TrainConfig(max_steps=10, **config), 6)
    with pytest.raises(
        ValueError, match="contain a run of at most 5 steps, got one of 6; raise epochs or max_steps, or"
    ):
        train(Toy(), batches(), TrainConfig(epochs=1, **config))
    assert train(Toy(), batches(), TrainConfig(max_steps=8, **config)).step == 8
    # A term whose weight was different in earlier steps is another run.
    toy = Toy()
    toy.objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out", weight=lambda step: 1.0)})
    with pytest.raises(ValueError, match="got different term 'hint'"):
        train(toy, batches(), TrainConfig(max_steps=9, **config))
