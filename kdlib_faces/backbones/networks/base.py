"""Base class of the face networks."""

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib_faces.backbones.input_spec import InputSize, InputSpec, height_width

__all__ = ["Backbone"]


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

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument has the wrong type.
    """

    stages: tuple[str, ...]

    def __init__(self, embedding_dim: int, input_size: InputSize) -> None:
        super().__init__()
        owner = type(self).__name__
        check_number(owner, "embedding_dim", embedding_dim, min=1, integer=True)
        self._size = height_width(owner, input_size)
        self.embedding_dim = embedding_dim
        self.input_size: InputSize = self._size[0] if self._size[0] == self._size[1] else self._size
        self.input_spec = InputSpec(size=self.input_size)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of this network, such as `iresnet50`."""

    @property
    def family(self) -> str:
        """Name in the registry of the constructor that takes `arguments`."""
        return self.name

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Arguments that rebuild this network."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, 3, h, w) to embeddings (b, d)."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"
