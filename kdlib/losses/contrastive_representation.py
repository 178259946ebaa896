"""Losses: contrastive representation distillation, to tell one's own teacher's embedding from others. Touches tensors only.

After Tian et al., CRD, 2020: raise the mutual information of the student's and the teacher's embeddings of one sample.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_choice,
    check_floating,
    check_number,
    check_pair,
    check_same_batch,
    check_shape,
    check_weight,
    check_whole_numbers,
)
from kdlib._gather import gather_rows
from kdlib._maths import REDUCTIONS, full_precision, hold_short, promote, reduce, unit_rows
from kdlib.losses._checks import check_gathered_reduction

__all__ = ["ContrastiveRepresentationLoss", "contrastive_representation"]

FAR = 1e15
"""A larger value counts as this one before a map, without gradient: sums of it would leave float32."""


def contrastive_representation(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.07,
    negatives: Tensor | None = None,
    target: Tensor | None = None,
    negatives_target: Tensor | None = None,
    reduction: Literal["mean", "none"] = "mean",
    weight: Tensor | None = None,
    gather: bool = False,
) -> Tensor:
    r"""InfoNCE in both directions: each sample's two embeddings find one another among those of the other samples.

    .. math::
        \ell_i = - \frac{1}{2} \log \frac{e^{\langle s_i, t_i \rangle / \tau}}
        {\sum_{j \in N_i} e^{\langle s_i, t_j \rangle / \tau} + \sum_{k \in Q_i} e^{\langle s_i, q_k \rangle / \tau}}
        - \frac{1}{2} \log \frac{e^{\langle s_i, t_i \rangle / \tau}}{\sum_{j \in N_i} e^{\langle s_j, t_i \rangle / \tau}}

    for sample i, with s, t and q the embeddings of the student, of the teacher, and of the teacher for samples outside
    the batch, each divided by its Euclidean length. :math:`N_i` is i itself and the samples of the batch of another
    identity than i, :math:`Q_i` the negatives of another identity. Without `target`, every other sample is of another
    identity. At least 0; an embedding without others to be told from has a loss of 0. An embedding of zeros has a
    cosine of 0 to anything and gets no gradient.

    Args:
        student: embeddings `(b, d)`, already projected into the teacher's space.
        teacher: embeddings `(b, d)`; never receives a gradient.
        temperature: :math:`\tau`, above 0; smaller looks more at the nearest of the others.
        negatives: further embeddings of the teacher `(m, d)`, never with a gradient; with `gather`, to be given the
            same on every process.
        target: `(b,)` whole numbers, the identity of each sample: samples of one identity are no negatives of one
            another, nor positives.
        negatives_target: `(m,)`, the identities of `negatives`; None takes all as of identities outside the batch.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample's loss. A sample of weight 0 is as if it were not in the
            batch: no negative of the others either. Any other weight leaves it a full negative.
        gather: make one batch of the rows of all processes of the default process group, of which each may have
            another number. Every process gets the same value, and a gradient that averages over the processes to
            that of one process with the whole batch. Without a process group it changes nothing.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, and 0 if all weights are 0. `(b,)` for `"none"`,
        times `weight` if given. Float32, or float64 if given float64.

    Raises:
        ValueError: shapes differ, `temperature` not above 0, an unknown `reduction`, `"none"` with `gather`, or
            `negatives_target` without `negatives` and `target`.
        TypeError: embeddings that are not floating point, or identities that are not whole numbers.

    Examples:
        >>> import torch
        >>> student, teacher = torch.eye(2), torch.eye(2)
        >>> round(contrastive_representation(student, teacher, temperature=1.0).item(), 4)  # log(1 + 1 / e)
        0.3133
        >>> same = torch.tensor([7, 7])
        >>> contrastive_representation(student, teacher, target=same).item()
        0.0
        >>> round(contrastive_representation(student, teacher, target=same, temperature=1.0, negatives=teacher).item(), 4)
        0.431

    References:
        Tian, Krishnan, Isola, *Contrastive Representation Distillation*, arXiv 1910.10699. Ours is the objective of
        van den Oord et al., *Representation Learning with Contrastive Predictive Coding*, arXiv 1807.03748, in the two
        directions of the paper, whose own objective is a binary one (noise-contrastive estimation) against 16384
        negatives out of a memory that holds both embeddings of every training sample. That memory does not fit
        millions of faces, follows its sources with a delay, and its normalizer is set by the first batch; here the
        negatives are the batch and, for the student's direction, a queue. So values and a good weight of the term
        (0.8 in the paper's code) are not those of the paper.
    """
    check_number("contrastive_representation", "temperature", temperature, above=0)
    check_pair("contrastive_representation", student, teacher, "b d")
    check_gathered_reduction("contrastive_representation", gather, reduction)
    check_weight("contrastive_representation", weight, student.shape[0])
    if negatives is not None:
        check_floating("contrastive_representation", negatives=negatives)
        check_shape("contrastive_representation", "negatives", negatives, "m d", d=student.shape[1])
    if target is not None:
        check_whole_numbers("contrastive_representation", "target", target, student.shape[0])
    if negatives_target is not None:
        size = 0 if negatives is None or target is None else negatives.shape[0]
        check_whole_numbers("contrastive_representation", "negatives_target", negatives_target, size)
    origin = student.dtype
    with full_precision(student):
        student, teacher = promote(student, teacher)
        outside = None if negatives is None else negatives.detach().to(student.dtype)
        if gather:
            student, teacher = gather_rows(student, grad=True), gather_rows(teacher, grad=False)
            weight, target = _gathered(weight), _gathered(target)
        other = None if target is None or negatives_target is None else target[:, None] != negatives_target
        losses = _info_nce(student, teacher, outside, temperature, _apart(target, weight), other, origin)
        return reduce("contrastive_representation", losses, reduction, weight)


def _gathered(x: Tensor | None) -> Tensor | None:
    return None if x is None else gather_rows(x, grad=False)


def _apart(target: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """`(b, b)`: which samples are negatives of which; None for all of all."""
    apart = None if target is None else target[:, None] != target
    if weight is not None:
        present = weight != 0
        both = present[:, None] & present
        apart = both if apart is None else apart & both
    return apart


def _info_nce(
    student: Tensor,
    teacher: Tensor,
    outside: Tensor | None,
    temperature: float,
    apart: Tensor | None,
    outside_apart: Tensor | None,
    origin: torch.dtype,
) -> Tensor:
    """The losses `(b,)` of `contrastive_representation`, without a cut of the teacher's side from the graph.

    Args:
        student, teacher: `(b, d)`.
        outside: `(m, d)` or None.
        temperature: above 0.
        apart: `(b, b)`, which samples are negatives of which, or None for all; a sample always meets itself.
        outside_apart: `(b, m)` likewise.
        origin: dtype that the student came in.
    """
    batch = student.shape[0]
    if batch == 0:
        return student.sum(1)
    s, t = _directions(student, origin), _directions(teacher, origin)
    logits = s @ t.T / temperature
    if apart is not None:
        itself = torch.eye(batch, dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~(apart | itself), -torch.inf)
    wide = logits
    if outside is not None:
        further = s @ _directions(outside, origin).T / temperature
        if outside_apart is not None:
            further = further.masked_fill(~outside_apart, -torch.inf)
        wide = torch.cat([logits, further], dim=1)
    return -0.5 * (wide.log_softmax(1)[:, :batch].diagonal() + logits.log_softmax(0).diagonal())


def _directions(x_bd: Tensor, origin: torch.dtype) -> Tensor:
    unit, size = unit_rows(x_bd)
    return hold_short(unit, size.unsqueeze(1), origin)


class ContrastiveRepresentationLoss(nn.Module):
    """`contrastive_representation` after a learned linear map on either side, with a queue of negatives if asked.

    The queue holds the teacher's embeddings of the last `queue_size` samples as they came, before the map, which is
    applied anew in every call: they never lag behind it, as the teacher does not move. It is part of the state dict, is
    written in training mode only, after the loss of the batch is computed, and in the order of the samples; samples of
    weight 0 stay out. Until it is full, what there is of it counts. Samples that came with a `target` are no negatives
    of later samples of the same identity; without one, a sample that returns while it is still in the queue meets its
    own embedding there as a negative, so keep the queue shorter than an epoch. With `gather`, every process writes the samples of all.

    The maps and the queue belong to one teacher: a term with several teachers needs one loss for each. The maps'
    weights are parameters, which the optimizer must be given; they are no part of the student that is deployed. The
    maths is float32 also where the parameters are half precision.

    Args:
        student_dim: dimensions of the student's embedding.
        teacher_dim: dimensions of the teacher's.
        feature_dim: dimensions of the space in which they are compared.
        temperature: above 0.
        queue_size: number of embeddings in the queue; 0 for negatives from the batch alone.
        gather: make one batch of the rows of all processes; then there is no `"none"`, and `per_sample` is False.
        reduction: `"mean"` or `"none"`; `forward` may override it.

    Raises:
        ValueError: a dimension below 1, `queue_size` below 0, `temperature` not above 0, an unknown `reduction`, or
            `"none"` with `gather`.

    Examples:
        >>> import torch
        >>> loss = ContrastiveRepresentationLoss(8, 32, feature_dim=16, queue_size=6)
        >>> loss  # doctest: +NORMALIZE_WHITESPACE
        ContrastiveRepresentationLoss(8, 32, feature_dim=16, temperature=0.07, queue_size=6, gather=False,
                                      reduction='mean')
        >>> for _ in range(2):
        ...     value = loss(torch.rand(4, 8), torch.rand(4, 32), target=torch.tensor([0, 1, 2, 2]))
        >>> loss.queue.shape, int(loss.queue_seen)
        (torch.Size([6, 32]), 8)

    References:
        See `contrastive_representation`. The linear maps to 128 dimensions are those of the paper's code.
    """

    per_sample: bool = True
    queue: Tensor
    queue_target: Tensor
    queue_known: Tensor
    queue_seen: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        feature_dim: int = 128,
        temperature: float = 0.07,
        queue_size: int = 0,
        gather: bool = False,
        reduction: Literal["mean", "none"] = "mean",
    ) -> None:
        super().__init__()
        owner = "ContrastiveRepresentationLoss"
        check_number(owner, "student_dim", student_dim, min=1, integer=True)
        check_number(owner, "teacher_dim", teacher_dim, min=1, integer=True)
        check_number(owner, "feature_dim", feature_dim, min=1, integer=True)
        check_number(owner, "temperature", temperature, above=0)
        check_number(owner, "queue_size", queue_size, min=0, integer=True)
        check_choice(owner, "reduction", reduction, REDUCTIONS)
        check_gathered_reduction(owner, gather, reduction)
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.feature_dim = feature_dim
        self.temperature = temperature
        self.queue_size = queue_size
        self.gather = gather
        self.reduction = reduction
        self.per_sample = not gather
        self.student_map = nn.Linear(student_dim, feature_dim)
        self.teacher_map = nn.Linear(teacher_dim, feature_dim)
        self.register_buffer("queue", torch.zeros(queue_size, teacher_dim))
        self.register_buffer("queue_target", torch.zeros(queue_size, dtype=torch.int64))
        self.register_buffer("queue_known", torch.zeros(queue_size, dtype=torch.bool))
        self.register_buffer("queue_seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] | None = None,
    ) -> Tensor:
        """The loss of `student` `(b, student_dim)` against `teacher` `(b, teacher_dim)`.

        `target` `(b,)` holds the identities, if given; `reduction=None` means the constructor's.
        """
        owner = "ContrastiveRepresentationLoss"
        reduction = reduction or self.reduction
        check_floating(owner, student=student, teacher=teacher)
        check_shape(owner, "student", student, "b d", d=self.student_dim)
        check_shape(owner, "teacher", teacher, "b d", d=self.teacher_dim)
        check_same_batch(owner, "student", student, "teacher", teacher)
        check_gathered_reduction(owner, self.gather, reduction)
        check_weight(owner, weight, student.shape[0])
        if target is not None:
            check_whole_numbers(owner, "target", target, student.shape[0])
        origin = student.dtype
        with full_precision(student):
            student, teacher = promote(student, teacher)
            s = _affine(self.student_map, student)
            if self.gather:
                s, teacher = gather_rows(s, grad=True), gather_rows(teacher, grad=False)
                weight, target = _gathered(weight), _gathered(target)
            t = _affine(self.teacher_map, teacher)
            outside, other = None, None
            if self.queue_size:
                # A copy, as the gradient of the map needs what the queue held before this batch is written to it.
                outside = _affine(self.teacher_map, self.queue.to(t.dtype, copy=True))
                other = (torch.arange(self.queue_size, device=t.device) < self.queue_seen).expand(len(s), -1)
                if target is not None:
                    other = other & ~(self.queue_known & (target[:, None] == self.queue_target))
            losses = _info_nce(s, t, outside, self.temperature, _apart(target, weight), other, origin)
            if self.training and self.queue_size:
                self._enqueue(teacher, target, weight)
            return reduce(owner, losses, reduction, weight)

    @torch.no_grad()
    def _enqueue(self, teacher: Tensor, target: Tensor | None, weight: Tensor | None) -> None:
        """Write the samples of weight above 0 over the oldest of the queue; shapes do not depend on the weights."""
        keep = torch.ones(len(teacher), dtype=torch.bool, device=teacher.device) if weight is None else weight != 0
        # Samples that stay out come first, so that those that go in are the end of the batch, in their order.
        order = keep.to(torch.uint8).argsort(stable=True)[-self.queue_size :]
        after = self.queue_seen + keep.sum()
        keep = keep[order]
        slots = (after - len(order) + torch.arange(len(order), device=teacher.device)) % self.queue_size
        known = torch.full_like(keep, target is not None)
        target = torch.zeros_like(order) if target is None else target[order]
        for buffer, new in ((self.queue, teacher[order]), (self.queue_target, target), (self.queue_known, known)):
            chosen = keep.reshape(-1, *[1] * (new.dim() - 1))
            buffer[slots] = torch.where(chosen, new.to(buffer.dtype), buffer[slots])
        self.queue_seen.copy_(after)

    def __repr__(self) -> str:
        return (
            f"ContrastiveRepresentationLoss({self.student_dim}, {self.teacher_dim}, feature_dim={self.feature_dim}, "
            f"temperature={self.temperature!r}, queue_size={self.queue_size}, gather={self.gather}, "
            f"reduction={self.reduction!r})"
        )


def _affine(linear: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x.clamp(-FAR, FAR), linear.weight.to(x.dtype), linear.bias.to(x.dtype))
