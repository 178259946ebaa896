"""The `repr` of Modules that have their constructor's arguments as attributes."""

from inspect import Parameter, signature

from torch import nn
from typing_extensions import override

__all__ = ["CallRepr"]


class CallRepr(nn.Module):
    """A Module whose `repr` is the call that rebuilds it."""

    @override
    def extra_repr(self) -> str:
        """Return the arguments of the call."""
        values = [(each, repr(getattr(self, each.name))) for each in signature(type(self)).parameters.values()]
        return ", ".join(f"{each.name}={x}" if each.kind is Parameter.KEYWORD_ONLY else x for each, x in values)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
