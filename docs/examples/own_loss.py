"""A loss of your own: write it, check it against the contract of the library, train with it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import OUTPUT, Distiller, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib.testing import check_loss


def log_cosh(student: Tensor, teacher: Tensor, *, reduction: str = "mean", weight: Tensor | None = None) -> Tensor:
    """The mean of log(cosh(s - t)): quadratic for small differences, linear for large ones.

    Any callable of two tensors is a loss. The arguments `reduction` and `weight` make it usable with weightings and
    sample weights.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"log_cosh: teacher must have the shape of student {student.shape}, got {teacher.shape}")
    exact = torch.promote_types(student.dtype, torch.float32)  # half precision has too few digits for sums
    size = (student.to(exact) - teacher.detach().to(exact)).flatten(1).abs()
    losses = (size + F.softplus(-2 * size) - math.log(2)).mean(dim=1)  # (b,); cosh itself overflows
    if weight is not None:
        losses = losses * weight
    if reduction == "none":
        return losses
    total = losses.new_tensor(len(losses)) if weight is None else weight.sum()
    return losses.sum() / total.clamp(min=1e-12)


def main() -> None:
    # The checks cover gradients, weights, half precision, extreme values and others. A failed check says what is wrong.
    example = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    passed = check_loss(log_cosh, *example, per_sample=True)
    print(f"{len(passed)} checks passed: {', '.join(passed)}")

    careless = lambda student, teacher: torch.cosh(student - teacher).log().mean()  # noqa: E731
    try:
        check_loss(careless, *example, exclude=["reduction_none", "mean_of_none", "weighted_mean"])
    except AssertionError as error:
        print(f"A loss that fails: {str(error)[:300]} ...")

    torch.manual_seed(0)
    taps = {"out": OUTPUT}
    teacher = TeacherAdapter(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4)), taps)
    student = StudentAdapter(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), taps)
    term = Term(log_cosh, student="out", teacher="out")
    distiller = Distiller(student, {"big": teacher}, Objective({"log_cosh": term}))
    optimizer = torch.optim.Adam(distiller.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        loss = distiller(torch.randn(32, 8)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
