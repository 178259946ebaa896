"""Contracts: what a loss, a weighting, a projection and an adapter must keep. Runs a component; needs no test framework.

For a component of your own, inside or outside of a test:

    from kdlib.testing import check_loss

    ran = check_loss(MyLoss(), torch.randn(6, 8), torch.randn(6, 8))

Each function returns the names of the checks that ran and raises `AssertionError` at the first that fails; it tells the
component, the check and what came. A check is left out only where it cannot apply (a plain function has no state dict) or
where `exclude` names it: compare the returned names with what you expect, so that nothing passes by not being run. The
components of this library are held to the same checks.
"""

from kdlib.testing.adapter import ADAPTER_CHECKS, check_adapter
from kdlib.testing.loss import LOSS_CHECKS, check_loss
from kdlib.testing.projection import PROJECTION_CHECKS, check_projection
from kdlib.testing.weighting import WEIGHTING_CHECKS, check_weighting

__all__ = [
    "ADAPTER_CHECKS",
    "LOSS_CHECKS",
    "PROJECTION_CHECKS",
    "WEIGHTING_CHECKS",
    "check_adapter",
    "check_loss",
    "check_projection",
    "check_weighting",
]
