"""Distill a convolutional network on handwritten digits: what the teacher adds when few images have a label."""

from matplotlib.figure import Figure
from torch import Tensor, manual_seed, nn
from tutorial import COLORS, Lesson, Row, accuracy, axes, count, digits, fit, legend, main

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term

LABELED = (50, 100, 200, 1000)
TAPS = {"logits": OUTPUT}


# [networks]
def network(width: int) -> nn.Sequential:
    def block(inside: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inside, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]

    body = [*block(1, width, 1), *block(width, 2 * width, 2), *block(2 * width, 2 * width, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


# [labels]
def train_on_labels(model: nn.Module, images: Tensor, labels: Tensor, *, steps: int, lr: float, seed: int) -> None:
    term = Term(nn.CrossEntropyLoss(), student="logits", target="target")
    fit(
        Distiller(StudentAdapter(model, TAPS), {}, Objective({"labels": term})),
        images,
        labels,
        steps=steps,
        lr=lr,
        seed=seed,
    )


# [distill]
def distill(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor | None, *, steps: int, lr: float, seed: int
) -> None:
    terms = {"soft": Term(SoftTargetLoss(temperature=4.0), student="logits", teacher="logits")}
    if labels is not None:
        terms["labels"] = Term(nn.CrossEntropyLoss(), student="logits", target="target")
    large = TeacherAdapter(teacher, TAPS)
    distiller = Distiller(StudentAdapter(student, TAPS), {"large": large}, Objective(terms))
    targets = images.new_zeros(len(images)) if labels is None else labels  # no term reads the zeros
    fit(distiller, images, targets, steps=steps, lr=lr, seed=seed)


# [run]
def run(quick: bool) -> Lesson:
    steps, seeds = (150, 1) if quick else (400, 5)
    images, labels, new_images, new_labels = digits(1000)
    measured: dict[str, list[float]] = {}
    for seed in range(seeds):

        def student(seed: int = seed) -> nn.Module:
            manual_seed(100 + seed)  # every student of a seed starts with the same weights
            return network(5)

        def note(name: str, model: nn.Module) -> None:
            measured.setdefault(name, []).append(accuracy(model, new_images, new_labels))

        manual_seed(seed)
        teacher = network(32)
        train_on_labels(teacher, images, labels, steps=steps, lr=3e-3, seed=seed)
        note("teacher, 1000 labels", teacher)
        for labeled in LABELED:
            alone = student()
            train_on_labels(alone, images[:labeled], labels[:labeled], steps=steps, lr=1e-2, seed=seed)
            note(f"student alone, {labeled} labels", alone)
        for name, given in (("no labels", None), ("1000 labels", labels)):
            distilled = student()
            distill(distilled, teacher, images, given, steps=steps, lr=1e-2, seed=seed)
            note(f"student distilled, {name}", distilled)
    sizes = {"teacher": count(network(32)), "student": count(network(5))}
    rows = [Row(name, values, sizes[name.split(",")[0].split()[0]]) for name, values in measured.items()]
    for name, better, worse in (
        ("distilled without labels minus alone with 100", "student distilled, no labels", "student alone, 100 labels"),
        (
            "distilled minus alone, both with 1000 labels",
            "student distilled, 1000 labels",
            "student alone, 1000 labels",
        ),
    ):
        rows.append(Row(name, [a - b for a, b in zip(measured[better], measured[worse], strict=True)]))
    return Lesson("accuracy, %", rows)


# [draw]
def draw(figure: Figure, lesson: Lesson) -> None:
    place = axes(figure, x="images with a label", y=lesson.measure)
    rows = {row.model: row for row in lesson.rows}
    alone = [rows[f"student alone, {labeled} labels"] for labeled in LABELED]
    place.plot(
        LABELED, [sum(row.values) / len(row.values) for row in alone], "o-", color=COLORS[1], label="student alone"
    )
    for labeled, row in zip(LABELED, alone, strict=True):
        place.plot([labeled] * len(row.values), row.values, ".", color=COLORS[1], alpha=0.5)
    for name, color in (("teacher, 1000 labels", COLORS[2]), ("student distilled, no labels", COLORS[0])):
        place.axhline(lesson.mean(name), color=color, linestyle="--", label=name)
    place.set_xscale("log")
    place.set_xticks(LABELED, [str(labeled) for labeled in LABELED])
    place.minorticks_off()
    legend(place)


if __name__ == "__main__":
    main(__file__, run, draw, size=(7.0, 3.2))
