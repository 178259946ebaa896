"""MobileNet V2 for faces.

Module names follow yakhyo's project, so that its checkpoints load unchanged; those of cavaface load by a table of
names.

References:
    Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018,
    arXiv:1801.04381.
"""

from typing import ClassVar

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.base import Backbone, final_grid, initialize
from kdlib_faces.backbones.networks.mobilenet_v1 import ConvBlock, GDCTail, divisible

__all__ = ["MobileNetV2"]

# Expansion, channels, blocks, stride of the first block.
ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
HALVED_BY_STEM = 24  # the row that a stem of stride 2 replaces
LAST = 512


class _InvertedResidual(nn.Module):
    """1x1 expansion (unless `expansion` is 1), depthwise 3x3, linear 1x1 projection; adds the input if shapes allow."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int, *, bias: bool) -> None:
        super().__init__()
        self.residual = stride == 1 and c_in == c_out
        middle = c_in * expansion
        self.conv = nn.Sequential(
            *([ConvBlock(c_in, middle, 1, bias=bias)] if expansion != 1 else []),
            ConvBlock(middle, middle, 3, stride, groups=middle, bias=bias),
            nn.Conv2d(middle, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(Backbone):
    """MobileNet V2 with PReLU and a global depthwise tail: (b, 3, h, w) to (b, d) embeddings, not normalized.

    At 112 pixels and 512 dimensions: 2,280,640 parameters; 2,295,424 with `bias`, which yakhyo's checkpoints have.

    Args:
        embedding_dim: dimensions d of the embedding.
        width: factor on every channel count, rounded to multiples of 8; the last 512 channels are never reduced.
        input_size: side of the square images, or (height, width), in pixels.
        bias: whether convolutions before a PReLU have a bias. It is redundant with the BatchNorm.
        stem_stride: 1, with four halvings in the blocks, as in yakhyo's; or 2, without the two blocks of 24 channels,
            as in cavaface's.
        affine: whether the last BatchNorm has weight and bias; cavaface has both variants.

    Examples:
        >>> import torch
        >>> student = MobileNetV2(64, width=0.25, input_size=32).eval()
        >>> student(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
        >>> student.stages
        ('features.3', 'features.6', 'features.13', 'features.17')

    References:
        yakhyo/face-recognition, models/mobilenetv2.py; cavaface, backbone/mobilenetv2.py: same layers.
    """

    family: ClassVar[str] = "mobilenet_v2"

    def __init__(
        self,
        embedding_dim: int = 512,
        *,
        width: float = 1.0,
        input_size: InputSize = 112,
        bias: bool = False,
        stem_stride: int = 1,
        affine: bool = True,
    ) -> None:
        super().__init__(embedding_dim, input_size)
        self.width = float(check_number("MobileNetV2", "width", width, above=0))
        self.stem_stride = check_number("MobileNetV2", "stem_stride", stem_stride, min=1, max=2, integer=True)
        self.bias, self.affine = bool(bias), bool(affine)

        before = divisible(32 * self.width)
        features: list[nn.Module] = [ConvBlock(3, before, 3, stem_stride, bias=self.bias)]
        ends = []  # the last block before each halving and before the end
        for expansion, channels, blocks, stride in ROWS:
            if stem_stride == 2 and channels == HALVED_BY_STEM:
                continue
            if stride == 2:
                ends.append(len(features) - 1)
            after = divisible(channels * self.width)
            for c_in, first in [(before, stride), *[(after, 1)] * (blocks - 1)]:
                features.append(_InvertedResidual(c_in, after, first, expansion, bias=self.bias))
            before = after
        ends.append(len(features) - 1)
        self.stages: tuple[str, ...] = tuple(f"features.{end}" for end in ends[-4:])
        last = divisible(LAST * max(1.0, self.width))
        self.features = nn.Sequential(*features, ConvBlock(before, last, 1, bias=self.bias))
        self.output_layer = GDCTail(last, final_grid(self._size), self.embedding_dim, affine=self.affine)
        initialize(self, nn.Conv2d)

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
        out: Tensor = self.output_layer(self.features(images))
        return out
