"""MobileNet V1 for faces.

Module names follow yakhyo's project, so that its checkpoints load unchanged; those of bubbliiiing load by a table of
names.

References:
    Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017,
    arXiv:1704.04861.
"""

from typing import ClassVar, Literal

from torch import Tensor, nn

from kdlib._checks import check_choice, check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.base import Backbone, Layers, apply_in_own_precision, final_grid, initialize

__all__ = ["ConvBlock", "GDCTail", "MobileNetV1", "divisible", "mobilenet_v1_025"]

TAILS = ("gdc", "flat")
# Pairs of a depthwise and a pointwise convolution: output channels as a power of two of the stem's, stride.
STAGES = (((1, 1), (2, 2), (2, 1), (3, 2), (3, 1)), ((4, 2), *[(4, 1)] * 5), ((5, 2), (5, 1)))


def divisible(channels: float) -> int:
    """Return the multiple of 8 nearest to `channels`, at least 8 and at most a tenth below."""
    whole = max(8, int(channels + 4) // 8 * 8)
    return whole + 8 if whole < 0.9 * channels else whole


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, PReLU or ReLU6."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        relu6: bool = False,
    ) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=bias),
            nn.BatchNorm2d(c_out),
            nn.ReLU6() if relu6 else nn.PReLU(c_out),
        )


class GDCTail(nn.Module):
    """Global depthwise convolution, linear layer, BatchNorm."""

    def __init__(self, channels: int, grid: tuple[int, int], embedding_dim: int, *, affine: bool = True) -> None:
        super().__init__()
        depthwise = nn.Conv2d(channels, channels, grid, groups=channels, bias=False)
        self.features = nn.Sequential(Layers(depthwise, nn.BatchNorm2d(channels)), nn.Flatten(1))
        self.fc = nn.Sequential(
            nn.Linear(channels, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim, affine=affine)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.features(x))
        return out


class MobileNetV1(Backbone):
    """MobileNet V1 with a stem of stride 1: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    Thirteen pairs of a depthwise and a pointwise convolution; four of them halve the grid. At 112 pixels, 512
    dimensions: 3,795,456 parameters; with width 0.25 360,960, or 363,696 with `bias`, which yakhyo's checkpoints have.

    Args:
        embedding_dim: dimensions d of the embedding.
        width: factor on every channel count, rounded to multiples of 8.
        input_size: side of the square images, or (height, width), in pixels.
        bias: whether convolutions before a BatchNorm have a bias. It is redundant with the BatchNorm.
        tail: `"gdc"`: global depthwise convolution, linear layer, BatchNorm, and PReLU throughout, as in yakhyo's.
            `"flat"`: 1x1 convolution to 512 * width channels, BatchNorm, one linear layer over the whole grid,
            BatchNorm, and ReLU6 before, as in bubbliiiing's.
        dropout: dropout probability before the linear layer of the `"flat"` tail.

    Examples:
        >>> import torch
        >>> student = MobileNetV1(64, width=0.25, input_size=32).eval()
        >>> student(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
        >>> student.stages
        ('stage1.3', 'stage1.5', 'stage2.5', 'stage3.1')

    References:
        yakhyo/face-recognition, models/mobilenetv1.py; bubbliiiing/arcface-pytorch, nets/mobilenet.py: same layers.
    """

    stages: tuple[str, ...] = ("stage1.3", "stage1.5", "stage2.5", "stage3.1")
    family: ClassVar[str] = "mobilenet_v1"

    def __init__(
        self,
        embedding_dim: int = 512,
        *,
        width: float = 1.0,
        input_size: InputSize = 112,
        bias: bool = False,
        tail: Literal["gdc", "flat"] = "gdc",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(embedding_dim, input_size)
        self.width = float(check_number("MobileNetV1", "width", width, above=0))
        check_number("MobileNetV1", "dropout", dropout, min=0, max=1)
        check_choice("MobileNetV1", "tail", tail, TAILS)
        self.bias, self.tail = bool(bias), tail

        widths = [divisible(32 * 2**power * self.width) for power in range(6)]
        kind = {"bias": self.bias, "relu6": tail == "flat"}
        before = widths[0]
        parts: list[list[nn.Module]] = [[], [], []]
        for pairs, stage in zip(parts, STAGES, strict=True):
            for power, stride in stage:
                depthwise = ConvBlock(before, before, 3, stride, groups=before, **kind)
                pairs.append(nn.Sequential(depthwise, ConvBlock(before, widths[power], 1, **kind)))
                before = widths[power]
        self.stage1 = nn.Sequential(ConvBlock(3, widths[0], 3, **kind), *parts[0])
        self.stage2 = nn.Sequential(*parts[1])
        self.stage3 = nn.Sequential(*parts[2])
        self.dropout = nn.Dropout(float(dropout))
        grid = final_grid(self._size)
        if tail == "gdc":
            self.output_layer = GDCTail(before, grid, self.embedding_dim)
        else:
            last = widths[4]
            self.sep = nn.Conv2d(before, last, 1, bias=False)
            self.sep_bn = nn.BatchNorm2d(last)
            self.prelu = nn.PReLU(last)
            self.bn2 = nn.BatchNorm2d(last)
            self.linear = nn.Linear(last * grid[0] * grid[1], self.embedding_dim)
            self.features = nn.BatchNorm1d(self.embedding_dim)
        initialize(self, nn.Conv2d)

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
        x = self.stage3(self.stage2(self.stage1(images)))
        if self.tail == "gdc":
            out: Tensor = self.output_layer(x)
            return out
        x = self.bn2(self.prelu(self.sep_bn(self.sep(x))))
        return apply_in_own_precision(self.linear, self.features, self.dropout(x.flatten(1)))


def mobilenet_v1_025(embedding_dim: int = 512, *, width: float = 0.25, input_size: InputSize = 112) -> MobileNetV1:
    """`MobileNetV1` with a quarter of the width: 360,960 parameters at 112 pixels and 512 dimensions.

    Examples:
        >>> import torch
        >>> mobilenet_v1_025(embedding_dim=16, input_size=32).eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 16])
    """
    return MobileNetV1(embedding_dim, width=width, input_size=input_size)
