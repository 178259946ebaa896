"""Start a student from its teacher on handwritten digits: shrink the network, then distill."""

import copy

from matplotlib.figure import Figure
from torch import Tensor, manual_seed, nn
from tutorial import COLORS, Lesson, Row, accuracy, axes, count, digits, fit, legend, main

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term
from kdlib.compression import shrink

TAPS = {"logits": OUTPUT}


# [network]
def network(width: int) -> nn.Sequential:
    def block(inside: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]

    body = [*block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


# [shrink]
def shrunken(teacher: nn.Module, images: Tensor) -> nn.Module:
    """A copy with a quarter of the channels, refitted layer by layer; no labels and no training."""
    return shrink(teacher.eval(), images.split(250), keep=0.25)


# [distill]
def distill(
    student: nn.Module, teacher: nn.Module, data: tuple[Tensor, ...], *, steps: int, lr: float, seed: int
) -> list[float]:
    """Train on soft targets alone; return the accuracy on new images before and during the training."""
    images, labels, *new = data
    curve = [accuracy(student, *new)]
    soft = Term(SoftTargetLoss(temperature=4.0), student="logits", teacher="logits")
    large = TeacherAdapter(teacher, TAPS)
    distiller = Distiller(StudentAdapter(student, TAPS), {"large": large}, Objective({"soft": soft}))
    fit(
        distiller, images, labels, steps=steps, lr=lr, seed=seed,
        evaluate=lambda distiller: accuracy(distiller.student.model, *new), evaluate_every=20,
        hooks=[lambda event: event.evaluation and curve.append(event.evaluation.metrics["metric"])],
    )  # fmt: skip
    return curve


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (60, 1) if quick else (200, 3)
    data = digits(1000)
    images, labels, *new = data
    rows: dict[str, list[float]] = {}
    curves: dict[str, list[float]] = {}
    for seed in range(seeds):
        manual_seed(seed)
        teacher = network(32)
        label = Term(nn.CrossEntropyLoss(), student="logits", target="target")
        only_labels = Distiller(StudentAdapter(teacher, TAPS), {}, Objective({"label": label}))
        fit(only_labels, images, labels, steps=80 if quick else 300, seed=seed)
        rows.setdefault("teacher", []).append(accuracy(teacher, *new))

        scratch, start = network(8), shrunken(teacher, images)
        runs = (
            ("random weights", scratch, 1e-2),
            ("shrunken, rate 0.001", start, 1e-3),
            ("shrunken, rate 0.01", copy.deepcopy(start), 1e-2),
        )
        for name, student, lr in runs:
            curve = distill(student, teacher, data, steps=steps, lr=lr, seed=seed)
            for at, value in (
                ("before training", curve[0]),
                ("after 20 steps", curve[1]),
                (f"after {steps} steps", curve[-1]),
            ):
                rows.setdefault(f"{name}, {at}", []).append(value)
            curves.setdefault(name, [0.0] * len(curve))
            curves[name] = [round(old + value / seeds, 4) for old, value in zip(curves[name], curve, strict=True)]
    sizes = {"teacher": count(teacher), "random weights": count(scratch), "shrunken": count(start)}
    return Lesson(
        "accuracy, %", [Row(name, values, sizes[name.split(",")[0]]) for name, values in rows.items()], curves
    )


# [draw]
def draw(figure: Figure, lesson: Lesson) -> None:
    place = axes(figure, x="steps of distillation", y=lesson.measure)
    for (name, curve), color in zip(lesson.curves.items(), (COLORS[1], COLORS[0], COLORS[3]), strict=True):
        place.plot(range(0, 20 * len(curve), 20), curve, ".-", color=color, label=name)
    place.set_ylim(60, 100)
    place.axhline(lesson.mean("teacher"), color=COLORS[2], linestyle="--", label="teacher")
    legend(place)


if __name__ == "__main__":
    main(__file__, run, draw, size=(7.0, 3.0))
