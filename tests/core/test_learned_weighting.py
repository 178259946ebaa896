"""Weights from the gradients of the losses, from learned uncertainties and from a learned gate."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib.weighting import GateWeighting, GradientWeighting, UncertaintyWeighting
from tests.core.test_weighting import B, D, batch

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


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_loss_of_zero_keeps_the_log_variances_bounded(kind: type[torch.optim.Optimizer]) -> None:
    weighting = UncertaintyWeighting(2)
    optimizer = kind(weighting.parameters(), lr=0.1)

    def train(losses: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            weighting.penalty(losses).backward()
            optimizer.step()
        return weighting.log_variances.detach().clone()

    bounded = train(torch.tensor([[0.0], [1.0]]), 1000)
    assert -17 < float(bounded[0]) < -15
    assert abs(float(bounded[1])) < 0.1
    if kind is torch.optim.Adam:  # a plain gradient step from there has the length exp(16) times the loss
        rising = train(torch.tensor([[1e-4], [1.0]]), 500)
        assert float(rising[0]) == pytest.approx(math.log(1e-4), abs=0.3)


# Gradients.


def losses_with_gradients(vectors: np.ndarray) -> tuple[Tensor, dict[str, object]]:
    """Losses whose gradients at the student are these vectors, `(k, d)`."""
    student = torch.zeros(1, vectors.shape[1], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([(student * torch.from_numpy(each)).sum(1) for each in vectors])
    return losses, {"student": student, "teachers": [], "targets": {}}


def shortest(gram: np.ndarray, bound: float) -> float:
    """The minimum of `a G a`: each entry is tried at 0, at the bound, and free, and the optimum is among these."""
    k, minimum = len(gram), math.inf
    for kinds in itertools.product((0.0, bound, None), repeat=k):
        a = np.array([kind or 0.0 for kind in kinds])
        free = [i for i, kind in enumerate(kinds) if kind is None]
        if free:
            system = np.ones((len(free) + 1, len(free) + 1))
            system[:-1, :-1], system[-1, -1] = gram[np.ix_(free, free)], 0
            a[free] = np.linalg.lstsq(system, np.r_[-gram[free] @ a, 1 - a.sum()], rcond=None)[0][:-1]
        if abs(a.sum() - 1) < 1e-8 and a.min() > -1e-8 and a.max() < bound + 1e-8:
            minimum = min(minimum, float(a @ gram @ a))
    return minimum


vectors = st.integers(0, 2**31 - 1).map(lambda seed: np.random.default_rng(seed))


@settings(max_examples=30)
@given(rng=vectors, k=st.integers(2, 5), bound=st.sampled_from([1.0, 0.6]))
def test_the_combined_gradient_has_minimum_norm(rng: np.random.Generator, k: int, bound: float) -> None:
    g = rng.normal(size=(k, 4)) + rng.normal(size=4)
    losses, rest = losses_with_gradients(g)
    weights = GradientWeighting(max_weight=bound)(losses, **rest)[:, 0].numpy()
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    assert weights.max() <= bound
    gram = g @ g.T
    assert weights @ gram @ weights <= shortest(gram, bound) + 1e-6 * np.trace(gram)
    if bound == 1:  # a step along the combined gradient lowers every loss
        combined = weights @ g
        assert (g @ combined >= combined @ combined - 1e-4 * np.trace(gram)).all()


def test_opposing_gradients_cancel() -> None:
    losses, rest = losses_with_gradients(np.array([[-5.5, 0.0], [3.3, 1.0], [3.3, -1.0]]))
    weights = GradientWeighting()(losses, **rest)[:, 0]
    assert weights.tolist() == pytest.approx([0.375, 0.3125, 0.3125], abs=1e-5)


def test_a_useless_teacher_and_one_that_the_student_matches() -> None:
    near, far, same = torch.full((B, D), 0.5), torch.full((B, D), -9.0), torch.zeros(B, D)
    student = torch.zeros(B, D, requires_grad=True)

    def first_weights(weighting: GradientWeighting, *teachers: Tensor) -> list[float]:
        losses = torch.stack([(student - each).square().mean(1) for each in teachers])
        weights: list[float] = weighting(losses, student=student, teachers=teachers, targets={})[:, 0].tolist()
        return weights

    assert first_weights(GradientWeighting(), near, far)[1] < 0.1
    # The student matches the second teacher, which gets all the weight unless it is bounded.
    assert first_weights(GradientWeighting(), near, same) == pytest.approx([0.0, 1.0], abs=1e-6)
    assert first_weights(GradientWeighting(max_weight=0.6), near, same) == pytest.approx([0.4, 0.6])
    assert first_weights(GradientWeighting(), same, same, same) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("k", [2, 3])
def test_equal_gradients_of_any_size_have_equal_weights(k: int) -> None:
    # A matrix product in float32 can round the dot products of equal rows differently.
    generator = torch.Generator().manual_seed(3)
    for size in (7, 33, 512, 3001):
        student = torch.randn(5, size, generator=generator).requires_grad_()
        teachers = [torch.randn(5, size, generator=generator)] * k
        losses = torch.stack([(student - each).square().mean(1) for each in teachers])
        weights = GradientWeighting()(losses, student=student, teachers=teachers, targets={})
        torch.testing.assert_close(weights, torch.full((k, 5), 1 / k), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_gradients_that_are_equal_up_to_rounding_have_equal_weights(k: int) -> None:
    row = np.random.default_rng(0).normal(size=1000)
    losses, rest = losses_with_gradients(np.stack([row * (1 + 1e-9 * index) for index in range(k)]))
    assert GradientWeighting()(losses, **rest)[:, 0].tolist() == pytest.approx([1 / k] * k, abs=0.01)


def test_equal_teachers_beside_another_have_equal_weights() -> None:
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(5, 3001, generator=generator).requires_grad_()
    first, second = (torch.randn(5, 3001, generator=generator) for _ in range(2))
    teachers = [first, second, first]
    losses = torch.stack([(student - each).square().mean(1) for each in teachers])
    weights = GradientWeighting()(losses, student=student, teachers=teachers, targets={})[:, 0]
    assert weights[0].item() == pytest.approx(weights[2].item(), abs=1e-6)
    pair = GradientWeighting()(losses[:2], student=student, teachers=teachers[:2], targets={})[:, 0]
    assert weights[1].item() == pytest.approx(pair[1].item(), abs=1e-5)


def test_no_graph_and_gradients_that_are_not_finite_give_uniform_weights() -> None:
    losses, rest = batch([torch.zeros(B, D), torch.ones(B, D)])
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
    # Losses that do not depend on the student have no gradient, as with a teacher that the student matches.
    independent = torch.stack([losses[0], torch.ones(B, requires_grad=True) * 2])
    assert weighting(independent, **rest)[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_max_weight_must_be_at_least_one_over_k() -> None:
    losses, rest = batch([torch.zeros(B, D), torch.ones(B, D)])
    with pytest.raises(ValueError, match=r"^GradientWeighting: max_weight must be >= 1 / k for k = 2 .* got 0.4"):
        GradientWeighting(max_weight=0.4)(losses, **rest)
    for bound in (0, 1.5):
        with pytest.raises(
            ValueError, match=r"^GradientWeighting: max_weight must be a finite number and > 0 and <= 1"
        ):
            GradientWeighting(max_weight=bound)


# Gates.


def learn(gate: GateWeighting, losses: Tensor, student: Tensor, steps: int = 200) -> Tensor:
    optimizer = torch.optim.Adam(gate.parameters(), 0.05)
    for _ in range(steps):
        weights = gate(losses, student=student, teachers=[], targets={})
        optimizer.zero_grad()
        (weights * losses).sum(0).mean().backward()
        optimizer.step()
    weights: Tensor = gate(losses, student=student, teachers=[], targets={})
    return weights.detach()


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_gate_learns_different_teachers_in_different_regions(hidden: int | None) -> None:
    torch.manual_seed(0)
    student = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    left = student[:, 0] < 0
    losses = torch.stack([torch.where(left, 0.1, 1.0), torch.where(left, 1.0, 0.1), torch.full((32,), 2.0)])
    weights = learn(GateWeighting(5, 3, hidden=hidden), losses, student)
    right = torch.where(left, weights[0], weights[1])
    assert right.mean() > 0.85
    assert weights[2].mean() < 0.05


def test_the_floor_bounds_the_weights_and_the_temperature_slows_training() -> None:
    student = torch.ones(2, 3)
    losses = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    floored = learn(GateWeighting(3, 2, floor=0.2), losses, student)
    torch.testing.assert_close(floored[1], torch.full((2,), 0.2), atol=5e-3, rtol=0)
    slow = learn(GateWeighting(3, 2, temperature=20.0), losses, student, steps=20)
    fast = learn(GateWeighting(3, 2, temperature=1.0), losses, student, steps=20)
    assert fast[0, 0] > slow[0, 0] > 0.5
    even = GateWeighting(3, 2, floor=0.5)(losses, student=student, teachers=[], targets={})
    torch.testing.assert_close(even, torch.full((2, 2), 0.5))


def test_the_gate_passes_gradcheck_and_gives_the_student_no_gradient() -> None:
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


def test_a_gate_uses_the_direction_of_the_mean_of_a_map() -> None:
    gate = GateWeighting(3, 2)
    nn.init.normal_(gate.out.weight, generator=torch.Generator().manual_seed(3))
    maps = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(4))
    rest = {"teachers": [], "targets": {}}
    weights = gate(torch.zeros(2, 4), student=maps, **rest)
    torch.testing.assert_close(weights, gate(torch.zeros(2, 4), student=1e-3 * maps.mean((2, 3)), **rest))
    torch.testing.assert_close(weights, gate(torch.zeros(2, 4), student=maps.flatten(2), **rest))
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
def test_invalid_arguments_of_a_gate_are_errors(
    arguments: tuple[int, int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^GateWeighting: {message}"):
        GateWeighting(*arguments, **options)


def test_inputs_of_other_sizes_are_errors() -> None:
    losses, rest = batch([torch.zeros(B, D)] * 2)
    for weighting in (GateWeighting(D, 3), UncertaintyWeighting(3)):
        with pytest.raises(ValueError, match=r"losses must be \(k, b\) with k = 3, got \(2, 4\)"):
            weighting(losses, **rest)
    with pytest.raises(
        ValueError, match=r"^GateWeighting: student must be \(b, d\) with b = 4 and d = 5, got \(4, 3\)"
    ):
        GateWeighting(5, 2)(losses, **rest)
    with pytest.raises(ValueError, match=r"^UncertaintyWeighting: num_teachers must be a whole number and >= 1, got 0"):
        UncertaintyWeighting(0)
