"""Weights from a learned gate on the student's feature."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_shape
from kdlib._maths import full_precision, rescale, unit_rows
from kdlib._repr import CallRepr
from kdlib.types import Targets
from kdlib.weighting._checks import check_teachers

__all__ = ["GateWeighting"]


class GateWeighting(CallRepr):
    r"""Computes the weights of each sample with a learned gate.

    With x the student's feature scaled to length :math:`\sqrt d`,

    .. math:: w_i = f + (1 - K f) \, \mathrm{softmax}\bigl( g(x_i) / \tau \bigr)

    where g is linear, or has one hidden layer with ReLU, and f is the floor. The weights keep their graph, so the gate
    is trained by the weighted loss. The weights are uniform at first, because its last layer is initialized to zero.
    The student receives no gradient through the gate, so it cannot lower its loss by changing the weights.

    The weighted loss trains the gate to prefer, for each sample, the teacher with the smallest loss. A useless teacher
    with random features has a large loss, and its weight decreases; one with constant features has a small loss and
    would get all the weight. `floor` is a lower bound of every weight, and a higher `temperature` slows the change. If
    the losses do not measure the quality of the teachers, do not use a gate.

    A single teacher has weight 1. Teachers with equal losses keep their weights, which are uniform at first. Finite
    features of any size give finite weights and gradients; for a zero feature the biases decide. Terms on other student
    features, or with fewer teachers, need `weigh_by` in the objective.

    Args:
        student_dim: d, dimension or channels of the student's feature.
        num_teachers: K, at least 1.
        hidden: width of the hidden layer; `None` for none.
        temperature: tau, above 0; smaller values give sharper weights.
        floor: f, minimum weight of each teacher, from 0 to 1 / K.

    Examples:
        >>> import torch
        >>> gate = GateWeighting(4, 2, floor=0.1)
        >>> losses = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
        >>> weights = gate(losses, student=torch.rand(3, 4), teachers=[], targets={})
        >>> weights.tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
        >>> (weights * losses).sum().backward()
        >>> bool(gate.out.bias.grad[0] < gate.out.bias.grad[1])
        True

    References:
        Jacobs et al., *Adaptive Mixtures of Local Experts*, Neural Computation 3(1), 1991, introduced
        gates; this form is ours.
    """

    def __init__(
        self,
        student_dim: int,
        num_teachers: int,
        *,
        hidden: int | None = None,
        temperature: float = 1.0,
        floor: float = 0.0,
    ) -> None:
        super().__init__()
        check_number("GateWeighting", "student_dim", student_dim, min=1, integer=True)
        check_number("GateWeighting", "num_teachers", num_teachers, min=1, integer=True)
        if hidden is not None:
            check_number("GateWeighting", "hidden", hidden, min=1, integer=True)
        check_number("GateWeighting", "temperature", temperature, above=0)
        check_number("GateWeighting", "floor", floor, min=0, max=1 / num_teachers)
        self.student_dim, self.num_teachers, self.hidden = student_dim, num_teachers, hidden
        self.temperature, self.floor = temperature, floor
        self.inner = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(student_dim, hidden), nn.ReLU())
        self.out = nn.Linear(hidden or student_dim, num_teachers)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Targets) -> Tensor:
        """Return weights `(k, b)`, with a graph to the parameters of the gate; `teachers` and `targets` are ignored.

        Args:
            losses: `(k, b)`; only the shape is used.
            student: `(b, d)`, or `(b, d, ...)`, which is averaged over the dimensions after the second.

        Raises:
            ValueError: the number of teachers or the dimension of the student's feature differs.
        """
        check_teachers("GateWeighting", losses)
        check_shape("GateWeighting", "losses", losses, "k b", k=self.num_teachers)
        check_floating("GateWeighting", student=student)
        feature = student.detach()
        with full_precision(losses):
            if feature.dim() > 2:
                feature = rescale(feature.float().flatten(2))[0].mean(2)
            check_shape("GateWeighting", "student", feature, "b d", b=losses.shape[1], d=self.student_dim)
            x = unit_rows(feature.float())[0] * self.student_dim**0.5
            scores: Tensor = self.out(self.inner(x.to(self.out.weight.dtype)))
            gate = (scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature).softmax(1)
            weights = self.floor + (1 - self.num_teachers * self.floor) * gate
            return weights.T.to(losses.dtype)
