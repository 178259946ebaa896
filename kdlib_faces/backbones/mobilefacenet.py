"""Backbones room: MobileFaceNet, the light student. Imports torch and the argument checks only.

The modules carry the names of the PyTorch port that most published checkpoints follow, so that those load unchanged.

References:
    Chen, Liu, Gao, Han, "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices",
    2018, arXiv:1804.07573.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice, check_number
from kdlib_faces.backbones._arguments import (
    InputSize,
    channels,
    check_images,
    final_grid,
    height_width,
    show_size,
)
from kdlib_faces.backbones.input_spec import InputSpec

__all__ = ["MobileFaceNet"]

TAILS = ("gdc", "gnap")


class _ConvBlock(nn.Module):
    """Convolution, BatchNorm, PReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.prelu = nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.prelu(self.bn(self.conv(x)))
        return out


class _LinearBlock(nn.Module):
    """Convolution and BatchNorm, no activation."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int] = (1, 1), groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


class _Bottleneck(nn.Module):
    """Widen by 1x1, depthwise 3x3, narrow by a linear 1x1; add the input if `residual`."""

    def __init__(self, c_in: int, c_out: int, c_mid: int, stride: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.conv = _ConvBlock(c_in, c_mid)
        self.conv_dw = _ConvBlock(c_mid, c_mid, kernel=3, stride=stride, groups=c_mid)
        self.project = _LinearBlock(c_mid, c_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.conv_dw(self.conv(x)))
        return x + out if self.residual else out


class _Residuals(nn.Module):
    """A run of residual bottlenecks of stride 1."""

    def __init__(self, channels: int, c_mid: int, blocks: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*[_Bottleneck(channels, channels, c_mid, 1, True) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class _NormAwarePool(nn.Module):
    """BatchNorm, every cell scaled to the mean length of its image's cells, mean over the grid, BatchNorm. No weights.

    The projects that published it take the mean length over the whole batch, so that an embedding depends on its
    neighbors; one image at a time gives what they give for a batch of one.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels, affine=False)
        self.bn2 = nn.BatchNorm1d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a short cell's factor is beyond half precision
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide = wide * (length.mean((2, 3), keepdim=True) / length.clamp(min=1e-12))
        out: Tensor = self.bn2(wide.mean((2, 3)).to(x.dtype))
        return out


class MobileFaceNet(nn.Module):
    """MobileFaceNet: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    Four halvings (64, 64, 128, 128 channels at width 1), a 1x1 convolution to 512, a global depthwise convolution whose
    kernel is the whole final grid (7x7 at 112 pixels), a linear layer and BatchNorm. At 112 pixels and 128 dimensions:
    1,003,136 parameters and 220.97 M multiply-adds; at 512 dimensions 1,200,512 and 221.16 M.

    Args:
        embedding_dim: dimensions d of the embedding.
        width: factor on every channel count; the first stage has 64 * width rounded to a multiple of 8, at least 8.
        input_size: side of the square images, or (height, width), in pixels. The final grid is a sixteenth, rounded up.
        affine: whether the last BatchNorm has a weight and a bias; AdaDistill's has none (1,199,488 parameters at 512).
        tail: `"gdc"` for the global depthwise convolution and linear layer above; `"gnap"` for global norm-aware
            pooling, which has no weights and embeds in 512 * width dimensions.

    Attributes:
        stages: module paths at the end of each halving, from fine to coarse, for use as taps.
        arguments: the arguments that rebuild this network.
        input_spec: what its images must be.

    Raises:
        ValueError: an argument outside its range, or images of another size than `input_size`.
        TypeError: an argument of a wrong type.

    Examples:
        >>> import torch
        >>> student = MobileFaceNet(128, width=0.25, input_size=32).eval()
        >>> student(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
        >>> student.stages
        ('conv2_dw', 'conv_3', 'conv_4', 'conv_5')

    References:
        arXiv:1804.07573, table 1. Convolutions start from He's normal distribution (the paper does not say).
    """

    stages: tuple[str, ...] = ("conv2_dw", "conv_3", "conv_4", "conv_5")

    def __init__(
        self,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: InputSize = 112,
        *,
        affine: bool = True,
        tail: Literal["gdc", "gnap"] = "gdc",
    ) -> None:
        super().__init__()
        check_number("MobileFaceNet", "embedding_dim", embedding_dim, min=1, integer=True)
        check_choice("MobileFaceNet", "tail", tail, TAILS)
        c = channels("MobileFaceNet", width)
        if tail == "gnap" and (embedding_dim != 8 * c or affine):
            raise ValueError(
                f"MobileFaceNet: tail 'gnap' has no weights: embedding_dim must be {8 * c} and affine False, "
                f"got {embedding_dim} and {affine}"
            )
        self._size = height_width("MobileFaceNet", input_size)
        self.embedding_dim = embedding_dim
        self.width = float(width)
        self.input_size: InputSize = show_size(self._size)
        self.affine, self.tail = bool(affine), tail
        self.input_spec = InputSpec(size=self.input_size)

        self.conv1 = _ConvBlock(3, c, kernel=3, stride=2)
        self.conv2_dw = _ConvBlock(c, c, kernel=3, groups=c)
        self.conv_23 = _Bottleneck(c, c, 2 * c, stride=2)
        self.conv_3 = _Residuals(c, 2 * c, blocks=4)
        self.conv_34 = _Bottleneck(c, 2 * c, 4 * c, stride=2)
        self.conv_4 = _Residuals(2 * c, 4 * c, blocks=6)
        self.conv_45 = _Bottleneck(2 * c, 2 * c, 8 * c, stride=2)
        self.conv_5 = _Residuals(2 * c, 4 * c, blocks=2)
        self.conv_6_sep = _ConvBlock(2 * c, 8 * c)
        if tail == "gdc":
            self.conv_6_dw = _LinearBlock(8 * c, 8 * c, final_grid(self._size), groups=8 * c)
            self.linear = nn.Linear(8 * c, embedding_dim, bias=False)
            self.bn = nn.BatchNorm1d(embedding_dim, affine=self.affine)
        else:
            self.output_layer = _NormAwarePool(8 * c)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=0.25)

    @property
    def name(self) -> str:
        """Name in the registry."""
        return "mobilefacenet"

    @property
    def arguments(self) -> dict[str, Any]:
        told = {"embedding_dim": self.embedding_dim, "width": self.width, "input_size": self.input_size}
        return {
            **told,
            **({} if self.affine else {"affine": False}),
            **({} if self.tail == "gdc" else {"tail": self.tail}),
        }

    def forward(self, images: Tensor) -> Tensor:
        check_images("MobileFaceNet", images, self._size)
        x = self.conv2_dw(self.conv1(images))
        x = self.conv_3(self.conv_23(x))
        x = self.conv_4(self.conv_34(x))
        x = self.conv_5(self.conv_45(x))
        x = self.conv_6_sep(x)
        out: Tensor
        if self.tail == "gnap":
            out = self.output_layer(x)
        else:
            out = self.bn(self.linear(self.conv_6_dw(x).flatten(1)))
        return out

    def __repr__(self) -> str:
        return f"MobileFaceNet({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"
