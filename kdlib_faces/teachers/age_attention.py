"""An age-invariant teacher that removes the age part of its last feature map by attention."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import StudentAdapter
from kdlib._checks import check_number
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import Backbone, InputSpec
from kdlib_faces.backbones.input_spec import height_width

__all__ = ["AgeAttention", "AttentiveAgeNet"]

PYRAMID = (1, 2, 3)
REDUCTION = 16
KERNEL = 7


class AgeAttention(nn.Module):
    """Remove the age part of a feature map: `X_id = X - X_age`, `X_age = X * (A_channel + A_spatial) / 2`.

    `A_channel`: average and maximum pools on grids of 1, 2 and 3, one perceptron shared by both, their sum, a sigmoid.
    `A_spatial`: maximum and mean over the channels, one 7x7 convolution, a sigmoid.

    Args:
        channels: Channels `c` of the map.
        initial_bias: Initial bias of both attentions. At 0, the published value, half of every feature is attributed to age,
            which destroys a trained backbone. At -4 the age part starts at 2 %, with small weights. This option is ours.

    Shape:
        `(b, c, h, w)` to `(b, c, h, w)`, the identity part. The age part is the output of the submodule `age`, for a tap.

    Examples:
        >>> maps = torch.randn(2, 8, 5, 5)
        >>> AgeAttention(8)(maps).shape
        torch.Size([2, 8, 5, 5])

    References:
        Huang, Zhang, Shan: When Age-Invariant Face Recognition Meets Face Age Synthesis, CVPR 2021, and its public code.
    """

    def __init__(self, channels: int, *, initial_bias: float = -4.0) -> None:
        super().__init__()
        check_number("AgeAttention", "channels", channels, min=1, integer=True)
        check_number("AgeAttention", "initial_bias", initial_bias)
        cells = sum(grid * grid for grid in PYRAMID)
        hidden = max(1, channels // REDUCTION)
        first, last = nn.Linear(cells * channels, hidden), nn.Linear(hidden, channels)
        self.channel = nn.Sequential(first, nn.ReLU(), last)
        self.spatial = nn.Conv2d(2, 1, KERNEL, padding=KERNEL // 2)
        self.age = nn.Identity()
        if initial_bias:
            # With small weights the initial attention depends on the biases alone, whatever the scale of the maps.
            with torch.no_grad():
                for name, value in (*last.named_parameters(), *self.spatial.named_parameters()):
                    value.mul_(1e-3) if name == "weight" else value.fill_(initial_bias)
                last.bias.div_(2)  # it is added twice, once for each pool

    def attention(self, maps: Tensor) -> Tensor:
        """Return `(A_channel + A_spatial) / 2`, in (0, 1), `(b, c, h, w)`."""
        pools = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
        pyramids = [torch.cat([pool(maps, grid).flatten(1) for grid in PYRAMID], dim=1) for pool in pools]
        by_channel = torch.sigmoid(self.channel(pyramids[0]) + self.channel(pyramids[1]))
        planes = torch.cat([maps.amax(1, keepdim=True), maps.mean(1, keepdim=True)], dim=1)
        by_position = torch.sigmoid(self.spatial(planes))
        return 0.5 * (by_channel[:, :, None, None] + by_position)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the identity part of the maps."""
        age: Tensor = self.age(maps * self.attention(maps))
        return maps - age


class AttentiveAgeNet(nn.Module):
    """A backbone with `AgeAttention` behind its last stage: images to the embedding of the identity part.

    This is the recognition half of MTLFace; its face synthesis is not included.

    Args:
        backbone: The network to extend. It is copied.
        initial_bias: See `AgeAttention`.
        channels: Channels of the last stage; None measures them on a blank image.

    Attributes:
        stages: Tap paths of the backbone's stages; the last one returns the identity part.
        age_tap: Tap path of the age part `(b, c, h, w)`.
        identity_tap: Tap path of the identity part.
        channels: Channels `c` of both parts.

    Shape:
        images `(b, 3, h, w)`; returns `(b, d)`, not normalized.

    Raises:
        TypeError: The backbone is not one of ours.
        InputError: The last stage of the backbone does not return a map.

    Examples:
        >>> from kdlib import OUTPUT, StudentAdapter
        >>> from kdlib_faces.backbones import MobileFaceNet
        >>> net = AttentiveAgeNet(MobileFaceNet(embedding_dim=16, width=0.25, input_size=32)).eval()
        >>> taps = StudentAdapter(net, {"embedding": OUTPUT, "age_map": net.age_tap})
        >>> {name: tuple(value.shape) for name, value in taps(torch.zeros(2, 3, 32, 32)).items()}
        {'embedding': (2, 16), 'age_map': (2, 32, 2, 2)}

    References:
        Huang, Zhang, Shan: When Age-Invariant Face Recognition Meets Face Age Synthesis, CVPR 2021, arXiv:2103.01520.
    """

    def __init__(self, backbone: Backbone, *, initial_bias: float = -4.0, channels: int | None = None) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(f"AttentiveAgeNet: backbone must be a face backbone, got {type(backbone).__name__}")
        self.backbone = copy.deepcopy(backbone)
        self.embedding_dim = backbone.embedding_dim
        self.input_size = backbone.input_size
        self.initial_bias = initial_bias
        last = backbone.stages[-1]
        self.channels = _count_channels(self.backbone, last) if channels is None else channels
        parent, _, name = last.rpartition(".")
        attention = AgeAttention(self.channels, initial_bias=initial_bias)
        setattr(self.backbone.get_submodule(parent), name, nn.Sequential(self.backbone.get_submodule(last), attention))
        self.stages = tuple(f"backbone.{stage}" for stage in backbone.stages)
        self.identity_tap = self.stages[-1]
        self.age_tap = f"{self.stages[-1]}.1.age"

    @property
    def input_spec(self) -> InputSpec:
        """The image format of the backbone."""
        return self.backbone.input_spec

    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings of the identity part."""
        embeddings: Tensor = self.backbone(images)
        return embeddings


def _count_channels(backbone: Backbone, stage: str) -> int:
    """Channels of a stage's output, measured on one blank image."""
    images = next(backbone.parameters()).new_zeros(1, 3, *height_width("AttentiveAgeNet", backbone.input_size))
    with torch.no_grad():
        maps = StudentAdapter(copy.deepcopy(backbone).eval(), {"map": stage})(images)["map"]
    if maps.dim() != 4:
        raise InputError(f"AttentiveAgeNet: stage {stage!r} must return maps (b, c, h, w), got {tuple(maps.shape)}")
    return int(maps.shape[1])
