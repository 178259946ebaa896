"""Storage types of caches and their measured errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib.cache import CachedTeacher, TeacherCache
from kdlib.cache.codec import pack, unpack
from kdlib.cache.layout import Layout

SAMPLES = 37


class Split(nn.Module):
    fingerprint = "split"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"map": x[:, :60].reshape(-1, 3, 4, 5), "embedding": x[:, 60:]}


class Embedding(nn.Module):
    fingerprint = "embedding"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"embedding": x}


def outputs() -> Tensor:
    x = torch.randn(SAMPLES, 72, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 3, SAMPLES)[:, None]
    x[5] = 0.0
    x[6, 60:] = 0.0
    x[7, 60:] = torch.eye(12)[4] * 1e-3
    return x


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Reference error 1 - cos in longdouble; 0 for two zero rows."""
    x, y = x.reshape(len(x), -1).astype(np.longdouble), y.reshape(len(y), -1).astype(np.longdouble)
    lengths = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    out = np.where((x == 0).all(1), 0.0, 1.0)
    return np.where(lengths > 0, 1 - (x * y).sum(1) / np.where(lengths > 0, lengths, 1), out)


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_the_stored_error_is_the_error_of_the_rows(tmp_path: Path, dtype: str) -> None:
    x = outputs()
    cache = TeacherCache.build(
        tmp_path, Split(), lambda samples, view: x[samples], samples=SAMPLES, batch_size=8, dtype=dtype, shard_bytes=900
    )
    stored, expected = cache.read(range(SAMPLES)), Split()(x)
    assert set(cache.error) == {"map", "embedding"}
    for name, entry in cache.error.items():
        y, z = expected[name].numpy(), stored[name].numpy()
        errors = cosine(y, z)
        assert entry["max_cosine"] == pytest.approx(float(errors.max()), rel=1e-3, abs=1e-15)
        assert entry["mean_cosine"] == pytest.approx(float(errors.mean()), rel=1e-3, abs=1e-15)
        y, z = (each.reshape(SAMPLES, -1).astype(np.float64) for each in (y, z))
        lengths = np.linalg.norm(y, axis=1)
        distances = np.linalg.norm(z - y, axis=1)[lengths > 0] / lengths[lengths > 0]
        assert entry["max_relative"] == pytest.approx(distances.max(), rel=1e-3, abs=1e-12)
    if dtype == "float32":
        assert {each for entry in cache.error.values() for each in entry.values()} == {0.0}
    else:
        # At most half a step of 2^-11, or of 1/127 of the largest entry.
        bound = {"float16": 2**-11, "int8": np.sqrt(60) / 254}[dtype]
        assert 0 < cache.error["map"]["max_relative"] <= bound
        assert cache.error["map"]["max_cosine"] <= bound**2


def test_int8_rows_are_a_scale_and_integers(tmp_path: Path) -> None:
    x = torch.tensor([[2.0, -4.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [1e-3, 1e-3, -1e-3, 0.0]])

    cache = TeacherCache.build(tmp_path, Embedding(), lambda samples, view: x[samples], samples=3, dtype="int8")
    content = (tmp_path / "shard-00000.bin").read_bytes()
    assert len(content) == 3 * (4 + 4) + 32
    assert np.frombuffer(content, "i1", 4, 4).tolist() == [64, -127, 32, 16]
    assert np.frombuffer(content, "<f4", 1)[0] == np.float32(4 / 127)
    assert cache.read([1])["embedding"].tolist() == [[0.0] * 4]
    torch.testing.assert_close(cache.read([2])["embedding"], x[2:], rtol=1e-6, atol=0)
    assert cache.dtype == "int8"


@settings(max_examples=60)
@given(
    st.sampled_from(["float16", "int8"]),
    st.lists(st.floats(-(2.0**15), 2.0**15, width=32), min_size=3, max_size=3),
    st.integers(-140, 100),
)
@example("int8", [0.0, 0.0, 2.0**-149], 0)  # the scale underflows to 0, so the row is lost
@example("int8", [2.0**-143, 0.0, -(2.0**-144)], 0)
def test_any_finite_row_is_stored_within_half_a_step(dtype: str, values: list[float], power: int) -> None:
    row = torch.tensor([values], dtype=torch.float64) * 2.0 ** (power if dtype == "int8" else min(power, 0))
    row = row.float()
    layout = Layout("f", 1, 1, "", 0, True, dtype, {"x": (3,)}, 1, block=1)
    packed, (cosine_error, _, relative) = pack(layout, {"x": row}, str)
    back = unpack(layout, packed, ["x"])["x"]
    largest = row.abs().max()
    step = largest / 254 if dtype == "int8" else torch.clamp(row.abs() * 2.0**-11, min=2.0**-25)
    assert torch.all((back - row).abs().double() <= step.double() * (1 + 1e-4) + 2.0**-142)
    assert 0 <= cosine_error[0] <= 1
    assert np.isfinite(relative).all()
    expected = float(cosine(row.numpy(), back.numpy())[0])
    # Rows whose scale is subnormal are compared by direction only, which is exact.
    assert cosine_error[0] == pytest.approx(expected, rel=0.02, abs=1e-6)


def test_selected_features_are_read(tmp_path: Path) -> None:
    x = outputs()
    cache = TeacherCache.build(tmp_path, Split(), lambda samples, view: x[samples], samples=SAMPLES, dtype="int8")
    assert list(cache.read([3], 0, ["embedding"])) == ["embedding"]
    torch.testing.assert_close(cache.read([3, 1], 0, ["map"])["map"], cache.read([3, 1])["map"], rtol=0, atol=0)
    single = CachedTeacher(cache, features=("embedding",))
    assert single.taps == {"embedding": (12,)}
    assert list(single(torch.tensor([1]))) == ["embedding"]
    assert repr(single).endswith("features=('embedding',))")
    with pytest.raises(ValueError, match="TeacherCache: no feature named 'maps'; the nearest are 'map'"):
        cache.read([3], 0, ["maps"])
    with pytest.raises(ValueError, match="CachedTeacher: no feature named 'embeding'; the nearest are 'embedding'"):
        CachedTeacher(cache, features=("embeding",))
