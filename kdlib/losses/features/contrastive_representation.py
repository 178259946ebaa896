"""Contrastive representation distillation: InfoNCE between the student's and the teacher's embeddings."""

import torch
from torch import Tensor, nn

from kdlib._checks import (
    check_floating,
    check_number,
    check_pair,
    check_same_batch,
    check_shape,
    check_weight,
    check_whole_numbers,
)
from kdlib._gather import gather_rows
from kdlib._maths import FAR, Reduction, directions, finite_weight, full_precision, promote, reduce
from kdlib.losses._checks import check_gathered_reduction
from kdlib.losses._layers import affine
from kdlib.losses._module import LossModule

__all__ = ["ContrastiveRepresentationLoss", "contrastive_representation"]


def contrastive_representation(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.07,
    negatives: Tensor | None = None,
    target: Tensor | None = None,
    negatives_target: Tensor | None = None,
    reduction: Reduction = "mean",
    weight: Tensor | None = None,
    gather: bool = False,
) -> Tensor:
    r"""Compute InfoNCE in both directions: each embedding must identify its counterpart among other samples.

    .. math::
        \ell_i = - \frac{1}{2} \log \frac{e^{\langle s_i, t_i \rangle / \tau}}
        {\sum_{j \in N_i} e^{\langle s_i, t_j \rangle / \tau} + \sum_{k \in Q_i} e^{\langle s_i, q_k \rangle / \tau}}
        - \frac{1}{2} \log \frac{e^{\langle s_i, t_i \rangle / \tau}}{\sum_{j \in N_i} e^{\langle s_j, t_i \rangle / \tau}}

    for sample i, with s and t the embeddings of the student and of the teacher, and q those of the teacher for samples
    outside the batch, each divided by its Euclidean length. :math:`N_i` holds i itself and the samples of the batch
    with another identity than i, :math:`Q_i` the negatives with another identity. Without `target`, all samples have
    different identities. The loss is at least 0, and 0 for an embedding without negatives. Zero embeddings are treated
    as orthogonal to everything (cosine 0) and get no gradient.

    Args:
        student: embeddings `(b, d)`, already projected into the teacher's space.
        teacher: embeddings `(b, d)`; never receives a gradient.
        temperature: :math:`\tau`, above 0; smaller values give more weight to the nearest negatives.
        negatives: further embeddings of the teacher `(m, d)`, without a gradient; with `gather`, the same on all
            processes.
        target: `(b,)` whole numbers, the identity of each sample. Samples of the same identity are neither negatives
            nor positives of each other.
        negatives_target: `(m,)`, the identities of `negatives`; `None` if none of them is in the batch.
        reduction: `"mean"` over the batch, or `"none"`.
        weight: `(b,)`, at least 0, weight of each sample's loss. A sample of weight 0 is not a negative of the others
            either. With any other weight it is a full negative.
        gather: use the rows of all processes of the default process group as one batch. Processes may hold different
            numbers of rows. Every process gets the same value, and the mean of the gradients over the processes is
            that of this batch. Without a process group it has no effect.

    Returns:
        A scalar for `"mean"`: `sum(weight * loss) / sum(weight)`, or 0 if all weights are 0. `(b,)` for `"none"`,
        multiplied by `weight` if given. Float32, or float64 if an input is float64.

    Raises:
        ValueError: The shapes differ, `temperature` is not above 0, `reduction` is unknown or `"none"` with `gather`,
            or `negatives_target` comes without `negatives` and `target`.
        TypeError: The embeddings are not floating-point tensors, or the identities are not whole numbers.

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
        directions of the paper. The paper's own objective is binary (noise-contrastive estimation), with 16384
        negatives from a memory of both embeddings of every training sample. That memory is too large for millions of
        faces, its embeddings are out of date, and the first batch sets its normalizer. Here the negatives are the batch
        and, for the direction of the student, a queue. Values and a good weight of the term (0.8 in the paper's code)
        therefore differ from the paper.
    """
    check_number("contrastive_representation", "temperature", temperature, above=0)
    check_pair("contrastive_representation", student, teacher, "b d")
    check_gathered_reduction("contrastive_representation", gather, reduction)
    check_weight("contrastive_representation", weight, student.shape[0])
    weight = None if weight is None else finite_weight(weight)
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
            weight, target = (None if x is None else gather_rows(x, grad=False) for x in (weight, target))
        other = None if target is None or negatives_target is None else target[:, None] != negatives_target
        losses = _info_nce(student, teacher, target, weight, temperature, outside, other, origin)
        return reduce("contrastive_representation", losses, reduction, weight)


def _info_nce(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    outside: Tensor | None,
    outside_negatives: Tensor | None,
    origin: torch.dtype,
) -> Tensor:
    """Return the losses `(b,)` of `contrastive_representation`; the teacher `(b, d)` may have a graph.

    `outside` is `(m, d)`; `outside_negatives` `(b, m)` selects its negatives, `None` means all.
    """
    batch = student.shape[0]
    if batch == 0:
        return student.sum(1)
    (s, _), (t, _) = directions(student, origin), directions(teacher, origin)
    logits = s @ t.T / temperature
    if target is not None or weight is not None:
        kept = torch.ones_like(logits, dtype=torch.bool) if target is None else target[:, None] != target
        if weight is not None:
            kept = kept & (weight != 0) & (weight != 0)[:, None]
        itself = torch.eye(batch, dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(~(kept | itself), -torch.inf)
    wide = logits
    if outside is not None:
        further = s @ directions(outside, origin)[0].T / temperature
        if outside_negatives is not None:
            further = further.masked_fill(~outside_negatives, -torch.inf)
        wide = torch.cat([logits, further], dim=1)
    return -0.5 * (wide.log_softmax(1)[:, :batch].diagonal() + logits.log_softmax(0).diagonal())


class ContrastiveRepresentationLoss(LossModule):
    """`contrastive_representation` after a learned linear map on each side, with an optional queue of negatives.

    The queue stores the teacher's embeddings of the last `queue_size` samples before the map, which is applied in every
    call. So its entries are never out of date, because the teacher is frozen. The queue is part of the state dict. It
    is updated only in training mode, after the loss is computed, in the order of the samples and without samples of
    weight 0; with `gather`, each process adds the samples of all. A partly filled queue is used as far as it is filled.
    Samples with a `target` are not negatives of later samples of the same identity. Without `target`, a sample that
    returns while it is in the queue has its own embedding as a negative, so keep the queue shorter than an epoch.

    The maps and the queue belong to one teacher: a term with several teachers needs one loss for each. The weights of
    the maps are parameters, which the optimizer must receive; they are not part of the deployed student. Computations
    use float32 even if the parameters have half precision.

    Args:
        student_dim: dimensions of the student's embedding.
        teacher_dim: dimensions of the teacher's embedding.
        feature_dim: dimensions of the space in which they are compared.
        temperature: above 0.
        queue_size: number of embeddings in the queue; 0 for negatives from the batch only.
        gather: use the rows of all processes as one batch; `"none"` is then not accepted and `per_sample` is False.
        reduction: `"mean"` or `"none"`; `forward` may override it.

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
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        owner = "ContrastiveRepresentationLoss"
        check_number(owner, "student_dim", student_dim, min=1, integer=True)
        check_number(owner, "teacher_dim", teacher_dim, min=1, integer=True)
        check_number(owner, "feature_dim", feature_dim, min=1, integer=True)
        check_number(owner, "temperature", temperature, above=0)
        check_number(owner, "queue_size", queue_size, min=0, integer=True)
        check_gathered_reduction(owner, gather, reduction)
        self.student_dim, self.teacher_dim, self.feature_dim = student_dim, teacher_dim, feature_dim
        self.temperature, self.queue_size, self.gather = temperature, queue_size, gather
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
        reduction: Reduction | None = None,
    ) -> Tensor:
        """Compare `student` `(b, student_dim)` with `teacher` `(b, teacher_dim)`.

        `target` `(b,)` are the identities, if given; `reduction=None` uses the constructor's.
        """
        owner = "ContrastiveRepresentationLoss"
        reduction = reduction or self.reduction
        check_floating(owner, student=student, teacher=teacher)
        check_shape(owner, "student", student, "b d", d=self.student_dim)
        check_shape(owner, "teacher", teacher, "b d", d=self.teacher_dim)
        check_same_batch(owner, "student", student, "teacher", teacher)
        check_gathered_reduction(owner, self.gather, reduction)
        check_weight(owner, weight, student.shape[0])
        weight = None if weight is None else finite_weight(weight)
        if target is not None:
            check_whole_numbers(owner, "target", target, student.shape[0])
        origin = student.dtype
        with full_precision(student):
            # Values above `FAR` are clamped, because their sums in the maps could overflow.
            student, teacher = promote(student, teacher)
            s = affine(self.student_map, student.clamp(-FAR, FAR))
            if self.gather:
                s, teacher = gather_rows(s, grad=True), gather_rows(teacher, grad=False)
                weight, target = (None if x is None else gather_rows(x, grad=False) for x in (weight, target))
            t = affine(self.teacher_map, teacher.clamp(-FAR, FAR))
            outside, other = None, None
            if self.queue_size:
                # A copy, because the gradient of the map needs the queue as it was before this batch is added.
                outside = affine(self.teacher_map, self.queue.to(t.dtype, copy=True).clamp(-FAR, FAR))
                other = (torch.arange(self.queue_size, device=t.device) < self.queue_seen).expand(len(s), -1)
                if target is not None:
                    other = other & ~(self.queue_known & (target[:, None] == self.queue_target))
            losses = _info_nce(s, t, target, weight, self.temperature, outside, other, origin)
            if self.training and self.queue_size:
                self._enqueue(teacher, target, weight)
            return reduce(owner, losses, reduction, weight)

    @torch.no_grad()
    def _enqueue(self, teacher: Tensor, target: Tensor | None, weight: Tensor | None) -> None:
        """Replace the oldest entries by the samples of weight above 0; shapes do not depend on the weights."""
        keep = torch.ones(len(teacher), dtype=torch.bool, device=teacher.device) if weight is None else weight != 0
        # Omitted samples are sorted first, so that the others are the end of the batch, in their order.
        order = keep.to(torch.uint8).argsort(stable=True)[-self.queue_size :]
        seen = self.queue_seen + keep.sum()
        keep = keep[order]
        slots = (seen - len(order) + torch.arange(len(order), device=teacher.device)) % self.queue_size
        known = torch.full_like(keep, target is not None)
        target = torch.zeros_like(order) if target is None else target[order]
        for buffer, new in ((self.queue, teacher[order]), (self.queue_target, target), (self.queue_known, known)):
            chosen = keep.reshape(-1, *[1] * (new.dim() - 1))
            buffer[slots] = torch.where(chosen, new.to(buffer.dtype), buffer[slots])
        self.queue_seen.copy_(seen)
