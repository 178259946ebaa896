"""Public checkpoint layouts: independent implementations of each project's network, read by `load_backbone`.

The references share no code with the library. Each is a function that runs its network on a `Weights` dict, which creates
the weights under the names of the project, so that names, order of layers, strides and shortcuts are checked.
"""

import pytest
import torch
import torch.nn.functional as F

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


class Weights(dict):
    """A state dict that creates random weights when they are first used."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, name, *shape, spread=1.0, middle=0.0):
        if name not in self:
            self[name] = middle + spread * torch.randn(*shape, generator=self.generator)
        return self[name]

    def conv(self, x, name, c_out, kernel=1, stride=1, groups=1, bias=False, pad=None):
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        c_in = x.shape[1] // groups
        weight = self.random(f"{name}.weight", c_out, c_in, *sides, spread=(c_in * sides[0] * sides[1]) ** -0.5)
        extra = self.random(f"{name}.bias", c_out, spread=0.1) if bias else None
        return F.conv2d(x, weight, extra, stride, sides[0] // 2 if pad is None else pad, groups=groups)

    def linear(self, x, name, c_out, bias=False):
        weight = self.random(f"{name}.weight", c_out, x.shape[1], spread=x.shape[1] ** -0.5)
        return F.linear(x, weight, self.random(f"{name}.bias", c_out, spread=0.1) if bias else None)

    def norm(self, x, name, affine=True, eps=1e-5):
        c = x.shape[1]
        weight = self.random(f"{name}.weight", c, spread=0.1, middle=1.0) if affine else None
        bias = self.random(f"{name}.bias", c, spread=0.1) if affine else None
        mean = self.random(f"{name}.running_mean", c, spread=0.1)
        if f"{name}.running_var" not in self:
            self[f"{name}.running_var"] = 0.01 + torch.rand(c, generator=self.generator)
        self[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, mean, self[f"{name}.running_var"], weight, bias, eps=eps)

    def prelu(self, x, name):
        return F.prelu(x, self.random(f"{name}.weight", x.shape[1], spread=0.1, middle=0.25))


def bottlenecks(c):
    """Bottlenecks of MobileFaceNet: name as in TreB1eN, output channels, middle channels, stride."""
    yield "conv_23", c, 2 * c, 2
    yield from ((f"conv_3.model.{i}", c, 2 * c, 1) for i in range(4))
    yield "conv_34", 2 * c, 4 * c, 2
    yield from ((f"conv_4.model.{i}", 2 * c, 4 * c, 1) for i in range(6))
    yield "conv_45", 2 * c, 8 * c, 2
    yield from ((f"conv_5.model.{i}", 2 * c, 4 * c, 1) for i in range(2))


def mobilefacenet_trunk(w, x, c):
    def block(x, name, *args, **kwargs):
        return w.prelu(w.norm(w.conv(x, f"{name}.conv", *args, **kwargs), f"{name}.bn"), f"{name}.prelu")

    x = block(block(x, "conv1", c, 3, 2), "conv2_dw", c, 3, groups=c)
    for name, c_out, middle, stride in bottlenecks(c):
        y = block(block(x, f"{name}.conv", middle), f"{name}.conv_dw", middle, 3, stride, groups=middle)
        y = w.norm(w.conv(y, f"{name}.project.conv", c_out), f"{name}.project.bn")
        x = y if stride == 2 else x + y
    return x


def mobilefacenet(tail="", affine=True):
    def run(w, x, c=8):
        x = mobilefacenet_trunk(w, x, c)
        x = w.prelu(w.norm(w.conv(x, "conv_6_sep.conv", 8 * c), "conv_6_sep.bn"), "conv_6_sep.prelu")
        x = w.norm(w.conv(x, f"{tail}conv_6_dw.conv", 8 * c, x.shape[2:], groups=8 * c, pad=0), f"{tail}conv_6_dw.bn")
        return w.norm(w.linear(x.flatten(1), f"{tail}linear", 16), f"{tail}bn", affine)

    return run


def gnap(w, x, c=8):
    x = mobilefacenet_trunk(w, x, c)
    x = w.prelu(w.norm(w.conv(x, "conv_6_sep.conv", 8 * c), "conv_6_sep.bn"), "conv_6_sep.prelu")
    x = w.norm(x, "output_layer.bn1", affine=False)
    rows = []
    for image in x:  # the projects use the mean length over the batch, which here has one image
        length = image.norm(dim=0, keepdim=True)
        rows.append((image * (length.mean() / length)).mean((1, 2)))
    return w.norm(torch.stack(rows), "output_layer.bn2", affine=False)


def bubbliiiing_mobilefacenet(w, x, c=8):
    x = mobilefacenet_trunk(w, x, c)
    x = w.prelu(w.norm(w.conv(x, "sep", 8 * c), "sep_bn"), "prelu")
    x = w.norm(w.conv(x, "GDC_dw", 8 * c, x.shape[2:], groups=8 * c, pad=0), "GDC_bn")
    return w.norm(w.conv(x, "features", 16), "last_bn").flatten(1)


def xiaoccer(w, x, c=8):
    def block(x, name, *args, linear=False, **kwargs):
        x = w.norm(w.conv(x, f"{name}.conv", *args, **kwargs), f"{name}.bn")
        return x if linear else w.prelu(x, f"{name}.prelu")

    x = block(block(x, "conv1", c, 3, 2), "dw_conv1", c, 3, groups=c)
    at = 0
    for expansion, c_out, count, first in (
        (2, c, 5, 2),
        (4, 2 * c, 1, 2),
        (2, 2 * c, 6, 1),
        (4, 2 * c, 1, 2),
        (2, 2 * c, 2, 1),
    ):
        for turn in range(count):
            stride, name, c_in = first if turn == 0 else 1, f"blocks.{at}.conv", x.shape[1]
            middle = c_in * expansion
            y = w.prelu(w.norm(w.conv(x, f"{name}.0", middle), f"{name}.1"), f"{name}.2")
            y = w.prelu(w.norm(w.conv(y, f"{name}.3", middle, 3, stride, groups=middle), f"{name}.4"), f"{name}.5")
            y = w.norm(w.conv(y, f"{name}.6", c_out), f"{name}.7")
            x = x + y if stride == 1 and c_in == c_out else y
            at += 1
    x = block(x, "conv2", 8 * c)
    x = block(x, "linear7", 8 * c, x.shape[2:], groups=8 * c, pad=0, linear=True)
    return block(x, "linear1", 16, linear=True).flatten(1)


def insightface_iresnet(eps=1e-5):
    def run(w, x, c=8):
        x = w.prelu(w.norm(w.conv(x, "conv1", c, 3), "bn1", eps=eps), "prelu")
        for stage, blocks in enumerate((1, 2, 1, 1)):
            for block in range(blocks):
                stride, name, c_out = 2 - (block > 0), f"layer{stage + 1}.{block}", c * 2**stage
                y = w.conv(w.norm(x, f"{name}.bn1", eps=eps), f"{name}.conv1", c_out, 3)
                y = w.prelu(w.norm(y, f"{name}.bn2", eps=eps), f"{name}.prelu")
                y = w.norm(w.conv(y, f"{name}.conv2", c_out, 3, stride), f"{name}.bn3", eps=eps)
                if stride == 2:
                    x = w.norm(w.conv(x, f"{name}.downsample.0", c_out, 1, 2, pad=0), f"{name}.downsample.1", eps=eps)
                x = x + y
        x = w.norm(x, "bn2", eps=eps).flatten(1)
        return w.norm(w.linear(x, "fc", 16, bias=True), "features", eps=eps)

    return run


def mbf(blocks, scale, flat=False):
    def run(w, x):
        def block(x, name, *args, linear=False, **kwargs):
            x = w.norm(w.conv(x, f"{name}.layers.0", *args, **kwargs), f"{name}.layers.1")
            return x if linear else w.prelu(x, f"{name}.layers.2")

        def depthwise(x, name, c_out, middle, stride):
            y = block(block(x, f"{name}.layers.0", middle), f"{name}.layers.1", middle, 3, stride, groups=middle)
            y = block(y, f"{name}.layers.2", c_out, linear=True)
            return x + y if stride == 1 else y

        c = 64 * scale
        x = block(x, "layers.0", c, 3, 2)
        if blocks[0] == 1:
            x = block(x, "layers.1", c, 3, groups=64)  # two channels per group at scale 2
        else:
            for turn in range(blocks[0]):
                x = depthwise(x, f"layers.1.layers.{turn}", c, 128, 1)
        for at, (c_out, narrow, wide) in enumerate(((c, 128, 128), (2 * c, 256, 256), (2 * c, 512, 256))):
            x = depthwise(x, f"layers.{2 * at + 2}", c_out, narrow, 2)
            for turn in range(blocks[at + 1]):
                x = depthwise(x, f"layers.{2 * at + 3}.layers.{turn}", c_out, wide, 1)
        x = block(x, "conv_sep", 512)
        if flat:
            x = block(x, "features.layers.0", 8).flatten(1)
        else:
            x = block(x, "features.layers.0", 512, x.shape[2:], groups=512, pad=0, linear=True).flatten(1)
        return w.norm(w.linear(x, "features.layers.2", 16, bias=flat), "features.layers.3")

    return run


def ir_block(w, x, name, c_out, stride, *, mid_norm, se):
    y = w.conv(w.norm(x, f"{name}.res_layer.0"), f"{name}.res_layer.1", c_out, 3)
    at = 2
    if mid_norm:
        y, at = w.norm(y, f"{name}.res_layer.2"), 3
    y = w.conv(w.prelu(y, f"{name}.res_layer.{at}"), f"{name}.res_layer.{at + 1}", c_out, 3, stride)
    y = w.norm(y, f"{name}.res_layer.{at + 2}")
    if se:
        inner = f"{name}.res_layer.{at + 3 if se is True else se}"
        gate = F.relu(w.conv(F.adaptive_avg_pool2d(y, 1), f"{inner}.fc1", max(1, c_out // 16)))
        y = y * torch.sigmoid(w.conv(gate, f"{inner}.fc2", c_out))
    if x.shape[1] == c_out:
        return y + F.max_pool2d(x, 1, stride)
    return y + w.norm(w.conv(x, f"{name}.shortcut_layer.0", c_out, 1, stride, pad=0), f"{name}.shortcut_layer.1")


def ir(mid_norm=False, affine=True, se=False):
    def run(w, x, c=8):
        x = w.prelu(w.norm(w.conv(x, "input_layer.0", c, 3), "input_layer.1"), "input_layer.2")
        at = 0
        for stage, blocks in enumerate((1, 2, 1, 1)):
            for block in range(blocks):
                x = ir_block(w, x, f"body.{at}", c * 2**stage, 2 - (block > 0), mid_norm=mid_norm, se=se)
                at += 1
        x = w.norm(x, "output_layer.0").flatten(1)
        return w.norm(w.linear(x, "output_layer.3", 16, bias=True), "output_layer.4", affine)

    return run


def mtlface(se=False):
    def run(w, x, c=8):
        x = w.prelu(w.norm(w.conv(x, "input_layer.0", c, 3), "input_layer.1"), "input_layer.2")
        for stage, blocks in enumerate((1, 2, 1, 1)):
            for block in range(blocks):
                name = f"block{stage + 1}.{block}"
                x = ir_block(w, x, name, c * 2**stage, 2 - (block > 0), mid_norm=True, se=se)
        pooled = [
            torch.cat([pool(x, side).flatten(1) for side in (1, 2, 3)], 1)
            for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
        ]
        vector = (pooled[0] + pooled[1])[..., None, None]
        channel = F.relu(w.conv(vector, "fsm.channel.0", vector.shape[1] // 16))
        channel = w.norm(w.conv(channel, "fsm.channel.2", x.shape[1]), "fsm.channel.3").sigmoid()
        both = torch.stack([x.max(1)[0], x.mean(1)], 1)
        spatial = w.norm(w.conv(both, "fsm.spatial.0", 1, 7), "fsm.spatial.1").sigmoid()
        x = x - (x * channel + x * spatial) * 0.5
        x = w.norm(x, "output_layer.0").flatten(1)
        return w.norm(w.linear(x, "output_layer.3", 16, bias=True), "output_layer.4")

    return run


V1 = {1: [(1, 1), (2, 2), (2, 1), (3, 2), (3, 1)], 2: [(4, 2)] + [(4, 1)] * 5, 3: [(5, 2), (5, 1)]}


def yakhyo_v1(bias):
    def run(w, x, c=8):
        def block(x, name, *args, **kwargs):
            x = w.norm(w.conv(x, f"{name}.0", *args, bias=bias, **kwargs), f"{name}.1")
            return w.prelu(x, f"{name}.2")

        x = block(x, "stage1.0", c, 3)
        for stage, pairs in V1.items():
            for at, (power, stride) in enumerate(pairs):
                name = f"stage{stage}.{at + (stage == 1)}"
                x = block(x, f"{name}.0", x.shape[1], 3, stride, groups=x.shape[1])
                x = block(x, f"{name}.1", c * 2**power)
        return gdc_features(w, x)

    return run


def gdc_features(w, x):
    c = x.shape[1]
    x = w.conv(x, "output_layer.features.0.layers.0", c, x.shape[2:], groups=c, pad=0)
    x = w.norm(x, "output_layer.features.0.layers.1").flatten(1)
    return w.norm(w.linear(x, "output_layer.fc.0", 16), "output_layer.fc.1")


def bubbliiiing_v1(w, x, c=8):
    x = F.relu6(w.norm(w.conv(x, "stage1.0.0", c, 3), "stage1.0.1"))
    for stage, pairs in V1.items():
        for at, (power, stride) in enumerate(pairs):
            name = f"stage{stage}.{at + (stage == 1)}"
            x = w.conv(x, f"{name}.0", x.shape[1], 3, stride, groups=x.shape[1])
            x = F.relu6(w.norm(x, f"{name}.1"))
            x = F.relu6(w.norm(w.conv(x, f"{name}.3", c * 2**power), f"{name}.4"))
    x = w.prelu(w.norm(w.conv(x, "sep", 16 * c), "sep_bn"), "prelu")
    x = w.norm(x, "bn2").flatten(1)
    return w.norm(w.linear(x, "linear", 16, bias=True), "features")


def v2(bias, stem_stride, tail):
    def run(w, x):
        def block(x, name, *args, **kwargs):
            return w.prelu(w.norm(w.conv(x, f"{name}.0", *args, bias=bias, **kwargs), f"{name}.1"), f"{name}.2")

        x = block(x, "features.0", 8, 3, stem_stride)
        rows = [(1, 8, 1, 1), (6, 8, 2, 2), (6, 8, 3, 2), (6, 16, 4, 2), (6, 24, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1)]
        at = 1
        for expansion, c_out, count, first in rows if stem_stride == 1 else rows[:1] + rows[2:]:
            for turn in range(count):
                stride, name, c_in = first if turn == 0 else 1, f"features.{at}.conv", x.shape[1]
                y, part = x, 0
                if expansion != 1:
                    y, part = block(y, f"{name}.0", c_in * expansion), 1
                y = block(y, f"{name}.{part}", c_in * expansion, 3, stride, groups=c_in * expansion)
                y = w.norm(w.conv(y, f"{name}.{part + 1}", c_out), f"{name}.{part + 2}")
                x = x + y if stride == 1 and c_in == c_out else y
                at += 1
        x = block(x, f"features.{at}", 512)
        if tail == "features":
            return gdc_features(w, x)
        x = w.norm(
            w.conv(x, "output_layer.conv_6_dw.conv", 512, x.shape[2:], groups=512, pad=0), "output_layer.conv_6_dw.bn"
        )
        return w.norm(w.linear(x.flatten(1), "output_layer.linear", 16), "output_layer.bn", tail == "affine")

    return run


# Layout: reference, class, size of the images, description of the input, normalized embeddings.
RGB, UNKNOWN = "RGB, (pixel - 127.5) / 127.5", "RGB (assumed), (pixel - 127.5) / 127.5 (assumed)"
BGR = "BGR (assumed), (pixel - 127.5) / 127.5"
CASES = {
    "insightface_iresnet": (insightface_iresnet(), IResNet, (32, 32), RGB, False),
    "insightface_mbf": (mbf((1, 1, 2, 1), 2), MBF, (48, 32), RGB, False),
    "insightface_mbf of depth": (mbf((2, 1, 1, 2), 1), MBF, (32, 32), RGB, False),
    "insightface_mbf_flat": (mbf((1, 1, 1, 1), 1, flat=True), MBFFlat, (32, 32), RGB, False),
    "mobilefacenet": (mobilefacenet(), MobileFaceNet, (48, 32), UNKNOWN, None),
    "mobilefacenet_output_layer": (mobilefacenet("output_layer.", affine=False), MobileFaceNet, (32, 32), RGB, False),
    "mobilefacenet_output_layer affine": (mobilefacenet("output_layer."), MobileFaceNet, (32, 32), RGB, False),
    "mobilefacenet_gnap": (gnap, MobileFaceNet, (112, 112), RGB, False),
    "xiaoccer_mobilefacenet": (xiaoccer, MobileFaceNet, (48, 32), "RGB, (pixel - 127.5) / 128", False),
    "bubbliiiing_mobilefacenet": (bubbliiiing_mobilefacenet, MobileFaceNet, (32, 32), RGB, True),
    "ir": (ir(), IRNet, (32, 32), UNKNOWN, None),
    "ir se": (ir(se=True), IRNet, (32, 32), UNKNOWN, None),
    "ir of AdaFace": (ir(True, False), IRNet, (32, 32), BGR, False),
    "ir of AdaFace, se": (ir(True, False, "se_block"), IRNet, (32, 32), BGR, False),
    "ir of CurricularFace": (ir(False, False), IRNet, (32, 32), "RGB (assumed), (pixel - 127.5) / 127.5", False),
    "mtlface": (mtlface(), MTLFaceNet, (32, 32), RGB, False),
    "mtlface se": (mtlface(se=True), MTLFaceNet, (32, 32), RGB, False),
    "yakhyo_mobilenet_v1": (yakhyo_v1(bias=True), MobileNetV1, (48, 32), RGB, False),
    "yakhyo_mobilenet_v1 without bias": (yakhyo_v1(bias=False), MobileNetV1, (32, 32), RGB, False),
    "bubbliiiing_mobilenet_v1": (bubbliiiing_v1, MobileNetV1, (32, 32), RGB, True),
    "yakhyo_mobilenet_v2": (v2(True, 1, "features"), MobileNetV2, (32, 32), RGB, False),
    "cavaface_mobilenet_v2": (v2(False, 2, "affine"), MobileNetV2, (32, 32), RGB, False),
    "cavaface_mobilenet_v2 without affine": (v2(False, 2, "plain"), MobileNetV2, (32, 32), RGB, False),
}


def faces(size, batch=2):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(5)) * 2 - 1


def example(reference, size=(32, 32), seed=0):
    state, images = Weights(seed), faces(size)
    return state, images, reference(state, images)


@pytest.mark.parametrize("case", CASES)
def test_layouts(case, tmp_path):
    reference, kind, size, description, normalized = CASES[case]
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
    assert model.input_spec.normalized is normalized


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


@pytest.mark.parametrize(("left", "right"), [(ir(), ir(True, False)), (ir(se=True), ir()), (ir(), mtlface())])
def test_mixed_files_are_rejected(left, right, tmp_path):
    """A file with parts of two similar networks fits neither."""
    one, other = example(left)[0], example(right)[0]
    mixed = {key: value for key, value in one.items() if not key.startswith("body.2")}
    mixed.update({key: value for key, value in other.items() if key.startswith(("body.2", "block3"))})
    torch.save(mixed, tmp_path / "mixed")
    with pytest.raises(InputError, match=r"does not fit ir; (missing|unexpected|other shape) \("):
        load_backbone(tmp_path / "mixed")


def test_blocks_of_three_convolutions(tmp_path):
    state, _, _ = example(ir(True, False))
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


# Project: reference, wrapper of its state, removed prefix and keys, description of the input.


def prefixed(prefix, state, **others):
    return {**{f"{prefix}{key}": value for key, value in state.items()}, **others}


KERNEL, WEIGHT = {"head.kernel": torch.ones(16, 3)}, {"head.weight": torch.ones(16, 3)}
MAGFACE, FACEX = "BGR, pixel / 255", "BGR, (pixel - 127.5) / 128"
WRAPPED = {
    "AdaFace": (
        ir(True, False),
        lambda s: {"epoch": 1, "state_dict": prefixed("model.", s, **KERNEL)},
        ("model.", ("head.kernel",)),
        "BGR, (pixel - 127.5) / 127.5",
    ),
    "CVLface": (ir(True, False), lambda s: prefixed("net.", s), ("net.", ()), BGR),
    "MagFace": (
        insightface_iresnet(2e-5),
        lambda s: {"state_dict": prefixed("features.module.", s, **{"fc.weight": torch.ones(16, 3)})},
        ("features.module.", ("fc.weight",)),
        MAGFACE,
    ),
    "MagFace, one process": (
        insightface_iresnet(2e-5),
        lambda s: {"state_dict": prefixed("module.features.", s)},
        ("module.features.", ()),
        MAGFACE,
    ),
    "FaceX-Zoo": (
        mobilefacenet(),
        lambda s: {"epoch": 3, "batch_id": 9, "state_dict": prefixed("backbone.", s, **WEIGHT)},
        ("backbone.", ("head.weight",)),
        FACEX,
    ),
    "FaceX-Zoo's ResNet": (
        ir(se=True),
        lambda s: {"batch_id": 9, "state_dict": prefixed("backbone.", s)},
        ("backbone.", ()),
        FACEX,
    ),
    "another network wrapped as in AdaFace": (
        ir(),
        lambda s: {"state_dict": prefixed("model.", s, **KERNEL)},
        ("model.", ("head.kernel",)),
        UNKNOWN,
    ),
    "likely FaceX-Zoo": (
        mobilefacenet(),
        lambda s: {"state_dict": prefixed("backbone.", s, **WEIGHT)},
        ("backbone.", ("head.weight",)),
        "BGR (assumed), (pixel - 127.5) / 128 (assumed)",
    ),
    "bubbliiiing": (
        bubbliiiing_mobilefacenet,
        lambda s: prefixed("arcface.", s, **WEIGHT),
        ("arcface.", ("head.weight",)),
        RGB,
    ),
    "Xiaoccer": (xiaoccer, lambda s: {"iter": 3, "net_state_dict": dict(s)}, ("", ()), "RGB, (pixel - 127.5) / 128"),
    "arcface_torch": (
        insightface_iresnet(),
        lambda s: {
            "epoch": 3,
            "state_dict_backbone": prefixed("module.", s),
            "state_dict_softmax_fc": {"weight": torch.ones(3, 16)},
            "state_optimizer": {"state": {}, "param_groups": []},
        },
        ("module.", ()),
        RGB,
    ),
    "compiled and distributed": (
        ir(),
        lambda s: {"model": prefixed("module._orig_mod.", s)},
        ("module._orig_mod.", ()),
        UNKNOWN,
    ),
}


@pytest.mark.parametrize("project", WRAPPED)
def test_wrappings(project, tmp_path):
    reference, wrap, removed, description = WRAPPED[project]
    state, images, expected = example(reference)
    torch.save(wrap(state), tmp_path / "w")
    info = describe_checkpoint(tmp_path / "w")
    assert (info.prefix, info.beside) == removed
    model = load_backbone(tmp_path / "w")
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert model.input_spec.describe() == f"{description}, 32 x 32"
    if project.startswith("MagFace"):
        assert model.norm_eps == 2e-5
        assert "MagFace" in info.about
    if "FaceX-Zoo" in project:
        assert model.input_spec.normalized is ("ResNet" in project)


def test_a_prefix_of_half_the_keys_is_not_removed(tmp_path):
    state, _, _ = example(ir())
    half = {(f"module.{key}" if at % 2 else key): value for at, (key, value) in enumerate(state.items())}
    torch.save(half, tmp_path / "w")
    with pytest.raises(InputError, match=r"does not fit ir|no known layout"):
        load_backbone(tmp_path / "w")
