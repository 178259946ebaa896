"""Weighting: the shortest mix of the teachers' gradients. Touches the losses' graph as far as the student's feature.

Sener and Koltun, MGDA, 2018, and Du et al., AE-KD, 2020: no teacher is followed against another.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlib._checks import check_number
from kdlib._maths import full_precision
from kdlib.weighting._checks import check_most, check_teachers

__all__ = ["GradientWeighting"]

RIDGE = 1e-6
"""Added to the diagonal, of its mean: two equal gradients then share alike, and no pair is without curvature."""


class GradientWeighting(nn.Module):
    r"""Weights that make the mix of the teachers' gradients as short as it can be, the same for every sample.

    With :math:`g_k = \partial \sum_i L_{k,i} / \partial s` the gradient of teacher k's losses with respect to the
    student's feature s, before any projection, over the whole batch,

    .. math:: w = \arg\min_a \tfrac12 \Bigl\| \sum_k a_k g_k \Bigr\|^2, \qquad \sum_k a_k = 1, \quad 0 \le a_k \le C

    A step against the mix lowers the loss of every teacher with a weight between the bounds at the same rate, none
    rises for C = 1, and a mix of length 0 means that no step serves all. Two teachers have a closed form,
    :math:`a_1 = \mathrm{clip}((g_2 - g_1) \cdot g_2 / \|g_1 - g_2\|^2, 1 - C, C)`; more are solved exactly by pairs.

    One teacher weighs 1. Equal teachers weigh the same. A useless teacher pulls hard as long as the student is far from
    it, and so weighs little; but the shortest gradient counts as the best, so a teacher that the student already equals
    takes all the weight and the student stands still: C < 1 prevents it. Gradients that are all 0, or not all finite,
    give uniform weights, as does a call without a graph (under `no_grad`, or a frozen student). Masked samples, whose
    losses are 0, do not count. No gradient flows out of the weights. Each process of a distributed run solves for its
    own part of the batch.

    Costs K backward passes from the losses to the feature, through projections and losses alone, and one small copy
    to the host.

    Args:
        most: C, above 0 and at most 1; below 1 it must be at least 1 / K. AE-KD proposes such a bound.

    Raises:
        ValueError: `most` out of its range.

    Examples:
        >>> import torch
        >>> weighting = GradientWeighting()
        >>> weighting
        GradientWeighting(most=1.0)
        >>> student = torch.zeros(1, 2, requires_grad=True)
        >>> near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> losses = torch.stack([(student - each).square().sum(1) for each in (near, far)])
        >>> weighting(losses, student=student, teachers=[near, far], targets={})
        tensor([[0.8000],
                [0.2000]])

    References:
        Sener, Koltun, *Multi-Task Learning as Multi-Objective Optimization*, arXiv 1810.04650 (C = 1). Du et al., *Agree
        to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space*, NeurIPS 2020, take the gradient at the
        logits and solve by a one-class SVM, with nu = 1 / (C K) for our C.
    """

    needs_graph: ClassVar[bool] = True

    def __init__(self, *, most: float = 1.0) -> None:
        super().__init__()
        check_number("GradientWeighting", "most", most, above=0, max=1)
        self.most = most

    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)` that still hang on `student`; the graph is kept for the backward pass.

        Args:
            losses: `(k, b)`, with their graph.
            student: the feature `(b, ...)` that the losses were computed from.
            teachers: not looked at.
            targets: not looked at.

        Raises:
            ValueError: `most` below 1 / k.
        """
        check_teachers("GradientWeighting", losses)
        k = losses.shape[0]
        check_most("GradientWeighting", self.most, k)
        uniform = torch.full_like(losses, 1 / max(k, 1), requires_grad=False)
        if k < 2 or not (losses.requires_grad and student.requires_grad):
            return uniform
        sums = losses.sum(1)
        found = [torch.autograd.grad(each, student, retain_graph=True, allow_unused=True)[0] for each in sums]
        with torch.no_grad(), full_precision(losses):
            dtype = torch.promote_types(student.dtype, torch.float32)
            zero = torch.zeros((), dtype=dtype, device=student.device).expand(student.shape)
            gradients = torch.stack([(zero if each is None else each.to(dtype)).flatten() for each in found])
            # Squares of the raw values might overflow or vanish; the weights do not depend on the common scale.
            largest = gradients.abs().amax() if gradients.numel() else zero.sum()
            gradients = gradients / torch.where(largest == 0, 1.0, largest)
            gram = _gram(gradients)
        if not all(isfinite(value) for row in gram for value in row):
            return uniform
        return torch.tensor(_min_norm(gram, self.most), dtype=torch.float64).to(losses).unsqueeze(1).expand_as(losses)

    def extra_repr(self) -> str:
        """Arguments of the call that rebuilds the weighting."""
        return f"most={self.most!r}"


def _gram(gradients: Tensor) -> list[list[float]]:
    """Dot products of `(k, n)`, to far below the ridge: a matrix product in float32 would tell equal rows apart."""
    dtype = torch.float32 if gradients.device.type == "mps" else torch.float64
    k = len(gradients)
    pairs = [(i, j) for i in range(k) for j in range(i + 1)]
    products = torch.stack([(gradients[i] * gradients[j]).sum(dtype=dtype) for i, j in pairs]).tolist()
    found = dict(zip(pairs, products, strict=True))
    return [[found[max(i, j), min(i, j)] for j in range(k)] for i in range(k)]


def _min_norm(gram: Sequence[Sequence[float]], most: float = 1.0, *, rounds: int = 2000) -> list[float]:
    """The weights a, from 0 to `most` and of sum 1, that minimize `a G a` of a Gram matrix `(k, k)`.

    Moves weight between the two entries that most want it, by the exact amount, until no pair gains: sequential minimal
    optimization, which for two entries is the closed form. From equal weights, so a tie leaves them equal.

    Args:
        gram: dot products of k vectors, finite.
        most: bound of each weight, at least 1 / k.
        rounds: moves at most; a few tens are usual.

    Examples:
        >>> [round(share, 5) for share in _min_norm([[1.0, 0.0], [0.0, 4.0]])]
        [0.8, 0.2]
        >>> _min_norm([[1.0, 2.0], [2.0, 4.0]], most=0.75)
        [0.75, 0.25]
    """
    k = len(gram)
    trace = sum(gram[i][i] for i in range(k))
    matrix = [
        [value + (RIDGE * trace / k if i == j else 0.0) for j, value in enumerate(row)] for i, row in enumerate(gram)
    ]
    a = [1 / k] * k
    for _ in range(rounds):
        slope = [sum(value * share for value, share in zip(row, a, strict=True)) for row in matrix]
        up = min((i for i in range(k) if a[i] < most), key=slope.__getitem__, default=0)
        down = max((i for i in range(k) if a[i] > 0), key=slope.__getitem__)
        gap = slope[down] - slope[up]
        if gap <= 1e-12 * trace:
            break
        move = gap / (matrix[up][up] + matrix[down][down] - matrix[up][down] - matrix[down][up])
        move = min(move, most - a[up], a[down])
        a[up] = most if move == most - a[up] else a[up] + move
        a[down] -= move
    return a
