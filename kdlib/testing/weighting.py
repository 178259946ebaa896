"""Contracts: what every weighting must keep. Calls the weighting on copies of the tensors that the user gives."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdlib._checks import check_callable, check_floating, check_number, check_same_batch
from kdlib.testing._checks import check_exclude
from kdlib.testing._run import check_repr, clone, expect, finite, repickle, run, same, shift_parameters

__all__ = ["WEIGHTING_CHECKS", "check_weighting"]

WEIGHTING_CHECKS = (
    "deepcopy", "shape", "columns_sum_to_one", "not_negative", "extreme_losses", "extreme_features", "half",
    "batch_of_one", "empty_batch", "one_teacher", "permutation", "teacher_gradient", "deterministic",
    "inputs_unchanged", "pickle", "state_dict", "repr",
)  # fmt: skip
"""Names of all the checks, in the order in which they run."""

_SYMMETRIC = ("one_teacher", "permutation")
_MODULE = ("state_dict", "repr")
_CALLS = 3


def check_weighting(
    weighting: Callable[..., Tensor],
    *,
    num_teachers: int = 2,
    student: Tensor | None = None,
    teachers: Sequence[Tensor] | None = None,
    targets: Mapping[str, Tensor] | None = None,
    symmetric: bool = True,
    exclude: Collection[str] = (),
) -> tuple[str, ...]:
    """Hold a weighting to the contract of this library.

    - `shape`, `columns_sum_to_one`, `not_negative`: `(k, b)` finite weights of at least 0, each column of sum 1, at the
      first calls and after them, where it may have learned something.
    - `extreme_losses` (all 0; from 1e-30 to 1e30; one teacher far off), `extreme_features` (zeros; 10,000), `half`
      (features in float16), `batch_of_one`, `empty_batch`: still so.
    - `one_teacher`: all ones; `permutation`: teachers in another order give the same weights in that order.
    - `teacher_gradient`: none; `deterministic`, `inputs_unchanged`, `deepcopy`, `pickle`, `state_dict`: the same weights
      twice, and after a copy, with all that it remembers; `repr`: the call that rebuilds the object.

    Losses are computed from the student and the teachers and hang on the student's graph. Every check works on a copy of
    the weighting.

    Args:
        weighting: called as `weighting(losses, student=, teachers=, targets=)`.
        num_teachers: k, where `teachers` does not say it.
        student: `(b, ...)`, at least 2 samples; `None` for `(6, 5)`.
        teachers: k tensors `(b, ...)`; `None` for `(6, 5)` each.
        targets: name to `(b, ...)`; `None` for `"identity"` and `"label"`, whole numbers below 3.
        symmetric: whether it treats all teachers alike and takes any number of them. False, for fixed and for learned
            weights, leaves out `one_teacher` and `permutation`.
        exclude: names of checks to leave out.

    Returns:
        The names of the checks that ran; `state_dict` and `repr` run for Modules.

    Raises:
        AssertionError: a check failed.
        ValueError, TypeError: arguments that no weighting could be checked with, or an unknown name in `exclude`.

    Examples:
        >>> from kdlib import FixedWeighting, UniformWeighting
        >>> check_weighting(UniformWeighting()) == WEIGHTING_CHECKS
        True
        >>> "permutation" in check_weighting(FixedWeighting([3, 1]), symmetric=False)
        False
    """
    check_exclude("check_weighting", exclude, WEIGHTING_CHECKS)
    check_callable("check_weighting", "weighting", weighting)
    check_number("check_weighting", "num_teachers", num_teachers, min=1, integer=True)
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
    case = _Case(weighting, clone(student), [clone(x) for x in teachers], {n: clone(x) for n, x in targets.items()})
    left_out = {*exclude, *(() if symmetric else _SYMMETRIC), *(() if isinstance(weighting, nn.Module) else _MODULE)}
    checks = {name: getattr(case, name) for name in WEIGHTING_CHECKS if name not in left_out}
    return run("check_weighting", weighting, checks)


@dataclass
class _Case:
    """A weighting and the tensors it is tried on; one method a check."""

    weighting: Callable[..., Tensor]
    student: Tensor
    teachers: list[Tensor]
    targets: dict[str, Tensor]

    def fresh(self) -> Any:
        return copy.deepcopy(self.weighting)

    def weights(self, weighting: Any = None, *, scale: Tensor | float = 1.0) -> Tensor:
        """Weights for losses that hang on the student, times `scale`."""
        student = clone(self.student).requires_grad_()
        losses = scale * torch.stack([_distance(student, teacher) for teacher in self.teachers])
        weighting = self.fresh() if weighting is None else weighting
        weights = weighting(losses, student=student, teachers=list(self.teachers), targets=dict(self.targets))
        expect(isinstance(weights, Tensor), f"must return a tensor, got {type(weights).__name__}")
        return weights.detach()  # type: ignore[no-any-return]

    def settled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of calls one after another: the first may start what later ones use."""
        weighting = self.fresh()
        first, second, third = (self.weights(weighting) for _ in range(_CALLS))
        return first, second, third

    def sound(self, what: str, weights: Tensor) -> None:
        """Of the right shape, finite, not negative, of sum one."""
        wanted = (len(self.teachers), self.student.shape[0])
        expect(tuple(weights.shape) == wanted, f"{what}: must be (k, b) = {wanted}, got {tuple(weights.shape)}")
        expect(finite(weights), f"{what}: weights must be finite, got {weights.tolist()}")
        expect((weights >= 0).all(), f"{what}: weights must be >= 0, got {weights.tolist()}")
        sums = weights.double().sum(0)
        expect(same(sums, torch.ones_like(sums), absolute=1e-4), f"{what}: columns must sum to 1, got {sums.tolist()}")

    def deepcopy(self) -> None:
        copies = self.fresh(), self.fresh()
        for turn in range(_CALLS):
            one, two = (self.weights(each) for each in copies)
            expect(same(one, two), f"two copies must give the same weights at call {turn}, got {one} and {two}")
        if isinstance(self.weighting, nn.Module):
            shared = {id(x) for x in self.weighting.parameters()} & {id(x) for x in copies[0].parameters()}
            expect(not shared, "a deepcopy must not share its parameters")

    def shape(self) -> None:
        wanted = (len(self.teachers), self.student.shape[0])
        for weights in self.settled():
            expect(tuple(weights.shape) == wanted, f"must be (k, b) = {wanted}, got {tuple(weights.shape)}")
            expect(weights.is_floating_point(), f"must be floating point, got {weights.dtype}")

    def columns_sum_to_one(self) -> None:
        for weights in self.settled():
            sums = weights.double().sum(0)
            expect(same(sums, torch.ones_like(sums), absolute=1e-5), f"columns must sum to 1, got {sums.tolist()}")

    def not_negative(self) -> None:
        for weights in self.settled():
            expect((weights >= 0).all(), f"weights must be >= 0, got {weights.tolist()}")

    def extreme_losses(self) -> None:
        one, first = torch.ones(2, len(self.teachers), 1, device=self.student.device)
        first[1:] = 0
        scales: list[tuple[str, Tensor | float]] = [("0", 0.0), ("1e-30", 1e-30), ("1e4", 1e4), ("1e30", 1e30)]
        for what, scale in [
            *scales,
            ("1e30 for the first teacher", one + 1e30 * first),
            ("0 for the first teacher", one - first),
        ]:
            weighting = self.fresh()
            for _ in range(_CALLS):
                self.sound(f"losses times {what}", self.weights(weighting, scale=scale))

    def extreme_features(self) -> None:
        for what, factor in [("zeros", 0.0), ("values times 10,000", 1e4)]:
            case = replace(self, student=factor * self.student, teachers=[factor * x for x in self.teachers])
            case.sound(what, case.weights())
        one = [0 * self.teachers[0], *self.teachers[1:]]
        self.sound("zeros of the first teacher", replace(self, teachers=one).weights())

    def half(self) -> None:
        case = replace(self, student=self.student.half(), teachers=[x.half() for x in self.teachers])
        case.sound("features in float16", case.weights())

    def batch_of_one(self) -> None:
        case = self._rows(slice(0, 1))
        case.sound("a batch of one", case.weights())

    def empty_batch(self) -> None:
        case = self._rows(slice(0, 0))
        case.sound("an empty batch", case.weights())

    def _rows(self, rows: slice) -> "_Case":
        targets = {name: each[rows] for name, each in self.targets.items()}
        return replace(self, student=self.student[rows], teachers=[x[rows] for x in self.teachers], targets=targets)

    def one_teacher(self) -> None:
        case = replace(self, teachers=self.teachers[:1])
        weights = case.weights()
        expect(
            same(weights, torch.ones_like(weights), absolute=1e-6) and weights.shape[0] == 1,
            f"one teacher must weigh 1, got {weights.tolist()}",
        )

    def permutation(self) -> None:
        turned = replace(self, teachers=self.teachers[::-1])
        for weights, other in zip(self.settled(), turned.settled(), strict=True):
            expect(
                same(weights.flip(0), other, absolute=1e-4),
                f"teachers in reverse must give weights in reverse, {weights.flip(0).tolist()}, got {other.tolist()}",
            )

    def teacher_gradient(self) -> None:
        case = replace(self, teachers=[clone(x).requires_grad_() for x in self.teachers])
        weighting = self.fresh()
        student = clone(self.student).requires_grad_()
        losses = torch.stack([_distance(student, x.detach()) for x in case.teachers])
        weights = weighting(losses, student=student, teachers=case.teachers, targets=dict(self.targets))
        if weights.requires_grad:
            (weights * torch.arange(weights.numel(), device=weights.device).view_as(weights)).sum().backward()
        expect(all(x.grad is None for x in case.teachers), "no gradient may reach a teacher; detach them")

    def deterministic(self) -> None:
        one, two = self.weights(), self.weights()
        expect(same(one, two), f"must give the same weights twice, got {one.tolist()} and {two.tolist()}")

    def inputs_unchanged(self) -> None:
        student = clone(self.student)
        losses = torch.stack([_distance(student, x) for x in self.teachers])
        teachers, targets = [clone(x) for x in self.teachers], {name: clone(x) for name, x in self.targets.items()}
        before = clone(losses)
        self.fresh()(losses, student=student, teachers=teachers, targets=targets)
        expect(torch.equal(losses, before), "must leave its arguments alone, changed losses")
        expect(torch.equal(student, self.student), "must leave its arguments alone, changed student")
        for k, (x, kept) in enumerate(zip(teachers, self.teachers, strict=True)):
            expect(torch.equal(x, kept), f"must leave its arguments alone, changed teachers[{k}]")
        for name, kept in self.targets.items():
            expect(torch.equal(targets[name], kept), f"must leave its arguments alone, changed targets[{name!r}]")

    def pickle(self) -> None:
        weighting = self.fresh()
        self.weights(weighting)
        other = repickle(weighting)
        value, wanted = self.weights(other), self.weights(weighting)
        expect(same(value, wanted), f"through pickle it must stay the same, got {value} for {wanted}")

    def state_dict(self) -> None:
        used, other = self.fresh(), self.fresh()
        self.weights(used)
        shift_parameters(other)
        other.load_state_dict(copy.deepcopy(used.state_dict()))
        value, wanted = self.weights(other), self.weights(used)
        expect(same(value, wanted), f"its state dict must hold all it remembers, got {value} for {wanted}")

    def repr(self) -> None:
        if isinstance(self.weighting, nn.Module):
            check_repr(self.weighting)


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`(b,)` losses of the kind that features give: squared distances, of means where the shapes differ."""
    s, t = (x.float().unsqueeze(-1).flatten(1) for x in (student, teacher))
    if s.shape != t.shape:
        s, t = s.mean(1, keepdim=True), t.mean(1, keepdim=True)
    return (s - t).square().mean(1)
