"""Data room: views that a cache can be asked for again. Each is a function of sample id, view number and seed alone.

A teacher's output belongs to the view that it saw. `SeededViews` makes the views for a cache of teacher outputs, and the
very same ones for the student later, whatever the batch; `SeededBatches` draws which.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Generator, Tensor

from kdlib._checks import check_number, check_whole_numbers
from kdlib_faces._checks import InputError
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.images import to_float
from kdlib_faces.data.views import AugmentConfig, augment

__all__ = ["SeededBatches", "SeededViews"]


@dataclass(frozen=True)
class SeededViews:
    """A number of views of each image.

    Without `augment` view 0 is the image and view 1 its mirror image. With it every view is a random one, drawn from
    (seed, sample id, view number) for each image by itself: neighbors in the batch, order and epoch do not count.

    Attributes:
        count: views of each image; at most 2 without `augment`.
        seed: what random views are drawn from.
        augment: how strongly images are changed.

    Raises:
        ValueError: more views than there are without `augment`.

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

    def __post_init__(self) -> None:
        most = 2 if self.augment is None else 2**31 - 1
        check_number("SeededViews", "count", self.count, min=1, max=most, integer=True)
        check_number("SeededViews", "seed", self.seed, min=0, max=2**63 - 1, integer=True)

    def __call__(self, images: Tensor, samples: Tensor, views: Tensor | int) -> Tensor:
        """The views of a batch.

        Args:
            images: `(b, 3, s, s)` uint8.
            samples: `(b,)` ids of the images.
            views: `(b,)` numbers from 0 to `count - 1`, or one for all.

        Returns:
            `(b, 3, s, s)` float32 in `[-1, 1]`.

        Raises:
            TypeError, ValueError: other shapes or dtypes, or a view that there is not.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"SeededViews: images must be uint8, got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"SeededViews: images must be (b, 3, s, s), got {tuple(images.shape)}")
        numbers = torch.full((len(images),), views) if isinstance(views, int) else views
        check_whole_numbers("SeededViews", "samples", samples, len(images))
        check_whole_numbers("SeededViews", "views", numbers, len(images))
        wrong = numbers[(numbers < 0) | (numbers >= self.count)]
        if len(wrong):
            raise ValueError(f"SeededViews: views must be from 0 to {self.count - 1}, got {int(wrong[0])}")
        if self.augment is None:
            mirrored = (numbers == 1)[:, None, None, None]
            return to_float(torch.where(mirrored, images.flip(-1), images) if bool(mirrored.any()) else images)
        out = torch.empty(images.shape, dtype=torch.float32)
        for row, (sample, view) in enumerate(zip(samples.tolist(), numbers.tolist(), strict=True)):
            out[row] = augment(images[row : row + 1], self.augment, self._generator(sample, view))[0][0]
        return out

    def _generator(self, sample: int, view: int) -> Generator:
        digest = hashlib.blake2b(f"kdlib view 1 {self.seed} {sample} {view}".encode(), digest_size=8).digest()
        return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def to_text(self) -> str:
        """All of it as one line, for the notes of a cache.

        Examples:
            >>> SeededViews.from_text(SeededViews(1).to_text())
            SeededViews(count=1, seed=0, augment=None)
        """
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "SeededViews":
        """The views that `to_text` told of.

        Raises:
            InputError: it is no such text.
        """
        try:
            found = json.loads(text)
            inner = found.pop("augment")
            return cls(**found, augment=None if inner is None else AugmentConfig(**inner))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"SeededViews: {text[:80]!r} does not tell of views ({error})") from error


class SeededBatches(FaceBatches):
    """Batches whose views are those of a cache: target `"view"` says which of them each image is.

    As `FaceBatches`, whose arguments these are; in place of `augment` it takes `views`. The view of each image is drawn
    from (seed, epoch, step).

    Args:
        images: `(n, 3, s, s)` uint8, a tensor, array or memory map.
        identities: `(n,)` whole numbers.
        views: as they were when the cache was made.
        batch_size: images a batch.
        seed: what order and view numbers are drawn from.
        sample_ids: `(n,)` ids of the images in the cache; None numbers them from 0.
        ages: `(n,)` years or None.
        age_groups: `(n,)` whole numbers or None.
        samples_per_identity: images of each identity in a batch, or None.

    Examples:
        >>> pixels = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
        >>> batches = SeededBatches(pixels, range(8), SeededViews(), batch_size=4, seed=0)
        >>> inputs, targets = next(iter(batches))
        >>> inputs.shape, sorted(targets)
        (torch.Size([4, 3, 4, 4]), ['identity', 'sample', 'view'])
    """

    def __init__(
        self,
        images: Tensor | NDArray[np.uint8],
        identities: ArrayLike | Tensor,
        views: SeededViews,
        *,
        batch_size: int,
        seed: int,
        sample_ids: ArrayLike | Tensor | None = None,
        ages: ArrayLike | Tensor | None = None,
        age_groups: ArrayLike | Tensor | None = None,
        samples_per_identity: int | None = None,
    ) -> None:
        if not isinstance(views, SeededViews):
            raise TypeError(f"SeededBatches: views must be SeededViews, got {type(views).__name__}")
        super().__init__(
            images,
            identities,
            batch_size=batch_size,
            seed=seed,
            ages=ages,
            age_groups=age_groups,
            samples_per_identity=samples_per_identity,
            sample_ids=sample_ids,
        )
        self.views = views

    def __repr__(self) -> str:
        return f"{super().__repr__().replace('FaceBatches(', 'SeededBatches(', 1)[:-1]}, views={self.views!r})"

    def _batch(self, rows: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        targets = {name: column[rows] for name, column in self.columns.items()}
        digest = hashlib.blake2b(f"kdlib draw 1 {self.seed} {epoch} {step}".encode(), digest_size=8).digest()
        generator = Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        targets["view"] = torch.randint(self.views.count, (len(rows),), generator=generator)
        return self.views(self.images[rows], targets["sample"], targets["view"]), targets
