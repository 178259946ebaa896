"""MBF, insightface's wider MobileFaceNet, with insightface's module names so that its checkpoints load unchanged."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.arguments import check_blocks, check_images, final_grid
from kdlib_faces.backbones.networks.base import Backbone

__all__ = ["MBF", "mbf"]


class _ConvBlock(nn.Module):
    """Convolution, BatchNorm, PReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(c_out),
            nn.PReLU(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class _LinearBlock(nn.Module):
    """Convolution and BatchNorm without activation."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int] = (1, 1), groups: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(c_in, c_out, kernel, groups=groups, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class _DepthWise(nn.Module):
    """1x1 to `c_mid` channels, depthwise 3x3, linear 1x1; adds the input if `residual`."""

    def __init__(self, c_in: int, c_out: int, c_mid: int, stride: int = 2, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            _ConvBlock(c_in, c_mid),
            _ConvBlock(c_mid, c_mid, kernel=3, stride=stride, groups=c_mid),
            _LinearBlock(c_mid, c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


class _Residual(nn.Module):
    """Residual depthwise blocks of stride 1."""

    def __init__(self, channels: int, blocks: int, c_mid: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[_DepthWise(channels, channels, c_mid, 1, True) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class _GDC(nn.Module):
    """Global depthwise convolution, linear layer, BatchNorm."""

    def __init__(self, grid: tuple[int, int], embedding_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _LinearBlock(512, 512, grid, groups=512),
            nn.Flatten(1),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class MBF(Backbone):
    """insightface's MobileFaceNet: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    `scale` multiplies the channels between blocks; the widths inside the blocks stay 128, 256 and 512. The second
    convolution has 64 groups at any scale: it is depthwise only at scale 1, where the network equals `MobileFaceNet`. Scale 2 with blocks (1, 4, 6, 2) is `mbf`: 2,059,520 parameters, 437.5 M multiply-adds; scale 4
    with blocks (2, 8, 12, 4) is `mbf_large`: 6,314,880 and 1816 M.

    Args:
        embedding_dim: dimensions d of the embedding.
        scale: integer factor of the channels between blocks.
        blocks: residual blocks in each of the four stages; a first count of 1 means the grouped convolution.
        input_size: side of the square images, or (height, width), in pixels.

    Raises:
        ValueError: an argument is out of range, or images have another size than `input_size`.
        TypeError: an argument has the wrong type.

    Examples:
        >>> import torch
        >>> MBF(64, scale=1, blocks=(1, 1, 1, 1), input_size=32).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])

    References:
        insightface, recognition/arcface_torch/backbones/mobilefacenet.py. Its `view(x.size(0), -1)`, which tracing
        fixes to the batch size of the example, is `flatten(1)` here.
    """

    stages: tuple[str, ...] = ("layers.1", "layers.3", "layers.5", "layers.7")

    def __init__(
        self,
        embedding_dim: int = 512,
        *,
        scale: int = 2,
        blocks: Sequence[int] = (1, 4, 6, 2),
        input_size: InputSize = 112,
    ) -> None:
        super().__init__(embedding_dim, input_size)
        check_number("MBF", "scale", scale, min=1, integer=True)
        self.scale = scale
        self.blocks = check_blocks("MBF", "blocks", blocks)

        c, (first, second, third, fourth) = 64 * scale, self.blocks
        self.layers = nn.ModuleList(
            [
                _ConvBlock(3, c, kernel=3, stride=2),
                _ConvBlock(c, c, kernel=3, groups=64) if first == 1 else _Residual(c, first, 128),
                _DepthWise(c, c, 128),
                _Residual(c, second, 128),
                _DepthWise(c, 2 * c, 256),
                _Residual(2 * c, third, 256),
                _DepthWise(2 * c, 2 * c, 512),
                _Residual(2 * c, fourth, 256),
            ]
        )
        self.conv_sep = _ConvBlock(2 * c, 512)
        self.features = _GDC(final_grid(self._size), embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def name(self) -> str:
        return "mbf"

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "embedding_dim": self.embedding_dim,
            "scale": self.scale,
            "blocks": self.blocks,
            "input_size": self.input_size,
        }

    def forward(self, images: Tensor) -> Tensor:
        check_images("MBF", images, self._size)
        x = images
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.features(self.conv_sep(x))
        return out


def mbf(
    embedding_dim: int = 512,
    *,
    scale: int = 2,
    blocks: Sequence[int] = (1, 4, 6, 2),
    input_size: InputSize = 112,
) -> MBF:
    """insightface's `mbf`: `MBF` with scale 2, 2,059,520 parameters at 112 pixels and 512 dimensions.

    Args:
        embedding_dim: dimensions d of the embedding.
        scale: as in `MBF`.
        blocks: as in `MBF`.
        input_size: side of the square images, or (height, width), in pixels.

    Returns:
        The network, (b, 3, h, w) to (b, d).

    Examples:
        >>> mbf(128)
        MBF(embedding_dim=128, scale=2, blocks=(1, 4, 6, 2), input_size=112)
    """
    return MBF(embedding_dim, scale=scale, blocks=blocks, input_size=input_size)
