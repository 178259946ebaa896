"""The exported forms of the demo's distilled student, for the report."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from kdlib_faces._checks import InputError
from kdlib_faces.data.images import to_float
from kdlib_faces.demo.data import DemoData, DemoModel
from kdlib_faces.evaluation import embed_images
from kdlib_faces.evaluation.summary import MeasuredValue
from kdlib_faces.export import export_onnx, quantize_onnx
from kdlib_faces.export.measure import Measurement, measure
from kdlib_faces.harness.tasks import EvaluationTask
from kdlib_faces.progress import say
from kdlib_faces.report import DeployedForm, Deployment, RuntimeRow
from kdlib_faces.teachers import OnnxTeacher, load_teacher

__all__ = ["deploy"]

THREADS, BATCHES = (1, 2), (1, 32)
SECONDS = 0.1
"""Time for the repetitions of one setting."""
CALIBRATION = 256
"""Training images on which the ranges of the int8 form are measured."""
MIN_COSINE = 0.9
"""A short training leaves a student that int8 changes more than a finished one; the report states its accuracy."""
EAGER, COMPILED, FLOAT, INT8 = "torch, eager", "torch, compiled", "onnxruntime, float32", "onnxruntime, int8"


def deploy(
    data: DemoData,
    student: str,
    file: Path,
    teachers: Mapping[str, DemoModel],
    tasks: Sequence[EvaluationTask],
    folder: Path,
    *,
    embeddings: NDArray[np.float32],
    measures: Mapping[str, MeasuredValue],
    compiled: bool = False,
    quiet: bool = True,
) -> Deployment:
    """Export the student, evaluate its forms by the protocols of the report, and measure their time and memory.

    Args:
        data: Data of the demo; int8 is calibrated on its training images.
        student: Name of the student in the report.
        file: File of the student.
        teachers: Name to model; those with a file are measured as well.
        tasks: Protocols on the image set `"test"`.
        folder: Folder of the exported files.
        embeddings: Unit embeddings of the test images by the student in torch.
        measures: Name of each protocol to the first measure of these embeddings.
        compiled: Also measure the student under `torch.compile`.
        quiet: Show no progress.
    """
    say("exporting and measuring the distilled student", quiet=quiet)
    folder.mkdir(parents=True, exist_ok=True)
    notes = [
        "Median time of a forward on random images. Every form was measured in a process of its own; the memory includes the "
        "runtime. Another load of the machine during the measurement changes the times.",
        "A network in torch with several threads is measured in one process.",
    ]
    files = {EAGER: file}
    try:
        sample = to_float(data.train_images[:8])
        files[FLOAT] = export_onnx(load_teacher(file), folder / "student.onnx", images=sample)
        step = max(1, len(data.train_images) // CALIBRATION)
        calibration = data.train_images[::step][:CALIBRATION]
        files[INT8] = quantize_onnx(files[FLOAT], calibration, folder / "student_int8.onnx", min_cosine=MIN_COSINE)
        notes.append(f"The ranges of int8 were measured on {len(calibration)} training images.")
    except InputError as error:
        notes.append(f"Not every form could be exported: {error}.")
    forms = [DeployedForm(student, EAGER, dict(measures))]
    for form, path in list(files.items())[1:]:
        rows = _embeddings(OnnxTeacher(path), data)
        cosine = float((rows * embeddings).sum(axis=1).mean())
        forms.append(DeployedForm(student, form, {task.name: _first_measure(task, rows) for task in tasks}, cosine))
    runtimes = _runtimes(student, files, compiled=compiled)
    sizes: dict[tuple[int | None, float | None], str] = {}
    for name, teacher in teachers.items():
        size = teacher.entry.parameters, teacher.entry.macs
        if teacher.file is None:
            continue
        if size in sizes:
            notes.append(f"The network of the {_words(name)} has the size of that of the {_words(sizes[size])}.")
            continue
        sizes[size] = name
        form = FLOAT if teacher.file.suffix.lower() == ".onnx" else EAGER
        runtimes += _runtimes(name, {form: teacher.file}, compiled=False)
    return Deployment(_machine(), forms, runtimes, notes)


def _embeddings(model: torch.nn.Module, data: DemoData) -> NDArray[np.float32]:
    """Unit embeddings of the test images, as those of the report."""
    rows = embed_images(model, data.test_images, batch_size=128, normalize=False)
    unit: NDArray[np.float32] = F.normalize(torch.from_numpy(rows), dim=1).numpy()
    return unit


def _words(name: str) -> str:
    return name.replace("_", " ")


def _first_measure(task: EvaluationTask, rows: NDArray[np.float32]) -> MeasuredValue:
    result = task.evaluate({"test": rows})
    return result.summary().measures[next(iter(result.describe().measures))]


def _runtimes(model: str, files: Mapping[str, Path], *, compiled: bool) -> list[RuntimeRow]:
    engines = ("eager", "onnxruntime", *(["compiled"] if compiled else []))
    rows = []
    for form, path in files.items():
        found = measure([path], threads=THREADS, batches=BATCHES, seconds=SECONDS, engines=engines)
        rows += [_row(model, COMPILED if each.engine == "compiled" else form, each) for each in found]
    return rows


def _row(model: str, form: str, found: Measurement) -> RuntimeRow:
    return RuntimeRow(
        model, form, found.threads, found.batch, found.milliseconds, found.images_per_second, found.peak_mib,
        found.file_mib, found.note,
    )  # fmt: skip


def _machine() -> str:
    """Processor, number of cores, and whether it has int8 dot products where the system states it."""
    name, vnni = platform.machine(), ""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip() or name
            break
    if text and platform.machine() == "x86_64":
        vnni = ", with int8 dot products (VNNI)" if "vnni" in text else ", without int8 dot products (VNNI)"
    return f"{name}, {os.cpu_count() or 1} cores{vnni}"
