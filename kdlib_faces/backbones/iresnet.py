"""Backbones room: IResNet, the heavy teacher family. Imports torch and the argument checks only.

The modules carry insightface's names, so that its published `iresnet` checkpoints load unchanged.

References:
    Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
    arXiv:1801.07698.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones._arguments import (
    InputSize,
    channels,
    check_blocks,
    check_images,
    final_grid,
    height_width,
    show_size,
)
from kdlib_faces.backbones._precision import in_precision_of
from kdlib_faces.backbones.input_spec import InputSpec

__all__ = ["IResNet", "iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet200"]

NORM_EPS = 1e-5
DEPTHS: dict[tuple[int, int, int, int], str] = {
    (2, 2, 2, 2): "iresnet18",
    (3, 4, 6, 3): "iresnet34",
    (3, 4, 14, 3): "iresnet50",
    (3, 13, 30, 3): "iresnet100",
    (6, 26, 60, 6): "iresnet200",
}


class _Block(nn.Module):
    """BN, conv 3x3, BN, PReLU, conv 3x3 (stride), BN; plus the shortcut; nothing after the sum."""

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
    """`blocks` blocks, the first of stride 2."""
    return nn.Sequential(_Block(c_in, c_out, 2, eps), *[_Block(c_out, c_out, 1, eps) for _ in range(blocks - 1)])


class IResNet(nn.Module):
    """insightface's residual network: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    A stem of stride 1, four stages of 64, 128, 256, 512 channels that each halve the grid, BatchNorm, one linear layer
    over the whole final grid, and a BatchNorm whose weight is frozen at 1. Under autocast the linear layer and the last
    BatchNorm run in the precision of their weights.

    Args:
        layers: blocks in each of the four stages; (3, 4, 14, 3) is iresnet50.
        embedding_dim: dimensions d of the embedding.
        width: factor on every channel count; the first stage has 64 * width rounded to a multiple of 8, at least 8.
        input_size: side of the square images, or (height, width), in pixels. The final grid is a sixteenth, rounded up.
        dropout: probability of dropping a value before the linear layer.
        norm_eps: what every BatchNorm adds to its variance; MagFace's copies of these networks have 2e-5.

    Attributes:
        stages: module paths at the end of each halving, from fine to coarse, for use as taps.
        arguments: the arguments that rebuild this network.
        input_spec: what its images must be.

    Raises:
        ValueError: an argument outside its range, or images of another size than `input_size`.
        TypeError: an argument of a wrong type.

    Examples:
        >>> import torch
        >>> teacher = IResNet((1, 1, 1, 1), embedding_dim=64, width=0.25, input_size=32).eval()
        >>> teacher(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
        >>> teacher.stages
        ('layer1', 'layer2', 'layer3', 'layer4')

    References:
        insightface, recognition/arcface_torch/backbones/iresnet.py: same layers, names and initial values
        (convolutions from N(0, 0.1)).
    """

    family: ClassVar[str] = "iresnet"
    stages: tuple[str, ...] = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        layers: Sequence[int],
        *,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: InputSize = 112,
        dropout: float = 0.0,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        check_number("IResNet", "embedding_dim", embedding_dim, min=1, integer=True)
        check_number("IResNet", "dropout", dropout, min=0, max=1)
        check_number("IResNet", "norm_eps", norm_eps, above=0)
        c = channels("IResNet", width)
        self._size = height_width("IResNet", input_size)
        self.layers = check_blocks("IResNet", "layers", layers)
        self.embedding_dim = embedding_dim
        self.width = float(width)
        self.input_size: InputSize = show_size(self._size)
        self.norm_eps = float(norm_eps)
        self.input_spec = InputSpec(size=self.input_size)

        rows, columns = final_grid(self._size)
        self.conv1 = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c, norm_eps)
        self.prelu = nn.PReLU(c)
        self.layer1 = _stage(c, c, self.layers[0], norm_eps)
        self.layer2 = _stage(c, 2 * c, self.layers[1], norm_eps)
        self.layer3 = _stage(2 * c, 4 * c, self.layers[2], norm_eps)
        self.layer4 = _stage(4 * c, 8 * c, self.layers[3], norm_eps)
        self.bn2 = nn.BatchNorm2d(8 * c, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * c * rows * columns, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim, norm_eps)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.1)

    @property
    def name(self) -> str:
        """Name in the registry: `iresnet50` for a published depth, else `iresnet`."""
        return DEPTHS.get(self.layers, "iresnet")

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "embedding_dim": self.embedding_dim,
            "width": self.width,
            "input_size": self.input_size,
            "dropout": self.dropout.p,
            **({} if self.norm_eps == NORM_EPS else {"norm_eps": self.norm_eps}),
        }

    def forward(self, images: Tensor) -> Tensor:
        check_images("IResNet", images, self._size)
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x).flatten(1))
        return in_precision_of(self.fc.weight, self._embed, x)

    def _embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(self.fc(x))
        return out

    def __repr__(self) -> str:
        return f"IResNet({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"


def iresnet18(
    embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0
) -> IResNet:
    """`IResNet` of blocks (2, 2, 2, 2): 24,025,600 parameters, 2.61 G multiply-adds."""
    return IResNet((2, 2, 2, 2), embedding_dim=embedding_dim, width=width, input_size=input_size, dropout=dropout)


def iresnet34(
    embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0
) -> IResNet:
    """`IResNet` of blocks (3, 4, 6, 3): 34,139,328 parameters, 4.46 G multiply-adds."""
    return IResNet((3, 4, 6, 3), embedding_dim=embedding_dim, width=width, input_size=input_size, dropout=dropout)


def iresnet50(
    embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0
) -> IResNet:
    """`IResNet` of blocks (3, 4, 14, 3): 43,590,848 parameters, 6.31 G multiply-adds."""
    return IResNet((3, 4, 14, 3), embedding_dim=embedding_dim, width=width, input_size=input_size, dropout=dropout)


def iresnet100(
    embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0
) -> IResNet:
    """`IResNet` of blocks (3, 13, 30, 3): 65,156,160 parameters, 12.09 G multiply-adds."""
    return IResNet((3, 13, 30, 3), embedding_dim=embedding_dim, width=width, input_size=input_size, dropout=dropout)


def iresnet200(
    embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0
) -> IResNet:
    """`IResNet` of blocks (6, 26, 60, 6): 118,833,920 parameters, 23.42 G multiply-adds."""
    return IResNet((6, 26, 60, 6), embedding_dim=embedding_dim, width=width, input_size=input_size, dropout=dropout)
