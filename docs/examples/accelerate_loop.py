"""A training loop with accelerate: the same file runs on the CPU, on one GPU and on several (`accelerate launch`)."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdlib import OUTPUT, AngularDistillLoss, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term


def network(width: int) -> nn.Sequential:
    layers = [nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 8))


def build() -> Distiller:
    taps = {"hidden": "3", "embedding": OUTPUT}
    terms = {
        "angle": Term(AngularDistillLoss(form="cosine"), student="embedding", teacher="embedding"),
        "hint": Term(HintLoss(), student="hidden", teacher="hidden", project="auto", weight=0.5),
    }
    teacher = TeacherAdapter(network(64).eval(), taps)
    return Distiller(StudentAdapter(network(16), taps), {"big": teacher}, Objective(terms))


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    distiller = build().infer(torch.randn(2, 12))  # the projections exist before the optimizer
    optimizer = torch.optim.AdamW(distiller.trainable_parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(torch.randn(1024, 12)), batch_size=32, shuffle=True)
    # Teachers move to the device together with the distiller, but are neither wrapped nor synchronized.
    distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)

    distiller.train()
    means = []
    for epoch in range(8):
        totals = []
        for (inputs,) in loader:
            with accelerator.accumulate(distiller):
                output = distiller(inputs)
                accelerator.backward(output.total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(distiller.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            totals.append(output.total.detach())
        means.append(accelerator.gather(torch.stack(totals)).mean().item())
        accelerator.print(f"epoch {epoch}: loss {means[-1]:.4f}")

    plain = accelerator.unwrap_model(distiller)
    accelerator.print(f"weights to save: {', '.join(plain.state_dict())}")
    accelerator.print(f"loss: {means[0]:.4f} -> {means[-1]:.4f}")


if __name__ == "__main__":
    main()
