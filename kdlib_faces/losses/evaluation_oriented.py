"""EKD: match the errors of student and teacher at the thresholds of an evaluation (Huang et al., 2022)."""

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdlib._checks import (
    check_batches,
    check_floating,
    check_number,
    check_rank,
    check_relation_reduction,
    check_shape,
    check_weight,
    check_whole_numbers,
)
from kdlib._maths import full_precision
from kdlib_faces._checks import check_rates
from kdlib_faces.heads._margin import LossModule, unit_pair
from kdlib_faces.losses._whole_batch import whole_batch

__all__ = ["EvaluationOrientedLoss", "evaluation_oriented", "negative_thresholds"]

RATES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def evaluation_oriented(
    student: Tensor,
    teacher: Tensor,
    student_thresholds: Tensor,
    teacher_thresholds: Tensor,
    *,
    target: Tensor,
    temperature: float = 0.01,
    num_hard_negatives: int = 2000,
    positive_weight: float = 0.02,
    negative_weight: float = 0.01,
    gather: bool = False,
    reduction: Literal["mean"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Match the soft number of thresholds that each pair exceeds, for positive pairs and the hardest negative pairs.

    With :math:`c_{ij}` the cosine of two embeddings of one network and :math:`\tau_k` the threshold of that network at
    the k-th false positive rate,

    .. math:: r_{ij} = \sum_k \sigma\!\left(\frac{c_{ij} - \tau_k}{T}\right), \qquad
              L = \lambda_P \operatorname*{mean}_{(i,j) \in P} (r^s_{ij} - r^t_{ij})^2
                + \lambda_N \operatorname*{mean}_{(i,j) \in N} (r^s_{ij} - r^t_{ij})^2

    P contains all genuine pairs i < j, N the `num_hard_negatives` impostor pairs with the largest cosine of the
    student. The mean over no pair is 0, so part of each batch should be sampled by identity to contain genuine pairs.
    Thresholds get no gradient. Zero embeddings have cosine 0 to all others and get no gradient.

    A sample with weight 0 is excluded from all pairs. Otherwise a pair has the weight :math:`w_i w_j`, normalized by
    the sum of the weights. Memory is `(b (b - 1) / 2, k)`.

    Args:
        student: embeddings `(b, d)`, not necessarily normalized.
        teacher: embeddings `(b, D)`; gets no gradient.
        student_thresholds: cosines `(k,)`, from `negative_thresholds`.
        teacher_thresholds: cosines `(k,)` of the teacher.
        target: identities `(b,)`, any integers.
        temperature: T, above 0, in the unit of a cosine.
        num_hard_negatives: number of negative pairs, at least 0.
        positive_weight: :math:`\lambda_P`, at least 0.
        negative_weight: :math:`\lambda_N`, at least 0.
        gather: treat the rows of all processes of the default process group as one batch; the processes may have
            different numbers of rows, and all get the same value.
        reduction: only `"mean"`: a relation has no per-sample form.
        weight: `(b,)`, at least 0, weight per sample; 0 masks it.

    Returns:
        A scalar. Float32, or float64 for float64 inputs, also under autocast.

    Raises:
        ValueError: mismatched shapes, or an argument out of range.
        TypeError: embeddings that are not floating point, a target that is not integer.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> threshold, target = torch.tensor([0.6]), torch.tensor([4, 4])
        >>> loss = evaluation_oriented(student, teacher, threshold, threshold, target=target)
        >>> round(loss.item(), 6)  # r is 1/2 at the threshold and 1 far above it: 0.02 / 4
        0.005

    References:
        Huang, Wu, Xu, Ding, *Evaluation-oriented Knowledge Distillation for Deep Face Recognition*, CVPR 2022, arXiv
        2206.02325. The defaults, the pairs and the thresholds follow the authors' code in TFace, which adds ArcFace
        and samples half of each batch by identity.
    """
    owner = "evaluation_oriented"
    check_relation_reduction(owner, reduction)
    _check_call(owner, student, teacher, target, weight)
    _check_arguments(owner, temperature, num_hard_negatives, positive_weight, negative_weight)
    temperature, num_hard_negatives = float(temperature), int(num_hard_negatives)
    positive_weight, negative_weight = float(positive_weight), float(negative_weight)
    check_floating(owner, student_thresholds=student_thresholds, teacher_thresholds=teacher_thresholds)
    check_rank(owner, "student_thresholds", student_thresholds, "k")
    check_shape(owner, "teacher_thresholds", teacher_thresholds, "k", k=len(student_thresholds))
    with full_precision(student):
        if gather:
            student, teacher, target, weight = whole_batch(student, teacher, target, weight, grad=True)
        s_bd, t_bd = unit_pair(student, teacher.detach(), 100 / temperature)
        i, j, share, positive = _pairs(s_bd, target, weight)
        c_s, c_t = (s_bd @ s_bd.T)[i, j], (t_bd @ t_bd.T)[i, j]
        r_s, r_t = (
            torch.sigmoid((c.unsqueeze(1) - thresholds.detach().to(c)) / temperature).sum(1)
            for c, thresholds in ((c_s, student_thresholds), (c_t, teacher_thresholds))
        )
        gap = (r_s - r_t).square()
        score = torch.where(~positive & (share > 0), c_s.detach(), -torch.inf)
        score, chosen = score.topk(min(num_hard_negatives, len(score)))
        hard = torch.where(score > -torch.inf, share[chosen], 0.0)
        return positive_weight * _mean(torch.where(positive, share, 0.0), gap) + negative_weight * _mean(
            hard, gap[chosen]
        )


def negative_thresholds(
    embeddings: Tensor, *, target: Tensor, rates: Sequence[float] = RATES, weight: Tensor | None = None
) -> Tensor:
    """Return the cosine thresholds of given false positive rates.

    With the cosines of n impostor pairs in descending order, the threshold at rate r is the one with index `floor(n
    r)`, so that at most this share of them is larger. A rate below 1 / n gives the largest cosine.

    Args:
        embeddings: `(b, d)`, not necessarily normalized; gets no gradient.
        target: identities `(b,)`, any integers.
        rates: k false positive rates, above 0 and at most 1.
        weight: `(b,)`; samples with weight 0 are excluded, all others count equally.

    Returns:
        `(k,)` in the order of the rates, float32 or float64; minus infinity if there is no impostor pair.

    Raises:
        ValueError: mismatched shapes, or a rate out of range.
        TypeError: embeddings that are not floating point, a target that is not integer.

    Examples:
        >>> import torch
        >>> angles = torch.tensor([0.0, 10.0, 30.0, 60.0]).deg2rad()
        >>> embeddings = torch.stack([angles.cos(), angles.sin()], 1)
        >>> negative_thresholds(embeddings, target=torch.arange(4), rates=[0.5, 0.01]).acos().rad2deg()
        tensor([30.0000, 10.0000])
    """
    owner = "negative_thresholds"
    _check_call(owner, embeddings, embeddings, target, weight)
    check_rates(owner, rates)
    with torch.no_grad(), full_precision(embeddings):
        x_bd, _ = unit_pair(embeddings, embeddings, 1.0)
        i, j, share, positive = _pairs(x_bd, target, weight)
        if not len(share):
            return x_bd.new_full((len(rates),), -torch.inf)
        negative = ~positive & (share > 0)
        ordered = torch.where(negative, (x_bd @ x_bd.T)[i, j], -torch.inf).sort(descending=True).values
        # Computed with integers: 0.1 * 30 is not 3 in floating point.
        parts = [Fraction(str(rate)) for rate in rates]
        places = [negative.sum() * part.numerator // part.denominator for part in parts]
        return ordered[torch.stack(places).clamp(max=len(ordered) - 1)]


class EvaluationOrientedLoss(LossModule):
    """`evaluation_oriented` with running thresholds; see the function for the formula and the arguments.

    In training mode each batch updates the thresholds of both networks before the loss is computed: `(1 - momentum) *
    old + momentum * new`. The first batch with an impostor pair initializes them. A batch without one, or with
    non-finite embeddings, does not change them. In eval mode they are fixed; before initialization those of the batch
    are used.

    The thresholds belong to one teacher, so use one such term per teacher. In a `Term` the identities are the `target`:
    `Term(EvaluationOrientedLoss(), student="embedding", teacher="embedding", target="identity")`.

    Args:
        rates: false positive rates of the thresholds.
        temperature: above 0, in the unit of a cosine.
        num_hard_negatives: number of negative pairs, at least 0.
        positive_weight: weight of the positive pairs, at least 0.
        negative_weight: weight of the negative pairs, at least 0.
        momentum: weight of the new thresholds, above 0 and at most 1.
        gather: treat the rows of all processes as one batch, which then all have the same thresholds; without it each
            has its own.

    Attributes:
        student_thresholds: buffer `(k,)`, part of the state dict.
        teacher_thresholds: buffer `(k,)`, part of the state dict.
        batches: buffer, the number of batches that updated them.

    Examples:
        >>> import torch
        >>> loss = EvaluationOrientedLoss(rates=(0.1, 0.01))
        >>> loss
        EvaluationOrientedLoss(rates=(0.1, 0.01), temperature=0.01, num_hard_negatives=2000, positive_weight=0.02,
        negative_weight=0.01, momentum=0.01, gather=False)
        >>> embeddings = torch.eye(4)
        >>> loss(embeddings, embeddings, target=torch.tensor([0, 0, 1, 1])).item()
        0.0

    References:
        The authors' code initializes the thresholds with 0, so that a momentum of 0.01 needs hundreds of batches; here
        the first batch initializes them.
    """

    per_sample: ClassVar[bool] = False
    student_thresholds: Tensor
    teacher_thresholds: Tensor
    batches: Tensor

    def __init__(
        self,
        *,
        rates: Sequence[float] = RATES,
        temperature: float = 0.01,
        num_hard_negatives: int = 2000,
        positive_weight: float = 0.02,
        negative_weight: float = 0.01,
        momentum: float = 0.01,
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_rates("EvaluationOrientedLoss", rates)
        _check_arguments("EvaluationOrientedLoss", temperature, num_hard_negatives, positive_weight, negative_weight)
        self.momentum = float(check_number("EvaluationOrientedLoss", "momentum", momentum, above=0, max=1))
        self.rates = tuple(float(str(rate)) for rate in rates)  # 0.0001 for np.float32(1e-4)
        self.temperature, self.num_hard_negatives, self.gather = float(temperature), int(num_hard_negatives), gather
        self.positive_weight, self.negative_weight = float(positive_weight), float(negative_weight)
        self.register_buffer("student_thresholds", torch.zeros(len(self.rates)))
        self.register_buffer("teacher_thresholds", torch.zeros(len(self.rates)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        target: Tensor,
        weight: Tensor | None = None,
        reduction: Literal["mean"] | None = None,
    ) -> Tensor:
        """Return the loss of `student` `(b, d)` against `teacher` `(b, D)`, of identities `target` `(b,)`."""
        check_relation_reduction("EvaluationOrientedLoss", reduction or "mean")
        _check_call("EvaluationOrientedLoss", student, teacher, target, weight)
        if self.gather:
            student, teacher, target, weight = whole_batch(student, teacher, target, weight, grad=True)
        student_thresholds, teacher_thresholds = self._thresholds(student, teacher, target, weight)
        return evaluation_oriented(
            student, teacher, student_thresholds, teacher_thresholds, target=target, temperature=self.temperature,
            num_hard_negatives=self.num_hard_negatives, positive_weight=self.positive_weight,
            negative_weight=self.negative_weight, weight=weight,
        )  # fmt: skip

    @torch.no_grad()
    def _thresholds(
        self, student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the thresholds for one batch; in training mode, update the buffers."""
        old = torch.stack([self.student_thresholds, self.teacher_thresholds])
        new = torch.stack([
            negative_thresholds(x, target=target, rates=self.rates, weight=weight).to(old)
            for x in (student.detach(), teacher)
        ])  # fmt: skip
        known, usable = self.batches > 0, new.isfinite().all()
        if not self.training:
            used = torch.where(known, old, new)
            return used[0], used[1]
        updated = torch.where(known & usable, old + self.momentum * (new - old), torch.where(known, old, new))
        stored = torch.where(known | usable, updated, old)
        self.student_thresholds.copy_(stored[0])
        self.teacher_thresholds.copy_(stored[1])
        self.batches += usable
        return updated[0], updated[1]


def _pairs(x_bd: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows and columns of the pairs i < j, their weights, and whether they are genuine."""
    i, j = torch.triu_indices(len(x_bd), len(x_bd), 1, device=x_bd.device)
    w = x_bd.new_ones(len(x_bd)) if weight is None else weight.detach().to(x_bd)
    target = target.to(x_bd.device)
    return i, j, w[i] * w[j], target[i] == target[j]


def _mean(share: Tensor, values: Tensor) -> Tensor:
    """Return the weighted mean; 0 with a graph if all weights are 0."""
    total = share.sum()
    return (share * values).sum() / torch.where(total > 0, total, 1.0)


def _check_call(owner: str, student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor | None) -> None:
    check_batches(owner, "b d", student=student, teacher=teacher)
    check_whole_numbers(owner, "target", target, len(student))
    check_weight(owner, weight, len(student))


def _check_arguments(owner: str, temperature: float, num_hard_negatives: int, positive: float, negative: float) -> None:
    check_number(owner, "temperature", temperature, above=0)
    check_number(owner, "num_hard_negatives", num_hard_negatives, min=0, integer=True)
    check_number(owner, "positive_weight", positive, min=0)
    check_number(owner, "negative_weight", negative, min=0)
