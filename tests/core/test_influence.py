"""The influence report: its numbers against autograd, and that a report changes nothing."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
    AttentionTransferLoss,
    CenterConfidenceWeighting,
    Distiller,
    FixedWeighting,
    HintLoss,
    Objective,
    StudentAdapter,
    TeacherAdapter,
    Term,
)
from kdlib.weighting import GateWeighting, GradientWeighting, UncertaintyWeighting


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    student = {"embedding": draw(0, 6, 8), "map": draw(1, 6, 3, 4, 4)}
    general = {"embedding": draw(2, 6, 8), "map": draw(3, 6, 5, 4, 4)}
    teachers = {"general": general, "age": {"embedding": draw(4, 6, 8), "map": draw(5, 6, 2, 4, 4)}}
    return student, teachers, {"goal": draw(6, 6, 8), "known": torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 0.0])}


def test_numbers_agree_with_autograd() -> None:
    student, teachers, targets = scene()
    embedding = {"student": "embedding", "sample_weight": "known"}
    terms = {
        "goal": Term(HintLoss(), target="goal", weight=0.5, **embedding),
        "embedding": Term(AngularDistillLoss(), teacher="embedding", weight=lambda step: step, **embedding),
        "map": Term(AttentionTransferLoss(), student="map", teacher="map", teachers=["age"]),
    }
    objective = Objective(terms, FixedWeighting([1, 3]), weigh_by="embedding")
    report = objective.report(student, teachers, targets, step=3)
    assert report.step == 3
    assert list(report.terms) == ["goal", "embedding", "map"]

    leaf = student["embedding"].clone().requires_grad_()
    image = student["map"].clone().requires_grad_()
    known = targets["known"]
    parts = {
        "goal": [0.5 * HintLoss()(leaf, targets["goal"], weight=known)],
        "embedding": [
            3 * share * AngularDistillLoss()(leaf, teachers[key]["embedding"], weight=known)
            for key, share in (("general", 0.25), ("age", 0.75))
        ],
        "map": [AttentionTransferLoss()(image, teachers["age"]["map"])],
    }
    leaves = {"goal": leaf, "embedding": leaf, "map": image}
    gradients = {name: [torch.autograd.grad(part, leaves[name])[0] for part in parts[name]] for name in parts}
    totals = {name: float(sum(parts[name]).detach()) for name in parts}
    norms = {name: float(sum(gradients[name]).norm()) for name in parts}
    for name, term in report.terms.items():
        assert term.student == ("map" if name == "map" else "embedding")
        assert term.loss == pytest.approx(totals[name], rel=1e-5)
        assert term.loss_share == pytest.approx(totals[name] / sum(totals.values()), rel=1e-5)
        assert term.gradient == pytest.approx(norms[name], rel=1e-4)
        assert term.gradient_share == pytest.approx(norms[name] / sum(norms.values()), rel=1e-4)
    assert [term.weight for term in report.terms.values()] == [0.5, 3.0, 1.0]
    assert (report.terms["goal"].teachers, report.terms["goal"].cosines, report.terms["map"].cosines) == ({}, {}, {})
    assert report.terms["map"].teachers["age"].weight == pytest.approx(1)

    rows = report.terms["embedding"].teachers
    lengths = [float(each.norm()) for each in gradients["embedding"]]
    for (name, row), share, part, length in zip(rows.items(), (0.25, 0.75), parts["embedding"], lengths, strict=True):
        assert row.weight == pytest.approx(share), name
        assert row.loss == pytest.approx(float(part.detach()), rel=1e-5)
        assert row.loss_share == pytest.approx(float(part.detach()) / totals["embedding"], rel=1e-5)
        assert row.gradient == pytest.approx(length, rel=1e-4)
        assert row.gradient_share == pytest.approx(length / sum(lengths), rel=1e-4)

    def cosine(a: Tensor, b: Tensor) -> object:
        return pytest.approx(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)), abs=1e-5)

    assert report.terms["embedding"].cosines == {("general", "age"): cosine(*gradients["embedding"])}
    expected = cosine(sum(gradients["goal"]), sum(gradients["embedding"]))
    assert report.cosines == {("goal", "embedding"): expected}
    total = float(objective(student, teachers, targets, step=3).total.detach())
    assert sum(term.loss for term in report.terms.values()) == pytest.approx(total, rel=1e-5)


def test_opposite_gradients_have_cosine_minus_one_and_zero_gradients_none() -> None:
    student = {"x": torch.zeros(2, 3)}
    teachers = {"up": {"x": torch.ones(2, 3)}, "down": {"x": -torch.ones(2, 3)}, "same": {"x": torch.zeros(2, 3)}}
    report = Objective({"hint": Term(HintLoss(), student="x", teacher="x")}).report(student, teachers)
    term = report.terms["hint"]
    assert term.cosines == {("up", "down"): pytest.approx(-1), ("up", "same"): None, ("down", "same"): None}
    assert term.gradient == 0
    assert term.gradient_share == 0
    assert [row.gradient_share for row in term.teachers.values()] == pytest.approx([0.5, 0.5, 0])
    assert "up, down -1.00" in report.table()
    assert "up, same none" in report.table()


def test_table_and_dict() -> None:
    student, teachers, targets = scene()
    terms = {
        "goal": Term(HintLoss(), student="embedding", target="goal"),
        "embedding": Term(HintLoss(), student="embedding", teacher="embedding"),
    }
    report = Objective(terms).report(student, teachers, targets, step=0)
    lines = report.table().splitlines()
    assert [line.split()[0] for line in lines] == ["influence", "goal", "embedding", "general", "age", *["cosine"] * 2]
    assert len({len(line) for line in lines[:5]}) == 1
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["step"] == 0
    assert plain["terms"]["embedding"]["teachers"]["age"]["weight"] == 0.5
    assert plain["terms"]["embedding"]["cosines"][0]["a"] == "general"
    assert plain["cosines"] == [{"a": "goal", "b": "embedding", "cosine": report.cosines["goal", "embedding"]}]
    infinite = {key: {"embedding": each["embedding"] * torch.inf} for key, each in teachers.items()}
    mean = Term(lambda s, t: (s - t).square().mean(1), student="embedding", teacher="embedding")
    infinite_report = Objective({"a": mean}).report(student, infinite)
    assert infinite_report.to_dict()["terms"]["a"]["loss"] is None
    assert "inf" in infinite_report.table()


def test_scalar_losses_losses_independent_of_the_student_and_half_precision_features() -> None:
    student, teachers, _ = scene()

    def gram(s: Tensor, t: Tensor) -> Tensor:
        return (s @ s.T - t @ t.T).square().mean()

    objective = Objective({"g": Term(gram, student="embedding", teacher="embedding")}, FixedWeighting([1, 3]))
    report = objective.report(student, teachers)
    leaf = student["embedding"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(0.75 * gram(leaf, teachers["age"]["embedding"]), leaf)
    assert report.terms["g"].teachers["age"].gradient == pytest.approx(float(gradient.norm()), rel=1e-4)
    # A loss that depends on the targets only, and an integer feature, have no gradient.
    independent = Objective({"t": Term(lambda s, t: t.square().mean(1), student="ids", target="goal")})
    report = independent.report({"ids": torch.arange(6)}, {}, {"goal": student["embedding"]})
    assert report.terms["t"].gradient == 0
    assert report.terms["t"].loss > 0
    half = {name: value.half() for name, value in student.items()}
    objective = Objective({"a": Term(HintLoss(), student="embedding", teacher="embedding", weight=1e-4)})
    low, full = objective.report(half, teachers).terms["a"], objective.report(student, teachers).terms["a"]
    assert low.gradient == pytest.approx(full.gradient, rel=2e-2)


class Stateful(nn.Module):
    """A loss that counts its calls, uses random numbers, and keeps a running mean."""

    per_sample = True

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("later", None)

    def forward(
        self, student: Tensor, teacher: Tensor, *, reduction: str = "mean", weight: Tensor | None = None
    ) -> Tensor:
        self.calls += 1
        self.first = student.detach()
        self.mean += student.detach().mean() + torch.rand(())
        self.later = self.mean.clone()
        each = (student - teacher).square().mean(1) * torch.rand(())
        return each if reduction == "none" else each.mean()


TAPS = {"hidden": "1", "embedding": OUTPUT}


def distiller(weighting: nn.Module) -> Distiller:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 6))
    big = [nn.Sequential(nn.Linear(5, d), nn.BatchNorm1d(d), nn.Linear(d, 6)) for d in (7, 9)]
    project = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    terms = {
        "embedding": Term(Stateful(), student="embedding", teacher="embedding"),
        "hidden": Term(HintLoss(), student="hidden", teacher="hidden", project=project),
    }
    teachers = {f"t{i}": TeacherAdapter(each, {"embedding": OUTPUT, "hidden": OUTPUT}) for i, each in enumerate(big)}
    return Distiller(StudentAdapter(net, TAPS), teachers, Objective(terms, weighting, weigh_by="embedding"))


def state(ours: Distiller) -> dict[str, Tensor]:
    buffers = {f"teacher {n}": v for t in ours.teachers.values() for n, v in t.named_buffers()}
    return {name: value.clone() for name, value in {**ours.state_dict(), **buffers}.items()}


@pytest.mark.parametrize(
    "weighting",
    [CenterConfidenceWeighting(4), GradientWeighting(), GateWeighting(6, 2), UncertaintyWeighting(2)],
    ids=lambda weighting: type(weighting).__name__,
)
@pytest.mark.parametrize(("training", "used"), [(True, True), (True, False), (False, True)])
def test_a_report_changes_nothing(weighting: nn.Module, training: bool, used: bool) -> None:
    inputs, targets = draw(1, 8, 5), {"identity": torch.arange(8) % 4}
    ours = distiller(copy.deepcopy(weighting)).infer(inputs, targets)
    ours.train(training)
    if used:  # gradients and centers exist
        ours(inputs, targets).total.backward()
    twin = copy.deepcopy(ours)
    loss = ours.objective.terms["embedding"].loss
    buffers = {name: id(value) for name, value in ours.named_buffers()}
    before, random = state(ours), torch.get_rng_state()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    plain, calls = set(vars(loss)), loss.calls

    with torch.no_grad():
        report = ours.report(inputs, targets)

    assert report.terms["embedding"].gradient > 0
    assert report.terms["hidden"].gradient > 0
    after = state(ours)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name
    assert {name: id(value) for name, value in ours.named_buffers()} == buffers
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(loss)) == plain
    assert loss.calls == calls
    assert all(module.training == other.training for module, other in zip(ours.modules(), twin.modules(), strict=True))
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    # The next step is the same as without the report, and the report describes that step.
    torch.set_rng_state(random)
    output = ours(inputs, targets)
    torch.set_rng_state(random)
    expected = twin(inputs, targets).total
    torch.testing.assert_close(output.total, expected, rtol=0, atol=0)
    for name, term in report.terms.items():
        assert term.loss == pytest.approx(float(output.terms[name].detach()), rel=1e-5)


def test_a_report_between_forward_and_backward_does_not_change_the_gradients() -> None:
    inputs, targets = draw(1, 8, 5), {"identity": torch.arange(8) % 4}
    ours = distiller(GradientWeighting()).infer(inputs, targets).train()
    twin = copy.deepcopy(ours)
    torch.manual_seed(3)
    total = ours(inputs, targets).total
    ours.report(inputs, targets)
    total.backward()
    torch.manual_seed(3)
    twin(inputs, targets).total.backward()
    for mine, theirs in zip(ours.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


def test_a_report_needs_the_projections() -> None:
    student, teachers, _ = scene()
    objective = Objective({"a": Term(HintLoss(), student="embedding", teacher="embedding", project="auto")})
    with pytest.raises(RuntimeError, match=r"^Objective: projections are not created yet; call infer or forward once"):
        objective.report(student, teachers)


def test_a_report_that_fails_changes_nothing() -> None:
    student, teachers, _ = scene()
    loss = Stateful()
    fails = Term(HintLoss(), student="embedding", teacher="map")
    objective = Objective({"a": Term(loss, student="embedding", teacher="embedding"), "b": fails})
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="hint: teacher must be"):
        objective.report(student, teachers)
    assert loss.calls == 0
    assert loss.mean == 0
    assert loss.later is None
    assert torch.equal(torch.get_rng_state(), random)
