"""Contract checks for losses, weightings, projections and adapters, independent of a test framework.

    from kdlib.testing import check_loss

    ran = check_loss(MyLoss(), torch.randn(6, 8), torch.randn(6, 8))

Each function returns the names of the checks that ran, or raises an `AssertionError` that lists all checks that failed,
with the received values. Every check works on a copy of the component. A check is skipped only if it cannot apply (a plain function has no state
dict) or if `exclude` names it. Compare the returned names with the expected ones, so that no test passes by skipping.
The components of this library pass the same checks.
"""

from kdlib._arguments import prepare_arguments
from kdlib.testing.adapter import ADAPTER_CHECKS, check_adapter
from kdlib.testing.loss import LOSS_CHECKS, check_loss
from kdlib.testing.projection import PROJECTION_CHECKS, check_projection
from kdlib.testing.weighting import WEIGHTING_CHECKS, check_weighting

__all__ = [
    "ADAPTER_CHECKS", "LOSS_CHECKS", "PROJECTION_CHECKS", "WEIGHTING_CHECKS",
    "check_adapter", "check_loss", "check_projection", "check_weighting",
]  # fmt: skip

prepare_arguments(globals(), __all__)
