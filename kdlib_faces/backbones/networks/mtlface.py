"""The backbone of MTLFace, an IR network that removes age information from its last feature map.

Module names follow MTLFace, so that its `backbone-*` files load unchanged.

References:
    Huang, Zhang, Shan, "When Age-Invariant Face Recognition Meets Face Age Synthesis: A Multi-Task Learning Framework",
    CVPR 2021, arXiv:2103.01520.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize
from kdlib_faces.backbones.networks.base import Backbone, final_grid, initialize
from kdlib_faces.backbones.networks.ir import IROutput, ir_stage, ir_stem

__all__ = ["MTLFaceNet"]

POOLED = (1, 2, 3)  # grids of the pooling pyramid of the channel attention
REDUCTION = 16


class _Factorization(nn.Module):
    """`x_age = x * (channel attention + spatial attention) / 2`, `x_identity = x - x_age`; returns the latter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1), nn.Sigmoid())
        pooled = channels * sum(side * side for side in POOLED)
        middle = max(1, pooled // REDUCTION)
        self.channel = nn.Sequential(
            nn.Conv2d(pooled, middle, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(middle, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        pyramid = [F.adaptive_avg_pool2d(x, side) + F.adaptive_max_pool2d(x, side) for side in POOLED]
        channel = self.channel(torch.cat([level.flatten(1) for level in pyramid], dim=1)[:, :, None, None])
        spatial = self.spatial(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1))
        out: Tensor = x - 0.5 * x * (channel + spatial)
        return out


class MTLFaceNet(Backbone):
    """MTLFace's backbone: (b, 3, h, w) images to (b, d) identity embeddings, not normalized.

    An IR network with a BatchNorm inside the blocks. Channel and spatial attention estimate the age-related part of the
    last feature map, and the embedding is computed from the rest.

    Args:
        layers: blocks in each of the four stages.
        embedding_dim: dimensions d of the embedding.
        width: factor of every channel count; the first stage has 64 * width rounded to a multiple of 8, at least 8.
        input_size: side of the square images, or (height, width), in pixels.
        dropout: dropout probability before the linear layer.
        se: add squeeze-and-excitation to each block.

    Attributes:
        stages: module paths at the end of each halving, for use as taps; `"fsm"` is the last map without age.

    Examples:
        >>> import torch
        >>> teacher = MTLFaceNet((1, 1, 1, 1), embedding_dim=64, width=0.25, input_size=32).eval()
        >>> teacher(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])

    References:
        Hzzone/MTLFace, backbone/aifr.py and backbone/irse.py: same layers and names.
    """

    stages: tuple[str, ...] = ("block1", "block2", "block3", "block4")
    family: ClassVar[str] = "mtlface"

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 14, 3),
        *,
        embedding_dim: int = 512,
        width: float = 1.0,
        input_size: InputSize = 112,
        dropout: float = 0.0,
        se: bool = False,
    ) -> None:
        super().__init__(embedding_dim, input_size)
        self.dropout = float(check_number("MTLFaceNet", "dropout", dropout, min=0, max=1))
        c = self._set_width(width)
        self.layers = self._check_blocks("layers", layers)
        self.se = bool(se)

        rows, columns = final_grid(self._size)
        kind = {"se": self.se, "mid_norm": True}
        self.input_layer = ir_stem(c)
        self.block1 = nn.Sequential(*ir_stage(c, c, self.layers[0], **kind))
        self.block2 = nn.Sequential(*ir_stage(c, 2 * c, self.layers[1], **kind))
        self.block3 = nn.Sequential(*ir_stage(2 * c, 4 * c, self.layers[2], **kind))
        self.block4 = nn.Sequential(*ir_stage(4 * c, 8 * c, self.layers[3], **kind))
        self.fsm = _Factorization(8 * c)
        self.output_layer = IROutput(8 * c, rows * columns, self.embedding_dim, self.dropout)
        initialize(self, nn.Conv2d, nn.Linear, fill=nn.init.xavier_uniform_)

    def forward(self, images: Tensor) -> Tensor:
        self._check_images(images)
        x = self.block2(self.block1(self.input_layer(images)))
        out: Tensor = self.output_layer(self.fsm(self.block4(self.block3(x))))
        return out
