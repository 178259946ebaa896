"""IResNet, insightface's residual teachers, with its module names so that its checkpoints load unchanged.

References:
    Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
    arXiv:1801.07698.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.base import Backbone, apply_in_own_precision, final_grid, initialize, published

__all__ = ["IResNet", "iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet200"]

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}


class _Block(nn.Module):
    """BN, conv 3x3, BN, PReLU, conv 3x3 (stride), BN; plus the shortcut, without activation after the sum."""

    def __init__(self, c_in: int, c_out: int, stride: int, eps: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out, eps)
        self.prelu = nn.PReLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out, eps)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out, eps))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        return out + (x if self.downsample is None else self.downsample(x))


def _stage(c_in: int, c_out: int, blocks: int, eps: float) -> nn.Sequential:
    """Return `blocks` blocks, the first with stride 2."""
    return nn.Sequential(_Block(c_in, c_out, 2, eps), *[_Block(c_out, c_out, 1, eps) for _ in range(blocks - 1)])


class IResNet(Backbone):
    """insightface's residual network: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    A stem of stride 1, four stages of 64, 128, 256, 512 channels that each halve the grid, BatchNorm, one linear layer
    over the whole final grid, and a BatchNorm whose weight is frozen at 1. Under autocast, the linear layer and the
    last BatchNorm compute in the precision of their weights.

    Args:
        layers: blocks in each of the four stages; (3, 4, 14, 3) is iresnet50.
        embedding_dim: dimensions d of the embedding.
        width: factor of every channel count; the first stage has 64 * width rounded to a multiple of 8, at least 8.
        input_size: side of the square images, or (height, width), in pixels.
        dropout: dropout probability before the linear layer.
        norm_eps: epsilon of every BatchNorm; MagFace's copies of these networks use 2e-5.

    Examples:
        >>> import torch
        >>> teacher = IResNet((1, 1, 1, 1), embedding_dim=64, width=0.25, input_size=32).eval()
        >>> teacher(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
        >>> teacher.stages
        ('layer1', 'layer2', 'layer3', 'layer4')

    References:
        insightface, recognition/arcface_torch/backbones/iresnet.py: same layers, names and initialization
        (convolutions from N(0, 0.1)).
    """

    stages: tuple[str, ...] = ("layer1", "layer2", "layer3", "layer4")
    family: ClassVar[str] = "iresnet"
    _optional: ClassVar[tuple[str, ...]] = ("norm_eps",)

    def __init__(
        self,
        layers: Sequence[int],
        *,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: InputSize = 112,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(embedding_dim, input_size)
        check_number("IResNet", "dropout", dropout, min=0, max=1)
        self.norm_eps = float(check_number("IResNet", "norm_eps", norm_eps, above=0))
        c = self._set_width(width)
        self.layers = self._check_blocks("layers", layers)

        rows, columns = final_grid(self._size)
        self.conv1 = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c, self.norm_eps)
        self.prelu = nn.PReLU(c)
        self.layer1 = _stage(c, c, self.layers[0], self.norm_eps)
        self.layer2 = _stage(c, 2 * c, self.layers[1], self.norm_eps)
        self.layer3 = _stage(2 * c, 4 * c, self.layers[2], self.norm_eps)
        self.layer4 = _stage(4 * c, 8 * c, self.layers[3], self.norm_eps)
        self.bn2 = nn.BatchNorm2d(8 * c, self.norm_eps)
        self.dropout = nn.Dropout(float(dropout))
        self.fc = nn.Linear(8 * c * rows * columns, self.embedding_dim)
        self.features = nn.BatchNorm1d(self.embedding_dim, self.norm_eps)
        self.features.weight.requires_grad_(False)
        initialize(self, nn.Conv2d, fill=lambda weight: nn.init.normal_(weight, 0.0, 0.1))

    @property
    def name(self) -> str:
        return next((f"iresnet{depth}" for depth, layers in DEPTHS.items() if layers == self.layers), "iresnet")

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x).flatten(1))
        return apply_in_own_precision(self.fc, self.features, x)


iresnet18 = published("iresnet18", IResNet, DEPTHS[18], ": 24,025,600 parameters, 2.61 G multiply-adds")
iresnet34 = published("iresnet34", IResNet, DEPTHS[34], ": 34,139,328 parameters, 4.46 G multiply-adds")
iresnet50 = published("iresnet50", IResNet, DEPTHS[50], ": 43,590,848 parameters, 6.31 G multiply-adds")
iresnet100 = published("iresnet100", IResNet, DEPTHS[100], ": 65,156,160 parameters, 12.09 G multiply-adds")
iresnet200 = published("iresnet200", IResNet, DEPTHS[200], ": 118,833,920 parameters, 23.42 G multiply-adds")
