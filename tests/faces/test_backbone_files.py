"""Weight files: safetensors, archives that declare wrong contents, and the input specification of a network."""

import json
import os
import random
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdlib import OUTPUT, TeacherAdapter
from kdlib.cache import model_fingerprint
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import InputSpec, build_backbone, describe_checkpoint, load_backbone, save_backbone
from kdlib_faces.cli import main


def small(name="mobilefacenet", **changes):
    arguments = {"embedding_dim": 16, "width": 0.125, "input_size": 32, **changes}
    return build_backbone(name, seed=0, **arguments).eval()


def faces(batch=2, size=(32, 32)):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def packed(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


FOUR = bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        packed({"a": entry(0, 16)}, FOUR[:-1]),
        packed({"a": entry(0, 16)}, FOUR + b"x"),
        packed({"a": entry(0, 8), "b": entry(4, 16)}, FOUR),
        packed({"a": entry(0, 4), "b": entry(8, 16)}, FOUR),
        packed({"a": entry(0, 16, [2**40, 2**40])}, FOUR),
        packed({"a": entry(0, 16, [-4])}, FOUR),
        packed({"a": {**entry(0, 16), "data_offsets": [16, 0]}}, FOUR),
        packed({"a": entry(0, 16, dtype="F5")}, FOUR),
        packed({"a": {"dtype": "F32"}}, FOUR),
        packed({"__metadata__": {"a": 1}, "a": entry(0, 16)}, FOUR),
        packed(b'{"a": ' + b"[" * 100_000, FOUR),
        packed(b'{"a": \xff}', FOUR),
        packed({}, length=10**6),
        packed({}, length=2**62),
    ],
)
def test_invalid_safetensors(content, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"model.pt is damaged, truncated, or not a safetensors file: \S") as caught:
        load_backbone(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mobilefacenet", "ir"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_saved_files_restore_network_and_input_specification(kind, name, tmp_path):
    model = small(name, **({"layers": (1, 1, 1, 1)} if name == "ir" else {}))
    model.input_spec = InputSpec(size=32, color="bgr", mean=(1.0, 2.0, 3.0), scale=255.0, normalized=None)
    save_backbone(model, tmp_path / "m", format=kind)
    loaded = load_backbone(tmp_path / "m")
    assert repr(loaded) == repr(model)
    assert loaded.input_spec == model.input_spec
    assert torch.equal(loaded(faces()), model(faces()))
    info = describe_checkpoint(tmp_path / "m")
    assert (info.layout, info.kind) == ("kdlib_faces", {"torch": "PyTorch"}.get(kind, kind))
    assert os.listdir(tmp_path) == ["m"]
    with pytest.raises(ValueError, match="format must be one of 'torch', 'safetensors', got 'onnx'"):
        save_backbone(model, tmp_path / "m", format="onnx")


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
    with pytest.raises(InputError):
        load_backbone(tmp_path / "x")


def test_a_compressed_archive_is_refused_before_it_is_read(tmp_path):
    """A megabyte of zeros in a kilobyte; a thousand times as much would exhaust the memory."""
    torch.save({"conv1.weight": torch.zeros(250_000)}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as source,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert (tmp_path / "bomb").stat().st_size < 10_000
    with pytest.raises(InputError, match=r"declares 100\d{4} bytes of content in a file of \d+; torch.save does not"):
        load_backbone(tmp_path / "bomb")


def test_archives_with_other_contents(tmp_path):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("weights/model.pth", b"x")
    with pytest.raises(InputError, match=r"an archive of other files .'weights/model\.pth'"):
        load_backbone(tmp_path / "pack.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"x")
        archive.writestr("m/constants.pkl", b"x")
    with pytest.raises(InputError, match="a TorchScript program, which executes code"):
        load_backbone(tmp_path / "script.pt")
    (tmp_path / "x.pt.gz").write_bytes(b"\x1f\x8b\x08" + bytes(20))
    with pytest.raises(InputError, match="compressed with gzip"):
        load_backbone(tmp_path / "x.pt.gz")


def test_a_flipped_bit_is_detected(tmp_path):
    save_backbone(small(), tmp_path / "m")
    whole = bytearray((tmp_path / "m").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "m").write_bytes(bytes(whole))
    with pytest.raises(InputError, match="damaged: the checksum of"):
        load_backbone(tmp_path / "m")


@pytest.mark.parametrize("kind", ["torch", "safetensors", "pickle"])
def test_random_damage_raises_one_printable_line_or_changes_a_value(kind, tmp_path):
    model = small("ir", layers=(1, 1, 1, 1), embedding_dim=4, input_size=16)
    if kind == "pickle":
        torch.save(model.state_dict(), tmp_path / "m", _use_new_zipfile_serialization=False)
    else:
        save_backbone(model, tmp_path / "m", format=kind)
    whole, chance, messages = (tmp_path / "m").read_bytes(), random.Random(7), []
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
            messages.append(str(error))
    assert len(messages) >= 10
    assert all(message.isprintable() for message in messages)


def test_names_in_a_hostile_file_are_printed_on_one_line(tmp_path):
    state = {**small().state_dict(), "a\n\x1b[31mb": torch.ones(1), "c" * 10**5: torch.ones(1)}
    torch.save(state, tmp_path / "m")
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path / "m")
    assert "a\\n\\x1b[31mb" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_old_pickles_are_read(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "m", _use_new_zipfile_serialization=False)
    assert torch.equal(load_backbone(tmp_path / "m")(faces()), model(faces()))


def test_files_with_negative_variances(tmp_path):
    state = small().state_dict()
    key = next(key for key in state if key.endswith("running_var"))
    torch.save({**state, key: -state[key]}, tmp_path / "m")
    with pytest.raises(InputError, match=f"negative variances in {key}"):
        load_backbone(tmp_path / "m")


def test_other_pickle_protocols(tmp_path, recwarn):
    state = small().state_dict()
    torch.save(state, tmp_path / "m", pickle_protocol=3)
    loaded = load_backbone(tmp_path / "m").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())
    for protocol in (4, 5):
        torch.save(state, tmp_path / "m", pickle_protocol=protocol)
        with pytest.raises(InputError, match="a pickle protocol that cannot be read safely; save it again"):
            load_backbone(tmp_path / "m")
    assert not recwarn


def test_tensors_without_dimensions(tmp_path):
    torch.save({key: torch.empty(0) for key in small().state_dict()}, tmp_path / "m")
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path / "m")
    assert str(caught.value).endswith("but other shapes")


def test_inspect_with_an_input_size(tmp_path, capsys):
    torch.save(small("ir", input_size=(32, 48), layers=(1, 1, 1, 1)).state_dict(), tmp_path / "m")
    assert main(["inspect", str(tmp_path / "m")]) == 2
    assert "input_size=(height, width)" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "m"), "--input-size", "32x48"]) == 0
    out = capsys.readouterr().out
    assert "32 x 48" in out
    assert "complete, all finite" in out
    assert main(["inspect", str(tmp_path / "m"), "--input-size", "32x48", "--tap", "body.1"]) == 0
    assert capsys.readouterr().out == "body.1  (b, 16, 8, 12)\n"
    for wrong in ("32by48", "0", "1x2x3", "-4"):
        assert main(["inspect", str(tmp_path / "m"), f"--input-size={wrong}"]) == 2
        assert "--input-size must be pixels, as 112 or 112x96" in capsys.readouterr().err


class TestInputSpec:
    def test_default_images_are_not_changed(self):
        images = faces()
        assert InputSpec(size=32)(images) is images

    def test_normalization_and_channel_order(self):
        pixels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double()
        images = (pixels - 127.5) / 127.5
        spec = InputSpec(size=8, color="bgr", mean=(104.0, 117.0, 123.0), scale=(1.0, 2.0, 4.0))
        mean, scale = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.scale))
        torch.testing.assert_close(spec(images), (pixels.flip(1) - mean) / scale)
        torch.testing.assert_close(InputSpec(size=8, mean=0.0, scale=255.0)(images), pixels / 255)
        assert spec(images.half()).dtype == torch.float16

    def test_a_narrow_network_receives_the_center_of_an_aligned_crop(self):
        images = faces(size=(112, 112))
        assert torch.equal(InputSpec(size=(112, 96))(images), images[..., 8:104])
        assert InputSpec(size=(112, 96))(faces(size=(56, 56))).shape == (2, 3, 112, 96)
        assert InputSpec(size=48)(faces()).shape == (2, 3, 48, 48)

    def test_gradients(self):
        images = faces().requires_grad_()
        InputSpec(size=16, color="bgr", scale=128.0)(images).sum().backward()
        assert images.grad is not None
        assert bool(torch.isfinite(images.grad).all())

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"color": "gbr"}, "color must be one of 'rgb', 'bgr'"),
            ({"size": 0}, "input_size"),
            ({"scale": 0}, "scale"),
            ({"scale": (1.0, 1.0)}, "scale must be one number or three"),
            ({"mean": float("nan")}, "mean"),
            ({"mean": "127"}, "mean"),
            ({"normalized": "yes"}, "normalized must be True, False or None"),
            ({"assumed": ("size",)}, "assumed"),
        ],
    )
    def test_invalid_fields(self, fields, words):
        with pytest.raises((ValueError, TypeError), match=words):
            InputSpec(**fields)

    def test_invalid_images(self):
        for wrong in (faces()[0], faces()[:, :2], faces().to(torch.uint8)):
            with pytest.raises((ValueError, TypeError), match="images must be"):
                InputSpec(size=32)(wrong)

    def test_arguments_of_load_backbone_override_the_file(self, tmp_path):
        torch.save(small().state_dict(), tmp_path / "m")
        model = load_backbone(tmp_path / "m")
        assert model.input_spec == InputSpec(size=32, normalized=None, assumed=("color", "scale", "normalized"))
        model = load_backbone(tmp_path / "m", color="bgr", scale=128.0, normalized=True)
        assert model.input_spec == InputSpec(size=32, color="bgr", scale=128.0, normalized=True)
        save_backbone(model, tmp_path / "n")
        assert load_backbone(tmp_path / "n").input_spec == model.input_spec
        assert load_backbone(tmp_path / "n", color="rgb").input_spec.color == "rgb"
        with pytest.raises(InputError, match="color must be one of"):
            load_backbone(tmp_path / "m", color="yuv")

    def test_an_input_specification_is_the_preprocessing_of_a_teacher(self):
        model = small()
        plain, turned = InputSpec(size=32), InputSpec(size=32, color="bgr")
        adapters = [TeacherAdapter(model, {"embedding": OUTPUT}, preprocess=spec) for spec in (plain, turned)]
        images = faces()
        assert torch.equal(adapters[1](images)["embedding"], adapters[0](images.flip(1))["embedding"])
        assert model_fingerprint(adapters[0]) != model_fingerprint(adapters[1])


def test_the_recipe_converts_images_for_a_published_teacher(tmp_path):
    from kdlib_faces.recipes.liaad import LIAADConfig, build

    teacher = small("ir", layers=(1, 1, 1, 1), mid_norm=True, affine=False, input_size=(48, 32))
    state = {f"model.{key}": value for key, value in teacher.state_dict().items()}
    torch.save({"state_dict": {**state, "head.kernel": torch.ones(16, 2)}}, tmp_path / "ada.ckpt")
    with pytest.raises(InputError, match="no square final grid"):
        load_backbone(tmp_path / "ada.ckpt")
    loaded = load_backbone(tmp_path / "ada.ckpt", input_size=(48, 32))
    save_backbone(loaded, tmp_path / "ours.pt")
    sizes = {"num_identities": 2, "embedding_dim": 16, "width": 0.125, "input_size": 32}
    config = LIAADConfig(general_teacher=str(tmp_path / "ours.pt"), age_teacher="iresnet18", **sizes)
    distiller = build(config)
    images = faces()
    embeddings = distiller.teachers["general"](images)["embedding"]
    torch.testing.assert_close(embeddings, teacher(loaded.input_spec(images)))
    assert loaded.input_spec.color == "bgr"
    assert loaded.input_spec(images).shape == (2, 3, 48, 32)


def test_the_evaluation_converts_images_for_a_published_network(tmp_path):
    from kdlib_faces.evaluation import embed_images
    from kdlib_faces.harness.embeddings import open_model

    model = small(input_size=(32, 16))
    model.input_spec = InputSpec(size=(32, 16), color="bgr", mean=0.0, scale=255.0)
    save_backbone(model, tmp_path / "m.pt")
    opened = open_model(tmp_path / "m.pt")
    loaded, side = opened.module, opened.size
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.normalize(model(pixels.flip(1)[..., 8:24] / 255), dim=1)
    assert side == 32
    embeddings = torch.from_numpy(embed_images(loaded, pixels, flip=False))
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-5)


def test_files_that_declare_impossible_sizes(tmp_path):
    content = {"kdlib_faces": 2, "backbone": "mobilefacenet", "input": {}, "state": {}}
    for arguments in ({"input_size": 2**40}, {"width": 1e12}, {"embedding_dim": 2**62}, {"input_size": [1, 2**62]}):
        torch.save({**content, "arguments": arguments}, tmp_path / "m")
        with pytest.raises(InputError):
            load_backbone(tmp_path / "m")
        with pytest.raises(InputError):
            describe_checkpoint(tmp_path / "m")


class TestInspect:
    def run(self, capsys, path):
        assert main(["inspect", str(path)]) == 0
        return capsys.readouterr().out

    def test_describes_a_checkpoint(self, tmp_path, capsys):
        model = small("ir", layers=(1, 1, 1, 1), mid_norm=True, affine=False)
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"state_dict": {**state, "head.kernel": torch.ones(16, 3)}}, tmp_path / "a.ckpt")
        out = self.run(capsys, tmp_path / "a.ckpt")
        for part in (
            "layout      ir: IR or IR-SE with face.evoLVe's names; as in AdaFace or CVLface; wrapped as in AdaFace",
            "wrapping    opened state_dict; stripped 'model.'; left out head.kernel",
            "input       BGR, (pixel - 127.5) / 127.5, 32 x 32",
            "output      (b, 16), not normalized",
            f"parameters  {sum(p.numel() for p in model.parameters()):,}",
            f"keys        {len(model.state_dict())}",
            "taps        body.0, body.1, body.2, body.3",
            "weights     complete, all finite",
        ):
            assert part in out

    def test_lists_every_difference(self, tmp_path, capsys):
        state = small().state_dict()
        gone = [key for key in state if key.endswith("running_mean")]
        for key in gone:
            del state[key]
        state["extra"] = torch.ones(1)
        torch.save(state, tmp_path / "m")
        out = self.run(capsys, tmp_path / "m")
        assert f"missing ({len(gone)})" in out
        assert all(f"\n    {key}\n" in out for key in gone)
        assert out.rstrip().endswith("unexpected (1)\n    extra")

    def test_reports_invalid_values(self, tmp_path, capsys):
        state = small().state_dict()
        state["bn.bias"][0] = torch.nan
        torch.save(state, tmp_path / "m")
        assert "contains NaN or infinite values in bn.bias" in self.run(capsys, tmp_path / "m")
