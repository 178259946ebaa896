"""Teachers room: an age-invariant teacher whose last feature map is split by attention into identity and age.

The first half of MTLFace (Huang, Zhang, Shan, CVPR 2021, arXiv:2103.01520): `X_age = X * sigma(X)`, `X_id = X - X_age`, where
`sigma` is the mean of a channel and a spatial attention; the embedding is made of `X_id`. Its face synthesis is not here.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib._checks import check_number
from kdlib_faces._checks import InputError

__all__ = ["AgeAttention", "AttentiveAgeNet"]

PYRAMID = (1, 2, 3)
REDUCTION = 16
KERNEL = 7


class AgeAttention(nn.Module):
    """Which part of a feature map speaks of age: `X_id = X - X_age`, `X_age = X * (A_channel + A_spatial) / 2`.

    `A_channel`: average and maximum pools of grids 1, 2 and 3, one small perceptron for both, summed, sigmoid. `A_spatial`:
    maximum and mean over channels, one 7x7 convolution, sigmoid.

    Args:
        channels: c.
        start: value of the last biases. At 0, as published, half of every feature is taken for age, which a backbone that
            is trained already does not survive; at -4 the split begins with 2 %, and with small weights. Ours.

    Shape:
        `(b, c, h, w)` to `(b, c, h, w)`, the identity part; the age part passes through the submodule `age`, for a tap.

    Examples:
        >>> maps = torch.randn(2, 8, 5, 5)
        >>> AgeAttention(8)(maps).shape
        torch.Size([2, 8, 5, 5])

    References:
        Huang, Zhang, Shan: When Age-Invariant Face Recognition Meets Face Age Synthesis, CVPR 2021, and its public code.
    """

    def __init__(self, channels: int, *, start: float = -4.0) -> None:
        super().__init__()
        check_number("AgeAttention", "channels", channels, min=1, integer=True)
        check_number("AgeAttention", "start", start)
        cells = sum(grid * grid for grid in PYRAMID)
        hidden = max(1, channels // REDUCTION)
        self.channel = nn.Sequential(nn.Linear(cells * channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.spatial = nn.Conv2d(2, 1, KERNEL, padding=KERNEL // 2)
        self.age = nn.Identity()
        if start:
            last: Any = self.channel[2]
            with torch.no_grad():  # the biases alone speak at first, whatever the scale of the maps
                parts: tuple[tuple[Any, float], ...] = (
                    (last, start / 2),
                    (self.spatial, start),
                )  # two pools are summed
                for layer, bias in parts:
                    layer.weight.mul_(1e-3)
                    layer.bias.fill_(bias)

    def attention(self, maps: Tensor) -> Tensor:
        """`(A_channel + A_spatial) / 2`, in (0, 1): `(b, c, h, w)`."""
        pools = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
        pyramids = [torch.cat([pool(maps, grid).flatten(1) for grid in PYRAMID], dim=1) for pool in pools]
        by_channel = torch.sigmoid(self.channel(pyramids[0]) + self.channel(pyramids[1]))
        planes = torch.cat([maps.amax(1, keepdim=True), maps.mean(1, keepdim=True)], dim=1)
        by_place = torch.sigmoid(self.spatial(planes))
        return 0.5 * (by_channel[:, :, None, None] + by_place)

    def forward(self, maps: Tensor) -> Tensor:
        """The identity part of the maps."""
        part: Tensor = self.age(maps * self.attention(maps))
        return maps - part


class AttentiveAgeNet(nn.Module):
    """A backbone with an `AgeAttention` behind its last stage: images to the embedding of their identity part.

    Args:
        backbone: any network with `stages` and `embedding_dim`, `(b, 3, h, w)` to `(b, d)`; a copy of it is used.
        start: as in `AgeAttention`.
        channels: of the last stage; None asks one blank image.

    Attributes:
        stages: the backbone's, the last one now giving the identity part.
        age_tap: module path of the age part `(b, c, h, w)`, for a `StudentAdapter`.
        identity_tap: module path of the identity part.
        channels: c of both.

    Shape:
        images `(b, 3, h, w)`; returns `(b, d)`, not normalized.

    Raises:
        InputError: a backbone without stages, or whose last stage gives no map.

    Examples:
        >>> from kdlib import OUTPUT, StudentAdapter
        >>> from kdlib_faces.backbones import MobileFaceNet
        >>> net = AttentiveAgeNet(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32)).eval()
        >>> taps = StudentAdapter(net, {"embedding": OUTPUT, "age_map": net.age_tap})
        >>> {name: tuple(value.shape) for name, value in taps(torch.zeros(2, 3, 32, 32)).items()}
        {'embedding': (2, 16), 'age_map': (2, 32, 2, 2)}
    """

    def __init__(self, backbone: nn.Module, *, start: float = -4.0, channels: int | None = None) -> None:
        super().__init__()
        dim: Any = getattr(backbone, "embedding_dim", None)
        check_number("AttentiveAgeNet", "backbone.embedding_dim", dim, min=1, integer=True)
        stages = tuple(getattr(backbone, "stages", ()))
        if not stages:
            raise InputError(f"AttentiveAgeNet: backbone must have stages, {type(backbone).__name__} has none")
        self.backbone = copy.deepcopy(backbone)
        self.embedding_dim: int = dim
        self.input_size: Any = getattr(backbone, "input_size", None)
        self.start = start
        last = stages[-1]
        self.channels = _channels(self.backbone, last, self.input_size) if channels is None else channels
        owner, _, name = last.rpartition(".")
        split = nn.Sequential(self.backbone.get_submodule(last), AgeAttention(self.channels, start=start))
        setattr(self.backbone.get_submodule(owner), name, split)
        self.stages = tuple(f"backbone.{stage}" for stage in stages)
        self.identity_tap = self.stages[-1]
        self.age_tap = f"{self.stages[-1]}.1.age"

    @property
    def input_spec(self) -> Any:
        """What the backbone wants its images to be; None where it does not say."""
        return getattr(self.backbone, "input_spec", None)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of the identity part."""
        out: Tensor = self.backbone(images)
        return out


def _channels(backbone: nn.Module, stage: str, size: Any) -> int:
    """Channels of a stage's output, from one blank image."""
    from kdlib import StudentAdapter

    sides = size if isinstance(size, (tuple, list)) else (size or 112,) * 2
    probe = StudentAdapter(backbone, {"map": stage})
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            some = next(backbone.parameters(), torch.zeros(()))
            maps = probe(torch.zeros(1, 3, *sides, device=some.device, dtype=some.dtype))["map"]
    finally:
        for module, mode in modes.items():
            module.training = mode
    if maps.dim() != 4:
        raise InputError(f"AttentiveAgeNet: stage {stage!r} must give maps (b, c, h, w), got {tuple(maps.shape)}")
    return int(maps.shape[1])
