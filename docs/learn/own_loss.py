"""Write a loss of your own, check it against the contract of the library, and train with it on handwritten digits."""

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tutorial import Lesson, Row, accuracy, count, digits, dots, fit, main

from kdlib import OUTPUT, Distiller, Objective, SoftTargetLoss, StudentAdapter, TeacherAdapter, Term
from kdlib.testing import check_loss

TAPS = {"logits": OUTPUT}


# [first]
def first_try(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared distance of the square roots of the probabilities: the squared Hellinger distance."""
    return (student.softmax(1).sqrt() - teacher.softmax(1).sqrt()).square().sum(1).mean() / 2


# [hellinger]
def hellinger(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """The same, safe: `exp(log_softmax / 2)` is the root of the probability, and its gradient is finite at 0."""
    if student.shape != teacher.shape:
        raise ValueError(f"hellinger: teacher must have the shape of student {student.shape}, got {teacher.shape}")
    exact = torch.promote_types(student.dtype, torch.float32)  # half precision has too few digits for sums
    roots = [(x.to(exact) / temperature).log_softmax(1).div(2).exp() for x in (student, teacher.detach())]
    losses = temperature**2 * (roots[0] - roots[1]).square().sum(1) / 2  # (b,)
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    total = losses.new_tensor(len(losses)) if weight is None else weight.sum()
    return losses.sum() / total.clamp(min=1e-12)


# [check]
def check() -> tuple[str, ...]:
    example = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    try:
        check_loss(first_try, *example)
    except AssertionError as error:
        print(error)
    return check_loss(hellinger, *example, per_sample=True)


# [train]
def network(width: int) -> nn.Sequential:
    body = [nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1)]
    return nn.Sequential(*body, nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten(), nn.Linear(8 * width, 10))


def trained(
    term: Term, teachers: dict[str, nn.Module], data: list[Tensor], width: int, steps: int, seed: int
) -> nn.Module:
    torch.manual_seed(100 + seed)
    model = network(width)
    adapters = {name: TeacherAdapter(teacher, TAPS) for name, teacher in teachers.items()}
    distiller = Distiller(StudentAdapter(model, TAPS), adapters, Objective({"term": term}))
    fit(distiller, *data, steps=steps, lr=1e-2, seed=seed)
    return model


# [run]
def run(quick: bool) -> Lesson:
    passed = check()
    print(f"{len(passed)} checks passed: {', '.join(passed)}")
    steps, seeds = (60, 1) if quick else (250, 3)
    images, labels, *new = digits(1000)
    label = Term(nn.CrossEntropyLoss(), student="logits", target="target")
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        teacher = trained(label, {}, [images, labels], 16, steps, seed)
        models = {
            "teacher": teacher,
            "student alone, 100 labels": trained(label, {}, [images[:100], labels[:100]], 4, steps, seed),
        }
        for name, loss in (("SoftTargetLoss", SoftTargetLoss()), ("hellinger", hellinger)):
            term = Term(loss, student="logits", teacher="logits")
            models[f"student, {name}"] = trained(term, {"large": teacher}, [images, labels], 4, steps, seed)
        for name, model in models.items():
            rows.setdefault(name, []).append(accuracy(model, *new))
    measured = [Row(name, values, count(models[name])) for name, values in rows.items()]
    return Lesson("accuracy, %", measured, numbers={"checks": len(passed)})


def draw(figure: Figure, lesson: Lesson) -> None:
    dots(figure, lesson)


if __name__ == "__main__":
    main(__file__, run, draw)
