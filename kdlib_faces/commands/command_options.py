"""Options that belong to one command or two: align, export, embed and compare."""

from argparse import ArgumentParser
from pathlib import Path

__all__ = ["add_align_options", "add_deployment_options"]


def add_align_options(parser: ArgumentParser) -> None:
    """Add the options of align that no other command has."""
    text = "folder of photographs; identities are its subfolders"
    parser.add_argument("photographs", type=Path, metavar="PHOTOS", help=text)
    text = "face detector: YuNet (2023) or SCRFD with landmarks"
    parser.add_argument("--detector", type=Path, required=True, metavar="ONNX", help=text)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the crops and lists")
    text = "which of several faces to crop: the largest, the one nearest to the center, all, or none (largest)"
    parser.add_argument("--several", choices=("largest", "center", "all", "refuse"), help=text)
    text = "photographs without a face: leave out, keep at the size of a crop, or stop (skip)"
    parser.add_argument("--no-face", choices=("skip", "keep-resized", "stop"), help=text)
    parser.add_argument("--min-score", metavar="N", help="lower limit of the score of a face (0.6)")
    parser.add_argument("--min-size", metavar="PIXELS", help="lower limit of the size of a face in the photograph (16)")
    parser.add_argument("--config", type=Path, metavar="TOML", help="file of settings; --set overrides it")
    text = "change a setting, such as size, format=jpg, detector_size, low_score; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text, dest="settings")


def add_deployment_options(export: ArgumentParser, embed: ArgumentParser, compare: ArgumentParser) -> None:
    """Add the options of export, embed and compare that no other command has."""
    export.add_argument("model", type=Path, metavar="MODEL", help=".safetensors or .pt; .onnx for int8 and float16")
    text = "float32 graph, int8 or float16 graph, or torch.export program (onnx)"
    export.add_argument("--format", choices=("onnx", "int8", "float16", "torch"), default="onnx", help=text)
    export.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write, .onnx or .pt2")
    text = "face crops, to quantize and to measure the loss of accuracy; repeatable"
    export.add_argument("--data", action="append", default=[], metavar="LIST", help=text)
    export.add_argument("--pairs", metavar="TXT", help="pairs in LFW's format for --data (default: pairs are chosen)")
    text = "largest accepted loss of accuracy on the pairs (0.005)"
    export.add_argument("--max-loss", type=float, default=0.005, metavar="FRACTION", help=text)
    text = "report.json of `evaluate`: its thresholds and figures go into the file and its card"
    export.add_argument("--evaluation", metavar="[NAME=]JSON", help=text)
    export.add_argument("--normalize", action="store_true", help="return embeddings of unit length")
    export.add_argument("--measure", action="store_true", help="measure time and memory for the model card (a minute)")
    embed.add_argument("images", nargs="+", metavar="IMAGES", help="image, CSV list or folder of face crops")
    compare.add_argument("first", metavar="A", help="face crop, or photograph with --detector")
    compare.add_argument("second", metavar="B", help="face crop, or photograph with --detector")
    text = "false accept rate of the decision (0.001)"
    compare.add_argument("--far", type=float, default=1e-3, metavar="RATE", help=text)
    text = "report.json of `evaluate` with thresholds (default: those in the metadata of the model)"
    compare.add_argument("--evaluation", metavar="[NAME=]JSON", help=text)
    for parser in (embed, compare):
        parser.add_argument("--model", type=Path, required=True, metavar="FILE", help=".safetensors, .pt or .onnx")
        text = "face detector, YuNet (2023) or SCRFD: the images are photographs, which are aligned first"
        parser.add_argument("--detector", type=Path, metavar="ONNX", help=text)
        text = "face of a photograph with several: the largest, the one nearest to the center, or an error (refuse)"
        parser.add_argument("--several", choices=("refuse", "largest", "center"), default="refuse", help=text)
        text = "embed the image alone, without its mirrored version"
        parser.add_argument("--no-flip", dest="flip", action="store_false", help=text)
