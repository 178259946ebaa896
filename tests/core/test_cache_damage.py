"""Damaged, exchanged and manipulated caches give one clear error."""

import json
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdlib import OUTPUT, TeacherAdapter
from kdlib.cache import CachedTeacher, CacheError, Fingerprint, TeacherCache, verify_cache
from kdlib.cache.layout import Layout

IMAGES = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
OPTIONS = {"samples": range(100, 160, 2), "views": 2, "batch_size": 8, "shard_bytes": 300}


class Double(nn.Module):
    """A preprocessing step whose `repr` shows its factor."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor}"


def interrupted(samples: Tensor, view: int) -> Tensor:
    if view:
        raise KeyboardInterrupt
    return fetch(samples, view)


def teacher(seed: int = 0, factor: float = 2.0) -> TeacherAdapter:
    torch.manual_seed(seed)
    return TeacherAdapter(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), {"out": OUTPUT}, preprocess=Double(factor))


def fetch(samples: Tensor, view: int) -> Tensor:
    images = IMAGES[(samples - 100) // 2]
    return images.flip(1) if view else images


def build(path: Path, made: TeacherAdapter | None = None, **options) -> TeacherCache:
    return TeacherCache.build(path, made or teacher(), fetch, **{**OPTIONS, **options})


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_an_intact_cache_passes_verification(tmp_path: Path, dtype: str) -> None:
    cache = build(tmp_path, dtype=dtype)
    calls: list[tuple[int, int]] = []
    check = verify_cache(cache, teacher=teacher(), fetch=fetch, recompute=17, progress=lambda *at: calls.append(at))
    assert (check.rows, check.shards, check.recomputed) == (60, cache._layout.shards, 17)
    assert check.max_cosine["out"] <= 2 * cache.error["out"]["max_cosine"] + 1e-6
    assert calls[-1] == (60, 60)
    assert verify_cache(cache).recomputed == 0


def test_a_mismatch_names_the_parts_that_differ(tmp_path: Path) -> None:
    build(tmp_path, data="list 1")
    cases = {
        "the teacher (weights, code or taps); ": (teacher(1), "list 1"),
        "the preprocessing; ": (teacher(factor=3), "list 1"),
        "the data; ": (teacher(), "list 2"),
        "the teacher (weights, code or taps) and the preprocessing and the data; ": (teacher(1, 3), "list 2"),
    }
    for parts, (other, data) in cases.items():
        message = re.escape(f"another teacher, preprocessing or data: the difference is {parts}its fingerprint is")
        with pytest.raises(CacheError, match=message):
            build(tmp_path, other, data=data)
        with pytest.raises(CacheError, match=message):
            TeacherCache.open(tmp_path, fingerprint=Fingerprint.of(other, data=data))
    same = Fingerprint.of(teacher(), data="list 1")
    assert TeacherCache.open(tmp_path, fingerprint=same).fingerprint == same.whole
    own = Fingerprint("weights", "rgb", "list")
    TeacherCache.build(tmp_path / "own", teacher(), fetch, **OPTIONS, fingerprint=own)
    with pytest.raises(CacheError, match="the difference is the preprocessing; "):
        TeacherCache.open(tmp_path / "own", fingerprint=Fingerprint("weights", "bgr", "list"))
    with pytest.raises(TypeError, match="Fingerprint: data must be a str, got int"):
        Fingerprint("weights", "rgb", 3)


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("shard-00000.bin", 0, r"shard-00000.bin is damaged: the checksum of rows 0 to 7 does not match"),
        (
            "shard-00001.bin",
            13,
            r"shard-00001.bin( or shard-00002.bin)? is damaged: the checksum of rows 24 to 29 does not",
        ),
        ("shard-00002.bin", -40, r"shard-00002.bin is damaged: the checksum of rows 54 to 59 does not match"),
        ("shard-00001.bin", -1, "does not match the header"),
        ("shard-00001.bin", None, r"shard-00001.bin must have \d+ bytes, got 0"),
        ("samples.i64", 0, "samples.i64 is damaged: its ids do not"),
        ("samples.i64", 2, "samples.i64 is damaged: its ids are not ascending"),
        ("samples.i64", None, "samples.i64 must have 240 bytes, got 0"),
        ("blocks.bin", 3, "blocks.bin is damaged: it does not match the checksum in the header"),
        ("blocks.bin", None, "blocks.bin must have"),
    ],
)
def test_a_changed_bit_or_an_empty_file_is_found(tmp_path: Path, name: str, at: int | None, message: str) -> None:
    build(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    if at is None:
        content.clear()
    else:
        content[at] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CacheError, match=message):
        verify_cache(TeacherCache.open(tmp_path))


def test_files_of_another_cache_are_refused(tmp_path: Path) -> None:
    """All shapes and sizes are equal, so only trailers and checksums differ."""
    build(tmp_path / "a")
    build(tmp_path / "b", teacher(1))
    for source, name in [("b", "header.json"), ("b", "shard-00000.bin"), ("a", "shard-00001.bin")]:
        path = tmp_path / "mixed"
        shutil.copytree(tmp_path / "a", path)
        shutil.copy(tmp_path / source / name, path / name.replace("00001", "00000"))
        with pytest.raises(CacheError, match=r"shard-00000.bin does not match the header"):
            TeacherCache.open(path).read([100])
        shutil.rmtree(path)
    # The trailers also depend on the features in the header.
    header = json.loads((tmp_path / "b" / "header.json").read_text())
    (tmp_path / "b" / "header.json").write_text(json.dumps({**header, "features": {"other": [6]}, "error": {}}))
    with pytest.raises(CacheError, match="does not match the header"):
        TeacherCache.open(tmp_path / "b").read([100])


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_rows_are_refused(tmp_path: Path, dtype: str, value: float) -> None:
    cache = build(tmp_path, dtype=dtype, shard_bytes=1 << 20)
    layout = cache._layout
    kind = "<f2" if dtype == "float16" else "<f4"
    row = layout.samples + 7  # sample 114, view 1; in int8 its scale
    content = bytearray((tmp_path / "shard-00000.bin").read_bytes())
    planted = np.asarray(value, kind).tobytes()
    content[row * layout.row_bytes : row * layout.row_bytes + len(planted)] = planted
    (tmp_path / "shard-00000.bin").write_bytes(content)
    cached = CachedTeacher(TeacherCache.open(tmp_path))
    assert cached(torch.tensor([112, 114]), torch.tensor([1, 0]))["out"].isfinite().all()
    with pytest.raises(CacheError, match="feature 'out' of sample 114, view 1 is not finite"):
        cached(torch.tensor([112, 114]), torch.tensor([1, 1]))
    with pytest.raises(CacheError, match="does not match"):
        verify_cache(TeacherCache.open(tmp_path))


def test_verification_detects_another_teacher(tmp_path: Path) -> None:
    cache = build(tmp_path)
    with pytest.raises(
        CacheError, match=r"differs from the teacher's output: feature 'out' of sample \d+, view [01] has a cosi"
    ):
        verify_cache(cache, teacher=teacher(1), fetch=fetch)
    with pytest.raises(CacheError, match="differs from the teacher's output"):
        verify_cache(cache, teacher=teacher(), fetch=lambda samples, view: fetch(samples, 0))
    with pytest.raises(CacheError, match=r"has a feature 'out' \(6,\), which the teacher does not return"):
        verify_cache(cache, teacher=TeacherAdapter(nn.Linear(4, 6), {"in": OUTPUT}), fetch=fetch, recompute=60)
    with pytest.raises(ValueError, match="teacher and fetch must be given together"):
        verify_cache(cache, teacher=teacher())


def test_impossible_headers_are_refused(tmp_path: Path) -> None:
    build(tmp_path)
    good = json.loads((tmp_path / "header.json").read_text())
    for bad, message in [
        ({"shards": ["../../etc/passwd"]}, r"unknown entries \['shards'\]"),
        ({"path": "/etc/passwd"}, r"unknown entries \['path'\]"),
        ({"parts": ["x"]}, "parts is"),
        ({"parts": {"teacher": 3}}, r"parts\['teacher'\] is 3"),
        ({"notes": {"a": {}}}, r"notes\['a'\] is"),
        ({"error": {"out": {"max_cosine": 1.0}}}, "error is"),
        ({"error": {"other": {}}}, "error is"),
        ({"error": {"out": {"max_cosine": 1.0, "mean_cosine": -1.0, "max_relative": 0.0}}}, "error is"),
        ({"block": -1}, "block is -1"),
        ({"block": 2.5}, "block is 2.5"),
        ({"checks": 7}, "checks is 7"),
        ({"samples": 2**48, "views": 2**30}, "rows"),
        ({"format": 2}, "its format is not 1"),
        ({"features": {"x": [1 << 40]}}, "a side of feature 'x' is"),
        ({"features": {"x": [1 << 30, 1 << 30]}}, "rows"),
        ({"features": {"x": [0]}}, "a side of feature 'x' is 0"),
        ({"features": {"x": 3}}, "feature 'x' has the shape 3"),
        ({"features": {}}, "features is"),
        ({"features": 3}, "features is 3"),
        ({"dtype": "object"}, "dtype 'object'"),
        ({"dtype": 3}, "dtype is 3"),
        ({"samples": -1}, "samples is -1"),
        ({"samples": True}, "samples is True"),
        ({"rows": 1e300}, "rows is"),
        ({"rows": 61}, "61 rows of 60"),
        ({"shard_rows": 0}, "shard_rows is 0"),
        ({"fingerprint": None}, "fingerprint is None"),
    ]:
        (tmp_path / "header.json").write_text(json.dumps({**good, "error": {}, **bad}))
        with pytest.raises(CacheError, match=f"is not a valid cache header: .*{message}"):
            TeacherCache.open(tmp_path)
    for text in ["", "[]", "{", '{"format": 1}', "[" * 100000, " " * (2 << 20)]:
        (tmp_path / "header.json").write_text(text)
        with pytest.raises(CacheError, match="is not a valid cache header"):
            TeacherCache.open(tmp_path)
    # A feature name may be any text, because no path is made from it.
    name = "../../../tmp/x"
    (tmp_path / "header.json").write_text(json.dumps({**good, "features": {name: [6]}, "error": {}}))
    with pytest.raises(CacheError, match="does not match the header"):
        TeacherCache.open(tmp_path).read([100])
    # No memory is allocated according to the header before the file sizes are checked.
    huge = {"samples": 1 << 40, "rows": 1 << 41, "shard_rows": 1 << 40, "features": {"out": [1 << 29]}}
    (tmp_path / "header.json").write_text(json.dumps({**good, **huge, "dense": True, "error": {}}))
    with pytest.raises(CacheError, match=r"shard-00000.bin must have \d+ bytes, got"):
        TeacherCache.open(tmp_path).read([100] * 64)
    # The position of an id far from `first` does not overflow into a valid one.
    (tmp_path / "header.json").write_text(json.dumps({**good, "first": -(2**63), "dense": True}))
    with pytest.raises(CacheError, match=f"has no sample {2**63 - 2}"):
        TeacherCache.open(tmp_path).read([2**63 - 2])


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "precious.txt"
    outside.write_text("precious")
    path = tmp_path / "cache"
    for name in ("shard-00000.bin", "shard-00002.bin", "samples.i64", ".header.json.part", ".samples.i64.part"):
        path.mkdir()
        (path / name).symlink_to(outside)
        if name.startswith("shard"):
            with pytest.raises(CacheError, match="contains shard files without a header; use another path"):
                build(path)
            assert [file.name for file in path.iterdir()] == [name]
            (path / "blocks.bin").touch()
        build(path)  # replaces the link, not its target
        assert outside.read_text() == "precious", name
        assert not (path / name).is_symlink()
        shutil.rmtree(path)
    path.mkdir()
    (path / "blocks.bin").symlink_to(outside)
    with pytest.raises(CacheError, match=r"cannot write .*blocks.bin"):
        build(path)
    shutil.rmtree(path)
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(path, teacher(), interrupted, **OPTIONS)
    (path / "shard-00002.bin").symlink_to(outside)
    with pytest.raises(CacheError, match=r"cannot write .*shard-00002.bin"):
        build(path)
    assert outside.read_text() == "precious"


def test_a_truncated_shard_cannot_be_completed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(tmp_path, teacher(), interrupted, **OPTIONS)
    shard = tmp_path / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(CacheError, match=r"shard-00000.bin is shorter than its header states; delete the cache"):
        build(tmp_path)


def sparse(path: Path, samples: int, views: int, ids: np.ndarray | None = None) -> Layout:
    """Write a complete cache whose shards are sparse files of zeros."""
    path.mkdir()
    layout = Layout(
        fingerprint="sparse",
        samples=samples,
        views=views,
        ids="",
        first=0 if ids is None else int(ids[0]),
        dense=ids is None,
        dtype="float16",
        features={"embedding": (512,), "map": (64, 7, 7)},
        shard_rows=400_000,
        rows=samples * views,
        block=64,
        checks="none",
    )
    if ids is not None:
        ids.astype("<i8").tofile(path / "samples.i64")
    layout.write(path)
    for shard in range(layout.shards):
        with (path / f"shard-{shard:05d}.bin").open("wb") as file:
            file.truncate(layout.bytes_of(shard))
            file.seek(layout.bytes_of(shard) - 32)
            file.write(layout.trailer_of(shard))
    return layout


@pytest.mark.parametrize("dense", [True, False])
def test_opening_a_cache_of_millions_reads_only_its_header(tmp_path: Path, dense: bool) -> None:
    samples = 12_000_000 if dense else 1_000_000
    ids = None if dense else np.arange(samples, dtype=np.int64) * 7 + 3
    layout = sparse(tmp_path / "cache", samples, 2, ids)
    assert layout.total * layout.row_bytes > (1e11 if dense else 1e10)
    wanted = np.asarray([0, 1, samples // 2, samples - 1])
    named = wanted if ids is None else ids[wanted]
    for number, row in enumerate(samples + wanted):
        shard, inside = divmod(int(row), layout.shard_rows)
        with (tmp_path / "cache" / f"shard-{shard:05d}.bin").open("r+b") as file:
            file.seek(inside * layout.row_bytes)
            file.write(np.full(512, number + 1, "<f2").tobytes())
    tracemalloc.start()
    cache = TeacherCache.open(tmp_path / "cache", fingerprint="sparse")
    assert cache._shards == {}
    assert cache._ids is None
    opened = tracemalloc.get_traced_memory()[1]
    found = cache.read(torch.from_numpy(named), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 100_000
    # Lazy imports of NumPy and torch take some memory; ids or rows would take a hundred times more.
    assert peak < 2_000_000
    assert found["embedding"][:, 0].tolist() == [1, 2, 3, 4]
    assert found["map"].shape == (4, 64, 7, 7)
    assert len(cache) == samples
    with pytest.raises(CacheError, match=f"has no sample {samples * 8}, view 0; it has {samples} samples"):
        cache.read([samples * 8])


def test_the_number_of_mapped_shards_is_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kdlib.cache.store._MAX_MAPPED", 4)
    cache = build(tmp_path, shard_bytes=1)
    assert cache._layout.shards == 60
    samples = torch.arange(100, 160, 2).repeat(2).flip(0)
    views = torch.arange(60) // 30
    once = cache.read(samples, views)["out"]
    assert len(cache._shards) <= 4
    torch.testing.assert_close(once[:30], teacher()(fetch(samples[:30], 0))["out"], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(once[30:], teacher()(fetch(samples[30:], 1))["out"], rtol=2e-3, atol=1e-3)
