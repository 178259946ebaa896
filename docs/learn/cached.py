"""Cached teachers with augmentation on handwritten digits: compute the teacher's outputs once per view."""

import tempfile

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tutorial import Lesson, Row, accuracy, count, digits, dots, fit, main

from kdlib import (
    OUTPUT,
    CachedTeacher,
    Distiller,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    TeacherCache,
    Term,
    TrainConfig,
    train,
)

TAPS = {"logits": OUTPUT}
IMAGES = 100


def network(width: int) -> nn.Sequential:
    body = [nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)]
    return nn.Sequential(*body, nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten(), nn.Linear(8 * width, 10))


# [view]
def view_of(image: Tensor, sample: int, view: int) -> Tensor:
    """The image (view 0), or the image rotated, shifted and resized at random: the same for the same two numbers."""
    if view == 0:
        return image
    generator = torch.Generator().manual_seed(1000 * sample + view)
    angle, zoom, right, down = (torch.rand(4, generator=generator) - 0.5).tolist()
    turn = torch.tensor(0.5 * angle)
    scale = 1 + 0.3 * zoom
    matrix = [
        [scale * turn.cos(), -scale * turn.sin(), 0.4 * right],
        [scale * turn.sin(), scale * turn.cos(), 0.4 * down],
    ]
    grid = F.affine_grid(torch.tensor(matrix)[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]


# [dataset]
class Views(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Each image in each view, with the numbers by which a cache finds the teacher's output."""

    def __init__(self, images: Tensor, views: int) -> None:
        samples = range(len(images))
        self.pictures = torch.stack([view_of(images[i], i, view) for i in samples for view in range(views)])
        self.views = views

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        sample, view = divmod(row, self.views)
        return self.pictures[row], {"sample": torch.tensor(sample), "view": torch.tensor(view)}


# [cache]
def build_cache(folder: str, teacher: nn.Module, images: Tensor, views: int) -> TeacherCache:
    def fetch(samples: Tensor, view: int) -> Tensor:
        return torch.stack([view_of(images[i], i, view) for i in samples.tolist()])

    adapter = TeacherAdapter(teacher, TAPS)
    return TeacherCache.build(folder, adapter, fetch, samples=len(images), views=views, data=f"digits, {views} views")


# [distill]
def distill(teacher: nn.Module, images: Tensor, views: int, *, steps: int, seed: int) -> tuple[nn.Module, int]:
    """Train a student from a cache; return it and the number of images that the teacher computed."""
    torch.manual_seed(100 + seed)
    student = network(8)
    with tempfile.TemporaryDirectory() as folder:
        cached = CachedTeacher(build_cache(folder, teacher, images, views))
        soft = Term(SoftTargetLoss(temperature=4.0), student="logits", teacher="logits")
        distiller = Distiller(StudentAdapter(student, TAPS), {"large": cached}, Objective({"soft": soft}))
        loader = DataLoader(Views(images, views), batch_size=50, shuffle=True, drop_last=True)
        config = TrainConfig(max_steps=steps, optimizer="adamw", lr=1e-2, warmup_steps=20, seed=seed)
        train(distiller, loader, config)
    return student, len(images) * views


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (60, 1) if quick else (400, 3)
    images, labels, *new = digits(1000)
    rows: dict[str, list[float]] = {}
    numbers: dict[str, float] = {"images that a live teacher computes": 50 * steps}
    for seed in range(seeds):
        torch.manual_seed(seed)
        teacher = network(16)
        label = Term(nn.CrossEntropyLoss(), student="logits", target="target")
        fit(
            Distiller(StudentAdapter(teacher, TAPS), {}, Objective({"l": label})),
            images,
            labels,
            steps=steps,
            seed=seed,
        )
        rows.setdefault("teacher", []).append(accuracy(teacher, *new))
        for views in (1, 4, 16):
            student, computed = distill(teacher, images[:IMAGES], views, steps=steps, seed=seed)
            name = f"student, {views} views" if views > 1 else "student, the images alone"
            rows.setdefault(name, []).append(accuracy(student, *new))
            numbers[f"images that the teacher computes, {views} views"] = computed
    sizes = {"teacher": count(network(16)), "student": count(network(8))}
    measured = [Row(name, values, sizes[name.split(",")[0]]) for name, values in rows.items()]
    return Lesson("accuracy, %", measured, numbers=numbers)


def draw(figure: Figure, lesson: Lesson) -> None:
    dots(figure, lesson)


if __name__ == "__main__":
    main(__file__, run, draw)
