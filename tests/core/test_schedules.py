"""Schedules: their values, arguments and copies, and the step of losses, objectives and distillers."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from kdlib import (
    OUTPUT,
    DecoupledKDLoss,
    Distiller,
    DISTLoss,
    HintLoss,
    LinearSoftTargetLoss,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    TrainConfig,
    train,
)
from kdlib.functional import soft_target
from kdlib.schedules import chain, constant, cosine, linear, linear_warmup, piecewise

STAGES = chain((linear_warmup(1.0, 10), 10), (piecewise({5: 0.25, 0: 0.5}), 20), (cosine(1, 0.0, 8), None))
ALL = [constant(2), linear(4.0, 1.0, 10), linear_warmup(0.3, 10), cosine(8.0, 2.0, 10), STAGES]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (constant(2), {0: 2.0, 99: 2.0}),
        (linear(4.0, 1.0, 10), {0: 4.0, 4: 2.8, 10: 1.0, 99: 1.0}),
        (linear_warmup(0.3, 10), {0: 0.0, 1: 0.03, 5: 0.15, 10: 0.3, 99: 0.3}),
        # (1 + cos(pi / 5)) / 2 = 0.904508
        (cosine(8.0, 2.0, 10), {0: 8.0, 2: 2 + 6 * 0.9045084971874737, 5: 5.0, 10: 2.0, 99: 2.0}),
        (piecewise({0: 1.0, 5: 0.1, 7: 0.0}), {0: 1.0, 4: 1.0, 5: 0.1, 6: 0.1, 7: 0.0, 99: 0.0}),
        (STAGES, {0: 0.0, 9: 0.9, 10: 0.5, 14: 0.5, 15: 0.25, 29: 0.25, 30: 1.0, 34: 0.5, 38: 0.0, 99: 0.0}),
        (chain((lambda step: step, 3), (lambda step: 10 * step, 3)), {2: 2.0, 3: 0.0, 9: 60.0}),
    ],
)
def test_values(schedule: Callable[[int], float], values: dict[int, float]) -> None:
    for step, value in values.items():
        assert schedule(step) == pytest.approx(value, abs=1e-12)
        assert type(schedule(step)) is float


def test_ends_are_exact() -> None:
    for start, end in ((0.1, 0.3), (0.3, 0.1), (-1.7, 0.9)):
        for schedule in (linear(start, end, 7), cosine(start, end, 7)):
            assert (schedule(0), schedule(7), schedule(8)) == (start, end, end)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_can_be_rebuilt_copied_and_pickled(schedule: Callable[[int], float]) -> None:
    for other in (eval(repr(schedule)), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert other == schedule
        assert [other(step) for step in range(50)] == [schedule(step) for step in range(50)]
    assert schedule not in [each for each in ALL if each is not schedule]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constant("1"), "constant: value must be a finite number, got '1'"),
        (lambda: linear(0.0, float("nan"), 5), "linear: end must be a finite number, got nan"),
        (lambda: linear(0.0, 1.0, 0), "linear: steps must be a whole number and >= 1, got 0"),
        (lambda: linear_warmup(1.0, 2.5), "linear_warmup: steps must be a whole number and >= 1, got 2.5"),
        (lambda: cosine(None, 1.0, 5), "cosine: start must be a finite number, got None"),
        (lambda: piecewise([(0, 1.0)]), "piecewise: values must be a mapping of steps to values, .* got list"),
        (lambda: piecewise({5: 1.0}), "piecewise: values must hold the value from step 0 on, .*; add 0: value"),
        (lambda: piecewise({0: 1.0, -3: 1.0}), "piecewise: a step in values must be a whole number and >= 0, got -3"),
        (lambda: piecewise({0: "a"}), r"piecewise: values\[0\] must be a finite number, got 'a'"),
        (lambda: chain(), "chain: at least one pair"),
        (lambda: chain(constant(1.0)), r"chain: stages\[0\] must be a pair \(schedule, steps\), got constant\(1.0\)"),
        (lambda: chain((1.0, 5)), r"chain: the schedule of stages\[0\] must be callable, got float"),
        (
            lambda: chain((constant(1.0), None), (constant(0.0), 5)),
            r"chain: the steps of stages\[0\] must be a whole number and >= 1, got None",
        ),
        (lambda: cosine(1.0, 0.0, 5)(-1), "cosine: step must be a whole number and >= 0, got -1"),
        (lambda: cosine(1.0, 0.0, 5)(1.5), "cosine: step must be a whole number and >= 0, got 1.5"),
    ],
)
def test_invalid_arguments_are_errors(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS = draw(0, 6, 4), draw(1, 6, 4)


@pytest.mark.parametrize("kind", [SoftTargetLoss, DecoupledKDLoss, DISTLoss, LinearSoftTargetLoss])
def test_the_temperature_of_a_loss_may_be_a_schedule(kind: Any) -> None:
    student, teacher = LOGITS
    inputs: tuple[Tensor, ...] = (student, teacher)
    others: dict[str, Tensor] = {"target": torch.arange(6) % 4} if kind is DecoupledKDLoss else {}
    if kind is LinearSoftTargetLoss:
        inputs = (student, draw(2, 5, 4), teacher, draw(3, 5, 4))
    schedule = linear(8.0, 2.0, 4)
    loss = kind(temperature=schedule)
    assert loss.schedules == {"temperature": schedule}
    assert "temperature=linear(8.0, 2.0, 4)" in repr(loss)
    for step, temperature in ((0, 8.0), (2, 5.0), (4, 2.0)):
        fixed = kind(temperature=temperature)
        assert torch.equal(loss(*inputs, step=step, **others), fixed(*inputs, **others))
        assert fixed.schedules == {}
        assert torch.equal(fixed(*inputs, step=9, **others), fixed(*inputs, **others))  # has no effect
    name = kind.__name__
    with pytest.raises(ValueError, match=f"{name}: temperature is a schedule and needs the step; give step= in the c"):
        loss(*inputs, **others)
    for wrong in (-1, 0.5):
        with pytest.raises((TypeError, ValueError), match=f"{name}: step must be a whole number and >= 0, got {wrong}"):
            kind()(*inputs, step=wrong, **others)
    with pytest.raises(ValueError, match=rf"{name}: temperature\(3\) must be a finite number and > 0, got 0.0"):
        kind(temperature=linear(1.0, 0.0, 3))(*inputs, step=3, **others)
    with pytest.raises(ValueError, match=f"{name}: temperature must be a finite number and > 0, got 0"):
        kind(temperature=0.0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
    assert torch.equal(twin(*inputs, step=1, **others), loss(*inputs, step=1, **others))


TERMS: dict[str, Callable[[], Term]] = {
    "weight": lambda: Term(SoftTargetLoss(temperature=2.0), student="x", teacher="x", weight=linear(0.0, 1.0, 8)),
    "temperature": lambda: Term(SoftTargetLoss(temperature=linear(4.0, 1.0, 8)), student="x", teacher="x"),
}


def distiller(*kinds: str) -> Distiller:
    terms = {kind: TERMS[kind]() for kind in kinds}
    terms["plain"] = Term(HintLoss(), student="x", teacher="x", weight=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = StudentAdapter(nn.Linear(5, 4), {"x": OUTPUT})
        return Distiller(student, {"big": TeacherAdapter(nn.Linear(5, 4), {"x": OUTPUT})}, Objective(terms))


INPUTS = draw(4, 3, 5)


def expected(made: Distiller, step: int, *kinds: str) -> Tensor:
    student, teachers = made.features(INPUTS)
    pair = student["x"], teachers["big"]["x"]
    total = torch.zeros(())
    if "weight" in kinds:
        total = total + step / 8 * soft_target(*pair, temperature=2.0)
    if "temperature" in kinds:
        total = total + soft_target(*pair, temperature=4 - 3 * step / 8)
    return total


@pytest.mark.parametrize("kinds", [("weight",), ("temperature",), ("weight", "temperature")])
def test_the_step_of_a_call_sets_weights_and_temperatures(kinds: tuple[str, ...]) -> None:
    made = distiller(*kinds)
    assert made.objective.step is None
    listed = ", ".join(f"{kind} of term '{kind}'" for kind in kinds)
    message = rf"Objective: step must be given in each call, got none: {listed} depends on it; call distiller\(inputs"
    with pytest.raises(ValueError, match=message):
        made(INPUTS)
    with pytest.raises(ValueError, match=message):
        made.report(INPUTS)
    with pytest.raises(ValueError, match=message):
        made.eval()(INPUTS)
    made.train()
    for step in (6, 2, 8):
        torch.testing.assert_close(made(INPUTS, step=step).total, expected(made, step, *kinds))
        assert made.objective.step == step
    for wrong in (-1, 1.5):
        with pytest.raises((TypeError, ValueError), match="Objective: step must be a whole number and >= 0, got"):
            made(INPUTS, step=wrong)  # type: ignore[arg-type]


def test_without_a_schedule_no_step_is_needed() -> None:
    made = distiller()
    assert made(INPUTS).total.requires_grad
    assert made.report(INPUTS).step is None
    assert made.report(INPUTS).table().startswith("influence  ")
    made(INPUTS, step=3)
    assert made(INPUTS).total.requires_grad


def test_a_training_call_without_a_step_is_an_error_once_others_had_one() -> None:
    made = distiller("weight")
    made(INPUTS, step=4)
    with pytest.raises(ValueError, match=r"got none \(the last one was 4\): weight of term 'weight' depends on it"):
        made(INPUTS)
    # An evaluation and a report measure at the last step.
    torch.testing.assert_close(made.eval()(INPUTS).total, expected(made, 4, "weight"))
    assert made.train().report(INPUTS).step == 4
    report = made.report(INPUTS, step=8)
    assert (report.step, report.terms["weight"].weight) == (8, 1.0)
    assert made.objective.step == 4  # a report changes nothing


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", ["state dict", "distributed", "file", "deepcopy", "pickle"])
def test_the_step_is_part_of_the_state(way: str, tmp_path: Path) -> None:
    made, other = distiller("weight"), distiller("weight")
    made(INPUTS, step=6)
    state = made.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())  # so that safetensors can store it
    if way == "state dict":
        other.load_state_dict(state)
    elif way == "distributed":
        set_model_state_dict(other, get_model_state_dict(made))
    elif way == "file":
        fresh = {"model": other.state_dict()}
        dcp.save({"model": state}, checkpoint_id=tmp_path, no_dist=True)
        dcp.load(fresh, checkpoint_id=tmp_path, no_dist=True)
        other.load_state_dict(fresh["model"])
    else:
        other = copy.deepcopy(made) if way == "deepcopy" else pickle.loads(pickle.dumps(made))
        other.eval()
    assert other.objective.step == 6
    torch.testing.assert_close(other(INPUTS).total, expected(other, 6, "weight"))
    # The state of an objective that was never given a step.
    other.load_state_dict(distiller("weight").state_dict())
    with pytest.raises(ValueError, match="step must be given in each call, got none: "):
        other(INPUTS)


def test_a_state_dict_without_a_step_loads_strictly() -> None:
    made = distiller("weight")
    state = {name: value for name, value in made.state_dict().items() if not name.endswith("_extra_state")}
    assert made.load_state_dict(state).missing_keys == []
    made(INPUTS, step=3)
    made.load_state_dict(state)
    assert made.objective.step == 3
    del state["student.model.bias"]
    with pytest.raises(RuntimeError, match="student\\.model\\.bias"):
        made.load_state_dict(state)


def test_the_step_survives_moves_and_meta_devices() -> None:
    made = distiller("weight")
    made(INPUTS, step=3)
    with torch.device("meta"):
        state = made.state_dict()
    assert made.to("meta").to_empty(device="cpu").objective.step == 3
    assert int(state["objective._extra_state"]) == 3
    made.objective.set_extra_state(torch.empty((), dtype=torch.long, device="meta"))  # of a model without values
    assert made.objective.step is None


STEPS = 24


@pytest.mark.parametrize(
    ("weight", "temperature", "graphs"),
    [
        (linear_warmup(1.0, 16), 4.0, 2),
        (lambda step: min(1.0, step / 16), cosine(8.0, 2.0, 16), 2),
        (chain((linear(0.0, 1.0, 6), 6), (cosine(1.0, 0.0, 8), None)), linear(4.0, 1.0, 9), 4),
        (piecewise({0: 1.0, 9: 0.5, 15: 0.0}), 2.0, 4),
    ],
)
def test_compiled_code_is_not_compiled_again_for_each_step(weight: Any, temperature: Any, graphs: int) -> None:
    torch._dynamo.reset()
    counters.clear()
    made = distiller()
    made.objective = Objective(
        {"kd": Term(SoftTargetLoss(temperature=temperature), student="x", teacher="x", weight=weight)}
    )
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    for step in range(STEPS):
        total = compiled(INPUTS, step=step).total
        assert made.objective.step == step
        torch.testing.assert_close(total, made(INPUTS, step=step).total)
    assert counters["stats"]["unique_graphs"] <= graphs


def test_train_passes_the_step() -> None:
    steps: list[int] = []

    def weight(step: int) -> float:
        steps.append(step)
        return 1.0

    made = distiller()
    made.objective = Objective({"a": Term(HintLoss(), student="x", teacher="x", weight=weight)})
    config = TrainConfig(max_steps=4, accumulate=2, schedule=cosine(1.0, 0.5, 4), warmup_steps=2)
    rates: list[float] = []
    train(made, [(INPUTS, None)] * 8, config, hooks=[lambda event: rates.append(event.lr)])
    assert steps[-8:] == [0, 0, 1, 1, 2, 2, 3, 3]
    factors = [cosine(1.0, 0.5, 4)(step) * min(1.0, (step + 1) / 2) for step in range(4)]
    assert rates == pytest.approx([0.1 * factor for factor in factors])
    assert "schedule=cosine(1.0, 0.5, 4)" in repr(config)
    assert config.fingerprint()["schedule"] == "cosine(1.0, 0.5, 4)"
    with pytest.raises(ValueError, match=r"TrainConfig: schedule\(0\) must be a finite number and >= 0, got -1"):
        train(made, [(INPUTS, None)], TrainConfig(max_steps=1, schedule=constant(-1)))
