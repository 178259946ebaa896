"""The deployment section of the demo's report."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdlib import OUTPUT, StudentAdapter
from kdlib_faces._checks import InputError
from kdlib_faces.backbones import MobileFaceNet, save_backbone
from kdlib_faces.demo import deployment as section
from kdlib_faces.demo.data import DemoData, native_model
from kdlib_faces.evaluation import LeaveOneOutProtocol, PairProtocol
from kdlib_faces.evaluation.summary import DataSummary, ModelEntry
from kdlib_faces.harness.image_sets import images_of_tensor
from kdlib_faces.harness.panel import summarize
from kdlib_faces.harness.tasks import EvaluationTask, task_of_protocol
from kdlib_faces.report import DeployedForm, Deployment, Report, RuntimeRow, read, write
from tests.faces.exported import scramble

SIZE = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Deployment, list[EvaluationTask], np.ndarray]:
    """The section for an untrained student, its protocols, and its embeddings."""
    folder = tmp_path_factory.mktemp("deployment")
    network = scramble(MobileFaceNet(embedding_dim=16, width=0.25, input_size=SIZE))
    save_backbone(network, folder / "student.safetensors")
    images = torch.randint(0, 256, (40, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    identities = np.arange(40) // 4
    data = DemoData("t", images, identities, 10, images, identities, DataSummary())
    held = images_of_tensor("test", images, [""] * 40)
    pairs = PairProtocol([0, 4, 8, 0, 4, 8], [1, 5, 9, 4, 8, 0], [True] * 3 + [False] * 3, [0, 1, 2] * 2)
    tasks = [
        task_of_protocol("leave_one_out", "Leave one out", LeaveOneOutProtocol(identities), held),
        task_of_protocol("verification", "Pairs", pairs, held),
    ]
    model = native_model(network, StudentAdapter(network, {"embedding": OUTPUT}), SIZE, "student", 0.0, 0)
    teacher = replace(model, file=folder / "student.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(section, "THREADS", (1,))
        patch.setattr(section, "BATCHES", (1, 2))
        patch.setattr(section, "SECONDS", 0.01)
        rows = model.embed(images)
        first = {task.name: section._first_measure(task, rows) for task in tasks}
        found = section.deploy(
            data, "student", folder / "student.safetensors", {"teacher": teacher, "twin": teacher, "joint": model}, tasks,
            folder / "out", embeddings=rows, measures=first,
        )  # fmt: skip
    return found, tasks, rows


def test_every_form_is_evaluated_and_measured(
    made: tuple[Deployment, list[EvaluationTask], np.ndarray],
) -> None:
    found, tasks, rows = made
    eager, floats, int8 = found.forms
    assert [form.form for form in found.forms] == [section.EAGER, section.FLOAT, section.INT8]
    wanted = tasks[0].evaluate({"test": rows}).summary().measures["rank1"].value
    assert floats.measures["leave_one_out"].value == wanted
    assert eager.measures.keys() == floats.measures.keys() == int8.measures.keys() == {"leave_one_out", "verification"}
    assert "The network of the twin has the size of that of the teacher." in found.notes
    assert eager.cosine is None
    assert floats.cosine == pytest.approx(1, abs=1e-4)
    assert int8.cosine is not None
    assert 0.8 < int8.cosine < 1
    settings = [(row.model, row.form, row.threads, row.batch) for row in found.runtimes]
    forms = [("student", form) for form in (section.EAGER, section.FLOAT, section.INT8)] + [("teacher", section.EAGER)]
    assert settings == [(*form, 1, batch) for form in forms for batch in (1, 2)]
    assert all((row.milliseconds or 0) > 0 and (row.file_mib or 0) > 0 for row in found.runtimes)
    sizes = {row.form: row.file_mib or 0 for row in found.runtimes if row.model == "student"}
    assert sizes[section.INT8] < 0.6 * sizes[section.FLOAT]


def test_the_section_is_written_to_both_pages_and_read_again(
    made: tuple[Deployment, list[EvaluationTask], np.ndarray], tmp_path: Path
) -> None:
    found, tasks, rows = made
    summaries = [summarize(task, {"student": task.evaluate({"test": rows})}, None) for task in tasks]  # type: ignore[arg-type]  # one model: nothing is resampled
    models = {"student": ModelEntry("student"), "teacher": ModelEntry("teacher")}
    write(tmp_path, Report("t", models, evaluations=summaries, deployment=found))
    assert read(tmp_path / "report.json").deployment == found
    page, text = ((tmp_path / f"report.{kind}").read_text("utf-8") for kind in ("html", "md"))
    assert '<a href="#deployment">Deployment</a>' in page
    section_ = page.split('<section id="deployment">')[1].split("</section>")[0]
    assert section_.count("<tr>") == 2 + len(found.forms) + len(found.runtimes)
    for words in ("Cosine to the network", "Peak memory, MiB", "onnxruntime, int8", found.machine):
        assert words in section_
        assert words in text


@pytest.mark.parametrize(
    ("deployment", "message"),
    [
        (Deployment("m", [DeployedForm("other", "f")]), r"run\.deployment\.forms\[0\]\.model must be among student"),
        (
            Deployment("m", runtimes=[RuntimeRow("student", "f", 1, 1, -1.0)]),
            r"runtimes\[0\]\.milliseconds must be >= 0",
        ),
        (Deployment("m", [DeployedForm("student", "f", cosine=2.0)]), r"forms\[0\]\.cosine must be from -1 to 1"),
    ],
)
def test_wrong_values_are_refused(deployment: Deployment, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path, Report("t", {"student": ModelEntry("student")}, deployment=deployment))
    assert not (tmp_path / "report.json").exists()


def test_a_form_that_cannot_be_exported_is_noted(
    made: tuple[Deployment, list[EvaluationTask], np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise InputError("reading an ONNX file needs onnx")

    network = scramble(MobileFaceNet(embedding_dim=16, width=0.25, input_size=SIZE))
    save_backbone(network, tmp_path / "student.safetensors")
    images = torch.zeros(4, 3, SIZE, SIZE, dtype=torch.uint8)
    data = DemoData("t", images, np.zeros(4, np.int64), 1, images, np.zeros(4, np.int64), DataSummary())
    monkeypatch.setattr(section, "export_onnx", refuse)
    monkeypatch.setattr(section, "measure", lambda *_, **__: [])
    file, rows = tmp_path / "student.safetensors", np.ones((4, 1), np.float32)
    found = section.deploy(data, "student", file, {}, [], tmp_path, embeddings=rows, measures={})
    assert [form.form for form in found.forms] == [section.EAGER]
    assert found.notes[-1] == "Not every form could be exported: reading an ONNX file needs onnx."
