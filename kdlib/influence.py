"""The influence report: loss and gradient of each term and teacher of an objective, measured on one batch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdlib.types import Side

__all__ = ["Comparison", "InfluenceReport", "TeacherInfluence", "TermInfluence", "measure"]


@dataclass(frozen=True)
class TeacherInfluence:
    """Influence of one teacher within a term.

    Args:
        weight: mean weight of the teacher over the batch.
        loss: weighted loss of the teacher, times the term's weight; the teachers' losses sum to the term's.
        loss_share: share of the term's loss, by magnitude.
        gradient: Euclidean length of the gradient of `loss` with respect to the student's feature, over the batch.
        gradient_share: share of the sum of the gradient lengths of the term's teachers.

    Examples:
        >>> TeacherInfluence(weight=0.5, loss=1.0, loss_share=0.2, gradient=1.4, gradient_share=0.3).loss_share
        0.2
    """

    weight: float
    loss: float
    loss_share: float
    gradient: float
    gradient_share: float


@dataclass(frozen=True)
class TermInfluence:
    """Influence of one term.

    Args:
        student: the student feature that the term compares, at which its gradient is taken; the names of several are
            joined by commas, and the gradient is that at all of them together.
        weight: the term's weight at this step.
        loss: the term's value times its weight.
        loss_share: share of the losses of all terms, by magnitude.
        gradient: Euclidean length of the gradient of `loss` with respect to the student's feature, over the batch.
        gradient_share: share of the sum of the gradient lengths of all terms. Only the order of magnitude is comparable
            between terms of different features.
        teachers: teacher name to influence; empty for a supervised term.
        cosines: pair of teachers to the cosine between their gradients; `None` where one is zero.

    Examples:
        >>> term = TermInfluence("out", 0.5, 2.0, 1.0, 1.4, 1.0, teachers={}, cosines={})
        >>> term.loss, term.loss_share
        (2.0, 1.0)
    """

    student: str
    weight: float
    loss: float
    loss_share: float
    gradient: float
    gradient_share: float
    teachers: dict[str, TeacherInfluence]
    cosines: dict[tuple[str, str], float | None]


@dataclass(frozen=True)
class InfluenceReport:
    """Influence of each term and teacher on the student, on one batch.

    Args:
        step: the step at which the schedules were evaluated; `None` if it was never given.
        terms: term name to influence.
        cosines: pair of terms on the same student feature to the cosine between their gradients; `None` where one is
            zero.

    Examples:
        >>> from kdlib.losses import HintLoss
        >>> from kdlib.objective import Objective, Term
        >>> objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out", weight=2.0)})
        >>> teachers = {"near": {"out": torch.ones(1, 2)}, "far": {"out": -2 * torch.ones(1, 2)}}
        >>> report = objective.report({"out": torch.zeros(1, 2)}, teachers, step=0)
        >>> print(report.table())
        influence at step 0   weight      loss   share  gradient   share
        hint (out)             2.000     5.000  100.0%     1.414  100.0%
          near                 0.500     1.000   20.0%     1.414   33.3%
          far                  0.500     4.000   80.0%     2.828   66.7%
        cosine of gradients: hint: near, far -1.00
        >>> report.terms["hint"].teachers["far"].loss
        4.0
    """

    step: int | None
    terms: dict[str, TermInfluence]
    cosines: dict[tuple[str, str], float | None]

    def table(self) -> str:
        """Return the report as plain text in columns."""
        title = "influence" if self.step is None else f"influence at step {self.step}"
        rows: list[tuple[str, TermInfluence | TeacherInfluence]] = []
        for name, term in self.terms.items():
            rows.append((f"{name} ({term.student})", term))
            rows += [(f"  {key}", teacher) for key, teacher in term.teachers.items()]
        width = max(len(title), *(len(label) for label, _ in rows))
        lines = [f"{title:<{width}} {'weight':>8} {'loss':>9} {'share':>7} {'gradient':>9} {'share':>7}"]
        for label, row in rows:
            columns = f"{row.loss:#9.4g} {row.loss_share:7.1%} {row.gradient:#9.4g} {row.gradient_share:7.1%}"
            lines.append(f"{label:<{width}} {row.weight:8.3f} {columns}")
        within_terms = [(f"{name}: ", term.cosines) for name, term in self.terms.items()]
        for prefix, cosines in [*within_terms, ("", self.cosines)]:
            for (a, b), cosine in cosines.items():
                value = "none" if cosine is None else f"{cosine:.2f}"
                lines.append(f"cosine of gradients: {prefix}{a}, {b} {value}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON; a number that is not finite becomes `None`."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(each) for key, each in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        def pairs(cosines: Mapping[tuple[str, str], float | None]) -> list[dict[str, Any]]:
            return [{"a": a, "b": b, "cosine": plain(cosine)} for (a, b), cosine in cosines.items()]

        terms = {name: {**plain(asdict(term)), "cosines": pairs(term.cosines)} for name, term in self.terms.items()}
        return {"step": self.step, "terms": terms, "cosines": pairs(self.cosines)}


class Comparison(NamedTuple):
    """Result of an objective for one term and batch.

    Args:
        feature: the student's feature, `(b, ...)`, or the features of several taps.
        losses: `(k, b)`, times the sample weights, or `(k,)` without a per-sample form; for a supervised term `(b,)` or
            a scalar.
        teachers: names of the k teachers.
        weights: `(k, b)`; `None` for a supervised term.
        sample: sample weights `(b,)`; `None` for all ones.

    Examples:
        >>> Comparison(torch.zeros(4, 8), torch.zeros(1, 4), ["general"], torch.ones(1, 4), None).teachers
        ['general']
    """

    feature: Side
    losses: Tensor
    teachers: tuple[str, ...] = ()
    weights: Tensor | None = None
    sample: Tensor | None = None

    def value(self) -> Tensor:
        """Return the scalar value of the term, before its weight."""
        if self.weights is None:
            return self._mean(self.losses)
        if self.losses.dim() == 1:
            return (self.mean_weights() * self.losses).sum()
        return self._mean((self.weights.to(self.losses.dtype) * self.losses).sum(0))

    def parts(self) -> list[Tensor]:
        """Return one scalar per teacher, which sum to the value; for a supervised term the value alone."""
        if self.weights is None:
            return [self.value()]
        if self.losses.dim() == 1:
            return list(self.mean_weights().detach() * self.losses)
        return [self._mean(each) for each in self.weights.detach().to(self.losses.dtype) * self.losses]

    def mean_weights(self) -> Tensor:
        """Return the weight `(k,)` of each teacher, the sample-weighted mean over the batch."""
        if self.weights is None:
            return self.losses.new_empty(0)
        weights = self.weights.to(self.losses.dtype)
        if self.sample is None:
            return weights.mean(1)
        share = self.sample.to(weights.dtype)
        return (weights * share).sum(1) / _divisor(share)

    def _mean(self, losses: Tensor) -> Tensor:
        """Divide the sum of the losses, already times the sample weights, by the sum of the sample weights."""
        if self.sample is None or not losses.dim():
            return losses.mean()
        return losses.sum() / _divisor(self.sample.to(losses.dtype))


def _divisor(sample: Tensor) -> Tensor:
    """Return the sum of the sample weights, or 1 where all are 0: the numerator is then 0 too."""
    total = sample.sum()
    return torch.where(total == 0, 1.0, total)


def measure(
    step: int | None, compared: Mapping[str, Comparison], terms: Mapping[str, tuple[float, str]]
) -> InfluenceReport:
    """Measure the terms of one batch; `terms` holds the weight and the student feature of each.

    Examples:
        >>> feature = torch.full((1, 2), 2.0, requires_grad=True)
        >>> compared = {"size": Comparison(feature, feature.square().mean(1), [], None, None)}
        >>> measure(0, compared, {"size": (0.5, "out")}).terms["size"].loss
        2.0
    """
    losses: dict[str, list[float]] = {}
    gradients: dict[str, list[Tensor]] = {}
    for name, each in compared.items():
        parts = [terms[name][0] * part for part in each.parts()]
        losses[name] = [float(part.detach()) for part in parts]
        gradients[name] = [_gradient(part, each.feature) for part in parts]
    whole = {name: torch.stack(each).sum(0) for name, each in gradients.items()}
    totals = _columns([sum(each) for each in losses.values()], [*whole.values()])
    result = {}
    for (name, each), numbers in zip(compared.items(), totals, strict=True):
        weight, student = terms[name]
        shares = each.mean_weights().tolist()  # none for a supervised term
        rows = zip(each.teachers, shares, _columns(losses[name], gradients[name]), strict=False)
        teachers = {key: TeacherInfluence(share, *columns) for key, share, columns in rows}
        own = dict(zip(each.teachers, gradients[name], strict=False))
        cosines = {(a, b): _cosine(own[a], own[b]) for a, b in combinations(own, 2)}
        result[name] = TermInfluence(student, weight, *numbers, teachers, cosines)
    same = [(a, b) for a, b in combinations(compared, 2) if terms[a][1] == terms[b][1]]
    return InfluenceReport(step, result, {(a, b): _cosine(whole[a], whole[b]) for a, b in same})


def _columns(losses: list[float], gradients: list[Tensor]) -> list[tuple[float, float, float, float]]:
    """Return for each row its loss, the share of it, the length of its gradient, and the share of that."""
    lengths = [_norm(gradient) for gradient in gradients]
    return list(zip(losses, _shares(losses), lengths, _shares(lengths), strict=True))


def _gradient(loss: Tensor, feature: Side) -> Tensor:
    """Return `d loss / d feature`, flat, in float32 or float64; zero where the loss does not depend on the feature."""
    if not isinstance(feature, Tensor):
        return torch.cat([_gradient(loss, each) for each in feature])
    gradient = torch.zeros_like(feature)
    # A mean over the batch has small gradients, which would underflow in a half-precision feature.
    scale = max(feature.shape[0], 1)
    if loss.requires_grad and feature.requires_grad:
        (gradient,) = torch.autograd.grad(loss * scale, feature, retain_graph=True, materialize_grads=True)
    return (gradient.to(torch.promote_types(feature.dtype, torch.float32)) / scale).flatten()


def _norm(gradient: Tensor) -> float:
    largest = gradient.abs().amax() if gradient.numel() else gradient.sum()
    divisor = torch.where(largest == 0, 1.0, largest)
    return float(torch.linalg.vector_norm(gradient / divisor)) * float(divisor)


def _cosine(a: Tensor, b: Tensor) -> float | None:
    if not (a.any() and b.any()):
        return None
    a, b = (each / each.abs().amax() for each in (a, b))
    a, b = (each / torch.linalg.vector_norm(each) for each in (a, b))
    return float((a @ b).clamp(-1, 1))


def _shares(values: list[float]) -> list[float]:
    """Return each magnitude as a share of their sum; 0 where all are 0."""
    total = sum(abs(value) for value in values)
    return [abs(value) / total if total else 0.0 for value in values]
