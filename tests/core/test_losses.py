"""All losses: naive references, Modules against functions, weights, compilers and function transforms.

The contract that losses share with those of users is in `test_contracts`.
"""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.core.loss_inputs import (
    HAND_WRITTEN,
    LOSSES,
    PER_SAMPLE,
    RELATIONS,
    each_function,
    each_loss,
    each_relation,
    function_of,
    gradient,
    noise,
    reference_of,
)  # fmt: skip

WEIGHT = torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_weights_may_have_another_type(name: str, dtype: torch.dtype) -> None:
    case, loss = LOSSES[name], function_of(name)
    student, teacher = case.sides(6)
    weight, targets = torch.tensor([1, 0, 4, 2, 1, 0]), case.targets(6)
    for reduction in ("none", "mean"):
        options = {"reduction": reduction, **targets}
        expected = loss(student, teacher, weight=weight.double(), **options)
        torch.testing.assert_close(loss(student, teacher, weight=weight.to(dtype), **options), expected)


@each_function
def test_equals_the_naive_reference(name: str) -> None:
    case, loss = LOSSES[name], function_of(name)
    student, teacher = case.sides(6)
    if name in RELATIONS and not name.startswith("dist"):
        teacher = noise(6, 4, seed=1)
    targets = case.targets(6)
    if name in PER_SAMPLE:
        expected = reference_of(name, student, teacher)
        got = loss(student, teacher, reduction="none", **targets)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-12)
        weighted = loss(student, teacher, reduction="none", weight=WEIGHT, **targets)
        torch.testing.assert_close(weighted, WEIGHT * got)
        torch.testing.assert_close(
            loss(student, teacher, weight=WEIGHT, **targets), (WEIGHT * got).sum() / WEIGHT.sum()
        )
        torch.testing.assert_close(loss(student, teacher, **targets), got.mean())
        return
    for weight in (None, WEIGHT, torch.full((6,), 0.25)):
        kept = slice(None) if weight is None else weight > 0
        expected = reference_of(name, student[kept], teacher[kept], None if weight is None else weight[kept])
        got = loss(student, teacher, weight=weight)
        assert got.dtype == torch.float64
        assert got.item() == pytest.approx(expected, rel=1e-10)
        single = loss(student.float(), teacher.float(), weight=weight)
        assert single.dtype == torch.float32
        assert single.item() == pytest.approx(got.item(), rel=1e-4)


@each_function
def test_the_module_is_the_function(name: str) -> None:
    case, loss = LOSSES[name], function_of(name)
    student, teacher = case.sides(6)
    options = {"weight": WEIGHT, **case.targets(6)}
    for reduction in ("mean", "none") if name in PER_SAMPLE else ("mean",):
        expected = loss(student, teacher, reduction=reduction, **options)
        assert torch.equal(case.build(reduction=reduction)(student, teacher, **options), expected)
        assert torch.equal(case.build()(student, teacher, reduction=reduction, **options), expected)
    if name in RELATIONS:
        assert torch.equal(loss(student, teacher, gather=True, **options), expected)  # in a single process


@each_loss
def test_hyper_parameters_are_keywords(name: str) -> None:
    case = LOSSES[name]
    constructor = list(inspect.signature(case.module).parameters.values())
    assert all(p.kind is p.KEYWORD_ONLY or p.default is p.empty for p in constructor)
    call = list(inspect.signature(case.module.forward).parameters.values())
    assert [p.name for p in call[1:3]] == ["student", "teacher"]
    assert all(p.kind is p.KEYWORD_ONLY for p in call[3:])
    assert case.build().per_sample == (name not in RELATIONS)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_samples_are_independent(name: str) -> None:
    case, loss = LOSSES[name], function_of(name)
    student, teacher = case.sides(seed=6)
    order, targets = torch.tensor([3, 0, 4, 1, 2]), case.targets(5)
    each = loss(student, teacher, reduction="none", **targets)
    assert (each >= 0).all()
    for rows in (order, slice(1, 2)):
        few = {key: x[rows] for key, x in targets.items()}
        torch.testing.assert_close(loss(student[rows], teacher[rows], reduction="none", **few), each[rows])
    if not name.startswith("activation_boundary"):
        equal = loss(student, student.clone(), reduction="none", **targets)
        torch.testing.assert_close(equal, torch.zeros_like(equal), rtol=0, atol=1e-15)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31 - 2),
    name=st.sampled_from(sorted(PER_SAMPLE)),
    weights=st.lists(st.floats(0, 10), min_size=5, max_size=5),
)
def test_weighted_mean_lies_among_the_losses(seed: int, name: str, weights: list[float]) -> None:
    case, loss = LOSSES[name], function_of(name)
    sides, weight, targets = case.sides(seed=seed), torch.tensor(weights, dtype=torch.float64), case.targets(5)
    kept = loss(*sides, reduction="none", **targets)[weight > 0]
    mean = loss(*sides, weight=weight, **targets).item()
    low, high = (kept.min().item(), kept.max().item()) if len(kept) else (0.0, 0.0)
    assert low - 1e-9 <= mean <= high + 1e-9


@each_relation
def test_masked_samples_of_any_size_have_no_influence(name: str) -> None:
    loss = function_of(name)
    kept = torch.tensor([True, False, True, True, False, True, True])
    student, teacher = noise(7, 3, dtype=torch.float32), noise(7, 4, seed=1, dtype=torch.float32)
    student[~kept] *= 1e30
    teacher[~kept] *= 1e-30
    for weight in (kept, kept.float(), 7e20 * kept.double(), 1e300 * kept.double()):
        masked = loss(student, teacher, weight=weight)
        torch.testing.assert_close(masked, loss(student[kept], teacher[kept]))
        slope = gradient(loss, student, teacher, weight=weight)
        torch.testing.assert_close(slope[kept], gradient(loss, student[kept], teacher[kept]))
        assert not slope[~kept].any()


@each_relation
def test_without_relations_the_loss_is_zero_with_a_graph(name: str) -> None:
    loss = function_of(name)
    cases = [(0, None), (1, None), (4, torch.zeros(4)), (4, torch.tensor([0.0, 3.0, 0.0, 0.0]))]
    if name.startswith("dark_rank"):  # an order needs three samples
        cases += [(2, None), (4, torch.tensor([0.0, 3.0, 0.0, 1.0]))]
    for batch, weight in cases:
        student, teacher = noise(batch, 3, dtype=torch.float32).requires_grad_(), noise(batch, 2, seed=1).float()
        value = loss(student, teacher, weight=weight)
        assert value.shape == ()
        assert value.item() == pytest.approx(0, abs=1e-12)
        value.backward()
        assert student.grad is not None
        assert student.grad.abs().sum() < 1e-6
    for student, teacher in ((torch.ones(4, 0), torch.ones(4, 2)), (torch.ones(4, 2), torch.ones(4, 0))):
        value = loss(student.requires_grad_(), teacher)
        assert value.item() == 0
        value.backward()


@each_loss
def test_gradients_with_weights_are_those_of_finite_differences(name: str) -> None:
    case = LOSSES[name]
    loss = case.build().double().eval()
    student, teacher = case.sides(6, seed=3)
    targets = case.targets(6)
    leaves = (student.requires_grad_(), *loss.parameters())
    assert torch.autograd.gradcheck(
        lambda s, *_: loss(s, teacher, weight=WEIGHT, **targets), leaves, fast_mode=True, atol=1e-6
    )


@each_loss
def test_gradients_of_function_transforms_and_second_derivatives(name: str) -> None:
    case = LOSSES[name]
    loss = case.build().double().eval()
    student, teacher = case.sides(4, seed=1)
    options: dict[str, Any] = {"weight": torch.tensor([1.0, 0.0, 0.3, 2.0], dtype=torch.float64), **case.targets(4)}

    def call(x: Tensor) -> Tensor:
        value: Tensor = loss(x, teacher, **options)
        return value

    found, value = torch.func.grad_and_value(call)(student)
    torch.testing.assert_close(value, call(student), rtol=0, atol=0)
    torch.testing.assert_close(found, gradient(call, student), rtol=1e-12, atol=1e-15)
    if name.startswith(HAND_WRITTEN):
        leaf = student.requires_grad_()
        (slope,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="this loss has a gradient, but no second derivative"):
            slope.square().sum().backward()
    else:
        assert torch.autograd.gradgradcheck(call, student.requires_grad_(), fast_mode=True)


# These are chunked, draw new masks in each call, or have a hand-written gradient or targets.
NO_VMAP = ("attention_transfer", "attentive_similarity", "decoupled_kd", "masked_generative", *HAND_WRITTEN)


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith(NO_VMAP) and "queue" not in name])
def test_vmap_over_batches(name: str) -> None:
    case = LOSSES[name]
    loss = case.build().double()
    (s1, t1), (s2, t2) = case.sides(4), case.sides(4, seed=2)
    each = torch.func.vmap(loss)(torch.stack([s1, s2]), torch.stack([t1, t2]))
    torch.testing.assert_close(each, torch.stack([loss(s1, t1), loss(s2, t2)]))
    w1, w2 = torch.tensor([1.0, 0.0, 0.3, 2.0]).double(), torch.tensor([0.5, 1.0, 1.0, 0.0]).double()
    call = torch.func.vmap(lambda s, t, w: loss(s, t, weight=w))
    each = call(torch.stack([s1, s2]), torch.stack([t1, t2]), torch.stack([w1, w2]))
    torch.testing.assert_close(each, torch.stack([loss(s1, t1, weight=w1), loss(s2, t2, weight=w2)]))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
def test_gradients_of_half_precision_are_those_of_single_precision(name: str, dtype: torch.dtype) -> None:
    case = LOSSES[name]
    student, teacher = (x.to(dtype) for x in case.sides(6, seed=5))
    loss, weight = case.build().eval(), torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7, 1.0])
    for options in ({}, {"weight": weight}):
        options = {**options, **case.targets(6)}
        expected = gradient(loss, student.float(), teacher.float(), **options)
        found = gradient(loss, student, teacher, **options)
        assert found.dtype == dtype
        size = expected.abs().max().item()
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.01 * size + 1e-7)
        assert size > 0
