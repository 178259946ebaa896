"""Inputs that several tests share."""

import pytest
import torch
from torch import Tensor


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
