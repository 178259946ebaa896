"""Projections: choose the map from one example of each side. Touches shapes only."""

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_projectable
from kdlib.projections.conv import ConvProjection
from kdlib.projections.linear import LinearProjection

__all__ = ["infer_projection"]


def infer_projection(student: Tensor, teacher: Tensor, *, identity_if_equal: bool = False) -> nn.Module:
    """The projection that brings features like `student` to the shape of features like `teacher`.

    It stands on the student's device. Its parameters take the student's dtype, except under autocast, where they stay
    float32 as those of the model do. They are drawn from torch's global generator, as those of any layer are.

    Args:
        student: example `(b, d)` or `(b, c, h, w)`; the values do not matter, nor does the batch size.
        teacher: example `(b, D)` or `(b, C, H, W)`, of the same number of dimensions.
        identity_if_equal: return `nn.Identity()` where the shapes already agree, in place of a learned map.

    Returns:
        `LinearProjection(d, D)`; or `ConvProjection(c, C)`, with `size=(H, W)` where the grids differ.

    Raises:
        ValueError: not both 2-dimensional or both 4-dimensional.
        TypeError: not floating-point tensors.

    Examples:
        >>> import torch
        >>> infer_projection(torch.rand(2, 128), torch.rand(2, 512))
        LinearProjection(in_dim=128, out_dim=512, bias=False)
        >>> infer_projection(torch.rand(2, 16, 14, 14), torch.rand(2, 64, 7, 7))
        ConvProjection(in_channels=16, out_channels=64, size=(7, 7))
        >>> infer_projection(torch.rand(2, 8), torch.rand(2, 8), identity_if_equal=True)
        Identity()
    """
    check_floating("infer_projection", student=student, teacher=teacher)
    check_projectable("infer_projection", student, teacher)
    if identity_if_equal and student.shape[1:] == teacher.shape[1:]:
        return nn.Identity()
    projection: nn.Module
    if student.dim() == 2:
        projection = LinearProjection(student.shape[1], teacher.shape[1])
    else:
        grid = (teacher.shape[2], teacher.shape[3])
        size = None if tuple(student.shape[2:]) == grid else grid
        projection = ConvProjection(student.shape[1], teacher.shape[1], size=size)
    device = student.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return projection.to(device=student.device, dtype=torch.float32 if autocast else student.dtype)
