"""Projection of feature maps by a 1x1 convolution."""

from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_shape
from kdlib._repr import CallRepr
from kdlib.projections._checks import check_grid
from kdlib.projections._grid import resize

__all__ = ["ConvProjection"]


class ConvProjection(CallRepr):
    """Maps the student's feature maps to the teacher's channels and size: a 1x1 convolution, then batch norm.

    With `size`, the map is resized first: adaptive average pooling along a side that shrinks, bilinear interpolation
    along a side that grows.

    Args:
        in_channels: channels of the student's map.
        out_channels: channels of the teacher's map.
        size: `(h, w)` of the teacher's map; None keeps the student's size.

    Examples:
        >>> import torch
        >>> project = ConvProjection(16, 64, size=(7, 7))
        >>> project(torch.rand(2, 16, 14, 5)).shape
        torch.Size([2, 64, 7, 7])

    References:
        Romero et al., *FitNets: Hints for Thin Deep Nets*, arXiv 1412.6550, whose regressor is a larger convolution
        without batch norm; later code commonly uses 1x1 with batch norm.
    """

    def __init__(self, in_channels: int, out_channels: int, *, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        check_number("ConvProjection", "in_channels", in_channels, min=1, integer=True)
        check_number("ConvProjection", "out_channels", out_channels, min=1, integer=True)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.size = None if size is None else check_grid("ConvProjection", "size", size)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, student: Tensor) -> Tensor:
        """Map `(b, in_channels, h, w)` to `(b, out_channels, H, W)`."""
        check_floating("ConvProjection", student=student)
        check_shape("ConvProjection", "student", student, "b c h w", c=self.in_channels)
        if self.size is not None:
            student = resize(student, self.size)
        projected: Tensor = self.norm(self.conv(student))
        return projected
