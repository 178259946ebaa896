"""What each weighting makes of one teacher, equal ones, a useless one, and values at the ends of what floats hold."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdlib.weighting
from kdlib.weighting import (
    CenterConfidenceWeighting,
    ConfidenceWeighting,
    EntropyWeighting,
    FixedWeighting,
    GateWeighting,
    GradientWeighting,
    UncertaintyWeighting,
    UniformWeighting,
)

B, D = 4, 3


def made(k: int) -> dict[str, nn.Module]:
    return {
        "UniformWeighting": UniformWeighting(),
        "FixedWeighting": FixedWeighting([1.0] * k),
        "CenterConfidenceWeighting": CenterConfidenceWeighting(D),
        "ConfidenceWeighting": ConfidenceWeighting(),
        "EntropyWeighting": EntropyWeighting(),
        "UncertaintyWeighting": UncertaintyWeighting(k),
        "GradientWeighting": GradientWeighting(),
        "GateWeighting": GateWeighting(D, k, hidden=4),
    }


def face(teachers: list[Tensor], seed: int = 0) -> tuple[Tensor, dict[str, object]]:
    """Losses of a student against these teachers, with their graph, and the rest of a call."""
    generator = torch.Generator().manual_seed(seed)
    b = teachers[0].shape[0]
    student = torch.randn(b, D, generator=generator).requires_grad_()
    losses = torch.stack([(student - teacher.float()).square().mean(1) for teacher in teachers])
    targets = {"label": torch.arange(b) % D, "identity": torch.arange(b) % D}
    return losses, {"student": student, "teachers": teachers, "targets": targets}


def test_every_weighting_is_here() -> None:
    assert set(made(2)) == set(kdlib.weighting.__all__)


@pytest.mark.parametrize("name", kdlib.weighting.__all__)
def test_one_teacher_weighs_one_and_equal_teachers_weigh_the_same(name: str) -> None:
    teacher = torch.randn(B, D, generator=torch.Generator().manual_seed(7))
    for k in (1, 2, 3):
        weighting = made(k)[name]
        for _ in range(2):  # centers are there the second time
            losses, rest = face([teacher] * k)
            weights = weighting(losses, **rest)
            torch.testing.assert_close(weights, torch.full((k, B), 1 / k), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", kdlib.weighting.__all__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_at_the_ends_give_finite_weights_that_sum_to_one(name: str, dtype: torch.dtype) -> None:
    huge = {torch.float16: 6e4, torch.bfloat16: 1e38, torch.float32: 1e38, torch.float64: 1e38}[dtype]
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    teachers = [(huge * signs).to(dtype), torch.zeros(B, D, dtype=dtype), (1e-7 * signs).to(dtype)]
    for losses in (torch.zeros(3, B), torch.full((3, B), 1e38), torch.tensor([[0.0], [1e-38], [1e38]]).expand(3, B)):
        for student in (teachers[0], teachers[1], teachers[2]):
            student = student.clone().requires_grad_()
            live = (losses + 0 * student.float().sum()) if name == "GradientWeighting" else losses
            weighting = made(3)[name]
            targets = {"label": torch.tensor([0, 1, 2, -1]), "identity": torch.tensor([0, 1, 2, -1])}
            for _ in range(2):
                weights = weighting(live, student=student, teachers=teachers, targets=targets)
                assert torch.isfinite(weights).all()
                assert (weights >= 0).all()
                torch.testing.assert_close(weights.sum(0), torch.ones(B), rtol=0, atol=1e-5)
            if weights.requires_grad:
                weights[0].sum().backward()
                assert all(torch.isfinite(parameter.grad).all() for parameter in weighting.parameters())
                assert student.grad is None


@pytest.mark.parametrize("name", ["ConfidenceWeighting", "CenterConfidenceWeighting"])
def test_a_missing_target_is_named(name: str) -> None:
    losses, rest = face([torch.zeros(B, D)] * 2)
    with pytest.raises(ValueError, match=f"^{name}: no target named .*; there are 'sample'"):
        made(2)[name](losses, **{**rest, "targets": {"sample": torch.arange(B)}})


# Confidence and entropy, against loops.


def soft(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def confidence(logits: list[np.ndarray], labels: list[int]) -> np.ndarray:
    k = len(logits)
    weights = np.full((k, len(labels)), 1 / k)
    for i, label in enumerate(labels):
        if label >= 0 and k > 1:
            weights[:, i] = (1 - soft(np.array([-math.log(soft(z[i])[label]) for z in logits]))) / (k - 1)
    return weights


def entropy(logits: list[np.ndarray], labels: list[int]) -> np.ndarray:
    k = len(logits)
    weights = np.ones((k, len(labels)))
    for i in range(len(labels)):
        if k > 1:
            each = np.array([-sum(p * math.log(p) for p in soft(z[i])) for z in logits])
            weights[:, i] = (1 - each / each.sum()) / (k - 1)
    return weights


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1),
    k=st.integers(1, 4),
    c=st.integers(2, 5),
    labels=st.lists(st.integers(-1, 1), min_size=1, max_size=5),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_confidence_and_entropy_follow_their_formulas(
    seed: int, k: int, c: int, labels: list[int], scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    b = len(labels)
    teachers = [scale * torch.randn(b, c, generator=generator, dtype=torch.float64) for _ in range(k)]
    rest = {"student": torch.zeros(b, 1), "teachers": teachers, "targets": torch.tensor(labels)}
    for weighting, reference in [(ConfidenceWeighting(), confidence), (EntropyWeighting(), entropy)]:
        weights = weighting(torch.zeros(k, b, dtype=torch.float64), **rest)
        expected = reference([each.numpy() for each in teachers], labels)
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_two_numbers_by_hand() -> None:
    # Cross-entropies log 2 and log 4 make a softmax of 1/3 and 2/3; entropies log 2 and 0 make shares of 1 and 0.
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    weights = ConfidenceWeighting(target="y")(
        torch.zeros(2, 1), student=half, teachers=[half, quarter], targets={"y": torch.tensor([0])}
    )
    torch.testing.assert_close(weights, torch.tensor([[2 / 3], [1 / 3]]))
    sure = torch.tensor([[1e4, 0.0]])
    weights = EntropyWeighting()(torch.zeros(2, 1), student=half, teachers=[half, sure], targets={})
    assert weights.tolist() == [[0.0], [1.0]]


def test_a_useless_teacher_by_its_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (64,), generator=generator)
    good = [8 * nn.functional.one_hot(labels, 10).float() + torch.randn(64, 10, generator=generator) for _ in range(2)]
    rest = {"student": good[0], "targets": {"label": labels}}
    shouting = 20 * torch.randn(64, 10, generator=generator)  # random and sure
    whispering = 0.1 * torch.randn(64, 10, generator=generator)  # random and unsure, nearly constant
    losses = torch.zeros(3, 64)
    for useless in (shouting, whispering):
        weights = ConfidenceWeighting()(losses, teachers=[*good, useless], **rest).mean(1)
        assert weights[2] < 0.15
        assert weights[:2].min() > 0.4
    assert EntropyWeighting()(losses, teachers=[*good, whispering], **rest).mean(1)[2] < 0.05
    # Entropy does not find out the one that is sure and wrong; this is what the page says.
    assert EntropyWeighting()(losses, teachers=[*good, shouting], **rest).mean(1)[2] > 0.25


def test_no_teacher_gets_more_than_its_bound() -> None:
    teachers = [torch.eye(4) * 100, -torch.eye(4) * 100, torch.zeros(4, 4)]
    rest = {"student": teachers[0], "teachers": teachers, "targets": {"label": torch.arange(4)}}
    for weighting in (ConfidenceWeighting(), EntropyWeighting()):
        assert weighting(torch.zeros(3, 4), **rest).max() <= 0.5 + 1e-6


def test_logits_and_labels_must_fit() -> None:
    losses, rest = face([torch.zeros(B, D)] * 2)
    wrong = {**rest, "teachers": [torch.zeros(B, D), torch.zeros(B, D + 1)]}
    for weighting in (ConfidenceWeighting(), EntropyWeighting()):
        name = type(weighting).__name__
        with pytest.raises(ValueError, match=rf"^{name}: teachers must be logits \(b, c\) .* got \(4, 3\), \(4, 4\)"):
            weighting(losses, **wrong)
    confident = ConfidenceWeighting()
    with pytest.raises(ValueError, match=r"labels must be below c = 3 of the teachers' logits, got 3"):
        confident(losses, **{**rest, "targets": {"label": torch.arange(4)}})
    with pytest.raises(TypeError, match=r"labels must be whole numbers, got torch.float32"):
        confident(losses, **{**rest, "targets": torch.ones(4)})
    with pytest.raises(ValueError, match=r"labels must be \(b,\) with b = 4, got \(2,\)"):
        confident(losses, **{**rest, "targets": torch.tensor([0, 1])})


# Uncertainty.


def test_the_penalty_is_kendalls_objective() -> None:
    weighting = UncertaintyWeighting(2)
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([0.5, -1.0]))
    losses = torch.tensor([[1.0, 2.0, 3.0], [0.2, 0.2, 0.2]], requires_grad=True)
    value = weighting.penalty(losses)
    # exp(-0.5) * 2 + 0.5 + exp(1) * 0.2 - 1
    assert value.item() == pytest.approx(math.exp(-0.5) * 2 + 0.5 + math.e * 0.2 - 1)
    value.backward()
    torch.testing.assert_close(weighting.log_variances.grad, torch.tensor([1 - 2 * math.exp(-0.5), 1 - 0.2 * math.e]))
    torch.testing.assert_close(losses.grad, torch.tensor([[math.exp(-0.5) / 3] * 3, [math.e / 3] * 3]))
    weights = weighting(losses, student=torch.zeros(3, 1), teachers=[], targets={})
    torch.testing.assert_close(weights[:, 0], torch.tensor([-0.5, 1.0]).softmax(0))
    assert not weights.requires_grad
    assert weighting.penalty(losses[:, :0]).item() == -0.5


def test_log_variances_settle_at_the_losses_and_weights_at_their_inverse() -> None:
    weighting = UncertaintyWeighting(3)
    losses = torch.tensor([[0.5, 1.5], [4.0, 4.0], [0.05, 0.15]])
    optimizer = torch.optim.Adam(weighting.parameters(), 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        weighting.penalty(losses).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variances.detach(), losses.mean(1).log(), rtol=1e-3, atol=1e-3)
    inverse = 1 / losses.mean(1)
    weights = weighting(losses, student=torch.zeros(2, 1), teachers=[], targets={})
    torch.testing.assert_close(weights[:, 0], inverse / inverse.sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_loss_of_zero_does_not_run_away_and_comes_back(kind: type[torch.optim.Optimizer]) -> None:
    weighting = UncertaintyWeighting(2)
    optimizer = kind(weighting.parameters(), lr=0.1)

    def settle(losses: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            weighting.penalty(losses).backward()
            optimizer.step()
        return weighting.log_variances.detach().clone()

    found = settle(torch.tensor([[0.0], [1.0]]), 1000)
    assert -17 < float(found[0]) < -15
    assert abs(float(found[1])) < 0.1
    if kind is torch.optim.Adam:  # a plain gradient step from there is as long as exp(16) times the loss
        rising = settle(torch.tensor([[1e-4], [1.0]]), 500)
        assert float(rising[0]) == pytest.approx(math.log(1e-4), abs=0.3)


# Gradients.


def at(vectors: np.ndarray) -> tuple[Tensor, dict[str, object]]:
    """Losses whose gradients at the student are these vectors, `(k, d)`."""
    student = torch.zeros(1, vectors.shape[1], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([(student * torch.from_numpy(each)).sum(1) for each in vectors])
    return losses, {"student": student, "teachers": [], "targets": {}}


def shortest(gram: np.ndarray, most: float) -> float:
    """The least `a G a` there is, by trying each entry at 0, at `most`, and free: the optimum solves one of these."""
    k, found = len(gram), math.inf
    for kinds in itertools.product((0.0, most, None), repeat=k):
        a = np.array([kind or 0.0 for kind in kinds])
        free = [i for i, kind in enumerate(kinds) if kind is None]
        if free:
            system = np.ones((len(free) + 1, len(free) + 1))
            system[:-1, :-1], system[-1, -1] = gram[np.ix_(free, free)], 0
            a[free] = np.linalg.lstsq(system, np.r_[-gram[free] @ a, 1 - a.sum()], rcond=None)[0][:-1]
        if abs(a.sum() - 1) < 1e-8 and a.min() > -1e-8 and a.max() < most + 1e-8:
            found = min(found, float(a @ gram @ a))
    return found


vectors = st.integers(0, 2**31 - 1).map(lambda seed: np.random.default_rng(seed))


@settings(deadline=None, max_examples=50)
@given(rng=vectors, most=st.sampled_from([1.0, 0.75, 0.5]))
def test_two_teachers_have_the_closed_form(rng: np.random.Generator, most: float) -> None:
    g = rng.normal(size=(2, 3)) * np.exp(rng.normal(size=(2, 1)))
    losses, rest = at(g)
    first = np.clip((g[1] - g[0]) @ g[1] / np.square(g[0] - g[1]).sum(), 1 - most, most)
    weights = GradientWeighting(most=most)(losses, **rest)
    np.testing.assert_allclose(weights[:, 0].numpy(), [first, 1 - first], atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(rng=vectors, k=st.integers(2, 5), most=st.sampled_from([1.0, 0.6]))
def test_the_mix_is_the_shortest_there_is(rng: np.random.Generator, k: int, most: float) -> None:
    g = rng.normal(size=(k, 4)) + rng.normal(size=4)
    losses, rest = at(g)
    weights = GradientWeighting(most=most)(losses, **rest)[:, 0].numpy()
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    assert weights.max() <= most
    gram = g @ g.T
    assert weights @ gram @ weights <= shortest(gram, most) + 1e-6 * np.trace(gram)
    if most == 1:  # a step along the mix serves every teacher
        mix = weights @ g
        assert (g @ mix >= mix @ mix - 1e-4 * np.trace(gram)).all()


def test_gradients_are_taken_at_the_feature_before_the_projection_and_the_graph_stays() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 4, generator=generator, requires_grad=True)
    bank = [torch.randn(4, d, generator=generator, requires_grad=True) for d in (3, 6)]
    teachers = [torch.randn(5, d, generator=generator) for d in (3, 6)]
    losses = torch.stack([(student @ p - t).square().mean(1) for p, t in zip(bank, teachers, strict=True)])
    weights = GradientWeighting()(losses, student=student, teachers=teachers, targets={})
    g = [(2 / t.shape[1] * (student @ p - t) @ p.T).detach().flatten() for p, t in zip(bank, teachers, strict=True)]
    first = ((g[1] - g[0]) @ g[1] / (g[0] - g[1]).square().sum()).clamp(0, 1)
    torch.testing.assert_close(weights, torch.stack([first, 1 - first])[:, None].expand(2, 5), atol=1e-4, rtol=1e-4)
    assert student.grad is None
    assert bank[0].grad is None
    (weights * losses).sum().backward()
    assert bank[0].grad.abs().sum() > 0


def test_what_a_useless_and_a_finished_teacher_weigh() -> None:
    near, far, same = torch.full((B, D), 0.5), torch.full((B, D), -9.0), torch.zeros(B, D)
    student = torch.zeros(B, D, requires_grad=True)

    def weigh(weighting: GradientWeighting, *teachers: Tensor) -> list[float]:
        losses = torch.stack([(student - each).square().mean(1) for each in teachers])
        found: list[float] = weighting(losses, student=student, teachers=teachers, targets={})[:, 0].tolist()
        return found

    assert weigh(GradientWeighting(), near, far)[1] < 0.1
    # The student equals the second: nothing is left to gain there, and it takes all unless it is bounded.
    assert weigh(GradientWeighting(), near, same) == pytest.approx([0.0, 1.0], abs=1e-6)
    assert weigh(GradientWeighting(most=0.6), near, same) == pytest.approx([0.4, 0.6])
    assert weigh(GradientWeighting(), same, same, same) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("k", [2, 3])
def test_equal_gradients_of_any_size_share_alike(k: int) -> None:
    # A matrix product in float32 may round the entries of one row against itself otherwise than against its twin.
    generator = torch.Generator().manual_seed(3)
    for size in (7, 33, 512, 3001):
        student = torch.randn(5, size, generator=generator).requires_grad_()
        teachers = [torch.randn(5, size, generator=generator)] * k
        losses = torch.stack([(student - each).square().mean(1) for each in teachers])
        weights = GradientWeighting()(losses, student=student, teachers=teachers, targets={})
        torch.testing.assert_close(weights, torch.full((k, 5), 1 / k), rtol=0, atol=1e-6)


def test_no_graph_and_gradients_that_are_not_finite_give_uniform_weights() -> None:
    losses, rest = face([torch.zeros(B, D), torch.ones(B, D)])
    even = torch.full((2, B), 0.5)
    weighting = GradientWeighting()
    assert not torch.equal(weighting(losses, **rest), even)
    assert torch.equal(weighting(losses.detach(), **rest), even)
    with torch.no_grad():
        assert torch.equal(weighting(losses.detach(), **rest), even)
    assert torch.equal(weighting(losses, **{**rest, "student": torch.zeros(B, D)}), even)
    assert torch.equal(weighting(losses * torch.tensor([[1.0], [math.inf]]), **rest), even)
    far = torch.tensor([[1e30], [2e30]])
    assert torch.isfinite(weighting(losses * far, **rest)).all()
    # Losses that do not hang on the student have no gradient there: as a teacher that the student equals.
    apart = torch.stack([losses[0], torch.ones(B, requires_grad=True) * 2])
    assert weighting(apart, **rest)[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_most_must_leave_room() -> None:
    losses, rest = face([torch.zeros(B, D), torch.ones(B, D)])
    with pytest.raises(ValueError, match=r"^GradientWeighting: most must be >= 1 / k for k = 2 teachers, got 0.4"):
        GradientWeighting(most=0.4)(losses, **rest)
    for most in (0, 1.5):
        with pytest.raises(ValueError, match=r"^GradientWeighting: most must be a finite number and > 0 and <= 1"):
            GradientWeighting(most=most)


# Gates.


def learn(gate: GateWeighting, losses: Tensor, student: Tensor, steps: int = 200) -> Tensor:
    optimizer = torch.optim.Adam(gate.parameters(), 0.05)
    for _ in range(steps):
        weights = gate(losses, student=student, teachers=[], targets={})
        optimizer.zero_grad()
        (weights * losses).sum(0).mean().backward()
        optimizer.step()
    found: Tensor = gate(losses, student=student, teachers=[], targets={}).detach()
    return found


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_gate_follows_another_teacher_in_another_place(hidden: int | None) -> None:
    torch.manual_seed(0)
    student = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    left = student[:, 0] < 0
    losses = torch.stack([torch.where(left, 0.1, 1.0), torch.where(left, 1.0, 0.1), torch.full((32,), 2.0)])
    weights = learn(GateWeighting(5, 3, hidden=hidden), losses, student)
    right = torch.where(left, weights[0], weights[1])
    assert right.mean() > 0.85
    assert weights[2].mean() < 0.05


def test_the_floor_holds_and_the_temperature_slows() -> None:
    student = torch.ones(2, 3)
    losses = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    floored = learn(GateWeighting(3, 2, floor=0.2), losses, student)
    torch.testing.assert_close(floored[1], torch.full((2,), 0.2), atol=5e-3, rtol=0)
    slow = learn(GateWeighting(3, 2, temperature=20.0), losses, student, steps=20)
    fast = learn(GateWeighting(3, 2, temperature=1.0), losses, student, steps=20)
    assert fast[0, 0] > slow[0, 0] > 0.5
    even = GateWeighting(3, 2, floor=0.5)(losses, student=student, teachers=[], targets={})
    torch.testing.assert_close(even, torch.full((2, 2), 0.5))


def test_the_gate_is_gradchecked_and_sends_nothing_to_the_student() -> None:
    gate = GateWeighting(3, 2, hidden=4, temperature=0.7, floor=0.1).double()
    for parameter in gate.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    student = torch.randn(4, 3, generator=torch.Generator().manual_seed(4)).requires_grad_()
    names, values = zip(*gate.named_parameters(), strict=True)

    def call(*parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        rest = {"student": student, "teachers": [], "targets": {}}
        return torch.func.functional_call(gate, given, (torch.zeros(2, 4, dtype=torch.float64),), rest)

    assert torch.autograd.gradcheck(call, [value.detach().requires_grad_() for value in values])
    call(*values).sum().backward()
    assert student.grad is None


def test_a_gate_reads_maps_by_their_mean_and_nothing_of_their_length() -> None:
    gate = GateWeighting(3, 2)
    nn.init.normal_(gate.out.weight, generator=torch.Generator().manual_seed(3))
    maps = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(4))
    rest = {"teachers": [], "targets": {}}
    weights = gate(torch.zeros(2, 4), student=maps, **rest)
    torch.testing.assert_close(weights, gate(torch.zeros(2, 4), student=1e-3 * maps.mean((2, 3)), **rest))
    assert weights.std() > 0.01
    half = copy.deepcopy(gate).half()(torch.zeros(2, 4, dtype=torch.float16), student=maps.half(), **rest)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), weights, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 2), {}, "student_dim must be a whole number and >= 1, got 0"),
        ((3, 0), {}, "num_teachers must be a whole number and >= 1, got 0"),
        ((3, 2), {"hidden": 0}, "hidden must be a whole number and >= 1, got 0"),
        ((3, 2), {"temperature": 0.0}, "temperature must be a finite number and > 0, got 0.0"),
        ((3, 2), {"floor": 0.6}, r"floor must be a finite number and >= 0 and <= 0.5, got 0.6"),
    ],
)
def test_a_gate_refuses(arguments: tuple[int, int], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GateWeighting: {message}"):
        GateWeighting(*arguments, **options)


def test_learned_weightings_name_what_does_not_fit() -> None:
    losses, rest = face([torch.zeros(B, D)] * 2)
    for weighting in (GateWeighting(D, 3), UncertaintyWeighting(3)):
        with pytest.raises(ValueError, match=r"losses must be \(k, b\) with k = 3, got \(2, 4\)"):
            weighting(losses, **rest)
    with pytest.raises(
        ValueError, match=r"^GateWeighting: student must be \(b, d\) with b = 4 and d = 5, got \(4, 3\)"
    ):
        GateWeighting(5, 2)(losses, **rest)
    with pytest.raises(ValueError, match=r"^UncertaintyWeighting: num_teachers must be a whole number and >= 1, got 0"):
        UncertaintyWeighting(0)
