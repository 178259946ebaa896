"""Teacher cache in the hands of others: whatever was cut, swapped, changed or planted, the answer is one clear error."""

import json
import shutil
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
    """What comes before the teacher."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def extra_repr(self) -> str:
        return f"{self.factor}"


def teacher(seed: int = 0, factor: float = 2.0) -> TeacherAdapter:
    torch.manual_seed(seed)
    return TeacherAdapter(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), {"out": OUTPUT}, preprocess=Double(factor))


def fetch(samples: Tensor, view: int) -> Tensor:
    images = IMAGES[(samples - 100) // 2]
    return images.flip(1) if view else images


def build(path: Path, made: TeacherAdapter | None = None, **options) -> TeacherCache:
    return TeacherCache.build(path, made or teacher(), fetch, **{**OPTIONS, **options})


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_a_good_cache_is_good(tmp_path: Path, dtype: str) -> None:
    cache = build(tmp_path, dtype=dtype)
    told: list[tuple[int, int]] = []
    found = verify_cache(cache, teacher=teacher(), fetch=fetch, recompute=17, progress=lambda *at: told.append(at))
    assert (found.rows, found.shards, found.recomputed) == (60, cache._layout.shards, 17)
    assert found.max_cosine["out"] <= 2 * cache.error["out"]["max_cosine"] + 1e-6
    assert told[-1] == (60, 60)
    assert verify_cache(cache).recomputed == 0


def test_the_error_says_what_differs(tmp_path: Path) -> None:
    build(tmp_path, data="list 1")
    asked = {
        "the teacher (weights, code or taps); ": (teacher(1), "list 1"),
        "the preprocessing; ": (teacher(factor=3), "list 1"),
        "the data; ": (teacher(), "list 2"),
        "the teacher (weights, code or taps) and the preprocessing and the data; ": (teacher(1, 3), "list 2"),
    }
    for words, (made, data) in asked.items():
        for attempt in (
            lambda made=made, data=data: build(tmp_path, made, data=data),
            lambda made=made, data=data: TeacherCache.open(tmp_path, fingerprint=Fingerprint.of(made, data=data)),
        ):
            with pytest.raises(
                CacheError, match="another teacher, preprocessing or data: the difference is "
            ) as caught:
                attempt()
            assert f"the difference is {words}its fingerprint is" in str(caught.value)
    same = Fingerprint.of(teacher(), data="list 1")
    assert TeacherCache.open(tmp_path, fingerprint=same).fingerprint == same.whole
    own = Fingerprint("weights", "rgb", "list")
    TeacherCache.build(tmp_path / "own", teacher(), fetch, **OPTIONS, fingerprint=own)
    with pytest.raises(CacheError, match="the difference is the preprocessing; "):
        TeacherCache.open(tmp_path / "own", fingerprint=Fingerprint("weights", "bgr", "list"))
    with pytest.raises(TypeError, match="Fingerprint: data must be a str, got int"):
        Fingerprint("weights", "rgb", 3)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    build(tmp_path / "good")
    layout = TeacherCache.open(tmp_path / "good")._layout
    for name, at, message in [
        ("shard-00000.bin", 0, r"shard-00000.bin is damaged: the checksum of rows 0 to 7 does not match"),
        (
            "shard-00001.bin",
            13,
            r"shard-00001.bin( or shard-00002.bin)? is damaged: the checksum of rows 24 to 29 does not",
        ),
        ("shard-00002.bin", -40, r"shard-00002.bin is damaged: the checksum of rows 54 to 59 does not match"),
        ("shard-00001.bin", -1, "does not match the header"),
        ("samples.i64", 0, "samples.i64 is damaged: its ids do not"),
        ("blocks.bin", 3, "blocks.bin is damaged: it does not match the checksum in the header"),
    ]:
        path = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", path)
        flip(path / name, at)
        with pytest.raises(CacheError, match=message):
            verify_cache(TeacherCache.open(path))
        shutil.rmtree(path)
    for name, message in [("blocks.bin", "blocks.bin must have"), ("samples.i64", "samples.i64 must have 240 bytes")]:
        shutil.copytree(tmp_path / "good", path)
        (path / name).write_bytes(b"")
        with pytest.raises(CacheError, match=message):
            verify_cache(TeacherCache.open(path))
        shutil.rmtree(path)
    assert layout.shards == 3


def test_files_of_another_cache_are_refused(tmp_path: Path) -> None:
    """Same shapes and sizes everywhere: only the seals and checksums can tell."""
    build(tmp_path / "a")
    build(tmp_path / "b", teacher(1))
    for name, message in [
        ("header.json", "shard-00000.bin does not match the header"),
        ("shard-00000.bin", "shard-00000.bin does not match the header"),
    ]:
        path = tmp_path / "mixed"
        shutil.copytree(tmp_path / "a", path)
        shutil.copy(tmp_path / "b" / name, path)
        with pytest.raises(CacheError, match=message):
            TeacherCache.open(path).read([100])
        shutil.rmtree(path)
    shutil.copy(tmp_path / "a" / "shard-00001.bin", tmp_path / "a" / "shard-00000.bin")
    with pytest.raises(CacheError, match=r"shard-00000.bin does not match the header"):
        TeacherCache.open(tmp_path / "a").read([100])
    # A header changed by hand no longer fits either.
    header = json.loads((tmp_path / "b" / "header.json").read_text())
    (tmp_path / "b" / "header.json").write_text(json.dumps({**header, "features": {"other": [6]}, "error": {}}))
    with pytest.raises(CacheError, match="does not match the header"):
        TeacherCache.open(tmp_path / "b").read([100])


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite(tmp_path: Path, dtype: str, value: float) -> None:
    cache = build(tmp_path, dtype=dtype, shard_bytes=1 << 20)
    layout = cache._layout
    kind = "<f2" if dtype == "float16" else "<f4"
    row = layout.samples + 7  # sample 114, view 1; in int8 its scale
    content = bytearray((tmp_path / "shard-00000.bin").read_bytes())
    planted = np.asarray(value, kind).tobytes()
    content[row * layout.row_bytes : row * layout.row_bytes + len(planted)] = planted
    (tmp_path / "shard-00000.bin").write_bytes(content)
    said = CachedTeacher(TeacherCache.open(tmp_path))
    assert said(torch.tensor([112, 114]), torch.tensor([1, 0]))["out"].isfinite().all()
    with pytest.raises(CacheError, match="feature 'out' of sample 114, view 1 is not finite"):
        said(torch.tensor([112, 114]), torch.tensor([1, 1]))
    with pytest.raises(CacheError, match="does not match"):
        verify_cache(TeacherCache.open(tmp_path))


def test_a_teacher_that_says_other_things_is_found(tmp_path: Path) -> None:
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


def test_tricks_in_the_header(tmp_path: Path) -> None:
    build(tmp_path)
    good = json.loads((tmp_path / "header.json").read_text())
    for bad, message in [
        ({"shards": ["../../etc/passwd"]}, "unknown entry 'shards'"),
        ({"path": "/etc/passwd"}, "unknown entry 'path'"),
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
    ]:
        (tmp_path / "header.json").write_text(json.dumps({**good, **bad}))
        with pytest.raises(CacheError, match=f"is not a valid cache header: .*{message}"):
            TeacherCache.open(tmp_path)
    # A name may be any text: it is never a path.
    name = "../../../tmp/x"
    (tmp_path / "header.json").write_text(json.dumps({**good, "features": {name: [6]}, "error": {}}))
    with pytest.raises(CacheError, match="does not match the header"):
        TeacherCache.open(tmp_path).read([100])
    # The claims of a header take no memory before the files bear them out.
    huge = {
        **good,
        "samples": 1 << 40,
        "rows": 1 << 41,
        "dense": True,
        "shard_rows": 1 << 40,
        "features": {"out": [1 << 29]},
    }
    (tmp_path / "header.json").write_text(json.dumps({**huge, "error": {}}))
    with pytest.raises(CacheError, match=r"shard-00000.bin must have \d+ bytes, got"):
        TeacherCache.open(tmp_path).read([100] * 64)
    # Far ids do not wrap around into rows.
    (tmp_path / "header.json").write_text(json.dumps({**good, "first": -(2**63), "dense": True}))
    with pytest.raises(CacheError, match=f"has no sample {2**63 - 2}"):
        TeacherCache.open(tmp_path).read([2**63 - 2])


def test_links_do_not_lead_a_build_out_of_its_folder(tmp_path: Path) -> None:
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
        build(path)  # what lies in the way without a header goes; the link, not what it leads to
        assert outside.read_text() == "precious", name
        assert not (path / name).is_symlink()
        shutil.rmtree(path)
    path.mkdir()
    (path / "blocks.bin").symlink_to(outside)
    with pytest.raises(CacheError, match=r"cannot write .*blocks.bin"):
        build(path)
    shutil.rmtree(path)

    def stops(samples: Tensor, view: int) -> Tensor:
        if view:
            raise KeyboardInterrupt
        return fetch(samples, view)

    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(path, teacher(), stops, **OPTIONS)
    (path / "shard-00002.bin").symlink_to(outside)
    with pytest.raises(CacheError, match=r"cannot write .*shard-00002.bin"):
        build(path)
    assert outside.read_text() == "precious"


def test_a_shard_that_was_cut_cannot_be_completed(tmp_path: Path) -> None:
    def stops(samples: Tensor, view: int) -> Tensor:
        if view:
            raise KeyboardInterrupt
        return fetch(samples, view)

    with pytest.raises(KeyboardInterrupt):
        TeacherCache.build(tmp_path, teacher(), stops, **OPTIONS)
    shard = tmp_path / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(CacheError, match=r"shard-00000.bin is shorter than its header states; delete the cache"):
        build(tmp_path)


def test_a_complete_cache_needs_no_right_to_write(tmp_path: Path, monkeypatch) -> None:
    build(tmp_path / "a")

    def refused(*_: object) -> None:
        raise AssertionError("something was opened for writing")

    monkeypatch.setattr("kdlib.cache.build.Blocks", refused)
    monkeypatch.setattr("kdlib.cache.build._directory_lock", refused)
    assert build(tmp_path / "a").samples == 30


def sparse(path: Path, samples: int, views: int, ids: np.ndarray | None = None) -> Layout:
    """A complete cache of zeros whose shards are holes, with a few rows in it."""
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
            file.write(layout.seal_of(shard))
    return layout


@pytest.mark.parametrize("dense", [True, False])
def test_a_cache_of_millions_opens_by_its_header_alone(tmp_path: Path, dense: bool) -> None:
    import tracemalloc

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
    # NumPy and torch import a thing or two when first called; ids or rows in memory would be a hundred times this.
    assert peak < 2_000_000
    assert found["embedding"][:, 0].tolist() == [1, 2, 3, 4]
    assert found["map"].shape == (4, 64, 7, 7)
    assert len(cache) == samples
    with pytest.raises(CacheError, match=f"has no sample {samples * 8}, view 0; it has {samples} samples"):
        cache.read([samples * 8])


def test_few_shards_are_held_open_however_many_there_are(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("kdlib.cache.store._MAX_MAPPED", 4)
    cache = build(tmp_path, shard_bytes=1)
    assert cache._layout.shards == 60
    samples = torch.arange(100, 160, 2).repeat(2).flip(0)
    views = torch.arange(60) // 30
    once = cache.read(samples, views)["out"]
    assert len(cache._shards) <= 4
    torch.testing.assert_close(once[:30], teacher()(fetch(samples[:30], 0))["out"], rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(once[30:], teacher()(fetch(samples[30:], 1))["out"], rtol=2e-3, atol=1e-3)
