"""Recipes room: batches in which a person is seen young and old. What the far pairs of an age-invariant teacher are made of."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kdlib_faces._checks import InputError

__all__ = ["PairTargets", "count_cross_age_identities", "samples_per_identity"]


class PairTargets:
    """Batches whose targets also hold `"person_age"` `(b, 2)` float64, identity and age, for `CrossAgePairLoss`.

    Args:
        batches: `(inputs, targets)` with `set_epoch` and `iter_from`; a `FaceBatches`.
        age: the target that holds ages or groups.
    """

    def __init__(self, batches: Any, age: str) -> None:
        self.batches, self.age = batches, age

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration gives."""
        self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self.iter_from(0)

    def iter_from(self, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The batches of the epoch from `step` on."""
        for inputs, targets in self.batches.iter_from(step):
            both = torch.stack([targets["identity"].double(), targets[self.age].double()], dim=1)
            yield inputs, {**targets, "person_age": both}


def count_cross_age_identities(identities: ArrayLike, ages: ArrayLike, gap: float) -> int:
    """How many people have a far pair: two images at least `gap` apart in age.

    Args:
        identities: `(n,)` whole numbers from 0.
        ages: `(n,)` years, or age groups with a gap of 1; NaN or below 0 where unknown.
        gap: least difference.

    Examples:
        >>> count_cross_age_identities([0, 0, 1, 1, 2, 2], [3, 40, 20, 25, 7, float("nan")], 10.0)
        1
    """
    when = np.asarray(ages, dtype=np.float64)
    known = when >= 0  # a NaN is not
    who, when = np.asarray(identities)[known], when[known]
    if not len(who):
        return 0
    youngest, oldest = np.full(who.max() + 1, np.inf), np.full(who.max() + 1, -np.inf)
    np.minimum.at(youngest, who, when)
    np.maximum.at(oldest, who, when)
    return int((oldest - youngest >= gap).sum())


def samples_per_identity(batch_size: int, identities: int) -> int:
    """Images of one person in a batch of far pairs: four, or what the batch and the number of people allow.

    Raises:
        InputError: no number does.

    Examples:
        >>> samples_per_identity(64, 100), samples_per_identity(6, 2)
        (4, 3)
    """
    wanted: list[int] = [4, 2, *range(3, batch_size + 1)]
    for images in wanted:
        if batch_size % images == 0 and batch_size // images <= identities:
            return images
    raise InputError(f"age teacher: batch_size {batch_size} cannot hold pairs of {identities} people")
