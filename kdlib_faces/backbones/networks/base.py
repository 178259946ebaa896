"""Base class of the face networks, and the parts and checks that they share."""

import inspect
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_number, show_shape
from kdlib_faces.backbones.input_spec import InputSize, InputSpec, height_width

__all__ = ["Arguments", "Backbone", "Layers", "apply_in_own_precision", "final_grid", "initialize", "published"]

Arguments: TypeAlias = dict[str, Any]
"""Keyword arguments of a constructor."""

MAX_BLOCKS = 256  # a deeper stage is a corrupt file, not a network


class Backbone(nn.Module):
    """Base class of all face networks: (b, 3, h, w) images to (b, d) embeddings, not normalized.

    Args:
        embedding_dim: Dimensions d of the embedding.
        input_size: Side of the square images, or (height, width), in pixels. The final grid has a sixteenth of the
            size, rounded up.

    Attributes:
        embedding_dim: Dimensions d of the embedding.
        input_size: Side of the square images, or (height, width), in pixels.
        input_spec: Channel order and normalization that the weights expect.
        stages: Module paths at the end of each halving of the grid, from fine to coarse, for use as taps.
        family: Name in the registry of the constructor that takes `arguments`.

    Raises:
        ValueError: An argument is out of range, or images have another size than `input_size`.
        TypeError: An argument has the wrong type.
    """

    stages: tuple[str, ...]
    family: ClassVar[str]
    # Parameters that `arguments` omits at their default. The attributes of a network are named as its parameters.
    _optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, embedding_dim: int, input_size: InputSize) -> None:
        super().__init__()
        owner = type(self).__name__
        self.embedding_dim = check_number(owner, "embedding_dim", embedding_dim, min=1, integer=True)
        self._size = height_width(owner, input_size)
        self.input_size: InputSize = self._size[0] if self._size[0] == self._size[1] else self._size
        self.input_spec = InputSpec(size=self.input_size)

    @property
    def name(self) -> str:
        """Name of this network in the registry, such as `iresnet50`."""
        return self.family

    @property
    def arguments(self) -> Arguments:
        """Arguments that rebuild this network."""
        values = {}
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            value = value.p if isinstance(value, nn.Dropout) else value
            if name not in self._optional or value != parameter.default:
                values[name] = value
        return values

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, h, w) to embeddings (b, d)."""

    def _set_width(self, width: float) -> int:
        """Store `width`; return the channels of the first stage, 64 at width 1, of which later stages have multiples."""
        self.width = float(check_number(type(self).__name__, "width", width, above=0))
        return max(8, 8 * round(8 * self.width))

    def _check_blocks(self, name: str, blocks: Sequence[int]) -> tuple[int, int, int, int]:
        """Return the number of blocks of the four stages; each stage must have at least one."""
        owner = type(self).__name__
        if not isinstance(blocks, list | tuple) or len(blocks) != 4:
            raise ValueError(f"{owner}: {name} must be four block counts, got {blocks!r}")
        for count in blocks:
            check_number(owner, name, count, min=1, max=MAX_BLOCKS, integer=True)
        first, second, third, fourth = map(int, blocks)
        return first, second, third, fourth

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


class Layers(nn.Sequential):
    """Modules in sequence below the name `layers`, as in insightface's checkpoints."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(OrderedDict(layers=nn.Sequential(*modules)))


N = TypeVar("N", bound=Backbone, covariant=True)


class Constructor(Protocol[N]):
    """Constructor of a published network."""

    __name__: str

    def __call__(
        self, embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0
    ) -> N: ...


def published(name: str, network: type[N], layers: tuple[int, ...], about: str, **kind: bool) -> Constructor[N]:
    """Return a constructor of the network with the published number of blocks."""

    def build(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0) -> N:
        construct: Callable[..., N] = network
        sizes: Arguments = {"embedding_dim": embedding_dim, "width": width, "input_size": input_size}
        return construct(layers, dropout=dropout, **sizes, **kind)

    build.__name__ = build.__qualname__ = name
    build.__module__ = network.__module__
    build.__annotations__["return"] = network
    build.__doc__ = f"""`{network.__name__}` with blocks {layers}{about}.

    Args:
        embedding_dim: Dimensions d of the embedding.
        width: Factor on the channels.
        input_size: Side of the square images, or (height, width), in pixels.
        dropout: Probability of dropout before the embedding layer.

    Returns:
        The network with random weights, `(b, 3, h, w)` to `(b, d)`.

    Examples:
        >>> import torch
        >>> from kdlib_faces.backbones import {name}
        >>> {name}(embedding_dim=16, width=0.125, input_size=32).eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 16])
    """
    return build


def final_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Return the grid after four convolutions of stride 2, kernel 3 and padding 1, each of which halves and rounds up."""
    return math.ceil(size[0] / 16), math.ceil(size[1] / 16)


def he_normal(weight: Tensor) -> None:
    """Fill with He's normal distribution over the outputs."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def initialize(
    network: nn.Module, *kinds: type[nn.Conv2d] | type[nn.Linear], fill: Callable[[Tensor], object] = he_normal
) -> None:
    """Initialize the weights of the layers of these kinds.

    On the meta device there is nothing to fill, and the attempt would import torch's compiler, which takes seconds.
    """
    for module in network.modules():
        if isinstance(module, kinds) and not module.weight.is_meta:
            fill(module.weight)


def apply_in_own_precision(linear: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """Apply the last two layers without autocast: a sum of 25,088 products is too inaccurate in half precision."""
    device = x.device.type
    out: Tensor
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            out = norm(linear(x.to(next(linear.parameters()).dtype)))
    else:
        out = norm(linear(x))
    return out
