"""A ResNet teaches a network with depthwise separable convolutions: labels, soft targets and attention maps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdlib import (
    OUTPUT,
    AttentionTransferLoss,
    Distiller,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    TrainConfig,
    train,
)

CLASSES = 8


class ResidualBlock(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inside, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1), nn.BatchNorm2d(out))
        self.shortcut = nn.Conv2d(inside, out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def separable_block(inside: int, out: int) -> nn.Module:
    depthwise = nn.Conv2d(inside, inside, 3, 2, 1, groups=inside)
    return nn.Sequential(
        depthwise, nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, out, 1), nn.BatchNorm2d(out), nn.ReLU()
    )


def make_images(count: int, seed: int) -> TensorDataset:
    """Noisy stripes at a random position; the class is their direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle, shift = labels * torch.pi / CLASSES, 6.3 * torch.rand(count, generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    across = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    stripes = (0.8 * across + shift[:, None, None]).sin()[:, None].expand(-1, 3, -1, -1)
    return TensorDataset(stripes + 1.5 * torch.randn(count, 3, 32, 32, generator=generator), labels)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    images, labels = data.tensors
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    teacher = nn.Sequential(ResidualBlock(3, 32), ResidualBlock(32, 64), *head, nn.Linear(64, CLASSES))
    student = nn.Sequential(separable_block(3, 12), separable_block(12, 24), *head, nn.Linear(24, CLASSES))
    loader = DataLoader(make_images(1024, seed=0), batch_size=64, shuffle=True)
    new = make_images(512, seed=1)

    # The module "1" is the last block of both networks. `OUTPUT` is what a network returns.
    taps = {"map": "1", "logits": OUTPUT}
    labels = Term(nn.CrossEntropyLoss(), student="logits", target="target")
    config = TrainConfig(epochs=4, lr=0.05)
    train(Distiller(StudentAdapter(teacher, taps), {}, Objective({"labels": labels})), loader, config)
    print(f"accuracy of the teacher: {accuracy(teacher, new):.3f}")

    terms = {
        "labels": labels,
        "soft": Term(SoftTargetLoss(temperature=4.0), student="logits", teacher="logits"),
        "attention": Term(AttentionTransferLoss(), student="map", teacher="map", weight=10.0),
    }
    before = accuracy(student, new)
    distiller = Distiller(StudentAdapter(student, taps), {"resnet": TeacherAdapter(teacher, taps)}, Objective(terms))
    train(distiller, loader, config, hooks=[lambda event: event.step % 16 or print(event.step, event.terms)])
    print(f"accuracy of the student: {before:.3f} -> {accuracy(student, new):.3f}")


if __name__ == "__main__":
    main()
