"""MobileFaceNet, a lightweight student.

Module names follow the PyTorch port that most published checkpoints use, so that those load unchanged.

References:
    Chen, Liu, Gao, Han, "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices",
    2018, arXiv:1804.07573.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdlib._checks import check_choice
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.base import Arguments, Backbone, final_grid, initialize

__all__ = ["MobileFaceNet"]

TAILS = ("gdc", "gnap")
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "prelu": nn.PReLU,
    "relu6": lambda _channels: nn.ReLU6(),
    "relu": lambda _channels: nn.ReLU(),
}


class _ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, activation, which is named `prelu` as in the published files."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, activation: str
    ) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out), prelu=ACTIVATIONS[activation](c_out)))


class _LinearBlock(nn.Sequential):
    """Convolution and BatchNorm without activation."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int] = (1, 1), groups: int = 1) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, groups=groups, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out)))


class _Bottleneck(nn.Sequential):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; with stride 1, adds the input."""

    def __init__(self, c_in: int, c_out: int, c_mid: int, stride: int, *, activation: str) -> None:
        conv = _ConvBlock(c_in, c_mid, activation=activation)
        depthwise = _ConvBlock(c_mid, c_mid, 3, stride, groups=c_mid, activation=activation)
        super().__init__(OrderedDict(conv=conv, conv_dw=depthwise, project=_LinearBlock(c_mid, c_out)))
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # type: ignore[no-untyped-call]  # missing in torch's stubs
        return x + out if self.residual else out


def _residuals(channels: int, c_mid: int, *, blocks: int, activation: str) -> nn.Sequential:
    """Return bottlenecks of stride 1 below the name `model`."""
    bottlenecks = [_Bottleneck(channels, channels, c_mid, 1, activation=activation) for _ in range(blocks)]
    return nn.Sequential(OrderedDict(model=nn.Sequential(*bottlenecks)))


class _NormAwarePool(nn.Module):
    """BatchNorm, scaling of every cell to the mean norm of the image's cells, mean over the grid, BatchNorm; no weights.

    The original implementations use the mean norm over the whole batch, so that an embedding depends on the other
    images of its batch. For a batch of one the results are equal.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels, affine=False)
        self.bn2 = nn.BatchNorm1d(channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(x)
        # The factor of a cell with a small norm exceeds half precision.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide = wide * (norm.mean((2, 3), keepdim=True) / norm.clamp(min=1e-12))
        out: Tensor = self.bn2(wide.mean((2, 3)).to(x.dtype))
        return out


class MobileFaceNet(Backbone):
    """MobileFaceNet: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    Four halvings of the grid (64, 64, 128, 128 channels at width 1), a 1x1 convolution to 512 channels, a depthwise
    convolution over the whole final grid (7x7 at 112 pixels), a linear layer and BatchNorm. At 112 pixels and 128
    dimensions: 1,003,136 parameters and 220.97 M multiply-adds; at 512 dimensions 1,200,512 and 221.16 M.

    Args:
        embedding_dim: dimensions d of the embedding.
        width: factor of every channel count; the first stage has 64 * width rounded to a multiple of 8, at least 8.
        input_size: side of the square images, or (height, width), in pixels.
        affine: whether the last BatchNorm has weight and bias; AdaDistill's has none (1,199,488 parameters at 512).
        tail: `"gdc"` for the global depthwise convolution and linear layer above; `"gnap"` for global norm-aware
            pooling, which has no weights and gives 512 * width dimensions.
        activation: `"prelu"`; or `"relu6"` for foamliu's network, which has ReLU6 in place of PReLU, a pointwise
            convolution after the first depthwise one, ReLU after both, and a bias in the linear layer: 999,936 parameters
            at 112 pixels and 128 dimensions.

    Examples:
        >>> import torch
        >>> student = MobileFaceNet(128, width=0.25, input_size=32).eval()
        >>> student(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
        >>> student.stages
        ('conv2_dw', 'conv_3', 'conv_4', 'conv_5')

    References:
        arXiv:1804.07573, table 1. Weights are initialized from He's normal distribution (the paper does not specify
        it).
    """

    stages: tuple[str, ...] = ("conv2_dw", "conv_3", "conv_4", "conv_5")
    family: ClassVar[str] = "mobilefacenet"
    _optional: ClassVar[tuple[str, ...]] = ("affine", "tail", "activation")

    def __init__(
        self,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: InputSize = 112,
        *,
        affine: bool = True,
        tail: Literal["gdc", "gnap"] = "gdc",
        activation: Literal["prelu", "relu6"] = "prelu",
    ) -> None:
        super().__init__(embedding_dim, input_size)
        check_choice("MobileFaceNet", "tail", tail, TAILS)
        check_choice("MobileFaceNet", "activation", activation, ("prelu", "relu6"))
        c = self._set_width(width)
        if tail == "gnap" and (self.embedding_dim != 8 * c or affine):
            raise ValueError(
                f"MobileFaceNet: tail 'gnap' requires embedding_dim {8 * c} and affine False, "
                f"got {self.embedding_dim} and {affine}"
            )
        self.affine, self.tail, self.activation = bool(affine), tail, activation

        kind: Arguments = {"activation": activation}
        self.conv1 = _ConvBlock(3, c, kernel=3, stride=2, **kind)
        self.conv2_dw: nn.Module
        if activation == "prelu":
            self.conv2_dw = _ConvBlock(c, c, kernel=3, groups=c, **kind)
        else:
            depthwise = _ConvBlock(c, c, kernel=3, groups=c, activation="relu")
            self.conv2_dw = nn.Sequential(
                OrderedDict(depthwise=depthwise, pointwise=_ConvBlock(c, c, activation="relu"))
            )
        self.conv_23 = _Bottleneck(c, c, 2 * c, stride=2, **kind)
        self.conv_3 = _residuals(c, 2 * c, blocks=4, **kind)
        self.conv_34 = _Bottleneck(c, 2 * c, 4 * c, stride=2, **kind)
        self.conv_4 = _residuals(2 * c, 4 * c, blocks=6, **kind)
        self.conv_45 = _Bottleneck(2 * c, 2 * c, 8 * c, stride=2, **kind)
        self.conv_5 = _residuals(2 * c, 4 * c, blocks=2, **kind)
        self.conv_6_sep = _ConvBlock(2 * c, 8 * c, **kind)
        if tail == "gdc":
            self.conv_6_dw = _LinearBlock(8 * c, 8 * c, final_grid(self._size), groups=8 * c)
            self.linear = nn.Linear(8 * c, self.embedding_dim, bias=activation == "relu6")
            self.bn = nn.BatchNorm1d(self.embedding_dim, affine=self.affine)
        else:
            self.output_layer = _NormAwarePool(8 * c)
        initialize(self, nn.Conv2d, nn.Linear, fill=lambda weight: nn.init.kaiming_normal_(weight, a=0.25))

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
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
