"""Building, opening and reading caches of teacher outputs."""

import copy
import json
import pickle
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
    """Return images by id and view, record each call, and raise KeyboardInterrupt in call `interrupt_at`."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.seen: list[tuple[list[int], int]] = []
        self.interrupt_at = interrupt_at

    def __call__(self, samples: Tensor, view: int) -> Tensor:
        if len(self.seen) == self.interrupt_at:
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
def test_rows_are_the_teacher_outputs(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    cache = build(tmp_path / "cache", Fetch(), dtype=dtype, shard_bytes=shard_bytes, notes={"teacher": "big.onnx"})
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
    assert cache.notes == {"teacher": "big.onnx"}
    assert cache.read([], [])["embedding"].shape == (0, 5)


@pytest.mark.parametrize("interrupt_at", range(6))
def test_an_interrupted_build_resumes_and_gives_the_same_bytes(tmp_path: Path, interrupt_at: int) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    build(whole, Fetch(), shard_bytes=300)
    first, second = Fetch(interrupt_at), Fetch()
    with pytest.raises(KeyboardInterrupt):
        build(part, first, shard_bytes=300)
    if interrupt_at:
        with pytest.raises(CacheError, match=r"of 22 rows; run the same build again"):
            TeacherCache.open(part)
    build(part, second, shard_bytes=300)
    assert first.seen + second.seen == [(IDS[i : i + 4], view) for view in (0, 1) for i in (0, 4, 8)]
    assert contents(part) == contents(whole)


def test_rows_without_a_record_are_written_again(tmp_path: Path) -> None:
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


def test_a_complete_cache_is_neither_computed_nor_written_again(tmp_path: Path) -> None:
    build(tmp_path, Fetch())
    paths = [tmp_path, *tmp_path.iterdir()]
    before, again = [path.stat().st_mtime_ns for path in paths], Fetch()
    build(tmp_path, again, samples=torch.tensor(IDS[::-1]))
    assert again.seen == []
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_a_cache_with_other_contents_is_refused(tmp_path: Path) -> None:
    build(tmp_path, Fetch())
    for options, message in [
        ({"teacher": teacher(1)}, "another teacher, preprocessing or data"),
        ({"samples": IDS[:-1]}, "contains other samples"),
        ({"views": 3}, "its views is 2, expected 3"),
        ({"dtype": "float16"}, "its dtype is 'float32'"),
    ]:
        with pytest.raises(CacheError, match=message):
            build(tmp_path, Fetch(), **options)
    with pytest.raises(CacheError, match="another teacher, preprocessing or data"):
        TeacherCache.open(tmp_path, fingerprint=model_fingerprint(teacher(1)))
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
    dense = TeacherCache.build(tmp_path / "dense", teacher(), lambda samples, view: IMAGES[samples], samples=5)
    for samples, views, message in [
        ([5], 0, "has no sample 5, view 0; it has 5 samples from 0, views 0 to 0"),
        ([-1], 0, "has no sample -1"),
        (torch.tensor([0.5]), 0, r"must be \(b,\) integers"),
        ([0, 1], [0], r"views must be \(b,\) like samples"),
    ]:
        with pytest.raises(ValueError, match=message):
            dense.read(samples, views)


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
def test_arguments_are_checked_before_anything_is_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    given = {"teacher": teacher(), "fetch": lambda samples, view: IMAGES[samples], "samples": 5, **change}
    with pytest.raises(TypeError, match=message):
        TeacherCache.build(tmp_path / "cache", given.pop("teacher"), given.pop("fetch"), **given)
    assert not (tmp_path / "cache").exists()


def test_arguments_of_reading_are_checked(tmp_path: Path) -> None:
    cache = TeacherCache.build(tmp_path, teacher(), lambda samples, view: IMAGES[samples], samples=5)
    (first, *_) = cache.features
    for call, message in [
        (lambda: cache.read([0], 0, first), f"TeacherCache: features must be a sequence of names, got {first!r}"),
        (lambda: CachedTeacher(cache, features=first), "CachedTeacher: features must be a sequence of names"),
        (lambda: CachedTeacher(cache, inputs=(1, 2)), r"CachedTeacher: inputs\[0\] must be a str, got int"),
        (lambda: TeacherCache.open(tmp_path, fingerprint=3), "fingerprint must be a str or a Fingerprint, got int"),
        (lambda: verify_cache(tmp_path), "verify_cache: cache must be a TeacherCache, got"),
        (lambda: model_fingerprint("resnet"), "model_fingerprint: module must be a Module, got str"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()
    none_named = CachedTeacher(cache, features=[], inputs="sample")
    assert set(none_named(torch.tensor([1]))) == set(none_named.taps) == set(cache.features)


def test_invalid_ids_types_and_teacher_outputs(tmp_path: Path) -> None:
    for options, message in [
        ({"samples": [3, 1, 3]}, r"distinct, got repeated ids \[3\]"),
        ({"samples": []}, "at least one id"),
        ({"dtype": "int4"}, "dtype must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(tmp_path, Fetch(), **options)
    with pytest.raises(CacheError, match="there is no cache"):
        TeacherCache.open(tmp_path)

    class Constant(nn.Module):
        fingerprint = "constant"

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            out = torch.zeros(len(x), 2)
            out[1] = self.value
            return {"x": out}

    with pytest.raises(ValueError, match=r'sample 13, view 0 must fit float16, got 7e\+04; use dtype="float32"'):
        build(tmp_path, Fetch(), teacher=Constant(7e4), dtype="float16")
    for dtype in ("int8", "float32", "float16"):
        for value in ("nan", "inf"):
            with pytest.raises(ValueError, match=f"'x' of sample 13, view 0 must fit {dtype}, got {value}$"):
                build(tmp_path, Fetch(), teacher=Constant(float(value)), dtype=dtype)
    assert build(tmp_path, Fetch(), teacher=Constant(7e4)).read([13])["x"].tolist() == [[7e4, 7e4]]
    with pytest.raises(TypeError, match="named features"):
        build(tmp_path / "other", Fetch(), teacher=nn.Flatten())


def test_fingerprints() -> None:
    same = model_fingerprint(teacher())
    assert same == model_fingerprint(teacher().train())
    assert same == model_fingerprint(copy.deepcopy(teacher()))
    model, taps = teacher().model, teacher().taps
    preprocessing = (torch.neg, partial(torch.mul, other=2), partial(torch.mul, other=3), nn.Flatten())
    others = [
        model_fingerprint(teacher(1)),
        model_fingerprint(teacher(), data="x"),
        model_fingerprint(teacher(), preprocessing="x"),
        model_fingerprint(TeacherAdapter(model, {"map": "1"})),
        *(model_fingerprint(TeacherAdapter(model, taps, preprocess=each)) for each in preprocessing),
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


def test_a_cached_teacher_replaces_the_teacher_in_a_distiller(tmp_path: Path) -> None:
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
    single = CachedTeacher(cache, inputs="sample")
    torch.testing.assert_close(single(samples)["embedding"], teacher()(images.flip(-1))["embedding"])
    with pytest.raises(ValueError, match="sample and view, or only of the sample"):
        CachedTeacher(cache, inputs=())
    with pytest.raises(TypeError, match="must be a TeacherCache"):
        CachedTeacher(tmp_path)


def test_copies_map_the_files_again(tmp_path: Path) -> None:
    cache = build(tmp_path, Fetch())
    expected = cache.read(IDS, 1)["map"]
    assert isinstance(next(iter(cache._shards.values())), np.memmap)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(CachedTeacher(cache))).cache):
        assert other._shards == {}
        torch.testing.assert_close(other.read(IDS, 1)["map"], expected, rtol=0, atol=0)
    assert len(pickle.dumps(cache)) < 2000
    assert repr(cache) == f"TeacherCache.open({str(tmp_path)!r}, fingerprint={cache.fingerprint!r})"
