"""Base classes of the loss Modules."""

from inspect import Parameter, signature

from torch import nn
from typing_extensions import override

from kdlib._checks import check_choice, check_relation_reduction
from kdlib._maths import REDUCTIONS, MeanOnly, Reduction

__all__ = ["LossModule", "RelationModule"]


class _Module(nn.Module):
    """A loss with its hyper-parameters; `repr` shows the call that rebuilds it."""

    @override
    def extra_repr(self) -> str:
        """Return the arguments of the call that rebuilds the loss."""
        parameters = signature(type(self)).parameters.values()
        values = [(parameter, repr(getattr(self, parameter.name))) for parameter in parameters]
        return ", ".join(
            f"{parameter.name}={value}" if parameter.kind is Parameter.KEYWORD_ONLY else value
            for parameter, value in values
        )

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class LossModule(_Module):
    """A loss with one value per sample."""

    per_sample: bool = True
    """Whether `reduction="none"` is accepted."""

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice(type(self).__name__, "reduction", reduction, REDUCTIONS)
        self.reduction = reduction


class RelationModule(_Module):
    """A loss with one value per batch, which can use the rows of all processes."""

    per_sample: bool = False
    """Whether `reduction="none"` is accepted."""

    def __init__(self, *, gather: bool = False, reduction: MeanOnly = "mean") -> None:
        super().__init__()
        check_relation_reduction(type(self).__name__, reduction)
        self.gather = gather
        self.reduction = reduction
