"""Choice of a projection from one example of each side."""

import torch
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from kdlib._checks import check_floating
from kdlib.projections._checks import check_projectable, check_square_tokens
from kdlib.projections.conv import ConvProjection
from kdlib.projections.linear import LinearProjection
from kdlib.projections.token import TokenProjection

__all__ = ["infer_projection"]


def infer_projection(student: Tensor, teacher: Tensor, *, identity_if_equal: bool = False) -> nn.Module:
    """Create the projection that maps features like `student` to the shape of features like `teacher`.

    - vector `(b, d)` to vector `(b, D)`: `LinearProjection`;
    - map `(b, c, h, w)` to map `(b, C, H, W)`: `ConvProjection`, with `size=(H, W)` where the grids differ;
    - tokens `(b, n, d)` to tokens `(b, N, D)`: `TokenProjection`, with `size=` where the numbers of tokens differ;
    - map to tokens: the positions of the map as tokens, then `TokenProjection`;
    - tokens to map: `TokenProjection` onto the grid `(H, W)`, then its tokens as a map;
    - map to vector: the mean over the map, then `LinearProjection`.

    Where the numbers of tokens differ, they must be those of square grids, with or without a leading class token, such
    as 49, 50, 196 or 197; against a map, the number of its positions is tried first. A class token is mapped to a class
    token, dropped if the teacher has none, and replaced by the mean token if the student has none. Ambiguous pairs are
    errors: a vector to a map or to tokens, tokens to a vector (class token or mean?), token grids that are not square.

    The projection is created on the student's device. Its parameters have the student's dtype, except under autocast,
    where they stay float32 like those of the model. They are initialized with torch's global generator, as in any
    layer.

    Args:
        student: example `(b, d)`, `(b, n, d)` or `(b, c, h, w)`; its values and batch size do not matter.
        teacher: example `(b, D)`, `(b, N, D)` or `(b, C, H, W)`.
        identity_if_equal: return `nn.Identity()` instead of a learned map where the shapes already agree.

    Returns:
        The projection; where the kinds differ, an `nn.Sequential` of it and an einops layer.

    Raises:
        ValueError: a pair of shapes that is not in the list.
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
          (1): TokenProjection(16, 384, size=None, grid=None, class_token='mean', bias=False)
        )
        >>> infer_projection(torch.rand(2, 8), torch.rand(2, 8), identity_if_equal=True)
        Identity()
    """
    check_floating("infer_projection", student=student, teacher=teacher)
    check_projectable("infer_projection", student, teacher)
    if identity_if_equal and student.shape[1:] == teacher.shape[1:]:
        return nn.Identity()
    projection = _choose(student, teacher)
    device = student.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return projection.to(device=student.device, dtype=torch.float32 if autocast else student.dtype)


def _choose(student: Tensor, teacher: Tensor) -> nn.Module:
    match student.dim(), teacher.dim():
        case 2, 2:
            return LinearProjection(student.shape[1], teacher.shape[1])
        case 4, 2:
            return nn.Sequential(Reduce("b c h w -> b c", "mean"), LinearProjection(student.shape[1], teacher.shape[1]))
        case 4, 4:
            grid = (teacher.shape[2], teacher.shape[3])
            size = None if tuple(student.shape[2:]) == grid else grid
            return ConvProjection(student.shape[1], teacher.shape[1], size=size)
        case 4, 3:
            return nn.Sequential(Rearrange("b c h w -> b (h w) c"), _from_map(student, teacher))
        case 3, 4:
            return nn.Sequential(
                _to_map(student, teacher), Rearrange("b (h w) c -> b c h w", h=teacher.shape[2], w=teacher.shape[3])
            )
        case _:
            return _between_tokens(student, teacher)


def _between_tokens(student: Tensor, teacher: Tensor) -> TokenProjection:
    dims = student.shape[2], teacher.shape[2]
    if student.shape[1] == teacher.shape[1]:
        return TokenProjection(*dims)
    student_side, has_class = check_square_tokens("infer_projection", "student", student)
    side, wants_class = check_square_tokens("infer_projection", "teacher", teacher)
    size = None if student_side == side else (side, side)
    if has_class:
        return TokenProjection(*dims, size=size, class_token="keep" if wants_class else "drop")
    return TokenProjection(*dims, size=size, class_token="mean" if wants_class else "none")


def _from_map(student: Tensor, teacher: Tensor) -> TokenProjection:
    dims, (height, width) = (student.shape[1], teacher.shape[2]), student.shape[2:]
    if teacher.shape[1] == height * width:
        return TokenProjection(*dims)
    if teacher.shape[1] == height * width + 1:
        return TokenProjection(*dims, class_token="mean")
    side, wants_class = check_square_tokens("infer_projection", "teacher", teacher)
    grid = None if height == width else (height, width)
    return TokenProjection(*dims, size=(side, side), grid=grid, class_token="mean" if wants_class else "none")


def _to_map(student: Tensor, teacher: Tensor) -> TokenProjection:
    dims, (height, width) = (student.shape[2], teacher.shape[1]), teacher.shape[2:]
    if student.shape[1] == height * width:
        return TokenProjection(*dims)
    if student.shape[1] == height * width + 1:
        return TokenProjection(*dims, class_token="drop")
    _, has_class = check_square_tokens("infer_projection", "student", student)
    return TokenProjection(*dims, size=(height, width), class_token="drop" if has_class else "none")
