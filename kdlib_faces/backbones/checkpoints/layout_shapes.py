"""Functions that derive the arguments of a network from the shapes of a state dict, and tables of key prefixes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

from kdlib_faces.backbones.input_spec import SpecFields
from kdlib_faces.backbones.networks.base import Arguments

Shapes = Mapping[str, tuple[int, ...]]
MAX_BLOCKS = 1024  # more is not a network


def _blocks(shapes: Shapes, prefix: str, part: str) -> int:
    """Count the numbered modules with a tensor `part` below `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,4})\." + re.escape(part))
    return 1 + max((int(match[1]) for key in shapes if (match := pattern.fullmatch(key))), default=-1)


def _square(inputs: int, channels: int) -> tuple[int, int] | None:
    """Input size for a linear layer over a square final grid; None for other grids, whose sides are ambiguous."""
    side = math.isqrt(inputs // channels)
    return (16 * side, 16 * side) if side * side == inputs // channels else None


def _kernel(shapes: Shapes, key: str) -> tuple[int, int]:
    """Input size for a convolution over the whole final grid."""
    return 16 * shapes[key][2], 16 * shapes[key][3]


def renamed(pairs: Sequence[tuple[str, str]]) -> Callable[[str, Shapes], str]:
    """Return a function that renames keys by a table of prefixes (network, file)."""

    def theirs(key: str, _shapes: Shapes) -> str:
        return next((their + key[len(our) :] for our, their in pairs if key.startswith(our)), key)

    return theirs


def known(**fields: Unpack[SpecFields]) -> Callable[[Arguments], SpecFields]:
    return lambda _arguments: fields


def iresnet(shapes: Shapes) -> Arguments:
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


def mbf(shapes: Shapes) -> Arguments:
    tail = {
        "embedding_dim": shapes["features.layers.2.weight"][0],
        "input_size": _kernel(shapes, "features.layers.0.layers.0.weight"),
    }
    return tail | _mbf_trunk(shapes)


def mbf_flat(shapes: Shapes) -> Arguments:
    narrow, (embedding_dim, inputs) = shapes["features.layers.0.layers.0.weight"][0], shapes["features.layers.2.weight"]
    tail = {"embedding_dim": embedding_dim, "input_size": _square(inputs, narrow), "tail_channels": narrow}
    return tail | _mbf_trunk(shapes)


def mobilefacenet(
    tail: str, linear: str, kernel: str, *, stem: str = "conv1.conv.weight", **kind: str
) -> Callable[[Shapes], Arguments]:
    def arguments(shapes: Shapes) -> Arguments:
        return {
            "embedding_dim": shapes[linear][0],
            "width": shapes[stem][0] / 64,
            "input_size": _kernel(shapes, kernel),
            **({} if f"{tail}.weight" in shapes else {"affine": False}),
            **kind,
        }

    return arguments


def gnap(shapes: Shapes) -> Arguments:
    # The pooling has no weights, so the grid is unknown.
    return {
        "embedding_dim": shapes["output_layer.bn2.running_mean"][0],
        "width": shapes["conv1.conv.weight"][0] / 64,
        "input_size": 112,
        "affine": False,
        "tail": "gnap",
    }


def _bottlenecks(blocks: str, parts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names of the parts of the fifteen bottlenecks of MobileFaceNet, which are numbered below `blocks` in the file."""
    ours = ["conv_23", *[f"conv_3.model.{i}" for i in range(4)], "conv_34", *[f"conv_4.model.{i}" for i in range(6)]]
    ours += ["conv_45", *[f"conv_5.model.{i}" for i in range(2)]]
    return [
        (f"{our}.{part}.", f"{blocks}.{number}.conv.{their}.")
        for number, our in enumerate(ours)
        for part, their in parts.items()
    ]


def xiaoccer_names() -> list[tuple[str, str]]:
    parts = [f"{part}.{kind}" for part in ("conv", "conv_dw") for kind in ("conv", "bn", "prelu")]
    parts += ["project.conv", "project.bn"]
    pairs = _bottlenecks("blocks", {part: str(at) for at, part in enumerate(parts)})
    pairs += [("conv2_dw.", "dw_conv1."), ("conv_6_sep.", "conv2."), ("conv_6_dw.", "linear7.")]
    return [*pairs, ("linear.", "linear1.conv."), ("bn.", "linear1.bn.")]


def foamliu_names() -> list[tuple[str, str]]:
    parts = {"conv.conv": "0.0", "conv.bn": "0.1", "conv_dw.conv": "1.0", "conv_dw.bn": "1.1"}
    pairs = _bottlenecks("features", {**parts, "project.conv": "2", "project.bn": "3"})
    for our, their in (("conv1", "conv1"), ("conv_6_sep", "conv2")):
        pairs += [(f"{our}.conv.", f"{their}.0."), (f"{our}.bn.", f"{their}.1.")]
    for at, part in enumerate(("depthwise", "pointwise"), start=1):
        pairs += [(f"conv2_dw.{part}.conv.", f"dw_conv.{part}."), (f"conv2_dw.{part}.bn.", f"dw_conv.bn{at}.")]
    return [*pairs, ("conv_6_dw.conv.", "gdconv.depthwise."), ("conv_6_dw.bn.", "gdconv.bn."), ("linear.", "conv3.")]


IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


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
    """Count the blocks of each width; a stage is as wide as the previous one, or twice as wide."""
    part = "res_layer.1.weight"
    blocks = _blocks(shapes, "body", part)
    if blocks > MAX_BLOCKS:
        raise IndexError(f"{blocks} blocks")
    widths: list[int] = []
    for block in range(blocks):
        # A missing block is counted like the block before it; the differences will name it.
        shape = shapes.get(f"body.{block}.{part}", (*widths[-1:], 0, 3, 3))
        if shape[2:] != (3, 3):
            raise IndexError("blocks of three convolutions, which are not supported")
        widths.append(shape[0])
    return tuple(widths.count(stem * factor) for factor in (1, 2, 4, 8))


def ir(shapes: Shapes) -> Arguments:
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


def ir_names(key: str, shapes: Shapes) -> str:
    # AdaFace and CVLface name the squeeze-and-excitation, other projects number it.
    return re.sub(r"\.res_layer\.[56]\.fc", ".res_layer.se_block.fc", key) if SE_BY_NAME in shapes else key


def ir_input(arguments: Arguments) -> SpecFields:
    if arguments["mid_norm"] and not arguments["affine"]:
        return {"color": "bgr", "assumed": ("color",)}  # some networks of CVLface were trained on RGB
    if not arguments["affine"]:
        return {"assumed": ("color",)}
    return {"normalized": None, "assumed": ("color", "scale", "normalized")}


def ir_variant(arguments: Arguments) -> str:
    projects = {
        (True, False): "as in AdaFace or CVLface",
        (False, True): "as in face.evoLVe, TreB1eN or FaceX-Zoo",
        (False, False): "as in CurricularFace",
    }
    return projects.get((arguments["mid_norm"], arguments["affine"]), "of no known project")


def mtlface(shapes: Shapes) -> Arguments:
    stem, (embedding_dim, inputs) = shapes["input_layer.0.weight"][0], shapes["output_layer.3.weight"]
    return {
        "layers": tuple(_blocks(shapes, f"block{stage}", "res_layer.1.weight") for stage in (1, 2, 3, 4)),
        "embedding_dim": embedding_dim,
        "width": stem / 64,
        "input_size": _square(inputs, 8 * stem),
        "se": "block1.0.res_layer.6.fc1.weight" in shapes,
    }


def v1(shapes: Shapes) -> Arguments:
    return {
        "embedding_dim": shapes["output_layer.fc.0.weight"][0],
        "width": shapes["stage3.1.1.0.weight"][0] / 1024,
        "input_size": _kernel(shapes, "output_layer.features.0.layers.0.weight"),
        "bias": "stage1.0.0.bias" in shapes,
    }


def v1_flat(shapes: Shapes) -> Arguments:
    last, (embedding_dim, inputs) = shapes["sep.weight"][0], shapes["linear.weight"]
    return {"embedding_dim": embedding_dim, "width": last / 512, "input_size": _square(inputs, last), "tail": "flat"}


def v1_flat_names() -> list[tuple[str, str]]:
    """Both convolutions of a pair are in one sequence, with activations at 2 and 5."""
    return [
        (f"stage{stage}.{pair}.{half}.{at}.", f"stage{stage}.{pair}.{3 * half + at}.")
        for stage, pairs in ((1, range(1, 6)), (2, range(6)), (3, range(2)))
        for pair in pairs
        for half in (0, 1)
        for at in (0, 1)
    ]


def v2(tail: str, linear: str, kernel: str) -> Callable[[Shapes], Arguments]:
    def arguments(shapes: Shapes) -> Arguments:
        last = _blocks(shapes, "features", "0.weight") - 1
        return {
            "embedding_dim": shapes[linear][0],
            "width": shapes[f"features.{last}.0.weight"][1] / 320,
            "input_size": _kernel(shapes, kernel),
            "bias": "features.0.0.bias" in shapes,
            "stem_stride": 1 if last == 18 else 2,  # two blocks fewer if the stem halves the grid
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
