"""The read of a cached teacher, which `torch.compile` leaves as it is.

The decorator imports torch's compiler, which takes a second, so `CachedTeacher` imports this module with its first batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdlib.cache.store import TeacherCache

__all__ = ["read_features"]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def read_features(
    cache: TeacherCache, samples: Tensor, views: Tensor | int, names: Sequence[str] | None
) -> dict[str, Tensor]:
    """Return the features of a batch on the device of `samples`."""
    features = cache.read(samples, views, names)
    return {name: x.to(samples.device, non_blocking=True) for name, x in features.items()}
