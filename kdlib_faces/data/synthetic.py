"""Data room: a set of drawn faces that age, so that everything can be run and checked without a photograph.

Each identity is a vector of shape, color and texture that never changes. Age changes how that vector shows: a child has
rounder, smoother, less distinct features; with the years hair grays and recedes, skin wrinkles, spots and sags, each at a
pace and in a pattern of the identity's own. Pose, light, expression, occlusion, blur and noise are drawn anew for each image.
The faces are drawings: they carry the structure of the problem, and no claim about people.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kdlib._checks import check_number
from kdlib_faces.data.synthetic_drawing import IDENTITY_TRAITS, NUISANCES, draw_faces

__all__ = ["SyntheticFace", "SyntheticFaces"]

_CHUNK_PIXELS = 400_000


class SyntheticFace(NamedTuple):
    """One drawn image with all that is known of it."""

    image: Tensor
    """(3 h w), float32 in [-1, 1], RGB."""
    identity: int
    age: float
    """Years, exact."""


@dataclass(frozen=True)
class SyntheticFaces:
    """Drawn faces of `identities` people, `images_per_identity` each, at exact ages.

    The same arguments give the same images on every machine, up to the last bit of an 8-bit pixel.

    Args:
        identities: how many people; at least one.
        images_per_identity: images of each.
        size: height and width in pixels; at least 16.
        seed: two sets with different seeds share no person.
        age_range: youngest and oldest age in years. Ages of one person are spread evenly over it, so that all gaps occur.
        age_window: if given, all images of a person lie within that many years of each other, as they do in photo
            collections gathered from the web.

    Raises:
        TypeError, ValueError: an argument is not a number, or out of its range.

    Examples:
        >>> faces = SyntheticFaces(identities=3, images_per_identity=2, size=32, seed=0)
        >>> len(faces), tuple(faces[0].image.shape), faces[5].identity
        (6, (3, 32, 32), 2)
        >>> bool(torch.equal(faces[1].image, SyntheticFaces(3, 2, 32, 0)[1].image))
        True
    """

    identities: int
    images_per_identity: int
    size: int = 48
    seed: int = 0
    age_range: tuple[float, float] = (2.0, 80.0)
    age_window: float | None = None

    def __post_init__(self) -> None:
        check_number("SyntheticFaces", "identities", self.identities, min=1, integer=True)
        check_number("SyntheticFaces", "images_per_identity", self.images_per_identity, min=1, integer=True)
        check_number("SyntheticFaces", "size", self.size, min=16, max=1024, integer=True)
        check_number("SyntheticFaces", "seed", self.seed, min=0, integer=True)
        low, high = self.age_range
        check_number("SyntheticFaces", "age_range[0]", low, min=0)
        check_number("SyntheticFaces", "age_range[1]", high, above=low, max=110)
        if self.age_window is not None:
            check_number("SyntheticFaces", "age_window", self.age_window, above=0)
        traits, nuisances, ages = self._cast()
        object.__setattr__(self, "_traits", traits)
        object.__setattr__(self, "_nuisances", nuisances)
        object.__setattr__(self, "_ages", ages)

    def _cast(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 2_654_435 + 97)
        people, each = self.identities, self.images_per_identity
        traits = torch.randn(people, IDENTITY_TRAITS, generator=generator)
        nuisances = torch.randn(people * each, NUISANCES, generator=generator)
        low, high = self.age_range
        strata = torch.rand(people, each, generator=generator).argsort(dim=1)
        within = (strata + torch.rand(people, each, generator=generator)) / each
        if self.age_window is None or self.age_window >= high - low:
            ages = low + (high - low) * within
        else:
            start = low + (high - low - self.age_window) * torch.rand(people, 1, generator=generator)
            ages = start + self.age_window * within
        return traits, nuisances, ages.flatten()

    def __len__(self) -> int:
        return self.identities * self.images_per_identity

    def __getitem__(self, index: int) -> SyntheticFace:
        if not -len(self) <= index < len(self):
            raise IndexError(f"SyntheticFaces: index must be in [{-len(self)}, {len(self)}), got {index}")
        index %= len(self)
        pixels = self._draw(torch.tensor([index]))[0]
        image = pixels.float().div_(127.5).sub_(1.0)
        return SyntheticFace(image, index // self.images_per_identity, float(self.ages[index]))

    @property
    def labels(self) -> Tensor:
        """Identity of each image, (n,) int64."""
        return torch.arange(self.identities).repeat_interleave(self.images_per_identity)

    @property
    def ages(self) -> Tensor:
        """Age of each image in years, (n,) float32."""
        ages: Tensor = self._ages  # type: ignore[attr-defined]  # set in __post_init__ of a frozen dataclass
        return ages

    def images(self, *, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Draw the whole set.

        Args:
            progress: called with (images done, images in all) after each chunk.

        Returns:
            (n 3 h w) uint8, RGB.
        """
        chunk = max(1, _CHUNK_PIXELS // self.size**2)
        out = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        for start in range(0, len(self), chunk):
            index = torch.arange(start, min(start + chunk, len(self)))
            out[start : start + chunk] = self._draw(index)
            if progress is not None:
                progress(int(index[-1]) + 1, len(self))
        return out

    def _draw(self, index: Tensor) -> Tensor:
        traits: Tensor = self._traits  # type: ignore[attr-defined]  # set in __post_init__ of a frozen dataclass
        nuisances: Tensor = self._nuisances  # type: ignore[attr-defined]  # likewise
        noise_seeds = index + len(self) * 1_000_003 + self.seed * math.prod((7_919, 104_729))
        return draw_faces(
            traits[index // self.images_per_identity], self.ages[index], nuisances[index], noise_seeds, self.size
        )
