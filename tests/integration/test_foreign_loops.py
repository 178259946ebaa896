"""kdlib in plain PyTorch, Lightning and accelerate loops: the student learns and the teacher stays fixed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, AngularDistillLoss, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term

pytestmark = [
    # Warnings of these packages about themselves and about the machine.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate"),
]


def distiller() -> Distiller:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        teacher = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
        terms = {
            "angle": Term(AngularDistillLoss(form="cosine"), student="out", teacher="out"),
            "hint": Term(HintLoss(), student="middle", teacher="middle", project="auto", weight=0.1),
        }
        made = Distiller(
            StudentAdapter(student, {"out": OUTPUT, "middle": "0"}),
            {"big": TeacherAdapter(teacher, {"out": OUTPUT, "middle": "0"})},
            Objective(terms),
        )
        made.infer(torch.randn(8, 6), {})  # creates the projections before the optimizer collects the parameters
    return made


def loader() -> "DataLoader[tuple[Tensor, ...]]":
    images = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(images), batch_size=16)


def loss_of(made: Distiller) -> float:
    made.eval()
    with torch.no_grad():
        return sum(float(made(images, {}).total) for (images,) in loader())


@pytest.fixture
def checked() -> Iterator[Distiller]:
    """A distiller whose loss must decrease and whose teacher must not change."""
    made = distiller()
    teacher = made.teachers["big"]
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    loss = loss_of(made)
    yield made
    assert loss_of(made) < 0.8 * loss
    after: dict[str, Tensor] = teacher.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_plain_loop(checked: Distiller) -> None:
    optimizer = torch.optim.Adam(checked.trainable_parameters(), lr=1e-2)
    for _ in range(10):
        checked.train()
        for (images,) in loader():
            optimizer.zero_grad()
            checked(images, {}).total.backward()
            optimizer.step()


def test_a_lightning_module(checked: Distiller, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Distilled(lightning.LightningModule):  # type: ignore[misc, name-defined]  # known at run time only
        def __init__(self) -> None:
            super().__init__()
            self.distiller = checked

        def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
            output = self.distiller(batch[0], {})
            self.log_dict({name: value.detach() for name, value in output.terms.items()})
            total: Tensor = output.total
            return total

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.distiller.trainable_parameters(), lr=1e-2)

    trainer = lightning.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    module = Distilled()
    trainer.fit(module, loader())
    assert set(trainer.callback_metrics) == {"angle", "hint"}
    (saved,) = tmp_path.rglob("*.ckpt")
    names = torch.load(saved, weights_only=True)["state_dict"]
    assert any(name.startswith("distiller.student.") for name in names)
    assert any(name.startswith("distiller.objective.projections.") for name in names)
    assert not any("teacher" in name.split(".")[1] for name in names)
    again = Distilled()
    again.load_state_dict(names)


def test_an_accelerate_loop(checked: Distiller) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.Adam(checked.trainable_parameters(), lr=1e-2)
    made, optimizer, batches = accelerator.prepare(checked, optimizer, loader())
    for _ in range(10):
        made.train()
        for (images,) in batches:
            optimizer.zero_grad()
            accelerator.backward(made(images, {}).total)
            optimizer.step()
    assert not any(name.startswith("teachers") for name in accelerator.unwrap_model(made).state_dict())
