"""Terms, objective, distiller: what is added up, what is trained, what is saved, and what is said when a name is wrong."""

import copy

import pytest
import torch
from torch import nn

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
    AttentionTransferLoss,
    Distiller,
    FixedWeighting,
    HintLoss,
    Objective,
    StudentAdapter,
    TeacherAdapter,
    Term,
    angular_distill,
)


@pytest.fixture
def features() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student = {"embedding": draw(6, 8).requires_grad_(), "map": draw(6, 3, 4, 4).requires_grad_()}
    teachers = {
        "general": {"embedding": draw(6, 8), "map": draw(6, 5, 7, 7)},
        "age": {"embedding": draw(6, 8), "map": draw(6, 2, 4, 4)},
    }
    return student, teachers


def test_total_is_the_weighted_sum_of_the_terms_written_out(features) -> None:
    student, teachers = features
    terms = {
        "embedding": Term(AngularDistillLoss(form="cosine"), student="embedding", teacher="embedding", weight=3.0),
        "norm": Term(lambda s, t: (s.sum(1) - t).square(), student="embedding", target="goal", weight=0.5),
    }
    goal = torch.arange(6.0)
    out = Objective(terms, FixedWeighting([0.25, 0.75]))(student, teachers, {"goal": goal})
    each = [angular_distill(student["embedding"], teachers[name]["embedding"], form="cosine") for name in teachers]
    expected = 3.0 * (0.25 * each[0] + 0.75 * each[1]) + 0.5 * (student["embedding"].sum(1) - goal).square().mean()
    torch.testing.assert_close(out.total, expected)
    assert list(out.terms) == ["embedding", "norm"]
    torch.testing.assert_close(out.weights["embedding"].sum(0), torch.ones(6))
    out.total.backward()
    assert student["embedding"].grad is not None


def test_one_term_decides_the_weights_of_all_and_fewer_teachers_are_scaled(features) -> None:
    student, teachers = features
    terms = {
        "attention": Term(AttentionTransferLoss(), student="map", teacher="map", teachers=["age"]),
        "embedding": Term(AngularDistillLoss(), student="embedding", teacher="embedding"),
    }
    out = Objective(terms, FixedWeighting([0.2, 0.8]), weigh_by="embedding")(student, teachers)
    assert list(out.terms) == ["attention", "embedding"]
    torch.testing.assert_close(out.weights["attention"], torch.ones(1, 6))
    torch.testing.assert_close(out.weights["embedding"][:, 0], torch.tensor([0.2, 0.8]))


def test_a_loss_without_a_per_sample_form_takes_the_batch_mean_of_the_weights(features) -> None:
    student, teachers = features

    def gram(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (s @ s.T - t @ t.T).square().mean()

    out = Objective({"g": Term(gram, student="embedding", teacher="embedding")}, FixedWeighting([1, 3]))(
        student, teachers
    )
    expected = sum(
        share * gram(student["embedding"], teachers[name]["embedding"])
        for share, name in zip((0.25, 0.75), teachers, strict=True)
    )
    torch.testing.assert_close(out.total, expected)


def test_projections_are_inferred_for_each_teacher_and_a_given_one_is_copied(features) -> None:
    student, teachers = features
    given = nn.Conv2d(3, 2, 1)
    objective = Objective(
        {
            "map": Term(AttentionTransferLoss(), student="map", teacher="map", project="auto"),
            "own": Term(AttentionTransferLoss(), student="map", teacher="map", project=given),
        }
    )
    assert not objective.inferred
    objective(student, teachers)
    assert set(objective.projections["map"]) == {"general", "age"}
    own = objective.projections["own"]
    assert own["general"] is given
    assert own["age"] is not given
    torch.testing.assert_close(own["age"].weight, given.weight)


def test_schedules_follow_the_step(features) -> None:
    student, teachers = features
    term = Term(AngularDistillLoss(), student="embedding", teacher="embedding", weight=lambda step: step / 10)
    objective = Objective({"a": term})
    assert float(objective(student, teachers).total.detach()) == 0.0
    objective.set_step(5)
    out = objective(student, teachers)
    torch.testing.assert_close(out.total, 0.5 * out.terms["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "embeding"}, "no feature of the student named 'embeding'; the nearest are 'embedding'"),
        ({"teacher": "emb"}, "no feature of the teacher 'general' named 'emb'"),
        ({"teachers": ["generl"]}, "no teacher named 'generl'; the nearest are 'general'"),
    ],
)
def test_wrong_names_are_named_with_the_nearest(features, change, message) -> None:
    names = {"student": "embedding", "teacher": "embedding", **change}
    with pytest.raises(ValueError, match=message):
        Objective({"a": Term(AngularDistillLoss(), **names)})(*features)


def test_a_missing_target_and_arguments_that_do_not_go_together() -> None:
    objective = Objective({"id": Term(HintLoss(), student="x", target="identity")})
    with pytest.raises(ValueError, match="no target named 'identity'; there are 'sample'"):
        objective({"x": torch.zeros(2, 2)}, {}, {"sample": torch.zeros(2)})
    with pytest.raises(ValueError, match="one of teacher and target must be given"):
        Term(HintLoss(), student="x")
    with pytest.raises(ValueError, match="teachers and project go with teacher"):
        Term(HintLoss(), student="x", target="y", project="auto")
    with pytest.raises(ValueError, match="at least one term"):
        Objective({})


def _distiller() -> Distiller:
    torch.manual_seed(0)
    student = StudentAdapter(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), {"out": OUTPUT})
    teacher = TeacherAdapter(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)), {"out": OUTPUT})
    terms = {"hint": Term(HintLoss(), student="out", teacher="out", project="auto")}
    return Distiller(student, {"big": teacher}, Objective(terms))


def test_only_student_and_projections_are_trained_and_saved() -> None:
    distiller = _distiller()
    with pytest.raises(RuntimeError, match=r"distiller\.infer"):
        list(distiller.trainable_parameters())
    before = copy.deepcopy(distiller.student.state_dict())
    distiller.infer(torch.randn(7, 4))
    for name, value in distiller.student.state_dict().items():
        assert torch.equal(value, before[name]), f"infer moved {name}"
    trained = {id(p) for p in distiller.trainable_parameters()}
    teacher = distiller.teachers["big"].model
    assert not trained & {id(p) for p in teacher.parameters()}
    assert len(trained) == 6 + len(list(distiller.objective.projections.parameters()))
    assert not [name for name in distiller.state_dict() if "teacher" in name]
    fresh = _distiller()
    fresh.infer(torch.randn(7, 4))
    fresh.load_state_dict(distiller.state_dict(), strict=True)


def test_the_teacher_stays_still_while_the_student_trains() -> None:
    distiller = _distiller()
    inputs = torch.randn(16, 4)
    distiller.infer(inputs)
    distiller.train()
    teacher = distiller.teachers["big"].model
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), 0.1)
    losses = []
    for _ in range(30):
        output = distiller(inputs)
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        losses.append(float(output.total.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"the teacher's {name} moved"


def test_a_teacher_that_reads_targets_is_given_them_and_misses_them_by_name() -> None:
    class LookUp(nn.Module):
        reads = ("sample",)

        def forward(self, sample: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": sample.float()[:, None].expand(-1, 3)}

    student = StudentAdapter(nn.Linear(4, 3), {"out": OUTPUT})
    objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out")})
    distiller = Distiller(student, {"cached": LookUp()}, objective)
    samples = torch.tensor([3, 1])
    inputs = torch.randn(2, 4)
    expected = (student(inputs)["out"] - samples[:, None]).square().mean()
    torch.testing.assert_close(distiller(inputs, {"sample": samples}).total, expected)
    with pytest.raises(ValueError, match="'cached' reads the targets sample, the batch lacks sample"):
        distiller(inputs, {})


def test_terms_and_teachers_must_fit_at_construction() -> None:
    student = StudentAdapter(nn.Linear(4, 3), {"out": OUTPUT})
    with pytest.raises(ValueError, match="reads teachers, got none"):
        Distiller(student, {}, Objective({"hint": Term(HintLoss(), student="out", teacher="out")}))
    named = Objective({"hint": Term(HintLoss(), student="out", teacher="out", teachers=["other"])})
    with pytest.raises(ValueError, match="reads teacher 'other', got big"):
        Distiller(student, {"big": nn.Identity()}, named)
