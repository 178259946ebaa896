"""A Distiller as part of a LightningModule: metrics, a checkpoint without teachers, and the student on its own."""

import tempfile
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, Distiller, HintLoss, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term
from kdlib.schedules import cosine


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))


def build() -> Distiller:
    taps = {"hidden": "2", "logits": OUTPUT}
    terms = {
        "soft": Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits"),
        "hint": Term(
            HintLoss(), student="hidden", teacher="hidden", project="auto", weight=cosine(1.0, 0.1, steps=100)
        ),
    }
    teacher = TeacherAdapter(network(64), taps)
    return Distiller(StudentAdapter(network(16), taps), {"big": teacher}, Objective(terms))


class Distillation(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.distiller = build()
        # Creates the projections of `project="auto"`: their parameters must exist before the optimizer.
        self.distiller.infer(torch.zeros(2, 12))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        output = self.distiller(inputs, step=self.global_step)
        self.log_dict({name: value.detach() for name, value in output.terms.items()})
        return output.total

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (inputs,) = batch
        student, teachers = self.distiller.features(inputs)
        same = student["logits"].argmax(1) == teachers["big"]["logits"].argmax(1)
        self.log("agreement", same.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.distiller.trainable_parameters(), lr=1e-2)


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(torch.randn(512, 12)), batch_size=32, shuffle=True)
    validation = DataLoader(TensorDataset(torch.randn(512, 12)), batch_size=128)
    module = Distillation()
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=8, accelerator="cpu", default_root_dir=folder, **quiet)
        (before,) = trainer.validate(module, validation, verbose=False)
        trainer.fit(module, loader, validation)
        (checkpoint,) = Path(folder).rglob("*.ckpt")
        weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    print(f"weights in the checkpoint: {', '.join(weights)}")
    print("metrics:", ", ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items()))
    after = trainer.callback_metrics["agreement"]
    print(f"agreement with the teacher: {before['agreement']:.3f} -> {after:.3f}")

    student = module.distiller.student.model  # the plain network, without kdlib around it
    print(f"logits of the student: {tuple(student(torch.zeros(1, 12)).shape)}")


if __name__ == "__main__":
    main()
