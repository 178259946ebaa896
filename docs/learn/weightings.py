"""Three teachers of different quality and one student: what each weighting does with them."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tutorial import COLORS, GRAY, Lesson, Row, accuracy, axes, count, digits, fit, main

from kdlib import (
    OUTPUT,
    ConfidenceWeighting,
    Distiller,
    EntropyWeighting,
    GradientWeighting,
    Objective,
    SoftTargetLoss,
    StudentAdapter,
    TeacherAdapter,
    Term,
    UncertaintyWeighting,
    UniformWeighting,
)

TAPS = {"logits": OUTPUT}
TEACHERS = ("good", "specialist", "poor")


def network(width: int) -> nn.Sequential:
    body = [nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)]
    return nn.Sequential(*body, nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten(), nn.Linear(8 * width, 10))


# [teachers]
def trained(images: Tensor, labels: Tensor, *, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = network(16)
    term = Term(nn.CrossEntropyLoss(), student="logits", target="target")
    fit(Distiller(StudentAdapter(model, TAPS), {}, Objective({"labels": term})), images, labels, steps=steps, seed=seed)
    return model


def make_teachers(images: Tensor, labels: Tensor, *, steps: int, seed: int) -> dict[str, nn.Module]:
    """A good teacher, one that has only seen the digits 0 to 4, and one whose labels were drawn at random."""
    easy = labels < 5
    random = torch.randint(10, labels.shape, generator=torch.Generator().manual_seed(seed))
    data = {"good": (images, labels), "specialist": (images[easy], labels[easy]), "poor": (images, random)}
    return {name: trained(*data[name], steps=steps, seed=10 * seed + at) for at, name in enumerate(TEACHERS)}


# [weightings]
def weightings() -> dict[str, nn.Module]:
    return {
        "uniform": UniformWeighting(),
        "confidence": ConfidenceWeighting(target="target"),
        "entropy": EntropyWeighting(),
        "uncertainty": UncertaintyWeighting(len(TEACHERS)),
        "gradient": GradientWeighting(),
    }


# [distill]
def distill(
    teachers: dict[str, nn.Module], weighting: nn.Module, images: Tensor, labels: Tensor, *, steps: int, seed: int
) -> tuple[nn.Module, list[list[float]]]:
    """Train a student; return it and the mean weight of each teacher in each step."""
    torch.manual_seed(100 + seed)
    student = network(4)
    soft = Term(SoftTargetLoss(temperature=2.0), student="logits", teacher="logits")
    adapters = {name: TeacherAdapter(teacher, TAPS) for name, teacher in teachers.items()}
    distiller = Distiller(StudentAdapter(student, TAPS), adapters, Objective({"soft": soft}, weighting))
    weights: list[list[float]] = []
    hooks = [lambda event: weights.append(list(event.weights["soft"]))]
    fit(distiller, images, labels, steps=steps, lr=1e-2, seed=seed, hooks=hooks)
    return student, weights


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (80, 1) if quick else (300, 3)
    images, labels, *new = digits(1000)
    rows: dict[str, list[float]] = {}
    curves: dict[str, list[float]] = {}
    numbers: dict[str, float] = {}
    for seed in range(seeds):
        teachers = make_teachers(images, labels, steps=steps, seed=seed)
        for name, teacher in teachers.items():
            rows.setdefault(f"teacher: {name}", []).append(accuracy(teacher, *new))
        for name, weighting in weightings().items():
            student, weights = distill(teachers, weighting, images, labels, steps=steps, seed=seed)
            rows.setdefault(f"student: {name}", []).append(accuracy(student, *new))
            if seed == 0:
                for teacher, of_one in zip(TEACHERS, zip(*weights, strict=True), strict=True):
                    curves[f"{name}, {teacher}"] = [round(value, 4) for value in of_one]
    # The weights of single images by `ConfidenceWeighting`, which knows the label.
    with torch.no_grad():
        logits = [teacher.eval()(images) for teacher in teachers.values()]
    empty = torch.zeros(len(TEACHERS), len(images))
    weights_of_images = ConfidenceWeighting()(empty, student=images, teachers=logits, targets=labels)
    for name, chosen in (("0 to 4", labels < 5), ("5 to 9", labels >= 5)):
        for teacher, weight in zip(TEACHERS, weights_of_images[:, chosen].mean(dim=1), strict=True):
            numbers[f"confidence weight of {teacher}, digits {name}"] = round(float(weight), 4)
    sizes = {"teacher": count(network(16)), "student": count(network(4))}
    measured = [Row(name, values, sizes[name.split(":")[0]]) for name, values in rows.items()]
    return Lesson("accuracy, %", measured, curves, numbers)


# [draw]
def draw(figure: Figure, lesson: Lesson) -> None:
    names = list(dict.fromkeys(name.split(", ")[0] for name in lesson.curves))
    for at, name in enumerate(names):
        place = axes(figure, 101 + 10 * len(names) + at, x="step", y="" if at else "weight", title=name)
        curves = [lesson.curves[f"{name}, {teacher}"] for teacher in TEACHERS]
        place.stackplot(
            range(len(curves[0])), *curves, labels=TEACHERS, alpha=0.8, colors=[COLORS[2], COLORS[0], COLORS[4]]
        )
        place.set_ylim(0, 1)
        if at:
            place.set_yticks([])
    figure.legend(
        *place.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, labelcolor=GRAY
    )


if __name__ == "__main__":
    main(__file__, run, draw, size=(9.0, 2.8))
