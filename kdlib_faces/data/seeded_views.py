"""Reproducible views of images: each depends on the sample id, the view number and the seed only."""

import hashlib
import json
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Generator, Tensor

from kdlib._checks import check_number, check_whole_numbers
from kdlib_faces._checks import InputError
from kdlib_faces.data.images import check_pixels, to_float
from kdlib_faces.data.views import VIEWS_VERSION, AugmentConfig, augment, draw_views

__all__ = ["SeededViews"]


@dataclass(frozen=True)
class SeededViews:
    """A fixed number of views of each image, for teacher outputs that are cached per view.

    Without `augment`, view 0 is the image and view 1 its mirror image. With `augment`, every view is a random one drawn
    from (seed, sample id, view number). It does not depend on the batch, the order or the epoch, so the student is
    trained on exactly the views that the teacher outputs were computed from.

    Attributes:
        count: Views per image; at most 2 without `augment`.
        seed: Seed of the random views.
        augment: Strength of the augmentation, or None.
        version: Number of the augmentation that draws the views, `VIEWS_VERSION`. Views of another number, as in the
            notes of an older cache, can be described but not computed.

    Raises:
        ValueError: `count` is above 2 without `augment`.

    Examples:
        >>> pixels = torch.arange(2 * 48, dtype=torch.uint8).reshape(2, 3, 4, 4)
        >>> views = SeededViews(5, seed=1, augment=AugmentConfig())
        >>> both = views(pixels, torch.tensor([10, 11]), torch.tensor([0, 4]))
        >>> torch.equal(views(pixels[1:], torch.tensor([11]), 4), both[1:])
        True
    """

    count: int = 2
    seed: int = 0
    augment: AugmentConfig | None = None
    version: int = field(default=VIEWS_VERSION, repr=False)

    def __post_init__(self) -> None:
        limit = 2 if self.augment is None else 2**31 - 1
        check_number("SeededViews", "count", self.count, min=1, max=limit, integer=True)
        check_number("SeededViews", "seed", self.seed, min=0, max=2**63 - 1, integer=True)
        check_number("SeededViews", "version", self.version, min=1, integer=True)

    def check_version(self, where: str) -> None:
        """Check that the augmentation still draws these views.

        Args:
            where: What holds the views, for the message.

        Raises:
            InputError: It has changed since, so that the views cannot be computed any more.
        """
        if self.augment is not None and self.version != VIEWS_VERSION:
            raise InputError(
                f"{where} holds random views of version {self.version} of the augmentation, which is now at version "
                f"{VIEWS_VERSION} and draws other views; build the cache again"
            )

    def __call__(self, images: Tensor, samples: Tensor, views: Tensor | int) -> Tensor:
        """Return one view of each image.

        Args:
            images: `(b, 3, s, s)` uint8.
            samples: `(b,)` sample ids of the images.
            views: `(b,)` view numbers from 0 to `count - 1`, or one number for all images.

        Returns:
            `(b, 3, s, s)` float32 in `[-1, 1]`.

        Raises:
            TypeError: `images` is not uint8, or `samples` or `views` are not whole numbers.
            ValueError: A shape is wrong, a view number is out of range, or the augmentation is of another version.
        """
        check_pixels("SeededViews", images)
        numbers = torch.full((len(images),), views) if isinstance(views, int) else views
        check_whole_numbers("SeededViews", "samples", samples, len(images))
        check_whole_numbers("SeededViews", "views", numbers, len(images))
        wrong = numbers[(numbers < 0) | (numbers >= self.count)]
        if len(wrong):
            raise ValueError(f"SeededViews: views must be from 0 to {self.count - 1}, got {int(wrong[0])}")
        if self.augment is None:
            mirrored = (numbers == 1)[:, None, None, None]
            return to_float(torch.where(mirrored, images.flip(-1), images) if bool(mirrored.any()) else images)
        self.check_version("SeededViews")
        draws = [
            draw_views(1, _generator(f"kdlib view {self.version} {self.seed} {sample} {view}"))
            for sample, view in zip(samples.tolist(), numbers.tolist(), strict=True)
        ]
        return augment(images, self.augment, np.concatenate(draws))[0] if draws else to_float(images)

    def draw(self, count: int, *, seed: int, epoch: int, step: int) -> Tensor:
        """Draw `(count,)` int64 view numbers for a batch, from (seed, epoch, step)."""
        return torch.randint(self.count, (count,), generator=_generator(f"kdlib draw 1 {seed} {epoch} {step}"))

    def to_text(self) -> str:
        """Return the views as one line of JSON, which a cache stores in its metadata.

        Examples:
            >>> SeededViews.from_text(SeededViews(1).to_text())
            SeededViews(count=1, seed=0, augment=None)
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "SeededViews":
        """Read the result of `to_text`.

        Raises:
            InputError: The text has another form.
        """
        try:
            values = {"version": 1, **json.loads(text)}  # the first version wrote no number
            strength = values.pop("augment")
            return cls(**values, augment=None if strength is None else AugmentConfig(**strength))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"SeededViews: {text[:80]!r} does not describe views ({error})") from error


def _generator(text: str) -> Generator:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
