"""The commands `kdlib-faces embed` and `compare`: embeddings of images, and the comparison of two."""

import csv
import io
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdlib._atomic import atomic_write
from kdlib_faces._checks import InputError
from kdlib_faces._hardware import Hardware, autocast
from kdlib_faces._output import check_output
from kdlib_faces.commands._options import one_process
from kdlib_faces.commands.photographs import faces_of_photographs
from kdlib_faces.commands.thresholds import choose_threshold, read_evaluation
from kdlib_faces.data.lists import read_faces
from kdlib_faces.evaluation.embedding import embed_batch
from kdlib_faces.harness.embeddings import OpenedModel, embed_set, open_model
from kdlib_faces.harness.image_sets import ImageSet, images_of_source
from kdlib_faces.progress import say
from kdlib_faces.teachers.input_options import inputs_of_models
from kdlib_faces.teachers.onnx.graph import read_graph
from kdlib_faces.teachers.onnx.metadata import read_metadata

__all__ = ["compare", "main"]


def main(options: Namespace, command: str) -> None:
    """Write the embeddings of images as `embeddings.npy` (n, d) of unit length, and `images.csv` with a row for each."""
    output: Path = options.output
    check_output(output, "embeddings.npy", "images.csv", "work")
    hardware = one_process("embed", options.device)
    model = _open(options, hardware)
    files = [path for path in map(Path, options.images) if path.is_file() and path.suffix.lower() != ".csv"]
    lists = [path for path in map(Path, options.images) if path not in files]
    if options.detector is not None and lists:
        raise InputError(
            f"embed: --detector applies to single photographs, got {lists[0]}; make crops of a folder with kdlib-faces align"
        )
    faces = read_faces(lists, on_error=options.on_error, unlabeled=True) if lists else None
    sets = [_photographs(files, options, hardware)] if files else []
    named = [(str(path), "") for path in files]
    if faces is not None:
        sets.append(images_of_source("faces", faces.images))
        names = [faces.identity_names[code] if code >= 0 else "" for code in faces.identities.tolist()]
        named += [(faces.images.name(row), name) for row, name in enumerate(names)]
    work, show = output / "work", not options.quiet
    parts = [
        embed_set(
            model, each, work, flip=options.flip, progress=show, hardware=hardware, amp=options.amp or "none",
            workers=options.workers,
        )
        for each in sets
    ]  # fmt: skip
    rows = np.concatenate(parts)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("row", "path", "identity"))
    writer.writerows((row, path, name) for row, (path, name) in enumerate(named))
    with atomic_write(output / "images.csv") as stream:
        stream.write(table.getvalue().encode("utf-8", "backslashreplace"))
    with atomic_write(output / "embeddings.npy") as stream:
        np.save(stream, rows)
    say(f"embeddings: {output / 'embeddings.npy'}, {len(rows):,} x {rows.shape[1]}", quiet=options.quiet)


def compare(options: Namespace, command: str) -> None:
    """Print the cosine of two images and, where thresholds are known, whether they show the same identity."""
    hardware = one_process("compare", options.device)
    model = _open(options, hardware)
    pair = _photographs([Path(options.first), Path(options.second)], options, hardware)
    with autocast(hardware.device, options.amp or "none"):
        first, second = (_embedding(model, pair, row, options.flip, hardware.device) for row in range(2))
    score = float(first @ second)
    print(f"score      {score:.4f} (cosine, -1 to 1)")
    thresholds: object = None
    where = str(options.model)
    if options.evaluation:
        thresholds, where = read_evaluation(options.evaluation, options.model).thresholds, options.evaluation
    elif options.model.suffix.lower() == ".onnx":
        thresholds = read_metadata(read_graph(options.model).model).get("thresholds")
    if thresholds is None:
        print("decision   none: no thresholds are known; give --evaluation report.json, or a model exported with it")
        return
    threshold = choose_threshold(thresholds, options.far, where)
    print(f"threshold  {threshold:.4f} at FAR {options.far:g}, from the protocol {_protocol(thresholds)}")
    print(f"decision   {'same identity' if score > threshold else 'different identities'}")


def _open(options: Namespace, hardware: Hardware) -> OpenedModel:
    (input_options,) = inputs_of_models(options.input, 1)
    return open_model(
        options.model, None, input_options, device=hardware.device, compile=options.compile, quiet=options.quiet
    )


def _photographs(files: list[Path], options: Namespace, hardware: Hardware) -> ImageSet:
    return faces_of_photographs("images", files, options.detector, options.several, hardware.device)


def _protocol(thresholds: object) -> str:
    return str(thresholds.get("protocol", "unknown")) if isinstance(thresholds, dict) else "unknown"


def _embedding(model: OpenedModel, images: ImageSet, row: int, flip: bool, device: torch.device) -> NDArray[np.float32]:
    """The embedding (d,) of one crop, of unit length."""
    embedding = embed_batch(model.module, images.decode([row], model.size).to(device), flip=flip)[0]
    length = float(np.linalg.norm(embedding))
    if not np.isfinite(length) or length == 0:
        raise InputError(f"{images.label(row)}: the model returns no direction for this image")
    unit: NDArray[np.float32] = embedding / length
    return unit
