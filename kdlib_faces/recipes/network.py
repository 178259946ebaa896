"""The network of a recipe that starts from random weights."""

from dataclasses import dataclass

from kdlib._checks import check_number
from kdlib_faces.backbones import Backbone, build_backbone

__all__ = ["NetworkConfig"]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A backbone with random weights.

    Attributes:
        backbone: A name of `kdlib_faces.backbones`.
        embedding_dim: Dimensions of the embedding.
        width: Factor on the channels.
        input_size: Side of the images, pixels.
    """

    backbone: str = "mobilefacenet"
    embedding_dim: int = 512
    width: float = 1.0
    input_size: int = 112

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_number(owner, "input_size", self.input_size, min=1, max=4096, integer=True)
        check_number(owner, "embedding_dim", self.embedding_dim, min=1, max=65_536, integer=True)
        check_number(owner, "width", self.width, above=0, max=64)

    def build(self, seed: int) -> Backbone:
        """Build the network. `width` is passed only if it is not 1, since some backbones have none."""
        width = {} if self.width == 1.0 else {"width": self.width}
        return build_backbone(
            self.backbone, seed=seed, embedding_dim=self.embedding_dim, input_size=self.input_size, **width
        )
