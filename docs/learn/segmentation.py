"""Distill a segmentation network on synthetic shapes, with few labeled images and a border without labels."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tutorial import Lesson, Row, count, dots, main

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term, TrainConfig, train

CLASSES, IGNORED, SIZE, LABELED = 4, 255, 32, 12


# [network]
class SegmentationNetwork(nn.Module):
    """Logits `(b, 4, 32, 32)` from two resolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        coarse = [nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()]
        middle = [nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()]
        deep = [nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width), nn.ReLU()]
        self.coarse = nn.Sequential(*coarse, *middle, *deep)
        self.head = nn.Conv2d(3 * width, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        coarse = F.interpolate(self.coarse(fine), scale_factor=4, mode="bilinear")
        return self.head(torch.cat([fine, coarse], dim=1))


# [data]
def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images with a disk, a square and a cross, and the class of each pixel; the border has no label."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    classes = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for pixels in classes:
        for kind in (torch.randperm(3, generator=generator) + 1).tolist():
            across, down = torch.randint(7, SIZE - 7, (2,), generator=generator).tolist()
            dx, dy = (x - across).abs(), (y - down).abs()
            inside = {
                1: dx**2 + dy**2 < 36,
                2: torch.maximum(dx, dy) < 6,
                3: (torch.minimum(dx, dy) < 2) & (dx + dy < 9),
            }
            pixels[inside[kind]] = kind
    images = (classes > 0).float()[:, None] + 0.3 * torch.randn(count, 1, SIZE, SIZE, generator=generator)
    classes[:, [0, -1]] = classes[:, :, [0, -1]] = IGNORED
    return images, classes


class Pixels(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        classes = self.classes[row]
        return self.images[row], {"classes": classes, "inside": self.inside}

    @property
    def inside(self) -> Tensor:
        """True for the pixels that the soft targets compare: all but the border."""
        inside = torch.ones(SIZE, SIZE, dtype=torch.bool)
        inside[[0, -1]] = inside[:, [0, -1]] = False
        return inside


# [measure]
@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """Intersection over union of each class, averaged, in percent; pixels without a label do not count."""
    shown, known = model.eval()(images).argmax(1), classes != IGNORED
    scores = []
    for kind in range(CLASSES):
        found, there = (shown == kind) & known, classes == kind
        scores.append((found & there).sum().item() / max((found | there).sum().item(), 1))
    return 100 * sum(scores) / CLASSES


# [terms]
TAPS = {"logits": OUTPUT}


def terms(*names: str) -> dict[str, Term]:
    every = {
        "labels": Term(nn.CrossEntropyLoss(ignore_index=IGNORED), student="logits", target="classes"),
        "soft": Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits", mask="inside"),
    }
    return {name: every[name] for name in names}


def fit(
    model: nn.Module, teachers: dict[str, nn.Module], used: dict[str, Term], data: Pixels, steps: int, seed: int
) -> None:
    adapters = {name: TeacherAdapter(teacher, TAPS) for name, teacher in teachers.items()}
    distiller = Distiller(StudentAdapter(model, TAPS), adapters, Objective(used))
    loader = DataLoader(data, batch_size=12, shuffle=True, drop_last=True)
    train(distiller, loader, TrainConfig(max_steps=steps, optimizer="adamw", lr=1e-2, warmup_steps=10, seed=seed))


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (40, 1) if quick else (250, 3)
    images, classes = shapes(240, seed=0)
    new = shapes(100, seed=1)
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        models = {}
        torch.manual_seed(seed)
        models["teacher, 240 labeled images"] = teacher = SegmentationNetwork(16)
        fit(teacher, {}, terms("labels"), Pixels(images, classes), steps, seed)
        runs = (
            ("student alone, 12 labeled images", (), ("labels",), LABELED),
            ("student distilled, no labels", ("large",), ("soft",), len(images)),
        )
        for name, teachers, used, number in runs:
            torch.manual_seed(100 + seed)
            models[name] = student = SegmentationNetwork(4)
            given = dict.fromkeys(teachers, teacher)
            fit(student, given, terms(*used), Pixels(images[:number], classes[:number]), steps, seed)
        for name, model in models.items():
            rows.setdefault(name, []).append(mean_iou(model, *new))
    alone, distilled = list(rows.values())[1:]
    rows["distilled minus alone"] = [a - b for a, b in zip(distilled, alone, strict=True)]
    sizes = {name: count(model) for name, model in models.items()}
    return Lesson("mean IoU, %", [Row(name, values, sizes.get(name)) for name, values in rows.items()])


def draw(figure: Figure, lesson: Lesson) -> None:
    dots(figure, lesson)


if __name__ == "__main__":
    main(__file__, run, draw, size=(7.0, 2.2))
