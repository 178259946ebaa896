"""Exported students: `python benchmarks/bench_export.py [--weights NET] [--data LIST --pairs TXT] [--groups LIST] [--rounds 60]`.

One thread, batch 1, in alternation, with the median of the paired ratios: the exported float graph against eager torch, and the int8
graph against the float graph. File sizes, the cosine of the int8 embeddings, and the seconds from the start of the program without torch
in `docs/runtime` to its first embedding; with `--detector` and `--photo` it finds and aligns a face first. With `--pairs`, the ten-fold
accuracy and the TAR at FAR 1e-2 of both graphs on the images of `--data`; with `--groups`, the TAR of the last age group against the
first. `--weights` takes a checkpoint, or an ONNX network of a known family, which `--keep` makes narrower as `kdlib-faces train --start
shrink:` does, and writes `results/export.json`. Without it, an untrained network of the size of a light student is measured, and
`results/export_untrained.json` is written.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kdlib_faces.backbones import Backbone, count_parameters, mbf
from kdlib_faces.data.image_pairs import ImagePairs
from kdlib_faces.data.lists import FaceList, read_faces
from kdlib_faces.data.sets.lfw import read_lfw_pairs
from kdlib_faces.evaluation import CrossGroupProtocol, PairProtocol, embed_images
from kdlib_faces.export import export_onnx, quantize_onnx, save_student
from kdlib_faces.export.float_graph import sample_faces
from kdlib_faces.harness.image_sets import images_of_source
from kdlib_faces.progress import progress
from kdlib_faces.recipes.start import StartConfig, shrink_teacher
from kdlib_faces.teachers import OnnxTeacher
from kdlib_faces.teachers.open import load_pretrained

ROOT = Path(__file__).parents[1]
FAR = 1e-2


def student(options: argparse.Namespace, images: torch.Tensor) -> Backbone:
    """The network to export."""
    if options.weights is None:
        torch.manual_seed(0)
        return mbf(embedding_dim=256, scale=1).eval()
    network = load_pretrained(options.weights)
    assert isinstance(network, Backbone)
    if options.keep < 1:
        config = StartConfig(keep=options.keep, last_grid=32, images=options.shrink_images)
        network = shrink_teacher(network, images, config, seed=0, on_step=lambda step: print(f"  {step}", flush=True))
    return network.eval()


def pixels_of(faces: FaceList, rows: Sequence[int] | None = None) -> torch.Tensor:
    """Images of a list, by default all of them, 112 x 112, uint8."""
    return images_of_source("faces", faces.images).decode(range(len(faces)) if rows is None else rows, 112)


def calibration_of(lists: Sequence[str], shrink_images: int) -> torch.Tensor:
    """Evenly spaced images of lists, or synthetic faces."""
    if not lists:
        return ((sample_faces(112, 64) + 1) * 127.5).round().to(torch.uint8)
    faces = read_faces(lists, unlabeled=True)
    return pixels_of(faces, torch.linspace(0, len(faces) - 1, min(shrink_images, len(faces))).long().tolist())


def session(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A graph on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda images: opened.run(None, {name: images})[0]


def alternating(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for number in progress(range(rounds), "rounds"):
        for name in [*runs][:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - began)
    return times


FIRST_EMBEDDING = """
import sys
script, graph, image, *detectors = sys.argv[1:]
exec(open(script).read().partition("\\ndetector, model")[0])  # imports and functions
model, *detector = (onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (graph, *detectors))
photo = Image.open(image).convert("RGB")
embed(model, photo, detect(detector[0], photo) if detector else TEMPLATE)
"""


def started(model: Path, photo: Path, detector: Path | None) -> tuple[float, float]:
    """Seconds and CPU seconds of the example's functions from the start of a process to its end after one embedding.

    Each is the smallest of five runs: on a machine with other load, the CPU seconds are closer to those of a free one.

    Without a detector, the photograph is an aligned crop.
    """
    script = ROOT / "docs" / "runtime" / "runtime_face.py"
    files = [script, model, photo, *([detector] if detector else [])]
    command = [sys.executable, "-c", FIRST_EMBEDDING, *map(str, files)]
    seconds, processor = [], []
    for _ in range(5):
        began, before = time.perf_counter(), os.times()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
        after = os.times()
        processor.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return round(min(seconds), 3), round(min(processor), 3)


def accuracy(graphs: Mapping[str, Path], faces: FaceList, pairs: ImagePairs) -> dict[str, object]:
    """Ten-fold accuracy and TAR at FAR 1e-2 of both graphs, what int8 loses, and the mean cosine of their embeddings."""
    located = pairs.locate(faces)
    used, ends = np.unique(np.concatenate([located.left, located.right]), return_inverse=True)
    left, right = np.split(ends, 2)
    protocol = PairProtocol(left, right, located.same, located.fold_ids, fars=(FAR,))
    images = pixels_of(faces, used.tolist())
    rows = {name: embed_images(OnnxTeacher(path), images, progress=True) for name, path in graphs.items()}
    results = {name: protocol.evaluate(each) for name, each in rows.items()}
    found = {name: {"accuracy": each.accuracy, "tar": float(each.tar[FAR])} for name, each in results.items()}
    figures: dict[str, object] = {
        name: {key: round(value, 5) for key, value in each.items()} for name, each in found.items()
    }
    loss = {key: found["float"][key] - found["int8"][key] for key in ("accuracy", "tar")}
    figures |= {f"{key}_loss": round(value, 5) for key, value in loss.items()}
    return figures | {"pairs": results["float"].pairs, "cosine": _cosine(rows)}


def between_groups(graphs: Mapping[str, Path], faces: FaceList) -> dict[str, object]:
    """TAR at FAR 1e-2 of the last age group against the first, of both graphs, and the mean cosine of their embeddings."""
    assert faces.age_groups is not None
    groups = np.asarray([*faces.group_names, ""])[faces.age_groups]
    names = sorted(set(groups.tolist()) - {""})
    protocol = CrossGroupProtocol(
        faces.identities, groups, probe=names[-1], gallery=names[0], fars=(FAR,), ranks=(1,), replicates=0
    )
    rows = {name: embed_images(OnnxTeacher(path), pixels_of(faces), progress=True) for name, path in graphs.items()}
    tars: dict[str, object] = {
        f"groups_{name}_tar": round(protocol.evaluate(each).tar[FAR].value or 0.0, 5) for name, each in rows.items()
    }
    return tars | {"groups_genuine_pairs": int(protocol.same.sum()), "groups_cosine": _cosine(rows)}


def _cosine(rows: Mapping[str, np.ndarray]) -> float:
    """Mean cosine of the embeddings of both graphs."""
    left, right = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows["float"], rows["int8"]))
    return round(float((left * right).sum(1).mean()), 5)


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description="Exported students against eager torch, and int8 against float32.")
    parser.add_argument("--weights", help="a checkpoint, or an ONNX network of a known family")
    parser.add_argument("--keep", type=float, default=1.0, help="part of the channels of --weights that stays")
    parser.add_argument("--shrink-images", type=int, default=2000)
    parser.add_argument("--data", action="append", default=[], help="list or folder of crops; repeatable")
    parser.add_argument("--pairs", help="pairs in LFW's format on --data")
    parser.add_argument("--groups", action="append", default=[], help="list with age groups; repeatable")
    parser.add_argument("--calibrate", action="append", default=[], help="crops for int8 and --keep; by default --data")
    parser.add_argument("--detector", type=Path, help="YuNet, for the start of the example with a detector")
    parser.add_argument("--photo", type=Path, help="photograph for --detector")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if (options.detector is None) != (options.photo is None):
        parser.error("--detector and --photo must be given together")
    if options.pairs and not options.data:
        parser.error("--pairs needs --data")
    calibration = calibration_of(options.calibrate or options.data, options.shrink_images)
    network = student(options, calibration)
    figures: dict[str, object] = {"network": type(network).__name__, "parameters": count_parameters(network)}
    with tempfile.TemporaryDirectory() as folder:
        save_student(network, Path(folder) / "student.safetensors")
        graph = export_onnx(network, Path(folder) / "student.onnx")
        began = time.perf_counter()
        small = quantize_onnx(graph, calibration, Path(folder) / "int8.onnx", min_cosine=0.9)
        figures["int8_calibration_seconds"] = round(time.perf_counter() - began, 1)
        floats, integers = session(graph), session(small)
        images = np.random.default_rng(0).uniform(-1, 1, (1, 3, *[network.input_size] * 2)).astype(np.float32)
        tensor = torch.from_numpy(images)
        with torch.inference_mode():
            times = alternating(
                {"eager": lambda: network(tensor), "float": lambda: floats(images), "int8": lambda: integers(images)},
                options.rounds,
            )
        ratio = {
            f"{name}_over_{other}": statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            for name, other in (("float", "eager"), ("int8", "float"))
        }
        figures |= {f"{name}_ms": round(1000 * statistics.median(each), 3) for name, each in times.items()}
        figures |= {f"{name}_fastest_ms": round(1000 * min(each), 3) for name, each in times.items()}
        figures |= {name: round(value, 4) for name, value in ratio.items()}
        figures |= {"float_bytes": graph.stat().st_size, "int8_bytes": small.stat().st_size}
        figures["int8_size_ratio"] = round(small.stat().st_size / graph.stat().st_size, 4)
        graphs = {"float": graph, "int8": small}
        if options.pairs:
            figures |= accuracy(graphs, read_faces(options.data), read_lfw_pairs(options.pairs))
        if options.groups:
            figures |= between_groups(graphs, read_faces(options.groups))
        photo = options.photo or Path(folder) / "crop.png"
        if options.photo is None:
            Image.fromarray(calibration[0].permute(1, 2, 0).contiguous().numpy()).save(photo)
        start = started(graph, photo, options.detector)
        figures["start_to_embedding_seconds"], figures["start_to_embedding_cpu_seconds"] = start
        figures["start_with_detector"] = options.detector is not None
    for name, value in figures.items():
        print(f"{name:34}{value}")
    setup = {"torch": torch.__version__, "threads": 1, "vnni": _vnni(), "platform": platform.machine()}
    path = ROOT / "benchmarks" / "results" / ("export_untrained.json" if options.weights is None else "export.json")
    path.write_text(json.dumps(setup | figures, indent=1) + "\n", encoding="utf-8")


def _vnni() -> bool | None:
    """Whether the processor has int8 dot products (VNNI); None if the system does not state it."""
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None


if __name__ == "__main__":
    main()
