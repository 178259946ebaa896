"""Base class of the loss Modules."""

from inspect import Parameter, signature

from torch import nn
from typing_extensions import override

__all__ = ["LossModule"]


class LossModule(nn.Module):
    """A loss with its hyper-parameters; `repr` shows the call that rebuilds it."""

    per_sample: bool = True
    """Whether `reduction="none"` is accepted and returns `(b,)`."""

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
