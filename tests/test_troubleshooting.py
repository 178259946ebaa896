"""The messages on the page of troubleshooting are those that the library prints."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdlib import (
    OUTPUT,
    CachedTeacher,
    Distiller,
    HintLoss,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    TeacherCache,
    Term,
    TrainConfig,
    infer_projection,
    train,
)
from kdlib.functional import hint, rkd_distance, soft_target
from kdlib.schedules import linear_warmup

pytest.importorskip("PIL", reason="the faces extra is not installed")
from kdlib_faces.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
MESSAGES = [
    " ".join(text.split()) for text in re.findall(r"^```text\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
]

TAPS = {"out": OUTPUT}
KD = {"kd": Term(SoftTargetLoss(), student="out", teacher="out")}
AUTO = {"h": Term(HintLoss(), student="out", teacher="out", project="auto")}
CE = Term(nn.CrossEntropyLoss(), student="out", target="target")


class Part(nn.Module):
    """Returns a dict, and has a head that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden": self.body(x)}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.relu(x) + 1)


class View(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1)


def distiller(terms: dict[str, Term], student: nn.Module | None = None, width: int = 5) -> Distiller:
    teachers = {"big": TeacherAdapter(nn.Linear(4, width), TAPS)}
    return Distiller(StudentAdapter(student or nn.Linear(4, 5), TAPS), teachers, Objective(terms))


def fit(terms: dict[str, Term], batch: object, student: nn.Module | None = None) -> None:
    train(distiller(terms, student), [batch], TrainConfig(epochs=1, lr=0.1))


def tapped(model: nn.Module, tap: Any, name: str = "logits") -> None:
    StudentAdapter(model, {name: tap})(torch.randn(2, 4))


def late_projections() -> None:
    distiller(AUTO, width=8).load_state_dict(distiller(AUTO, width=8).infer(torch.randn(2, 4)).state_dict())


def other_settings() -> None:
    same = distiller(KD)
    for lr in (0.1, 0.01):
        train(same, [(torch.randn(2, 4), {})], TrainConfig(epochs=1, lr=lr, checkpoint_dir="run"))


def cached_without_ids() -> None:
    teacher = TeacherAdapter(nn.Linear(4, 5), TAPS)
    cache = TeacherCache.build("cache", teacher, lambda samples, view: torch.randn(len(samples), 4), samples=4)
    Distiller(StudentAdapter(nn.Linear(4, 5), TAPS), {"c": CachedTeacher(cache)}, Objective(KD))(torch.randn(2, 4), {})


IN_PYTHON: dict[str, Callable[[], object]] = {
    "path": lambda: StudentAdapter(nn.ModuleDict({"layer1": nn.ReLU(), "layer2": nn.ReLU()}), {"map": "layer3"}),
    "in place": lambda: tapped(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), "0", "map"),
    "did not fire": lambda: tapped(Part(), "head"),
    "twice": lambda: tapped(Twice(), "relu", "l"),
    "no tensor": lambda: tapped(Part(), OUTPUT),
    "width": lambda: hint(torch.randn(2, 4), torch.randn(2, 8)),
    "classes": lambda: soft_target(torch.randn(2, 10), torch.randn(2, 1000)),
    "relation": lambda: rkd_distance(torch.randn(4, 3), torch.randn(4, 3), reduction="none"),
    "argument": lambda: SoftTargetLoss(T=4),  # type: ignore[call-arg]
    "step": lambda: distiller(
        {"kd": Term(SoftTargetLoss(), student="out", teacher="out", weight=linear_warmup(1.0, 10))}
    )(torch.randn(2, 4)),
    "target": lambda: distiller({"ce": Term(nn.CrossEntropyLoss(), student="out", target="label")})(
        torch.randn(2, 4), {"labels": torch.tensor([0, 1])}
    ),
    "prefix tokens": lambda: infer_projection(torch.randn(2, 16, 7, 7), torch.randn(2, 200, 8)),
    "layout": lambda: infer_projection(torch.randn(2, 14, 14, 64), torch.randn(2, 200, 8)),
    "infer": lambda: torch.optim.SGD(distiller(AUTO, width=8).trainable_parameters(), lr=0.1),
    "late projections": late_projections,
    "three items": lambda: fit(KD, (torch.randn(2, 4), torch.zeros(2), torch.zeros(2))),
    "mapping": lambda: fit(KD, {"pixel_values": torch.randn(2, 4), "labels": torch.zeros(2)}),
    "batch of one": lambda: fit(KD, (torch.randn(1, 4), {}), nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))),
    "nan": lambda: fit({"ce": CE, **KD}, (torch.full((2, 4), torch.nan), torch.tensor([1, 2]))),
    "channels last": lambda: View()(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    "other settings": other_settings,
    "cached": cached_without_ids,
}
ON_THE_COMMAND_LINE = {
    "setting": "train --recipe student --data faces.csv --set training.learning_rate=0.1",
    "columns": "train --recipe student --data bad.csv",
    "missing": "train --recipe student --data missing.csv",
    "two teachers": "train --data faces.csv --teacher a.onnx",
    "rows": "evaluate --embeddings mine.npy --data faces.csv --protocol leave_one_out",
    "ages": "evaluate --embeddings mine.npy --data faces.csv --protocol age_gap",
    "pickled": "inspect whole.pt",
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("cause", IN_PYTHON)
def test_an_error_is_printed_as_on_the_page(cause: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        IN_PYTHON[cause]()
    assert " ".join(str(caught.value).split()) in MESSAGES


@pytest.mark.parametrize("cause", ON_THE_COMMAND_LINE)
def test_an_error_of_a_command_is_printed_as_on_the_page(cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in ("1", "2", "3"):
        Image.new("RGB", (16, 16)).save(f"{name}.png")
    Path("faces.csv").write_text("path,identity\n1.png,ann\n2.png,ann\n3.png,bob\n")
    Path("bad.csv").write_text("file,name\n1.png,ann\n")
    Path("missing.csv").write_text("path,identity\nfaces/ann/9.png,ann\n1.png,bob\n")
    np.save("mine.npy", np.ones((5, 8), dtype=np.float32))
    torch.save(nn.Linear(2, 2), "whole.pt")
    assert main(ON_THE_COMMAND_LINE[cause].split()) == 2
    assert capsys.readouterr().err.splitlines()[-1] in MESSAGES


def test_every_message_of_the_page_has_a_case() -> None:
    assert len(set(MESSAGES)) == len(MESSAGES) == len(IN_PYTHON) + len(ON_THE_COMMAND_LINE)
