"""MBF, insightface's wider MobileFaceNet, with insightface's module names so that its checkpoints load unchanged."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.base import Backbone, Layers, final_grid, initialize

__all__ = ["MBF", "MBFFlat", "mbf"]


class _ConvBlock(Layers):
    """Convolution, BatchNorm, PReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(c_out), nn.PReLU(c_out))


class _LinearBlock(Layers):
    """Convolution and BatchNorm without activation."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int] = (1, 1), groups: int = 1) -> None:
        super().__init__(nn.Conv2d(c_in, c_out, kernel, groups=groups, bias=False), nn.BatchNorm2d(c_out))


class _DepthWise(Layers):
    """1x1 to `c_mid` channels, depthwise 3x3, linear 1x1; adds the input if `residual`."""

    def __init__(self, c_in: int, c_out: int, c_mid: int, stride: int = 2, residual: bool = False) -> None:
        depthwise = _ConvBlock(c_mid, c_mid, kernel=3, stride=stride, groups=c_mid)
        super().__init__(_ConvBlock(c_in, c_mid), depthwise, _LinearBlock(c_mid, c_out))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # missing in torch's stubs
        return x + out if self.residual else out


def _residuals(channels: int, blocks: int, c_mid: int) -> Layers:
    """Return residual depthwise blocks of stride 1."""
    return Layers(*[_DepthWise(channels, channels, c_mid, 1, True) for _ in range(blocks)])


def _tail(first: Layers, inputs: int, embedding_dim: int, *, bias: bool) -> Layers:
    """Return the layers `first`, flattening of the grid, linear layer, BatchNorm."""
    return Layers(first, nn.Flatten(1), nn.Linear(inputs, embedding_dim, bias=bias), nn.BatchNorm1d(embedding_dim))


class MBF(Backbone):
    """insightface's MobileFaceNet: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    `scale` multiplies the channels between blocks; the widths inside the blocks stay 128, 256 and 512. The second
    convolution has 64 groups at any scale: it is depthwise only at scale 1, where the network equals `MobileFaceNet`.
    Scale 2 with blocks (1, 4, 6, 2) is `mbf`: 2,059,520 parameters, 437.5 M multiply-adds; scale 4 with blocks
    (2, 8, 12, 4) is `mbf_large`: 6,314,880 and 1816 M.

    Args:
        embedding_dim: dimensions d of the embedding.
        scale: integer factor of the channels between blocks.
        blocks: residual blocks in each of the four stages; a first count of 1 means the grouped convolution.
        input_size: side of the square images, or (height, width), in pixels.

    Examples:
        >>> import torch
        >>> MBF(64, scale=1, blocks=(1, 1, 1, 1), input_size=32).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])

    References:
        insightface, recognition/arcface_torch/backbones/mobilefacenet.py. Its `view(x.size(0), -1)`, which tracing
        fixes to the batch size of the example, is `flatten(1)` here.
    """

    stages: tuple[str, ...] = ("layers.1", "layers.3", "layers.5", "layers.7")
    family: ClassVar[str] = "mbf"

    def __init__(
        self,
        embedding_dim: int = 512,
        *,
        scale: int = 2,
        blocks: Sequence[int] = (1, 4, 6, 2),
        input_size: InputSize = 112,
    ) -> None:
        super().__init__(embedding_dim, input_size)
        self.scale = check_number("MBF", "scale", scale, min=1, integer=True)
        self.blocks = self._check_blocks("blocks", blocks)

        c, (first, second, third, fourth) = 64 * self.scale, self.blocks
        self.layers = nn.ModuleList(
            [
                _ConvBlock(3, c, kernel=3, stride=2),
                _ConvBlock(c, c, kernel=3, groups=64) if first == 1 else _residuals(c, first, 128),
                _DepthWise(c, c, 128),
                _residuals(c, second, 128),
                _DepthWise(c, 2 * c, 256),
                _residuals(2 * c, third, 256),
                _DepthWise(2 * c, 2 * c, 512),
                _residuals(2 * c, fourth, 256),
            ]
        )
        self.conv_sep = _ConvBlock(2 * c, 512)
        depthwise = _LinearBlock(512, 512, final_grid(self._size), groups=512)
        self.features = _tail(depthwise, 512, self.embedding_dim, bias=False)
        initialize(self, nn.Conv2d, nn.Linear)

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
        x = images
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.features(self.conv_sep(x))
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

    family: ClassVar[str] = "mbf_flat"

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
        self.tail_channels = int(tail_channels)
        rows, columns = final_grid(self._size)
        inputs = self.tail_channels * rows * columns
        self.features = _tail(_ConvBlock(512, self.tail_channels), inputs, self.embedding_dim, bias=True)
        initialize(self.features, nn.Conv2d, nn.Linear)


def mbf(
    embedding_dim: int = 512, *, scale: int = 2, blocks: Sequence[int] = (1, 4, 6, 2), input_size: InputSize = 112
) -> MBF:
    """insightface's `mbf`: `MBF` with scale 2, 2,059,520 parameters at 112 pixels and 512 dimensions.

    Examples:
        >>> import torch
        >>> mbf(embedding_dim=16, scale=1, input_size=32).eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 16])
    """
    return MBF(embedding_dim, scale=scale, blocks=blocks, input_size=input_size)
