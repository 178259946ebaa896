"""The running-mean teacher: its formula, modes, views and state, in `train` and in loops of one's own."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdlib import (
    OUTPUT,
    Distiller,
    EMATeacher,
    HintLoss,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    TrainConfig,
    train,
)
from kdlib.schedules import cosine
from kdlib.testing import check_adapter
from kdlib.types import Teacher, UpdatedTeacher
from tests.core.training_toys import batches, same, weights


def net(seed: int = 0, *, dropout: float = 0.0) -> StudentAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.PReLU(8), nn.Dropout(dropout), nn.Linear(8, 3)
        return StudentAdapter(nn.Sequential(*layers), {"hidden": "2", "out": OUTPUT})


def distiller(student: nn.Module | None = None, **options: Any) -> Distiller:
    student = net() if student is None else student
    terms = {
        "mean": Term(HintLoss(), student="out", teacher="out"),
        "zero": Term(HintLoss(), student="out", target="zero"),
    }
    return Distiller(student, {"ema": EMATeacher(student, **options)}, Objective(terms))


def loader() -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [(x, {**targets, "zero": torch.zeros(len(x), 3)}) for x, targets in batches()]


def step(made: Distiller, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    made(*batch, step=made.teachers["ema"].step).total.backward()
    optimizer.step()
    made.update_teachers()


def test_formula() -> None:
    """Against plain numbers over seven random steps, with and without the warm-up."""
    for warmup in (True, False):
        student = net()
        teacher = EMATeacher(student, 0.7, warmup=warmup)
        mean = student.model[0].weight.detach().numpy().astype(np.float64)
        for n in range(7):
            with torch.no_grad():
                student.model[0].weight.normal_(generator=torch.Generator().manual_seed(n))
            teacher.update(student)
            decay = min(0.7, 1 - 1 / (n + 1)) if warmup else 0.7
            assert teacher.decay_at(n) == pytest.approx(decay)
            mean = decay * mean + (1 - decay) * student.model[0].weight.detach().numpy()
            np.testing.assert_allclose(teacher.model[0].weight.numpy(), mean, rtol=1e-5, atol=1e-6)


def test_the_warm_up_is_the_plain_mean_of_the_weights() -> None:
    layer = StudentAdapter(nn.Linear(1, 1, bias=False), {"out": OUTPUT})
    teacher = EMATeacher(layer, decay=0.9)
    for value in (3.0, 5.0, 10.0):
        nn.init.constant_(layer.model.weight, value)
        teacher.update(layer)
    assert teacher.model.weight.item() == pytest.approx(6.0)


def test_the_decay_may_be_a_schedule_of_the_step() -> None:
    teacher = EMATeacher(net(), cosine(0.996, 1.0, 200), warmup=False)
    assert [teacher.decay_at(step) for step in (0, 100, 200)] == pytest.approx([0.996, 0.998, 1.0])
    student = net(1)
    teacher.update(student, step=199)
    assert teacher.step == 200
    torch.testing.assert_close(teacher.model[0].weight, net().model[0].weight, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"EMATeacher: decay\(0\) must be a finite number and >= 0 and <= 1, got 2"):
        EMATeacher(net(), lambda step: 2).update(net())


def test_weights_are_saved_but_not_trained(tmp_path: Path) -> None:
    made = distiller()
    names = [name for name in made.state_dict() if name.startswith("updated_teachers.ema.average.model.")]
    assert len(names) == len(made.student.model.state_dict())
    own = {id(parameter) for parameter in made.teachers["ema"].parameters()}
    assert own
    assert not own & {id(parameter) for parameter in made.trainable_parameters()}
    assert not any(parameter.requires_grad for parameter in made.teachers["ema"].parameters())
    assert all(parameter.requires_grad for parameter in made.student.parameters())
    other = distiller(net(3))
    step(made, torch.optim.SGD(made.trainable_parameters(), lr=0.1), loader()[0])
    other.load_state_dict(made.state_dict())
    assert same(weights(made), weights(other))
    assert other.teachers["ema"].step == 1
    torch.save(made.state_dict(), tmp_path / "state.pt")
    assert set(torch.load(tmp_path / "state.pt", weights_only=True)) == set(made.state_dict())


def test_train_equals_a_loop_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Also with dropout and batch statistics in the teacher, whose randomness the checkpoint restores."""
    for options in ({"decay": 0.6}, {"decay": 0.8, "always_eval": False}):
        fields: dict[str, Any] = {"epochs": 2, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "lr": 0.05}
        through = distiller(net(dropout=0.3), **options)
        train(through, loader(), TrainConfig(**fields))
        assert through.teachers["ema"].step == 10
        config = TrainConfig(**fields, checkpoint_dir=tmp_path / str(len(options)), checkpoint_every_steps=1)

        def stop(event: Any) -> None:
            if event.step == 4:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            train(distiller(net(dropout=0.3), **options), loader(), config, hooks=[stop])
        resumed = distiller(net(5, dropout=0.3), **options)
        assert train(resumed, loader(), config).resumed_from == 4
        assert same(weights(through), weights(resumed))
    with pytest.raises(ValueError, match=r"got different .*teacher 'ema' \(checkpoint 'EMATeacher decay=\[0.0, 0.5"):
        train(distiller(net(dropout=0.3), decay=0.5, always_eval=False), loader(), config)
    by_hand = distiller()
    optimizer = torch.optim.SGD(by_hand.trainable_parameters(), lr=0.05)
    by_train = distiller()
    train(by_train, loader(), TrainConfig(**fields))
    by_hand.train()
    for batch in loader() * 2:
        step(by_hand, optimizer, batch)
    assert same(weights(by_hand), weights(by_train))


def test_eval_mode_averages_the_statistics_of_batch_norm() -> None:
    student = net(dropout=0.5)
    made = distiller(student, decay=0.5, warmup=False)
    made.train()
    teacher: Any = made.teachers["ema"]
    assert not any(module.training for module in teacher.modules())
    made(*loader()[0])
    assert teacher.model[1].running_mean.eq(0).all()
    made.update_teachers()
    torch.testing.assert_close(teacher.model[1].running_mean, student.model[1].running_mean / 2)
    assert teacher.model[1].num_batches_tracked == 1
    teacher.model.train()  # undone by the next forward
    x = loader()[0][0]
    torch.testing.assert_close(teacher(x)["out"], copy.deepcopy(teacher.model).eval()(x))


def test_the_mode_of_the_student_on_request() -> None:
    made = distiller(net(dropout=0.5), always_eval=False)
    teacher: Any = made.teachers["ema"]
    x = loader()[0][0]
    made.train()
    assert not torch.equal(teacher(x)["out"], teacher(x)["out"])
    moved = teacher.model[1].running_mean.clone()
    assert moved.any()
    made.update_teachers()
    assert torch.equal(teacher.model[1].running_mean, moved)
    made.eval()
    assert torch.equal(teacher(x)["out"], teacher(x)["out"])
    made.train()
    state = copy.deepcopy(made.state_dict())
    made.report(*loader()[0])
    assert all(torch.equal(state[name], x) for name, x in made.state_dict().items())


def test_inferring_projections_moves_no_statistics() -> None:
    student = net()
    teacher = EMATeacher(student, always_eval=False, taps={"deep": "0"})
    terms = {"hint": Term(HintLoss(), student="out", teacher="deep", project="auto")}
    made = Distiller(student, {"ema": teacher}, Objective(terms)).train()
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    made.infer(*loader()[0])
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict().items())
    assert teacher.training


def test_no_gradient_and_the_same_features_as_a_frozen_copy() -> None:
    student = net()
    teacher = EMATeacher(student)
    x = torch.randn(4, 6, requires_grad=True)
    features = teacher(x)
    frozen = TeacherAdapter(copy.deepcopy(student.model), {"hidden": "2", "out": OUTPUT})(x)
    assert [*features] == ["hidden", "out"]
    for name, feature in features.items():
        assert not feature.requires_grad
        assert torch.equal(feature, frozen[name])
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, UpdatedTeacher)
    assert not isinstance(TeacherAdapter(nn.Linear(2, 2), {"out": OUTPUT}), UpdatedTeacher)
    own = EMATeacher(student, taps={"first": "0"}, preprocess=lambda x: 2 * x)
    torch.testing.assert_close(own(x)["first"], student.model[0](2 * x))


def test_another_view_of_the_inputs() -> None:
    student = net().eval()
    terms = {"mean": Term(HintLoss(), student="out", teacher="out")}
    made = Distiller(student, {"ema": EMATeacher(student, inputs="weak")}, Objective(terms)).eval()
    strong, weak = torch.randn(2, 5, 6)
    wanted = HintLoss()(student(strong)["out"], student(weak)["out"])
    torch.testing.assert_close(made(strong, {"weak": weak}).total, wanted)
    with pytest.raises(ValueError, match="teacher 'ema' reads the targets weak; the batch lacks weak"):
        made(strong)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_follow_their_own_student(duplicate: Any) -> None:
    made = distiller()
    other = duplicate(made)
    before = weights(made)
    assert other.teachers["ema"] is other.updated_teachers["ema"]
    step(other, torch.optim.SGD(other.trainable_parameters(), lr=0.1), loader()[0])
    assert same(before, weights(made))
    torch.testing.assert_close(other.teachers["ema"].model[0].weight, other.student.model[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_mean_of_a_student_in_half_precision_is_kept_in_float32(dtype: torch.dtype) -> None:
    student = StudentAdapter(nn.Linear(4, 3).to(dtype), {"out": OUTPUT})
    teacher = EMATeacher(student, 0.999, warmup=False)
    start = teacher.model.weight.clone()
    with torch.no_grad():
        student.model.weight.add_(0.25)
    for _ in range(20):
        teacher.update(student)
    change = (student.model.weight.float() - start) * (1 - 0.999**20)
    torch.testing.assert_close(teacher.model.weight - start, change, rtol=1e-3, atol=1e-6)
    assert teacher(torch.randn(2, 4).to(dtype))["out"].dtype == torch.float32
    nn.ModuleDict({"parent": teacher}).to(dtype)
    assert teacher.model.weight.dtype == torch.float32
    nn.ModuleDict({"parent": teacher}).double()
    assert teacher.model.weight.dtype == torch.float64


def test_a_compiled_step_and_autocast_and_ddp(tmp_path: Path) -> None:
    made, plain = distiller(), distiller()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for model in (compiled, plain):
        optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
        for batch in loader()[:3]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                total = model(*batch).total
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_teachers()
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], x, rtol=1e-3, atol=1e-4)
    assert made.teachers["ema"].step == 3
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(plain)
        optimizer = torch.optim.SGD(plain.trainable_parameters(), lr=0.1)
        wrapped(*loader()[0]).total.backward()
        optimizer.step()
        wrapped.module.update_teachers()
        assert plain.teachers["ema"].step == 4
    finally:
        del wrapped
        torch.distributed.destroy_process_group()


def test_a_compiled_student_has_the_same_weights_by_name() -> None:
    student = net()
    teacher = EMATeacher(student, decay=0.0)
    teacher.update(torch.compile(net(4), backend="eager"))
    assert torch.equal(teacher.model[0].weight, net(4).model[0].weight)


def test_the_contract_of_adapters() -> None:
    ran = check_adapter(EMATeacher(net()), torch.randn(4, 6), teacher=True, exclude=["left_out"])
    assert len(ran) == 10


def test_errors() -> None:
    student = net()
    for call, error, message in [
        (lambda: EMATeacher("student"), TypeError, "EMATeacher: student must be a Module, got str"),
        (lambda: EMATeacher(student, 1.5), ValueError, "decay must be a finite number and >= 0 and <= 1, got 1.5"),
        (lambda: EMATeacher(student, warmup=1), TypeError, "warmup must be True or False, got int"),
        (lambda: EMATeacher(student, inputs=[3]), TypeError, "EMATeacher: each name in inputs must be a str, got int"),
        (lambda: EMATeacher(student, preprocess=3), TypeError, "preprocess must be callable"),
        (lambda: EMATeacher(student.model, taps={"x": "0"}), TypeError, "must be a StudentAdapter if taps are given"),
        (lambda: EMATeacher(student, taps={"x": "9"}), ValueError, "9"),
        (lambda: EMATeacher(nn.LazyLinear(3)), ValueError, "must be initialized, got a lazy 'weight'; run it on one"),
        (lambda: EMATeacher(student).update(student, step=-1), ValueError, "step must be a whole number and >= 0"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match=r"got 2 that differ, such as '0.bias' \(copied none, now \(3,\)\)"):
        EMATeacher(nn.Sequential(nn.Linear(2, 3, bias=False))).update(nn.Sequential(nn.Linear(3, 3)))
    terms = {"kd": Term(SoftTargetLoss(), student="out", teacher="other")}
    with pytest.raises(ValueError, match="no feature of the teacher 'ema' named 'other'"):
        Distiller(student, {"ema": EMATeacher(student)}, Objective(terms))
    with pytest.raises(ValueError, match="the name of a teacher that is saved must be text without a dot"):
        Distiller(student, {"e.ma": EMATeacher(student)}, Objective({"x": Term(HintLoss(), student="out", target="y")}))
