"""Similarity of student and teacher embeddings or logits on the same inputs."""

import torch
from torch import Tensor

from kdlib._checks import check_batches, check_pair
from kdlib._maths import safe_divisor, unit_rows

__all__ = ["linear_cka", "mean_cosine", "top_agreement"]


@torch.no_grad()
def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean cosine similarity between both embeddings of each input.

    A high value means that student embeddings can be searched in a gallery of teacher embeddings.

    Args:
        student: `(b, d)`.
        teacher: `(b, d)`, in the same coordinates.

    Returns:
        Scalar in [-1, 1]; 0 for an empty batch. Zero rows are treated as orthogonal to everything (cosine 0).

    Raises:
        TypeError, ValueError: the sides are no floating-point matrices of the same shape.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> mean_cosine(x, torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    check_pair("mean_cosine", student, teacher, "b d")
    if not student.numel():
        return student.new_zeros(())
    first, second = (unit_rows(x.double())[0] for x in (student, teacher))
    mean: Tensor = (first * second).sum(1).mean()
    return mean.to(student.dtype)


@torch.no_grad()
def top_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the share of inputs for which student and teacher predict the same class, right or wrong.

    Args:
        student: logits `(b, c)`.
        teacher: logits `(b, c)` on the same classes.

    Returns:
        Scalar in [0, 1]; 0 for an empty batch. Ties are broken by the first of the largest logits.

    Raises:
        TypeError, ValueError: the sides are no floating-point matrices of the same shape.

    Examples:
        >>> top_agreement(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([[5.0, 4.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    check_pair("top_agreement", student, teacher, "b c")
    if not student.numel():
        return student.new_zeros(())
    return (student.argmax(1) == teacher.argmax(1).to(student.device)).to(student.dtype).mean()


@torch.no_grad()
def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the linear centered kernel alignment of two sets of embeddings.

    `||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)` with centered columns. It is invariant to rotation and scale, and the
    dimensions may differ.

    Args:
        student: `(b, d)`.
        teacher: `(b, D)`.

    Returns:
        Scalar in [0, 1]; 0 where one side is constant.

    Raises:
        TypeError, ValueError: a side is no floating-point matrix, or the batch sizes differ.

    Examples:
        >>> x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        >>> round(float(linear_cka(x, 3 * x[:, [2, 0, 3, 1]])), 4)
        1.0

    References:
        Kornblith, Norouzi, Lee, Hinton: Similarity of Neural Network Representations Revisited, ICML 2019.
    """
    check_batches("linear_cka", "b d", student=student, teacher=teacher)
    first, second = (_centered(x.double()) for x in (student, teacher))
    cross = (first.T @ second).square().sum()
    own = (first.T @ first).norm() * (second.T @ second).norm()
    alignment: Tensor = cross / own.clamp(min=1e-300)
    return alignment.to(student.dtype)


def _centered(x_bd: Tensor) -> Tensor:
    """Center the columns at a scale whose squares neither overflow nor underflow; the scale cancels."""
    if not x_bd.numel():
        return x_bd
    x_bd = x_bd / safe_divisor(x_bd.abs().amax())
    return x_bd - x_bd.mean(0)
