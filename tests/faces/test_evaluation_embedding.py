"""Images to embeddings: the flip test, the model's mode, streams, and memory maps."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdlib_faces.evaluation import embed_images


def pixels(count: int = 23, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 6, 6), dtype=np.uint8)


class Net(nn.Module):
    """BatchNorm and dropout: a net that tells training from evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        return self.body(x)  # type: ignore[no-any-return]


def flipped_sum(model: nn.Module, images: np.ndarray) -> np.ndarray:
    x = (torch.from_numpy(images).double() - 127.5) / 127.5
    model = model.double().eval()
    with torch.no_grad():
        return (model(x) + model(torch.flip(x, dims=(3,)))).numpy()  # type: ignore[no-any-return]


def test_the_flip_test_adds_both_embeddings_before_normalization() -> None:
    images, model = pixels(), Net()
    raw = embed_images(model, images, normalize=False, batch_size=4)
    unit = embed_images(model, images, batch_size=4)
    expected = flipped_sum(Net(), images)
    np.testing.assert_allclose(raw, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert unit.dtype == np.float32
    plain = embed_images(model, images, flip=False, normalize=False)
    assert np.abs(plain - raw).max() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_embeddings_do_not_depend_on_batches_or_the_type_of_images(batch_size: int, tmp_path: Path) -> None:
    images, model = pixels(10), Net()
    whole = embed_images(model, images)
    images.tofile(tmp_path / "map")
    mapped = np.memmap(tmp_path / "map", dtype=np.uint8, mode="r", shape=images.shape)
    forms: list[Any] = [
        images,
        mapped,
        torch.from_numpy(images),
        [images[:3], images[3:]],
        iter([images[:9], images[9:]]),
    ]
    for form in forms:
        np.testing.assert_allclose(embed_images(model, form, batch_size=batch_size), whole, atol=1e-6)


def test_eval_mode_is_set_and_restored() -> None:
    model = Net().train()
    model.body[2].eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    first, second = embed_images(model, pixels()), embed_images(model, pixels())
    np.testing.assert_array_equal(first, second)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert modes[0]

    class Breaks(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    broken = Breaks().train()
    with pytest.raises(RuntimeError, match="broken"):
        embed_images(broken, pixels())
    assert all(module.training for module in broken.modules())


def test_output_to_a_memory_map_and_models_with_named_features(tmp_path: Path) -> None:
    images, model = pixels(), Net()
    out = np.memmap(tmp_path / "out", dtype=np.float32, mode="w+", shape=(23, 5))
    given = embed_images(lambda x: {"embedding": model.eval()(x)}, images, out=out)
    assert given is out
    np.testing.assert_array_equal(np.asarray(out), embed_images(model, images))


def test_an_embedding_that_is_nan_is_reported_with_its_image() -> None:
    images = np.zeros((9, 3, 2, 2), dtype=np.uint8)
    images[6, 0, 0, 0] = 255

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, :1, 0, 0] > 0.9, torch.nan, 3.0) + x.flatten(1)[:, :2]

    with pytest.raises(ValueError, match="embeddings must be finite, got image 6 that is not"):
        embed_images(model, images, batch_size=4, flip=False)


def test_the_input_spec_of_a_model_is_respected_unless_preprocess_is_given() -> None:
    class Blue(nn.Module):
        def input_spec(self, x: torch.Tensor) -> torch.Tensor:
            return x.flip(1) * 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    images = pixels(5)
    plain = (torch.from_numpy(images).float() - 127.5) / 127.5
    found = embed_images(Blue(), images, flip=False, normalize=False, batch_size=2)
    np.testing.assert_allclose(found, (plain.flip(1) * 3).flatten(1).numpy(), atol=1e-6)
    own = embed_images(Blue(), images, flip=False, normalize=False, preprocess=lambda x: x[:, [2, 1, 0]].float() / 128)
    np.testing.assert_array_equal(own, images[:, ::-1].reshape(5, -1) / np.float32(128))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    def stream(count: int) -> Iterator[np.ndarray]:
        for number in range(count // 8):
            yield np.random.default_rng(number).integers(0, 256, (8, 3, 6, 6), dtype=np.uint8)

    def peak(count: int) -> int:
        out = np.memmap(tmp_path / f"{count}", dtype=np.float32, mode="w+", shape=(count, 5))
        tracemalloc.start()
        try:
            embed_images(Net(), stream(count), out=out, batch_size=8)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(16)
    small, large = peak(64), peak(1280)
    assert large < small + 60_000 < 1280 * 3 * 6 * 6
