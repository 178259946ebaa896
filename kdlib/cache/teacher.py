"""A teacher whose outputs are read from a cache."""

from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from kdlib._checks import check_type
from kdlib.cache._checks import check_inputs, check_names
from kdlib.cache.store import TeacherCache

__all__ = ["CachedTeacher"]


class CachedTeacher(nn.Module):
    """Replacement of a `TeacherAdapter` that reads the features from a cache.

    It has no parameters. A `Distiller` calls it with the targets named in `inputs` instead of the inputs of the batch, so
    the targets must contain the sample ids and, if there are several, the views.

    Args:
        cache: an open cache.
        inputs: names of the targets with sample ids and views, both `(b,)`; one name means view 0.
        features: names of the features to return; `None` for all. Reading maps that no term uses costs time.

    Raises:
        TypeError: `cache` is not a `TeacherCache`.
        ValueError: `inputs` does not have one or two names, or the cache does not contain a feature.

    Examples:
        >>> import tempfile, torch
        >>> from kdlib.adapters import OUTPUT, TeacherAdapter
        >>> images = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
        >>> online = TeacherAdapter(nn.Linear(4, 2), {"embedding": OUTPUT})
        >>> folder = tempfile.TemporaryDirectory()
        >>> cache = TeacherCache.build(folder.name, online, lambda samples, view: images[samples], samples=5)
        >>> teacher = CachedTeacher(cache, inputs="sample")
        >>> embedding = teacher(torch.tensor([4, 1]))["embedding"]
        >>> torch.testing.assert_close(embedding, online(images[[4, 1]])["embedding"], atol=2e-3, rtol=2e-3)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        cache: TeacherCache,
        *,
        inputs: str | Sequence[str] | Mapping[str, str] = ("sample", "view"),
        features: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_type("CachedTeacher", "cache", cache, TeacherCache, "a TeacherCache")
        check_names("CachedTeacher", features or (), cache.features)
        self.cache = cache
        self.inputs = check_inputs(inputs)
        self.features = tuple(features) if features else None
        self.training = False

    def forward(self, samples: Tensor, views: Tensor | None = None) -> dict[str, Tensor]:
        """Return the features of a batch.

        Args:
            samples: `(b,)` ids.
            views: `(b,)`; `None` for view 0.

        Returns:
            Feature name to `(b, ...)` float32, on the device of `samples`.

        Raises:
            CacheError: a sample or view is not in the cache.
        """
        from kdlib.cache.reading import read_features

        features: dict[str, Tensor] = read_features(self.cache, samples, 0 if views is None else views, self.features)
        return features

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode for any `mode`."""
        return self

    @property
    def taps(self) -> dict[str, tuple[int, ...]]:
        """Feature name to the shape of one sample."""
        return {name: self.cache.features[name] for name in self.features or self.cache.features}

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the cache."""
        return self.cache.fingerprint

    def __repr__(self) -> str:
        features = "" if self.features is None else f", features={self.features!r}"
        return f"CachedTeacher({self.cache!r}, inputs={self.inputs!r}{features})"
