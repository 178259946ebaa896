"""Checkpoint files: saved files, formats of weights, and files without a backbone or with invalid values."""

import json
import os

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import (
    InputSpec,
    describe_checkpoint,
    load_backbone,
    save_backbone,
)
from tests.faces.checkpoint_files import FORMATS, faces, refused, saved, small, zipped

# --- files that are read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("m", "PyTorch"), ("m.safetensors", "safetensors")])
def test_saved_files_restore_network_and_input_specification(name, kind, tmp_path):
    model = small("ir", layers=(1, 1, 1, 1))
    model.input_spec = InputSpec(size=32, color="bgr", mean=(1.0, 2.0, 3.0), scale=255.0, normalized=None)
    save_backbone(model, tmp_path / name)
    loaded = load_backbone(tmp_path / name)
    assert repr(loaded) == repr(model)
    assert loaded.input_spec == model.input_spec
    assert torch.equal(loaded(faces()), model(faces()))
    info = describe_checkpoint(tmp_path / name)
    assert (info.layout, info.kind) == ("kdlib_faces", kind)
    assert os.listdir(tmp_path) == [name]


def test_a_public_layout_in_safetensors(tmp_path):
    model = small("ir", layers=(1, 1, 1, 1), mid_norm=True, affine=False)
    state = {
        f"net.{key}": value.bfloat16() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    save_file(state, tmp_path / "x", {"format": "pt"})
    info = describe_checkpoint(tmp_path / "x")
    assert (info.kind, info.layout, info.prefix) == ("safetensors", "ir", "net.")
    loaded = load_backbone(tmp_path / "x")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.cosine_similarity(loaded(faces()), model(faces())).min() > 0.99


@pytest.mark.parametrize("options", FORMATS)
def test_formats_and_files_without_counters(options, tmp_path, recwarn):
    model = small()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    (tmp_path / "m").write_bytes(saved(state, **options))
    assert torch.equal(load_backbone(tmp_path / "m")(faces()), model(faces()))
    assert not recwarn


def test_a_linear_layer_does_not_determine_an_oblong_grid(tmp_path):
    model = small("iresnet", layers=(1, 2, 1, 1), input_size=(48, 32))
    torch.save(model.state_dict(), tmp_path / "oblong.pt")
    assert "say which input_size=(height, width)" in refused(tmp_path / "oblong.pt")
    again = load_backbone(tmp_path / "oblong.pt", input_size=(48, 32))
    assert torch.equal(again(faces(2, (48, 32))), model(faces(2, (48, 32))))
    with pytest.raises(InputError, match=r"fc.weight is .* in the file, .* in the network"):
        load_backbone(tmp_path / "oblong.pt", input_size=32)


def test_paths_and_arguments_of_saving(tmp_path):
    assert refused(tmp_path / "none.pt").endswith("does not exist")
    assert refused(tmp_path).endswith("is not a file")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_backbone(small(), tmp_path / "file" / "model.pt")
    with pytest.raises(TypeError, match="must be a kdlib_faces backbone, got Linear"):
        save_backbone(nn.Linear(1, 1), tmp_path / "model.pt")


# --- files without a backbone ----------------------------------------------------------------------------------------


def own(**content):
    return saved({"kdlib_faces": 2, "backbone": "mbf", "arguments": {}, "state": {}, **content})


IRESNET = ("conv1.weight", "layer1.0.bn3.weight", "fc.weight", "features.weight")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08" + bytes(20), "is compressed with gzip"),
        (b"plain text, not a checkpoint", "is damaged"),
        (b"PK\x03\x04" + bytes(200), "is damaged"),
        (save({"a": torch.ones(4)})[:-1], "is damaged, truncated, or not a safetensors file: "),
        (b"\xff" * 7 + b"\x00{}", "is damaged, truncated, or not a safetensors file: "),
        (b"\x05" + bytes(7) + b'{"a":', "is damaged, truncated, or not a safetensors file: "),
        *[(saved(small().state_dict())[:size], "is damaged") for size in (1, 10, 100, 1000, 100_000)],
        (zipped("weights/model.pth"), "an archive of other files ('weights/model.pth' ...)"),
        (zipped("m/data.pkl", "m/constants.pkl"), "a TorchScript program, which executes code"),
        (saved(small()), "contains an object of the class kdlib_faces.backbones.networks.mobilefacenet.MobileFaceNet, which"),
        (saved({"epoch": 3, "model": nn.Linear(1, 1)}), "('model' is a torch.nn.modules.linear.Linear); save model.state_dict()"),
        (saved({"model.stages.1.blocks.2.xca.temperature": torch.ones(4, 1, 1)}), "looks like EdgeFace or another EdgeNeXt"),
        (saved(torch.ones(2)), "must contain a dict of tensors, got Tensor"),
        (saved({}), "starts with nothing"),
        (saved({"state_dict": {}}), "starts with 'state_dict'"),
        (saved({"a": torch.ones(1), 3: 4}), "it starts with 'a', '3'"),
        (saved({"input_layer.0.weight": torch.ones(1)}), "looks like an IR network without the usual blocks"),
        (saved(dict.fromkeys(IRESNET, torch.ones(()))), "keys of insightface's iresnet (arcface_torch), but other shapes"),
        (saved(dict.fromkeys(small().state_dict(), torch.empty(0))), "but other shapes"),
        (saved({"kdlib_faces": 3}), "has format 3"),
        (saved({"kdlib_faces": 2, "backbone": "mbf"}), "must contain 'backbone'"),
        (own(), "missing"),
        (own(backbone="mbv"), "nearest are 'mbf'"),
        (own(arguments={"wide": 1}), "named 'wide'"),
        (own(arguments={"seed": 1}), "'arguments'"),
        (own(arguments={"scale": 10**12}), "mbf"),
        *[(own(arguments=each), "mbf") for each in ({"input_size": 2**40}, {"embedding_dim": 2**62}, {"input_size": [1, 2**62]})],
        (own(arguments={"blocks": [1, 1, 1, 10**9]}), "256"),
    ],
)  # fmt: skip
def test_files_without_a_backbone(content, words, tmp_path):
    (tmp_path / "some.pt").write_bytes(content)
    assert words in refused(tmp_path / "some.pt")
    if words != "missing":  # a description lists the differences
        with pytest.raises(InputError):
            describe_checkpoint(tmp_path / "some.pt")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((8,), torch.nan), "NaN or infinite"),
        (torch.full((8,), 1e300, dtype=torch.float64), "NaN or infinite"),
        (torch.ones(8, dtype=torch.int64), "is not a floating-point tensor"),
        (torch.ones(8).to_sparse(), "has no values"),
        (torch.ones(8, device="meta"), "has no values"),
        (None, "is not a floating-point tensor"),
    ],
)
def test_invalid_values(value, words, tmp_path):
    state = small().state_dict()
    assert state["conv1.bn.bias"].shape == (8,)
    torch.save({**state, "conv1.bn.bias": value}, tmp_path / "m")
    assert words in refused(tmp_path / "m")
    torch.save({**state, "bn.running_var": -state["bn.running_var"]}, tmp_path / "m")
    assert "negative variances in bn.running_var" in refused(tmp_path / "m")


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "{",
        {"backbone": None},
        {"backbone": "mbf", "arguments": []},
        {"input": {"code": 1}},
        {"input": {"color": "cmyk"}},
        {"input": {"mean": "NaN"}},
        {"input": {"mean": float("nan")}},
        {"input": {"scale": [1, 2]}},
        {"input": {"assumed": 3}},
    ],
)
def test_invalid_metadata(header, tmp_path):
    if isinstance(header, dict):
        header = json.dumps({"kdlib_faces": 2, "backbone": "mobilefacenet", "arguments": {}, "input": {}, **header})
    save_file(small().state_dict(), tmp_path / "x", {"kdlib_faces": header})
    assert refused(tmp_path / "x")
