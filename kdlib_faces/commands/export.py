"""The command `kdlib-faces export`: a trained network as a file to deploy, with a model card."""

import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdlib_faces._checks import InputError
from kdlib_faces.backbones.input_spec import height_width
from kdlib_faces.commands.thresholds import Evaluation, read_evaluation
from kdlib_faces.data.images import to_float
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.evaluation import PairResult
from kdlib_faces.export import convert_float16, export_onnx, export_program, quantize_onnx
from kdlib_faces.export.accuracy import AccuracyLoss, check_loss, sample_pairs
from kdlib_faces.export.card import write_card
from kdlib_faces.export.measure import measure
from kdlib_faces.harness.embeddings import embed_set, open_model
from kdlib_faces.harness.image_sets import images_of_source
from kdlib_faces.harness.registry import PROTOCOLS
from kdlib_faces.harness.tasks import EvaluateConfig, EvaluationTask, ProtocolSpec, Settings, task_of_protocol
from kdlib_faces.progress import say
from kdlib_faces.teachers import InputOptions
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.teachers.onnx.graph import read_graph
from kdlib_faces.teachers.onnx.metadata import read_metadata
from kdlib_faces.teachers.onnx.preprocessing import recognize_input
from kdlib_faces.teachers.open import load_network

__all__ = ["main"]

CALIBRATION = 512
SUFFIXES = {"onnx": ".onnx", "int8": ".onnx", "float16": ".onnx", "torch": ".pt2"}


def main(options: Namespace, command: str) -> None:
    """Export a network with the options of the command line, and write its model card."""
    output, kind, quiet = options.output, options.format, options.quiet
    if output.suffix != SUFFIXES[kind]:
        raise InputError(f"export: --output must end in {SUFFIXES[kind]} for --format {kind}, got {output}")
    if kind == "torch" and (options.evaluation or options.data):
        raise InputError("export: --data and --evaluation apply to ONNX files, not to --format torch")
    if not 0 <= options.max_loss <= 1:
        raise InputError(f"export: --max-loss must be a fraction from 0 to 1, got {options.max_loss:g}")
    (input_options,) = inputs_of_models(options.input, 1)
    faces = read_faces(options.data) if options.data else None
    evaluation = read_evaluation(options.evaluation, options.model) if options.evaluation else None
    losses: list[AccuracyLoss] = []
    with tempfile.TemporaryDirectory() as folder:
        check = None
        if faces is not None:
            check = _gate(
                options.model, input_options, faces, options.pairs, options.max_loss, Path(folder), losses, quiet
            )
        elif kind == "int8" or options.pairs:
            raise InputError(
                "export: --data must be given: a list or folder of face crops like those of the application"
            )
        if kind == "torch":
            export_program(load_network(options.model, input_options), output, normalize=options.normalize)
        else:
            _export_onnx(options, input_options, faces, evaluation, check, Path(folder))
    say(f"exported: {output}, {output.stat().st_size:,} bytes", quiet=quiet)
    loss = losses[0] if losses else None
    if loss is not None:
        say(f"against {options.model.name}: {loss}", quiet=quiet)
    rows = _facts(options, faces)
    files = [options.model, *([output] if kind != "torch" else [])]
    card = write_card(
        output, model=options.model, rows=rows, loss=loss, protocols=evaluation.summaries if evaluation else (),
        name=evaluation.name if evaluation else "", measurements=measure(files) if options.measure else (),
    )  # fmt: skip
    say(f"model card: {card}", quiet=quiet)


def _export_onnx(
    options: Namespace, input_options: InputOptions, faces: FaceList | None, evaluation: Evaluation | None,
    check: Callable[[Path], None] | None, folder: Path,
) -> None:  # fmt: skip
    """Write the float graph, or make it in a temporary folder and convert it."""
    kind, output = options.format, options.output
    source = options.model
    if source.suffix.lower() == ".onnx":
        if kind == "onnx":
            raise InputError(f"export: {source} is an ONNX file already; --format int8 or float16 converts it")
        size = recognize_input(read_graph(source)).size
    else:
        network = load_network(source, input_options)
        size = network.input_size
        metadata = {} if evaluation is None else {"thresholds": evaluation.thresholds}
        source = output if kind == "onnx" else folder / "float.onnx"
        export_onnx(
            network, source, normalize=options.normalize, opset=options.opset, metadata=metadata,
            images=None if faces is None else to_float(_crops(faces, max(height_width("export", size)), 8)),
            check=check if kind == "onnx" else None,
        )  # fmt: skip
    if kind == "int8":
        assert faces is not None  # checked by `main`
        say("measuring ranges and quantizing", quiet=options.quiet)
        quantize_onnx(source, _crops(faces, max(height_width("export", size)), CALIBRATION), output, check=check)
    elif kind == "float16":
        convert_float16(source, output, check=check)


def _crops(faces: FaceList, size: int, count: int) -> Tensor:
    """At most `count` images of a list, evenly spaced, `(n, 3, size, size)` uint8."""
    rows = torch.linspace(0, len(faces) - 1, min(count, len(faces))).long().tolist()
    return images_of_source("faces", faces.images).decode(rows, size)


def _gate(
    model: Path, input_options: InputOptions, faces: FaceList, pairs: str | None, max_loss: float, work: Path,
    losses: list[AccuracyLoss], quiet: bool,
) -> Callable[[Path], None]:  # fmt: skip
    """The check that measures the loss of accuracy of a file and refuses it above `max_loss`."""
    images = images_of_source("faces", faces.images)
    config = EvaluateConfig(replicates=0)
    task = (
        task_of_protocol("pairs", "Pairs of the list", sample_pairs(faces.identities), images)
        if pairs is None
        else None
    )
    if task is None:
        spec = ProtocolSpec("pairs", Path(str(pairs)), {}, f"pairs={pairs}")
        built = PROTOCOLS["pairs"].build(spec, Settings(config, faces, images), "pairs")
        task = built[0]

    def result(path: Path, input_options: InputOptions, checked: EvaluationTask) -> PairResult:
        opened = open_model(path, None, input_options)
        rows = {each.name: embed_set(opened, each, work, progress=not quiet) for each in checked.images}
        found = checked.evaluate(rows)
        assert isinstance(found, PairResult)
        return found

    def check(path: Path) -> None:
        losses.append(check_loss(result(model, input_options, task), result(path, InputOptions(), task), max_loss))

    return check


def _facts(options: Namespace, faces: FaceList | None) -> dict[str, object]:
    """What the model card states about the file."""
    rows: dict[str, object] = {"format": options.format, "size": f"{options.output.stat().st_size:,} bytes"}
    if options.format != "torch":
        graph = read_graph(options.output)
        entry = read_metadata(graph.model)
        rows |= {
            "images": recognize_input(graph).describe(),
            "embedding": f"{entry.get('embedding_dim', 'unknown')} dimensions",
        }
        rows |= {name: entry[name] for name in ("opset", "training") if name in entry}
        if options.format == "int8":
            rows["calibration"] = (
                f"{entry.get('calibration_images')} images; mean cosine {entry.get('cosine')} to the float graph"
            )
        thresholds = entry.get("thresholds")
        if isinstance(thresholds, dict) and isinstance(thresholds.get("fars"), dict):
            shown = "; ".join(f"FAR {far}: {point['threshold']:.4f}" for far, point in thresholds["fars"].items())
            rows["thresholds"] = f"{shown} ({thresholds.get('protocol')})"
    if faces is not None:
        rows["data"] = (
            f"{', '.join(map(str, faces.sources))}: {len(faces):,} images, {faces.num_identities:,} identities"
        )
    return rows
