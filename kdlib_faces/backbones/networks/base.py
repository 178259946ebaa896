"""Base class of the face networks, and the parts and checks that they share."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from kdlib._checks import check_number, show_shape
from kdlib_faces.backbones.input_spec import InputSize, InputSpec, height_width

__all__ = ["Arguments", "Backbone", "Layers", "channels", "check_blocks", "final_grid", "in_precision_of"]

Arguments: TypeAlias = dict[str, Any]
"""Keyword arguments of a constructor."""

MAX_BLOCKS = 256  # a deeper stage is a corrupt file, not a network


class Backbone(nn.Module):
    """Base class of all face networks: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    Args:
        embedding_dim: Dimensions d of the embedding.
        input_size: Side of the square images, or (height, width), in pixels.

    Attributes:
        embedding_dim: Dimensions d of the embedding.
        input_size: Side of the square images, or (height, width), in pixels.
        input_spec: Channel order and normalization that the weights expect.
        stages: Module paths at the end of each halving of the grid, from fine to coarse, for use as taps.
        family: Name in the registry of the constructor that takes `arguments`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument has the wrong type.
    """

    stages: tuple[str, ...]
    family: ClassVar[str]
    # Attributes that rebuild the network, in the order of its repr; those with a default here are omitted if equal to it.
    _names: ClassVar[tuple[str, ...]]
    _defaults: ClassVar[Mapping[str, object]] = {}

    def __init__(self, embedding_dim: int, input_size: InputSize) -> None:
        super().__init__()
        owner = type(self).__name__
        check_number(owner, "embedding_dim", embedding_dim, min=1, integer=True)
        self._size = height_width(owner, input_size)
        self.embedding_dim = embedding_dim
        self.input_size: InputSize = self._size[0] if self._size[0] == self._size[1] else self._size
        self.input_spec = InputSpec(size=self.input_size)

    @property
    def name(self) -> str:
        """Name of this network in the registry, such as `iresnet50`."""
        return self.family

    @property
    def arguments(self) -> Arguments:
        """Arguments that rebuild this network."""
        values = {name: getattr(self, name) for name in self._names}
        values = {name: value.p if isinstance(value, nn.Dropout) else value for name, value in values.items()}
        return {name: value for name, value in values.items() if self._defaults.get(name, self) != value}

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, h, w) to embeddings (b, d)."""

    def _check_images(self, images: Tensor) -> None:
        """Images must have the size of the network, because its last layer has one weight per cell of the grid."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # missing in torch's stubs
            return  # a traced size is a tensor, and comparing it would warn
        if images.dim() != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self._size:
            expected = f"(b, 3, {self._size[0]}, {self._size[1]})"
            raise ValueError(
                f"{type(self).__name__}: images must be {expected}, got {show_shape(images)}; set input_size to change it"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"


class Layers(nn.Module):
    """Modules in sequence below the name `layers`, as in insightface's checkpoints."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def final_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Return the grid after four convolutions of stride 2, kernel 3 and padding 1, each of which halves and rounds up."""
    return math.ceil(size[0] / 16), math.ceil(size[1] / 16)


def channels(owner: str, width: float) -> int:
    """Return the channels of the first stage, 64 at width 1; later stages are integer multiples of it."""
    check_number(owner, "width", width, above=0)
    return max(8, 8 * round(8 * width))


def check_blocks(owner: str, name: str, blocks: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the number of blocks of the four stages; each stage must have at least one."""
    if not isinstance(blocks, list | tuple) or len(blocks) != 4:
        raise ValueError(f"{owner}: {name} must be four block counts, got {blocks!r}")
    for count in blocks:
        check_number(owner, name, count, min=1, max=MAX_BLOCKS, integer=True)
    return blocks[0], blocks[1], blocks[2], blocks[3]


def in_precision_of(weight: Tensor, layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply the last layers without autocast, because a sum of 25,088 products is too inaccurate in half precision."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return layers(x)
    with torch.autocast(device, enabled=False):
        return layers(x.to(weight.dtype))
