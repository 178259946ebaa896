"""Resampling of feature maps and token grids."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["resize"]


def resize(x_bchw: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map: adaptive average pooling along a side that shrinks, bilinear interpolation along one that grows."""
    height, width = size
    pooled = (min(x_bchw.shape[2], height), min(x_bchw.shape[3], width))
    if pooled != tuple(x_bchw.shape[2:]):
        x_bchw = F.adaptive_avg_pool2d(x_bchw, pooled)
    if pooled != size:
        x_bchw = F.interpolate(x_bchw, size, mode="bilinear", align_corners=False)
    return x_bchw
