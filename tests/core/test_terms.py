"""Terms: functions and Modules, several taps per side, and masks of dense features."""

from collections.abc import Sequence
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdlib
from kdlib import (
    OUTPUT,
    ConfidenceWeighting,
    DecoupledKDLoss,
    Distiller,
    FixedWeighting,
    GateWeighting,
    GradientWeighting,
    HintLoss,
    Objective,
    RKDDistanceLoss,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    UncertaintyWeighting,
    functional,
)
from kdlib.functional import decoupled_kd, hint, rkd_distance, soft_target
from kdlib.schedules import linear


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT = {"x": draw(0, 6, 8), "low": draw(1, 6, 3, 4, 4), "high": draw(2, 6, 5), "tokens": draw(3, 6, 7, 9)}
TEACHERS = {
    name: {
        "x": draw(s, 6, 8),
        "low": draw(s + 1, 6, 2, 4, 4),
        "high": draw(s + 2, 6, 4),
        "tokens": draw(s + 3, 6, 7, 9),
    }
    for name, s in (("general", 10), ("age", 20))
}
TARGETS = {"known": torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0]), "label": torch.arange(6)}
BOTH: dict[str, Any] = {"student": "x", "teacher": "x"}

PAIRS = [
    (hint, HintLoss()),
    (partial(soft_target, temperature=2.0), SoftTargetLoss(temperature=2.0)),
    (partial(partial(soft_target, temperature=2.0), divergence="reverse_kl"), SoftTargetLoss(temperature=2.0, divergence="reverse_kl")),
    (partial(soft_target, temperature=linear(4.0, 1.0, 4)), SoftTargetLoss(temperature=linear(4.0, 1.0, 4))),
    (rkd_distance, RKDDistanceLoss()),
    (partial(hint, reduction="mean"), HintLoss(reduction="mean")),
    (partial(decoupled_kd, beta=2.0), DecoupledKDLoss(beta=2.0)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "module"), PAIRS, ids=[type(module).__name__ for _, module in PAIRS])
def test_a_function_and_its_module_are_the_same_term(function: Any, module: Any) -> None:
    target = {"target": "label"} if isinstance(module, DecoupledKDLoss) else {}
    for options in ({}, {"sample_weight": "known"}):
        terms = [Term(loss, **BOTH, **target, **options) for loss in (function, module)]
        assert repr(terms[0]) == repr(terms[1])
        objectives = [Objective({"a": term}, FixedWeighting([1, 3])) for term in terms]
        mine, theirs = (objective(STUDENT, TEACHERS, TARGETS, step=2) for objective in objectives)
        assert torch.equal(mine.total, theirs.total)
        assert str(objectives[0]) == str(objectives[1])
        if not target:
            supervised = [Term(loss, student="x", target="goal", **options) for loss in (function, module)]
            goal = {**TARGETS, "goal": draw(5, 6, 8)}
            totals = [Objective({"a": term})(STUDENT, {}, goal, step=2).total for term in supervised]
            assert torch.equal(*totals)


def test_every_function_with_a_module_becomes_it() -> None:
    functions: list[Any] = [getattr(functional, name) for name in functional.__all__]
    functions = [partial(each, margin=-1.0) if each is functional.overhaul else each for each in functions]
    made = {type(Term(each, **BOTH).loss).__name__ for each in functions}
    # These have parameters, or take more tensors than a student's and a teacher's.
    others = {"ContrastiveRepresentationLoss", "LinearSoftTargetLoss", "VariationalInformationLoss"}
    others |= {"FactorTransferLoss", "MaskedGenerativeLoss", "Paraphraser", "ReviewKDLoss", "SemCKDLoss"}
    assert made - {"function"} == set(kdlib.losses.__all__) - others


def test_other_callables_are_kept() -> None:
    @wraps(hint)
    def doubled(student: Tensor, teacher: Tensor) -> Tensor:
        return 2 * hint(student, teacher)

    fixed = partial(soft_target, weight=torch.ones(6))
    for loss in (doubled, fixed, F.mse_loss, nn.MSELoss()):
        assert Term(loss, **BOTH).loss is loss
    out = Objective({"a": Term(doubled, **BOTH)})(STUDENT, TEACHERS)
    torch.testing.assert_close(out.total, sum(hint(STUDENT["x"], each["x"]) for each in TEACHERS.values()))


class Pairs(nn.Module):
    """A cross-layer loss with a per-sample form: the squared difference of the means of all layers."""

    per_sample = True

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        *,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        assert isinstance(student, list)
        each = sum((s.flatten(1).mean(1) - t.flatten(1).mean(1)).square() for s in student for t in teacher)
        assert isinstance(each, Tensor)
        each = each if target is None else each * target
        if reduction == "none":
            return each if weight is None else each * weight
        return each.mean() if weight is None else (each * weight).sum() / weight.sum()


LISTS: dict[str, Any] = {"student": ["low", "high"], "teacher": ("low", "high", "x")}


def side(features: dict[str, Tensor], *taps: str) -> list[Tensor]:
    return [features[tap] for tap in taps]


@pytest.mark.parametrize("kind", ["module", "callable", "scalar"])
def test_a_list_of_taps_passes_a_list_of_features(kind: str) -> None:
    loss = Pairs()
    losses: dict[str, Any] = {
        "module": loss,
        "callable": lambda s, t: loss(s, t, reduction="none"),
        "scalar": lambda s, t: loss(s, t),
    }
    values = [loss(side(STUDENT, "low", "high"), side(each, "low", "high", "x")) for each in TEACHERS.values()]
    term = Term(losses[kind], **LISTS, weight=2.0)
    assert (term.student, term.teacher) == (("low", "high"), ("low", "high", "x"))
    out = Objective({"a": term}, FixedWeighting([1, 3]))(STUDENT, TEACHERS)
    torch.testing.assert_close(out.total, 2 * (0.25 * values[0] + 0.75 * values[1]))
    assert out.weights["a"].shape == (2, 6)
    if kind != "scalar":
        known = Term(losses[kind], **LISTS, sample_weight="known")
        out = Objective({"a": known}, FixedWeighting([1, 3]))(STUDENT, TEACHERS, TARGETS)
        values = [
            loss(side(STUDENT, "low", "high"), side(each, "low", "high", "x"), weight=TARGETS["known"])
            for each in TEACHERS.values()
        ]
        torch.testing.assert_close(out.total, 0.25 * values[0] + 0.75 * values[1])
    if kind == "module":
        both = Term(loss, **LISTS, target="label", teachers=["age"])
        expected = loss(
            side(STUDENT, "low", "high"), side(TEACHERS["age"], "low", "high", "x"), target=TARGETS["label"]
        )
        torch.testing.assert_close(Objective({"a": both})(STUDENT, TEACHERS, TARGETS).total, expected)


def test_one_side_may_have_a_list() -> None:
    def nearest(student: Tensor, teacher: list[Tensor]) -> Tensor:
        return torch.stack([(student - each).square().mean(1) for each in teacher]).amin(0)

    term = Term(nearest, student="x", teacher=["x", "x"], teachers=["age"])
    value = Objective({"a": term})(STUDENT, TEACHERS).total
    torch.testing.assert_close(value, hint(STUDENT["x"], TEACHERS["age"]["x"]))

    def deep(student: list[Tensor], target: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(each, target, reduction="none") for each in student]).mean(0)

    supervised = Objective({"a": Term(deep, student=["x", "x"], target="label", sample_weight="known")})
    value = supervised(STUDENT, {}, TARGETS).total
    known = TARGETS["known"]
    wanted = (F.cross_entropy(STUDENT["x"], TARGETS["label"], reduction="none") * known).sum() / known.sum()
    torch.testing.assert_close(value, wanted)


def square(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    assert isinstance(student, list)
    return sum((hint(s, t, reduction="none") for s, t in zip(student, teacher, strict=True)), torch.zeros(()))


def test_projections_of_lists_map_each_student_tap_to_the_teacher_tap_at_its_place() -> None:
    taps: dict[str, Any] = {"student": ["low", "high"], "teacher": ["low", "high"]}
    own = nn.ModuleList([nn.Conv2d(3, 2, 1), nn.Linear(5, 4)])
    for project in ("auto", own):
        objective = Objective({"a": Term(square, **taps, project=project)})
        torch.manual_seed(0)
        objective.infer(STUDENT, TEACHERS)
        made: Any = objective.projections["a"]
        assert set(made) == {"general", "age"}
        values = [
            square([made[name][0](STUDENT["low"]), made[name][1](STUDENT["high"])], side(TEACHERS[name], "low", "high"))
            for name in TEACHERS
        ]
        torch.testing.assert_close(objective(STUDENT, TEACHERS).total, (values[0] + values[1]).mean() / 2)
    assert made["general"] is own
    assert made["age"] is not own


def test_gradient_weights_of_lists_use_the_gradient_at_all_features() -> None:
    leaves = {name: value.clone().requires_grad_() for name, value in STUDENT.items()}
    taps = "x", "tokens"
    objective = Objective({"a": Term(square, student=taps, teacher=taps)}, GradientWeighting())
    out = objective(leaves, TEACHERS)
    gradients = []
    for each in TEACHERS.values():
        rows = torch.autograd.grad(square(side(leaves, *taps), side(each, *taps)).mean(), side(leaves, *taps))
        gradients.append(torch.cat([row.flatten() for row in rows]))
    first, second = gradients
    share = float(((second - first) @ second / (first - second).square().sum()).clamp(0, 1))
    assert out.weights["a"][0].tolist() == pytest.approx([share] * 6, abs=1e-4)
    assert 0 < share < 1
    report = objective.report(STUDENT, TEACHERS)
    term = report.terms["a"]
    assert term.student == "x, tokens"
    combined = share * first + (1 - share) * second
    assert term.gradient == pytest.approx(float(combined.norm()), rel=1e-3)
    assert term.cosines["general", "age"] == pytest.approx(float(F.cosine_similarity(first, second, dim=0)), abs=1e-4)


def test_weightings_of_lists() -> None:
    uncertainty = UncertaintyWeighting(2)
    out = Objective({"a": Term(Pairs(), **LISTS)}, uncertainty)(STUDENT, TEACHERS)
    assert out.penalty is not None
    terms = {"a": Term(Pairs(), **LISTS), "kd": Term(SoftTargetLoss(), **BOTH)}
    for weighting in (ConfidenceWeighting(), GateWeighting(8, 2)):
        name = type(weighting).__name__
        message = f"Objective: {name} reads one feature of each side, and term 'a' has lists of taps; give weigh_by="
        with pytest.raises(ValueError, match=message):
            Objective(terms, weighting)
        with pytest.raises(ValueError, match=message):
            Objective(terms, weighting, weigh_by="a")
        out = Objective(terms, weighting, weigh_by="kd")(STUDENT, TEACHERS, TARGETS)
        torch.testing.assert_close(out.weights["a"], out.weights["kd"])
    # A supervised term has no weighting.
    deep = Term(lambda s, t: s[0].mean() - t.float().mean(), student=["x", "x"], target="label")
    assert Objective({"a": deep}, ConfidenceWeighting())(STUDENT, {}, TARGETS).total.dim() == 0


def test_names_of_lists_are_checked_by_the_distiller() -> None:
    student = StudentAdapter(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"a": "0", "b": OUTPUT})
    teacher = TeacherAdapter(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"a": "0", "b": OUTPUT})
    good = Objective({"t": Term(square, student=["a", "b"], teacher=["a", "b"], project="auto")})
    made = Distiller(student, {"big": teacher}, good)
    made.infer(torch.randn(5, 4))
    made(torch.randn(5, 4)).total.backward()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(compiled(inputs).total, made(inputs).total)
    for change in ({"student": ["a", "bb"]}, {"teacher": ["a", "bb"]}):
        taps: dict[str, Any] = {"student": ["a", "b"], "teacher": ["a", "b"], **change}
        side = "student" if "student" in change else "teacher 'big'"
        with pytest.raises(ValueError, match=f"Distiller: term 't': no feature of the {side} named 'bb'"):
            Distiller(student, {"big": teacher}, Objective({"t": Term(square, **taps)}))
        features = {"a": torch.ones(2, 3), "b": torch.ones(2, 2)}
        with pytest.raises(ValueError, match=f"Objective: term 't': no feature of the {side} named 'bb'"):
            Objective({"t": Term(square, **taps)})(features, {"big": features})


LOGITS: dict[str, Any] = {"student": "tokens", "teacher": "tokens", "mask": "kept"}
KEPT = torch.arange(7) < torch.tensor([7, 3, 1, 0, 5, 2])[:, None]


@pytest.mark.parametrize("kept", [KEPT, KEPT.long()], ids=["boolean", "integer"])
def test_a_mask_makes_the_term_a_mean_over_the_positions_that_are_kept(kept: Tensor) -> None:
    loss = SoftTargetLoss(dim=-1, temperature=2.0)
    targets = {**TARGETS, "kept": kept}
    for options, weight in (({}, None), ({"sample_weight": "known"}, TARGETS["known"])):
        values = [loss(STUDENT["tokens"], each["tokens"], mask=KEPT, weight=weight) for each in TEACHERS.values()]
        out = Objective({"a": Term(loss, **LOGITS, **options)}, FixedWeighting([1, 3]))(STUDENT, TEACHERS, targets)
        torch.testing.assert_close(out.total, 0.25 * values[0] + 0.75 * values[1])
        function = Term(partial(soft_target, dim=-1, temperature=2.0), **LOGITS, **options)
        again = Objective({"a": function}, FixedWeighting([1, 3]))(STUDENT, TEACHERS, targets)
        assert torch.equal(out.total, again.total)
    # The values of a supervised term are means over positions too.
    goal = {**targets, "goal": TEACHERS["age"]["tokens"]}
    supervised = Term(loss, student="tokens", target="goal", mask="kept")
    out = Objective({"a": supervised})(STUDENT, {}, goal)
    torch.testing.assert_close(out.total, loss(STUDENT["tokens"], goal["goal"], mask=KEPT))
    # A mask that keeps everything has no effect, and one that keeps nothing gives 0 with a graph.
    everything = Objective({"a": Term(loss, **LOGITS)})(STUDENT, TEACHERS, {"kept": torch.ones(6, 7)})
    plain = Objective({"a": Term(loss, student="tokens", teacher="tokens")})(STUDENT, TEACHERS)
    torch.testing.assert_close(everything.total, plain.total)
    leaves = {name: value.clone().requires_grad_() for name, value in STUDENT.items()}
    nothing = Objective({"a": Term(loss, **LOGITS)})(leaves, TEACHERS, {"kept": torch.zeros(6, 7)}).total
    assert nothing.item() == 0
    nothing.backward()
    assert not leaves["tokens"].grad.any()  # type: ignore[union-attr]


def test_a_mask_is_passed_to_other_losses() -> None:
    def masked(student: Tensor, teacher: Tensor, *, mask: Tensor) -> Tensor:
        assert mask.dtype == torch.bool
        return ((student - teacher).square().mean(-1) * mask).sum() / mask.sum()

    out = Objective({"a": Term(masked, **LOGITS, teachers=["age"])})(STUDENT, TEACHERS, {"kept": KEPT.long()})
    torch.testing.assert_close(out.total, masked(STUDENT["tokens"], TEACHERS["age"]["tokens"], mask=KEPT))

    class Never(nn.Module):
        masked = False

        def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
            return student.mean()

    with pytest.raises(ValueError, match=r"Term: mask needs a loss that accepts mask=, .* got Never"):
        Term(Never(), **LOGITS)
    objective = Objective({"a": Term(SoftTargetLoss(dim=-1), **LOGITS)})
    torch._dynamo.reset()
    targets = {"kept": KEPT.long()}
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(STUDENT, TEACHERS, targets).total, objective(STUDENT, TEACHERS, targets).total)
    with pytest.raises(ValueError, match="term 'a': no target named 'kept'; there are none"):
        objective(STUDENT, TEACHERS)
    with pytest.raises(ValueError, match=r"targets\['kept'\] must have the batch size of the student's feature"):
        objective(STUDENT, TEACHERS, {"kept": KEPT[:4]})
    with pytest.raises(ValueError, match=r"soft_target: mask must be \(6, 7\)"):
        objective(STUDENT, TEACHERS, {"kept": KEPT[:, :4]})
    report = Objective({"a": Term(SoftTargetLoss(dim=-1), **LOGITS)}).report(STUDENT, TEACHERS, {"kept": KEPT})
    assert report.terms["a"].gradient > 0
