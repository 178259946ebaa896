"""Eval mode of a network for the duration of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode"]


@contextmanager
def eval_mode(model: object) -> Iterator[None]:
    """Set every module of `model` to eval mode inside the block, and restore each mode afterwards, also after an error.

    A `model` that is not a Module, such as a function, has no mode.
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
