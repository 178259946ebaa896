"""Inputs and broken components for the tests of the contract checks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = randn(5, 4), randn(5, 4, seed=1)


def broken(base: type, **methods: Any) -> Callable[[], Any]:
    """A subclass of a valid component with other methods."""
    return type("Broken", (base,), methods)


def fails(name: str, check: Callable[[], Any]) -> None:
    """`check` must fail at the check of that name, with a message."""
    with pytest.raises(AssertionError, match=rf"\): {name}: ") as caught:
        check()
    assert str(caught.value).split(f"): {name}: ")[1].strip()


def without(names: tuple[str, ...], *left_out: str) -> tuple[str, ...]:
    return tuple(name for name in names if name not in left_out)
