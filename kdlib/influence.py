"""Influence: what each term and teacher of an objective does to the student. Touches tensors and module state only.

A weight says how a term was meant; its loss and its gradient say what it does. `Objective.report` and
`Distiller.report` measure them on one batch, and leave everything as it was.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Comparison", "InfluenceReport", "TeacherInfluence", "TermInfluence", "measure", "unchanged"]


@dataclass(frozen=True)
class TeacherInfluence:
    """What one teacher does within a term.

    Args:
        weight: its mean weight over the batch.
        loss: its weighted loss, times the term's weight; the teachers' losses sum to the term's.
        loss_share: of the term, by magnitude.
        gradient: Euclidean length of the gradient of `loss` with respect to the student's feature, over the batch.
        gradient_share: of the sum over the term's teachers.
    """

    weight: float
    loss: float
    loss_share: float
    gradient: float
    gradient_share: float


@dataclass(frozen=True)
class TermInfluence:
    """What one term does.

    Args:
        student: the feature that it reads, where its gradient is taken.
        weight: the term's weight at this step.
        loss: the term's value times its weight.
        loss_share: of all terms, by magnitude.
        gradient: Euclidean length of the gradient of `loss` with respect to the student's feature, over the batch.
        gradient_share: of the sum over all terms. Terms of different features compare by order of magnitude only.
        teachers: name to what that teacher does; empty for a supervised term.
        cosines: pair of teachers to the cosine of their gradients; `None` where one is zero.
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
    """What each term and teacher does to the student, on one batch.

    Args:
        step: where the schedules of the weights stand.
        terms: name to what that term does.
        cosines: pair of terms that read the same feature to the cosine of their gradients; `None` where one is zero.

    Examples:
        >>> from kdlib.losses import HintLoss
        >>> from kdlib.objective import Objective, Term
        >>> objective = Objective({"hint": Term(HintLoss(), student="out", teacher="out", weight=2.0)})
        >>> teachers = {"near": {"out": torch.ones(1, 2)}, "far": {"out": -2 * torch.ones(1, 2)}}
        >>> report = objective.report({"out": torch.zeros(1, 2)}, teachers)
        >>> print(report.table())
        influence at step 0   weight      loss   share  gradient   share
        hint (out)             2.000     5.000  100.0%     1.414  100.0%
          near                 0.500     1.000   20.0%     1.414   33.3%
          far                  0.500     4.000   80.0%     2.828   66.7%
        cosine of gradients: hint: near, far -1.00
        >>> report.terms["hint"].teachers["far"].loss
        4.0
    """

    step: int
    terms: dict[str, TermInfluence]
    cosines: dict[tuple[str, str], float | None]

    def table(self) -> str:
        """The report as plain text, in columns."""
        title = f"influence at step {self.step}"
        rows: list[tuple[str, TermInfluence | TeacherInfluence]] = []
        for name, term in self.terms.items():
            rows.append((f"{name} ({term.student})", term))
            rows += [(f"  {who}", teacher) for who, teacher in term.teachers.items()]
        wide = max(len(title), *(len(label) for label, _ in rows)) if rows else len(title)
        lines = [f"{title:<{wide}} {'weight':>8} {'loss':>9} {'share':>7} {'gradient':>9} {'share':>7}"]
        for label, row in rows:
            numbers = (f"{row.weight:8.3f} {row.loss:#9.4g}", f"{row.loss_share:7.1%} {row.gradient:#9.4g}")
            lines.append(f"{label:<{wide}} {' '.join(numbers)} {row.gradient_share:7.1%}")
        pairs = [(f"{name}: ", term.cosines) for name, term in self.terms.items()]
        shown = [
            f"cosine of gradients: {prefix}{a}, {b} {'none' if cosine is None else f'{cosine:.2f}'}"
            for prefix, cosines in [*pairs, ("", self.cosines)]
            for (a, b), cosine in cosines.items()
        ]
        return "\n".join(lines + shown)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON; a number that is not finite becomes `None`."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        def pairs(cosines: Mapping[tuple[str, str], float | None]) -> list[dict[str, Any]]:
            return [{"a": a, "b": b, "cosine": plain(cosine)} for (a, b), cosine in cosines.items()]

        terms = {}
        for name, term in self.terms.items():
            row = {key: plain(value) for key, value in vars(term).items() if key not in ("teachers", "cosines")}
            row["teachers"] = {
                who: {key: plain(value) for key, value in vars(teacher).items()}
                for who, teacher in term.teachers.items()
            }
            terms[name] = row | {"cosines": pairs(term.cosines)}
        return {"step": self.step, "terms": terms, "cosines": pairs(self.cosines)}


class Comparison(NamedTuple):
    """One term on one batch, as an objective compares it.

    Args:
        feature: the student's, `(b, ...)`.
        losses: `(k, b)`, times the sample weights, or `(k,)` without a per-sample form; of a supervised term likewise
            `(b,)` or a scalar.
        teachers: names of the k teachers.
        weights: `(k, b)`; `None` for a supervised term.
        sample: `(b,)`, the sample weights; `None` for all ones.
    """

    feature: Tensor
    losses: Tensor
    teachers: tuple[str, ...] = ()
    weights: Tensor | None = None
    sample: Tensor | None = None

    def value(self) -> Tensor:
        """The term before its weight, a scalar."""
        if self.weights is None:
            return self._mean(self.losses)
        if self.losses.dim() == 1:
            return (self.mean_weights() * self.losses).sum()
        return self._mean((self.weights.to(self.losses.dtype) * self.losses).sum(0))

    def parts(self) -> list[Tensor]:
        """Scalars that sum to the value, one for each teacher; the value alone of a supervised term."""
        if self.weights is None:
            return [self.value()]
        if self.losses.dim() == 1:
            return list(self.mean_weights().detach() * self.losses)
        return [self._mean(each) for each in self.weights.detach().to(self.losses.dtype) * self.losses]

    def mean_weights(self) -> Tensor:
        """Each teacher's weight, the sample-weighted mean over the batch: `(k,)`."""
        if self.weights is None:
            return self.losses.new_empty(0)
        weights = self.weights.to(self.losses.dtype)
        if self.sample is None:
            return weights.mean(1)
        share = self.sample.to(weights.dtype)
        return (weights * share).sum(1) / _divisor(share)

    def _mean(self, losses: Tensor) -> Tensor:
        """The mean of losses, which hold the sample weights, over the sum of these."""
        if self.sample is None or not losses.dim():
            return losses.mean()
        return losses.sum() / _divisor(self.sample.to(losses.dtype))


def _divisor(sample: Tensor) -> Tensor:
    """The sum of the sample weights, or 1 where all are 0: then so is what it divides."""
    total = sample.sum()
    return torch.where(total == 0, 1.0, total)


def measure(step: int, compared: Mapping[str, Comparison], terms: Mapping[str, tuple[float, str]]) -> InfluenceReport:
    """Losses, gradients and their shares of the terms of one batch.

    Args:
        step: where the schedules of the weights stand.
        compared: name of each term to its comparison, whose feature is a leaf of the graph.
        terms: name of each term to its weight and the name of its feature.
    """
    losses: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    gradients: dict[str, list[Tensor]] = {}
    for name, each in compared.items():
        shares[name] = each.mean_weights().tolist()
        parts = [terms[name][0] * part for part in each.parts()]
        losses[name] = [float(part.detach()) for part in parts]
        gradients[name] = [_gradient(part, each.feature) for part in parts]
    whole = {name: torch.stack(each).sum(0) for name, each in gradients.items()}
    norms = [_norm(gradient) for gradient in whole.values()]
    rows = zip(_portions([sum(each) for each in losses.values()]), norms, _portions(norms), strict=True)
    found = {}
    for (name, each), (loss_share, norm, norm_share) in zip(compared.items(), rows, strict=True):
        lengths = [_norm(gradient) for gradient in gradients[name]]
        columns = (losses[name], _portions(losses[name]), lengths, _portions(lengths))
        numbers = zip(each.teachers, shares[name], *columns, strict=bool(each.teachers))
        cosines = {
            (each.teachers[i], each.teachers[j]): _cosine(gradients[name][i], gradients[name][j])
            for i, j in combinations(range(len(each.teachers)), 2)
        }
        found[name] = TermInfluence(
            student=terms[name][1],
            weight=terms[name][0],
            loss=sum(losses[name]),
            loss_share=loss_share,
            gradient=norm,
            gradient_share=norm_share,
            teachers={who: TeacherInfluence(*values) for who, *values in numbers},
            cosines=cosines,
        )
    same = [(a, b) for a, b in combinations(compared, 2) if terms[a][1] == terms[b][1]]
    return InfluenceReport(step, found, {(a, b): _cosine(whole[a], whole[b]) for a, b in same})


@contextmanager
def unchanged(*modules: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep buffers, plain attributes and torch's random state as they are, whatever a forward pass does to them.

    Inside, copies stand in for the buffers: the buffers themselves may be part of a graph that waits for its backward.
    """
    inside = {each for module in modules for each in module.modules()}
    kept = [(each, dict(vars(each)), dict(each._buffers)) for each in inside]
    copies = {
        id(buffer): buffer.detach().clone() for _, _, own in kept for buffer in own.values() if buffer is not None
    }
    others = {"devices": [device], "device_type": device.type} if device.type in ("cuda", "xpu") else {"devices": []}
    try:
        for each, _, own in kept:
            each._buffers.update({name: copies.get(id(buffer)) for name, buffer in own.items()})
        with torch.random.fork_rng(**others):
            yield
    finally:
        for each, attributes, own in kept:
            for name in set(vars(each)) - set(attributes):
                del vars(each)[name]
            vars(each).update(attributes)
            each._buffers.clear()
            each._buffers.update(own)


def _gradient(loss: Tensor, feature: Tensor) -> Tensor:
    """`d loss / d feature`, flat, in float32 or float64; zero where the loss does not hang on the feature."""
    dtype = torch.promote_types(feature.dtype, torch.float32)
    found: Tensor | None = None
    if loss.requires_grad and feature.requires_grad:
        # A mean over the batch has small gradients: a half-precision feature would lose them on the way back.
        scale = max(feature.shape[0], 1)
        found = torch.autograd.grad(loss * scale, feature, retain_graph=True, allow_unused=True)[0]
        found = None if found is None else found.to(dtype) / scale
    return (torch.zeros(feature.numel(), dtype=dtype, device=feature.device) if found is None else found).flatten()


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


def _portions(values: list[float]) -> list[float]:
    """Each magnitude as a share of their sum; 0 where all are 0."""
    total = sum(abs(value) for value in values)
    return [abs(value) / total if total else 0.0 for value in values]
