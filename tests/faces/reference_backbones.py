"""Independent implementations of the networks of public projects.

Each is a function that runs its network on a `Weights` dict, which creates the weights under the names of the project, so
that names, order of layers, strides and shortcuts are checked. They share no code with the library.
"""

import torch
import torch.nn.functional as F


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

    def block(self, x, name, parts, c_out, *args, **kwargs):
        """Convolution, BatchNorm and, if `parts` names three, PReLU."""
        x = self.norm(self.conv(x, name + parts[0], c_out, *args, **kwargs), name + parts[1])
        return self.prelu(x, name + parts[2]) if len(parts) == 3 else x


# Names of convolution, BatchNorm and PReLU.
WORDS, DIGITS, LAYERS = ("conv", "bn", "prelu"), "012", ("layers.0", "layers.1", "layers.2")


# Bottlenecks of MobileFaceNet: name as in TreB1eN; output channels and middle channels in units of the stem's; stride.
BOTTLENECKS = [
    ("conv_23", 1, 2, 2), *[(f"conv_3.model.{i}", 1, 2, 1) for i in range(4)],
    ("conv_34", 2, 4, 2), *[(f"conv_4.model.{i}", 2, 4, 1) for i in range(6)],
    ("conv_45", 2, 8, 2), *[(f"conv_5.model.{i}", 2, 4, 1) for i in range(2)],
]  # fmt: skip


SEP = ("conv_6_sep.conv", "conv_6_sep.bn", "conv_6_sep.prelu")


def mobilefacenet_trunk(w, x, c, sep=SEP):
    x = w.block(w.block(x, "conv1.", WORDS, c, 3, 2), "conv2_dw.", WORDS, c, 3, groups=c)
    for name, outputs, expansion, stride in BOTTLENECKS:
        c_out, middle = outputs * c, expansion * c
        y = w.block(x, f"{name}.conv.", WORDS, middle)
        y = w.block(y, f"{name}.conv_dw.", WORDS, middle, 3, stride, groups=middle)
        y = w.block(y, f"{name}.project.", WORDS[:2], c_out)
        x = y if stride == 2 else x + y
    return w.block(x, "", sep, 8 * c)


def mobilefacenet(tail="", affine=True):
    def run(w, x, c=8):
        x = mobilefacenet_trunk(w, x, c)
        x = w.norm(w.conv(x, f"{tail}conv_6_dw.conv", 8 * c, x.shape[2:], groups=8 * c, pad=0), f"{tail}conv_6_dw.bn")
        return w.norm(w.linear(x.flatten(1), f"{tail}linear", 16), f"{tail}bn", affine)

    return run


def gnap(w, x, c=8):
    x = w.norm(mobilefacenet_trunk(w, x, c), "output_layer.bn1", affine=False)
    rows = []
    for image in x:  # the projects use the mean length over the batch, which here has one image
        length = image.norm(dim=0, keepdim=True)
        rows.append((image * (length.mean() / length)).mean((1, 2)))
    return w.norm(torch.stack(rows), "output_layer.bn2", affine=False)


def bubbliiiing_mobilefacenet(w, x, c=8):
    x = mobilefacenet_trunk(w, x, c, ("sep", "sep_bn", "prelu"))
    x = w.norm(w.conv(x, "GDC_dw", 8 * c, x.shape[2:], groups=8 * c, pad=0), "GDC_bn")
    return w.norm(w.conv(x, "features", 16), "last_bn").flatten(1)


def foamliu(w, x, c=8):
    x = F.relu6(w.norm(w.conv(x, "conv1.0", c, 3, 2), "conv1.1"))
    x = F.relu(w.norm(w.conv(x, "dw_conv.depthwise", c, 3, groups=c), "dw_conv.bn1"))
    x = F.relu(w.norm(w.conv(x, "dw_conv.pointwise", c), "dw_conv.bn2"))
    for at, (_, outputs, expansion, stride) in enumerate(BOTTLENECKS):
        name, middle = f"features.{at}.conv", expansion * c
        y = F.relu6(w.norm(w.conv(x, f"{name}.0.0", middle), f"{name}.0.1"))
        y = F.relu6(w.norm(w.conv(y, f"{name}.1.0", middle, 3, stride, groups=middle), f"{name}.1.1"))
        y = w.norm(w.conv(y, f"{name}.2", outputs * c), f"{name}.3")
        x = y if stride == 2 else x + y
    x = F.relu6(w.norm(w.conv(x, "conv2.0", 8 * c), "conv2.1"))
    x = w.norm(w.conv(x, "gdconv.depthwise", 8 * c, x.shape[2:], groups=8 * c, pad=0), "gdconv.bn")
    return w.norm(w.conv(x, "conv3", 16, bias=True), "bn").flatten(1)


def xiaoccer(w, x, c=8):
    x = w.block(w.block(x, "conv1.", WORDS, c, 3, 2), "dw_conv1.", WORDS, c, 3, groups=c)
    at = 0
    rows = [(2, c, 5, 2), (4, 2 * c, 1, 2), (2, 2 * c, 6, 1), (4, 2 * c, 1, 2), (2, 2 * c, 2, 1)]
    for expansion, c_out, count, first in rows:
        for turn in range(count):
            stride, name, c_in = first if turn == 0 else 1, f"blocks.{at}.conv.", x.shape[1]
            middle = c_in * expansion
            y = w.block(w.block(x, name, "012", middle), name, "345", middle, 3, stride, groups=middle)
            y = w.block(y, name, "67", c_out)
            x = x + y if stride == 1 and c_in == c_out else y
            at += 1
    x = w.block(x, "conv2.", WORDS, 8 * c)
    x = w.block(x, "linear7.", WORDS[:2], 8 * c, x.shape[2:], groups=8 * c, pad=0)
    return w.block(x, "linear1.", WORDS[:2], 16).flatten(1)


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
            return w.block(x, f"{name}.", LAYERS[:2] if linear else LAYERS, *args, **kwargs)

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
        x = w.block(x, "stage1.0.", DIGITS, c, 3, bias=bias)
        for stage, pairs in V1.items():
            for at, (power, stride) in enumerate(pairs):
                name = f"stage{stage}.{at + (stage == 1)}"
                x = w.block(x, f"{name}.0.", DIGITS, x.shape[1], 3, stride, groups=x.shape[1], bias=bias)
                x = w.block(x, f"{name}.1.", DIGITS, c * 2**power, bias=bias)
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
            return w.block(x, f"{name}.", DIGITS, *args, bias=bias, **kwargs)

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
        x = w.conv(x, "output_layer.conv_6_dw.conv", 512, x.shape[2:], groups=512, pad=0)
        x = w.norm(x, "output_layer.conv_6_dw.bn")
        return w.norm(w.linear(x.flatten(1), "output_layer.linear", 16), "output_layer.bn", tail == "affine")

    return run
