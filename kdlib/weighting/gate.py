"""Weighting: a small network on the student's feature says whom to follow. Touches the student's feature only."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdlib._checks import check_floating, check_number, check_shape
from kdlib._maths import full_precision, rescale, unit_rows
from kdlib.weighting._checks import check_teachers

__all__ = ["GateWeighting"]


class GateWeighting(nn.Module):
    r"""Weights from a learned gate, sample by sample.

    With x the direction of the student's feature, scaled to length :math:`\sqrt d`,

    .. math:: w_i = f + (1 - K f) \, \mathrm{softmax}\bigl( g(x_i) / \tau \bigr)

    where g is linear, or has one hidden layer with ReLU, and f is the floor. The gate learns through the weighted loss:
    the weights keep their graph. It starts uniform (its last layer is zero). The student gets no gradient through the
    gate, so that it cannot lower its loss by looking like a sample that asks for little.

    What the weighted loss teaches the gate is to follow, for each sample, the teacher that is easiest to follow. A
    useless teacher with noise for features is hard to follow and weighs ever less; one with constant features is easy,
    and the gate would fall for it wholly. `floor` keeps at least that weight for every teacher, and a higher
    `temperature` slows the fall; where the losses do not measure what a teacher is worth, a gate is the wrong weighting.

    One teacher weighs 1. Teachers of equal losses keep their weights as they are, uniform from the start. Finite
    features of any size give finite weights and gradients; a zero feature gets what the biases say. Terms that read
    other features of the student need an objective's `weigh_by`, so do terms with fewer teachers.

    Args:
        student_dim: d, the student's features or channels.
        num_teachers: K, at least 1.
        hidden: width of the hidden layer; `None` for none.
        temperature: tau, above 0; smaller follows the gate's choice more sharply.
        floor: f, least weight of each teacher, from 0 to 1 / K.

    Raises:
        ValueError: an argument out of its range.

    Examples:
        >>> import torch
        >>> gate = GateWeighting(4, 2, floor=0.1)
        >>> gate
        GateWeighting(4, 2, hidden=None, temperature=1.0, floor=0.1)
        >>> losses = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
        >>> weights = gate(losses, student=torch.rand(3, 4), teachers=[], targets={})
        >>> weights.tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
        >>> (weights * losses).sum().backward()
        >>> bool(gate.out.bias.grad[0] < gate.out.bias.grad[1])
        True

    References:
        Jacobs et al., *Adaptive Mixtures of Local Experts*, Neural Computation 3(1), 1991, for gates; this form is ours.
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
        self.student_dim = student_dim
        self.num_teachers = num_teachers
        self.hidden = hidden
        self.temperature = temperature
        self.floor = floor
        self.inner = nn.Identity() if hidden is None else nn.Sequential(nn.Linear(student_dim, hidden), nn.ReLU())
        self.out = nn.Linear(hidden or student_dim, num_teachers)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, losses: Tensor, *, student: Tensor, teachers: Sequence[Tensor], targets: Mapping[str, Tensor] | Tensor
    ) -> Tensor:
        """Weights `(k, b)` for losses `(k, b)`, with a gradient to the gate.

        Args:
            losses: `(k, b)`; only the shape is looked at.
            student: `(b, d)`, or `(b, d, ...)`: averaged over the dimensions after the second.
            teachers: not looked at.
            targets: not looked at.

        Raises:
            ValueError: another number of teachers, or another width of the student's feature.
        """
        check_teachers("GateWeighting", losses)
        check_shape("GateWeighting", "losses", losses, "k b", k=self.num_teachers)
        check_floating("GateWeighting", student=student)
        wide = student.detach()
        with full_precision(losses):
            if wide.dim() > 2:
                wide = rescale(wide.float().flatten(2))[0].mean(2)
            check_shape("GateWeighting", "student", wide, "b d", b=losses.shape[1], d=self.student_dim)
            x = unit_rows(wide.float())[0] * self.student_dim**0.5
            scores: Tensor = self.out(self.inner(x.to(self.out.weight.dtype)))
            gate = (scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature).softmax(1)
            weights = self.floor + (1 - self.num_teachers * self.floor) * gate
            return weights.T.to(losses.dtype)

    def __repr__(self) -> str:
        return (
            f"GateWeighting({self.student_dim}, {self.num_teachers}, hidden={self.hidden!r}, "
            f"temperature={self.temperature!r}, floor={self.floor!r})"
        )
