"""Synthetic faces that age, for running and testing everything without photographs.

Each identity is a constant vector of shape, color and texture. Age changes its appearance: children have rounder, smoother
and less distinct features; later, hair grays and recedes, and skin wrinkles, spots and sags, with a rate and a pattern that
depend on the identity. Pose, light, expression, occlusion, blur and noise are random for each image. The images reproduce the
structure of the problem and allow no conclusion about real faces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kdlib._checks import check_number
from kdlib_faces.data.synthetic_drawing import IDENTITY_TRAITS, NUISANCES, draw_faces

__all__ = ["SyntheticFace", "SyntheticFaces"]

_CHUNK_PIXELS = 400_000


class SyntheticFace(NamedTuple):
    """One synthetic image with its identity and age."""

    image: Tensor
    """(3 h w), float32 in [-1, 1], RGB."""
    identity: int
    age: float
    """Exact age in years."""


@dataclass(frozen=True)
class SyntheticFaces:
    """Synthetic faces with `images_per_identity` images of each identity at exact ages.

    The same arguments give the same images on every machine, up to the last bit of an 8-bit pixel.

    Args:
        identities: number of identities, at least one.
        images_per_identity: images per identity.
        size: height and width in pixels, at least 16.
        seed: sets with different seeds share no identity.
        age_range: youngest and oldest age in years. The ages of an identity are spread evenly over it, so that all gaps occur.
        age_window: if given, all images of an identity lie within that many years, as in photographs collected from the
            web.

    Raises:
        TypeError, ValueError: an argument is not a number, or out of range.

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

    @cached_property
    def _variables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Traits of the identities, nuisances and ages of the images."""
        generator = torch.Generator().manual_seed(self.seed * 2_654_435 + 97)
        identities, each = self.identities, self.images_per_identity
        traits = torch.randn(identities, IDENTITY_TRAITS, generator=generator)
        nuisances = torch.randn(identities * each, NUISANCES, generator=generator)
        low, high = self.age_range
        strata = torch.rand(identities, each, generator=generator).argsort(dim=1)
        within = (strata + torch.rand(identities, each, generator=generator)) / each
        if self.age_window is None or self.age_window >= high - low:
            ages = low + (high - low) * within
        else:
            start = low + (high - low - self.age_window) * torch.rand(identities, 1, generator=generator)
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
        return self._variables[2]

    def images(self, *, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """Render the whole set.

        Args:
            progress: called with the numbers of rendered and all images after each chunk.

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
        traits, nuisances, ages = self._variables
        noise_seeds = index + len(self) * 1_000_003 + self.seed * 829_348_951
        return draw_faces(
            traits[index // self.images_per_identity], ages[index], nuisances[index], noise_seeds, self.size
        )
