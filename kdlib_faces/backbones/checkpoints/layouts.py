"""Checkpoint layouts of public projects, recognized by keys that no other layout has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kdlib_faces._checks import show_name
from kdlib_faces._tensor_pickle import Foreign
from kdlib_faces._weights import WHOLE_MODULE
from kdlib_faces.backbones.checkpoints import layout_shapes as shape
from kdlib_faces.backbones.checkpoints.layout_shapes import Shapes
from kdlib_faces.backbones.input_spec import SpecFields
from kdlib_faces.backbones.networks.base import Arguments

__all__ = ["LAYOUTS", "Layout", "describe_foreign"]


@dataclass(frozen=True)
class Layout:
    """Naming of the weights of a network in a public project."""

    name: str
    about: str  # description for messages
    backbone: str  # the network's name in the registry
    keys: tuple[str, ...]  # keys that only files of this layout have
    arguments: Callable[[Shapes], Arguments]
    # Maps a key of the network and the shapes of the file to the key of the file.
    theirs: Callable[[str, Shapes], str] = field(default=lambda key, _shapes: key)
    input: Callable[[Arguments], SpecFields] = field(default=lambda _arguments: SpecFields())
    # Maps arguments to the name of a variant of the layout.
    variant: Callable[[Arguments], str] = field(default=lambda _arguments: "")
    pointwise: bool = False  # whether the file has 1x1 convolutions in place of linear layers

    def fits(self, shapes: Shapes) -> bool:
        """Return whether a file with these shapes has this layout."""
        return all(key in shapes for key in self.keys)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "insightface_iresnet",
        "insightface's iresnet (arcface_torch)",
        "iresnet",
        ("conv1.weight", "layer1.0.bn3.weight", "fc.weight", "features.weight"),
        shape.iresnet,
    ),
    Layout(
        "insightface_mbf_flat",
        "insightface's mbf with a linear layer over the whole grid",
        "mbf_flat",
        ("layers.0.layers.0.weight", "features.layers.0.layers.2.weight", "features.layers.2.weight"),
        shape.mbf_flat,
    ),
    Layout(
        "insightface_mbf",
        "insightface's mbf (arcface_torch)",
        "mbf",
        ("layers.0.layers.0.weight", "features.layers.0.layers.0.weight", "features.layers.2.weight"),
        shape.mbf,
    ),
    Layout(
        "mobilefacenet",
        "MobileFaceNet as in TreB1eN, face.evoLVe and FaceX-Zoo",
        "mobilefacenet",
        ("conv1.conv.weight", "conv_45.conv_dw.conv.weight", "conv_6_dw.conv.weight", "linear.weight"),
        shape.mobilefacenet("bn", "linear.weight", "conv_6_dw.conv.weight"),
        input=shape.known(normalized=None, assumed=("color", "scale", "normalized")),
    ),
    Layout(
        "mobilefacenet_output_layer",
        "MobileFaceNet as in AdaDistill and cavaface",
        "mobilefacenet",
        ("conv_45.conv_dw.conv.weight", "output_layer.conv_6_dw.conv.weight", "output_layer.linear.weight"),
        shape.mobilefacenet("output_layer.bn", "output_layer.linear.weight", "output_layer.conv_6_dw.conv.weight"),
        theirs=shape.renamed([(f"{each}.", f"output_layer.{each}.") for each in ("conv_6_dw", "linear", "bn")]),
    ),
    Layout(
        "mobilefacenet_gnap",
        "MobileFaceNet with global norm-aware pooling, as in AdaDistill and cavaface",
        "mobilefacenet",
        ("conv_45.conv_dw.conv.weight", "output_layer.bn1.running_mean", "output_layer.bn2.running_mean"),
        shape.gnap,
    ),
    Layout(
        "xiaoccer_mobilefacenet",
        "Xiaoccer's MobileFaceNet for images of 112 x 96",
        "mobilefacenet",
        ("dw_conv1.conv.weight", "blocks.0.conv.0.weight", "linear7.conv.weight", "linear1.conv.weight"),
        shape.mobilefacenet("linear1.bn", "linear1.conv.weight", "linear7.conv.weight"),
        theirs=shape.renamed(shape.xiaoccer_names()),
        input=shape.known(scale=128.0),
        pointwise=True,
    ),
    Layout(
        "foamliu_mobilefacenet",
        "foamliu's MobileFaceNet with ReLU6",
        "mobilefacenet",
        ("dw_conv.depthwise.weight", "features.0.conv.0.0.weight", "gdconv.depthwise.weight", "conv3.weight"),
        shape.mobilefacenet("bn", "conv3.weight", "gdconv.depthwise.weight", stem="conv1.0.weight", activation="relu6"),
        theirs=shape.renamed(shape.foamliu_names()),
        input=shape.known(mean=shape.IMAGENET_MEAN, scale=shape.IMAGENET_STD),
        pointwise=True,
    ),
    Layout(
        "bubbliiiing_mobilefacenet",
        "bubbliiiing's MobileFaceNet",
        "mobilefacenet",
        ("conv_45.conv_dw.conv.weight", "sep.weight", "GDC_dw.weight", "features.weight", "last_bn.running_mean"),
        shape.mobilefacenet("last_bn", "features.weight", "GDC_dw.weight"),
        theirs=shape.renamed(shape.BUBBLIIIING_MOBILEFACENET),
        input=shape.known(normalized=True),
        pointwise=True,
    ),
    Layout(
        "ir",
        "IR or IR-SE with face.evoLVe's names",
        "ir",
        ("input_layer.0.weight", "body.0.res_layer.1.weight", "output_layer.3.weight"),
        shape.ir,
        theirs=shape.ir_names,
        input=shape.ir_input,
        variant=shape.ir_variant,
    ),
    Layout(
        "mtlface",
        "MTLFace's age-invariant backbone",
        "mtlface",
        ("input_layer.0.weight", "block1.0.res_layer.1.weight", "fsm.channel.0.weight", "output_layer.3.weight"),
        shape.mtlface,
    ),
    Layout(
        "yakhyo_mobilenet_v1",
        "yakhyo's MobileNet V1",
        "mobilenet_v1",
        ("stage1.1.0.0.weight", "stage3.1.1.0.weight", "output_layer.fc.0.weight"),
        shape.v1,
    ),
    Layout(
        "bubbliiiing_mobilenet_v1",
        "bubbliiiing's MobileNet V1",
        "mobilenet_v1",
        ("stage1.1.3.weight", "stage3.1.3.weight", "sep.weight", "linear.weight"),
        shape.v1_flat,
        theirs=shape.renamed(shape.v1_flat_names()),
        input=shape.known(normalized=True),
    ),
    Layout(
        "yakhyo_mobilenet_v2",
        "yakhyo's MobileNet V2",
        "mobilenet_v2",
        (*shape.V2_BODY, "output_layer.fc.0.weight"),
        shape.v2("output_layer.fc.1", "output_layer.fc.0.weight", "output_layer.features.0.layers.0.weight"),
    ),
    Layout(
        "cavaface_mobilenet_v2",
        "cavaface's MobileNet V2",
        "mobilenet_v2",
        (*shape.V2_BODY, "output_layer.linear.weight"),
        shape.v2("output_layer.bn", "output_layer.linear.weight", "output_layer.conv_6_dw.conv.weight"),
        theirs=shape.renamed(shape.CAVAFACE_V2),
    ),
)
"""All supported layouts; the first match is used."""

# Keys of files that are commonly mistaken for a supported backbone.
FOREIGN = (
    ("param_groups", "the state of an optimizer, not a network"),
    ("conv2d_1a.conv.weight", "facenet-pytorch's InceptionResnetV1, which is not supported"),
    ("body.stage1.0.0.weight", "a RetinaFace detector, not a recognition network"),
    ("stages.1.blocks.2.xca.temperature", "EdgeFace or another EdgeNeXt, which is supported as an ONNX file only"),
    ("stages.1.blocks.1.xca.temperature", "EdgeFace or another EdgeNeXt, which is supported as an ONNX file only"),
    ("patch_embed.proj.weight", "a vision transformer, which is not supported"),
    ("conv_23.attention_layer.conv.weight", "cavaface's MobileFaceNet with attention, which is not supported"),
    ("layer1.0.bn1.weight", "a ResNet that is not insightface's IResNet"),
    ("input_layer.0.weight", "an IR network without the usual blocks or tail"),
    ("conv_45.conv_dw.conv.weight", "a MobileFaceNet without the usual tail"),
    ("features.0.0.weight", "a MobileNet other than the supported face variants"),
)
CENTERS = ("weight", "kernel", "head.kernel", "head.weight")


def describe_foreign(state: Mapping[str, object], shapes: Shapes) -> str | None:
    """Describe a file without a known layout, if its kind is known."""
    known = next((text for key, text in FOREIGN if key in state), None)
    if known is None and shapes and all(key in CENTERS for key in shapes):
        return "the class centers of a margin head, not a backbone; load_partial_fc of kdlib_faces.heads reads those"
    whole = next(((key, value.name) for key, value in state.items() if isinstance(value, Foreign)), None)
    if known is None and whole and not shapes:
        known = f"objects instead of tensors ({show_name(whole[0])!r} is a {show_name(whole[1])}); {WHOLE_MODULE}"
    return known
