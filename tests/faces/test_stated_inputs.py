"""The option `--input` of every command that opens a model, and models whose images are not square."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdlib.cache import TeacherCache
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import InputSpec, build_backbone, save_backbone
from kdlib_faces.cli import main
from kdlib_faces.teachers.input_options import InputOptions, inputs_of_models

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from kdlib_faces.teachers import OnnxTeacher  # noqa: E402
from kdlib_faces.teachers.open import load_network, open_onnx  # noqa: E402
from tests.faces.cache_files import noise, put_list, settings  # noqa: E402
from tests.faces.tiny_graph import tiny_graph  # noqa: E402

BYTES = "color=bgr,mean=0:0:0,scale=1"


def _rectangular(path: Path) -> Path:
    model = onnx.load(str(tiny_graph(path)))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", TensorProto.FLOAT, [2, 3, 112, 96]))
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    rows = ((noise(number, 112), f"p{number // 4},{'young' if number % 2 else 'adult'}") for number in range(24))
    put_list(folder, "identity,age_group", rows)
    tiny_graph(folder / "net.onnx")
    tiny_graph(folder / "second.onnx", seed=1)
    _rectangular(folder / "narrow.onnx")
    save_backbone(build_backbone("mobilefacenet", embedding_dim=16, width=0.25, input_size=32), folder / "net.pt")
    return folder


def _embeddings(output: Path) -> np.ndarray:
    return np.load(next((output / "work").glob("*.npy")))


def _images(folder: Path) -> torch.Tensor:
    pixels = np.stack([np.asarray(Image.open(folder / f"{number}.png")) for number in range(24)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_evaluate_feeds_each_model_as_stated(folder: Path, tmp_path: Path, capsys) -> None:
    faces = ["--data", str(folder / "faces.csv"), "--quiet", "--set", "replicates=5", "--set", "flip=false"]
    both = ["--model", str(folder / "net.onnx"), "--model", str(folder / "net.pt")]
    assert main(["evaluate", *faces, *both[:2], "--input", BYTES, "--output", str(tmp_path / "a")]) == 0, (
        capsys.readouterr().err
    )
    expected = OnnxTeacher(folder / "net.onnx", preprocess=InputSpec(color="bgr", mean=0.0, scale=1.0))(_images(folder))
    np.testing.assert_allclose(_embeddings(tmp_path / "a"), expected["embedding"], rtol=1e-4, atol=1e-4)
    out = ["--output", str(tmp_path / "b")]
    assert main(["evaluate", *faces, *both, "--input", "auto", "--input", "color=bgr,mean=100,scale=64", *out]) == 0
    models = json.loads((tmp_path / "b" / "report.json").read_text())["models"]
    assert [each["input"].split(", 1")[0].split(", 3")[0] for each in models.values()] == [
        "RGB, (pixel - 127.5) / 127.5",
        "BGR, (pixel - 100) / 64",
    ]
    for inputs, words in (
        (["auto"] * 3, "once, or once for each of the 2 models, got 3"),
        (["colour=bgr"], "--input must be 'auto' or some of"),
        (["color=gray"], "color must be one of 'rgb', 'bgr'"),
        (["scale=0"], "scale must be"),
        (["mean=1:2"], "one number or three"),
        (["mean=red"], "'red' must be a number"),
        (["auto", "layout=bhwc"], "applies to ONNX graphs only"),
    ):
        given = [word for text in inputs for word in ("--input", text)]
        assert main(["evaluate", *faces, *both, *given, "--output", str(tmp_path / "c")]) == 2
        assert words in capsys.readouterr().err


def test_evaluate_inspect_and_cache_take_images_that_are_not_square(folder: Path, tmp_path: Path, capsys) -> None:
    narrow = str(folder / "narrow.onnx")
    faces = ["--data", str(folder / "faces.csv"), "--quiet"]
    settings = ["--set", "replicates=5", "--set", "flip=false", "--output", str(tmp_path / "a")]
    assert main(["evaluate", *faces, "--model", narrow, *settings]) == 0, capsys.readouterr().err
    expected = OnnxTeacher(narrow)(_images(folder)[..., 8:-8])["embedding"]
    np.testing.assert_allclose(_embeddings(tmp_path / "a"), expected, rtol=1e-4, atol=1e-6)
    build = ["cache", "build", *faces, "--teacher", narrow, "--tap", "stage2", "--output", str(tmp_path / "c")]
    assert main([*build, "--dtype", "float32"]) == 0, capsys.readouterr().err
    rows = TeacherCache.open(tmp_path / "c").read(torch.arange(24), torch.zeros(24, dtype=torch.int64))
    torch.testing.assert_close(rows["embedding"], expected, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert main(["inspect", narrow]) == 0
    text = capsys.readouterr().out
    assert "(112, 96)" in text
    assert "(1, 6, 14, 12)" in text


def test_inspect_shows_what_a_model_is_fed(folder: Path, capsys) -> None:
    for name, options, shown in (
        ("net.onnx", [], "images        RGB, (pixel - 127.5) / 127.5, 112 x 112, bchw"),
        ("net.onnx", ["--input", BYTES], "images        BGR, (pixel - (0, 0, 0)) / 1, 112 x 112 (stated)"),
        ("net.pt", ["--input", "scale=128"], "input       RGB (assumed), (pixel - 127.5) / 128"),
    ):
        assert main(["inspect", str(folder / name), *options]) == 0
        assert shown.replace(" (assumed)", "") in capsys.readouterr().out.replace(" (assumed)", "")


def test_a_cache_is_built_and_verified_as_stated(folder: Path, tmp_path: Path, capsys) -> None:
    common = ["--data", str(folder / "faces.csv"), "--teacher", str(folder / "net.onnx"), "--quiet"]
    build = ["cache", "build", *common, "--output", str(tmp_path / "c"), "--dtype", "float32"]
    assert main([*build, "--input", BYTES]) == 0
    teacher = open_onnx(folder / "net.onnx", input_options=InputOptions.parse(BYTES))
    rows = TeacherCache.open(tmp_path / "c").read(torch.arange(24), torch.zeros(24, dtype=torch.int64))
    torch.testing.assert_close(rows["embedding"], teacher(_images(folder))["embedding"], rtol=1e-4, atol=1e-4)
    assert main(["cache", "verify", str(tmp_path / "c"), *common, "--rows", "4"]) == 0
    assert main([*build, "--input", "auto"]) == 2
    assert "another teacher" in capsys.readouterr().err


def test_train_and_demo_feed_their_teachers_as_stated(folder: Path, tmp_path: Path, capsys) -> None:
    faces = ["--data", str(folder / "faces.csv"), "--quiet"]
    run = ["train", *faces, "--set", "training.steps=1", "--set", "training.batch_size=8"]
    run += settings("recipe.input_size=32", "recipe.width=0.25", "recipe.embedding_dim=16")
    run += settings("recipe.embedding_projection=linear")
    two = ["--teacher", str(folder / "net.onnx"), "--teacher", str(folder / "net.pt")]
    output = ["--output", str(tmp_path / "run")]
    assert main([*run, *two, *output]) == 0, capsys.readouterr().err
    assert main([*run, *two, *output, "--input", BYTES, "--input", "auto"]) == 2
    assert "what differs is general teacher" in capsys.readouterr().err  # the run was started with other images
    other = ["--output", str(tmp_path / "other")]
    assert main([*run, *two, *other, "--input", BYTES, "--input", "auto"]) == 0, capsys.readouterr().err
    for words, message in (
        (["train", *faces, "--recipe", "student", *output, "--input", BYTES], "no model is given"),
        (["demo", "--output", str(tmp_path / "demo"), "--input", BYTES], "no model is given"),
        ([*run, "--teacher", "iresnet18", "--teacher", "iresnet18", *output, "--input", BYTES], "is no model file"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_stated_values_replace_those_of_a_checkpoint(folder: Path) -> None:
    network = load_network(folder / "net.pt", InputOptions(color="bgr", mean=(1.0, 2.0, 3.0)))
    assert (network.input_spec.color, network.input_spec.mean, network.input_spec.scale) == (
        "bgr",
        (1.0, 2.0, 3.0),
        127.5,
    )
    for text in ("auto", "color=bgr,mean=1.0:2.0:3.5,scale=1.5,layout=bhwc"):
        assert str(InputOptions.parse(text)) == text
    assert inputs_of_models([], 2) == [InputOptions(), InputOptions()]
    with pytest.raises(InputError, match="layout must be one of"):
        InputOptions.parse("layout=nhwc")
