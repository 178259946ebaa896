"""Checkpoints with objects beside the weights, checkpoints of kdlib, and damaged or hostile files."""

import argparse
import datetime
import io
import os
import pickle
import random
import re
import struct
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kdlib
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MobileFaceNet, describe_checkpoint, load_backbone, save_backbone
from kdlib_faces.heads import ArcFaceHead
from tests.faces.checkpoint_files import FORMATS, faces, refused, saved, small, zipped

WRAPPERS = b"state_dict model net student encoder module weights params ema backbone".split()


class Dictionary(dict):
    """A dict of another class, as of a configuration library."""


class Printed:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ("it ran",)


BESIDE = {
    "args": argparse.Namespace(lr=0.1, output=Path("runs")),
    "best": np.float64(0.998),
    "history": np.arange(3),
    "recent": deque([1.0, 2.0], 10),
    "groups": defaultdict(list, {"a": [1]}),
    "time": datetime.datetime(2020, 1, 1),
    "kind": Path,
    "criterion": nn.CrossEntropyLoss(),
    "config": Dictionary(lr=Dictionary(value=1)),
    "order": OrderedDict(a=nn.Parameter(torch.ones(0, 2)), b=torch.Size([1])),
    "numbers": [{1, 2}, frozenset([3]), 1j, 2**70, b"bytes"],
    "printed": Printed(),
}


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": Dictionary(s), **BESIDE}, lambda s: {**s, **BESIDE}])
def test_objects_beside_the_weights_are_not_built(wrap, options, tmp_path, capsys):
    model = small()
    with torch.no_grad():  # a weight that is saved transposed
        model.linear.weight = nn.Parameter(model.linear.weight.t().contiguous().t())
    (tmp_path / "m").write_bytes(saved(wrap(model.state_dict()), **options))
    loaded = load_backbone(tmp_path / "m").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())
    assert describe_checkpoint(tmp_path / "m").differences == {}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_converted_counters(dtype, tmp_path):
    """A file of `{key: value.half()}` also has its BatchNorm counters in half precision, infinite above 65504."""
    model = small()
    for number, norm in enumerate(each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
        norm.num_batches_tracked.fill_(70_000 if number else 12)
    torch.save({key: value.to(dtype) for key, value in model.state_dict().items()}, tmp_path / "m")
    loaded = load_backbone(tmp_path / "m")
    counters = [value for key, value in loaded.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counters[0] == 12
    assert {value.dtype for value in counters} == {torch.int64}
    assert all(0 <= value <= 70_144 for value in counters)
    torch.save({**model.state_dict(), "bn.num_batches_tracked": Path("x")}, tmp_path / "n")
    assert load_backbone(tmp_path / "n").bn.num_batches_tracked == 0
    torch.testing.assert_close(loaded(faces()), model.to(dtype).float()(faces()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_checkpoints_of_kdlib(ema_decay, tmp_path):
    student, tap = small().train(), {"embedding": kdlib.OUTPUT}
    match = kdlib.Term(
        kdlib.AngularDistillLoss(), student="embedding", teacher="embedding", project=kdlib.LinearProjection(16, 16)
    )
    head = kdlib.Term(ArcFaceHead(16, 3), student="embedding", target="identity")
    objective = kdlib.Objective({"match": match, "identity": head})
    distiller = kdlib.Distiller(
        kdlib.StudentAdapter(student, tap), {"teacher": kdlib.TeacherAdapter(small(), tap)}, objective
    )
    torch.save(distiller.state_dict(), tmp_path / "weights.pt")
    assert torch.equal(load_backbone(tmp_path / "weights.pt").linear.weight, student.linear.weight)
    batch = (faces(4), {"identity": torch.arange(4) % 3})
    kdlib.train(
        distiller, [batch], kdlib.TrainConfig(epochs=1, lr=1e-3, ema_decay=ema_decay, checkpoint_dir=tmp_path / "run")
    )
    (path,) = (tmp_path / "run").glob("*.pt")
    info = describe_checkpoint(path)
    assert (info.wrappers, info.prefix) == (("distiller",), "student.model.")
    assert info.beside == tuple(key for key in distiller.state_dict() if key.startswith("objective."))
    assert torch.equal(load_backbone(path)(faces()), student.eval()(faces()))


# --- damaged and hostile files ---


class _Runs:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    content = {"state_dict": small().state_dict(), "hyper_parameters": _Runs(tmp_path / "was-run")}
    (tmp_path / "evil.pt").write_bytes(saved(content) if zipped else pickle.dumps(content))
    assert "mkdir, which was refused; save model.state_dict() instead" in refused(tmp_path / "evil.pt")
    assert not (tmp_path / "was-run").exists()


def test_a_compressed_archive_is_refused_before_it_is_read(tmp_path):
    """A megabyte of zeros in a kilobyte; a thousand times as much would exhaust the memory."""
    with (
        zipfile.ZipFile(io.BytesIO(saved({"conv1.weight": torch.zeros(250_000)}))) as source,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert (tmp_path / "bomb").stat().st_size < 10_000
    message = refused(tmp_path / "bomb")
    assert re.search(r"declares 100\d{4} bytes of content in a file of \d+; torch.save does not", message)


@pytest.mark.parametrize("kind", ["torch", "safetensors", "pickle"])
def test_random_damage_raises_one_printable_line_or_changes_a_value(kind, tmp_path):
    model = small("ir", layers=(1, 1, 1, 1), embedding_dim=4, input_size=16)
    source = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    save_backbone(model, source)
    whole, chance, refusals = source.read_bytes(), random.Random(7), []
    if kind == "pickle":
        whole = saved(model.state_dict(), _use_new_zipfile_serialization=False)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            # The structure is in the first and the last kilobytes.
            at = chance.choice((chance.randrange(3000), len(whole) - 1 - chance.randrange(6000)))
            damaged[at] = chance.randrange(256)
        (tmp_path / "d").write_bytes(bytes(damaged))
        try:
            load_backbone(tmp_path / "d")  # formats without checksums do not detect a changed weight
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) >= 10
    assert all(message.isprintable() for message in refusals)
    if kind == "torch":
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        (tmp_path / "d").write_bytes(bytes(damaged))
        assert "damaged: the checksum of" in refused(tmp_path / "d")


def test_names_in_a_hostile_file_are_printed_on_one_line(tmp_path):
    state = {**small().state_dict(), "a\n\x1b[31mb": torch.ones(1), "c" * 10**5: torch.ones(1)}
    torch.save(state, tmp_path / "m")
    message = refused(tmp_path / "m")
    assert "a\\n\\x1b[31mb" in message
    assert len(message) < 1000


def test_cycles_and_bombs_in_a_pickle_take_no_time(tmp_path):
    """A dict that contains itself under every name, and a key and a name of 2**60 nested entries, whose hash is slow."""
    nested = b"(K\x01t" + b"2\x86" * 60
    for content in (
        b"\x80\x02}q\x00(" + b"".join(b"X" + struct.pack("<I", len(name)) + name + b"h\x00" for name in WRAPPERS) + b"u.",
        b"\x80\x02}" + nested + b"K\x01sc__main__\nA\n)R0.",
        b"\x80\x04" + nested + b"\x8c\x01a\x93.",
        b"\x80\x02" + nested + b"Q.",
    ):  # fmt: skip
        (tmp_path / "m").write_bytes(zipped("m/data.pkl", content=content))
        refused(tmp_path / "m")


def test_a_small_file_cannot_declare_a_large_network(tmp_path):
    """One stored number, expanded by zero strides to every weight."""
    with torch.device("meta"):
        wanted = MobileFaceNet(width=4.0).state_dict()
    one, count = torch.ones(()), torch.zeros((), dtype=torch.int64)
    state = {key: (one if value.is_floating_point() else count).expand(value.shape) for key, value in wanted.items()}
    torch.save(state, tmp_path / "x")
    assert "declares more values than its" in refused(tmp_path / "x")
