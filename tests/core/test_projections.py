"""Projections: values against plain layers, inferred projections, and errors."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdlib.projections
from kdlib.projections import ConvProjection, LinearProjection, TokenProjection, infer_projection
from kdlib.testing import PROJECTION_CHECKS, check_projection


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_linear_is_a_matrix_product_without_offset() -> None:
    module = LinearProjection(3, 5)
    x = randn(4, 3)
    torch.testing.assert_close(module(x), x @ module.linear.weight.T)
    assert LinearProjection(3, 5, bias=True).linear.bias is not None


def test_conv_is_a_matrix_product_at_every_position_then_batch_norm() -> None:
    module = ConvProjection(3, 5)
    x = randn(2, 3, 4, 6)
    mixed = torch.einsum("oc,bchw->bohw", module.conv.weight[:, :, 0, 0], x)
    mean, var = mixed.mean((0, 2, 3), keepdim=True), mixed.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(module(x), (mixed - mean) / (var + module.norm.eps).sqrt())


def test_conv_pools_a_side_that_shrinks_and_interpolates_one_that_grows() -> None:
    module = ConvProjection(1, 1, size=(2, 4)).eval()
    nn.init.ones_(module.conv.weight)
    x = torch.arange(8.0).reshape(1, 1, 4, 2)
    # Rows 0, 1 and rows 2, 3 average to (1, 2) and (5, 6); two columns spread over four at quarters.
    wanted = torch.tensor([[[[1.0, 1.25, 1.75, 2.0], [5.0, 5.25, 5.75, 6.0]]]])
    torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=0)
    same = ConvProjection(1, 1, size=(4, 2))
    assert torch.equal(same(x), F.batch_norm(same.conv(x), None, None, training=True))


def test_tokens_are_multiplied_by_one_matrix() -> None:
    module = TokenProjection(3, 5)
    x = randn(2, 7, 3)
    torch.testing.assert_close(module(x), torch.einsum("od,bnd->bno", module.linear.weight, x))
    assert TokenProjection(3, 5, bias=True).linear.bias is not None


def eye(module: TokenProjection) -> TokenProjection:
    nn.init.eye_(module.linear.weight)
    return module


def test_tokens_are_resampled_as_the_map_they_came_from() -> None:
    x = torch.arange(8.0).reshape(1, 8, 1)  # rows of two: (0, 1), (2, 3), (4, 5), (6, 7)
    resized = eye(TokenProjection(1, 1, size=(2, 4), grid=(4, 2)))(x)
    # As in the test of maps, rows average in pairs to (1, 2) and (5, 6); two columns spread over four at quarters.
    assert resized.flatten().tolist() == [1.0, 1.25, 1.75, 2.0, 5.0, 5.25, 5.75, 6.0]
    same = eye(TokenProjection(1, 1, size=(4, 2), grid=(4, 2)))
    assert torch.equal(same(x), x)


def test_the_class_token_is_not_part_of_the_grid() -> None:
    x = torch.tensor([100.0, 1, 2, 3, 4]).reshape(1, 5, 1)
    assert eye(TokenProjection(1, 1, size=(1, 1), class_token="keep"))(x).flatten().tolist() == [100, 2.5]
    assert eye(TokenProjection(1, 1, size=(1, 1), class_token="drop"))(x).flatten().tolist() == [2.5]
    assert eye(TokenProjection(1, 1, class_token="drop"))(x).flatten().tolist() == [1, 2, 3, 4]
    # The mean is computed before the grid is resized.
    mean = eye(TokenProjection(1, 1, size=(1, 2), prefix_tokens=0, class_token="mean"))(x[:, 1:])
    assert mean.flatten().tolist() == [2.5, 2, 3]


KINDS = [
    ((9, 3), (9, 5), {}, "TokenProjection(3, 5)"),
    ((7, 3), (7, 5), {}, "TokenProjection(3, 5)"),
    ((49, 3), (196, 5), {}, "TokenProjection(3, 5, size=(14, 14), prefix_tokens=0)"),
    ((50, 3), (197, 5), {"student_prefix_tokens": 1, "teacher_prefix_tokens": 1}, "TokenProjection(3, 5, size=(14, 14), prefix_tokens=1, class_token='keep')"),
    ((201, 3), (197, 5), {}, "TokenProjection(3, 5, prefix_tokens=5, class_token='first')"),
    ((9, 3), (4, 5), {"student_prefix_tokens": 5, "teacher_prefix_tokens": 0}, "TokenProjection(3, 5, prefix_tokens=5, class_token='drop')"),
    ((9, 3), (16, 5), {"student_prefix_tokens": 0, "teacher_prefix_tokens": 0}, "TokenProjection(3, 5, size=(4, 4), prefix_tokens=0)"),
    ((9, 3), (9, 5), {"student_prefix_tokens": 5, "teacher_prefix_tokens": 5}, "TokenProjection(3, 5, prefix_tokens=5, class_token='keep')"),
    ((49, 3), (197, 5), {"teacher_prefix_tokens": 1}, "TokenProjection(3, 5, size=(14, 14), prefix_tokens=0, class_token='mean')"),
    ((197, 3), (196, 5), {}, "TokenProjection(3, 5, prefix_tokens=1, class_token='drop')"),
    ((3, 4, 4), (49, 5), {}, "TokenProjection(3, 5, size=(7, 7), prefix_tokens=0)"),
    ((3, 4, 3), (49, 5), {}, "TokenProjection(3, 5, size=(7, 7), grid=(4, 3), prefix_tokens=0)"),
    ((3, 4, 2), (8, 5), {}, "TokenProjection(3, 5)"),
    ((3, 14, 12), (169, 5), {"teacher_prefix_tokens": 1}, "TokenProjection(3, 5, prefix_tokens=0, class_token='mean')"),
    ((3, 14, 12), (169, 5), {"teacher_prefix_tokens": 0}, "TokenProjection(3, 5, size=(13, 13), grid=(14, 12), prefix_tokens=0)"),
    ((9, 3), (5, 3, 3), {}, "TokenProjection(3, 5)"),
    ((197, 3), (5, 14, 14), {}, "TokenProjection(3, 5, prefix_tokens=1, class_token='drop')"),
    ((197, 3), (5, 4, 2), {"student_prefix_tokens": 1}, "TokenProjection(3, 5, size=(4, 2), prefix_tokens=1, class_token='drop')"),
    ((49, 3), (5, 4, 3), {}, "TokenProjection(3, 5, size=(4, 3), prefix_tokens=0)"),
    ((8, 3), (5, 4, 2), {}, "TokenProjection(3, 5)"),
    ((3, 4, 2), (5,), {}, "LinearProjection(3, 5)"),
    ((8,), (8,), {}, "LinearProjection(8, 8)"),
    ((3, 7, 7), (5, 7, 7), {}, "ConvProjection(3, 5)"),
    ((3, 14, 7), (5, 7, 7), {}, "ConvProjection(3, 5, size=(7, 7))"),
    ((14, 14, 3), (7, 7, 5), {"student_layout": "bhwc", "teacher_layout": "bhwc"}, "ConvProjection(3, 5, size=(7, 7))"),
    ((7, 7, 3), (5, 7, 7), {"student_layout": "bhwc"}, "ConvProjection(3, 5)"),
    ((3, 7, 7), (7, 7, 5), {"teacher_layout": "bhwc"}, "ConvProjection(3, 5)"),
    ((7, 7, 3), (49, 5), {"student_layout": "bhwc"}, "TokenProjection(3, 5)"),
    ((7, 7, 3), (5,), {"student_layout": "bhwc"}, "LinearProjection(3, 5)"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "wanted", "options", "call"), KINDS, ids=str)
def test_inferred_across_kinds_and_resolutions(
    given: tuple[int, ...], wanted: tuple[int, ...], options: dict[str, Any], call: str
) -> None:
    student, teacher = randn(3, *given), randn(3, *wanted, seed=1)
    projection = infer_projection(student, teacher, **options)
    parts = list(projection) if isinstance(projection, nn.Sequential) else [projection]
    assert repr(eval(call, vars(kdlib.projections))) in [repr(part) for part in parts]
    ran = check_projection(projection, student, teacher, exclude=["repr"] if len(parts) > 1 else [])
    assert len(ran) == len(PROJECTION_CHECKS) - (len(parts) > 1)


def test_sizes_of_numpy() -> None:
    for size in ((np.int64(7), np.int32(5)), np.array([7, 5]), [7, 5], torch.Size([7, 5])):
        assert repr(ConvProjection(np.int64(3), np.int64(5), size=size)) == "ConvProjection(3, 5, size=(7, 5))"
        call = "TokenProjection(3, 5, size=(7, 5), grid=(7, 5), prefix_tokens=1, class_token='none', bias=False)"
        assert repr(TokenProjection(3, 5, size=size, grid=size, prefix_tokens=np.int64(1))) == call
    with pytest.raises(TypeError, match=r"size must be two whole numbers \(h, w\), got \[7\.0, 5\.0\]"):
        ConvProjection(3, 5, size=np.array([7.0, 5.0]))
    with pytest.raises(TypeError, match=r"size must be two whole numbers \(h, w\), got \(True, 5\)"):
        ConvProjection(3, 5, size=(True, 5))


def test_registers_are_not_part_of_the_grid() -> None:
    """2 x 2 patches after a class token and four registers are as many tokens as a 3 x 3 grid."""
    x = torch.tensor([100.0, 7, 7, 7, 7, 1, 2, 3, 4]).reshape(1, 9, 1)
    for options, expected in (
        ({}, [100, 7, 7, 7, 7, 2.5]),
        ({"class_token": "keep"}, [100, 7, 7, 7, 7, 2.5]),
        ({"class_token": "first"}, [100, 2.5]),
        ({"class_token": "drop"}, [2.5]),
        ({"class_token": "mean"}, [2.5, 2.5]),
    ):
        assert eye(TokenProjection(1, 1, size=(1, 1), prefix_tokens=5, **options))(x).flatten().tolist() == expected


def test_channels_last_on_either_side() -> None:
    first, last = randn(2, 3, 14, 12), randn(2, 5, 7, 6, seed=1)
    student, teacher = first.movedim(1, 3), last.movedim(1, 3)
    projection = infer_projection(student, teacher, student_layout="bhwc", teacher_layout="bhwc").eval()
    torch.testing.assert_close(projection(student), projection[1](first).movedim(1, 3))
    same = infer_projection(student, student, student_layout="bhwc", teacher_layout="bhwc", identity_if_equal=True)
    assert isinstance(same, nn.Identity)
    cube = randn(2, 4, 4, 4)
    assert not isinstance(infer_projection(cube, cube, teacher_layout="bhwc", identity_if_equal=True), nn.Identity)


def test_maps_and_tokens_keep_their_order() -> None:
    x = randn(1, 1, 2, 3)
    tokens = infer_projection(x, randn(1, 6, 1))
    back = infer_projection(randn(1, 6, 1), x)
    eye(tokens[1]), eye(back[0])
    assert torch.equal(tokens(x)[0, :, 0], x.flatten())
    assert torch.equal(back(tokens(x)), x)
    pooled = infer_projection(x, randn(1, 1))
    torch.testing.assert_close(pooled(x), x.mean((2, 3)) * pooled[1].linear.weight)


@pytest.mark.parametrize(
    ("student", "teacher", "argument"),
    [
        (randn(2, 50, 3), randn(2, 197, 5), "student_prefix_tokens"),
        (randn(2, 3, 7, 7), randn(2, 197, 5), "teacher_prefix_tokens"),
        (randn(2, 200, 3), randn(2, 128, 5), "student_prefix_tokens"),  # 10 x 20 tokens, or 14 x 14 after four
    ],
)
def test_prefix_tokens_that_the_other_side_does_not_confirm_must_be_given(
    student: torch.Tensor, teacher: torch.Tensor, argument: str
) -> None:
    with pytest.raises(ValueError, match=rf"infer_projection: .* may have \d tokens .*; give {argument}= \(0 if"):
        infer_projection(student, teacher)


@pytest.mark.parametrize("resolution", [(4, 4), (6, 6)])
def test_an_inferred_projection_accepts_other_resolutions(resolution: tuple[int, int]) -> None:
    projection = infer_projection(randn(2, 3, 8, 8), randn(2, 50, 5), teacher_prefix_tokens=1)
    assert projection(randn(2, 3, *resolution)).shape == (2, 50, 5)


def test_projections_compile_to_one_graph() -> None:
    for given, wanted in [((197, 3), (5, 4, 2)), ((3, 4, 2), (5,))]:
        torch._dynamo.reset()
        student = randn(2, *given)
        prefix = 1 if len(given) == 2 else None
        projection = infer_projection(student, randn(2, *wanted), student_prefix_tokens=prefix).eval()
        compiled = torch.compile(projection, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(student), projection(student))


def test_identity_if_equal_needs_equal_shapes() -> None:
    assert isinstance(infer_projection(randn(2, 8), randn(2, 8), identity_if_equal=True), nn.Identity)
    assert isinstance(infer_projection(randn(2, 8), randn(2, 9), identity_if_equal=True), LinearProjection)
    assert isinstance(infer_projection(randn(2, 3, 4, 4), randn(2, 3, 2, 4), identity_if_equal=True), ConvProjection)


def test_an_inferred_projection_has_the_dtype_of_the_student_except_under_autocast() -> None:
    student = randn(2, 8, dtype=torch.float64)
    assert next(infer_projection(student, randn(2, 4)).parameters()).dtype == torch.float64
    half = randn(2, 8).bfloat16()
    assert next(infer_projection(half, randn(2, 4)).parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projection = infer_projection(half, randn(2, 4))
        assert projection(half).dtype == torch.bfloat16
    assert next(projection.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "arguments", "options", "error", "message"),
    [
        (LinearProjection, (0, 4), {}, ValueError, "in_dim must be a whole number and >= 1, got 0"),
        (LinearProjection, (4, 2.0), {}, TypeError, r"out_dim must be a whole number .*got 2\.0"),
        (ConvProjection, (0, 4), {}, ValueError, "in_channels must be a whole number and >= 1"),
        (ConvProjection, (3, 4), {"size": 7}, TypeError, r"size must be two whole numbers \(h, w\), got 7"),
        (ConvProjection, (3, 4), {"size": (0, 7)}, ValueError, r"size must be \(h, w\) with sides >= 1"),
        (TokenProjection, (3, 4), {"class_token": "cls"}, ValueError, "class_token must be one of"),
        (TokenProjection, (3, 4), {"grid": (0, 2)}, ValueError, r"grid must be \(h, w\) with sides"),
        (TokenProjection, (3, 4), {"prefix_tokens": -1}, ValueError, r"prefix_tokens must be a whole number and >= 0"),
    ],
)
def test_invalid_arguments_are_errors(kind, arguments, options, error, message) -> None:
    with pytest.raises(error, match=f"^{kind.__name__}: {message}"):
        kind(*arguments, **options)


SMALLER = TokenProjection(3, 4, size=(2, 2))
GRID = TokenProjection(3, 4, size=(2, 2), grid=(2, 3), class_token="keep")


@pytest.mark.parametrize(
    ("call", "inputs", "error", "message"),
    [
        (LinearProjection(4, 2), [randn(3, 5)], ValueError, r"student must be \(b, d\) with d = 4, got \(3, 5\)"),
        (LinearProjection(4, 2), [torch.ones(3, 4).long()], TypeError, "student must be a floating-point tensor"),
        (ConvProjection(3, 4), [randn(2, 5, 7, 7)], ValueError, r"student must be \(b, c, h, w\) with c = 3"),
        (TokenProjection(3, 4), [randn(2, 3)], ValueError, r"student must be \(b, n, d\) with d = 3, got \(2, 3\)"),
        (
            SMALLER,
            [randn(2, 9, 3)],
            ValueError,
            r"^TokenProjection: student \(2, 9, 3\) may have 0 or 5 or 8 tokens \(class token, registers\) before those of the grid; give prefix_tokens= \(0 if all are on the grid\)$",
        ),
        (SMALLER, [randn(2, 197, 3)], ValueError, r"may have 1 tokens .*; give prefix_tokens="),
        (SMALLER, [randn(2, 0, 3)], ValueError, "may have an unknown number of tokens"),
        (
            TokenProjection(3, 4, size=(2, 2), prefix_tokens=0),
            [randn(2, 8, 3)],
            ValueError,
            r"with n = a square number, got \(2, 8, 3\); give a TokenProjection with grid=",
        ),
        (
            TokenProjection(3, 4, prefix_tokens=5),
            [randn(2, 5, 3)],
            ValueError,
            "prefix_tokens must be a whole number and >= 0 and < 5, got 5",
        ),
        (GRID, [randn(2, 6, 3)], ValueError, r"with n = 2 x 3 and 1 before the grid, got \(2, 6, 3\)$"),
        (
            infer_projection,
            [randn(2, 14, 14, 64), randn(2, 5, 7, 7)],
            ValueError,
            r"^infer_projection: student \(2, 14, 14, 64\) looks like \(b, h, w, c\); give student_layout='bhwc', or 'bchw' if it is \(b, c, h, w\)$",
        ),
        (infer_projection, [randn(2, 5, 7, 7), randn(2, 7, 6, 64)], ValueError, r"give teacher_layout='bhwc'"),
        (
            infer_projection,
            [randn(2, 9, 3), randn(2, 197, 5)],
            ValueError,
            r"student \(2, 9, 3\) may have 0 or 5 or 8 tokens .*; give student_prefix_tokens=",
        ),
        (
            infer_projection,
            [randn(2, 3, 14, 12), randn(2, 169, 5)],
            ValueError,
            r"teacher \(2, 169, 5\) may have 0 or 1 tokens .*; give teacher_prefix_tokens=",
        ),
        (
            infer_projection,
            [randn(2, 197, 3), randn(2, 201, 5)],
            ValueError,
            r"the teacher has 5 tokens before those of the grid and the student 1; leave",
        ),
        (
            infer_projection,
            [randn(2, 1, 2, 3, 4), randn(2, 5)],
            ValueError,
            r"student must be \(b, d\), .* got \(2, 1, 2, 3, 4\)",
        ),
        (infer_projection, [randn(2, 8), randn(2, 3, 4, 4)], ValueError, r"^infer_projection: .* \(2, 8\) and \(2, 3"),
        (infer_projection, [randn(2, 8, 3), randn(2, 3)], ValueError, "give a projection of your own"),
        (infer_projection, [randn(2, 5), randn(2, 3, 4, 4)], ValueError, "or a student map and a teacher vector; got"),
        (
            infer_projection,
            [randn(2, 47, 3), randn(2, 49, 3)],
            ValueError,
            r"student \(2, 47, 3\) may have an unknown number of tokens",
        ),
        (infer_projection, [randn(2, 8), [1.0]], TypeError, "teacher must be a torch.Tensor, got list"),
    ],
)
def test_invalid_inputs_are_errors(call, inputs, error, message) -> None:
    with pytest.raises(error, match=message):
        call(*inputs)
