"""Contract checks of a weighting."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable, check_floating, check_number, check_same_batch
from kdlib.testing._meta import expect_meta, on_meta, to_meta
from kdlib.testing._run import Case, clone, expect, finite, run, same
from kdlib.types import Weighting

__all__ = ["WEIGHTING_CHECKS", "check_weighting"]

WEIGHTING_CHECKS = (
    "deepcopy", "valid", "extreme_losses", "extreme_features", "half", "batch_of_one", "empty_batch", "one_teacher",
    "permutation", "teacher_gradient", "deterministic", "inputs_unchanged", "on_meta", "pickle", "state_dict", "repr",
)  # fmt: skip
"""Names of all the checks, in the order in which they run."""

_SYMMETRIC = ("one_teacher", "permutation")
_MODULE = ("state_dict", "repr")


def check_weighting(
    weighting: Weighting,
    *,
    num_teachers: int = 2,
    student: Tensor | None = None,
    teachers: Sequence[Tensor] | None = None,
    targets: Mapping[str, Tensor] | None = None,
    symmetric: bool = True,
    exclude: Collection[str] = (),
) -> tuple[str, ...]:
    """Check a weighting against the contract of this library.

    - `valid`: floating-point weights `(k, b)`, finite and at least 0, whose columns sum to 1; in the first call and in
      later ones, when its state may have changed.
    - `extreme_losses` (all 0; from 1e-30 to 1e30; one teacher far off), `extreme_features` (zeros; 10,000), `half`
      (features in float16), `batch_of_one`, `empty_batch`: the same for these inputs.
    - `one_teacher`: all ones; `permutation`: teachers in another order have the same weights in that order.
    - `teacher_gradient`: none; `deterministic`, `inputs_unchanged`, `deepcopy`, `pickle`, `state_dict`: the same
      weights twice, and after a copy with its state; `repr`: the call that rebuilds the object.
    - `on_meta`: runs on the meta device, so nothing is read from the device or stays on the CPU.

    Losses are computed from the student and the teachers, on the student's graph.

    Args:
        weighting: called as `weighting(losses, student=, teachers=, targets=)`.
        num_teachers: k, if `teachers` is not given.
        student: `(b, ...)`, at least 2 samples; `None` for `(6, 5)`.
        teachers: k tensors `(b, ...)`; `None` for `(6, 5)` each.
        targets: name to `(b, ...)`; `None` for `"identity"` and `"label"`, whole numbers below 3.
        symmetric: whether it treats all teachers alike and accepts any number of them. False, for constant and learned
            weights, skips `one_teacher` and `permutation`.
        exclude: names of checks to skip.

    Returns:
        The names of the checks that ran; `state_dict` and `repr` run for Modules.

    Examples:
        >>> from kdlib import FixedWeighting, UniformWeighting
        >>> check_weighting(UniformWeighting()) == WEIGHTING_CHECKS
        True
        >>> "permutation" in check_weighting(FixedWeighting([3, 1]), symmetric=False)
        False
    """
    check_callable("check_weighting", "weighting", weighting)
    num_teachers = check_number("check_weighting", "num_teachers", num_teachers, min=1, integer=True)
    generator = torch.Generator().manual_seed(0)
    if student is None:
        batch = teachers[0].shape[0] if teachers else 6
        student = torch.randn(batch, 5, generator=generator)
    if teachers is None:
        device, batch = student.device, student.shape[0]
        teachers = [torch.randn(batch, 5, generator=generator).to(device) for _ in range(num_teachers)]
    if targets is None:
        labels = torch.arange(student.shape[0], device=student.device) % 3
        targets = {"identity": labels, "label": labels}
    check_number("check_weighting", "the number of teachers", len(teachers), min=1, integer=True)
    check_floating("check_weighting", student=student, **{f"teachers[{k}]": x for k, x in enumerate(teachers)})
    check_number("check_weighting", "the batch size", student.shape[0], min=2, integer=True)
    for k, teacher in enumerate(teachers):
        check_same_batch("check_weighting", "student", student, f"teachers[{k}]", teacher)
    for name, each in targets.items():
        check_same_batch("check_weighting", "student", student, f"targets[{name!r}]", each)
    copies = clone(student), [clone(x) for x in teachers], {name: clone(x) for name, x in targets.items()}
    module = isinstance(weighting, nn.Module)
    left_out = {*(() if symmetric else _SYMMETRIC), *(() if module else _MODULE)}
    return run("check_weighting", _WeightingCase(weighting, *copies), WEIGHTING_CHECKS, exclude, left_out)


@dataclass
class _WeightingCase(Case):
    component: Weighting
    student: Tensor
    teachers: list[Tensor]
    targets: dict[str, Tensor]

    def output(self, component: Any) -> Mapping[str, Tensor]:
        return {"weights": self.weights(component)}

    def weights(self, weighting: Weighting | None = None, *, scale: Tensor | float = 1.0) -> Tensor:
        """Return the weights for losses on the student's graph, times `scale`."""
        student = clone(self.student).requires_grad_()
        losses = scale * torch.stack([_distance(student, teacher) for teacher in self.teachers])
        weighting = self.fresh() if weighting is None else weighting
        weights = weighting(losses, student=student, teachers=list(self.teachers), targets=dict(self.targets))
        expect(isinstance(weights, Tensor), f"must return a tensor, got {type(weights).__name__}")
        return weights.detach()

    def successive(self) -> list[Tensor]:
        """Return the weights of three successive calls: the first may create state that later ones use."""
        weighting = self.fresh()
        return [self.weights(weighting) for _ in range(3)]

    def expect_valid(self, what: str, weights: Tensor, *, absolute: float = 1e-4) -> None:
        wanted = (len(self.teachers), self.student.shape[0])
        expect(weights.is_floating_point(), f"{what}: weights must be floating point, got {weights.dtype}")
        expect(tuple(weights.shape) == wanted, f"{what}: must be (k, b) = {wanted}, got {tuple(weights.shape)}")
        expect(finite(weights), f"{what}: weights must be finite, got {weights.tolist()}")
        expect((weights >= 0).all(), f"{what}: weights must be >= 0, got {weights.tolist()}")
        sums = weights.double().sum(0)
        one = same(sums, torch.ones_like(sums), absolute=absolute)
        expect(one, f"{what}: columns must sum to 1, got {sums.tolist()}")

    def valid(self) -> None:
        for call, weights in enumerate(self.successive(), 1):
            self.expect_valid(f"call {call}", weights, absolute=1e-5)

    def extreme_losses(self) -> None:
        one, first = torch.ones(2, len(self.teachers), 1, device=self.student.device)
        first[1:] = 0
        scales: list[tuple[str, Tensor | float]] = [("0", 0.0), ("1e-30", 1e-30), ("1e4", 1e4), ("1e30", 1e30)]
        scales += [("1e30 for the first teacher", one + 1e30 * first), ("0 for the first teacher", one - first)]
        for what, scale in scales:
            weighting = self.fresh()
            for _ in range(3):
                self.expect_valid(f"losses times {what}", self.weights(weighting, scale=scale))

    def extreme_features(self) -> None:
        for what, factor in [("zeros", 0.0), ("values times 10,000", 1e4)]:
            case = replace(self, student=factor * self.student, teachers=[factor * x for x in self.teachers])
            self.expect_valid(what, case.weights())
        first_zero = [0 * self.teachers[0], *self.teachers[1:]]
        self.expect_valid("zeros of the first teacher", replace(self, teachers=first_zero).weights())

    def half(self) -> None:
        case = replace(self, student=self.student.half(), teachers=[x.half() for x in self.teachers])
        case.expect_valid("features in float16", case.weights())

    def _expect_valid_for(self, what: str, rows: slice) -> None:
        targets = {name: each[rows] for name, each in self.targets.items()}
        case = replace(self, student=self.student[rows], teachers=[x[rows] for x in self.teachers], targets=targets)
        case.expect_valid(what, case.weights())

    batch_of_one = partialmethod(_expect_valid_for, "a batch of one", slice(0, 1))
    empty_batch = partialmethod(_expect_valid_for, "an empty batch", slice(0, 0))

    def one_teacher(self) -> None:
        weights = replace(self, teachers=self.teachers[:1]).weights()
        all_ones = weights.shape[0] == 1 and same(weights, torch.ones_like(weights), absolute=1e-6)
        expect(all_ones, f"a single teacher must have weight 1, got {weights.tolist()}")

    def permutation(self) -> None:
        reverse = replace(self, teachers=self.teachers[::-1])
        for weights, other in zip(self.successive(), reverse.successive(), strict=True):
            wanted = weights.flip(0)
            message = f"teachers in reverse must have weights in reverse, {wanted.tolist()}, got {other.tolist()}"
            expect(same(wanted, other, absolute=1e-4), message)

    def teacher_gradient(self) -> None:
        teachers = [clone(x).requires_grad_() for x in self.teachers]
        student = clone(self.student).requires_grad_()
        losses = torch.stack([_distance(student, x.detach()) for x in teachers])
        weights = self.fresh()(losses, student=student, teachers=teachers, targets=dict(self.targets))
        if weights.requires_grad:
            (weights * torch.arange(weights.numel(), device=weights.device).view_as(weights)).sum().backward()
        expect(all(x.grad is None for x in teachers), "no gradient may reach a teacher; detach them")

    def on_meta(self) -> None:
        student, teachers, targets = to_meta((self.student, self.teachers, self.targets))
        weighting = self.fresh()
        weighting = to_meta(weighting) if isinstance(weighting, nn.Module) else weighting
        with on_meta():
            losses = torch.stack([_distance(student.requires_grad_(), x) for x in teachers])
            for _ in range(2):
                weights = weighting(losses, student=student, teachers=teachers, targets=targets)
                expect_meta("weights", weights, losses.shape)

    def inputs_unchanged(self) -> None:
        losses = torch.stack([_distance(self.student, x) for x in self.teachers])
        student, targets = clone(self.student), {name: clone(x) for name, x in self.targets.items()}
        before, teachers = clone(losses), [clone(x) for x in self.teachers]
        self.fresh()(losses, student=student, teachers=teachers, targets=targets)
        pairs = [("losses", before, losses), ("student", self.student, student)]
        pairs += [(f"teachers[{k}]", x, teachers[k]) for k, x in enumerate(self.teachers)]
        pairs += [(f"targets[{name!r}]", x, targets[name]) for name, x in self.targets.items()]
        for name, original, x in pairs:
            expect(torch.equal(x, original), f"must not change its arguments, changed {name}")


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `(b,)` squared distances, of the means where the shapes differ."""
    s, t = (x.float().unsqueeze(-1).flatten(1) for x in (student, teacher))
    if s.shape != t.shape:
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    return (s - t).square().mean(1)
