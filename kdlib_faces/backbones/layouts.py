"""Backbones room: how public projects name the weights of these networks. Reads names and shapes, never a value.

A layout is recognised by keys that no other has; its arguments are read from shapes. Where a project's network is one of
ours under other names, a table says which is which. What is not known of a layout is not here: an unknown one is refused.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LAYOUTS", "Layout", "Shapes", "foreign"]

Shapes = Mapping[str, tuple[int, ...]]
Arguments = dict[str, Any]
MOST_BLOCKS = 1024  # more is no network


@dataclass(frozen=True)
class Layout:
    """One way to name the weights of one of our networks.

    Attributes:
        name: a word for it.
        about: whose it is, for people.
        backbone: the network's name in the registry.
        keys: keys that a file of this layout has, and one of another has not.
        arguments: shapes to the arguments of the network.
        theirs: our key to the file's; with the file's shapes, since a layout may have two spellings.
        input: arguments to what is known of the images, in the words of `InputSpec`.
        variant: arguments to whose kind it is, where one layout has several.
        pointwise: whether the file has 1x1 convolutions where our network has linear layers.
    """

    name: str
    about: str
    backbone: str
    keys: tuple[str, ...]
    arguments: Callable[[Shapes], Arguments]
    theirs: Callable[[str, Shapes], str] = field(default=lambda key, _shapes: key)
    input: Callable[[Arguments], dict[str, Any]] = field(default=lambda _arguments: {})
    variant: Callable[[Arguments], str] = field(default=lambda _arguments: "")
    pointwise: bool = False

    def fits(self, shapes: Shapes) -> bool:
        """Whether a file with tensors of these shapes is of this layout."""
        return all(key in shapes for key in self.keys)


def _blocks(shapes: Shapes, prefix: str, part: str) -> int:
    """How many numbered modules with a tensor `part` there are below `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,4})\." + re.escape(part))
    return 1 + max((int(found[1]) for key in shapes if (found := pattern.fullmatch(key))), default=-1)


def _square(inputs: int, channels: int) -> tuple[int, int] | None:
    """Input size of a linear layer over a square final grid; a grid of 7 by 6 has the weights of one of 6 by 7."""
    side = math.isqrt(inputs // channels)
    return (16 * side, 16 * side) if side * side == inputs // channels else None


def _kernel(shapes: Shapes, key: str) -> tuple[int, int]:
    """Input size of a convolution over the whole final grid."""
    return 16 * shapes[key][2], 16 * shapes[key][3]


def _renamed(pairs: Sequence[tuple[str, str]]) -> Callable[[str, Shapes], str]:
    """Names by a table of beginnings, ours to theirs."""

    def theirs(key: str, _shapes: Shapes) -> str:
        return next((their + key[len(our) :] for our, their in pairs if key.startswith(our)), key)

    return theirs


def _known(**fields: Any) -> Callable[[Arguments], dict[str, Any]]:
    return lambda _arguments: fields


def _iresnet(shapes: Shapes) -> Arguments:
    stem, (embedding_dim, inputs) = shapes["conv1.weight"][0], shapes["fc.weight"][:2]
    return {
        "layers": tuple(_blocks(shapes, f"layer{stage}", "conv1.weight") for stage in (1, 2, 3, 4)),
        "embedding_dim": embedding_dim,
        "width": stem / 64,
        "input_size": _square(inputs, 8 * stem),
    }


def _mbf_trunk(shapes: Shapes) -> Arguments:
    first, second, third, fourth = (
        _blocks(shapes, f"layers.{stage}.layers", "layers.0.layers.0.weight") for stage in (1, 3, 5, 7)
    )
    grouped = "layers.1.layers.0.weight" in shapes
    return {
        "scale": shapes["layers.0.layers.0.weight"][0] // 64,
        "blocks": (1 if grouped else first, second, third, fourth),
    }


def _mbf(shapes: Shapes) -> Arguments:
    tail = {
        "embedding_dim": shapes["features.layers.2.weight"][0],
        "input_size": _kernel(shapes, "features.layers.0.layers.0.weight"),
    }
    return tail | _mbf_trunk(shapes)


def _mbf_flat(shapes: Shapes) -> Arguments:
    narrow, (embedding_dim, inputs) = shapes["features.layers.0.layers.0.weight"][0], shapes["features.layers.2.weight"]
    tail = {"embedding_dim": embedding_dim, "input_size": _square(inputs, narrow), "tail_channels": narrow}
    return tail | _mbf_trunk(shapes)


def _mobilefacenet(tail: str, linear: str, kernel: str) -> Callable[[Shapes], Arguments]:
    def arguments(shapes: Shapes) -> Arguments:
        return {
            "embedding_dim": shapes[linear][0],
            "width": shapes["conv1.conv.weight"][0] / 64,
            "input_size": _kernel(shapes, kernel),
            **({} if f"{tail}.weight" in shapes else {"affine": False}),
        }

    return arguments


def _gnap(shapes: Shapes) -> Arguments:
    # The pooling has no weights, so the file does not tell the grid.
    return {
        "embedding_dim": shapes["output_layer.bn2.running_mean"][0],
        "width": shapes["conv1.conv.weight"][0] / 64,
        "input_size": 112,
        "affine": False,
        "tail": "gnap",
    }


def _xiaoccer_names() -> list[tuple[str, str]]:
    ours = ["conv_23", *[f"conv_3.model.{i}" for i in range(4)], "conv_34", *[f"conv_4.model.{i}" for i in range(6)]]
    ours += ["conv_45", *[f"conv_5.model.{i}" for i in range(2)]]
    parts = [f"{part}.{kind}" for part in ("conv", "conv_dw") for kind in ("conv", "bn", "prelu")]
    parts += ["project.conv", "project.bn"]
    pairs = [
        (f"{our}.{part}.", f"blocks.{block}.conv.{at}.")
        for block, our in enumerate(ours)
        for at, part in enumerate(parts)
    ]
    pairs += [("conv2_dw.", "dw_conv1."), ("conv_6_sep.", "conv2."), ("conv_6_dw.", "linear7.")]
    return [*pairs, ("linear.", "linear1.conv."), ("bn.", "linear1.bn.")]


BUBBLIIIING_MOBILEFACENET = (
    ("conv_6_sep.conv.", "sep."),
    ("conv_6_sep.bn.", "sep_bn."),
    ("conv_6_sep.prelu.", "prelu."),
    ("conv_6_dw.conv.", "GDC_dw."),
    ("conv_6_dw.bn.", "GDC_bn."),
    ("linear.", "features."),
    ("bn.", "last_bn."),
)


def _ir_layers(shapes: Shapes, stem: int) -> tuple[int, ...]:
    """Blocks of each width; a stage is as wide as the one before, or twice."""
    part = "res_layer.1.weight"
    blocks = _blocks(shapes, "body", part)
    if blocks > MOST_BLOCKS:
        raise IndexError(f"{blocks} blocks")
    found: list[int] = []
    for block in range(blocks):
        # A block that is missing counts as one like the block before it: the differences will name it.
        shape = shapes.get(f"body.{block}.{part}", (*found[-1:], 0, 3, 3))
        if shape[2:] != (3, 3):
            raise IndexError("blocks of three convolutions, which are not read")
        found.append(shape[0])
    return tuple(found.count(stem * factor) for factor in (1, 2, 4, 8))


def _ir(shapes: Shapes) -> Arguments:
    stem, (embedding_dim, inputs) = shapes["input_layer.0.weight"][0], shapes["output_layer.3.weight"]
    mid_norm = "body.0.res_layer.2.running_mean" in shapes
    last = "body.0.res_layer.6.fc1.weight" if mid_norm else "body.0.res_layer.5.fc1.weight"
    return {
        "layers": _ir_layers(shapes, stem),
        "embedding_dim": embedding_dim,
        "width": stem / 64,
        "input_size": _square(inputs, 8 * stem),
        "se": last in shapes or SE_BY_NAME in shapes,
        "mid_norm": mid_norm,
        "affine": "output_layer.4.weight" in shapes,
    }


SE_BY_NAME = "body.0.res_layer.se_block.fc1.weight"


def _ir_names(key: str, shapes: Shapes) -> str:
    # AdaFace and CVLface add squeeze-and-excitation by name, the others by number.
    return re.sub(r"\.res_layer\.[56]\.fc", ".res_layer.se_block.fc", key) if SE_BY_NAME in shapes else key


def _ir_input(arguments: Arguments) -> dict[str, Any]:
    if arguments["mid_norm"] and not arguments["affine"]:
        return {"colour": "bgr", "assumed": ("colour",)}  # CVLface trained some of its own on RGB
    if not arguments["affine"]:
        return {"assumed": ("colour",)}
    return {"normalised": None, "assumed": ("colour", "scale", "normalised")}


def _ir_variant(arguments: Arguments) -> str:
    projects = {
        (True, False): "AdaFace's or CVLface's kind",
        (False, True): "face.evoLVe's, TreB1eN's or FaceX-Zoo's kind",
        (False, False): "CurricularFace's kind",
    }
    return projects.get((arguments["mid_norm"], arguments["affine"]), "no known project's kind")


def _mtlface(shapes: Shapes) -> Arguments:
    stem, (embedding_dim, inputs) = shapes["input_layer.0.weight"][0], shapes["output_layer.3.weight"]
    return {
        "layers": tuple(_blocks(shapes, f"block{stage}", "res_layer.1.weight") for stage in (1, 2, 3, 4)),
        "embedding_dim": embedding_dim,
        "width": stem / 64,
        "input_size": _square(inputs, 8 * stem),
        "se": "block1.0.res_layer.6.fc1.weight" in shapes,
    }


def _v1(shapes: Shapes) -> Arguments:
    return {
        "embedding_dim": shapes["output_layer.fc.0.weight"][0],
        "width": shapes["stage3.1.1.0.weight"][0] / 1024,
        "input_size": _kernel(shapes, "output_layer.features.0.layers.0.weight"),
        "bias": "stage1.0.0.bias" in shapes,
    }


def _v1_flat(shapes: Shapes) -> Arguments:
    last, (embedding_dim, inputs) = shapes["sep.weight"][0], shapes["linear.weight"]
    return {
        "embedding_dim": embedding_dim,
        "width": last / 512,
        "input_size": _square(inputs, last),
        "tail": "flat",
    }


def _v1_flat_names() -> list[tuple[str, str]]:
    """Both convolutions of a pair stand in one sequence there, with an activation at 2 and 5."""
    return [
        (f"stage{stage}.{pair}.{half}.{at}.", f"stage{stage}.{pair}.{3 * half + at}.")
        for stage, pairs in ((1, range(1, 6)), (2, range(6)), (3, range(2)))
        for pair in pairs
        for half in (0, 1)
        for at in (0, 1)
    ]


def _v2(tail: str, linear: str, kernel: str) -> Callable[[Shapes], Arguments]:
    def arguments(shapes: Shapes) -> Arguments:
        last = _blocks(shapes, "features", "0.weight") - 1
        return {
            "embedding_dim": shapes[linear][0],
            "width": shapes[f"features.{last}.0.weight"][1] / 320,
            "input_size": _kernel(shapes, kernel),
            "bias": "features.0.0.bias" in shapes,
            "stem_stride": 1 if last == 18 else 2,  # two blocks fewer where the stem halves the grid
            "affine": f"{tail}.weight" in shapes,
        }

    return arguments


CAVAFACE_V2 = (
    ("output_layer.features.0.layers.0.", "output_layer.conv_6_dw.conv."),
    ("output_layer.features.0.layers.1.", "output_layer.conv_6_dw.bn."),
    ("output_layer.fc.0.", "output_layer.linear."),
    ("output_layer.fc.1.", "output_layer.bn."),
)
V2_BODY = ("features.1.conv.0.0.weight", "features.2.conv.1.0.weight")

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "insightface_iresnet",
        "insightface's iresnet (arcface_torch)",
        "iresnet",
        ("conv1.weight", "layer1.0.bn3.weight", "fc.weight", "features.weight"),
        _iresnet,
    ),
    Layout(
        "insightface_mbf_flat",
        "insightface's mbf with a linear layer over the whole grid",
        "mbf_flat",
        ("layers.0.layers.0.weight", "features.layers.0.layers.2.weight", "features.layers.2.weight"),
        _mbf_flat,
    ),
    Layout(
        "insightface_mbf",
        "insightface's mbf (arcface_torch)",
        "mbf",
        ("layers.0.layers.0.weight", "features.layers.0.layers.0.weight", "features.layers.2.weight"),
        _mbf,
    ),
    Layout(
        "mobilefacenet",
        "MobileFaceNet as in TreB1eN, face.evoLVe and FaceX-Zoo",
        "mobilefacenet",
        ("conv1.conv.weight", "conv_45.conv_dw.conv.weight", "conv_6_dw.conv.weight", "linear.weight"),
        _mobilefacenet("bn", "linear.weight", "conv_6_dw.conv.weight"),
        input=_known(normalised=None, assumed=("colour", "scale", "normalised")),
    ),
    Layout(
        "mobilefacenet_output_layer",
        "MobileFaceNet as in AdaDistill and cavaface",
        "mobilefacenet",
        ("conv_45.conv_dw.conv.weight", "output_layer.conv_6_dw.conv.weight", "output_layer.linear.weight"),
        _mobilefacenet("output_layer.bn", "output_layer.linear.weight", "output_layer.conv_6_dw.conv.weight"),
        theirs=_renamed([(f"{each}.", f"output_layer.{each}.") for each in ("conv_6_dw", "linear", "bn")]),
    ),
    Layout(
        "mobilefacenet_gnap",
        "MobileFaceNet with global norm-aware pooling, as in AdaDistill and cavaface",
        "mobilefacenet",
        ("conv_45.conv_dw.conv.weight", "output_layer.bn1.running_mean", "output_layer.bn2.running_mean"),
        _gnap,
    ),
    Layout(
        "xiaoccer_mobilefacenet",
        "Xiaoccer's MobileFaceNet for images of 112 x 96",
        "mobilefacenet",
        ("dw_conv1.conv.weight", "blocks.0.conv.0.weight", "linear7.conv.weight", "linear1.conv.weight"),
        _mobilefacenet("linear1.bn", "linear1.conv.weight", "linear7.conv.weight"),
        theirs=_renamed(_xiaoccer_names()),
        input=_known(scale=128.0),
        pointwise=True,
    ),
    Layout(
        "bubbliiiing_mobilefacenet",
        "bubbliiiing's MobileFaceNet",
        "mobilefacenet",
        ("conv_45.conv_dw.conv.weight", "sep.weight", "GDC_dw.weight", "features.weight", "last_bn.running_mean"),
        _mobilefacenet("last_bn", "features.weight", "GDC_dw.weight"),
        theirs=_renamed(BUBBLIIIING_MOBILEFACENET),
        input=_known(normalised=True),
        pointwise=True,
    ),
    Layout(
        "ir",
        "IR or IR-SE by face.evoLVe's names",
        "ir",
        ("input_layer.0.weight", "body.0.res_layer.1.weight", "output_layer.3.weight"),
        _ir,
        theirs=_ir_names,
        input=_ir_input,
        variant=_ir_variant,
    ),
    Layout(
        "mtlface",
        "MTLFace's age-invariant backbone",
        "mtlface",
        ("input_layer.0.weight", "block1.0.res_layer.1.weight", "fsm.channel.0.weight", "output_layer.3.weight"),
        _mtlface,
    ),
    Layout(
        "yakhyo_mobilenet_v1",
        "yakhyo's MobileNet V1",
        "mobilenet_v1",
        ("stage1.1.0.0.weight", "stage3.1.1.0.weight", "output_layer.fc.0.weight"),
        _v1,
    ),
    Layout(
        "bubbliiiing_mobilenet_v1",
        "bubbliiiing's MobileNet V1",
        "mobilenet_v1",
        ("stage1.1.3.weight", "stage3.1.3.weight", "sep.weight", "linear.weight"),
        _v1_flat,
        theirs=_renamed(_v1_flat_names()),
        input=_known(normalised=True),
    ),
    Layout(
        "yakhyo_mobilenet_v2",
        "yakhyo's MobileNet V2",
        "mobilenet_v2",
        (*V2_BODY, "output_layer.fc.0.weight"),
        _v2("output_layer.fc.1", "output_layer.fc.0.weight", "output_layer.features.0.layers.0.weight"),
    ),
    Layout(
        "cavaface_mobilenet_v2",
        "cavaface's MobileNet V2",
        "mobilenet_v2",
        (*V2_BODY, "output_layer.linear.weight"),
        _v2("output_layer.bn", "output_layer.linear.weight", "output_layer.conv_6_dw.conv.weight"),
        theirs=_renamed(CAVAFACE_V2),
    ),
)
"""Every layout that is read; the first that fits is taken."""

# A key, and what has it. Each is a file that people take for a face backbone of ours.
FOREIGN = (
    ("param_groups", "the state of an optimizer, not a network"),
    ("conv2d_1a.conv.weight", "facenet-pytorch's InceptionResnetV1, which is not read"),
    ("body.stage1.0.0.weight", "a RetinaFace detector, not a recognition network"),
    ("patch_embed.proj.weight", "a vision transformer, which is not read"),
    ("conv_23.attention_layer.conv.weight", "cavaface's MobileFaceNet with attention, which is not read"),
    ("layer1.0.bn1.weight", "a ResNet that is not insightface's IResNet"),
    ("input_layer.0.weight", "an IR network without the usual blocks or tail"),
    ("conv_45.conv_dw.conv.weight", "a MobileFaceNet without the usual tail"),
    ("features.0.0.weight", "a MobileNet that is not one of the face variants that are read"),
)
CENTRES = ("weight", "kernel", "head.kernel", "head.weight")


def foreign(state: Mapping[str, Any], shapes: Shapes) -> str | None:
    """What a file that fits no layout looks like, if it is a known kind."""
    known = next((text for key, text in FOREIGN if key in state), None)
    if known is None and shapes and all(key in CENTRES for key in shapes):
        return "the class centres of a margin head, not a backbone; load_partial_fc of kdlib_faces.heads reads those"
    return known
