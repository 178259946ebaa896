"""Losses of maps and embeddings by their direction or energy: values by hand, grids, properties."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdlib import AttentionTransferLoss
from kdlib.functional import (
    activation_boundary,
    angular_distill,
    attention_map,
    attention_transfer,
    attentive_similarity,
    channel_attention_map,
    hint,
    nst,
)  # fmt: skip
from kdlib.losses.features import _energy
from tests.core import reference_features as reference
from tests.core.loss_inputs import noise


def maps(seed: int = 0, batch: int = 5, side: int = 6) -> tuple[Tensor, Tensor]:
    return noise(batch, 3, side, side, seed=seed), noise(batch, 3, side, side, seed=seed + 1)


def pair(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return noise(*shape, seed=seed, dtype=dtype).requires_grad_(), noise(*shape, seed=seed + 1, dtype=dtype)


def rows(seed: int = 0) -> tuple[Tensor, Tensor]:
    return noise(4, 5, seed=seed), noise(4, 5, seed=seed + 1)


seeds, scales = st.integers(0, 2**31 - 2), st.floats(1e-6, 1e6)
forms = st.sampled_from(["squared", "cosine", "chord", "angle"])


# Angular distillation.


@pytest.mark.parametrize(
    ("form", "expected"), [("squared", 0.25), ("cosine", 0.5), ("chord", 1.0), ("angle", 1.0471975512)]
)
def test_angular_at_sixty_degrees(form: str, expected: float) -> None:
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.5 * math.sqrt(3)]])
    assert angular_distill(student, teacher, form=form).item() == pytest.approx(expected, rel=1e-6)


def test_angular_flattens_feature_maps() -> None:
    student, teacher = maps()
    expected = angular_distill(student.flatten(1), teacher.flatten(1))
    assert torch.equal(angular_distill(student, teacher), expected)


@settings(max_examples=40)
@given(seed=seeds, a=scales, b=scales, form=forms)
def test_angular_ignores_length(seed: int, a: float, b: float, form: str) -> None:
    student, teacher = rows(seed)
    scaled = angular_distill(a * student, b * teacher, form=form, reduction="none")
    torch.testing.assert_close(scaled, angular_distill(student, teacher, form=form, reduction="none"))


@settings(max_examples=40)
@given(seed=seeds)
def test_angular_forms_agree(seed: int) -> None:
    student, teacher = rows(seed)
    each = {
        form: angular_distill(student, teacher, form=form, reduction="none")
        for form in ("squared", "cosine", "chord", "angle")
    }
    torch.testing.assert_close(each["squared"], each["cosine"] ** 2)
    torch.testing.assert_close(each["chord"], 2 * each["cosine"])
    torch.testing.assert_close(1 - each["angle"].cos(), each["cosine"])
    assert (each["angle"] >= 0).all()
    assert (each["angle"] <= math.pi).all()


@settings(max_examples=30)
@given(seed=seeds, form=forms)
def test_angular_ignores_a_common_rotation_and_is_symmetric(seed: int, form: str) -> None:
    student, teacher = rows(seed)
    rotation = torch.linalg.qr(noise(5, 5, seed=seed)).Q
    value = angular_distill(student, teacher, form=form)
    torch.testing.assert_close(angular_distill(student @ rotation, teacher @ rotation, form=form), value)
    torch.testing.assert_close(angular_distill(teacher, student, form=form), value)


def test_hint_is_mse_loss() -> None:
    student, teacher = maps()
    torch.testing.assert_close(hint(student, teacher), F.mse_loss(student, teacher))
    assert hint(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), reduction="none").tolist() == [1.0, 9.0]


@settings(max_examples=30)
@given(seed=seeds, a=st.floats(0.01, 100))
def test_hint_scales_as_the_square(seed: int, a: float) -> None:
    student, teacher = rows(seed)
    torch.testing.assert_close(hint(a * student, a * teacher), a**2 * hint(student, teacher))


# Attention transfer.


def test_attention_of_three_four_five() -> None:
    student = torch.tensor([[[[3.0, 2.0]]]]).sqrt()  # map (3, 2)
    teacher = torch.tensor([[[[4.0, 3.0]]]]).sqrt()  # map (4, 3), norm 5
    expected = 2 - 2 * (4 * 3 + 3 * 2) / (5 * math.sqrt(13))
    assert attention_transfer(student.double(), teacher.double()).item() == pytest.approx(expected, rel=1e-6)


def test_attention_map_against_reference() -> None:
    features = noise(2, 3, 4, 5)
    for p in (1, 2, 2.5, 3):
        expected = reference.attention_map(features.numpy(), p)
        np.testing.assert_allclose(attention_map(features, p).numpy(), expected, rtol=1e-12)
    assert attention_map(features.half()).dtype == torch.float32


@pytest.mark.parametrize("teacher_grid", [(8, 8), (7, 5), (2, 9), (3, 3), (1, 1)])
def test_attention_of_different_grids(teacher_grid: tuple[int, int]) -> None:
    student, teacher = noise(2, 3, 4, 6), noise(2, 5, *teacher_grid, seed=1)
    got = attention_transfer(student, teacher, reduction="none")
    expected = reference.attention_transfer(student.numpy(), teacher.numpy())
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-14)
    swapped = attention_transfer(teacher, student, reduction="none")
    torch.testing.assert_close(swapped, got)


def test_attention_of_other_layouts_equals_that_of_channels_first() -> None:
    student, teacher = noise(2, 3, 4, 4), noise(2, 5, 8, 8, seed=1)
    expected = attention_transfer(student, teacher)
    prefix = noise(2, 5, 5, seed=2)
    tokens, few = teacher.flatten(2).mT, student.flatten(2).mT
    for case, sides, options in (
        ("maps of both", (attention_map(student), attention_map(teacher)), {"layout": "bhw"}),
        ("map of the teacher", (student, attention_map(teacher)), {"teacher_layout": "bhw"}),
        ("map of the student", (attention_map(student), teacher), {"student_layout": "bhw"}),
        ("channels last", (student.movedim(1, 3), teacher.movedim(1, 3)), {"layout": "bhwc"}),
        ("one of them", (student.movedim(1, 3), teacher), {"student_layout": "bhwc"}),
        ("tokens", (few, tokens), {"layout": "bnd", "prefix_tokens": 0}),
        ("tokens counted", (student, tokens), {"teacher_layout": "bnd"}),
        ("class token", (teacher.clone(), torch.cat([prefix[:, :1], tokens], 1)), {"teacher_layout": "bnd"}),
        (
            "registers",
            (student, torch.cat([prefix, tokens], 1)),
            {"teacher_layout": "bnd", "teacher_prefix_tokens": 5},
        ),
        (
            "told",
            (few, torch.cat([prefix, tokens], 1)),
            {"layout": "bnd", "prefix_tokens": 5, "student_prefix_tokens": 0},
        ),
    ):
        value, wanted = attention_transfer(*sides, **options), expected if case != "class token" else torch.zeros(())
        torch.testing.assert_close(value, wanted.to(value), msg=lambda m, case=case: f"{case}: {m}")
        torch.testing.assert_close(AttentionTransferLoss(**options)(*sides), value)
        if case != "maps of both":
            assert torch.autograd.gradcheck(
                lambda s, t=sides[1], o=options: attention_transfer(s, t, **o),
                sides[0].requires_grad_(),
                fast_mode=True,
            )
    torch.testing.assert_close(attention_map(student.movedim(1, 3), layout="bhwc"), attention_map(student))
    with_prefix = torch.cat([prefix[:, :1, :3], few], 1)
    torch.testing.assert_close(attention_map(with_prefix, layout="bnd", prefix_tokens=1), attention_map(student))
    # A grid that is not square: that of the map on the other side, or of as many tokens.
    wide, narrow = noise(2, 5, 3, 5), noise(2, 7, 3, 5, seed=1)
    expected = attention_transfer(wide, narrow)
    options = {"teacher_layout": "bnd", "teacher_prefix_tokens": 0}
    torch.testing.assert_close(attention_transfer(wide, narrow.flatten(2).mT, **options), expected)
    both = (x.flatten(2).mT for x in (wide, narrow))
    torch.testing.assert_close(attention_transfer(*both, layout="bnd", prefix_tokens=0), expected)


@settings(max_examples=30)
@given(seed=seeds, a=scales, p=st.sampled_from([1, 2, 3.5]))
def test_attention_ignores_scale_sign_and_channel_order(seed: int, a: float, p: float) -> None:
    student, teacher = maps(seed, 2, 4)
    value = attention_transfer(student, teacher, p=p)
    torch.testing.assert_close(attention_transfer(-a * student, teacher, p=p), value)
    torch.testing.assert_close(attention_transfer(student.flip(1), teacher, p=p), value)
    assert 0 <= value.item() <= 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 5, 400])
def test_attention_equals_the_plain_form(batch: int, layout: torch.memory_format, monkeypatch: Any) -> None:
    """400 samples of 3 * 16 * 16 need several chunks."""
    shape = (batch, 3, 16, 16)
    student, teacher = (x.detach().to(memory_format=layout) for x in pair(shape, batch, torch.float32))
    student.requires_grad_()
    assert batch < 400 or _energy._chunk_size(student) < batch
    normalized = [F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher)]
    expected = (normalized[0] - normalized[1]).square().sum(1).mean()  # public code, as a sum over positions
    got = attention_transfer(student, teacher)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, student)[0], torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-8
    )
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(attention_transfer(student, teacher), got)


def test_attention_of_half_features_has_the_gradient_of_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = pair((3, 4, 5, 5), 1, dtype)
        wide = student.detach().float().requires_grad_()
        value, expected = attention_transfer(student, teacher), attention_transfer(wide, teacher.float())
        assert value.item() == expected.item()
        value.backward()
        expected.backward()
        assert torch.equal(student.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("loss", [attention_transfer, attentive_similarity])
def test_energies_save_only_the_features(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = pair((2, 8, 6, 6), 2, torch.float32)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss(student, teacher)
    large = [x for x in kept if x.numel() >= student.numel()]
    assert large
    assert all(x.data_ptr() == student.data_ptr() for x in large)


# Neuron selectivity and attentive similarity.


@pytest.mark.parametrize(
    ("shape", "teacher_shape"),
    [
        ((3, 2, 4, 5), (3, 3, 4, 5)),  # fewer channels than places
        ((3, 9, 2, 2), (3, 7, 2, 2)),  # more
        ((3, 4, 6, 5), (3, 3, 3, 7)),  # other grids
        ((3, 12, 2, 3), (3, 5, 4, 4)),
        ((2, 3, 1, 1), (2, 4, 1, 1)),
    ],
)
def test_nst_equals_the_naive_reference(shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    student, teacher = pair(shape)[0], pair(teacher_shape, 1)[1]
    got = nst(student, teacher, layout="bchw", reduction="none")
    expected = reference.nst(student.detach().numpy(), teacher.numpy())
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-13)
    assert torch.autograd.gradcheck(lambda s: nst(s, teacher, layout="bchw"), (student,))


def test_nst_of_orthogonal_and_half_shared_channels() -> None:
    """Orthogonal unit maps a and b: student (a, b), teacher (a). 1 + 2/4 - 2 * 1/2 = 1/2."""
    a, b = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    student = torch.cat([a, b]).reshape(1, 2, 2, 2)
    assert nst(student, a.reshape(1, 1, 2, 2)).item() == pytest.approx(0.5, rel=1e-6)
    assert nst(student, student.flip(1)).item() == 0.0


def test_nst_pools_features_at_the_end_of_float32() -> None:
    large = torch.full((1, 1, 4, 4), 3e38, requires_grad=True)
    value = nst(large, torch.ones(1, 1, 2, 2))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(large.grad).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), channels=st.integers(1, 6), side=st.integers(1, 4), a=st.floats(1e-6, 1e6))
def test_nst_ignores_scale_sign_and_channel_order(seed: int, channels: int, side: int, a: float) -> None:
    student, teacher = pair((2, channels, side, side), seed)
    value = nst(student, teacher, reduction="none")
    torch.testing.assert_close(nst(-a * student.flip(1), teacher, reduction="none"), value)
    torch.testing.assert_close(nst(teacher, student, reduction="none"), value)
    assert (value > -1e-12).all()
    assert (value <= 2 + 1e-12).all()


def test_attentive_similarity_of_maps_that_are_not_square_has_the_gradient_of_float64() -> None:
    student, teacher = noise(3, 4, 2, 5).requires_grad_(), noise(3, 4, 2, 5, seed=1)
    (exact,) = torch.autograd.grad(attentive_similarity(student, teacher), student)
    assert torch.autograd.gradcheck(lambda s: attentive_similarity(s, teacher), (student,))
    narrow = student.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(attentive_similarity(narrow, teacher.float()), narrow)
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-6)


def test_activation_boundary_of_a_teacher_at_zero_wants_no_activation() -> None:
    assert activation_boundary(torch.tensor([[0.5]]), torch.zeros(1, 1), margin=1.0).item() == 2.25


def test_nst_takes_the_layout_of_both_sides_or_of_one() -> None:
    student, teacher = noise(2, 3, 4, 5), noise(2, 3, 4, 5, seed=1)
    last = [x.movedim(1, 3) for x in (student, teacher)]
    expected = nst(student, teacher)
    torch.testing.assert_close(nst(*last, layout="bhwc"), expected)
    torch.testing.assert_close(nst(last[0], teacher, student_layout="bhwc", teacher_layout="bchw"), expected)


@pytest.mark.parametrize("options", [{}, {"channel": 0.5, "spatial": 2.0}, {"channel": 0.0}, {"spatial": 0}])
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (2, 9)])
def test_attentive_similarity_equals_the_naive_reference(options: dict[str, float], grid: tuple[int, int]) -> None:
    student, teacher = pair((3, 4, 4, 4))[0], pair((3, 4, *grid), 1)[1]
    got = attentive_similarity(student, teacher, **options, reduction="none")
    expected = reference.attentive_similarity(student.detach().numpy(), teacher.numpy(), **options)
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-13)
    assert torch.autograd.gradcheck(lambda s: attentive_similarity(s, teacher, **options), (student,))


def test_attentive_similarity_of_three_four_five() -> None:
    """Channel energies (3, 4) against (4, 3), at one place: cosine 24/25; the spatial maps are one number each."""
    student = torch.tensor([3.0, 4.0], dtype=torch.float64).sqrt().reshape(1, 2, 1, 1)
    value = attentive_similarity(student, student.flip(1))
    assert value.item() == pytest.approx(1 / 25, rel=1e-12)
    spatial = student.reshape(1, 1, 1, 2)
    assert attentive_similarity(spatial, spatial.flip(3), spatial=0.5).item() == pytest.approx(0.5 / 25, rel=1e-12)


def test_channel_attention_map_against_reference() -> None:
    features = pair((2, 3, 4, 5))[1]
    expected = reference.channel_attention_map(features.numpy())
    np.testing.assert_allclose(channel_attention_map(features).numpy(), expected, rtol=1e-12)
    assert channel_attention_map(features.half()).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"^channel_attention_map: features must be \(b, c, h, w\) or \(b, h, w, c\), got \(3, 4, 5\)"
    ):
        channel_attention_map(features[0])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), a=st.floats(1e-6, 1e6))
def test_attentive_similarity_ignores_scale_and_sign(seed: int, a: float) -> None:
    student, teacher = pair((2, 3, 3, 3), seed)
    value = attentive_similarity(student, teacher, reduction="none")
    torch.testing.assert_close(attentive_similarity(-a * student, teacher, reduction="none"), value)
    torch.testing.assert_close(attentive_similarity(teacher, student, reduction="none"), value)
    assert (value >= 0).all()
    assert (value <= 2).all()
