"""Angular distillation, attention transfer, hint and soft targets: naive references, values by hand, properties.

The contract that all losses share is in `test_contracts`.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kdlib
import kdlib.functional as functional
import kdlib.losses
from tests.core import reference_losses as reference


@dataclass(frozen=True)
class Case:
    """Function, shape, hyper-parameters and errors of a loss."""

    function: str
    shape: tuple[int, ...]
    settings: tuple[dict[str, Any], ...]
    bad: tuple[tuple[dict[str, Any], type[Exception], str], ...]


CASES = {
    "AngularDistillLoss": Case(
        "angular_distill",
        (5, 6),
        ({}, {"form": "cosine"}, {"form": "chord"}, {"form": "angle"}),
        (({"form": "sine"}, ValueError, r"form must be one of 'squared', 'cosine', 'chord', 'angle', got 'sine'"),),
    ),
    "AttentionTransferLoss": Case(
        "attention_transfer",
        (5, 3, 4, 4),
        ({}, {"p": 1}, {"p": 3.0}),
        (
            ({"p": 0.5}, ValueError, r"p must be a finite number and >= 1, got 0\.5"),
            ({"p": "2"}, TypeError, r"p must be a finite number and >= 1, got '2'"),
        ),
    ),
    "HintLoss": Case("hint", (5, 6), ({},), ()),
    "SoftTargetLoss": Case(
        "soft_target",
        (5, 6),
        ({}, {"temperature": 1.0}),
        (
            ({"temperature": 0}, ValueError, r"temperature must be a finite number and > 0, got 0"),
            ({"temperature": math.nan}, TypeError, r"temperature must be a finite number and > 0, got nan"),
        ),
    ),
}


every_case = pytest.mark.parametrize(
    ("module", "case"), [pytest.param(getattr(kdlib.losses, name), case, id=name) for name, case in CASES.items()]
)


def pair(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    return student, torch.randn(shape, generator=generator, dtype=dtype)


@every_case
def test_equals_the_naive_reference(module: type[nn.Module], case: Case) -> None:
    student, teacher = pair(case.shape)
    for options in case.settings:
        expected = getattr(reference, case.function)(student.detach().numpy(), teacher.numpy(), **options)
        got = module(**options, reduction="none")(student, teacher)
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@every_case
def test_function_and_module_agree(module: type[nn.Module], case: Case) -> None:
    student, teacher = pair(case.shape, 1)
    weight = torch.rand(5, generator=torch.Generator().manual_seed(1))
    function = getattr(functional, case.function)
    for options in case.settings:
        for reduction in ("mean", "none"):
            expected = function(student, teacher, **options, reduction=reduction, weight=weight)
            assert torch.equal(module(**options, reduction=reduction)(student, teacher, weight=weight), expected)
            assert torch.equal(module(**options)(student, teacher, weight=weight, reduction=reduction), expected)


@every_case
def test_is_zero_for_equal_and_positive_for_other(module: type[nn.Module], case: Case) -> None:
    student, teacher = pair(case.shape, 2)
    for options in case.settings:
        loss = module(**options, reduction="none")
        assert torch.equal(loss(student, student.detach().clone()), torch.zeros(5, dtype=torch.float64))
        assert (loss(student, teacher) > 0).all()


@every_case
def test_samples_are_independent(module: type[nn.Module], case: Case) -> None:
    student, teacher = pair(case.shape, 6)
    order = torch.tensor([3, 0, 4, 1, 2])
    loss = module(reduction="none")
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher)[order])
    torch.testing.assert_close(loss(student[1:2], teacher[1:2]), loss(student, teacher)[1:2])


@every_case
def test_hyper_parameters_are_keywords(module: type[nn.Module], case: Case) -> None:
    taken = [p for name, p in inspect.signature(module.__init__).parameters.items() if name != "self"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in taken)
    call = inspect.signature(module.forward).parameters
    assert list(call)[1:3] == ["student", "teacher"]
    assert call["weight"].kind is call["weight"].KEYWORD_ONLY
    assert module.per_sample is True


@every_case
def test_bad_arguments_are_named(module: type[nn.Module], case: Case) -> None:
    owner = case.function
    student, teacher = pair(case.shape, 13)
    with pytest.raises(ValueError, match=rf"^{module.__name__}: reduction must be one of 'mean', 'none', got 'sum'"):
        module(reduction="sum")
    with pytest.raises(ValueError, match=rf"^{owner}: reduction must be one of 'mean', 'none', got 'sum'"):
        module()(student, teacher, reduction="sum")
    with pytest.raises(ValueError, match=rf"^{owner}: weight must be \(b,\) = \(5,\), got \(4,\)"):
        module()(student, teacher, weight=torch.ones(4))
    with pytest.raises(TypeError, match=rf"^{owner}: weight must be a torch.Tensor, got list"):
        module()(student, teacher, weight=[1.0] * 5)
    with pytest.raises(TypeError, match=rf"^{owner}: teacher must be a floating-point tensor, got torch.int64"):
        module()(student, teacher.long())
    with pytest.raises(TypeError, match=rf"^{owner}: student must be a torch.Tensor, got ndarray"):
        module()(student.detach().numpy(), teacher)
    with pytest.raises(ValueError, match=rf"^{owner}: teacher must "):
        module()(student, teacher[:4])
    for options, error, message in case.bad:
        with pytest.raises(error, match=f"^{module.__name__}: {message}"):
            module(**options)
        with pytest.raises(error, match=f"^{owner}: {message}"):
            getattr(functional, owner)(student, teacher, **options)


@every_case
def test_compiles_whole(module: type[nn.Module], case: Case) -> None:
    student, teacher = pair(case.shape, 14)
    loss = module()
    compiled = torch.compile(lambda s, t: loss(s, t), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))


# Values derived by hand.


@pytest.mark.parametrize(
    ("form", "expected"), [("squared", 0.25), ("cosine", 0.5), ("chord", 1.0), ("angle", 1.0471975512)]
)
def test_angular_at_sixty_degrees(form: str, expected: float) -> None:
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.5 * math.sqrt(3)]])
    assert functional.angular_distill(student, teacher, form=form).item() == pytest.approx(expected, rel=1e-6)


def test_attention_of_three_four_five() -> None:
    student = torch.tensor([[[[3.0, 2.0]]]]).sqrt()  # map (3, 2)
    teacher = torch.tensor([[[[4.0, 3.0]]]]).sqrt()  # map (4, 3), norm 5
    expected = 2 - 2 * (4 * 3 + 3 * 2) / (5 * math.sqrt(13))
    assert functional.attention_transfer(student.double(), teacher.double()).item() == pytest.approx(expected, rel=1e-6)


def test_soft_target_of_even_against_three_to_one() -> None:
    # KL((3/4, 1/4) || (1/2, 1/2)) = log 2 - H(1/4) = 0.130812 nats, times T^2 = 4 at logits of T log 3.
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]], dtype=torch.float64)
    value = functional.soft_target(torch.zeros_like(teacher), teacher, temperature=2.0).item()
    assert value == pytest.approx(4 * 0.13081203594113694, rel=1e-12)


def test_hint_is_mse_loss() -> None:
    student, teacher = pair((5, 2, 3, 4))
    torch.testing.assert_close(functional.hint(student, teacher), nn.functional.mse_loss(student, teacher))
    assert functional.hint(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), reduction="none").tolist() == [1.0, 9.0]


def test_attention_map_against_reference() -> None:
    features = pair((2, 3, 4, 5))[0].detach()
    for p in (1, 2, 2.5, 4):
        expected = reference.attention_map(features.numpy(), p)
        np.testing.assert_allclose(functional.attention_map(features, p).numpy(), expected, rtol=1e-12)
    assert functional.attention_map(features.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^attention_map: features must be \(b, c, h, w\), got \(3, 4, 5\)"):
        functional.attention_map(features[0])
    with pytest.raises(ValueError, match=r"^attention_map: p must be a finite number and >= 1, got 0"):
        functional.attention_map(features, 0)


@pytest.mark.parametrize("teacher_grid", [(8, 8), (7, 5), (2, 9), (3, 3), (1, 1)])
def test_attention_of_different_grids(teacher_grid: tuple[int, int]) -> None:
    student, teacher = pair((2, 3, 4, 6))[0].detach(), pair((2, 5, *teacher_grid))[1]
    got = functional.attention_transfer(student, teacher, reduction="none")
    expected = reference.attention_transfer(student.numpy(), teacher.numpy())
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-14)
    swapped = functional.attention_transfer(teacher, student, reduction="none")
    torch.testing.assert_close(swapped, got)


def test_ready_attention_maps_are_accepted_on_either_side() -> None:
    student, teacher = pair((2, 3, 4, 4))[0].detach(), pair((2, 5, 6, 6))[1]
    expected = functional.attention_transfer(student, teacher)
    maps = functional.attention_map(student), functional.attention_map(teacher)
    torch.testing.assert_close(functional.attention_transfer(student, maps[1]), expected)
    torch.testing.assert_close(functional.attention_transfer(maps[0], teacher), expected)
    torch.testing.assert_close(functional.attention_transfer(*maps), expected)
    with pytest.raises(
        ValueError, match=r"^attention_transfer: teacher must be \(b, c, h, w\) or \(b, h, w\), got \(2, 9\)"
    ):
        functional.attention_transfer(student, torch.rand(2, 9))


def test_shape_errors_name_the_remedy() -> None:
    with pytest.raises(
        ValueError,
        match=r"^angular_distill: teacher must be \(b, d\) like student \(4, 128\), got \(4, 512\); project the student first$",
    ):
        functional.angular_distill(torch.rand(4, 128), torch.rand(4, 512))
    with pytest.raises(ValueError, match=r"^angular_distill: student must be \(b, d, ...\), got \(4,\)"):
        functional.angular_distill(torch.rand(4), torch.rand(4))
    with pytest.raises(ValueError, match=r"^soft_target: student must be \(b, c\), got \(4, 2, 3\)"):
        functional.soft_target(torch.rand(4, 2, 3), torch.rand(4, 2, 3))


def test_angular_flattens_feature_maps() -> None:
    student, teacher = pair((3, 2, 4, 5))
    expected = functional.angular_distill(student.flatten(1), teacher.flatten(1))
    assert torch.equal(functional.angular_distill(student, teacher), expected)


# Properties.

seeds = st.integers(0, 2**31 - 1)
scales = st.floats(1e-6, 1e6)
forms = st.sampled_from(["squared", "cosine", "chord", "angle"])


@settings(deadline=None, max_examples=40)
@given(seed=seeds, a=scales, b=scales, form=forms)
def test_angular_ignores_length(seed: int, a: float, b: float, form: str) -> None:
    student, teacher = pair((3, 5), seed)
    scaled = functional.angular_distill(a * student, b * teacher, form=form, reduction="none")
    torch.testing.assert_close(scaled, functional.angular_distill(student, teacher, form=form, reduction="none"))


@settings(deadline=None, max_examples=40)
@given(seed=seeds)
def test_angular_forms_agree(seed: int) -> None:
    student, teacher = pair((4, 3), seed)
    each = {
        form: functional.angular_distill(student, teacher, form=form, reduction="none")
        for form in ("squared", "cosine", "chord", "angle")
    }
    torch.testing.assert_close(each["squared"], each["cosine"] ** 2)
    torch.testing.assert_close(each["chord"], 2 * each["cosine"])
    torch.testing.assert_close(1 - each["angle"].cos(), each["cosine"])
    assert (each["angle"] >= 0).all()
    assert (each["angle"] <= math.pi).all()


@settings(deadline=None, max_examples=30)
@given(seed=seeds, form=forms)
def test_angular_ignores_a_common_rotation_and_is_symmetric(seed: int, form: str) -> None:
    student, teacher = pair((3, 4), seed)
    rotation = torch.linalg.qr(pair((4, 4), seed)[1]).Q
    value = functional.angular_distill(student, teacher, form=form)
    torch.testing.assert_close(functional.angular_distill(student @ rotation, teacher @ rotation, form=form), value)
    torch.testing.assert_close(functional.angular_distill(teacher, student, form=form), value)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, a=scales, p=st.sampled_from([1, 2, 3.5]))
def test_attention_ignores_scale_sign_and_channel_order(seed: int, a: float, p: float) -> None:
    student, teacher = pair((2, 3, 4, 4), seed)
    value = functional.attention_transfer(student, teacher, p=p)
    torch.testing.assert_close(functional.attention_transfer(-a * student, teacher, p=p), value)
    torch.testing.assert_close(functional.attention_transfer(student.flip(1), teacher, p=p), value)
    assert 0 <= value.item() <= 2


@settings(deadline=None, max_examples=30)
@given(seed=seeds, offset=st.floats(-100, 100), temperature=st.floats(0.5, 10))
def test_soft_target_ignores_offsets_and_is_never_negative(seed: int, offset: float, temperature: float) -> None:
    student, teacher = pair((3, 5), seed)
    value = functional.soft_target(student, teacher, temperature=temperature)
    moved = functional.soft_target(student + offset, teacher - offset, temperature=temperature)
    torch.testing.assert_close(moved, value)
    assert value.item() >= 0


@settings(deadline=None, max_examples=30)
@given(seed=seeds, a=st.floats(0.01, 100))
def test_hint_scales_as_the_square(seed: int, a: float) -> None:
    student, teacher = pair((3, 5), seed)
    torch.testing.assert_close(functional.hint(a * student, a * teacher), a**2 * functional.hint(student, teacher))


@settings(deadline=None, max_examples=30)
@given(seed=seeds, name=st.sampled_from(sorted(CASES)), weights=st.lists(st.floats(0, 10), min_size=5, max_size=5))
def test_weighted_mean_lies_among_the_losses(seed: int, name: str, weights: list[float]) -> None:
    case = CASES[name]
    student, teacher = pair(case.shape, seed)
    each = getattr(kdlib.losses, name)(reduction="none")(student, teacher)
    mean = getattr(kdlib.losses, name)()(student, teacher, weight=torch.tensor(weights, dtype=torch.float64))
    if sum(weights) == 0:
        assert mean.item() == 0
    else:
        kept = each[torch.tensor(weights, dtype=torch.float64) > 0]
        low, high = (kept.min().item(), kept.max().item()) if len(kept) else (0.0, 0.0)
        assert low - 1e-9 <= mean.item() <= high + 1e-9
