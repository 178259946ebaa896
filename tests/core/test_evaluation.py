"""Agreement of student and teacher against NumPy, and what it must not depend on."""

import numpy as np
import pytest
import torch

from kdlib.evaluation import linear_cka, mean_cosine


def _pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(30, 5, generator=generator), torch.randn(30, 7, generator=generator)


def test_cka_is_that_of_the_centred_gram_matrices() -> None:
    x, y = (each.double().numpy() for each in _pair())
    centre = np.eye(30) - 1 / 30
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert float(linear_cka(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(expected, rel=1e-10)


def test_cka_is_blind_to_rotation_scale_and_offset_and_zero_without_variation() -> None:
    x, y = _pair(1)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2))).Q
    torch.testing.assert_close(linear_cka(x, 5 * y @ turn + 3), linear_cka(x, y))
    assert float(linear_cka(x, torch.ones(30, 2))) == 0.0


def test_mean_cosine_is_that_of_torch_and_counts_zero_rows_as_zero() -> None:
    x, y = _pair(3)
    y = y[:, :5]
    torch.testing.assert_close(mean_cosine(x, y), torch.nn.functional.cosine_similarity(x, y).mean())
    x[:15] = 0
    assert torch.isfinite(mean_cosine(x, y))
    with pytest.raises(
        ValueError, match=r"mean_cosine: teacher must be \(b, d\) like student \(30, 5\), got \(30, 7\)"
    ):
        mean_cosine(*_pair())
    with pytest.raises(ValueError, match="linear_cka: teacher must have the batch size of student"):
        linear_cka(_pair()[0], _pair()[1][:4])
