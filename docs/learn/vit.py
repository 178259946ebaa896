"""Distill a vision transformer into a convolutional network on handwritten digits: class token and patch tokens."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tutorial import Lesson, Row, accuracy, count, digits, dots, fit, main

from kdlib import (
    OUTPUT,
    AngularDistillLoss,
    Distiller,
    HintLoss,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
)

WIDTH, LABELED = 32, 100


# [vit]
class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels as 16 tokens, after a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 17, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def convolutional_network() -> nn.Sequential:
    first = [nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


# [taps]
TEACHER_TAPS = {"class_token": "norm[:, 0]", "patches": "norm[:, 1:]", "logits": OUTPUT}
STUDENT_TAPS = {"pooled": "7", "map": "5", "logits": OUTPUT}


# [terms]
def terms(*names: str) -> dict[str, Term]:
    every = {
        "labels": Term(nn.CrossEntropyLoss(), student="logits", target="target"),
        "soft": Term(SoftTargetLoss(temperature=4.0), student="logits", teacher="logits"),
        # A vector of 16 numbers and one of 32: a linear projection is learned.
        "class_token": Term(
            AngularDistillLoss(form="cosine"), student="pooled", teacher="class_token", project="auto", weight=2.0
        ),
        # A map of 16 x 4 x 4 and 16 tokens of 32 numbers: the positions of the map become tokens.
        "patches": Term(HintLoss(), student="map", teacher="patches", project="auto", weight=0.3),
    }
    return {name: every[name] for name in names}


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (80, 1) if quick else (300, 3)
    images, labels, *new = digits(1000)
    variants = {
        "student, soft targets": ("soft",),
        "student, soft targets and class token": ("soft", "class_token"),
        "student, soft targets and patches": ("soft", "patches"),
    }
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        teacher = VisionTransformer()
        alone = Distiller(StudentAdapter(teacher, TEACHER_TAPS), {}, Objective(terms("labels")))
        fit(alone, images, labels, steps=steps, seed=seed)
        rows.setdefault("teacher, 1000 labels", []).append(accuracy(teacher, *new))
        torch.manual_seed(100 + seed)
        student = convolutional_network()
        alone = Distiller(StudentAdapter(student, STUDENT_TAPS), {}, Objective(terms("labels")))
        fit(alone, images[:LABELED], labels[:LABELED], steps=steps, lr=1e-2, seed=seed)
        rows.setdefault(f"student, {LABELED} labels", []).append(accuracy(student, *new))
        for name, used in variants.items():
            torch.manual_seed(100 + seed)
            student = convolutional_network()
            vit = TeacherAdapter(teacher, TEACHER_TAPS)
            distiller = Distiller(StudentAdapter(student, STUDENT_TAPS), {"vit": vit}, Objective(terms(*used)))
            fit(distiller, images, labels, steps=steps, lr=1e-2, seed=seed)
            rows.setdefault(name, []).append(accuracy(student, *new))
    sizes = {"teacher": count(teacher), "student": count(student)}
    return Lesson("accuracy, %", [Row(name, values, sizes[name.split(",")[0]]) for name, values in rows.items()])


def draw(figure: Figure, lesson: Lesson) -> None:
    dots(figure, lesson)


if __name__ == "__main__":
    main(__file__, run, draw)
