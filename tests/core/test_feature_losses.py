"""NST, attentive similarity, variational information, contrastive representation, attention transfer.

Naive references, properties, values by hand and numerical edge cases. The shared contract is in `test_contracts`.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib.losses.features import _energy
from kdlib.losses.features.attention import AttentionTransferLoss, attention_transfer
from kdlib.losses.features.attentive_similarity import (
    AttentiveSimilarityLoss,
    attentive_similarity,
    channel_attention_map,
)
from kdlib.losses.features.contrastive_representation import ContrastiveRepresentationLoss, contrastive_representation
from kdlib.losses.features.hint import hint
from kdlib.losses.features.nst import NSTLoss, nst
from kdlib.losses.features.variational_information import VariationalInformationLoss, variational_information
from tests.core import reference_features as reference
from tests.core.loss_inputs import DTYPES, each_dtype, each_mode, few_edge_cases

MAP, VECTOR = (5, 3, 4, 4), (5, 6)


def pair(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
    return student, torch.randn(shape, generator=generator, dtype=dtype)


def seeded(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def vid(**options: Any) -> VariationalInformationLoss:
    return seeded(lambda: VariationalInformationLoss(3, 3, **options))


def vid_vector(**options: Any) -> VariationalInformationLoss:
    return seeded(lambda: VariationalInformationLoss(6, 6, **options))


def crd(**options: Any) -> ContrastiveRepresentationLoss:
    return seeded(lambda: ContrastiveRepresentationLoss(6, 6, feature_dim=4, **options))


# For each form: how to build the Module, the shape of its features, and its name in error messages.
FORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], str]] = {
    "attention": (AttentionTransferLoss, MAP, "attention_transfer"),
    "nst": (NSTLoss, MAP, "nst"),
    "attentive_similarity": (AttentiveSimilarityLoss, MAP, "attentive_similarity"),
    "variational_information": (vid, MAP, "VariationalInformationLoss"),
    "variational_information of vectors": (vid_vector, VECTOR, "VariationalInformationLoss"),
    "contrastive_representation": (crd, VECTOR, "ContrastiveRepresentationLoss"),
}
every_form = pytest.mark.parametrize("name", FORMS)


@every_form
def test_gradients_are_right(name: str) -> None:
    build, shape, _ = FORMS[name]
    loss = build().double()
    student, teacher = pair((3, *shape[1:]), 3)
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    learned = list(loss.parameters())
    assert torch.autograd.gradcheck(lambda s, *_: loss(s, teacher, weight=weight), (student, *learned))


@every_form
def test_gradients_of_gradients_are_right(name: str) -> None:
    build, shape, _ = FORMS[name]
    loss = build().double()
    student, teacher = pair((2, shape[1], *[2] * (len(shape) - 2)), 4)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), (student,))


@every_form
def test_parameters_of_any_dtype(name: str) -> None:
    build, shape, _ = FORMS[name]
    for dtype in DTYPES:
        student, teacher = pair(shape, 6, dtype)
        loss = build().to(dtype)
        value = loss(student, teacher)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        value.backward()
        assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


@every_form
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole(name: str, backend: str) -> None:
    build, shape, _ = FORMS[name]
    loss = build()
    student, teacher = pair(shape, 8, torch.float32)
    weight = torch.rand(5, generator=torch.Generator().manual_seed(8))
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, t: loss(s, t, weight=weight), fullgraph=True, backend=backend)
    expected, got = loss(student, teacher, weight=weight), compiled(student, teacher)
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got, student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])


@every_form
def test_bad_arguments_are_named(name: str) -> None:
    build, shape, owner = FORMS[name]
    module = type(build()).__name__
    student, teacher = pair(shape, 9)
    with pytest.raises(ValueError, match=rf"^{module}: reduction must be one of 'mean', 'none', got 'sum'"):
        build(reduction="sum")
    with pytest.raises(ValueError, match=r": reduction must be one of 'mean', 'none', got 'sum'"):
        build()(student, teacher, reduction="sum")
    with pytest.raises(ValueError, match=r": weight must be \(b,\) = \(5,\), got \(4,\)"):
        build()(student, teacher, weight=torch.ones(4))
    with pytest.raises(TypeError, match=rf"^{owner}: teacher must be a floating-point tensor, got torch.int64"):
        build()(student, teacher.long())
    with pytest.raises(TypeError, match=rf"^{owner}: student must be a torch.Tensor, got ndarray"):
        build()(student.detach().numpy(), teacher)
    with pytest.raises(ValueError, match=rf"^{owner}: teacher must "):
        build()(student, teacher[:4])
    with pytest.raises(ValueError, match=rf"^{owner}: student must be "):
        build()(student[:, :, None], teacher[:, :, None])
    call = inspect.signature(type(build()).forward).parameters
    assert list(call)[1:3] == ["student", "teacher"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in list(call.values())[3:])


# Numerical edge cases: zero rows in half precision, overflow, underflow.


def edge_cases(dtype: torch.dtype, *, vectors: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, sides in few_edge_cases(dtype).items():
        student, teacher = (x.to(dtype).reshape((-1, 12) if vectors else (-1, 3, 2, 2)) for x in sides)
        yield name, student.requires_grad_(), teacher.requires_grad_()


HARDENED: dict[str, Callable[[], Any]] = {
    "attention": AttentionTransferLoss,
    "nst": NSTLoss,
    "attentive_similarity": AttentiveSimilarityLoss,
    "attentive_similarity of channels": lambda: AttentiveSimilarityLoss(spatial=0.0),
    "variational_information": vid,
    "variational_information of a tiny variance": lambda: vid(initial_variance=1e-9, min_variance=1e-12),
    "variational_information of a variance of 1000": lambda: vid(initial_variance=1000),
    "contrastive_representation": lambda: seeded(lambda: ContrastiveRepresentationLoss(12, 12, feature_dim=4)),
    "contrastive_representation with a queue": lambda: seeded(
        lambda: ContrastiveRepresentationLoss(12, 12, feature_dim=4, queue_size=6)
    ),
}


# With a tiny variance, the gradient overflows float16; a loss scaler handles that.
HARDENED_DTYPES = [(n, dtype) for n in HARDENED for dtype in DTYPES if "tiny" not in n or dtype != torch.float16]


@each_mode
@pytest.mark.parametrize(("name", "dtype"), HARDENED_DTYPES, ids=lambda x: str(x).removeprefix("torch."))
def test_values_and_gradients_are_finite(name: str, dtype: torch.dtype, autocast: bool) -> None:
    tried = 0
    for trap, student, teacher in edge_cases(dtype, vectors="contrastive" in name):
        loss = HARDENED[name]()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = sum(loss(student, teacher) for _ in range(2))  # the second time against a queue, if there is one
        value.backward()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), trap
        assert math.isfinite(value.item()), trap
        assert student.grad.dtype == dtype, trap
        assert torch.isfinite(student.grad).all(), trap
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters()), trap
        assert teacher.grad is None, trap
        tried += 1
    assert tried == 19


@each_dtype
@pytest.mark.parametrize("name", [name for name in HARDENED if "tiny" not in name])
def test_the_largest_numbers_there_are(name: str, dtype: torch.dtype) -> None:
    """Sums in the mean network and in means over positions would overflow."""
    end = torch.finfo(dtype).max
    shape = (4, 3, 2, 2) if "contrastive" not in name else (4, 12)
    for teacher in (torch.full(shape, -end, dtype=dtype), torch.ones(shape, dtype=dtype)):
        student = torch.full(shape, end, dtype=dtype, requires_grad=True)
        loss = HARDENED[name]()
        value = sum(loss(student, teacher) for _ in range(2))
        value.backward()
        assert math.isfinite(value.item())
        assert torch.isfinite(student.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in loss.parameters())


@pytest.mark.parametrize("loss", [hint, lambda s, t: variational_information(s, t, variance=1e-9)])
def test_few_far_values_give_float16_a_gradient_that_it_holds(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    end = torch.finfo(torch.float16).max
    student = torch.tensor([[end, 1.0]], dtype=torch.float16, requires_grad=True)
    value = loss(student, torch.tensor([[-end, 1.0]], dtype=torch.float16))
    value.backward()
    assert value.item() == pytest.approx(loss(student.detach().float(), torch.tensor([[-end, 1.0]])).item())
    assert student.grad.tolist() == [[0.0, 0.0]]


@each_mode
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", [name for name in HARDENED if "tiny" not in name])
def test_values_are_those_of_float64(name: str, dtype: torch.dtype, autocast: bool) -> None:
    """Half-precision inputs give the value of float64 arithmetic on the same numbers."""
    for trap, student, teacher in edge_cases(dtype, vectors="contrastive" in name):
        loss = HARDENED[name]().eval()
        expected = loss(student.double(), teacher.double(), reduction="none").detach()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            got = loss(student, teacher, reduction="none").detach()
        torch.testing.assert_close(
            got.double(), expected, rtol=5e-5, atol=2e-5, msg=lambda m, trap=trap: f"{trap}: {m}"
        )


# Attention transfer: energies in chunks.


def peer_attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss in the form of public code, as a sum over positions."""
    maps = [nn.functional.normalize(f.pow(2).mean(1).flatten(1)) for f in (student, teacher)]
    return (maps[0] - maps[1]).square().sum(1).mean()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 5, 400])
def test_attention_equals_the_plain_form(batch: int, layout: torch.memory_format, monkeypatch: Any) -> None:
    """400 samples of 3 * 16 * 16 need several chunks."""
    shape = (batch, 3, 16, 16)
    student, teacher = (x.detach().to(memory_format=layout) for x in pair(shape, batch, torch.float32))
    student.requires_grad_()
    assert batch < 400 or _energy._chunk_size(student) < batch
    expected = peer_attention(student, teacher)
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


@pytest.mark.parametrize("loss", [attention_transfer, attentive_similarity])
def test_energies_work_with_function_transforms(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = pair((2, 3, 4, 4), 3)
    expected = torch.autograd.grad(loss(student, teacher), student)[0]
    torch.testing.assert_close(torch.func.grad(loss)(student.detach(), teacher), expected)


# NST.


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
    got = nst(student, teacher, reduction="none")
    expected = reference.nst(student.detach().numpy(), teacher.numpy())
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-13)
    assert torch.autograd.gradcheck(lambda s: nst(s, teacher), (student,))


def test_nst_of_orthogonal_and_half_shared_channels() -> None:
    """Orthogonal unit maps a and b: student (a, b), teacher (a). 1 + 2/4 - 2 * 1/2 = 1/2."""
    a, b = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    student = torch.cat([a, b]).reshape(1, 2, 2, 2)
    assert nst(student, a.reshape(1, 1, 2, 2)).item() == pytest.approx(0.5, rel=1e-6)
    assert nst(student, student.flip(1)).item() == 0.0


def test_nst_of_dead_channels() -> None:
    """For a dead student only the teacher's mean kernel remains."""
    dead, alive = torch.zeros(1, 2, 2, 2, requires_grad=True), torch.ones(1, 3, 2, 2)
    value = nst(dead, alive)
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert torch.equal(dead.grad, torch.zeros_like(dead))
    half = torch.cat([torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)], dim=1).requires_grad_()
    assert nst(half, alive).item() == pytest.approx(1 + 1 / 4 - 2 / 2)


def test_nst_pools_features_at_the_end_of_float32() -> None:
    large = torch.full((1, 1, 4, 4), 3e38, requires_grad=True)
    value = nst(large, torch.ones(1, 1, 2, 2))
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(large.grad).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), channels=st.integers(1, 6), side=st.integers(1, 4), a=st.floats(1e-6, 1e6))
def test_nst_ignores_scale_sign_and_channel_order(seed: int, channels: int, side: int, a: float) -> None:
    student, teacher = pair((2, channels, side, side), seed)
    value = nst(student, teacher, reduction="none")
    torch.testing.assert_close(nst(-a * student.flip(1), teacher, reduction="none"), value)
    torch.testing.assert_close(nst(teacher, student, reduction="none"), value)
    assert (value > -1e-12).all()
    assert (value <= 2 + 1e-12).all()


# Attentive similarity.


@pytest.mark.parametrize("options", [{}, {"channel": 0.5, "spatial": 2.0}, {"channel": 0.0}, {"spatial": 0}])
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (2, 9)])
def test_attentive_similarity_equals_the_naive_reference(options: dict[str, float], grid: tuple[int, int]) -> None:
    student, teacher = pair((3, 4, 4, 4))[0], pair((3, 4, *grid), 1)[1]
    got = attentive_similarity(student, teacher, **options, reduction="none")
    expected = reference.attentive_similarity(student.detach().numpy(), teacher.numpy(), **options)
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-9, atol=1e-13)
    assert torch.equal(AttentiveSimilarityLoss(**options)(student, teacher), got.mean())
    assert torch.autograd.gradcheck(lambda s: attentive_similarity(s, teacher, **options), (student,))


def test_attentive_similarity_of_three_four_five() -> None:
    """Channel energies (3, 4) against (4, 3), at one place: cosine 24/25; the spatial maps are one number each."""
    student = torch.tensor([3.0, 4.0], dtype=torch.float64).sqrt().reshape(1, 2, 1, 1)
    value = attentive_similarity(student, student.flip(1))
    assert value.item() == pytest.approx(1 / 25, rel=1e-12)
    spatial = student.reshape(1, 1, 1, 2)
    assert attentive_similarity(spatial, spatial.flip(3), spatial=0.5).item() == pytest.approx(0.5 / 25, rel=1e-12)


def test_attentive_similarity_of_zeros_is_that_of_orthogonal_features() -> None:
    dead, alive = torch.zeros(1, 2, 2, 2, requires_grad=True), torch.ones(1, 2, 2, 2)
    for student, teacher in ((dead, alive), (alive.requires_grad_(), dead.detach()), (dead, dead.detach())):
        value = attentive_similarity(student, teacher)
        assert value.item() == 2.0
        assert not torch.autograd.grad(value, student)[0].any()


def test_attentive_similarity_names_bad_arguments() -> None:
    student, teacher = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 4, 4)
    with pytest.raises(
        ValueError, match=r"^attentive_similarity: teacher must be \(b, c, h, w\) like .*; project the student first$"
    ):
        attentive_similarity(student, teacher)
    assert attentive_similarity(student, teacher, channel=0.0).item() > 0
    for owner, call in (
        ("attentive_similarity", lambda **options: attentive_similarity(student, student, **options)),
        ("AttentiveSimilarityLoss", AttentiveSimilarityLoss),
    ):
        with pytest.raises(ValueError, match=rf"^{owner}: channel must be a finite number and >= 0, got -1"):
            call(channel=-1)
        with pytest.raises(TypeError, match=rf"^{owner}: spatial must be a finite number and >= 0, got nan"):
            call(spatial=math.nan)
        with pytest.raises(ValueError, match=rf"^{owner}: channel, spatial must hold a number > 0, got \(0, 0\)"):
            call(channel=0, spatial=0)


def test_channel_attention_map_against_reference() -> None:
    features = pair((2, 3, 4, 5))[1]
    expected = reference.channel_attention_map(features.numpy())
    np.testing.assert_allclose(channel_attention_map(features).numpy(), expected, rtol=1e-12)
    assert channel_attention_map(features.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^channel_attention_map: features must be \(b, c, h, w\), got \(3, 4, 5\)"):
        channel_attention_map(features[0])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), a=st.floats(1e-6, 1e6))
def test_attentive_similarity_ignores_scale_and_sign(seed: int, a: float) -> None:
    student, teacher = pair((2, 3, 3, 3), seed)
    value = attentive_similarity(student, teacher, reduction="none")
    torch.testing.assert_close(attentive_similarity(-a * student, teacher, reduction="none"), value)
    torch.testing.assert_close(attentive_similarity(teacher, student, reduction="none"), value)
    assert (value >= 0).all()
    assert (value <= 2).all()


# Variational information.


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
def test_variational_information_equals_the_naive_reference(shape: tuple[int, ...]) -> None:
    mean, teacher = pair(shape)
    per_channel = torch.tensor([0.1, 1.0, 5.0, 1000.0], dtype=torch.float64)
    for variance in (1.0, 2.5, torch.tensor(0.3, dtype=torch.float64), per_channel):
        got = variational_information(mean, teacher, variance=variance, reduction="none")
        known = variance.numpy() if isinstance(variance, Tensor) else variance
        expected = reference.variational_information(mean.detach().numpy(), teacher.numpy(), variance=known)
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-12)
    per_channel.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, v: variational_information(m, teacher, variance=v), (mean, per_channel), atol=1e-6
    )


def test_variational_information_is_gaussian_nll_loss() -> None:
    """`torch.nn.functional.gaussian_nll_loss` is half of square over variance plus logarithm, mean over all values."""
    mean, teacher = pair((5, 4))
    variance = torch.tensor([0.1, 1.0, 5.0, 1000.0], dtype=torch.float64)
    expected = nn.functional.gaussian_nll_loss(mean, teacher, variance.expand(5, 4))
    torch.testing.assert_close(variational_information(mean, teacher, variance=variance), expected)


def test_variational_information_by_hand() -> None:
    """Difference 2, variance 4: (4 / 4 + log 4) / 2; the best variance for a difference of 2 is its square."""
    mean, teacher = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)
    variance = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    value = variational_information(mean, teacher, variance=variance)
    assert value.item() == pytest.approx(1.1931471805599454, rel=1e-15)
    value.backward()
    assert variance.grad.item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(("shape", "teacher_shape"), [((4, 3), (4, 5)), ((4, 3, 4, 6), (4, 5, 4, 6))])
def test_variational_information_of_the_mean_network(shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    loss = seeded(lambda: VariationalInformationLoss(3, 5, hidden=7, initial_variance=2.0)).double()
    student, teacher = pair(shape)[0], pair(teacher_shape, 1)[1]
    maps = [layer.weight.detach().numpy() for layer in (loss.first, loss.second, loss.third)]
    mean = reference.mean_network(student.detach().numpy(), *maps)
    np.testing.assert_allclose(loss.mean(student).detach().numpy(), mean, rtol=1e-12)
    expected = reference.variational_information(mean, teacher.numpy(), variance=2.0)
    got = loss(student, teacher, reduction="none").detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # the variance was made in float32


def test_variational_information_pools_the_larger_grid() -> None:
    loss = seeded(lambda: VariationalInformationLoss(3, 5))
    student, teacher = pair((2, 3, 4, 4), 1, torch.float32)[0], pair((2, 5, 8, 8), 2, torch.float32)[1]
    pooled = nn.functional.avg_pool2d(teacher, 2)
    torch.testing.assert_close(loss(student, teacher), loss(student, pooled))
    pooled = nn.functional.avg_pool2d(student, 2)
    torch.testing.assert_close(loss(student, teacher[:, :, :2, :2]), loss(pooled, teacher[:, :, :2, :2]))


@pytest.mark.parametrize("variance", [1.1e-5, 0.01, 1.0, 5.0, 30.0, 1000.0, 1e6])
def test_variational_information_starts_from_its_variance(variance: float) -> None:
    """`log(exp(v) - 1)` is infinite from 710 on in float64, from 89 on in float32."""
    loss = vid(initial_variance=variance)
    torch.testing.assert_close(loss.variance(), torch.full((3,), variance), rtol=1e-5, atol=1e-8)
    student, teacher = pair(MAP, 1, torch.float32)
    value = loss(student, teacher)
    value.backward()
    assert math.isfinite(value.item())
    assert torch.isfinite(loss.raw_variance.grad).all()
    assert loss.raw_variance.grad.any()


def test_variational_information_learns_predictable_channels() -> None:
    """The teacher is a linear map of the student except for one channel of noise: only that variance stays high."""
    generator = torch.Generator().manual_seed(0)
    loss = seeded(lambda: VariationalInformationLoss(4, 3, hidden=16, initial_variance=1.0))
    student = torch.randn(256, 4, generator=generator)
    teacher = student[:, :3].clone()
    teacher[:, 2] = torch.randn(256, generator=generator)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    values = []
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.3
    learned = loss.variance().tolist()
    assert max(learned[:2]) < 0.6 * learned[2]


def test_variational_information_far_away_has_no_gradient() -> None:
    mean = torch.tensor([[3e38, 1.0]], requires_grad=True)
    variance = torch.tensor([1e-38, 1.0], requires_grad=True)
    value = variational_information(mean, torch.tensor([[-3e38, 0.0]]), variance=variance)
    value.backward()
    assert math.isfinite(value.item())
    assert mean.grad.tolist() == [[0.0, 0.5]]
    assert torch.isfinite(variance.grad).all()


def test_variational_information_names_bad_arguments() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"^variational_information: variance must be \(c,\) with c = 3, got \(2,\)"):
        variational_information(x, x, variance=torch.ones(2))
    with pytest.raises(ValueError, match=r"^variational_information: variance must be a finite number and > 0, got 0"):
        variational_information(x, x, variance=0)
    with pytest.raises(TypeError, match=r"^variational_information: variance must be a floating-point tensor"):
        variational_information(x, x, variance=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^variational_information: teacher must be \(b, d\) like student"):
        variational_information(x, torch.rand(2, 4))
    owner = "VariationalInformationLoss"
    for options, error, message in (
        ({"hidden": 0}, ValueError, "hidden must be a whole number and >= 1, got 0"),
        ({"min_variance": 0}, ValueError, "min_variance must be a finite number and > 0, got 0"),
        ({"initial_variance": 1e-5}, ValueError, "initial_variance must be a finite number and > 1e-05, got 1e-05"),
        ({"initial_variance": math.inf}, TypeError, "initial_variance must be a finite number"),
    ):
        with pytest.raises(error, match=f"^{owner}: {message}"):
            VariationalInformationLoss(3, 3, **options)
    with pytest.raises(TypeError, match=f"^{owner}: student_channels must be a whole number and >= 1, got 1.5"):
        VariationalInformationLoss(1.5, 3)
    with pytest.raises(ValueError, match=rf"^{owner}: student must be \(b, d\) with d = 3, got \(2, 4\)"):
        vid()(torch.rand(2, 4), x)
    with pytest.raises(ValueError, match=rf"^{owner}: teacher must be \(b, c, h, w\) with c = 3, got \(2, 3\)"):
        vid()(torch.rand(2, 3, 2, 2), x)


# Contrastive representation.


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_contrastive_equals_the_naive_reference(temperature: float) -> None:
    student, teacher = pair(VECTOR)
    negatives, target = pair((7, 6), 1)[1], torch.tensor([3, 1, 3, -4, 1])
    negatives_target = torch.tensor([3, 9, 1, -4, -4, 8, 3])
    for options in (
        {},
        {"negatives": negatives},
        {"target": target},
        {"negatives": negatives, "target": target},
        {"negatives": negatives, "target": target, "negatives_target": negatives_target},
    ):
        got = contrastive_representation(student, teacher, temperature=temperature, **options, reduction="none")
        known = {name: x.numpy() for name, x in options.items()}
        expected = reference.contrastive_representation(
            student.detach().numpy(), teacher.numpy(), temperature=temperature, **known
        )
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-10, atol=1e-13)
        assert torch.autograd.gradcheck(
            lambda s, options=options: contrastive_representation(s, teacher, temperature=temperature, **options),
            (student,),
        )


def test_contrastive_weights_mask_negatives_too() -> None:
    student, teacher = pair(VECTOR)
    weight = torch.tensor([1.0, 0.0, 0.25, 0.0, 3.0], dtype=torch.float64)
    each = contrastive_representation(student, teacher, weight=weight, reduction="none")
    present = (weight != 0).numpy()
    expected = reference.contrastive_representation(student.detach().numpy(), teacher.numpy(), present=present)
    np.testing.assert_allclose(each.detach().numpy(), weight.numpy() * expected, rtol=1e-10)
    mean = contrastive_representation(student, teacher, weight=weight)
    assert mean.item() == pytest.approx(each.sum().item() / 4.25, rel=1e-12)
    kept = weight != 0
    torch.testing.assert_close(
        mean, contrastive_representation(student[kept], teacher[kept], weight=weight[kept]), rtol=1e-12, atol=0
    )


def test_contrastive_of_basis_vectors() -> None:
    """b orthonormal pairs at temperature 1: log(1 + (b - 1) / e) in either direction."""
    for b in (1, 2, 5):
        value = contrastive_representation(torch.eye(b), 3 * torch.eye(b), temperature=1.0)
        assert value.item() == pytest.approx(math.log1p((b - 1) / math.e), rel=1e-6)
    # Two further negatives at right angles to all: they count in one of the two directions.
    rows = torch.eye(5)
    value = contrastive_representation(rows[:3], rows[:3], temperature=1.0, negatives=rows[3:])
    assert value.item() == pytest.approx((math.log1p(4 / math.e) + math.log1p(2 / math.e)) / 2, rel=1e-6)


def test_contrastive_is_cross_entropy_both_ways() -> None:
    student, teacher = pair(VECTOR, 3)
    logits = nn.functional.normalize(student) @ nn.functional.normalize(teacher).T / 0.07
    own = torch.arange(5)
    expected = (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(contrastive_representation(student, teacher), expected)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), a=st.floats(1e-6, 1e6), m=st.integers(0, 4))
def test_contrastive_ignores_length_and_grows_with_negatives(seed: int, a: float, m: int) -> None:
    student, teacher = pair(VECTOR, seed)
    negatives = pair((m, 6), seed)[1]
    alone = contrastive_representation(student, teacher, reduction="none")
    value = contrastive_representation(student, teacher, negatives=negatives, reduction="none")
    scaled = contrastive_representation(a * student, teacher / a, negatives=a * negatives, reduction="none")
    torch.testing.assert_close(scaled, value)
    assert (value >= alone - 1e-12).all()
    assert (alone >= 0).all()


def in_order(loss: ContrastiveRepresentationLoss) -> Tensor:
    """Return the entries of the queue, oldest first."""
    seen, size = int(loss.queue_seen), loss.queue_size
    filled = min(seen, size)
    return loss.queue[[(seen - filled + i) % size for i in range(filled)]]


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 7),
    batches=st.lists(st.lists(st.booleans(), max_size=10), max_size=5),
    weigh=st.booleans(),
)
def test_queue_is_first_in_first_out(size: int, batches: list[list[bool]], weigh: bool) -> None:
    """The queue holds the last `size` unmasked samples in order, for batches of any size."""
    loss = ContrastiveRepresentationLoss(2, 1, feature_dim=2, queue_size=size)
    written, counter = [], 1
    for keep in batches:
        teacher = torch.arange(counter, counter + len(keep), dtype=torch.float32)[:, None]
        counter += len(keep)
        mask = torch.tensor(keep, dtype=torch.bool)
        value = loss(torch.ones(len(keep), 2), teacher, weight=mask.float() if weigh else None)
        assert math.isfinite(value.item())
        written.append((teacher, mask if weigh else torch.ones_like(mask)))
    rows = torch.cat([torch.zeros(0, 1), *(teacher[keep] for teacher, keep in written)])
    expected = rows[max(0, len(rows) - size) :]
    assert torch.equal(in_order(loss), expected)
    assert int(loss.queue_seen) == sum(int(mask.sum()) for _, mask in written)


def test_queue_counts_as_negatives_when_partly_filled_and_when_full() -> None:
    loss = crd(queue_size=7).double()
    earlier: list[tuple[Tensor, Tensor]] = []
    for step in range(4):
        student, teacher = pair((3, 6), step)
        kept = torch.tensor([True, True, step != 1])
        past = [teacher_[mask] for teacher_, mask in earlier]
        outside = torch.cat(past)[-7:] if past else torch.zeros(0, 6, dtype=torch.float64)
        expected = contrastive_representation(
            loss.student_map(student), loss.teacher_map(teacher), negatives=loss.teacher_map(outside), weight=kept
        )
        torch.testing.assert_close(loss(student, teacher, weight=kept), expected)
        earlier.append((teacher, kept))
    assert int(loss.queue_seen) == 11


def test_queue_leaves_out_samples_of_the_same_identity() -> None:
    loss = crd(queue_size=8).double()
    first, second = pair((4, 6), 1), pair((4, 6), 2)
    target = torch.tensor([5, 6, 7, 0])
    loss(*first, target=target)
    unknown = pair((2, 6), 3)
    loss(*unknown)  # no identities: negatives of everyone, of identity 0 too
    now = torch.tensor([7, 0, 8, 5])
    expected = contrastive_representation(
        loss.student_map(second[0]),
        loss.teacher_map(second[1]),
        negatives=loss.teacher_map(torch.cat([first[1], unknown[1]])),
        target=now,
        negatives_target=torch.tensor([5, 6, 7, 0, -1, -1]),
    )
    torch.testing.assert_close(loss.eval()(*second, target=now), expected)
    assert int(loss.queue_seen) == 6


def test_queue_is_updated_in_training_only_and_is_in_the_state_dict() -> None:
    loss = crd(queue_size=4)
    student, teacher = pair((3, 6), 1, torch.float32)
    loss(student, teacher)
    loss.eval()
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    values = [loss(student, teacher).item() for _ in range(2)]
    assert values[0] == values[1]
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    again = ContrastiveRepresentationLoss(6, 6, feature_dim=4, queue_size=4).eval()
    again.load_state_dict(before)
    assert again(student, teacher).item() == values[0]
    assert {name for name in before if name.startswith("queue")} == {
        "queue",
        "queue_target",
        "queue_known",
        "queue_seen",
    }


def test_gradient_of_the_queue_reaches_the_map() -> None:
    """With two forward calls before one backward, the gradient is that of the queue as it was read."""
    loss = crd(queue_size=5).double()
    first, second = pair((3, 6), 1), pair((3, 6), 2)
    (loss(*first) + loss(*second)).backward()
    got = loss.teacher_map.weight.grad.clone()
    again = crd().double()
    s, t = again.student_map, again.teacher_map
    value = contrastive_of(s(first[0]), t(first[1]), None) + contrastive_of(s(second[0]), t(second[1]), t(first[1]))
    value.backward()
    torch.testing.assert_close(got, again.teacher_map.weight.grad)


def contrastive_of(student: Tensor, teacher: Tensor, negatives: Tensor | None) -> Tensor:
    """Return the loss by cross entropy, with a gradient for the teacher."""
    s, t = nn.functional.normalize(student), nn.functional.normalize(teacher)
    wide = t if negatives is None else torch.cat([t, nn.functional.normalize(negatives)])
    own = torch.arange(len(s))
    forth, back = nn.functional.cross_entropy(s @ wide.T / 0.07, own), nn.functional.cross_entropy(t @ s.T / 0.07, own)
    return (forth + back) / 2


def test_contrastive_with_a_queue_compiles_whole() -> None:
    torch._dynamo.reset()
    loss, other = crd(queue_size=4), crd(queue_size=4)
    compiled = torch.compile(lambda s, t, y: loss(s, t, target=y), fullgraph=True, backend="aot_eager")
    for step in range(3):
        student, teacher = pair((3, 6), step, torch.float32)
        target = torch.tensor([step, 7, 8])
        torch.testing.assert_close(compiled(student, teacher, target), other(student, teacher, target=target))
    assert torch.equal(loss.queue, other.queue)
    assert int(loss.queue_seen) == 9


def test_contrastive_names_bad_arguments() -> None:
    x = torch.rand(3, 4)
    y = torch.tensor([0, 1, 2])
    owner = "contrastive_representation"
    for options, error, message in (
        ({"temperature": 0}, ValueError, "temperature must be a finite number and > 0, got 0"),
        ({"target": y[:2]}, ValueError, r"target must be \(3,\), got \(2,\)"),
        ({"target": x[:, 0]}, TypeError, "target must be whole numbers, got torch.float32"),
        ({"target": [0, 1, 2]}, TypeError, "target must be a torch.Tensor, got list"),
        ({"negatives": torch.rand(2, 5)}, ValueError, r"negatives must be \(m, d\) with d = 4, got \(2, 5\)"),
        ({"negatives": y}, TypeError, "negatives must be a floating-point tensor, got torch.int64"),
        ({"negatives_target": y}, ValueError, r"negatives_target must be \(0,\), got \(3,\)"),
        ({"gather": True, "reduction": "none"}, ValueError, "reduction must be 'mean' with gather"),
        ({"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none', got 'sum'"),
    ):
        with pytest.raises(error, match=f"^{owner}: {message}"):
            contrastive_representation(x, x, **options)
    owner = "ContrastiveRepresentationLoss"
    for options, error, message in (
        ({"queue_size": -1}, ValueError, "queue_size must be a whole number and >= 0, got -1"),
        ({"feature_dim": 0}, ValueError, "feature_dim must be a whole number and >= 1, got 0"),
        ({"temperature": "0.1"}, TypeError, "temperature must be a finite number and > 0, got '0.1'"),
        ({"gather": True, "reduction": "none"}, ValueError, "reduction must be 'mean' with gather"),
    ):
        with pytest.raises(error, match=f"^{owner}: {message}"):
            ContrastiveRepresentationLoss(4, 4, **options)
    with pytest.raises(ValueError, match=rf"^{owner}: student must be \(b, d\) with d = 6, got \(3, 4\)"):
        crd()(x, x)
    with pytest.raises(ValueError, match=rf"^{owner}: reduction must be 'mean' with gather"):
        crd(gather=True)(torch.rand(3, 6), torch.rand(3, 6), reduction="none")
