"""Distill a vision transformer into a convolutional network on handwritten digits: class token and patch tokens."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tutorial import Lesson, Row, accuracy, count, digits, dots, fit, known_labels, main

from kdlib import OUTPUT, AngularDistillLoss, Distiller, HintLoss, Objective, StudentAdapter, TeacherAdapter, Term

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
        "labels": Term(known_labels, student="logits", target="target"),
        # A vector of 16 numbers and one of 32: a linear projection is learned.
        "class_token": Term(
            AngularDistillLoss(form="cosine"), student="pooled", teacher="class_token", project="auto", weight=5.0
        ),
        # A map of 16 x 4 x 4 and 16 tokens of 32 numbers: the positions of the map become tokens.
        "patches": Term(HintLoss(), student="map", teacher="patches", project="auto"),
    }
    return {name: every[name] for name in names}


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (80, 1) if quick else (400, 3)
    images, labels, *new = digits(1000)
    some = labels.where(torch.arange(len(labels)) < LABELED, -1)  # 100 labels; the other images have none
    variants = {
        "student, labels alone": ("labels",),
        "student, labels and class token": ("labels", "class_token"),
        "student, labels and patches": ("labels", "patches"),
        "student, all three": ("labels", "class_token", "patches"),
    }
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        teacher = VisionTransformer()
        alone = Distiller(StudentAdapter(teacher, TEACHER_TAPS), {}, Objective(terms("labels")))
        fit(alone, images, labels, steps=steps, seed=seed)
        rows.setdefault("teacher, 1000 labels", []).append(accuracy(teacher, *new))
        for name, used in variants.items():
            torch.manual_seed(100 + seed)
            student = convolutional_network()
            teachers = {"vit": TeacherAdapter(teacher, TEACHER_TAPS)} if len(used) > 1 else {}
            distiller = Distiller(StudentAdapter(student, STUDENT_TAPS), teachers, Objective(terms(*used)))
            if teachers:
                fit(distiller, images, some, steps=steps, lr=1e-2, seed=seed)
            else:
                fit(distiller, images[:LABELED], some[:LABELED], steps=steps, lr=1e-2, seed=seed)
            rows.setdefault(name, []).append(accuracy(student, *new))
    sizes = {"teacher": count(teacher), "student": count(student)}
    return Lesson("accuracy, %", [Row(name, values, sizes[name.split(",")[0]]) for name, values in rows.items()])


def draw(figure: Figure, lesson: Lesson) -> None:
    dots(figure, lesson)


if __name__ == "__main__":
    main(__file__, run, draw)
