"""Projection of embeddings by a linear map."""

from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_shape
from kdlib._repr import CallRepr

__all__ = ["LinearProjection"]


class LinearProjection(CallRepr):
    """Maps the student's embeddings to the teacher's dimension: `y = W x`, or `y = W x + b` with `bias`.

    Without a bias, the default, the origin is mapped to the origin, so directions are mapped to directions. Angular
    losses and margin heads compare directions.

    Args:
        in_dim: dimension of the student's embedding.
        out_dim: dimension of the teacher's embedding.
        bias: add a learned offset.

    Examples:
        >>> import torch
        >>> project = LinearProjection(128, 512)
        >>> project(torch.rand(4, 128)).shape
        torch.Size([4, 512])
    """

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        check_number("LinearProjection", "in_dim", in_dim, min=1, integer=True)
        check_number("LinearProjection", "out_dim", out_dim, min=1, integer=True)
        self.in_dim, self.out_dim, self.bias = in_dim, out_dim, bias
        self.linear = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, student: Tensor) -> Tensor:
        """Map `(b, in_dim)` to `(b, out_dim)`."""
        check_floating("LinearProjection", student=student)
        check_shape("LinearProjection", "student", student, "b d", d=self.in_dim)
        projected: Tensor = self.linear(student)
        return projected
