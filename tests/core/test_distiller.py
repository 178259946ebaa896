"""The distiller: training, saving, copying, compilation, DDP, custom teachers, and errors."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
    AttentionTransferLoss,
    CenterConfidenceWeighting,
    Distiller,
    HintLoss,
    Objective,
    StudentAdapter,
    TeacherAdapter,
    Term,
)
from kdlib.weighting import GateWeighting, GradientWeighting, UncertaintyWeighting


def net(channels: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    stem = [nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*stem, nn.Flatten(), nn.Linear(16 * channels, 2 * channels))


class Head(nn.Module):
    """A classification head: a scalar from embeddings and identities."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, embeddings: Tensor, identities: Tensor) -> Tensor:
        return F.cross_entropy(embeddings @ self.weight.T, identities)


TAPS = {"map": "2", "embedding": OUTPUT}


def distiller() -> Distiller:
    terms = {
        "identity": Term(Head(), student="embedding", target="identity"),
        "embedding": Term(AngularDistillLoss(), student="embedding", teacher="embedding", project="auto", weight=2.0),
        "map": Term(AttentionTransferLoss(), student="map", teacher="map", teachers=["age"], weight=0.5),
    }
    teachers = {"general": TeacherAdapter(net(5, 1), TAPS), "age": TeacherAdapter(net(3, 2), TAPS)}
    objective = Objective(terms, CenterConfidenceWeighting(3), weigh_by="embedding")
    return Distiller(StudentAdapter(net(2, 0), TAPS), teachers, objective)


@pytest.fixture
def batch() -> tuple[Tensor, dict[str, Tensor]]:
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    return images, {"identity": torch.tensor([0, 2, 1, 0])}


def ready(batch: tuple[Tensor, dict[str, Tensor]]) -> Distiller:
    made = distiller()
    torch.manual_seed(5)
    return made.infer(*batch)


def test_only_student_head_and_projections_are_trained_and_saved(batch) -> None:
    with pytest.raises(RuntimeError, match=r"projections are not created yet; call distiller\.infer"):
        list(distiller().trainable_parameters())
    before = distiller().student.state_dict()
    ours = ready(batch)
    assert all(torch.equal(value, before[name]) for name, value in ours.student.state_dict().items())
    ours(*batch).total.backward()
    without_gradient = {name for name, p in ours.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without_gradient <= {"student.model.0.bias"}  # batch norm removes it, up to rounding
    assert {name.split(".")[0] for name in ours.state_dict()} == {"student", "objective"}
    assert f"teachers={list(ours.teachers)}" in repr(ours)
    trained = {id(parameter) for parameter in ours.trainable_parameters()}
    for teacher in ours.teachers.values():
        assert not trained & {id(parameter) for parameter in teacher.model.parameters()}
        assert all(p.grad is None for p in teacher.model.parameters())


def test_a_load_before_the_projections_exist_is_an_error(batch) -> None:
    state = ready(batch).state_dict()
    late = distiller()
    with pytest.raises(RuntimeError, match=r"projections of the terms .* not created yet; call infer on one batch"):
        late.load_state_dict(state)
    late.infer(*batch).load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in late.state_dict().items())


def test_copies_give_the_same_numbers_and_share_nothing(batch) -> None:
    terms = {"hint": Term(HintLoss(), student="embedding", teacher="embedding", project=nn.Linear(4, 10))}
    ours = Distiller(StudentAdapter(net(2, 0), TAPS), {"t": TeacherAdapter(net(5, 1), TAPS)}, Objective(terms))
    before = copy.deepcopy(ours)  # before the projections exist
    ours.infer(*batch)
    before.infer(*batch)
    total = ours(*batch).total
    for other in (before, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(other(*batch).total, total, rtol=0, atol=0)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in ours.parameters()}
        other(*batch).total.backward()
    assert all(p.grad is None for p in ours.parameters())


WEIGHTINGS = {
    "center": CenterConfidenceWeighting(3),
    "gradient": GradientWeighting(),
    "gate": GateWeighting(4, 2, hidden=3, floor=0.05),
    "uncertainty": UncertaintyWeighting(2),
}


def with_weighting(name: str, batch) -> Distiller:
    made = ready(batch)
    made.objective.weighting = copy.deepcopy(WEIGHTINGS[name])
    for number, parameter in enumerate(made.objective.weighting.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return made


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_under_ddp_and_in_copies(name, batch, tmp_path) -> None:
    plain = with_weighting(name, batch)
    other = copy.deepcopy(plain)
    output = plain(*batch)
    torch.testing.assert_close(other(*batch).total, output.total, rtol=0, atol=0)
    output.total.backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(with_weighting(name, batch))
        wrapped(*batch).total.backward()
    finally:
        gc.collect()  # reference cycles of DDP would keep the threads of the group alive until exit
        torch.distributed.destroy_process_group()
    for (of, ours), theirs in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        assert ours.grad is not None, of
        torch.testing.assert_close(ours.grad, theirs.grad)
    trained = {of.split(".")[2] for of, _ in plain.named_parameters() if of.startswith("objective.weighting.")}
    assert trained == {"gate": {"inner", "out"}, "uncertainty": {"log_variances"}}.get(name, set())


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_training_with_each_weighting_lowers_the_loss_under_autocast(name, batch) -> None:
    ours = with_weighting(name, batch).train()
    optimizer = torch.optim.Adam(ours.trainable_parameters(), 0.01)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = ours(*batch)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        losses.append(sum(output.terms.values()).item())
        torch.testing.assert_close(output.weights["embedding"].detach().float().sum(0), torch.ones(4))
    assert losses[-1] < 0.5 * losses[0]


def test_it_trains_a_network_without_teachers(batch) -> None:
    objective = Objective({"identity": Term(Head(), student="embedding", target="identity")})
    alone = Distiller(StudentAdapter(net(2, 0), TAPS), {}, objective)
    output = alone(*batch)
    output.total.backward()
    assert output.weights == {}
    assert all(parameter.grad is not None for parameter in alone.trainable_parameters())


def test_a_custom_loss_gives_a_teacher_no_gradient() -> None:
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    objective = Objective({"mse": Term(F.mse_loss, student="x", teacher="x")})
    objective({"x": student}, {"t": {"x": teacher}}).total.backward()
    assert student.grad is not None
    assert teacher.grad is None


def term(**taps: Any) -> Objective:
    return Objective({"a": Term(HintLoss(), **{"student": "embedding", "teacher": "embedding", **taps})})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"objective": term(student="embeding")},
            ValueError,
            "no feature of the student named 'embeding'; the nearest",
        ),
        (
            {"objective": term(teacher="maps")},
            ValueError,
            "no feature of the teacher 't' named 'maps'; the nearest are",
        ),
        ({"objective": term(teachers=["s"])}, ValueError, "term 'a': no teacher named 's'; there are 't'"),
        ({"student": torch.tanh}, TypeError, "Distiller: student must be a Module, got builtin_function_or_method"),
        ({"teachers": {}}, ValueError, "Distiller: term 'a' needs a teacher, got none"),
        ({"teachers": [net(2, 1)]}, TypeError, "Distiller: teachers must be a mapping of names to teachers, got list"),
        ({"teachers": {"t": net(2, 1)}}, TypeError, r"teachers\['t'\] must be a Teacher, such as a Teach.*, got Seq"),
        ({"objective": {}}, TypeError, "Distiller: objective must be an Objective, got dict"),
    ],
)
def test_invalid_arguments_are_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"student": StudentAdapter(net(2, 0), TAPS), "teachers": {"t": TeacherAdapter(net(2, 1), TAPS)}}
    with pytest.raises(error, match=message):
        Distiller(**{**arguments, "objective": term(), **change})


def test_invalid_batches_and_features_are_errors(batch) -> None:
    alone = Objective({"a": Term(Head(), student="embedding", target="identity")})
    with pytest.raises(TypeError, match="the student must return named features, got Tensor; wrap it in an adapter"):
        Distiller(net(2, 0), {}, alone)(*batch)
    teacher = LookUp()
    teacher.features = None
    distiller = Distiller(StudentAdapter(net(2, 0), TAPS), {"t": teacher}, alone)
    with pytest.raises(TypeError, match="the teacher 't' must return named features, got NoneType"):
        distiller(batch[0], {**batch[1], "sample": torch.arange(4)})
    with pytest.raises(ValueError, match="'t' reads the targets sample; the batch lacks sample"):
        distiller(*batch)
    with pytest.raises(TypeError, match="Distiller: targets must be a mapping of names to tensors or None, got Tensor"):
        distiller(batch[0], torch.zeros(4))


class LookUp:
    """A teacher that is not a Module and reads a target."""

    inputs = ("sample",)

    def __init__(self) -> None:
        self.features: Any = ["embedding"]

    def __call__(self, sample: Tensor) -> Any:
        return self.features and {name: sample.float()[:, None].expand(-1, 4) for name in self.features}


def test_a_teacher_that_reads_targets_is_called_with_them(batch) -> None:
    student = StudentAdapter(net(2, 0), TAPS).eval()
    terms = {"hint": Term(HintLoss(), student="embedding", teacher="embedding")}
    samples = torch.tensor([3, 1, 0, 7])
    output = Distiller(student, {"cached": LookUp()}, Objective(terms))(batch[0], {"sample": samples})
    expected = (student(batch[0])["embedding"] - samples[:, None]).square().mean()
    torch.testing.assert_close(output.total, expected)


def test_a_custom_teacher_module_stays_in_eval_mode(batch) -> None:
    class Teacher(nn.Sequential):
        inputs = None

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"embedding": super().forward(images)}

    teacher = Teacher(net(2, 1))
    terms = {"a": Term(HintLoss(), student="embedding", teacher="embedding")}
    ours = Distiller(StudentAdapter(net(2, 0), TAPS), {"t": teacher}, Objective(terms)).train()
    before = copy.deepcopy(teacher.state_dict())
    first = ours(*batch).total
    teacher.train()
    torch.testing.assert_close(ours(*batch).total, first)
    first.backward()
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(name.startswith("teacher") for name in ours.state_dict())


class TwoHeads(nn.Module):
    """A model that returns the outputs of both heads in training, and their mean otherwise, as a distilled DeiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
        self.heads = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        first, second = (head(self.stem(images)) for head in self.heads)
        if not self.training:
            return (first + second) / 2
        self.seen += 1
        return first, second


@pytest.mark.parametrize("prepare", [lambda ours: None, Distiller.eval, lambda ours: ours.student.model.eval()])
def test_projections_are_inferred_from_the_outputs_in_training(prepare, batch) -> None:
    taps = {"first": OUTPUT[0], "second": OUTPUT[1]}
    terms = {name: Term(HintLoss(), student=name, teacher="out", project=nn.Linear(5, 5)) for name in taps}
    teacher = TeacherAdapter(TwoHeads(), {"out": OUTPUT})
    ours = Distiller(StudentAdapter(TwoHeads(), taps), {"t": teacher}, Objective(terms))
    prepare(ours)
    modes = [module.training for module in ours.student.modules()]
    before = copy.deepcopy(ours.student.state_dict())
    random = torch.get_rng_state()
    ours.infer(batch[0][:1])  # one sample: batch norm would refuse it in training mode
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in ours.student.modules()] == modes
    torch.testing.assert_close(ours.student.state_dict(), before, rtol=0, atol=0)
    assert ours.train()(batch[0]).total.requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_scripted_student_is_unchanged_by_infer_and_report(batch) -> None:
    terms = {"hint": Term(HintLoss(), student="out", teacher="embedding", project="auto")}
    student = StudentAdapter(torch.jit.script(net(2, 0)), {"out": OUTPUT})
    ours = Distiller(student, {"t": TeacherAdapter(net(3, 1), TAPS)}, Objective(terms))
    before = copy.deepcopy(student.state_dict())
    ours.infer(batch[0])
    assert ours.report(batch[0]).terms["hint"].loss > 0
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in student.modules())


def test_a_mapping_of_inputs_is_passed_as_keywords(batch) -> None:
    terms = {"hint": Term(HintLoss(), student="out", teacher="out", project="auto")}
    models = [nn.Bilinear(2, 3, 4), nn.Bilinear(2, 3, 5)]
    taps = {"out": OUTPUT}
    ours = Distiller(StudentAdapter(models[0], taps), {"t": TeacherAdapter(models[1], taps)}, Objective(terms))
    first, second = torch.ones(4, 2), torch.ones(4, 3)
    ours.infer({"input1": first, "input2": second})
    expected = ours((first, second)).total
    torch.testing.assert_close(ours({"input2": second, "input1": first}).total, expected)


@pytest.mark.parametrize("changes", ["student", "teacher 't'"])
def test_a_model_that_changes_shared_inputs_in_place_is_an_error(changes: str) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    models = {owner: Scales() if owner == changes else nn.Identity() for owner in ("student", "teacher 't'")}
    terms = {"hint": Term(HintLoss(), student="out", teacher="out")}
    taps = {"out": OUTPUT}
    teachers = {"t": TeacherAdapter(models["teacher 't'"], taps), "u": TeacherAdapter(nn.Identity(), taps)}
    ours = Distiller(StudentAdapter(models["student"], taps), teachers, Objective(terms))
    with pytest.raises(ValueError, match=f"the {changes} changed its inputs in place, which the other models read too"):
        ours(torch.ones(2, 3))
    # Where no version counts the changes, each model receives a copy.
    with torch.inference_mode():
        assert ours.features(torch.ones(2, 3))[1]["u"]["out"].unique().tolist() == [1.0]


def test_moving_the_distiller_moves_its_teachers(batch) -> None:
    ours = ready(batch).double()
    output = ours(batch[0].double(), batch[1])
    assert output.total.dtype == torch.float64
    assert next(ours.teachers["age"].model.parameters()).dtype == torch.float64
