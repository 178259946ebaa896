"""MBF with the tail of insightface's published ONNX files."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.arguments import final_grid
from kdlib_faces.backbones.networks.mbf import MBF, _ConvBlock

__all__ = ["MBFFlat"]


class _FlatTail(nn.Module):
    """1x1 convolution to few channels, flattening of the grid, linear layer, BatchNorm."""

    def __init__(self, tail_channels: int, grid: tuple[int, int], embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _ConvBlock(512, tail_channels),
            nn.Flatten(1),
            nn.Linear(tail_channels * grid[0] * grid[1], embedding_dim),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class MBFFlat(MBF):
    """`MBF` with the tail 1x1 convolution to 64 channels, flattening, linear layer, BatchNorm.

    The trunk is that of `MBF`. Instead of the global depthwise convolution, the linear layer has separate weights for
    every cell of the final grid: 3,410,368 parameters at 112 pixels and 512 dimensions, scale 2.

    Args:
        embedding_dim: dimensions d of the embedding.
        scale: as in `MBF`.
        blocks: as in `MBF`.
        input_size: side of the square images, or (height, width), in pixels.
        tail_channels: channels before the grid is flattened.

    Shape:
        images `(b, 3, h, w)`; returns `(b, d)`, not normalized.

    Examples:
        >>> import torch
        >>> MBFFlat(64, scale=1, blocks=(1, 1, 1, 1), input_size=32, tail_channels=8).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
        >>> sum(weight.numel() for weight in MBFFlat().parameters())
        3410368

    References:
        The graph of insightface's `w600k_mbf.onnx`.
    """

    def __init__(
        self,
        embedding_dim: int = 512,
        *,
        scale: int = 2,
        blocks: Sequence[int] = (1, 4, 6, 2),
        input_size: InputSize = 112,
        tail_channels: int = 64,
    ) -> None:
        check_number("MBFFlat", "tail_channels", tail_channels, min=1, integer=True)
        super().__init__(embedding_dim, scale=scale, blocks=blocks, input_size=input_size)
        self.tail_channels = tail_channels
        grid = final_grid(self._size)
        self.features = _FlatTail(tail_channels, grid, embedding_dim)  # type: ignore[assignment]  # replaces the tail of MBF
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def name(self) -> str:
        return "mbf_flat"

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "tail_channels": self.tail_channels}
