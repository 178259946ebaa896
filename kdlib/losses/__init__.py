"""Losses: stage 3, `(student, teacher)` tensors to a scalar or `(b,)`. Imports only the shared checks.

One method a file, the function and its Module together. The Modules are gathered here; the functions in
`kdlib.functional`.
"""

from kdlib.losses.angular import AngularDistillLoss
from kdlib.losses.attention import AttentionTransferLoss
from kdlib.losses.hint import HintLoss
from kdlib.losses.soft_target import SoftTargetLoss

__all__ = ["AngularDistillLoss", "AttentionTransferLoss", "HintLoss", "SoftTargetLoss"]
