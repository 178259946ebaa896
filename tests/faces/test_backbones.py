"""Backbones: the published counts and names, the contract of every network, and files that may be hostile."""

import copy
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import (
    BACKBONES,
    MBF,
    IResNet,
    IRNet,
    MobileFaceNet,
    MobileNetV1,
    MobileNetV2,
    MTLFaceNet,
    build_backbone,
    count_macs,
    count_parameters,
    describe_backbones,
    latency_ms,
    load_backbone,
    mbf,
    save_backbone,
)

SIZE = {"embedding_dim": 16, "input_size": 32}
BLOCKS = {"layers": (1, 2, 1, 1), "width": 0.125, **SIZE}
SMALL = {
    "mobilefacenet": {"width": 0.125, **SIZE},
    "mbf": {"scale": 1, "blocks": (1, 1, 1, 1), **SIZE},
    "iresnet": BLOCKS,
    "ir": {"se": True, "mid_norm": True, **BLOCKS},
    "mtlface": BLOCKS,
    "mobilenet_v1": {"width": 0.25, **SIZE},
    "mobilenet_v2": {"width": 0.25, **SIZE},
}
VARIANTS = {
    "mobilefacenet": [{"affine": False}, {"affine": False, "tail": "gnap", "embedding_dim": 64, "width": 0.125}],
    "ir": [{"se": False, "affine": False}, {"mid_norm": False}],
    "iresnet": [{"norm_eps": 2e-5}],
    "mtlface": [{"se": True}],
    "mobilenet_v1": [{"bias": True}, {"tail": "flat"}],
    "mobilenet_v2": [{"bias": True, "affine": False}, {"stem_stride": 2}],
}
TRAINED = ("mobilefacenet", "mbf", "iresnet", "ir")  # the slower checks


def small(name, seed=0, **changes):
    return build_backbone(name, seed=seed, **{**SMALL[name], **changes})


def images(batch=2, size=(32, 32), seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# name, dimensions: parameters, trainable, state keys, multiply-adds as published (in M, digits as printed)
PUBLISHED = {
    ("mobilefacenet", 128): (1_003_136, 1_003_136, 333, "220.97"),
    ("mobilefacenet", 512): (1_200_512, 1_200_512, 333, "221.16"),
    ("mbf", 512): (2_059_520, 2_059_520, 333, "437.5"),
    ("iresnet18", 512): (24_025_600, 24_025_088, 187, "2610"),
    ("iresnet34", 512): (34_139_328, 34_138_816, 331, "4460"),
    ("iresnet50", 512): (43_590_848, 43_590_336, 475, "6310"),
    ("iresnet100", 512): (65_156_160, 65_155_648, 925, "12090"),
    ("iresnet200", 512): (118_833_920, 118_833_408, 1807, "23420"),
    ("ir_50", 512): (43_574_976, 43_574_976, 349, None),
    ("ir_101", 512): (65_129_792, 65_129_792, 674, None),
    ("ir_152", 512): (70_737_600, 70_737_600, 687, None),
    ("ir_se_50", 512): (43_797_696, 43_797_696, 397, None),
    ("ir_se_152", 512): (71_148_736, 71_148_736, 787, None),
    ("adaface_ir_18", 512): (24_020_352, 24_020_352, 179, None),
    ("adaface_ir_50", 512): (43_585_600, 43_585_600, 467, None),
    ("adaface_ir_101", 512): (65_150_912, 65_150_912, 917, None),
}
UNPUBLISHED = {"mbf_flat", "mobilenet_v1_025", "mobilenet_v1", "mobilenet_v2", "ir_se_101", "mtlface"}


def test_counts_are_the_published_ones():
    rows = {(row.name, row.embedding_dim): row for row in describe_backbones()}
    assert {name for name, _ in rows} - {name for name, _ in PUBLISHED} <= UNPUBLISHED
    assert {name for name, _ in rows} | {"iresnet", "ir"} == set(BACKBONES)
    for key, (parameters, trainable, keys, macs) in PUBLISHED.items():
        row = rows[key]
        assert (row.parameters, row.trainable, row.state_keys, row.input_size) == (parameters, trainable, keys, 112)
        if macs is None:
            continue
        digits = len(macs.partition(".")[2])
        step = 10 if row.macs > 1e9 else 1  # the large ones are published in hundredths of a G
        shown = f"{step * round(row.macs / 1e6 / step, digits):.{digits}f}"
        assert shown == macs, row


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: MobileNetV1(width=0.25), 0.36),
        (lambda: MobileNetV1(width=0.25, bias=True), 0.36),
        (lambda: MobileNetV2(bias=True), 2.29),
    ],
)
def test_counts_published_in_millions(build, parameters):
    """In the table they come from, digits beyond the second are cut off."""
    with torch.device("meta"):
        model = build()
    assert int(count_parameters(model) / 1e4) / 100 == parameters


def test_networks_differ_from_their_look_alikes_in_places_known():
    """Three networks go by the name IR-50."""
    with torch.device("meta"):
        models = [build_backbone(name) for name in ("ir_50", "adaface_ir_50", "iresnet50")]
    sizes = [count_parameters(model) for model in models]
    norms = 2 * sum(blocks * width for blocks, width in zip((3, 4, 14, 3), (64, 128, 256, 512), strict=True))
    shortcut = 64 * 64 + 2 * 64  # of the first block: there the width stays and insightface has a convolution
    assert sizes[1] - sizes[0] == norms - 2 * 512
    assert sizes[2] - sizes[0] == norms + shortcut
    assert [model.name for model in models] == ["ir_50", "adaface_ir_50", "iresnet50"]


@pytest.mark.parametrize(
    ("build", "parameters", "millions"),
    [
        (lambda: MobileFaceNet(128, input_size=(112, 96)), 999_552, 189.4),
        (lambda: mbf(scale=4, blocks=(2, 8, 12, 4)), 6_314_880, 1816),
        (lambda: mbf(scale=1), 1_200_512, 221.2),
        (lambda: MobileFaceNet(affine=False), 1_199_488, 221.2),
    ],
)
def test_published_variants(build, parameters, millions):
    with torch.device("meta"):
        model = build()
    assert count_parameters(model) == parameters
    assert round(count_macs(model, model.input_size) / 1e6, 0 if millions > 1000 else 1) == millions


def test_parts_of_mobilefacenet():
    with torch.device("meta"):
        model = MobileFaceNet(128)
    parts = {
        kind: sum(p.numel() for m in model.modules() if isinstance(m, classes) for p in m.parameters())
        for kind, classes in {
            "products": (nn.Conv2d, nn.Linear),
            "norms": (nn.BatchNorm2d, nn.BatchNorm1d),
            "slopes": (nn.PReLU,),
        }.items()
    }
    assert parts == {"products": 976_000, "norms": 19_584, "slopes": 7_552}
    assert sum(buffer.numel() for buffer in model.buffers()) == 19_634


def test_names_of_published_checkpoints():
    wanted = {
        "mobilefacenet": {
            "conv1.conv.weight": (64, 3, 3, 3),
            "conv1.prelu.weight": (64,),
            "conv2_dw.conv.weight": (64, 1, 3, 3),
            "conv_23.conv_dw.bn.running_var": (128,),
            "conv_3.model.3.project.conv.weight": (64, 128, 1, 1),
            "conv_34.conv.conv.weight": (256, 64, 1, 1),
            "conv_4.model.5.conv_dw.prelu.weight": (256,),
            "conv_45.conv_dw.conv.weight": (512, 1, 3, 3),
            "conv_5.model.1.conv.bn.bias": (256,),
            "conv_6_sep.conv.weight": (512, 128, 1, 1),
            "conv_6_dw.conv.weight": (512, 1, 7, 7),
            "conv_6_dw.bn.weight": (512,),
            "linear.weight": (512, 512),
            "bn.running_mean": (512,),
        },
        "mbf": {
            "layers.0.layers.0.weight": (128, 3, 3, 3),
            "layers.0.layers.2.weight": (128,),
            "layers.1.layers.0.weight": (128, 2, 3, 3),
            "layers.2.layers.1.layers.0.weight": (128, 1, 3, 3),
            "layers.3.layers.3.layers.2.layers.1.bias": (128,),
            "layers.4.layers.2.layers.0.weight": (256, 256, 1, 1),
            "layers.7.layers.1.layers.0.layers.1.running_mean": (256,),
            "conv_sep.layers.0.weight": (512, 256, 1, 1),
            "features.layers.0.layers.0.weight": (512, 1, 7, 7),
            "features.layers.2.weight": (512, 512),
            "features.layers.3.weight": (512,),
        },
        "iresnet50": {
            "conv1.weight": (64, 3, 3, 3),
            "bn1.weight": (64,),
            "prelu.weight": (64,),
            "layer1.0.downsample.0.weight": (64, 64, 1, 1),
            "layer3.13.bn3.weight": (256,),
            "layer4.0.conv2.weight": (512, 512, 3, 3),
            "layer4.0.downsample.1.running_var": (512,),
            "bn2.weight": (512,),
            "fc.weight": (512, 25088),
            "fc.bias": (512,),
            "features.running_mean": (512,),
        },
    }
    for name, shapes in wanted.items():
        with torch.device("meta"):
            state = build_backbone(name).state_dict()
        assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_mbf_of_scale_one_is_mobilefacenet():
    ours, theirs = MobileFaceNet(16, input_size=32).eval(), MBF(16, scale=1, input_size=32).eval()
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(a.reshape(b.shape))
    torch.testing.assert_close(ours(images()), theirs(images()))


@pytest.mark.parametrize(("name", "changes"), [(name, each) for name in VARIANTS for each in VARIANTS[name]])
def test_variants(name, changes, tmp_path):
    model, sides = small(name, **changes).eval(), []
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o: sides.append(tuple(o.shape[2:])))
        for path in model.stages
    ]
    embeddings = model(images())
    for hook in hooks:
        hook.remove()
    assert sides == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert embeddings.shape == (2, model.embedding_dim)
    assert all(f"{key}={value!r}" in repr(model) for key, value in changes.items())
    save_backbone(model, tmp_path / "model.pt")
    again = load_backbone(tmp_path / "model.pt")
    assert repr(again) == repr(model)
    assert torch.equal(again(images()), embeddings)


@pytest.mark.parametrize("name", SMALL)
class TestEveryBackbone:
    def test_embeds(self, name):
        model = small(name).eval()
        embeddings = model(images(3))
        assert embeddings.shape == (3, model.embedding_dim)
        assert embeddings.dtype == torch.float32
        assert (embeddings.norm(dim=1) - 1).abs().max() > 1e-3  # not normalized
        torch.testing.assert_close(model(images(3)[:1]), embeddings[:1], rtol=1e-4, atol=1e-4)

    def test_stages_are_taps_that_halve_the_grid(self, name):
        model, sides = small(name).eval(), []
        hooks = [
            model.get_submodule(path).register_forward_hook(lambda m, i, o: sides.append(tuple(o.shape[2:])))
            for path in model.stages
        ]
        model(images())
        for hook in hooks:
            hook.remove()
        assert sides == [(16, 16), (8, 8), (4, 4), (2, 2)]

    @pytest.mark.parametrize("size", [(48, 32), (33, 17), (16, 1)])
    def test_any_size(self, name, size):
        model = small(name, input_size=size).eval()
        assert model.input_size == (size if size[0] != size[1] else size[0])
        assert model(images(2, size)).shape == (2, model.embedding_dim)
        assert model.input_spec.size == model.input_size

    def test_repr_rebuilds(self, name):
        model = small(name)
        known = (MobileFaceNet, MBF, IResNet, IRNet, MTLFaceNet, MobileNetV1, MobileNetV2)
        again = eval(repr(model), {each.__name__: each for each in known})
        assert again.arguments == model.arguments
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        assert model.name in BACKBONES

    def test_seed_decides_and_leaves_the_global_generator(self, name):
        before = torch.get_rng_state()
        a, b, c = small(name, seed=1), small(name, seed=1), small(name, seed=2)
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))

    def test_first_values(self, name):
        model = small(name)
        assert all(bool((m.weight == 0.25).all()) for m in model.modules() if isinstance(m, nn.PReLU))
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
        assert all(bool((m.weight == 1).all() and (m.bias == 0).all()) for m in norms)

    def test_wrong_images(self, name):
        model = small(name)
        for wrong in (images(2, (32, 16)), images()[0], images()[:, :1]):
            with pytest.raises(ValueError, match=r"images must be \(b, 3, 32, 32\), got .*; set input_size"):
                model(wrong)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("embedding_dim", 0),
            ("embedding_dim", 8.0),
            ("input_size", 0),
            ("input_size", (32, 32, 3)),
            ("input_size", 31.5),
            ("input_size", "112"),
        ],
    )
    def test_wrong_arguments(self, name, argument, value):
        with pytest.raises(InputError, match=argument):
            small(name, **{argument: value})

    def test_file_of_ours(self, name, tmp_path):
        model = small(name).eval()
        with torch.no_grad():
            next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(0.5)
        save_backbone(model, tmp_path / "model.bin")
        assert os.listdir(tmp_path) == ["model.bin"]
        again = load_backbone(tmp_path / "model.bin")
        assert repr(again) == repr(model)
        assert not again.training
        assert torch.equal(again(images()), model(images()))
        frozen = [key for key, p in again.named_parameters() if not p.requires_grad]
        assert frozen == (["features.weight"] if name == "iresnet" else [])


@pytest.mark.parametrize("name", TRAINED)
class TestEveryTrainedBackbone:
    def test_trains_every_parameter(self, name):
        model = small(name)
        model(images(4)).square().sum().backward()
        without = [key for key, p in model.named_parameters() if p.grad is None]
        assert without == (["features.weight"] if name == "iresnet" else [])
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    def test_autocast(self, name):
        model = small(name).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = model(images())
        assert torch.isfinite(embeddings).all()
        if name in ("iresnet", "ir"):
            assert embeddings.dtype == torch.float32
        cosine = torch.cosine_similarity(embeddings.float(), model(images()))
        assert cosine.min() > 0.98

    def test_exports_with_a_free_batch(self, name):
        model = small(name).eval()
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("b", min=1)},))
        for batch in (1, 3):
            torch.testing.assert_close(program.module()(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-4)

    def test_double(self, name):
        assert small(name).double().eval()(images().double()).dtype == torch.float64

    @pytest.mark.parametrize("wrap", ["bare", "ddp", "resume", "with head", "half"])
    def test_bare_state_dict(self, name, wrap, tmp_path):
        model = small(name).eval()
        state = model.state_dict()
        content = {
            "bare": state,
            "ddp": {f"module.{key}": value for key, value in state.items()},
            "resume": {"epoch": 3, "state_dict_backbone": state},
            "with head": {"state_dict": {**{f"backbone.{k}": v for k, v in state.items()}, "head.w": torch.ones(2)}},
            "half": {key: value.half() if value.is_floating_point() else value for key, value in state.items()},
        }[wrap]
        torch.save(content, tmp_path / "weights.pt")
        again = load_backbone(tmp_path / "weights.pt")
        assert again.arguments == model.arguments
        close = {"rtol": 0.1, "atol": 0.1} if wrap == "half" else {"rtol": 0.0, "atol": 0.0}
        torch.testing.assert_close(again(images()), model(images()), **close)
        assert {p.dtype for p in again.parameters()} == {torch.float32}

    def test_differences_are_listed(self, name, tmp_path):
        state = small(name).state_dict()
        last = next(key for key in reversed(state) if key.endswith("running_var"))
        del state[last]
        state["extra.weight"] = torch.ones(1)
        shift = next(key for key in state if key.endswith("bias"))
        state[shift] = torch.ones(3)
        torch.save(state, tmp_path / "weights.pt")
        with pytest.raises(InputError) as caught:
            load_backbone(tmp_path / "weights.pt")
        for part in (f"missing (1): {last}", "unexpected (1): extra.weight", f"{shift} is (3,) in the file, "):
            assert part in str(caught.value)

    def test_values_that_cannot_be_weights(self, name, tmp_path):
        good = small(name).state_dict()
        key = next(key for key in good if key.endswith("bias"))
        shape = good[key].shape
        for value, words in [
            (torch.full(shape, torch.nan), "NaN or infinite"),
            (torch.full(shape, 1e300, dtype=torch.float64), "NaN or infinite"),
            (torch.ones(shape, dtype=torch.int64), "is no real tensor"),
            (torch.ones(shape).to_sparse(), "holds no values"),
            (torch.ones(shape, device="meta"), "holds no values"),
            (None, "is no real tensor"),
        ]:
            torch.save({**good, key: value}, tmp_path / "weights.pt")
            with pytest.raises(InputError, match=words) as caught:
                load_backbone(tmp_path / "weights.pt")
            assert "\n" not in str(caught.value)


def test_old_files_without_counters(tmp_path):
    model = small("mobilefacenet").eval()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    assert torch.equal(load_backbone(tmp_path / "old.pt")(images()), model(images()))


def test_a_linear_layer_does_not_tell_an_oblong_grid(tmp_path):
    model = small("iresnet", input_size=(48, 32)).eval()
    torch.save(model.state_dict(), tmp_path / "oblong.pt")
    with pytest.raises(InputError, match=r"say which input_size=\(height, width\)"):
        load_backbone(tmp_path / "oblong.pt")
    again = load_backbone(tmp_path / "oblong.pt", input_size=(48, 32))
    assert torch.equal(again(images(2, (48, 32))), model(images(2, (48, 32))))
    with pytest.raises(InputError, match=r"fc.weight is .* in the file, .* in the network"):
        load_backbone(tmp_path / "oblong.pt", input_size=32)


class _Runs:
    """A pickle of this would make a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_is_run(tmp_path, zipped):
    mark = tmp_path / "was-run"
    content = {"conv1.weight": _Runs(mark)}
    if zipped:
        torch.save(content, tmp_path / "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"mkdir, which was refused|damaged"):
        load_backbone(tmp_path / "evil.pt")
    assert not mark.exists()


def test_whole_model_is_refused(tmp_path):
    torch.save(small("mobilefacenet"), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"save model.state_dict\(\) instead"):
        load_backbone(tmp_path / "model.pt")


def _bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"plain words, no checkpoint", "is damaged"),
        (b"PK\x03\x04" + bytes(200), "is damaged"),
        (_bytes(torch.ones(2)), "must hold a dict of tensors, got Tensor"),
        (_bytes({}), "begins with nothing"),
        (_bytes({"state_dict": {}}), "begins with 'state_dict'"),
        (_bytes({"a": torch.ones(1), 3: 4}), "it begins with 'a', '3'"),
        (_bytes({"input_layer.0.weight": torch.ones(1)}), "looks like an IR network without the usual blocks"),
        (_bytes({"kdlib_faces": 3}), "is of format 3"),
        (_bytes({"kdlib_faces": 1, "backbone": "mbf"}), "must hold 'backbone'"),
        (_bytes({"kdlib_faces": 1, "backbone": "mbv", "arguments": {}, "state": {}}), "nearest are 'mbf'"),
        (_bytes({"kdlib_faces": 1, "backbone": "mbf", "arguments": {"wide": 1}, "state": {}}), "named 'wide'"),
        (_bytes({"kdlib_faces": 1, "backbone": "mbf", "arguments": {"seed": 1}, "state": {}}), "'arguments'"),
        (_bytes({"kdlib_faces": 1, "backbone": "mbf", "arguments": {"scale": 10**12}, "state": {}}), "mbf"),
        (_bytes({"kdlib_faces": 1, "backbone": "mbf", "arguments": {"blocks": [1, 1, 1, 10**9]}, "state": {}}), "256"),
        (_bytes({"kdlib_faces": 1, "backbone": "mbf", "arguments": {}, "state": {}}), "missing"),
        (_bytes(dict.fromkeys(("conv1.weight", "layer1.0.bn3.weight", "fc.weight", "features.weight"), torch.ones(()))),
         "keys of insightface's iresnet .*, but not its shapes"),
    ],
)  # fmt: skip
def test_files_that_are_no_backbone(tmp_path, content, words):
    (tmp_path / "some.pt").write_bytes(content)
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as caught:
        load_backbone(tmp_path / "some.pt")
    assert "\n" not in str(caught.value)
    assert "some.pt" in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    whole = _bytes(small("mobilefacenet").state_dict())
    for part in (1, 10, 100, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:part])
        with pytest.raises(InputError, match="damaged"):
            load_backbone(tmp_path / "cut.pt")


def test_a_small_file_cannot_ask_for_a_large_network(tmp_path):
    """One stored number, spread by zero strides over every weight."""
    with torch.device("meta"):
        wanted = MobileFaceNet(width=4.0).state_dict()
    one, count = torch.ones(()), torch.zeros((), dtype=torch.int64)
    torch.save(
        {k: (one if v.is_floating_point() else count).expand(v.shape) for k, v in wanted.items()}, tmp_path / "x"
    )
    with pytest.raises(InputError, match="claims more values than its"):
        load_backbone(tmp_path / "x")


def test_missing_places(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_backbone(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is not a file"):
        load_backbone(tmp_path)
    with pytest.raises(InputError, match="cannot write"):
        save_backbone(small("mbf"), tmp_path / "none" / "model.pt")
    with pytest.raises(TypeError, match="must be a kdlib_faces backbone, got Linear"):
        save_backbone(nn.Linear(1, 1), tmp_path / "model.pt")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    save_backbone(small("mobilefacenet"), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        save_backbone(small("mobilefacenet", seed=1), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in Path(tmp_path).iterdir()] == ["model.pt"]


def test_arguments_of_one_family():
    for layers in ((1, 1, 1), (0, 1, 1, 1), "2222", (1, 1, 1, 1000)):
        with pytest.raises((ValueError, TypeError), match="layers"):
            IResNet(layers)
    with pytest.raises(ValueError, match=r"width must be a finite number and > 0"):
        MobileFaceNet(width=0)
    with pytest.raises(ValueError, match="dropout"):
        IResNet((1, 1, 1, 1), dropout=1.5)
    with pytest.raises(InputError, match="nearest are 'mobilefacenet'"):
        build_backbone("mobilfacenet")
    with pytest.raises(InputError, match="seed"):
        build_backbone("mbf", seed=-1)
    assert IResNet((1, 1, 1, 1), width=0.125, input_size=16).name == "iresnet"
    assert build_backbone("iresnet18", width=0.125, input_size=16).name == "iresnet18"


def test_norm_aware_pooling():
    for wrong in ({"affine": True}, {"embedding_dim": 128}, {"tail": "gap"}):
        with pytest.raises(ValueError, match=r"tail"):
            MobileFaceNet(**{"embedding_dim": 512, "affine": False, "tail": "gnap", **wrong})
    model = MobileFaceNet(64, width=0.125, input_size=32, affine=False, tail="gnap").eval()
    assert count_parameters(model.output_layer) == 0
    together = model(images(3))
    torch.testing.assert_close(together, torch.cat([model(each[None]) for each in images(3)]), rtol=1e-4, atol=1e-4)
    cells = torch.randn(2, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    cells[0, :, 0, 0] = 0  # a cell without a direction
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.output_layer.to(dtype)
        assert torch.isfinite(model.output_layer(cells.to(dtype))).all()


def test_the_frozen_weight_stays_at_one():
    model = small("iresnet")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(images(4)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.features.weight, torch.ones(16))


def test_counting_leaves_the_model_as_it_was():
    model = small("mobilefacenet")
    model.conv_3.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    macs = count_macs(model, 32)
    assert latency_ms(model, 32, batch=2, repeats=2, warmup=1) > 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks for module in model.modules())
    assert macs == count_macs(model.double(), 32)
    with pytest.raises(ValueError, match="images must be"):
        count_macs(model, 64)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="repeats"):
        latency_ms(model, 32, repeats=0)


def test_macs_of_a_module_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, groups=3)

        def forward(self, x):
            return self.conv(self.conv(x))

    assert count_macs(Twice(), (4, 5)) == 2 * 3 * 4 * 5
