"""Data and models of the demo."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib_faces.backbones import Backbone, complexity
from kdlib_faces.data.images import to_float
from kdlib_faces.evaluation import AgeGapProtocol, PairProtocol, embed_images
from kdlib_faces.evaluation.summary import DataSummary, ModelEntry
from kdlib_faces.teachers import AgeInvariantNet, AttentiveAgeNet, TeacherNet
from kdlib_faces.training import LossCurve

__all__ = ["DemoData", "DemoModel", "native_model"]

_MIN_CROSS_AGE_GAP = 30.0
_MAX_PAIRS = 300


@dataclass
class DemoModel:
    """A model of the demo.

    Attributes:
        features: Images (b, 3, h, w) in [-1, 1] to `"embedding"` (b, d) and `"map"` (b, c, h, w).
        size: Side of its images in pixels.
        entry: Description for the report.
        test_images: Test images in its own size; None for those of the students.
        file: The file of the model; None if it has none of its own.
    """

    features: nn.Module
    size: int
    entry: ModelEntry
    test_images: Tensor | None = None
    file: Path | None = None

    def embed(self, test_images: Tensor) -> NDArray[np.float32]:
        """Unit embeddings (n, d) of uint8 images; those of the plain and of the mirrored image are added before."""
        images = self.images_of(test_images)
        rows = embed_images(lambda x: self.features(x)["embedding"], images, batch_size=128, normalize=False)
        unit: NDArray[np.float32] = F.normalize(torch.from_numpy(rows), dim=1).numpy()
        return unit

    def images_of(self, test_images: Tensor) -> Tensor:
        """The test images in the size of this model; `test_images` are in that of the students."""
        return test_images if self.test_images is None else self.test_images

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """Maps of the middle stage of some uint8 images."""
        maps: Tensor = self.features(to_float(images))["map"].float()
        return maps

    def describe(self, label: str) -> ModelEntry:
        """Description for the report, with the measured time for one image."""
        latency = complexity.latency_ms(self.features, self.size, repeats=10)
        return replace(self.entry, label=label, input_size=self.size, latency_ms=round(latency, 3))


def native_model(
    network: TeacherNet, adapter: nn.Module, size: int, role: Literal["teacher", "student"], seconds: float, steps: int
) -> DemoModel:
    """A trained PyTorch network behind an adapter with the taps `embedding` and `map`."""
    backbone = network.backbone if isinstance(network, AgeInvariantNet | AttentiveAgeNet) else network
    parameters, macs = complexity.count_parameters(network), complexity.count_macs(network, size)
    entry = ModelEntry(
        role, backbone=backbone.name, parameters=parameters, macs=macs, train_seconds=round(seconds, 1), train_steps=steps
    )  # fmt: skip
    return DemoModel(adapter, size, entry)


@dataclass
class DemoData:
    """Training and test data of the demo, and its teachers.

    Attributes:
        title: Heading of the report.
        train_images: (n, 3, s, s) uint8.
        train_identities: (n,) from 0.
        num_identities: Number of training identities.
        test_images: (m, 3, s, s) uint8, of identities outside the training.
        test_identities: (m,) identity numbers.
        summary: Description of the data for the report.
        teachers: Model name to teacher, for the evaluation.
        teacher_outputs: Name of a teacher in the recipe to its cached outputs on the training images.
        test_ages: (m,) years, or None where age groups are known instead.
        test_groups: (m,) name of the age group.
        alignment: How the test faces are aligned, for the report.
        curves: Model name to the losses of its training.
        start: The network that both students start from; None for random weights.
    """

    title: str
    train_images: Tensor
    train_identities: NDArray[np.int64]
    num_identities: int
    test_images: Tensor
    test_identities: NDArray[np.int64]
    summary: DataSummary
    teachers: dict[str, DemoModel] = field(default_factory=dict)
    teacher_outputs: dict[str, nn.Module] = field(default_factory=dict)
    test_ages: NDArray[np.float32] | None = None
    test_groups: NDArray[np.str_] | None = None
    alignment: str = "none: images as they are"
    curves: dict[str, LossCurve] = field(default_factory=dict)
    start: Backbone | None = None

    def age_protocol(self, *, replicates: int) -> AgeGapProtocol:
        """All pairs by years where ages are known, else by pairs of age groups."""
        groups = self.test_groups if self.test_ages is None else None
        return AgeGapProtocol(self.test_identities, ages=self.test_ages, age_groups=groups, replicates=replicates)

    def labels(self) -> list[str]:
        """The age of each test image in words."""
        if self.test_ages is not None:
            return [f"{age:.0f} years" for age in self.test_ages]
        return [str(group) for group in np.asarray(self.test_groups)]

    def _is_cross_age(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pairs of test images lie 30 years apart, or in different age groups."""
        if self.test_ages is not None:
            return np.asarray(np.abs(self.test_ages[i] - self.test_ages[j]) >= _MIN_CROSS_AGE_GAP)
        groups = np.asarray(self.test_groups)
        return np.asarray(groups[i] != groups[j])

    def pair_protocol(self, seed: int) -> PairProtocol:
        """Cross-age genuine pairs and as many impostor pairs in up to ten folds that share no identity."""
        rng = np.random.default_rng(seed)
        rows: list[tuple[int, int, bool, int]] = []
        identities = rng.permutation(np.unique(self.test_identities))
        for fold, members in enumerate(np.array_split(identities, min(10, len(identities) // 2))):
            images = np.flatnonzero(np.isin(self.test_identities, members))
            i, j = (images[side] for side in np.triu_indices(len(images), 1))
            same = self.test_identities[i] == self.test_identities[j]
            genuine, impostor = np.flatnonzero(same & self._is_cross_age(i, j)), np.flatnonzero(~same)
            if not len(genuine):
                genuine = np.flatnonzero(same)
            count = min(len(genuine), len(impostor), _MAX_PAIRS)
            for pairs, truth in ((genuine, True), (impostor, False)):
                chosen = rng.permutation(pairs)[:count]
                rows += [(*ends, truth, fold) for ends in zip(i[chosen].tolist(), j[chosen].tolist(), strict=True)]
        left, right, truths, folds = zip(*rows, strict=True)
        return PairProtocol(left, right, truths, fold_ids=folds, threshold="exact")
