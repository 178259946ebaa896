"""Input specification of a network: conversion of images, and its use by loading, inspection, recipe and evaluation."""

import pytest
import torch
from torch import nn

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import InputSpec, describe_checkpoint, load_backbone, save_backbone
from kdlib_faces.cli import main
from tests.faces.checkpoint_files import faces, small


def adaface_file(path, **changes):
    """A training checkpoint of AdaFace, and its network."""
    model = small("ir", layers=(1, 1, 1, 1), mid_norm=True, affine=False, **changes)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": {**state, "head.kernel": torch.ones(16, 3)}}, path)
    return model


def inspect(capsys, path):
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_normalization_and_channel_order():
    assert InputSpec(size=32)(images := faces()) is images
    pixels = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    images = (pixels - 127.5) / 127.5
    spec = InputSpec(size=8, color="bgr", mean=(104.0, 117.0, 123.0), scale=(1.0, 2.0, 4.0))
    mean, scale = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.scale))
    torch.testing.assert_close(spec(images), (pixels.flip(1) - mean) / scale)
    torch.testing.assert_close(InputSpec(size=8, mean=0.0, scale=255.0)(images), pixels / 255)
    assert spec(images.half()).dtype == torch.float16
    for wrong in (images[0], images[:, :2], images.long()):
        with pytest.raises((ValueError, TypeError), match="images must be"):
            spec(wrong)


def test_a_narrow_network_receives_the_center_of_an_aligned_crop():
    images = faces(size=(112, 112))
    assert torch.equal(InputSpec(size=(112, 96))(images), images[..., 8:104])
    assert InputSpec(size=(112, 96))(faces(size=(56, 56))).shape == (2, 3, 112, 96)
    assert InputSpec(size=48)(faces()).shape == (2, 3, 48, 48)
    assert torch.autograd.grad(InputSpec(size=16)(images.requires_grad_()).sum(), images)[0].isfinite().all()


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
def test_invalid_fields(fields, words):
    with pytest.raises((ValueError, TypeError), match=words):
        InputSpec(**fields)


def test_arguments_of_load_backbone_override_the_file(tmp_path):
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


def test_an_impossible_input_size(tmp_path):
    torch.save(small(embedding_dim=64, affine=False, tail="gnap").state_dict(), tmp_path / "m")
    with pytest.raises(InputError, match=r"describes a network of impossible size|input_size must be"):
        describe_checkpoint(tmp_path / "m", input_size=2**62)


def test_the_recipe_converts_images_for_a_published_teacher(tmp_path):
    from kdlib_faces.recipes.liaad import LIAADConfig, build

    teacher = adaface_file(tmp_path / "ada.ckpt", input_size=(48, 32))
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


def test_inspect_describes_a_checkpoint(tmp_path, capsys):
    model = adaface_file(tmp_path / "a.ckpt")
    out = inspect(capsys, tmp_path / "a.ckpt")
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


def test_inspect_lists_every_difference_and_reports_invalid_values(tmp_path, capsys):
    state = small().state_dict()
    gone = [key for key in state if key.endswith("running_mean")]
    torch.save({**{key: state[key] for key in state if key not in gone}, "extra": torch.ones(1)}, tmp_path / "m")
    out = inspect(capsys, tmp_path / "m")
    assert f"missing ({len(gone)})" in out
    assert all(f"\n    {key}\n" in out for key in gone)
    assert out.rstrip().endswith("unexpected (1)\n    extra")
    torch.save({**state, "bn.bias": torch.full((16,), torch.nan)}, tmp_path / "m")
    assert "contains NaN or infinite values in bn.bias" in inspect(capsys, tmp_path / "m")
