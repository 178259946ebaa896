"""Three teachers of different quality and one student, which learns how much weight each teacher gets."""

import torch
from torch import Tensor, nn

from kdlib import (
    OUTPUT,
    Distiller,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    UncertaintyWeighting,
)

CLASSES = 6
TAPS = {"logits": OUTPUT}


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))


def make_points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around two centers for each class."""
    centers = 1.3 * torch.randn(2 * CLASSES, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(2 * CLASSES, (count,), generator=generator)
    return centers[chosen] + torch.randn(count, 16, generator=generator), chosen % CLASSES


def trained_on(points: Tensor, labels: Tensor, *, wrong: float) -> TeacherAdapter:
    """A teacher that was trained on labels of which a share is wrong."""
    labels = torch.where(torch.rand(len(labels)) < wrong, torch.randint(CLASSES, (len(labels),)), labels)
    model = network(96)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        optimizer.step()
    return TeacherAdapter(model, TAPS)


def accuracy(model: nn.Module, points: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(points).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    points, labels = make_points(600, seed=1)
    new = make_points(2000, seed=2)
    teachers = {
        name: trained_on(points, labels, wrong=wrong) for name, wrong in (("good", 0), ("fair", 0.5), ("poor", 1))
    }
    for name, teacher in teachers.items():
        print(f"accuracy of the {name} teacher: {accuracy(teacher.model, *new):.3f}")

    # One log-variance per teacher is a parameter: teachers that the student cannot agree with lose weight.
    student = StudentAdapter(network(24), TAPS)
    term = Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits")
    distiller = Distiller(student, teachers, Objective({"soft": term}, UncertaintyWeighting(len(teachers))))
    before = accuracy(student.model, *new)
    optimizer = torch.optim.Adam(distiller.trainable_parameters(), lr=1e-2)
    for step in range(300):
        batch = torch.randint(len(points), (64,))
        output = distiller(points[batch])
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
        if step % 100 == 0 or step == 299:
            weights = output.weights["soft"].mean(dim=1).tolist()  # (k, b): one per teacher and sample
            shown = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(teachers, weights, strict=True))
            print(f"step {step}: soft targets {output.terms['soft']:.3f}, weights {shown}")
    print(f"accuracy of the student: {before:.3f} -> {accuracy(student.model, *new):.3f}")


if __name__ == "__main__":
    main()
