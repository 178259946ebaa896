"""Mutual distillation of several students and self-distillation: values, gradients, weightings, training, errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib import (
    OUTPUT,
    AuxiliaryHeads,
    CenterConfidenceWeighting,
    ConfidenceWeighting,
    Distiller,
    EMATeacher,
    HintLoss,
    MutualDistiller,
    Objective,
    SelfTeacher,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    TrainConfig,
    VariationalInformationLoss,
    train,
)
from tests.core.training_toys import same, weights

X, LABEL = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3


def student(seed: int, width: int = 8) -> StudentAdapter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)
        return StudentAdapter(nn.Sequential(*layers), {"hidden": "2", "logits": OUTPUT})


def students(count: int = 3) -> dict[str, nn.Module]:
    return {name: student(index, 6 + index) for index, name in zip(range(count), "abc", strict=False)}


def terms(**more: Term) -> dict[str, Term]:
    return {
        "ce": Term(nn.CrossEntropyLoss(reduction="none"), student="logits", target="label"),
        "peers": Term(SoftTargetLoss(temperature=1.0), student="logits", teacher="logits", weight=2.0),
        **more,
    }


def loader() -> list[tuple[Tensor, dict[str, Tensor]]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(7, 6, generator=draw), {"label": LABEL}) for _ in range(4)]


def gradients(made: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in made.parameters()]


@pytest.mark.parametrize("weighting", [None, ConfidenceWeighting()])
def test_each_student_learns_as_from_frozen_peers(weighting: Any) -> None:
    """The total, its parts and every gradient equal those of one distiller per student with copies of the others."""
    group = students()
    made = MutualDistiller(group, Objective(terms(), weighting))
    output = made(X, {"label": LABEL})
    output.total.backward()
    total = torch.zeros(())
    for name in group:
        peers = {key: TeacherAdapter(copy.deepcopy(each.model), each.taps) for key, each in students().items()}
        frozen = {key: lambda *x, key=key: students()[key].train()(*x) for key in peers if key != name}
        # In training mode BatchNorm uses the statistics of the batch, as the students themselves do.
        teachers = {key: _Plain(call) for key, call in frozen.items()}
        single = Distiller(students()[name], teachers, Objective(terms(), weighting))
        alone = single(X, {"label": LABEL})
        alone.total.backward()
        total = total + alone.total.detach()
        for term in terms():
            torch.testing.assert_close(output.terms[f"{name}/{term}"], alone.terms[term])
        torch.testing.assert_close(output.weights[f"{name}/peers"], alone.weights["peers"])
        for one, two in zip(gradients(group[name]), gradients(single.student), strict=True):
            torch.testing.assert_close(one, two)
    torch.testing.assert_close(output.total, total)


class _Plain:
    inputs = None

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *inputs: Any) -> Any:
        return self.call(*inputs)


def test_two_students_by_hand() -> None:
    """Probabilities (1/2, 1/2) and (1/4, 3/4): KL of each to the other, computed with logarithms."""
    group = {"a": _Constant([0.0, 0.0]), "b": _Constant([0.0, 1.0986122886681098])}
    term = Term(SoftTargetLoss(temperature=1.0), student="logits", teacher="logits")
    output = MutualDistiller(group, Objective({"peers": term}))(torch.zeros(1))
    # a learns from b: KL(b || a) = 1/4 ln(1/2) + 3/4 ln(3/2); b from a: KL(a || b) = 1/2 ln 2 + 1/2 ln(2/3)
    assert output.terms["a/peers"].item() == pytest.approx(0.1308120, abs=1e-6)
    assert output.terms["b/peers"].item() == pytest.approx(0.1438410, abs=1e-6)
    assert output.total.item() == pytest.approx(0.2746531, abs=1e-6)


class _Constant(nn.Module):
    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits, self.calls = nn.Parameter(torch.tensor([logits])), 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"logits": self.logits.expand(len(x), -1)}


def test_every_student_runs_once_per_batch() -> None:
    group: dict[str, Any] = {name: _Constant([0.0, 1.0]) for name in "abc"}
    term = Term(SoftTargetLoss(), student="logits", teacher="logits")
    MutualDistiller(group, Objective({"peers": term}))(torch.zeros(2))
    assert [each.calls for each in group.values()] == [1, 1, 1]


def test_state_is_separate_for_each_student() -> None:
    """Losses with weights, projections and weightings with a state are copied; nothing is saved twice."""
    group = {name: student(index) for index, name in enumerate("ab")}
    extra = {
        "vid": Term(VariationalInformationLoss(8, 8), student="hidden", teacher="hidden"),
        "hint": Term(HintLoss(), student="hidden", teacher="hidden", project="auto"),
    }
    made = MutualDistiller(
        group, Objective(terms(**extra), CenterConfidenceWeighting(3, target="label"), weigh_by="hint")
    )
    made.infer(X, {"label": LABEL})
    made(X, {"label": LABEL}).total.backward()
    assert len({id(x) for x in made.parameters()}) == len(list(made.trainable_parameters()))
    names = list(made.state_dict())
    storages = [x.data_ptr() for x in made.state_dict().values() if isinstance(x, Tensor)]
    assert len(set(storages)) == len(storages)
    assert len([name for name in names if name.endswith("centers_0")]) == 2
    assert {name.split(".")[0] for name in names} == {"student", "objective"}
    other = MutualDistiller(students(2), Objective(terms(**copy.deepcopy(extra))))
    assert not other.objective.inferred
    copied = copy.deepcopy(made)
    copied.load_state_dict(made.state_dict())
    assert same(weights(made), weights(copied))


def test_frozen_teachers_beside_the_peers_and_own_objectives() -> None:
    teacher = TeacherAdapter(student(9, 20).model, {"logits": OUTPUT})
    own = {
        "a": Objective(terms()),
        "b": Objective({"big": Term(SoftTargetLoss(), student="logits", teacher="logits", teachers=["big"])}),
    }
    made = MutualDistiller(students(2), own, teachers={"big": teacher})
    output = made(X, {"label": LABEL})
    assert sorted(output.terms) == ["a/ce", "a/peers", "b/big"]
    assert output.weights["a/peers"].shape == (2, 7)
    assert output.weights["b/big"].shape == (1, 7)
    report = made.report(X, {"label": LABEL})
    assert list(report.terms["a/peers"].teachers) == ["b", "big"]
    assert not any(name.startswith("teachers") for name in made.state_dict())


def test_train_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    def build() -> MutualDistiller:
        hint = Term(HintLoss(), student="hidden", teacher="hidden", project="auto", weight=lambda step: 0.1 * step)
        return MutualDistiller(students(), Objective(terms(hint=hint), ConfidenceWeighting(), weigh_by="peers"))

    fields: dict[str, Any] = {"epochs": 3, "lr": 0.05}
    through, resumed = build(), build()
    result = train(through, loader(), TrainConfig(**fields))
    assert set(result.terms) == {f"{name}/{term}" for name in "abc" for term in ("ce", "peers", "hint")}

    def stop(event: Any) -> None:
        if event.step == 5:
            raise InterruptedError

    config = TrainConfig(**fields, checkpoint_dir=tmp_path, checkpoint_every_steps=1)
    with pytest.raises(InterruptedError):
        train(build(), loader(), config, hooks=[stop])
    assert train(resumed, loader(), config).resumed_from == 5
    assert same(weights(through), weights(resumed))


def test_students_learn() -> None:
    made = MutualDistiller(students(2), Objective(terms()))
    first = made(X, {"label": LABEL}).total.item()
    train(made, [(X, {"label": LABEL})], TrainConfig(epochs=60, lr=0.1))
    assert made.train()(X, {"label": LABEL}).total.item() < 0.5 * first
    assert isinstance(made.students["a"], StudentAdapter)


def test_self_distillation_reads_the_students_own_features() -> None:
    made = student(0)
    heads = AuxiliaryHeads(made, {"shallow": ("hidden", nn.Linear(8, 3))})
    term = Term(SoftTargetLoss(), student="shallow", teacher="deep", teachers=["self"])
    distiller = Distiller(heads, {"self": SelfTeacher({"deep": "logits"})}, Objective({"self": term}))
    calls = []
    handle = made.model.register_forward_hook(lambda *_: calls.append(1))
    output = distiller(X)
    handle.remove()
    assert len(calls) == 1
    output.total.backward()
    assert made.model[3].weight.grad is None  # the deeper side is not a student of this term
    assert made.model[0].weight.grad.any()
    assert heads.heads["shallow"].weight.grad.any()
    features = heads.eval()(X)
    torch.testing.assert_close(distiller.eval()(X).total, SoftTargetLoss()(features["shallow"], features["logits"]))
    assert heads.model is made.model
    assert sorted(heads.taps) == ["hidden", "logits", "shallow"]
    assert len([*distiller.trainable_parameters()]) == len([*heads.parameters()])


def test_self_distillation_trains_beside_a_running_mean() -> None:
    heads = AuxiliaryHeads(student(0), {"shallow": ("hidden", nn.Linear(8, 3))})
    objective = Objective(
        {
            "ce": Term(nn.CrossEntropyLoss(), student="logits", target="label"),
            "self": Term(SoftTargetLoss(), student="shallow", teacher="logits", teachers=["self", "mean"]),
        }
    )
    made = Distiller(heads, {"self": SelfTeacher(), "mean": EMATeacher(heads)}, objective)
    result = train(made, loader(), TrainConfig(epochs=2, lr=0.05))
    assert result.step == 8
    copied = copy.deepcopy(made)
    torch.testing.assert_close(copied(X, {"label": LABEL}).total, made(X, {"label": LABEL}).total)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, {"label": LABEL}).total, made(X, {"label": LABEL}).total)


def test_terms_of_several_layers() -> None:
    def both(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        return sum((s - t).square().mean(1) for s, t in zip(student, teacher, strict=True))

    layers = Term(both, student=["hidden", "logits"], teacher=["hidden", "logits"])
    pair = {name: student(index) for index, name in enumerate("ab")}
    output = MutualDistiller(pair, Objective({"layers": layers}))(X)
    torch.testing.assert_close(output.terms["a/layers"], output.terms["b/layers"])
    a, b = (each(X) for each in pair.values())  # in training mode, as before
    wanted = sum((a[name] - b[name]).square().mean() for name in ("hidden", "logits"))
    torch.testing.assert_close(output.terms["a/layers"], wanted)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, pixels: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.layer(pixels) * scale


def test_train_reads_mappings_by_the_names_of_the_students_arguments() -> None:
    batch = {"pixels": X, "label": LABEL, "unused": X}
    plain = {name: StudentAdapter(Named(), {"logits": OUTPUT}) for name in "ab"}
    heads = AuxiliaryHeads(plain["a"], {"more": ("logits", nn.Linear(3, 3))})
    more = Term(nn.CrossEntropyLoss(), student="more", target="label")
    for made in (MutualDistiller(plain, Objective(terms())), Distiller(heads, {}, Objective({"more": more}))):
        assert train(made, [batch], TrainConfig(epochs=1)).step == 1


def test_a_compiled_mutual_distiller() -> None:
    made = MutualDistiller(students(2), Objective(terms()))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, {"label": LABEL}).total, made(X, {"label": LABEL}).total)


def test_errors_of_mutual_distillation() -> None:
    pair, one = students(2), students(1)
    objective = Objective(terms())
    foreign = Term(HintLoss(), student="logits", teacher="logits", teachers=["z"])
    shared = student(0)
    for call, error, message in [
        (lambda: MutualDistiller(one, objective), ValueError, "students must be at least two, got 1; use Distiller"),
        (lambda: MutualDistiller([*pair], objective), TypeError, "students must be a mapping of names to students"),
        (lambda: MutualDistiller({"a": 1, "b": 2}, objective), TypeError, r"students\['a'\] must be a Module"),
        (lambda: MutualDistiller({"a.b": one["a"], "c": shared}, objective), ValueError, "without a dot, got 'a.b'"),
        (lambda: MutualDistiller({"a/b": one["a"], "c": shared}, objective), ValueError, "without '/', got 'a/b'"),
        (lambda: MutualDistiller({"a": shared, "b": shared}, objective), ValueError, "distinct Modules"),
        (lambda: MutualDistiller(pair, terms()), TypeError, r"objective\['ce'\] must be an Objective"),
        (lambda: MutualDistiller(pair, {"a": objective}), ValueError, "no objective for the student named 'b'"),
        (lambda: MutualDistiller(pair, {"a": objective, "b": objective, "c": objective}), ValueError, "named 'c'"),
        (lambda: MutualDistiller(pair, objective, teachers={"a": SelfTeacher()}), ValueError, "different names"),
        (lambda: MutualDistiller(pair, Objective(terms(x=foreign))), ValueError, "no teacher named 'z'"),
        (
            lambda: MutualDistiller(pair, Objective({"x": Term(HintLoss(), student="lgits", target="y")})),
            ValueError,
            "no feature of the student named 'a/lgits'; the nearest are 'a/logits'",
        ),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_errors_of_self_distillation() -> None:
    made = student(0)
    for call, error, message in [
        (lambda: SelfTeacher(["logits"]), TypeError, "SelfTeacher: taps must be a mapping"),
        (lambda: SelfTeacher({"x": 3}), TypeError, r"taps\['x'\] must be a feature of the student, got int"),
        (lambda: SelfTeacher({"x": "lgits"})({"logits": X}), ValueError, "no feature of the student named 'lgits'"),
        (lambda: AuxiliaryHeads(made, {"x": nn.Linear(8, 3)}), TypeError, r"heads\['x'\] must be a pair"),
        (lambda: AuxiliaryHeads(made, {"x": ("hidden", 3)}), TypeError, r"heads\['x'\]\[1\] must be a Module"),
        (lambda: AuxiliaryHeads(made, {"x": ("hiden", nn.ReLU())}), ValueError, "no feature of the student named 'hiden'"),
        (lambda: AuxiliaryHeads(made, {"logits": ("hidden", nn.ReLU())}), ValueError, "name of its own, got 'logits'"),
        (lambda: AuxiliaryHeads(made, {"a.b": ("hidden", nn.ReLU())}), ValueError, "without a dot"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert repr(SelfTeacher({"deep": "logits"})) == "SelfTeacher({'deep': 'logits'})"
