"""Evaluation measures against NumPy references, and their invariances."""

import numpy as np
import pytest
import torch

from kdlib.evaluation import calibration_error, linear_cka, mean_cosine, top_agreement


def _pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(30, 5, generator=generator), torch.randn(30, 7, generator=generator)


def test_cka_agrees_with_centered_gram_matrices() -> None:
    x, y = (each.double().numpy() for each in _pair())
    center = np.eye(30) - 1 / 30
    k, m = center @ x @ x.T @ center, center @ y @ y.T @ center
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert float(linear_cka(torch.from_numpy(x), torch.from_numpy(y))) == pytest.approx(expected, rel=1e-10)


def test_cka_is_invariant_to_rotation_scale_and_offset_and_zero_for_constants() -> None:
    x, y = _pair(1)
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(2))).Q
    torch.testing.assert_close(linear_cka(x, 5 * y @ rotation + 3), linear_cka(x, y))
    for constant in (0.0, 1.0):
        assert float(linear_cka(x, torch.full((30, 2), constant))) == 0.0


def test_cka_of_two_samples_is_one_however_close_they_are() -> None:
    x, y = (
        torch.tensor([[1.0], [0.999]], dtype=torch.float64),
        torch.tensor([[1.0, 2.0], [1.001, 2.0]], dtype=torch.float64),
    )
    assert float(linear_cka(x, y)) == pytest.approx(1.0, abs=1e-9)


def test_mean_cosine_agrees_with_torch_and_treats_zero_rows_as_orthogonal() -> None:
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


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e150])
def test_cka_and_mean_cosine_are_scale_invariant(size: float) -> None:
    x, y = (each.double() for each in _pair(4))
    torch.testing.assert_close(linear_cka(size * x, y), linear_cka(x, y))
    torch.testing.assert_close(linear_cka(x, size * y), linear_cka(x, y))
    torch.testing.assert_close(mean_cosine(size * x, y[:, :5]), mean_cosine(x, y[:, :5]))


def test_empty_batches_give_zero() -> None:
    empty = torch.zeros(0, 4)
    for measure in (linear_cka, mean_cosine, top_agreement):
        assert float(measure(empty, empty)) == 0.0
    assert float(calibration_error(empty, torch.zeros(0, dtype=torch.int64))) == 0.0


def test_top_agreement_counts_equal_predictions() -> None:
    x, y = (torch.randn(200, 5, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    assert float(top_agreement(x, y)) == pytest.approx(np.mean(x.numpy().argmax(1) == y.numpy().argmax(1)))
    assert float(top_agreement(x, 3 * x + 1)) == 1.0
    assert float(top_agreement(x.half(), x)) == 1.0
    with pytest.raises(ValueError, match=r"top_agreement: teacher must be \(b, c\) like student \(200, 5\)"):
        top_agreement(x, y[:, :4])


def naive_calibration_error(logits: np.ndarray, target: np.ndarray, bins: int) -> float:
    """The formula, bin by bin."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probability = shifted / shifted.sum(1, keepdims=True)
    confidence, right = probability.max(1), probability.argmax(1) == target
    error = 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
def test_calibration_error_agrees_with_the_formula(bins: int) -> None:
    generator = torch.Generator().manual_seed(bins)
    logits = 3 * torch.randn(500, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 7, (500,), generator=generator)
    expected = naive_calibration_error(logits.numpy(), target.numpy(), bins)
    assert float(calibration_error(logits, target, bins=bins)) == pytest.approx(expected, rel=1e-9)
    order = torch.randperm(500, generator=generator)
    torch.testing.assert_close(
        calibration_error(logits[order] + 5, target[order], bins=bins), calibration_error(logits, target, bins=bins)
    )


def test_calibration_error_of_extreme_logits_and_invalid_arguments() -> None:
    target = torch.tensor([0, 1, 1, 1])
    # A confidence on the boundary belongs to the lower bin: 1/2 to the first of two.
    even = torch.zeros(4, 2)
    assert float(calibration_error(even, target, bins=2)) == pytest.approx(0.25)
    # One of two is right at a confidence of 1/2, none of two at 1: errors in two bins.
    assert float(calibration_error(torch.tensor([[0.0, 0.0], [9e9, 0.0]]), torch.tensor([0, 1]), bins=2)) == 0.75
    for dtype, huge in ((torch.float16, 6e4), (torch.bfloat16, 1e38), (torch.float32, 1e38), (torch.float64, 1e300)):
        confident = torch.tensor([[huge, -huge]] * 4, dtype=dtype)
        error = calibration_error(confident, target)
        assert error.dtype == dtype
        assert float(error) == 0.75  # confident in the first class, correct once in four
    with pytest.raises(TypeError, match=r"calibration_error: logits must be a floating-point tensor, got torch\.int64"):
        calibration_error(even.long(), target)
    with pytest.raises(ValueError, match="calibration_error: target must be from 0 to below c = 2, got 2"):
        calibration_error(even, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"calibration_error: logits must be \(b, c\), got \(4,\)"):
        calibration_error(even[:, 0], target)
    with pytest.raises(ValueError, match="calibration_error: bins must be a whole number and >= 1, got 0"):
        calibration_error(even, target, bins=0)
