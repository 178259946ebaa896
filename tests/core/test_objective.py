"""Terms and objectives: the weighted sum, sample weights, weightings, projections and errors."""

from typing import Any

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
)
from kdlib.functional import angular_distill
from kdlib.weighting import GradientWeighting, UncertaintyWeighting


@pytest.fixture
def features() -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student = {"embedding": draw(6, 8).requires_grad_(), "map": draw(6, 3, 4, 4).requires_grad_()}
    general = {"embedding": draw(6, 8), "map": draw(6, 5, 7, 7)}
    return student, {"general": general, "age": {"embedding": draw(6, 8), "map": draw(6, 2, 4, 4)}}


def test_total_is_the_weighted_sum_of_the_terms(features) -> None:
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


def test_weigh_by_uses_the_weights_of_one_term_and_scales_them_for_fewer_teachers(features) -> None:
    student, teachers = features
    terms = {
        "attention": Term(AttentionTransferLoss(), student="map", teacher="map", teachers=["age"]),
        "embedding": Term(AngularDistillLoss(), student="embedding", teacher="embedding"),
    }
    out = Objective(terms, FixedWeighting([0.2, 0.8]), weigh_by="embedding")(student, teachers)
    assert list(out.terms) == ["attention", "embedding"]
    torch.testing.assert_close(out.weights["attention"], torch.ones(1, 6))
    torch.testing.assert_close(out.weights["embedding"][:, 0], torch.tensor([0.2, 0.8]))


def test_a_loss_without_a_per_sample_form_uses_the_batch_mean_of_the_weights(features) -> None:
    student, teachers = features

    def gram(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (s @ s.T - t @ t.T).square().mean()

    objective = Objective({"g": Term(gram, student="embedding", teacher="embedding")}, FixedWeighting([1, 3]))
    each = [gram(student["embedding"], teachers[name]["embedding"]) for name in teachers]
    torch.testing.assert_close(objective(student, teachers).total, 0.25 * each[0] + 0.75 * each[1])


def test_projections_are_inferred_for_each_teacher_and_a_given_one_is_copied(features) -> None:
    student, teachers = features
    given = nn.Conv2d(3, 2, 1)
    projections = {"map": "auto", "own": given}
    terms = {
        n: Term(AttentionTransferLoss(), student="map", teacher="map", project=projections[n]) for n in projections
    }
    objective = Objective(terms)
    assert not objective.inferred
    objective(student, teachers)
    assert set(objective.projections["map"]) == {"general", "age"}
    own = objective.projections["own"]
    assert own["general"] is given
    assert own["age"] is not given
    torch.testing.assert_close(own["age"].weight, given.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "embeding"}, "no feature of the student named 'embeding'; the nearest are 'embedding'"),
        ({"teacher": "emb"}, "no feature of the teacher 'general' named 'emb'"),
        ({"teachers": ["generl"]}, "no teacher named 'generl'; the nearest are 'general'"),
        ({"teacher": None, "target": "identity"}, "no target named 'identity'; there are 'sample'"),
    ],
)
def test_errors_of_unknown_names_list_the_nearest(features, change, message) -> None:
    names = {"student": "embedding", "teacher": "embedding", **change}
    with pytest.raises(ValueError, match=message):
        Objective({"a": Term(AngularDistillLoss(), **names)})(*features, {"sample": torch.zeros(6)})


HINT = {"loss": HintLoss(), "student": "x", "teacher": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hint"}, "Term: loss must be callable, got str"),
        ({"loss": HintLoss}, r"Term: loss must be a function or a Module, got the class HintLoss; write HintLoss\(\)"),
        ({"student": 3}, "Term: student must be the name of a tap or a list of names, got int"),
        ({"student": []}, "Term: student must be the name of a tap or a list of names, got an empty one"),
        ({"student": ["x", 3]}, r"Term: student\[1\] must be a str, got int"),
        ({"teacher": 3}, "Term: teacher must be the name of a tap or a list of names, got int"),
        ({"mask": 3}, "Term: mask must be a str or None, got int"),
        ({"mask": "m"}, "Term: mask needs a loss that accepts mask=, such as SoftTargetLoss, got HintLoss; mask whole"),
        (
            {"student": ["x", "y"], "project": "auto"},
            "Term: project='auto' needs one student tap for each teacher tap, got a list of 2 and 1 tap; give an nn.Mod",
        ),
        ({"student": ["x"], "project": nn.Identity()}, r"Term: project must be an nn.ModuleList .* got Identity"),
        (
            {"project": nn.ModuleList()},
            "Term: project must be a Module that maps its feature for student 'x', got Module",
        ),
        ({"student": ["x"], "project": nn.ModuleList()}, "Term: project must have 1 Modules, .* got 0"),
        ({"target": 3}, "Term: target must be a str or None, got int"),
        ({"sample_weight": 1.0}, "Term: sample_weight must be a str or None, got float"),
        ({"teachers": [1]}, r"Term: teachers\[0\] must be a str, got int"),
        ({"teachers": "big"}, "Term: teachers must be a sequence of names or None, got 'big'"),
        ({"teachers": ["big", "big"]}, r"Term: teachers must be distinct, got \('big', 'big'\)"),
        ({"project": 3}, "Term: project must be None, 'auto' or a Module, got int"),
        ({"project": "linear"}, "Term: project must be one of 'auto', got 'linear'"),
        ({"teacher": None}, "Term: at least one of teacher and target must be given, got neither"),
        ({"teacher": None, "target": "y", "project": "auto"}, "Term: teachers and project need a teacher feature"),
    ],
)
def test_invalid_arguments_of_a_term_are_errors(change, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Term(**{**HINT, **change})


@pytest.mark.parametrize("name", ["", "a.b", "type", "training", "keys", 3])
def test_names_that_are_no_valid_state_dict_keys_are_errors(name) -> None:
    wanted = "must not be an attribute of nn.ModuleDict" if str(name).isalpha() else "must be text without a dot"
    with pytest.raises(ValueError, match=f"Objective: a term's name {wanted}, got {name!r}"):
        Objective({name: Term(**HINT)})
    student, teacher = StudentAdapter(nn.Linear(4, 3), {"x": OUTPUT}), TeacherAdapter(nn.Linear(4, 5), {"x": OUTPUT})
    projected = Objective({"hint": Term(**HINT, project="auto")})
    with pytest.raises(ValueError, match=f"a teacher that term 'hint' projects to {wanted}, got {name!r}"):
        Distiller(student, {name: teacher}, projected)
    with pytest.raises(ValueError, match=f"a teacher that term 'hint' projects to {wanted}, got {name!r}"):
        projected({"x": torch.zeros(2, 3)}, {name: {"x": torch.zeros(2, 5)}})
    # Without a projection the name is not used as a key.
    plain = Objective({"ce": Term(lambda s, t: (s.mean() - t.mean()).square(), student="x", teacher="x")})
    assert Distiller(student, {name: teacher}, plain)(torch.zeros(2, 4)).total.requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "one"])
def test_a_schedule_must_return_a_number(value) -> None:
    term = Term(AngularDistillLoss(), student="embedding", teacher="embedding", weight=lambda step: value)
    with pytest.raises((TypeError, ValueError), match=r"Term: weight\(7\) must be a finite number and >= 0, got "):
        term.weight_at(7)
    good = Term(AngularDistillLoss(), student="embedding", teacher="embedding", weight=lambda step: torch.tensor(0.5))
    assert good.weight_at(7) == 0.5


class Relation(nn.Module):
    """A weighted loss without a per-sample form."""

    per_sample = False

    def forward(self, student, teacher, *, weight=None):
        weight = torch.ones(student.shape[0]) if weight is None else weight
        pairs = weight[:, None] * weight
        return (pairs * (student @ student.T - teacher @ teacher.T).square()).sum() / pairs.sum().clamp(min=1e-12)


def test_a_term_with_teacher_and_target_passes_both_to_the_loss(features) -> None:
    student, teachers = features
    labels = torch.arange(6)

    def loss(s: torch.Tensor, t: torch.Tensor, *, target: torch.Tensor) -> torch.Tensor:
        return (s - t).square().mean(1) * target

    class PerSample(nn.Module):
        per_sample = True

        def forward(self, s, t, *, target, reduction="mean", weight=None):
            each = loss(s, t, target=target)
            each = each if weight is None else weight * each
            return each if reduction == "none" else each.mean()

    for each in (loss, PerSample()):
        term = Term(each, student="embedding", teacher="embedding", target="label")
        out = Objective({"both": term}, FixedWeighting([1, 3]))(student, teachers, {"label": labels})
        values = [loss(student["embedding"], teachers[name]["embedding"], target=labels).mean() for name in teachers]
        torch.testing.assert_close(out.total, 0.25 * values[0] + 0.75 * values[1])
        assert out.weights["both"].shape == (2, 6)
        with pytest.raises(ValueError, match="term 'both': no target named 'label'; there are 'sample'"):
            Objective({"both": term})(student, teachers, {"sample": labels})
    term = Term(HintLoss(), student="x", teacher="y", target="label", project="auto", teachers=["a"])
    assert repr(term) == (
        "Term(HintLoss(reduction='mean'), student='x', teacher='y', teachers=('a',), target='label', project='auto')"
    )


@pytest.mark.parametrize("kind", ["module", "callable", "relation", "supervised", "supervised callable"])
def test_sample_weights_mask_samples_of_one_term(features, kind) -> None:
    student, teachers = features
    target = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    loss, other = {
        "module": (HintLoss(), {"teacher": "embedding"}),
        "callable": (lambda s, t: (s - t).square().mean(1), {"teacher": "embedding"}),
        "relation": (Relation(), {"teacher": "embedding"}),
        "supervised": (HintLoss(), {"target": "goal"}),
        "supervised callable": (lambda s, t: (s - t).square().mean(1), {"target": "goal"}),
    }[kind]
    weighting = FixedWeighting([1, 3])
    masked = Objective({"a": Term(loss, student="embedding", **other, sample_weight="known")}, weighting)
    plain = Objective({"a": Term(loss, student="embedding", **other)}, weighting)
    keep = [0, 2, 3]
    known = torch.tensor([True, False, True, True, False, False])
    few = {name: value[keep] for name, value in student.items()}
    few_teachers = {key: {name: value[keep] for name, value in each.items()} for key, each in teachers.items()}
    expected = plain(few, few_teachers, {"goal": target[keep]})
    for weight in (known, known.float() * 0.25, known.long()):
        out = masked(student, teachers, {"goal": target, "known": weight})
        torch.testing.assert_close(out.total, expected.total)
    # Ones have no effect; with zeros only, the value is 0 and keeps its graph.
    ones = masked(student, teachers, {"goal": target, "known": torch.ones(6)}).total
    torch.testing.assert_close(ones, plain(student, teachers, {"goal": target}).total)
    nothing = masked(student, teachers, {"goal": target, "known": torch.zeros(6)}).total
    assert nothing.item() == 0
    nothing.backward()
    assert not student["embedding"].grad.any()


def test_masked_samples_do_not_affect_the_mean_weights_of_a_relation(features) -> None:
    student, teachers = features

    class FirstRows(nn.Module):
        def forward(self, losses, *, student, teachers, targets):
            first = torch.arange(losses.shape[1]) < 3
            return torch.stack([first, ~first]).to(losses.dtype)

    term = Term(Relation(), student="embedding", teacher="embedding", sample_weight="known")
    known = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    out = Objective({"r": term}, FirstRows())(student, teachers, {"known": known})
    each = [Relation()(student["embedding"], teachers[name]["embedding"], weight=known) for name in teachers]
    torch.testing.assert_close(out.total, 0.5 * each[0] + 0.5 * each[1])


def test_invalid_sample_weights_are_errors(features) -> None:
    student, teachers = features

    def term(loss, **other):
        return Objective({"a": Term(loss, student="embedding", **other, sample_weight="known")})

    hint = term(HintLoss(), teacher="embedding")
    with pytest.raises(ValueError, match="term 'a': no target named 'known'; there are none"):
        hint(student, teachers)
    with pytest.raises(ValueError, match=r"term 'a': targets\['known'\] must be \(b,\) with b = 6, got \(5,\)"):
        hint(student, teachers, {"known": torch.ones(5)})
    scalar = term(lambda s, t: (s - t).mean(), teacher="embedding")
    with pytest.raises(ValueError, match=r"must return \(b,\) = \(6,\) losses for its sample_weight, got \(\)"):
        scalar(student, teachers, {"known": torch.ones(6)})
    number: Any = lambda s, t: 1.0  # noqa: E731
    with pytest.raises(TypeError, match=r"term 'a': the value of the loss must be a torch.Tensor, got float"):
        Objective({"a": Term(number, student="embedding", teacher="embedding")})(student, teachers)
    assert repr(hint.terms["a"]).endswith("teacher='embedding', sample_weight='known')")


def test_gradient_weights_use_the_graph_and_are_detached(features) -> None:
    student, teachers = features
    terms = {
        "map": Term(AttentionTransferLoss(), student="map", teacher="map"),
        "embedding": Term(HintLoss(), student="embedding", teacher="embedding", project=nn.Linear(8, 8)),
    }
    objective = Objective(terms, GradientWeighting(max_weight=0.9), weigh_by="embedding")
    out = objective(student, teachers)
    own = student["embedding"]
    losses = [
        HintLoss()(objective.projections["embedding"][name](own), teachers[name]["embedding"]) for name in teachers
    ]
    g = [torch.autograd.grad(loss, own, retain_graph=True)[0].flatten() for loss in losses]
    first = ((g[1] - g[0]) @ g[1] / (g[0] - g[1]).square().sum()).clamp(0.1, 0.9)
    torch.testing.assert_close(out.weights["embedding"][0], first.expand(6), atol=1e-4, rtol=1e-4)
    assert out.weights["map"] is out.weights["embedding"] or torch.equal(out.weights["map"], out.weights["embedding"])
    assert not out.weights["embedding"].requires_grad
    assert out.penalty is None
    assert own.grad is None
    out.total.backward()
    expected = torch.autograd.grad(first * losses[0] + (1 - first) * losses[1], own)[0]
    torch.testing.assert_close(own.grad, expected, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        assert torch.equal(objective(student, teachers).weights["embedding"], torch.full((2, 6), 0.5))


def test_the_penalty_of_a_weighting_is_added_to_the_total(features) -> None:
    student, teachers = features
    weighting = UncertaintyWeighting(2)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([0.3, -0.2]))
    terms = {
        "a": Term(HintLoss(), student="embedding", teacher="embedding", weight=2.0),
        "b": Term(AngularDistillLoss(), student="embedding", teacher="embedding"),
    }
    share = torch.tensor([-0.3, 0.2]).softmax(0)
    losses = {
        name: torch.stack([term.loss(student["embedding"], teachers[key]["embedding"]) for key in teachers])
        for name, term in terms.items()
    }
    precisions = torch.tensor([-0.3, 0.2]).exp()
    for lead, called in ((None, ("a", "b")), ("b", ("b",))):
        out = Objective(terms, weighting, weigh_by=lead)(student, teachers)
        penalty = sum((precisions * losses[name] + torch.tensor([0.3, -0.2])).sum() for name in called)
        torch.testing.assert_close(out.penalty, penalty)
        torch.testing.assert_close(out.total, 2 * (share @ losses["a"]) + share @ losses["b"] + penalty)
        weighting.zero_grad()
        mine = torch.autograd.grad(out.total, [student["embedding"], weighting.log_variances], retain_graph=True)
        # The student is trained by the weighted losses only, the log-variances by the penalty only.
        weighted = 2 * (share @ losses["a"]) + share @ losses["b"]
        torch.testing.assert_close(mine[0], torch.autograd.grad(weighted, student["embedding"], retain_graph=True)[0])
        torch.testing.assert_close(mine[1], sum(1 - precisions * losses[name].detach() for name in called))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda term: Objective({}), "terms must hold at least one term, got none"),
        (lambda term: Objective([term]), "terms must be a mapping of names to terms, got list"),
        (lambda term: Objective({"a": HINT}), r"terms\['a'\] must be a Term, got dict"),
        (lambda term: Objective({"a": term}, "uniform"), "weighting must be callable, got str"),
        (
            lambda term: Objective({"a": term})({}, {}, torch.zeros(2)),
            "targets must be a mapping .* or None, got Tensor",
        ),
    ],
)
def test_invalid_arguments_of_an_objective_are_errors(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"Objective: {message}"):
        call(Term(**HINT))
