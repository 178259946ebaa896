"""Backbones: published counts, and the contract of every network."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from kdlib_faces._checks import InputError
from kdlib_faces.backbones import (
    BACKBONES,
    MBF,
    InputSpec,
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
    shortcut = 64 * 64 + 2 * 64  # insightface has a convolution in the first block, whose width does not change
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
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda m, i, o: grids.append(tuple(o.shape[2:])))
        for path in model.stages
    ]
    embeddings = model(images())
    assert grids == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert embeddings.shape == (2, model.embedding_dim)
    assert embeddings.dtype == torch.float32
    assert (embeddings.norm(dim=1) - 1).abs().max() > 1e-3  # not normalized
    torch.testing.assert_close(model(images()[:1]), embeddings[:1], rtol=1e-4, atol=1e-4)
    assert all(f"{key}={value!r}" in repr(model) for key, value in changes.items())
    assert eval(repr(model), {type(model).__name__: type(model)}).arguments == model.arguments
    assert model.name in BACKBONES
    for hook in hooks:
        hook.remove()
    save_backbone(model, tmp_path / "model.bin")
    assert os.listdir(tmp_path) == ["model.bin"]
    loaded = load_backbone(tmp_path / "model.bin")
    assert repr(loaded) == repr(model)
    assert not loaded.training
    assert torch.equal(loaded(images()), embeddings)
    frozen = [key for key, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == (["features.weight"] if name == "iresnet" else [])
    assert loaded.double()(images().double()).dtype == torch.float64


@pytest.mark.parametrize("name", SMALL)
class TestEveryBackbone:
    @pytest.mark.parametrize("size", [(48, 32), (33, 17), (16, 1)])
    def test_any_size(self, name, size):
        model = small(name, input_size=size).eval()
        assert model.input_size == size
        assert model(images(2, size)).shape == (2, model.embedding_dim)
        assert model.input_spec.size == model.input_size

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


@pytest.mark.parametrize("name", ["mobilefacenet", "mbf", "iresnet", "ir"])
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
        assert torch.cosine_similarity(embeddings.float(), model(images())).min() > 0.98

    def test_exports_with_a_free_batch(self, name):
        model = small(name).eval()
        program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("b", min=1)},))
        for batch in (1, 3):
            torch.testing.assert_close(program.module()(images(batch)), model(images(batch)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("mobilefacenet", {"embedding_dim": 0}, "MobileFaceNet: embedding_dim must be"),
        ("mbf", {"embedding_dim": 8.0}, "MBF: embedding_dim must be"),
        ("mobilenet_v1", {"input_size": 0}, "input_size must be"),
        ("mobilenet_v2", {"input_size": (32, 32, 3)}, "input_size must be a side or"),
        ("ir", {"input_size": 31.5}, "input_size must be"),
        ("mtlface", {"input_size": "112"}, "input_size must be"),
        ("mobilefacenet", {"width": 0}, r"width must be a finite number and > 0"),
        ("iresnet", {"dropout": 1.5}, "dropout must be"),
        *[("iresnet", {"layers": each}, "layers") for each in ((1, 1, 1), (0, 1, 1, 1), "2222", (1, 1, 1, 1000))],
        ("mbf", {"seed": -1}, "seed must be"),
        *[
            ("mobilefacenet", {"embedding_dim": 64, "affine": False, "tail": "gnap", **each}, "tail")
            for each in ({"affine": True}, {"embedding_dim": 128}, {"tail": "gap"})
        ],
    ],
)
def test_wrong_arguments(name, arguments, words):
    with pytest.raises(InputError, match=words):
        small(name, **arguments)


def test_numpy_numbers(tmp_path):
    number, half = np.int64(16), np.float32(0.25)
    for name, arguments in (
        ("ir", {"layers": [np.int64(1)] * 4, "width": half, "dropout": half}),
        ("iresnet", {"layers": [1] * 4, "width": half, "dropout": half, "norm_eps": np.float64(1e-4)}),
        ("mbf_flat", {"scale": np.int8(1), "blocks": (np.int32(1),) * 4, "tail_channels": np.uint8(8)}),
        ("mobilenet_v1", {"width": half, "tail": "flat", "dropout": half}),
        ("mobilenet_v2", {"width": half, "stem_stride": np.int64(2)}),
    ):
        model = build_backbone(name, seed=np.int64(0), embedding_dim=number, input_size=(np.int16(32), 16), **arguments)
        model.input_spec = InputSpec(size=(number, np.int8(8)), mean=np.array([1, 2, 3]), scale=half)
        save_backbone(model, tmp_path / "m")
        assert "np." not in repr(model)
        assert repr(load_backbone(tmp_path / "m")) == repr(model)
    assert InputSpec(size=number, mean=half).describe() == "RGB, (pixel - 0.25) / 127.5, 16 x 16"
    assert count_macs(nn.Conv2d(3, 8, 3), np.int64(10)) == count_macs(nn.Conv2d(3, 8, 3), 10)


def test_names():
    with pytest.raises(InputError, match="nearest are 'mobilefacenet'"):
        build_backbone("mobilfacenet")
    assert small("iresnet").name == "iresnet"
    assert build_backbone("iresnet18", width=0.125, input_size=16).name == "iresnet18"


def test_norm_aware_pooling():
    model = MobileFaceNet(64, width=0.125, input_size=32, affine=False, tail="gnap").eval()
    assert count_parameters(model.output_layer) == 0
    together = model(images(3))
    torch.testing.assert_close(together, torch.cat([model(each[None]) for each in images(3)]), rtol=1e-4, atol=1e-4)
    cells = torch.randn(2, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    cells[0, :, 0, 0] = 0  # a zero cell
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.output_layer.to(dtype)
        assert torch.isfinite(model.output_layer(cells.to(dtype))).all()


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
