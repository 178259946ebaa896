"""Projections: shapes, values against plain layers, gradients, and what an inferred one stands on."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdlib
from kdlib import ConvProjection, LinearProjection, infer_projection


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


MODULES = [
    (LinearProjection(3, 5), (4, 3), (4, 5)),
    (LinearProjection(3, 5, bias=True), (4, 3), (4, 5)),
    (ConvProjection(3, 5), (2, 3, 4, 6), (2, 5, 4, 6)),
    (ConvProjection(3, 5, size=(2, 9)), (2, 3, 4, 6), (2, 5, 2, 9)),
]


@pytest.mark.parametrize(("module", "given", "wanted"), MODULES, ids=lambda x: repr(x))
def test_contract(module: nn.Module, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    x = randn(*given).requires_grad_()
    y = module(x)
    assert y.shape == wanted
    (y * randn(*wanted, seed=1)).sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    again = eval(repr(module), vars(kdlib))
    assert repr(again) == repr(module)
    again.load_state_dict(module.state_dict())
    for other in (again, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.eval()(x), module.eval()(x))
    module.train()


def test_linear_is_one_matrix_without_offset() -> None:
    module = LinearProjection(3, 5)
    x = randn(4, 3)
    torch.testing.assert_close(module(x), x @ module.linear.weight.T)
    assert torch.equal(module(torch.zeros(1, 3)), torch.zeros(1, 5))
    torch.testing.assert_close(module(7 * x), 7 * module(x))
    assert LinearProjection(3, 5, bias=True).linear.bias is not None


def test_conv_is_a_matrix_at_every_place_then_batch_norm() -> None:
    module = ConvProjection(3, 5)
    x = randn(2, 3, 4, 6)
    mixed = torch.einsum("oc,bchw->bohw", module.conv.weight[:, :, 0, 0], x)
    mean, var = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(module(x), (mixed - mean) / (var + module.norm.eps).sqrt())


def test_conv_pools_the_larger_side_and_interpolates_the_smaller() -> None:
    module = ConvProjection(1, 1, size=(2, 4)).eval()
    nn.init.ones_(module.conv.weight)
    x = torch.arange(8.0).reshape(1, 1, 4, 2)
    # Rows 0, 1 and rows 2, 3 average to (1, 2) and (5, 6); two columns spread over four at quarters.
    wanted = torch.tensor([[[[1.0, 1.25, 1.75, 2.0], [5.0, 5.25, 5.75, 6.0]]]])
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=0)
    same = ConvProjection(1, 1, size=(4, 2))
    assert torch.equal(same(x), F.batch_norm(same.conv(x), None, None, training=True))


def test_inferred_from_examples() -> None:
    linear = infer_projection(randn(2, 8), randn(3, 16))
    assert isinstance(linear, LinearProjection)
    assert repr(linear) == "LinearProjection(in_dim=8, out_dim=16, bias=False)"
    same_grid = infer_projection(randn(2, 3, 7, 7), randn(2, 5, 7, 7))
    assert repr(same_grid) == "ConvProjection(in_channels=3, out_channels=5, size=None)"
    other_grid = infer_projection(randn(2, 3, 14, 7), randn(2, 5, 7, 7))
    assert repr(other_grid) == "ConvProjection(in_channels=3, out_channels=5, size=(7, 7))"
    assert other_grid(randn(2, 3, 14, 7)).shape == (2, 5, 7, 7)


def test_equal_shapes_are_learned_unless_asked() -> None:
    assert isinstance(infer_projection(randn(2, 8), randn(2, 8)), LinearProjection)
    assert isinstance(infer_projection(randn(2, 8), randn(2, 8), identity_if_equal=True), nn.Identity)
    assert isinstance(infer_projection(randn(2, 8), randn(2, 9), identity_if_equal=True), LinearProjection)
    assert isinstance(infer_projection(randn(2, 3, 4, 4), randn(2, 3, 2, 4), identity_if_equal=True), ConvProjection)


def test_inferred_takes_dtype_of_the_student_except_under_autocast() -> None:
    student = randn(2, 8, dtype=torch.float64)
    assert next(infer_projection(student, randn(2, 4)).parameters()).dtype == torch.float64
    half = randn(2, 8).bfloat16()
    assert next(infer_projection(half, randn(2, 4)).parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projection = infer_projection(half, randn(2, 4))
        assert projection(half).dtype == torch.bfloat16
    assert next(projection.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: LinearProjection(0, 4),
            ValueError,
            r"^LinearProjection: in_dim must be a whole number and >= 1, got 0",
        ),
        (lambda: LinearProjection(4, 2.0), TypeError, r"^LinearProjection: out_dim must be a whole number .*got 2\.0"),
        (lambda: LinearProjection(4, 2)(randn(3, 5)), ValueError, r"student must be \(b, d\) with d = 4, got \(3, 5\)"),
        (
            lambda: LinearProjection(4, 2)(torch.ones(3, 4).long()),
            TypeError,
            r"student must be a floating-point tensor",
        ),
        (lambda: ConvProjection(0, 4), ValueError, r"^ConvProjection: in_channels must be a whole number and >= 1"),
        (
            lambda: ConvProjection(3, 4, size=7),
            TypeError,
            r"^ConvProjection: size must be two whole numbers \(h, w\), got 7",
        ),
        (
            lambda: ConvProjection(3, 4, size=(0, 7)),
            ValueError,
            r"^ConvProjection: size must be \(h, w\) with sides >= 1",
        ),
        (lambda: ConvProjection(3, 4)(randn(2, 5, 7, 7)), ValueError, r"student must be \(b, c, h, w\) with c = 3"),
        (
            lambda: infer_projection(randn(2, 8), randn(2, 3, 4, 4)),
            ValueError,
            r"^infer_projection: .* \(2, 8\) and \(2, 3",
        ),
        (lambda: infer_projection(randn(2, 3, 8), randn(2, 3, 8)), ValueError, r"give a projection of your own"),
        (lambda: infer_projection(randn(2, 8), [1.0]), TypeError, r"teacher must be a torch.Tensor, got list"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
