"""IR and IR-SE, residual teachers that differ from `IResNet`.

Module names follow face.evoLVe, like the checkpoints of TreB1eN, FaceX-Zoo, CurricularFace, AdaFace and CVLface, so
that all of them load unchanged. The projects differ in two switches: a BatchNorm between the first convolution of a
block and its PReLU, and weights of the last BatchNorm.

References:
    Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019,
    arXiv:1801.07698 (the residual unit).
    Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022, arXiv:2204.00964.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import ClassVar

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.base import Backbone, apply_in_own_precision, final_grid, initialize, published

__all__ = [
    "IRNet", "IROutput", "adaface_ir_101", "adaface_ir_18", "adaface_ir_50", "ir_101", "ir_152", "ir_50", "ir_se_101",
    "ir_se_152", "ir_se_50", "ir_stage", "ir_stem",
]  # fmt: skip

DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 101: (3, 13, 30, 3), 152: (3, 8, 36, 3)}
REDUCTION = 16


class _SqueezeExcitation(nn.Module):
    """Scale each channel by a function of the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(1, channels // REDUCTION)
        self.fc1 = nn.Conv2d(channels, middle, 1, bias=False)
        self.fc2 = nn.Conv2d(middle, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return x * out


class _Block(nn.Module):
    """BN, conv 3x3, [BN,] PReLU, conv 3x3 (stride), BN [, squeeze-and-excitation]; plus the shortcut.

    If the number of channels does not change, the shortcut takes every `stride`-th pixel and has no weights.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, *, se: bool, mid_norm: bool) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        if c_in != c_out:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(c_in),
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            *([nn.BatchNorm2d(c_out)] if mid_norm else []),
            nn.PReLU(c_out),
            nn.Conv2d(c_out, c_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            *([_SqueezeExcitation(c_out)] if se else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return out


def ir_stem(channels: int) -> nn.Sequential:
    """Convolution of stride 1, BatchNorm, PReLU."""
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(channels))


def ir_stage(c_in: int, c_out: int, blocks: int, *, se: bool, mid_norm: bool) -> list[nn.Module]:
    """Return the blocks of one stage, the first with stride 2."""
    sizes = [(c_in, c_out, 2), *[(c_out, c_out, 1)] * (blocks - 1)]
    return [_Block(*each, se=se, mid_norm=mid_norm) for each in sizes]


class IROutput(nn.Sequential):
    """BN, dropout, flattening of the grid, linear layer, BN; the last two compute in the precision of their weights."""

    def __init__(self, channels: int, cells: int, embedding_dim: int, dropout: float, *, affine: bool = True) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.Dropout(dropout),
            nn.Flatten(1),
            nn.Linear(channels * cells, embedding_dim),
            nn.BatchNorm1d(embedding_dim, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        norm, dropout, flatten, linear, last_norm = self
        return apply_in_own_precision(linear, last_norm, flatten(dropout(norm(x))))


class IRNet(Backbone):
    """The IR networks of face.evoLVe, TreB1eN, AdaFace and related projects: (b, 3, h, w) to (b, d), not normalized.

    A stem of stride 1, four stages of 64, 128, 256, 512 channels that each halve the grid, BatchNorm, one linear layer
    over the whole final grid, BatchNorm. Three networks are called "IR-50". They differ in a BatchNorm inside the
    blocks, in the shortcuts and in the last BatchNorm, so their weights are not interchangeable.

    ================================================ ========= ======== ==========
    network                                           mid_norm  affine   parameters
    ================================================ ========= ======== ==========
    face.evoLVe, TreB1eN, FaceX-Zoo: `ir_50`          no        yes      43,574,976
    AdaFace, CVLface: `adaface_ir_50`                 yes       no       43,585,600
    insightface: `iresnet50`, another class           yes       yes      43,590,848
    ================================================ ========= ======== ==========

    Args:
        layers: blocks in each of the four stages; (3, 4, 14, 3) is the 50-layer network.
        embedding_dim: dimensions d of the embedding.
        width: factor of every channel count; the first stage has 64 * width rounded to a multiple of 8, at least 8.
        input_size: side of the square images, or (height, width), in pixels.
        dropout: dropout probability before the linear layer.
        se: add squeeze-and-excitation with reduction 16 to each block (the IR-SE networks).
        mid_norm: BatchNorm between the first convolution of a block and its PReLU.
        affine: whether the last BatchNorm has weight and bias.

    Examples:
        >>> import torch
        >>> teacher = IRNet((1, 2, 1, 1), embedding_dim=64, width=0.25, input_size=32, se=True).eval()
        >>> teacher(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
        >>> teacher.stages
        ('body.0', 'body.2', 'body.3', 'body.4')

    References:
        face.evoLVe, backbone/model_irse.py; CVLface, models/iresnet/model.py: same layers and names, and the same
        initialization from He's normal distribution over the outputs.
    """

    family: ClassVar[str] = "ir"

    def __init__(
        self,
        layers: Sequence[int],
        *,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: InputSize = 112,
        dropout: float = 0.0,
        se: bool = False,
        mid_norm: bool = False,
        affine: bool = True,
    ) -> None:
        super().__init__(embedding_dim, input_size)
        self.dropout = float(check_number("IRNet", "dropout", dropout, min=0, max=1))
        c = self._set_width(width)
        self.layers = self._check_blocks("layers", layers)
        self.se, self.mid_norm, self.affine = bool(se), bool(mid_norm), bool(affine)
        self.stages: tuple[str, ...] = tuple(f"body.{end - 1}" for end in accumulate(self.layers))

        rows, columns = final_grid(self._size)
        widths = [c, c, 2 * c, 4 * c, 8 * c]
        kind = {"se": self.se, "mid_norm": self.mid_norm}
        self.input_layer = ir_stem(c)
        stages = [ir_stage(*each, **kind) for each in zip(widths, widths[1:], self.layers, strict=False)]
        self.body = nn.Sequential(*chain(*stages))
        self.output_layer = IROutput(8 * c, rows * columns, self.embedding_dim, self.dropout, affine=self.affine)
        initialize(self, nn.Conv2d, nn.Linear)

    @property
    def name(self) -> str:
        """`ir_50`, `ir_se_50`, `adaface_ir_50` or similar for a published network, otherwise `ir`."""
        depth = next((depth for depth, layers in DEPTHS.items() if layers == self.layers), None)
        if depth is None or self.mid_norm == self.affine:
            return "ir"
        if self.mid_norm:
            return f"adaface_ir_{depth}" if depth < 152 and not self.se else "ir"
        return f"ir_{'se_' * self.se}{depth}" if depth > 18 else "ir"

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
        out: Tensor = self.output_layer(self.body(self.input_layer(images)))
        return out


ADAFACE = {"mid_norm": True, "affine": False}
ir_50 = published("ir_50", IRNet, DEPTHS[50], " as in face.evoLVe: 43,574,976 parameters")
ir_101 = published("ir_101", IRNet, DEPTHS[101], " as in face.evoLVe: 65,129,792 parameters")
ir_152 = published("ir_152", IRNet, DEPTHS[152], " as in face.evoLVe: 70,737,600 parameters")
ir_se_50 = published("ir_se_50", IRNet, DEPTHS[50], " and squeeze-and-excitation: 43,797,696 parameters", se=True)
ir_se_101 = published("ir_se_101", IRNet, DEPTHS[101], " and squeeze-and-excitation", se=True)
ir_se_152 = published("ir_se_152", IRNet, DEPTHS[152], " and squeeze-and-excitation: 71,148,736 parameters", se=True)
adaface_ir_18 = published("adaface_ir_18", IRNet, DEPTHS[18], " as in AdaFace: 24,020,352 parameters", **ADAFACE)
adaface_ir_50 = published("adaface_ir_50", IRNet, DEPTHS[50], " as in AdaFace: 43,585,600 parameters", **ADAFACE)
adaface_ir_101 = published("adaface_ir_101", IRNet, DEPTHS[101], " as in AdaFace: 65,150,912 parameters", **ADAFACE)
