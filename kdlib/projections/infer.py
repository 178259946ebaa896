"""Choice of a projection from one example of each side."""

from typing import Literal

import torch
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from kdlib._checks import check_floating, check_prefix
from kdlib._layouts import possible_positions
from kdlib.projections._checks import (
    check_counterparts,
    check_layout,
    check_projectable,
    check_token_grid,
)
from kdlib.projections.conv import ConvProjection
from kdlib.projections.linear import LinearProjection
from kdlib.projections.token import TokenProjection

__all__ = ["infer_projection"]


def infer_projection(
    student: Tensor,
    teacher: Tensor,
    *,
    student_layout: str | None = None,
    teacher_layout: str | None = None,
    student_prefix_tokens: int | None = None,
    teacher_prefix_tokens: int | None = None,
    identity_if_equal: bool = False,
) -> nn.Module:
    """Create the projection that maps features like `student` to the shape of features like `teacher`.

    - vector `(b, d)` to vector `(b, D)`: `LinearProjection`;
    - map `(b, c, h, w)` to map `(b, C, H, W)`: `ConvProjection`, with `size=(H, W)` where the grids differ;
    - tokens `(b, n, d)` to tokens `(b, N, D)`: `TokenProjection`, with `size=` where the numbers of tokens differ;
    - map to tokens: the positions of the map as tokens, then `TokenProjection`;
    - tokens to map: `TokenProjection` onto the grid `(H, W)`, then its tokens as a map;
    - map to vector: the mean over the map, then `LinearProjection`.

    A layout of `None` is read from the shape: two dimensions are `"bd"`, three `"bnd"`, four `"bchw"`. Four dimensions
    that look like `(b, h, w, c)`, as two equal ones before another, are an error that names the argument.

    Where the numbers of tokens differ, the grid of tokens is square, or that of the map on the other side. How many tokens
    come before it (a class token, registers) is read from the shapes only if it is the only possible number of up to 8,
    and either 0 or confirmed by the other side, as with 197 tokens and a grid of 14 x 14, or with 201 and 197 tokens;
    otherwise give it. Prefix tokens are mapped to prefix tokens, dropped if the teacher has none, and
    replaced by the mean token if the student has none and the teacher one. Errors are: a vector to a map or to tokens,
    tokens to a vector (class token or mean?), and other grids that are not square.

    The projection is created on the student's device. Its parameters have the student's dtype, except under autocast,
    where they stay float32 like those of the model. They are initialized with torch's global generator, as in any
    layer.

    Args:
        student: example `(b, d)`, `(b, n, d)`, `(b, c, h, w)` or `(b, h, w, c)`; its values and batch size do not matter.
        teacher: the same.
        student_layout: `"bd"`, `"bnd"`, `"bchw"` or `"bhwc"`.
        teacher_layout: the same.
        student_prefix_tokens: number of the student's tokens before those of the grid.
        teacher_prefix_tokens: the same of the teacher.
        identity_if_equal: return `nn.Identity()` instead of a learned map where the shapes already agree.

    Returns:
        The projection; where the layouts differ, an `nn.Sequential` of it and einops layers.

    Raises:
        ValueError: a pair of shapes that is not in the list, or that may be read in several ways.
        TypeError: an argument that is not a floating-point tensor.

    Examples:
        >>> import torch
        >>> infer_projection(torch.rand(2, 128), torch.rand(2, 512))
        LinearProjection(128, 512, bias=False)
        >>> infer_projection(torch.rand(2, 16, 14, 14), torch.rand(2, 64, 7, 7))
        ConvProjection(16, 64, size=(7, 7))
        >>> infer_projection(torch.rand(2, 16, 14, 14), torch.rand(2, 197, 384))
        Sequential(
          (0): Rearrange('b c h w -> b (h w) c')
          (1): TokenProjection(16, 384, size=None, grid=None, prefix_tokens=0, class_token='mean', bias=False)
        )
        >>> infer_projection(torch.rand(2, 8), torch.rand(2, 8), identity_if_equal=True)
        Identity()
    """
    check_floating("infer_projection", student=student, teacher=teacher)
    given = check_layout("infer_projection", "student", student, student_layout)
    wanted = check_layout("infer_projection", "teacher", teacher, teacher_layout)
    check_projectable("infer_projection", (given, wanted), student, teacher)
    if identity_if_equal and given == wanted and student.shape[1:] == teacher.shape[1:]:
        return nn.Identity()
    parts: list[nn.Module] = []
    if given == "bhwc":
        parts, student = [Rearrange("b h w c -> b c h w")], student.movedim(3, 1)
    teacher = teacher.movedim(3, 1) if wanted == "bhwc" else teacher
    parts += _choose(student, teacher, student_prefix_tokens, teacher_prefix_tokens)
    if wanted == "bhwc":
        parts.append(Rearrange("b c h w -> b h w c"))
    projection = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    device = student.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return projection.to(device=student.device, dtype=torch.float32 if autocast else student.dtype)


def _choose(student: Tensor, teacher: Tensor, prefix: int | None, teacher_prefix: int | None) -> list[nn.Module]:
    """Return the projection of channels-first features, with the changes between maps and tokens."""
    match student.dim(), teacher.dim():
        case 2, 2:
            return [LinearProjection(student.shape[1], teacher.shape[1])]
        case 4, 2:
            return [Reduce("b c h w -> b c", "mean"), LinearProjection(student.shape[1], teacher.shape[1])]
        case 4, 4:
            grid = (teacher.shape[2], teacher.shape[3])
            size = None if tuple(student.shape[2:]) == grid else grid
            return [ConvProjection(student.shape[1], teacher.shape[1], size=size)]
        case 4, 3:
            tokens = rearrange(student, "b c h w -> b (h w) c")
            projection = _token_projection(
                tokens, teacher, 0, teacher_prefix, grid=(student.shape[2], student.shape[3])
            )
            return [Rearrange("b c h w -> b (h w) c"), projection]
        case 3, 4:
            size = (teacher.shape[2], teacher.shape[3])
            projection = _token_projection(student, rearrange(teacher, "b c h w -> b (h w) c"), prefix, 0, size=size)
            return [projection, Rearrange("b (h w) c -> b c h w", h=size[0], w=size[1])]
        case _:
            return [_token_projection(student, teacher, prefix, teacher_prefix)]


def _token_projection(
    student: Tensor,
    teacher: Tensor,
    prefix: int | None,
    teacher_prefix: int | None,
    *,
    grid: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> TokenProjection:
    """Return the projection between tokens; `grid` and `size` are those of a map on the student's or teacher's side."""
    owner, dims = "infer_projection", (student.shape[2], teacher.shape[2])
    if student.shape[1] == teacher.shape[1] and not (prefix or teacher_prefix):
        return TokenProjection(*dims)
    # The teacher's tokens are those of its map if `size` is given, the student's those of its map if `grid` is.
    of_teacher = possible_positions(teacher.shape[1], teacher_prefix)
    of_student = possible_positions(student.shape[1], prefix)
    prefix = check_prefix(owner, "student", student, prefix, "student_prefix_tokens", of_teacher)
    teacher_prefix = check_prefix(owner, "teacher", teacher, teacher_prefix, "teacher_prefix_tokens", of_student)
    check_counterparts(owner, prefix, teacher_prefix)
    class_token: Literal["none", "keep", "first", "drop", "mean"] = "keep" if prefix else "none"
    if prefix != teacher_prefix:
        class_token = "drop" if not teacher_prefix else "mean" if not prefix else "first"
    if student.shape[1] - prefix == teacher.shape[1] - teacher_prefix:
        return TokenProjection(*dims, prefix_tokens=prefix, class_token=class_token)
    size = check_token_grid(owner, "teacher", teacher, teacher_prefix, size)
    found = check_token_grid(owner, "student", student, prefix, grid)
    grid = None if found[0] == found[1] else found
    return TokenProjection(*dims, size=size, grid=grid, prefix_tokens=prefix, class_token=class_token)
