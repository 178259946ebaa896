"""Teacher cache: what is read is what the teacher said, whatever killed the build; and never another teacher's words."""

import copy
import json
import pickle
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdlib import OUTPUT, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib.cache import CachedTeacher, CacheError, TeacherCache, model_fingerprint, verify_cache

IMAGES = torch.randn(11, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def teacher(seed: int = 0) -> TeacherAdapter:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 5))
    return TeacherAdapter(model, {"map": "1", "embedding": OUTPUT})


class Fetch:
    """Images by id (ids are 10, 13, 16, ... here) and view, counting what is fetched and dying on request."""

    def __init__(self, die_at: int | None = None) -> None:
        self.seen: list[tuple[list[int], int]] = []
        self.die_at = die_at

    def __call__(self, samples: Tensor, view: int) -> Tensor:
        if len(self.seen) == self.die_at:
            raise KeyboardInterrupt
        self.seen.append((samples.tolist(), view))
        images = IMAGES[(samples - 10) // 3]
        return images.flip(-1) if view else images


IDS = [10 + 3 * i for i in range(11)]


def build(path: Path, fetch: Fetch, **options) -> TeacherCache:
    options = {"samples": IDS, "views": 2, "batch_size": 4, "sync_seconds": 0, "dtype": "float32", **options}
    return TeacherCache.build(path, options.pop("teacher", None) or teacher(), fetch, **options)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("shard_bytes", [1, 400, 1 << 20])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_read_is_what_the_teacher_said(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    cache = build(tmp_path / "cache", Fetch(), dtype=dtype, shard_bytes=shard_bytes)
    samples, views = torch.tensor([40, 10, 13, 40, 10]), torch.tensor([1, 0, 1, 0, 0])
    got = cache.read(samples, views)
    images = IMAGES[(samples - 10) // 3]
    images = torch.where(views[:, None, None, None] == 1, images.flip(-1), images)
    expected = teacher()(images)
    assert list(got) == ["map", "embedding"]
    for name, x in got.items():
        assert x.dtype == torch.float32
        precision = {"rtol": 2e-3, "atol": 1e-3} if dtype == "float16" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(x, expected[name], **precision)
    assert cache.features == {"map": (2, 2, 2), "embedding": (5,)}
    assert len(cache) == 11
    assert cache.read([], [])["embedding"].shape == (0, 5)


@pytest.mark.parametrize("die_at", [0, 1, 2, 3, 4, 5])
def test_a_build_that_was_stopped_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, die_at: int) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    build(whole, Fetch(), shard_bytes=300)
    first, second = Fetch(die_at), Fetch()
    with pytest.raises(KeyboardInterrupt):
        build(part, first, shard_bytes=300)
    if die_at:
        with pytest.raises(CacheError, match=r"of 22 rows; run the same build again"):
            TeacherCache.open(part)
    build(part, second, shard_bytes=300)
    assert first.seen + second.seen == [(IDS[i : i + 4], view) for view in (0, 1) for i in (0, 4, 8)]
    assert contents(part) == contents(whole)


def test_rows_written_but_not_marked_are_written_again(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    build(whole, Fetch(), shard_bytes=300)
    with pytest.raises(KeyboardInterrupt):
        build(part, Fetch(2), shard_bytes=300)
    header = json.loads((part / "header.json").read_text())
    assert header["rows"] == 8
    for shard in sorted(part.glob("shard*"))[-1:]:
        shard.write_bytes(shard.read_bytes() + b"torn")
    (part / "shard-00004.bin").write_bytes(b"stale" * 1000)
    (part / ".header.json.part").write_bytes(b"{")
    build(part, Fetch(), shard_bytes=300)
    assert contents(part) == contents(whole)


def test_sigkill(tmp_path: Path) -> None:
    script = """
        import os, signal, sys, torch
        from torch import nn
        from kdlib import OUTPUT, TeacherAdapter
        from kdlib.cache import TeacherCache
        torch.manual_seed(0)
        net = TeacherAdapter(nn.Linear(3, 4), {"x": OUTPUT})
        def fetch(samples, view):
            if len(sys.argv) > 2 and int(samples[0]) >= int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            return samples[:, None].float().expand(-1, 3)
        TeacherCache.build(sys.argv[1], net, fetch, samples=20, batch_size=4, sync_seconds=0, shard_bytes=48)
    """

    def run(path: Path, *interrupt_at: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(script), str(path), *interrupt_at]
        return subprocess.run(command, check=False, timeout=120).returncode

    assert run(tmp_path / "interrupted", "12") == -signal.SIGKILL
    assert json.loads((tmp_path / "interrupted" / "header.json").read_text())["rows"] == 12
    assert run(tmp_path / "interrupted") == 0
    torch.manual_seed(0)
    TeacherCache.build(
        tmp_path / "whole",
        TeacherAdapter(nn.Linear(3, 4), {"x": OUTPUT}),
        lambda samples, view: samples[:, None].float().expand(-1, 3),
        samples=20,
        batch_size=4,
        sync_seconds=0,
        shard_bytes=48,
    )
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "whole")


def test_a_complete_cache_is_not_computed_again(tmp_path: Path) -> None:
    build(tmp_path, Fetch())
    again = Fetch()
    build(tmp_path, again, samples=torch.tensor(IDS[::-1]))
    assert again.seen == []


def test_another_teacher_is_an_error(tmp_path: Path) -> None:
    build(tmp_path, Fetch())
    with pytest.raises(CacheError, match="another teacher, preprocessing or data"):
        build(tmp_path, Fetch(), teacher=teacher(1))
    with pytest.raises(CacheError, match="another teacher, preprocessing or data"):
        build(tmp_path, Fetch(), data="other images")
    with pytest.raises(CacheError, match="another teacher, preprocessing or data"):
        TeacherCache.open(tmp_path, fingerprint=model_fingerprint(teacher(1)))
    with pytest.raises(CacheError, match="contains other samples"):
        build(tmp_path, Fetch(), samples=IDS[:-1])
    with pytest.raises(CacheError, match="its views is 2, expected 3"):
        build(tmp_path, Fetch(), views=3)
    with pytest.raises(CacheError, match="its dtype is 'float32'"):
        build(tmp_path, Fetch(), dtype="float16")
    assert TeacherCache.open(tmp_path, fingerprint=model_fingerprint(teacher())).views == 2


def test_missing_samples_and_views_are_named(tmp_path: Path) -> None:
    cache = build(tmp_path / "sparse", Fetch())
    for samples, views, message in [
        ([10, 11], [0, 0], "has no sample 11, view 0; it has 11 samples, views 0 to 1"),
        ([10, 41], [0, 0], "has no sample 41, view 0"),
        ([9], [0], "has no sample 9, view 0"),
        ([10, 13], [1, 2], "has no sample 13, view 2"),
        ([10], [-1], "has no sample 10, view -1"),
    ]:
        with pytest.raises(CacheError, match=message):
            cache.read(samples, views)
    dense = TeacherCache.build(
        tmp_path / "dense", teacher(), lambda samples, view: IMAGES[samples], samples=5, sync_seconds=0
    )
    with pytest.raises(CacheError, match="has no sample 5, view 0; it has 5 samples from 0, views 0 to 0"):
        dense.read([5])
    with pytest.raises(CacheError, match="has no sample -1"):
        dense.read([-1])
    with pytest.raises(ValueError, match="must be \\(b,\\) integers"):
        dense.read(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="views must be \\(b,\\) like samples"):
        dense.read([0, 1], [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "resnet"}, "TeacherCache: teacher must be a Module, got str"),
        ({"fetch": None}, "TeacherCache: fetch must be callable, got NoneType"),
        ({"progress": 3}, "TeacherCache: progress must be callable, got int"),
        ({"preprocessing": None}, "TeacherCache: preprocessing must be a str, got NoneType"),
        ({"data": 3}, "TeacherCache: data must be a str, got int"),
        ({"fingerprint": 3}, "TeacherCache: fingerprint must be a str or a Fingerprint, got int"),
        ({"notes": "abc"}, "TeacherCache: notes must be a mapping of names to texts, got str"),
        ({"notes": {"views": 2}}, r"TeacherCache: notes\['views'\] must be a str, got int"),
        ({"notes": {2: "views"}}, "TeacherCache: a name in notes must be a str, got int"),
    ],
)
def test_arguments_are_named_before_anything_is_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    # A header with another value in it could not be read again.
    given = {"teacher": teacher(), "fetch": lambda samples, view: IMAGES[samples], "samples": 5, **change}
    with pytest.raises(TypeError, match=message):
        TeacherCache.build(tmp_path / "cache", given.pop("teacher"), given.pop("fetch"), **given)
    assert not (tmp_path / "cache").exists()


def test_what_reads_a_cache_names_the_argument(tmp_path: Path) -> None:
    cache = TeacherCache.build(tmp_path, teacher(), lambda samples, view: IMAGES[samples], samples=5)
    (first, *_) = cache.features
    for call, message in [
        (lambda: cache.read([0], 0, first), f"TeacherCache: features must be a sequence of names, got {first!r}"),
        (lambda: CachedTeacher(cache, features=first), "CachedTeacher: features must be a sequence of names"),
        (lambda: CachedTeacher(cache, reads=(1, 2)), r"CachedTeacher: reads\[0\] must be a str, got int"),
        (lambda: TeacherCache.open(tmp_path, fingerprint=3), "fingerprint must be a str or a Fingerprint, got int"),
        (lambda: verify_cache(tmp_path), "verify_cache: cache must be a TeacherCache, got"),
        (lambda: model_fingerprint("resnet"), "model_fingerprint: module must be a Module, got str"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()
    none_named = CachedTeacher(cache, features=[], reads=("sample",))
    assert set(none_named(torch.tensor([1]))) == set(none_named.taps) == set(cache.features)


def test_bad_arguments_and_bad_outputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct, got 3 twice"):
        build(tmp_path, Fetch(), samples=[3, 1, 3])
    with pytest.raises(ValueError, match="at least one id"):
        build(tmp_path, Fetch(), samples=[])
    with pytest.raises(ValueError, match="dtype must be one of"):
        build(tmp_path, Fetch(), dtype="int4")
    with pytest.raises(CacheError, match="there is no cache"):
        TeacherCache.open(tmp_path)

    class Says(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value
            self.fingerprint = "says"

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = torch.zeros(len(x), 2)
            out[1] = self.value
            return {"x": out}

    with pytest.raises(ValueError, match=r'sample 13, view 0 must fit float16, got 7e\+04; use dtype="float32"'):
        build(tmp_path, Fetch(), teacher=Says(7e4), dtype="float16")
    with pytest.raises(ValueError, match=r"sample 13, view 0 must fit float32, got nan$"):
        build(tmp_path, Fetch(), teacher=Says(float("nan")))
    assert build(tmp_path, Fetch(), teacher=Says(7e4)).read([13])["x"].tolist() == [[7e4, 7e4]]
    with pytest.raises(TypeError, match="named features"):
        build(tmp_path / "other", Fetch(), teacher=nn.Flatten())


def test_damaged_caches_are_refused(tmp_path: Path) -> None:
    cache = build(tmp_path, Fetch(), shard_bytes=300)
    good = json.loads((tmp_path / "header.json").read_text())
    shard = tmp_path / "shard-00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CacheError, match=r"shard-00001.bin must have \d+ bytes, got"):
        TeacherCache.open(tmp_path).read(IDS, [0] * 11)
    shard.unlink()
    with pytest.raises(CacheError, match="bytes, got 0"):
        TeacherCache.open(tmp_path).read(IDS, [0] * 11)
    (tmp_path / "samples.i64").write_bytes(b"")
    with pytest.raises(CacheError, match=r"samples\.i64 must have 88 bytes, got 0"):
        TeacherCache.open(tmp_path).read(IDS)
    for bad in [
        {"format": 2},
        {"features": {"x": [1 << 40]}},
        {"features": {"x": [1 << 30, 1 << 30]}},
        {"features": {"x": [0]}},
        {"features": {}},
        {"features": 3},
        {"dtype": "object"},
        {"dtype": 3},
        {"samples": -1},
        {"samples": True},
        {"rows": 1e300},
        {"rows": 23},
        {"shard_rows": 0},
        {"fingerprint": None},
    ]:
        (tmp_path / "header.json").write_text(json.dumps({**good, **bad}))
        with pytest.raises(CacheError, match="is not a valid cache header"):
            TeacherCache.open(tmp_path)
    for text in ["", "[]", "{", '{"format": 1}', "[" * 100000, " " * (2 << 20)]:
        (tmp_path / "header.json").write_text(text)
        with pytest.raises(CacheError, match="is not a valid cache header"):
            TeacherCache.open(tmp_path)
    assert cache.samples == 11


def test_two_builds_at_once_are_refused(tmp_path: Path) -> None:
    def fetch(samples: Tensor, view: int) -> Tensor:
        with pytest.raises(CacheError, match="being built by another process"):
            TeacherCache.build(tmp_path, teacher(), Fetch(), samples=4)
        return IMAGES[samples]

    assert TeacherCache.build(tmp_path, teacher(), fetch, samples=4).samples == 4


def test_fingerprints() -> None:
    same = model_fingerprint(teacher())
    assert same == model_fingerprint(teacher().train())
    assert same == model_fingerprint(copy.deepcopy(teacher()))
    others = [
        model_fingerprint(teacher(1)),
        model_fingerprint(teacher(), data="x"),
        model_fingerprint(teacher(), preprocessing="x"),
        model_fingerprint(TeacherAdapter(teacher().model, {"map": "1"})),
        model_fingerprint(TeacherAdapter(teacher().model, teacher().taps, preprocess=torch.neg)),
        model_fingerprint(TeacherAdapter(teacher().model, teacher().taps, preprocess=partial(torch.mul, other=2))),
        model_fingerprint(TeacherAdapter(teacher().model, teacher().taps, preprocess=partial(torch.mul, other=3))),
        model_fingerprint(TeacherAdapter(teacher().model, teacher().taps, preprocess=nn.Flatten())),
        model_fingerprint(nn.Sequential(teacher())),
        model_fingerprint(nn.Sequential(teacher(1))),
    ]
    assert len({same, *others}) == len(others) + 1
    moved = teacher()
    moved.model[1].running_mean += 1
    assert model_fingerprint(moved) != same
    vague = TeacherAdapter(teacher().model, teacher().taps, preprocess=lambda x: x)
    with pytest.raises(ValueError, match="cannot be identified"):
        model_fingerprint(vague)
    assert model_fingerprint(vague, preprocessing="none") != same


def test_cached_teacher_stands_for_the_teacher_in_a_distiller(tmp_path: Path) -> None:
    cache = build(tmp_path, Fetch())
    terms = {"hint": Term(HintLoss(), student="out", teacher="embedding")}
    torch.manual_seed(0)
    student = StudentAdapter(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), {"out": OUTPUT})
    online = Distiller(student, {"t": teacher()}, Objective(terms))
    cached = Distiller(student, {"t": CachedTeacher(cache)}, Objective(terms))
    samples = torch.tensor([16, 40, 10])
    images = IMAGES[(samples - 10) // 3].flip(-1)
    targets = {"sample": samples, "view": torch.ones(3, dtype=torch.int64)}
    torch.testing.assert_close(cached(images, targets).total, online(images).total)
    assert list(cached.state_dict()) == list(online.state_dict())
    assert not CachedTeacher(cache).train().training
    single = CachedTeacher(cache, reads=("sample",))
    torch.testing.assert_close(single(samples)["embedding"], teacher()(images.flip(-1))["embedding"])
    with pytest.raises(ValueError, match="sample and view, or only of the sample"):
        CachedTeacher(cache, reads=())
    with pytest.raises(TypeError, match="must be a TeacherCache"):
        CachedTeacher(tmp_path)


def test_copies_map_the_files_anew(tmp_path: Path) -> None:
    cache = build(tmp_path, Fetch())
    expected = cache.read(IDS, 1)["map"]
    assert isinstance(next(iter(cache._shards.values())), np.memmap)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(CachedTeacher(cache))).cache):
        assert other._shards == {}
        torch.testing.assert_close(other.read(IDS, 1)["map"], expected, rtol=0, atol=0)
    assert len(pickle.dumps(cache)) < 2000
    assert repr(cache) == f"TeacherCache.open({str(tmp_path)!r}, fingerprint={cache.fingerprint!r})"
