"""Backbones: published counts, the contract of every network, and untrusted files."""

import copy
import io
import os
import pickle

import pytest
import torch
from torch import nn

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import (
    BACKBONES,
    MBF,
    IResNet,
    MobileFaceNet,
    MobileNetV1,
    MobileNetV2,
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
VARIANTS = [
    *[(name, {}) for name in SMALL],
    ("mobilefacenet", {"affine": False}),
    ("mobilefacenet", {"affine": False, "tail": "gnap", "embedding_dim": 64, "width": 0.125}),
    ("ir", {"se": False, "affine": False}),
    ("ir", {"mid_norm": False}),
    ("iresnet", {"norm_eps": 2e-5}),
    ("mtlface", {"se": True}),
    ("mobilenet_v1", {"bias": True}),
    ("mobilenet_v1", {"tail": "flat"}),
    ("mobilenet_v2", {"bias": True, "affine": False}),
    ("mobilenet_v2", {"stem_stride": 2}),
]
TRAINED = ("mobilefacenet", "mbf", "iresnet", "ir")  # for slower checks


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


def test_counts_agree_with_the_published_ones():
    rows = {(row.name, row.embedding_dim): row for row in describe_backbones()}
    assert {name for name, _ in rows} - {name for name, _ in PUBLISHED} <= UNPUBLISHED
    assert {name for name, _ in rows} | {"iresnet", "ir"} == set(BACKBONES)
    for key, (parameters, trainable, keys, macs) in PUBLISHED.items():
        row = rows[key]
        assert (row.parameters, row.trainable, row.state_keys, row.input_size) == (parameters, trainable, keys, 112)
        if macs is None:
            continue
        digits = len(macs.partition(".")[2])
        step = 10 if row.macs > 1e9 else 1  # large counts are published in hundredths of a G
        assert f"{step * round(row.macs / 1e6 / step, digits):.{digits}f}" == macs, row


def test_networks_called_ir_50_differ_in_known_parts():
    with torch.device("meta"):
        models = [build_backbone(name) for name in ("ir_50", "adaface_ir_50", "iresnet50")]
    sizes = [count_parameters(model) for model in models]
    norms = 2 * sum(blocks * width for blocks, width in zip((3, 4, 14, 3), (64, 128, 256, 512), strict=True))
    shortcut = (
        64 * 64 + 2 * 64
    )  # of the first block, where insightface has a convolution although the width does not change
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
        (lambda: MobileNetV1(width=0.25), 360_960, None),
        (lambda: MobileNetV1(width=0.25, bias=True), 363_696, None),
        (lambda: MobileNetV2(bias=True), 2_295_424, None),
    ],
)
def test_published_variants(build, parameters, millions):
    with torch.device("meta"):
        model = build()
    assert count_parameters(model) == parameters
    if millions is not None:
        assert round(count_macs(model, model.input_size) / 1e6, 0 if millions > 1000 else 1) == millions


def test_mbf_of_scale_one_is_mobilefacenet():
    ours, theirs = MobileFaceNet(16, input_size=32).eval(), MBF(16, scale=1, input_size=32).eval()
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(a.reshape(b.shape))
    torch.testing.assert_close(ours(images()), theirs(images()))


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_stages_halve_the_grid_and_a_saved_file_restores_the_network(name, changes, tmp_path):
    model, grids = small(name, **changes).eval(), []
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean.add_(0.5)
    for path in model.stages:
        model.get_submodule(path).register_forward_hook(lambda m, i, o: grids.append(tuple(o.shape[2:])))
    embeddings = model(images())
    assert grids == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert embeddings.shape == (2, model.embedding_dim)
    assert all(f"{key}={value!r}" in repr(model) for key, value in changes.items())
    save_backbone(model, tmp_path / "model.bin")
    assert os.listdir(tmp_path) == ["model.bin"]
    loaded = load_backbone(tmp_path / "model.bin")
    assert repr(loaded) == repr(model)
    assert not loaded.training
    assert torch.equal(loaded(images()), embeddings)
    frozen = [key for key, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == (["features.weight"] if name == "iresnet" else [])


@pytest.mark.parametrize("name", SMALL)
class TestEveryBackbone:
    def test_embeds(self, name):
        model = small(name).eval()
        embeddings = model(images(3))
        assert embeddings.shape == (3, model.embedding_dim)
        assert embeddings.dtype == torch.float32
        assert (embeddings.norm(dim=1) - 1).abs().max() > 1e-3  # not normalized
        torch.testing.assert_close(model(images(3)[:1]), embeddings[:1], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("size", [(48, 32), (33, 17), (16, 1)])
    def test_any_size(self, name, size):
        model = small(name, input_size=size).eval()
        assert model.input_size == (size if size[0] != size[1] else size[0])
        assert model(images(2, size)).shape == (2, model.embedding_dim)
        assert model.input_spec.size == model.input_size

    def test_repr_rebuilds(self, name):
        model = small(name)
        rebuilt = eval(repr(model), {type(model).__name__: type(model)})
        assert rebuilt.arguments == model.arguments
        shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (rebuilt, model)]
        assert shapes[0] == shapes[1]
        assert model.name in BACKBONES

    def test_seed_determines_the_weights_and_keeps_the_global_generator(self, name):
        before = torch.get_rng_state()
        a, b, c = small(name, seed=1), small(name, seed=1), small(name, seed=2)
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))

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
    state = small("mobilefacenet").state_dict()
    assert state["conv1.bn.bias"].shape == (8,)
    torch.save({**state, "conv1.bn.bias": value}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=words) as caught:
        load_backbone(tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)


def test_old_files_without_counters(tmp_path):
    model = small("mobilefacenet").eval()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    assert torch.equal(load_backbone(tmp_path / "old.pt")(images()), model(images()))


def test_a_linear_layer_does_not_determine_an_oblong_grid(tmp_path):
    model = small("iresnet", input_size=(48, 32)).eval()
    torch.save(model.state_dict(), tmp_path / "oblong.pt")
    with pytest.raises(InputError, match=r"say which input_size=\(height, width\)"):
        load_backbone(tmp_path / "oblong.pt")
    again = load_backbone(tmp_path / "oblong.pt", input_size=(48, 32))
    assert torch.equal(again(images(2, (48, 32))), model(images(2, (48, 32))))
    with pytest.raises(InputError, match=r"fc.weight is .* in the file, .* in the network"):
        load_backbone(tmp_path / "oblong.pt", input_size=32)


class _Runs:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, zipped):
    mark = tmp_path / "was-run"
    content = {"state_dict": small("mobilefacenet").state_dict(), "hyper_parameters": _Runs(mark)}
    if zipped:
        torch.save(content, tmp_path / "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps(content))
    with pytest.raises(
        InputError, match=r"mkdir, which was refused; save model.state_dict\(\) instead, or, if you trust|damaged"
    ):
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
        (b"plain text, not a checkpoint", "is damaged"),
        (b"PK\x03\x04" + bytes(200), "is damaged"),
        (_bytes(torch.ones(2)), "must contain a dict of tensors, got Tensor"),
        (_bytes({}), "starts with nothing"),
        (_bytes({"state_dict": {}}), "starts with 'state_dict'"),
        (_bytes({"a": torch.ones(1), 3: 4}), "it starts with 'a', '3'"),
        (_bytes({"input_layer.0.weight": torch.ones(1)}), "looks like an IR network without the usual blocks"),
        (_bytes({"kdlib_faces": 3}), "has format 3"),
        (_bytes({"kdlib_faces": 2, "backbone": "mbf"}), "must contain 'backbone'"),
        (_bytes({"kdlib_faces": 2, "backbone": "mbv", "arguments": {}, "state": {}}), "nearest are 'mbf'"),
        (_bytes({"kdlib_faces": 2, "backbone": "mbf", "arguments": {"wide": 1}, "state": {}}), "named 'wide'"),
        (_bytes({"kdlib_faces": 2, "backbone": "mbf", "arguments": {"seed": 1}, "state": {}}), "'arguments'"),
        (_bytes({"kdlib_faces": 2, "backbone": "mbf", "arguments": {"scale": 10**12}, "state": {}}), "mbf"),
        (_bytes({"kdlib_faces": 2, "backbone": "mbf", "arguments": {"blocks": [1, 1, 1, 10**9]}, "state": {}}), "256"),
        (_bytes({"kdlib_faces": 2, "backbone": "mbf", "arguments": {}, "state": {}}), "missing"),
        (_bytes(dict.fromkeys(("conv1.weight", "layer1.0.bn3.weight", "fc.weight", "features.weight"), torch.ones(()))),
         "keys of insightface's iresnet .*, but other shapes"),
    ],
)  # fmt: skip
def test_files_without_a_backbone(tmp_path, content, words):
    (tmp_path / "some.pt").write_bytes(content)
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as caught:
        load_backbone(tmp_path / "some.pt")
    assert "\n" not in str(caught.value)
    assert "some.pt" in str(caught.value)


def test_truncated_files(tmp_path):
    whole = _bytes(small("mobilefacenet").state_dict())
    for part in (1, 10, 100, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:part])
        with pytest.raises(InputError, match="damaged"):
            load_backbone(tmp_path / "cut.pt")


def test_a_small_file_cannot_declare_a_large_network(tmp_path):
    """One stored number, expanded by zero strides to every weight."""
    with torch.device("meta"):
        wanted = MobileFaceNet(width=4.0).state_dict()
    one, count = torch.ones(()), torch.zeros((), dtype=torch.int64)
    torch.save(
        {k: (one if v.is_floating_point() else count).expand(v.shape) for k, v in wanted.items()}, tmp_path / "x"
    )
    with pytest.raises(InputError, match="declares more values than its"):
        load_backbone(tmp_path / "x")


def test_paths_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_backbone(tmp_path / "none.pt")
    with pytest.raises(InputError, match="is not a file"):
        load_backbone(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_backbone(small("mbf"), tmp_path / "file" / "model.pt")
    with pytest.raises(TypeError, match="must be a kdlib_faces backbone, got Linear"):
        save_backbone(nn.Linear(1, 1), tmp_path / "model.pt")


def test_invalid_arguments_of_one_family():
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
    cells[0, :, 0, 0] = 0  # a zero cell
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.output_layer.to(dtype)
        assert torch.isfinite(model.output_layer(cells.to(dtype))).all()


def test_the_frozen_weight_stays_one():
    model = small("iresnet")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(images(4)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.features.weight, torch.ones(16))


def test_counting_does_not_change_the_model():
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
