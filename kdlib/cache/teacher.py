"""Cache: a cache in the place of a teacher. Reads the cache; touches no model."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from kdlib._checks import check_type
from kdlib.cache._checks import check_names, check_reads
from kdlib.cache.store import TeacherCache

__all__ = ["CachedTeacher"]


class CachedTeacher(nn.Module):
    """Stands where a `TeacherAdapter` stands and answers from a cache.

    Give it what `TeacherAdapter` takes images for: the same features come, of the same samples and views. It has no
    parameters. A `Distiller` calls it with the targets named in `reads` in place of the inputs, so a loader
    must give each batch the ids of its samples and the views that it drew.

    Args:
        cache: an open cache.
        reads: names of the targets that hold sample ids and views, both `(b,)`; the first alone means view 0.
        features: which features of the cache to give; `None` for all. Maps that no term reads cost time.

    Raises:
        TypeError: `cache` is no `TeacherCache`.
        ValueError: `reads` has not one or two names, or the cache has no such feature.

    Examples:
        >>> import tempfile
        >>> from kdlib.adapters import OUTPUT, TeacherAdapter
        >>> images = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        >>> online = TeacherAdapter(nn.Linear(4, 2), {"embedding": OUTPUT})
        >>> folder = tempfile.TemporaryDirectory()
        >>> cache = TeacherCache.build(folder.name, online, lambda samples, view: images[samples], samples=5)
        >>> teacher = CachedTeacher(cache, reads=("sample",))
        >>> said = teacher(torch.tensor([4, 1]))["embedding"]
        >>> torch.testing.assert_close(said, online(images[[4, 1]])["embedding"], atol=2e-3, rtol=2e-3)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        cache: TeacherCache,
        *,
        reads: Sequence[str] = ("sample", "view"),
        features: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_type("CachedTeacher", "cache", cache, TeacherCache, "a TeacherCache")
        check_reads(reads)
        check_names("CachedTeacher", features or (), cache.features)
        self.cache = cache
        self.reads = tuple(reads)
        self.features = tuple(features) if features else None
        self.training = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def forward(self, samples: Tensor, views: Tensor | None = None) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            samples: `(b,)` ids.
            views: `(b,)`; `None` for view 0.

        Returns:
            Name to `(b, ...)` float32, on the device of `samples`.

        Raises:
            CacheError: a sample or view that is not in the cache.
        """
        features = self.cache.read(samples, 0 if views is None else views, self.features)
        return {name: x.to(samples.device, non_blocking=True) for name, x in features.items()}

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever `mode` is."""
        return self

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Feature names, and the shape of one sample of each."""
        return {name: self.cache.features[name] for name in self.features or self.cache.features}

    @property
    def fingerprint(self) -> str:
        """That of the cache."""
        return self.cache.fingerprint

    def __repr__(self) -> str:
        features = "" if self.features is None else f", features={self.features!r}"
        return f"CachedTeacher({self.cache!r}, reads={self.reads!r}{features})"
