"""Public checkpoint layouts, read by `load_backbone` and compared with independent implementations of each network."""

import os
from pathlib import Path

import pytest
import torch

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import (
    MBF,
    IResNet,
    IRNet,
    MBFFlat,
    MobileFaceNet,
    MobileNetV1,
    MobileNetV2,
    MTLFaceNet,
    count_parameters,
    describe_checkpoint,
    load_backbone,
)
from tests.faces import reference_backbones as ref

# Layout: reference, class, size of the images, description of the input.
RGB, UNKNOWN = "RGB, (pixel - 127.5) / 127.5", "RGB (assumed), (pixel - 127.5) / 127.5 (assumed)"
BGR, ASSUMED_RGB = "BGR (assumed), (pixel - 127.5) / 127.5", "RGB (assumed), (pixel - 127.5) / 127.5"
IMAGENET = "RGB, (pixel - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)"
SQUARE, NARROW = (32, 32), (48, 32)
CASES = {
    "insightface_iresnet": (ref.insightface_iresnet(), IResNet, SQUARE, RGB),
    "insightface_mbf": (ref.mbf((1, 1, 2, 1), 2), MBF, NARROW, RGB),
    "insightface_mbf of depth": (ref.mbf((2, 1, 1, 2), 1), MBF, SQUARE, RGB),
    "insightface_mbf_flat": (ref.mbf((1, 1, 1, 1), 1, flat=True), MBFFlat, SQUARE, RGB),
    "mobilefacenet": (ref.mobilefacenet(), MobileFaceNet, NARROW, UNKNOWN),
    "mobilefacenet_output_layer": (ref.mobilefacenet("output_layer.", affine=False), MobileFaceNet, SQUARE, RGB),
    "mobilefacenet_output_layer affine": (ref.mobilefacenet("output_layer."), MobileFaceNet, SQUARE, RGB),
    "mobilefacenet_gnap": (ref.gnap, MobileFaceNet, (112, 112), RGB),
    "xiaoccer_mobilefacenet": (ref.xiaoccer, MobileFaceNet, NARROW, "RGB, (pixel - 127.5) / 128"),
    "foamliu_mobilefacenet": (ref.foamliu, MobileFaceNet, NARROW, IMAGENET),
    "bubbliiiing_mobilefacenet": (ref.bubbliiiing_mobilefacenet, MobileFaceNet, SQUARE, RGB),
    "ir": (ref.ir(), IRNet, SQUARE, UNKNOWN),
    "ir se": (ref.ir(se=True), IRNet, SQUARE, UNKNOWN),
    "ir of AdaFace": (ref.ir(True, False), IRNet, SQUARE, BGR),
    "ir of AdaFace, se": (ref.ir(True, False, "se_block"), IRNet, SQUARE, BGR),
    "ir of CurricularFace": (ref.ir(False, False), IRNet, SQUARE, ASSUMED_RGB),
    "mtlface": (ref.mtlface(), MTLFaceNet, SQUARE, RGB),
    "mtlface se": (ref.mtlface(se=True), MTLFaceNet, SQUARE, RGB),
    "yakhyo_mobilenet_v1": (ref.yakhyo_v1(bias=True), MobileNetV1, NARROW, RGB),
    "yakhyo_mobilenet_v1 without bias": (ref.yakhyo_v1(bias=False), MobileNetV1, SQUARE, RGB),
    "bubbliiiing_mobilenet_v1": (ref.bubbliiiing_v1, MobileNetV1, SQUARE, RGB),
    "yakhyo_mobilenet_v2": (ref.v2(True, 1, "features"), MobileNetV2, SQUARE, RGB),
    "cavaface_mobilenet_v2": (ref.v2(False, 2, "affine"), MobileNetV2, SQUARE, RGB),
    "cavaface_mobilenet_v2 without affine": (ref.v2(False, 2, "plain"), MobileNetV2, SQUARE, RGB),
}


def faces(size, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(5)) * 2 - 1


def example(reference, size=SQUARE):
    state, images = ref.Weights(), faces(size)
    return state, images, reference(state, images)


@pytest.mark.parametrize("case", CASES)
def test_layouts(case, tmp_path):
    reference, kind, size, description = CASES[case]
    state, images, expected = example(reference, size)
    torch.save(dict(state), tmp_path / "any name")
    info = describe_checkpoint(tmp_path / "any name")
    assert (info.layout, info.differences, info.keys) == (case.split()[0], {}, len(state))
    model = load_backbone(tmp_path / "any name")
    assert type(model) is kind
    assert not model.training
    stages = []
    for path in model.stages:
        model.get_submodule(path).register_forward_hook(lambda m, i, o: stages.append(o.shape[2]))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert stages == [size[0] // 2, size[0] // 4, size[0] // 8, size[0] // 16]
    assert expected.std() > 0.05  # a constant reference would agree with any network
    assert info.parameters == count_parameters(model)
    assert model.input_spec == info.input_spec
    assert model.input_spec.describe() == f"{description}, {size[0]} x {size[1]}"
    assert model.input_spec.normalized is (None if description is UNKNOWN else case.startswith("bubbliiiing"))


@pytest.mark.parametrize(
    "case", ["insightface_iresnet", "xiaoccer_mobilefacenet", "ir of AdaFace", "bubbliiiing_mobilenet_v1"]
)
def test_all_differences_are_listed(case, tmp_path):
    state, _, _ = example(CASES[case][0], CASES[case][2])
    norms = [key for key in state if key.endswith("running_var")]
    removed = norms[1::3][:12]
    for key in removed:
        del state[key]
    wide = next(key for key in state if key.endswith("running_mean") and key.removesuffix("mean") + "var" in state)
    state[wide] = torch.zeros(3)
    state["body.99.extra"] = torch.zeros(1)
    torch.save(dict(state), tmp_path / "w")
    info = describe_checkpoint(tmp_path / "w")
    assert set(info.differences["missing"]) == set(removed)
    assert info.differences["unexpected"] == ("body.99.extra",)
    with pytest.raises(InputError) as caught:
        load_backbone(tmp_path / "w")
    message = str(caught.value)
    assert all(key in message for key in removed)
    assert f"{wide} is (3,) in the file, " in message
    assert "unexpected (1): body.99.extra" in message


@pytest.mark.parametrize(
    ("left", "right"), [(ref.ir(), ref.ir(True, False)), (ref.ir(se=True), ref.ir()), (ref.ir(), ref.mtlface())]
)
def test_mixed_files_are_rejected(left, right, tmp_path):
    """A file with parts of two similar networks fits neither."""
    one, other = example(left)[0], example(right)[0]
    mixed = {key: value for key, value in one.items() if not key.startswith("body.2")}
    mixed.update({key: value for key, value in other.items() if key.startswith(("body.2", "block3"))})
    torch.save(mixed, tmp_path / "mixed")
    with pytest.raises(InputError, match=r"does not fit ir; (missing|unexpected|other shape) \("):
        load_backbone(tmp_path / "mixed")


def test_blocks_of_three_convolutions(tmp_path):
    state, _, _ = example(ref.ir(True, False))
    state["body.1.res_layer.1.weight"] = torch.zeros(4, 8, 1, 1)
    torch.save(dict(state), tmp_path / "w")
    with pytest.raises(InputError, match="other shapes: blocks of three convolutions, which are not supported"):
        load_backbone(tmp_path / "w")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["conv2d_1a.conv.weight"], "InceptionResnetV1"),
        (["body.stage1.0.0.weight"], "RetinaFace"),
        (["patch_embed.proj.weight"], "vision transformer"),
        (["conv1.weight", "layer1.0.bn1.weight", "fc.weight"], "not insightface's IResNet"),
        (["features.0.0.weight", "classifier.1.weight"], "a MobileNet other than the supported face variants"),
        (["kernel"], "load_partial_fc"),
        (["weight"], "load_partial_fc"),
        (["state", "param_groups"], "state of an optimizer"),
    ],
)
def test_files_of_other_kinds(keys, words, tmp_path):
    torch.save({key: torch.ones(2, 2) for key in keys}, tmp_path / "w")
    with pytest.raises(InputError, match=words):
        load_backbone(tmp_path / "w")


KERNEL, WEIGHT = {"head.kernel": torch.ones(16, 3)}, {"head.weight": torch.ones(16, 3)}
MAGFACE, FACEX, UNCERTAIN = (
    "BGR, pixel / 255",
    "BGR, (pixel - 127.5) / 128",
    "BGR (assumed), (pixel - 127.5) / 128 (assumed)",
)
PARTIAL_FC = {
    "state_dict_softmax_fc": {"weight": torch.ones(3, 16)},
    "state_optimizer": {"state": {}, "param_groups": []},
}
# Project: reference, wrapping entry, other entries, prefix, other keys, description of the input.
WRAPPED = {
    "AdaFace": (ref.ir(True, False), "state_dict", {"epoch": 1}, "model.", KERNEL, "BGR, (pixel - 127.5) / 127.5"),
    "CVLface": (ref.ir(True, False), None, {}, "net.", {}, BGR),
    "MagFace": (
        ref.insightface_iresnet(2e-5), "state_dict", {}, "features.module.", {"fc.weight": torch.ones(16, 3)}, MAGFACE,
    ),
    "MagFace, one process": (ref.insightface_iresnet(2e-5), "state_dict", {}, "module.features.", {}, MAGFACE),
    "FaceX-Zoo": (ref.mobilefacenet(), "state_dict", {"epoch": 3, "batch_id": 9}, "backbone.", WEIGHT, FACEX),
    "FaceX-Zoo's ResNet": (ref.ir(se=True), "state_dict", {"batch_id": 9}, "backbone.", {}, FACEX),
    "another network wrapped as in AdaFace": (ref.ir(), "state_dict", {}, "model.", KERNEL, UNKNOWN),
    "likely FaceX-Zoo": (ref.mobilefacenet(), "state_dict", {}, "backbone.", WEIGHT, UNCERTAIN),
    "bubbliiiing": (ref.bubbliiiing_mobilefacenet, None, {}, "arcface.", WEIGHT, RGB),
    "Xiaoccer": (ref.xiaoccer, "net_state_dict", {"iter": 3}, "", {}, "RGB, (pixel - 127.5) / 128"),
    "arcface_torch": (ref.insightface_iresnet(), "state_dict_backbone", {"epoch": 3, **PARTIAL_FC}, "module.", {}, RGB),
    "compiled and distributed": (ref.ir(), "model", {}, "module._orig_mod.", {}, UNKNOWN),
}  # fmt: skip


@pytest.mark.parametrize("project", WRAPPED)
def test_wrappings(project, tmp_path):
    reference, wrapper, around, prefix, beside, description = WRAPPED[project]
    state, images, expected = example(reference)
    content = {**{f"{prefix}{key}": value for key, value in state.items()}, **beside}
    torch.save({**around, wrapper: content} if wrapper else content, tmp_path / "w")
    info = describe_checkpoint(tmp_path / "w")
    assert (info.wrappers, info.prefix, info.beside) == ((wrapper,) if wrapper else (), prefix, tuple(beside))
    model = load_backbone(tmp_path / "w")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert model.input_spec.describe() == f"{description}, 32 x 32"
    if project.startswith("MagFace"):
        assert model.norm_eps == 2e-5
        assert "MagFace" in info.about
    if "FaceX-Zoo" in project:
        assert model.input_spec.normalized is ("ResNet" in project)


@pytest.mark.parametrize(
    ("prefix", "beside", "wrappers"),
    [
        ("encoder.", (), ()),
        ("student.", (), ("ema",)),
        ("model_ema.", (), ("params",)),
        ("encoder.backbone.module.", (), ("weights",)),
        ("module.student.encoder.", (), ("model_ema", "state_dict")),
        ("model_ema.module.", (), ("student",)),
        ("student.net._orig_mod.", (), ("model", "ema")),
        ("module.module.", (), ("state_dict", "params_ema")),
        ("face_net.core.", (), ("embedder",)),
        ("model._fsdp_wrapped_module.", ("model.head.weight",), ()),
        ("student.backbone.", ("teacher.conv1.weight", "student.head.weight", "student.fc.bias"), ()),
        ("model.", ("model_ema.conv1.conv.weight", "n_averaged"), ("state_dict",)),
    ],
)
def test_prefixes_and_wrappers_in_any_order(prefix, beside, wrappers, tmp_path):
    state, images, expected = example(ref.mobilefacenet())
    content = {prefix + key.replace("conv_3.", "conv_3._orig_mod."): value for key, value in state.items()}
    content |= {key: torch.ones(2) for key in beside}
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, tmp_path / "w")
    info = describe_checkpoint(tmp_path / "w")
    assert (info.wrappers, info.prefix, len(info.beside)) == (wrappers, prefix, len(beside))
    torch.testing.assert_close(load_backbone(tmp_path / "w")(images), expected, rtol=1e-4, atol=1e-4)


def test_averaged_weights_are_used_only_without_others(tmp_path):
    state, images, expected = example(ref.mobilefacenet())
    averaged = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"ema": averaged, "state_dict_ema": averaged, "model": dict(state)}, tmp_path / "w")
    torch.testing.assert_close(load_backbone(tmp_path / "w")(images), expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_of_half_the_keys_is_not_removed(tmp_path):
    state, _, _ = example(ref.ir())
    half = {(f"module.{key}" if at % 2 else key): value for at, (key, value) in enumerate(state.items())}
    torch.save(half, tmp_path / "w")
    with pytest.raises(InputError, match=r"does not fit ir|no known layout"):
        load_backbone(tmp_path / "w")


def test_the_published_file_of_foamliu():
    folder = Path(os.environ.get("KDLIB_PUBLIC_FILES", ""))
    weights, graph = folder / "foamliu_mobilefacenet.pt", folder / "foamliu_mobilefacenet.onnx"
    if not (weights.is_file() and graph.is_file()):
        pytest.skip(f"{weights.name} and {graph.name} are missing; set KDLIB_PUBLIC_FILES to their folder")
    session = pytest.importorskip("onnxruntime").InferenceSession(graph)
    model = load_backbone(weights)
    assert repr(model) == "MobileFaceNet(embedding_dim=128, width=1.0, input_size=112, activation='relu6')"
    assert (count_parameters(model), len(model.state_dict())) == (999_936, 307)
    images = model.input_spec(faces((112, 112), 1))
    (expected,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(model(images).detach(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
