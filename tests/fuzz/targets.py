"""Readers of files, each with a valid file and the errors that it documents for others."""

import io
import json
import pickle
import struct
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from kdlib import TrainConfig, train
from kdlib.cache import CacheError, TeacherCache, verify_cache
from kdlib.training import CheckpointError, load_checkpoint, read_log
from kdlib_faces._checks import InputError
from kdlib_faces.alignment import AlignConfig, FaceDetector
from kdlib_faces.alignment.manifest import open_manifest
from kdlib_faces.backbones import load_backbone, save_backbone
from kdlib_faces.backbones.checkpoints.describe import describe_checkpoint
from kdlib_faces.config import dump_toml, load_config
from kdlib_faces.data import (
    RecordReader,
    load_bin,
    read_agedb_pairs,
    read_calfw_pairs,
    read_faces,
    read_feature_file,
    read_ijb_landmarks,
    read_ijb_pairs,
    read_ijb_subjects,
    read_ijb_templates,
    read_lfw_pairs,
    read_longitudinal,
    read_points,
    read_template_list,
    save_records,
)
from kdlib_faces.data.formats.columns import read_integers
from kdlib_faces.data.images import decode_image
from kdlib_faces.data.sources.shards import scan_shard
from kdlib_faces.harness.embeddings import read_embeddings
from kdlib_faces.harness.tasks import EvaluateConfig
from kdlib_faces.recipes.liaad import LIAADRunConfig
from kdlib_faces.report import render, write
from kdlib_faces.teachers import OnnxTeacher, import_onnx, load_teacher
from kdlib_faces.teachers.onnx.inspect import describe_graph
from tests.core.training_toys import Toy, batches
from tests.faces.checkpoint_files import saved, small
from tests.faces.detector_graph import detector
from tests.faces.exported import write as write_onnx
from tests.faces.matlab_file import Grid, Writer
from tests.faces.reader_files import encoded
from tests.faces.report_sample import sample_report
from tests.faces.tiny_graph import network

__all__ = ["TARGETS", "Target"]

IMAGES = [bytes([value]) * (3 + value) for value in range(8)]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
ERRORS = (InputError,)


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        files: Returns name to content; one of those that are not empty is damaged in each case.
        read: Reads the folder of the files.
        errors: What it may raise, with a message of one line.
        share: How often it is tested compared with others; less for slow ones.
    """

    files: Callable[[], Mapping[str, bytes]]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = ERRORS
    share: float = 1.0


def one(
    content: bytes | Callable[[], bytes],
    read: Callable[[Path], object],
    name: str = "file.bin",
    share: float = 1.0,
    errors: tuple[type[Exception], ...] = ERRORS,
) -> Target:
    """A reader of a single file."""
    made = cache(content) if callable(content) else lambda: content
    return Target(lambda: {name: made()}, lambda folder: read(folder / name), errors, share)


def pair_list(path: Path, read: Callable[..., object], **options: bool) -> None:
    pairs = read(path, **options)
    assert len(pairs.left) == len(pairs.right) == len(pairs.same) == len(pairs.fold_ids) > 0


def bin_set(path: Path) -> None:
    found = load_bin(path)
    assert len(found.images) == 2 * len(found.same) > 0
    assert all(type(image) is bytes for image in found.images)


def records(folder: Path) -> None:
    with RecordReader(folder / "set.rec") as reader:
        assert all(isinstance(record.image, bytes) for record in reader)
        assert (reader.labels() >= 0).all()
        reader.ranges()


def shard(path: Path) -> None:
    with open(path, "rb") as file:
        for row in scan_shard(path):
            file.seek(row.start)
            assert len(file.read(row.size)) == row.size


def shard_list(path: Path) -> None:
    faces = read_faces(path, unlabeled=True)
    assert len(faces.identities) > 0


def integers(path: Path) -> None:
    found = np.stack(read_integers(path, (np.int64,) * 3, what="list", max_rows=1000), 1)
    lines = path.read_bytes().split(b"\n")
    assert found.tolist() == [[int(field) for field in line.split()] for line in lines if line.split()]


def picture(path: Path) -> None:
    assert decode_image(path.read_bytes(), 12).shape == (3, 12, 12)


def face_list(folder: Path) -> None:
    faces = read_faces(folder / "faces.csv")
    assert len(faces.paths) == len(faces.identities) > 1
    assert 0 <= faces.identities.min() <= faces.identities.max() < faces.num_identities


def teacher_cache(folder: Path) -> None:
    found = TeacherCache.open(folder)
    verify_cache(found)
    assert found.read([2])["embedding"].shape == (1, 4)


def checkpoint(path: Path) -> None:
    assert isinstance(load_checkpoint(path)["step"], int)


def manifest(folder: Path) -> None:
    with open_manifest(folder, {"size": "112"}) as found:
        for _, photo in found.rows.values():
            assert all(len(crop.points) in (0, 10) for crop in photo.crops)


def report(folder: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(patch("kdlib_faces.report.files._jobs", lambda report: {}))
        render(folder)


def network_file(path: Path) -> None:
    assert all(value.isfinite().all() for value in load_backbone(path).state_dict().values())


def teacher(path: Path) -> None:
    OnnxTeacher(path)(torch.zeros(1, 3, 16, 16))


def detect(path: Path) -> None:
    FaceDetector(path)(Image.fromarray(PIXELS))


def _made(write: Callable[[Path], object]) -> Callable[[], dict[str, bytes]]:
    """The files that a function writes into a folder; they are made when they are first needed."""

    @cache
    def files() -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as name:
            write(Path(name))
            found = sorted(file for file in Path(name).rglob("*") if file.is_file())
            return {file.relative_to(name).as_posix(): file.read_bytes() for file in found}

    return files


def _tar(form: int) -> bytes:
    """Four members of two images, one with a name that needs an extended header."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in {
            "1.png": encoded(PIXELS), "1.cls": b"Ann", f"{'long/' * 24}2.png": encoded(PIXELS),
            f"{'long/' * 24}2.json": b'{"identity": "Bob", "age": 31.5, "age_group": "adult"}',
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _train(folder: Path) -> None:
    train(Toy(), batches(2), TrainConfig(epochs=1, checkpoint_dir=folder, log_path=folder / "log.jsonl", ema_decay=0.9))


def _build(folder: Path) -> None:
    def fetch(samples: torch.Tensor, view: int) -> torch.Tensor:
        return samples[:, None].float() + view

    class Plus(torch.nn.Module):
        fingerprint = "plus"

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"embedding": x + torch.arange(4)}

    TeacherCache.build(folder, Plus(), fetch, samples=12, views=2, batch_size=4, shard_bytes=100)


def _report(folder: Path) -> None:
    with patch("kdlib_faces.report.files._jobs", lambda report: {}):
        write(folder, sample_report())


def _detector(folder: Path, kind: str) -> None:
    detector(folder / "net.onnx", kind, side=64)


def _graph() -> bytes:
    content: bytes = network().SerializeToString()
    return content


def _export(folder: Path) -> None:
    write_onnx(small(), folder / "net.onnx", fold=True)


def _weights(**options: object) -> Callable[[], bytes]:
    return lambda: saved({"state_dict": small().state_dict()}, **options)


def _written(name: str, write: Callable[[Path], object]) -> Callable[[], bytes]:
    """One of the files that a function writes."""
    return lambda: _made(write)()[name]


FOLD = Grid([[Grid([["a_1", "b_1"], ["a_2", "c_1"]]), np.array([[1.0, -1.0]])]])
MATLAB = {"splits": Grid([[FOLD]])}
ARRAYS = ([np.frombuffer(image, np.uint8).copy() for image in IMAGES], np.array([True, False] * 2))
TRAINED = _made(_train)


def _checkpoint() -> bytes:
    return next(content for name, content in TRAINED().items() if name.endswith(".pt"))


MANIFEST = [
    {"size": "112"}, ["a/1.jpg", 9, 1, 1, [[0.9, [1, 2, 3, 4], list(range(10)), 0]], ""], ["b.jpg", 9, 1, 0, [], "broken"],
]  # fmt: skip
CALFW = b"A_1.jpg 1\nA_2.jpg 1\nB_1.jpg 0\nC_1.jpg 0\n"

TARGETS: dict[str, Target] = {
    "LFW": one(b"2 1\nA\t1\t2\nA\t1\tB\t1\nC\t1\t3\nC\t1\tB\t2\n", lambda path: pair_list(path, read_lfw_pairs)),
    "pairs": one(b"a.jpg b.jpg 1\na.jpg,c.jpg,0\n".replace(b",", b" "), lambda path: pair_list(path, read_lfw_pairs)),
    "CALFW": one(CALFW, lambda path: pair_list(path, read_calfw_pairs, published=False)),
    "AgeDB": one(Writer().file(**MATLAB), lambda path: pair_list(path, read_agedb_pairs, published=False)),
    "AgeDB packed": one(
        Writer(">").file(True, **MATLAB), lambda path: pair_list(path, read_agedb_pairs, published=False)
    ),
    "columns": one(b"".join(b"%d %d %d\n" % (at * 37, at * 1001, at % 2) for at in range(20)), integers),
    "IJB templates": one(b"1.jpg 11 0\n2.jpg 11 1\n3.jpg 18 2\n", read_ijb_templates),
    "IJB landmarks": one(b"1.jpg 1 2 3 4 5 6 7 8 9 10 0.9\n2.jpg 1 2 3 4 5 6 7 8 9 10.5 0.8\n", read_ijb_landmarks),
    "IJB pairs": one(b"11 18 0\n11 25 1\n", read_ijb_pairs),
    "IJB subjects": one(b"TEMPLATE_ID,SUBJECT_ID,FILENAME\n11,1,img/1.png\n12,2,img/2.png\n", read_ijb_subjects),
    "template list": one(json.dumps({"path": ["001/a.png", "2/c.png"], "id": ["1", "2"]}).encode(), read_template_list),
    "feature": one(struct.pack("<4i6f", 6, 1, 4, 5, *range(6)), read_feature_file),
    "points": one(b"version: 1\nn_points: 68\n{\n" + b"1.5 2\n" * 68 + b"}\n", read_points),
    "longitudinal": one(b"path,identity,date\na.jpg,Ann,1990-07-02\nb.jpg,Ann,2010-07-02\n", read_longitudinal),
    **{f"bin {number}": one(pickle.dumps(([*IMAGES], [True, False] * 2), number), bin_set) for number in range(6)},
    **{f"bin of arrays {number}": one(pickle.dumps(ARRAYS, number), bin_set) for number in range(6)},
    **{
        codec: one(encoded(PIXELS, codec), picture)
        for codec in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "TGA", "PCX")
    },
    "records": Target(
        _made(lambda folder: save_records(folder / "set.rec", [b"1", bytes.fromhex("0a23d7ce") * 3, b"x" * 400], [0, 0, 1])),
        records,
        share=3,
    ),
    "records without an index": Target(
        cache(lambda: {"set.rec": _written("set.rec", lambda folder: save_records(folder / "set.rec", [b"first", b"x" * 400], [0, 1]))()}),
        records,
    ),
    **{
        f"shard, {name}": one(_tar(form), shard, "set.tar")
        for name, form in (("ustar", tarfile.USTAR_FORMAT), ("GNU", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT))
    },
    "list of a shard": one(_tar(tarfile.PAX_FORMAT), shard_list, "set.tar"),
    "face list": Target(
        lambda: {"faces.csv": b"path,identity,age,age_group\na.jpg,Ann,7,young\nb.jpg,Bob,41.5,adult\n", "a.jpg": b"", "b.jpg": b""},
        face_list,
        share=3,
    ),
    "settings of a recipe": one(
        dump_toml(LIAADRunConfig()).encode(), lambda path: load_config(LIAADRunConfig, path), "run.toml", share=3
    ),
    "settings of an evaluation": one(
        dump_toml(EvaluateConfig()).encode(), lambda path: load_config(EvaluateConfig, path), "evaluate.toml"
    ),
    "settings of an alignment": one(
        dump_toml(AlignConfig()).encode(), lambda path: load_config(AlignConfig, path), "align.toml"
    ),
    "checkpoint": one(_checkpoint, checkpoint, "a.pt", errors=(CheckpointError,)),
    "checkpoint without a sum": one(lambda: _checkpoint()[:-40], checkpoint, "a.pt", 3, (CheckpointError,)),
    "training log": one(lambda: TRAINED()["log.jsonl"], read_log, "log.jsonl", errors=(ValueError,)),
    "cache": Target(_made(_build), teacher_cache, (CacheError,), share=4),
    "network": one(_weights(), network_file, "net.pt"),
    "network, pickle 5": one(_weights(pickle_protocol=5), network_file, "net.pt", 0.5),
    "network, older format": one(_weights(_use_new_zipfile_serialization=False), network_file, "net.pt"),
    "network, safetensors": one(
        _written("net.safetensors", lambda folder: save_backbone(small(), folder / "net.safetensors")),
        network_file, "net.safetensors",
    ),
    "network of this package": one(
        _written("net.pt", lambda folder: save_backbone(small(), folder / "net.pt")), load_teacher, "net.pt", 0.5
    ),
    "described network": one(_weights(), describe_checkpoint, "net.pt", 0.5),
    "ONNX graph": one(_graph, describe_graph, "net.onnx", share=2),
    "ONNX teacher": one(_graph, teacher, "net.onnx"),
    "ONNX import": one(_written("net.onnx", _export), import_onnx, "net.onnx", 0.3),
    "YuNet": Target(_made(lambda folder: _detector(folder, "yunet")), lambda folder: detect(folder / "net.onnx"), share=0.5),
    "SCRFD": Target(_made(lambda folder: _detector(folder, "scrfd")), lambda folder: detect(folder / "net.onnx"), share=0.5),
    "manifest of crops": Target(
        lambda: {"manifest.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in MANIFEST)}, manifest, share=2
    ),
    "report": one(_written("report.json", _report), lambda path: report(path.parent), "report.json", 0.5),
    "embeddings": Target(
        _made(lambda folder: np.save(folder / "a.npy", np.eye(5, 4, dtype=np.float32) + 1)),
        lambda folder: read_embeddings(folder / "a.npy", 5),
    ),
}  # fmt: skip
