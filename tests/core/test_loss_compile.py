"""Every loss compiles as one graph, with the same value and gradient."""

import pytest
import torch

from tests.core.loss_inputs import LOSSES, gradient

SLOW_TO_COMPILE = ("dark_rank, beta=1", "dark_rank, beta=0.5", "dark_rank, all", "correlation_congruence, order 1")
SAME_GRAPH = (
    "activation_boundary, margin 0", "dist, T=4", "factor_transfer, p=2", "variational_information, variance 1000",
)  # fmt: skip
"""Settings with the same operations as the default of their loss."""
LEFT_OUT = {*SLOW_TO_COMPILE, *SAME_GRAPH}


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in LEFT_OUT])
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    case = LOSSES[name]
    loss, other = case.build(), case.build()
    student, teacher = case.sides(6, dtype=torch.float32)
    options = {"weight": torch.tensor([1.0, 0.0, 0.3, 2.0, 0.7, 0.0]), **case.targets(6)}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradient(compiled, student, teacher, **options), gradient(other, student, teacher, **options)
    )
    torch.testing.assert_close(compiled(student, teacher, **options), other(student, teacher, **options))
