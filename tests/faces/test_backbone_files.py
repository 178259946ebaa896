"""Weight files: safetensors read and written by hand, archives that lie, and what is known of a network's images."""

import json
import os
import random
import struct
import zipfile

import pytest
import torch
from torch import nn

from kdlib import OUTPUT, TeacherAdapter
from kdlib.cache import model_fingerprint
from kdlib_faces._checks import InputError
from kdlib_faces._safetensors import read_safetensors, write_safetensors
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


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
def test_safetensors_round_trip(dtype, tmp_path):
    values = torch.arange(-3, 9).reshape(3, 4).to(dtype)
    tensors = {"a": values, "flag": torch.tensor(True), "none": torch.empty(0, 5, dtype=dtype), "one": values[0, 0]}
    with (tmp_path / "x").open("wb") as file:
        write_safetensors(file, tensors, {"note": "äß"})
    found, metadata = read_safetensors("test", tmp_path / "x")
    assert metadata == {"note": "äß"}
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_safetensors_bytes_are_those_of_the_format(tmp_path):
    """A file put together by hand: bfloat16 is the upper half of a float, and offsets may be odd."""
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "half": {"dtype": "F16", "shape": [2], "data_offsets": [1, 5]},
        "brain": {"dtype": "BF16", "shape": [], "data_offsets": [5, 7]},
    }
    (tmp_path / "x").write_bytes(packed(header, b"\x07" + struct.pack("<ee", 0.5, -2.0) + struct.pack("<f", 3.0)[2:]))
    found, metadata = read_safetensors("test", tmp_path / "x")
    assert metadata == {}
    assert found["byte"].tolist() == [7]
    assert found["half"].tolist() == [0.5, -2.0]
    assert found["brain"].item() == 3.0
    found["byte"][0] = 9  # private to the process
    assert read_safetensors("test", tmp_path / "x")[0]["byte"].tolist() == [7]


FOUR = bytes(16)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (packed({"a": entry(0, 16)}, FOUR[:-1]), "cut short: its header tells 16 bytes of tensors, it holds 15"),
        (packed({"a": entry(0, 16)}, FOUR + b"x"), "bytes that belong to no tensor"),
        (packed({"a": entry(0, 8), "b": entry(4, 16)}, FOUR), "b overlaps the tensor before it"),
        (packed({"a": entry(0, 8), "b": entry(0, 8)}, FOUR[:8]), "b overlaps the tensor before it"),
        (packed({"a": entry(0, 4), "b": entry(8, 16)}, FOUR), "b leaves a gap of 4 bytes"),
        (packed({"a": entry(4, 16)}, FOUR), "a leaves a gap of 4 bytes"),
        (packed({"a": entry(0, 16, [5])}, FOUR), r"needs 20 bytes, its data_offsets give 16"),
        (packed({"a": entry(0, 16, [2**40, 2**40])}, FOUR), "needs .* bytes"),
        (packed({"a": entry(0, 16, [-4])}, FOUR), "a shape of at most 8 whole numbers"),
        (packed({"a": entry(0, 16, [True, 4])}, FOUR), "a shape of at most 8 whole numbers"),
        (packed({"a": entry(0, 16, [4.0])}, FOUR), "a shape of at most 8 whole numbers"),
        (packed({"a": entry(0, 16, [1] * 9)}, FOUR), "a shape of at most 8 whole numbers"),
        (packed({"a": {**entry(0, 16), "data_offsets": [16, 0]}}, FOUR), "two data_offsets, the first not above"),
        (packed({"a": {**entry(0, 16), "data_offsets": [0]}}, FOUR), "two data_offsets"),
        (packed({"a": entry(0, 16, dtype="F4")}, FOUR), "dtype 'F4'; read are"),
        (packed({"a": entry(0, 16, dtype=None)}, FOUR), "of dtype 'None'"),
        (packed({"a": {"dtype": "F32"}}, FOUR), "must have a dtype, a shape and data_offsets"),
        (packed({"a": {**entry(0, 16), "code": "x"}}, FOUR), "must have a dtype, a shape and data_offsets"),
        (packed({"a": [1]}, FOUR), "must have a dtype"),
        (packed({"__metadata__": {"a": 1}, "a": entry(0, 16)}, FOUR), "must be a dict of strings"),
        (packed({"__metadata__": "x", "a": entry(0, 16)}, FOUR), "must be a dict of strings"),
        (packed(b'{"a":1,"a":2}', FOUR), "a name comes twice"),
        (packed(b'{"a": ' + b"[" * 100_000, FOUR), "no JSON"),
        (packed(b'{"a": \xff}', FOUR), "no JSON"),
        (packed(b'{"a": }', FOUR), "no JSON"),
        (packed({}, length=10**6), "its header of 1000000 bytes does not fit in 10"),
        (packed({}, length=2**62), "more than the .* that are read"),
    ],
)
def test_safetensors_that_lie(content, words, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_backbone(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def test_every_truncation_of_safetensors_is_refused(tmp_path):
    save_backbone(small(), tmp_path / "m", format="safetensors")
    whole = (tmp_path / "m").read_bytes()
    for part in (1, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:part])
        with pytest.raises(InputError):
            load_backbone(tmp_path / "cut")


@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet", "ir", "mobilenet_v2"])
def test_our_safetensors_bring_a_network_back(name, tmp_path):
    layers = {"layers": (1, 1, 1, 1)} if name in ("iresnet", "ir") else {}
    model = small(name, **layers)
    model.input_spec = InputSpec(size=32, color="bgr", mean=(1.0, 2.0, 3.0), scale=255.0, normalized=None)
    for kind in ("torch", "safetensors"):
        save_backbone(model, tmp_path / "m", format=kind)
        again = load_backbone(tmp_path / "m")
        assert repr(again) == repr(model)
        assert again.input_spec == model.input_spec
        assert torch.equal(again(faces()), model(faces()))
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
    with (tmp_path / "x").open("wb") as file:
        write_safetensors(file, state, {"format": "pt"})
    info = describe_checkpoint(tmp_path / "x")
    assert (info.kind, info.layout, info.prefix) == ("safetensors", "ir", "net.")
    again = load_backbone(tmp_path / "x")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.cosine_similarity(again(faces()), model(faces())).min() > 0.99


@pytest.mark.parametrize(
    "told",
    ["[]", "{", '{"kdlib_faces": 2}', '{"kdlib_faces": 2, "backbone": "mbf", "arguments": [], "input": {}}',
     '{"kdlib_faces": 2, "backbone": "mobilefacenet", "arguments": {}, "input": {"code": 1}}',
     '{"kdlib_faces": 2, "backbone": "mobilefacenet", "arguments": {}, "input": {"color": "cmyk"}}',
     '{"kdlib_faces": 2, "backbone": "mobilefacenet", "arguments": {}, "input": {"mean": "NaN"}}',
     '{"kdlib_faces": 2, "backbone": "mobilefacenet", "arguments": {}, "input": {"mean": NaN}}',
     '{"kdlib_faces": 2, "backbone": "mobilefacenet", "arguments": {}, "input": {"scale": [1, 2]}}',
     '{"kdlib_faces": 2, "backbone": "mobilefacenet", "arguments": {}, "input": {"assumed": 3}}'],
)  # fmt: skip
def test_metadata_of_ours_that_lies(told, tmp_path):
    with (tmp_path / "x").open("wb") as file:
        write_safetensors(file, small().state_dict(), {"kdlib_faces": told})
    with pytest.raises(InputError):
        load_backbone(tmp_path / "x")


def test_files_of_the_first_format_are_read(tmp_path):
    model = small()
    content = {"kdlib_faces": 1, "backbone": "mobilefacenet", "arguments": model.arguments, "state": model.state_dict()}
    torch.save(content, tmp_path / "m")
    again = load_backbone(tmp_path / "m")
    assert again.input_spec == InputSpec(size=32)
    assert torch.equal(again(faces()), model(faces()))


def test_a_compressed_archive_is_refused_before_it_is_opened(tmp_path):
    """A megabyte of zeros in a kilobyte: a thousand times that would fill the memory."""
    torch.save({"conv1.weight": torch.zeros(250_000)}, tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as source,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert (tmp_path / "bomb").stat().st_size < 10_000
    with pytest.raises(InputError, match=r"claims 100\d{4} bytes of content in a file of \d+; torch.save does not"):
        load_backbone(tmp_path / "bomb")


def test_archives_of_other_things_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("weights/model.pth", b"x")
    with pytest.raises(InputError, match=r"an archive of other files .'weights/model\.pth'"):
        load_backbone(tmp_path / "pack.zip")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"x")
        archive.writestr("m/constants.pkl", b"x")
    with pytest.raises(InputError, match="a TorchScript program, which runs code"):
        load_backbone(tmp_path / "script.pt")
    (tmp_path / "x.pt.gz").write_bytes(b"\x1f\x8b\x08" + bytes(20))
    with pytest.raises(InputError, match="compressed by gzip"):
        load_backbone(tmp_path / "x.pt.gz")


def test_a_flipped_bit_is_found(tmp_path):
    save_backbone(small(), tmp_path / "m")
    whole = bytearray((tmp_path / "m").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "m").write_bytes(bytes(whole))
    with pytest.raises(InputError, match="damaged: the checksum of"):
        load_backbone(tmp_path / "m")


def _refusal(path):
    try:
        load_backbone(path)
    except InputError as error:
        return str(error)
    return None  # a changed weight, in a format without checksums


@pytest.mark.parametrize("kind", ["torch", "safetensors", "pickle"])
def test_any_damage_ends_in_one_clear_line(kind, tmp_path):
    model = small("ir", layers=(1, 1, 1, 1), embedding_dim=4, input_size=16)
    if kind == "pickle":
        torch.save(model.state_dict(), tmp_path / "m", _use_new_zipfile_serialization=False)
    else:
        save_backbone(model, tmp_path / "m", format=kind)
    whole, chance, refused = (tmp_path / "m").read_bytes(), random.Random(7), 0
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 2, 8))):
            # Where the structure is: the first and the last kilobytes.
            at = chance.choice((chance.randrange(3000), len(whole) - 1 - chance.randrange(6000)))
            damaged[at] = chance.randrange(256)
        (tmp_path / "d").write_bytes(bytes(damaged))
        said = _refusal(tmp_path / "d")
        refused += said is not None
        assert said is None or said.isprintable()
    assert refused >= 10


def test_names_of_a_hostile_file_are_shown_on_one_line(tmp_path):
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


class _Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_what_is_beside_the_weights_is_not_run_either(tmp_path):
    content = {"state_dict": small().state_dict(), "hyper_parameters": _Runs(tmp_path / "ran")}
    torch.save(content, tmp_path / "m.ckpt")
    with pytest.raises(
        InputError, match=r"mkdir, which was refused; save model.state_dict\(\) instead, or where you trust"
    ):
        load_backbone(tmp_path / "m.ckpt")
    assert not (tmp_path / "ran").exists()


def test_nothing_is_half_loaded(tmp_path):
    """A network of another depth: all that differs is told, and no network comes back."""
    deep, shallow = small("ir", layers=(1, 2, 1, 1)), small("ir", layers=(1, 1, 1, 1))
    mixed = {**deep.state_dict()}
    mixed.update({key: value for key, value in shallow.state_dict().items() if key.startswith("output_layer")})
    gone = [key for key in mixed if key.startswith("body.2.")]
    for key in gone:
        del mixed[key]
    torch.save(mixed, tmp_path / "m")
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path / "m")
    counters = [key for key in gone if key.endswith("num_batches_tracked")]
    told = str(caught.value)
    assert all(key in told for key in gone if key not in counters)


def test_variances_below_zero_are_no_weights(tmp_path):
    state = small().state_dict()
    key = next(key for key in state if key.endswith("running_var"))
    state[key] = -state[key]
    torch.save(state, tmp_path / "m")
    with pytest.raises(InputError, match=f"variances below 0 in {key}"):
        load_backbone(tmp_path / "m")


def test_other_pickle_protocols_are_read_or_named(tmp_path, recwarn):
    state = small().state_dict()
    torch.save(state, tmp_path / "m", pickle_protocol=3)
    loaded = load_backbone(tmp_path / "m").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in state.items())
    for protocol in (4, 5):
        torch.save(state, tmp_path / "m", pickle_protocol=protocol)
        with pytest.raises(InputError, match="by a newer protocol than is read safely; save it again"):
            load_backbone(tmp_path / "m")
    assert not recwarn


def test_tensors_without_shapes_are_no_indices(tmp_path):
    torch.save({key: torch.empty(0) for key in small().state_dict()}, tmp_path / "m")
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path / "m")
    assert str(caught.value).endswith("but not its shapes")


def test_a_network_of_narrow_images_is_inspected_at_their_size(tmp_path, capsys):
    torch.save(small("ir", input_size=(32, 48), layers=(1, 1, 1, 1)).state_dict(), tmp_path / "m")
    assert main(["inspect", str(tmp_path / "m")]) == 2
    assert "input_size=(height, width)" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "m"), "--input-size", "32x48"]) == 0
    said = capsys.readouterr().out
    assert "32 x 48" in said
    assert "all there, all finite" in said
    assert main(["inspect", str(tmp_path / "m"), "--input-size", "32x48", "--tap", "body.1"]) == 0
    assert capsys.readouterr().out == "body.1  (b, 16, 8, 12)\n"
    for wrong in ("32by48", "0", "1x2x3", "-4"):
        assert main(["inspect", str(tmp_path / "m"), f"--input-size={wrong}"]) == 2
        assert "--input-size must be pixels, as 112 or 112x96" in capsys.readouterr().err


class TestInputSpec:
    def test_leaves_usual_images_alone(self):
        images = faces()
        assert InputSpec(size=32)(images) is images

    def test_pixels_become_what_a_network_takes(self):
        pixels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double()
        images = (pixels - 127.5) / 127.5
        spec = InputSpec(size=8, color="bgr", mean=(104.0, 117.0, 123.0), scale=(1.0, 2.0, 4.0))
        wanted = (pixels.flip(1) - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)) / torch.tensor(
            [1.0, 2.0, 4.0]
        ).view(3, 1, 1)
        torch.testing.assert_close(spec(images), wanted)
        torch.testing.assert_close(InputSpec(size=8, mean=0.0, scale=255.0)(images), pixels / 255)
        assert spec(images.half()).dtype == torch.float16

    def test_a_narrow_network_gets_the_middle_of_an_aligned_crop(self):
        images = faces(size=(112, 112))
        assert torch.equal(InputSpec(size=(112, 96))(images), images[..., 8:104])
        assert InputSpec(size=(112, 96))(faces(size=(56, 56))).shape == (2, 3, 112, 96)
        assert InputSpec(size=48)(faces()).shape == (2, 3, 48, 48)

    def test_gradients_pass(self):
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
    def test_wrong_fields(self, fields, words):
        with pytest.raises((ValueError, TypeError), match=words):
            InputSpec(**fields)

    def test_wrong_images(self):
        for wrong in (faces()[0], faces()[:, :2], faces().to(torch.uint8)):
            with pytest.raises((ValueError, TypeError), match="images must be"):
                InputSpec(size=32)(wrong)

    def test_the_caller_has_the_last_word(self, tmp_path):
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

    def test_a_teacher_gets_its_own_images_and_its_own_fingerprint(self):
        model = small()
        plain, turned = InputSpec(size=32), InputSpec(size=32, color="bgr")
        adapters = [TeacherAdapter(model, {"embedding": OUTPUT}, preprocess=spec) for spec in (plain, turned)]
        images = faces()
        assert torch.equal(adapters[1](images)["embedding"], adapters[0](images.flip(1))["embedding"])
        assert model_fingerprint(adapters[0]) != model_fingerprint(adapters[1])


def test_the_recipe_feeds_a_published_teacher_as_it_wants(tmp_path):
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
    found = distiller.teachers["general"](images)["embedding"]
    torch.testing.assert_close(found, teacher(loaded.input_spec(images)))
    assert loaded.input_spec.color == "bgr"
    assert loaded.input_spec(images).shape == (2, 3, 48, 32)


def test_embeddings_of_a_published_network_are_of_its_own_images(tmp_path):
    from kdlib_faces.evaluation import embed_images
    from kdlib_faces.harness.embeddings import load_model

    model = small(input_size=(32, 16))
    model.input_spec = InputSpec(size=(32, 16), color="bgr", mean=0.0, scale=255.0)
    save_backbone(model, tmp_path / "m.pt")
    loaded, side = load_model(tmp_path / "m.pt")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = model(pixels.flip(1)[..., 8:24] / 255)
    assert side == 32
    found = torch.from_numpy(embed_images(loaded, pixels, flip=False))
    torch.testing.assert_close(found, nn.functional.normalize(wanted, dim=1), rtol=1e-4, atol=1e-5)


def test_a_description_of_impossible_sizes_is_refused(tmp_path):
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

    def test_says_what_a_checkpoint_is(self, tmp_path, capsys):
        model = small("ir", layers=(1, 1, 1, 1), mid_norm=True, affine=False)
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"state_dict": {**state, "head.kernel": torch.ones(16, 3)}}, tmp_path / "a.ckpt")
        out = self.run(capsys, tmp_path / "a.ckpt")
        for part in (
            "layout      ir: IR or IR-SE by face.evoLVe's names; AdaFace's or CVLface's kind; wrapped as AdaFace does",
            "wrapping    opened state_dict; stripped 'model.'; left out head.kernel",
            "input       BGR, (pixel - 127.5) / 127.5, 32 x 32",
            "output      (b, 16), not normalized",
            f"parameters  {sum(p.numel() for p in model.parameters()):,}",
            f"keys        {len(model.state_dict())}",
            "taps        body.0, body.1, body.2, body.3",
            "weights     all there, all finite",
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

    def test_says_that_values_are_unusable(self, tmp_path, capsys):
        state = small().state_dict()
        state["bn.bias"][0] = torch.nan
        torch.save(state, tmp_path / "m")
        assert "holds NaN or infinite values in bn.bias" in self.run(capsys, tmp_path / "m")

    def test_all_networks_with_their_counts(self, capsys):
        assert main(["inspect"]) == 0
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        for name, count in {
            "ir_50": "43,574,976",
            "ir_se_50": "43,797,696",
            "ir_101": "65,129,792",
            "ir_152": "70,737,600",
            "ir_se_152": "71,148,736",
            "adaface_ir_18": "24,020,352",
            "adaface_ir_50": "43,585,600",
            "adaface_ir_101": "65,150,912",
            "mobilenet_v1_025": "360,960",
        }.items():
            assert count in lines[name]


def test_a_module_of_another_kind_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match="must be a kdlib_faces backbone, got Sequential"):
        save_backbone(nn.Sequential(), tmp_path / "m")
