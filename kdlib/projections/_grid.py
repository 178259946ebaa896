"""Projections: another resolution for maps and grids of tokens. Touches the student's tensor only."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["resize"]


def resize(x_bchw: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a map to the grid `size`.

    Along a side where it is larger by average pooling over adaptive windows, along a side where it is smaller by
    bilinear interpolation.
    """
    height, width = size
    pooled = (min(x_bchw.shape[2], height), min(x_bchw.shape[3], width))
    if pooled != tuple(x_bchw.shape[2:]):
        x_bchw = F.adaptive_avg_pool2d(x_bchw, pooled)
    if pooled != size:
        x_bchw = F.interpolate(x_bchw, size, mode="bilinear", align_corners=False)
    return x_bchw
