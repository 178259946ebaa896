"""Weights from the cosine to the center of the identity, against a loop over samples."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdlib.weighting import CenterConfidenceWeighting


class Reference:
    """The definition of the center weights, one sample at a time in NumPy."""

    def __init__(self, temperature: float, momentum: float) -> None:
        self.centers: dict[tuple[int, int], np.ndarray] = {}
        self.temperature, self.momentum = temperature, momentum

    def __call__(self, teachers: list[np.ndarray], identities: list[int]) -> np.ndarray:
        unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in teachers]
        weights = np.full((len(teachers), len(identities)), 1 / len(teachers))
        for i, y in enumerate(identities):
            if all((k, y) in self.centers for k in range(len(teachers))):
                scores = np.array([unit[k][i] @ self.centers[k, y] for k in range(len(teachers))]) / self.temperature
                weights[:, i] = np.exp(scores) / np.exp(scores).sum()
        for k in range(len(teachers)):
            for y in {y for y in identities if y >= 0}:
                mean = np.mean([unit[k][i] for i in range(len(identities)) if identities[i] == y], axis=0)
                if (k, y) in self.centers:
                    mean = self.momentum * self.centers[k, y] + (1 - self.momentum) * mean
                self.centers[k, y] = mean / np.linalg.norm(mean)
        return weights


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31 - 1),
    batches=st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=6), min_size=1, max_size=5),
    temperature=st.sampled_from([0.1, 1.0]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_centers_follow_the_definition(
    seed: int, batches: list[list[int]], temperature: float, momentum: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weighting = CenterConfidenceWeighting(4, temperature=temperature, momentum=momentum)
    reference = Reference(temperature, momentum)
    for identities in batches:
        teachers = [torch.randn(len(identities), d, generator=generator) for d in (5, 3)]
        got = weighting(
            torch.zeros(2, len(identities)),
            student=torch.zeros(len(identities), 1),
            teachers=teachers,
            targets={"identity": torch.tensor(identities)},
        )
        expected = reference([t.double().numpy() for t in teachers], identities)
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-3, atol=1e-5)
        for (k, y), center in reference.centers.items():
            np.testing.assert_allclose(weighting.get_buffer(f"centers_{k}")[y].numpy(), center, rtol=1e-3, atol=1e-4)


def call(weighting: nn.Module, embedding: Tensor, identities: list[int]) -> Tensor:
    k = 2
    return weighting(
        torch.zeros(k, len(identities)),
        student=torch.zeros(len(identities), 1),
        teachers=[embedding, -embedding],
        targets=torch.tensor(identities),
    )


def test_a_new_identity_and_an_unknown_one_are_uniform() -> None:
    weighting = CenterConfidenceWeighting(3)
    weighting.set_centers(0, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    weighting.set_centers(1, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
    weights = call(weighting.eval(), torch.tensor([[1.0, 0.0]] * 4), [0, 1, 2, -1])
    confident = 1 / (1 + np.exp(-2 / 0.1))
    assert weights[0].tolist() == pytest.approx([confident, 0.5, 0.5, 0.5])


def test_centers_are_updated_after_the_weights_and_only_in_training_mode() -> None:
    weighting = CenterConfidenceWeighting(2)
    embedding = torch.tensor([[0.0, 2.0]])
    assert call(weighting.eval(), embedding, [1])[:, 0].tolist() == [0.5, 0.5]
    assert not weighting.get_buffer("centers_0").any()
    assert call(weighting.train(), embedding, [1])[:, 0].tolist() == [0.5, 0.5]
    assert weighting.get_buffer("centers_0").tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert weighting.get_buffer("centers_1").tolist() == [[0.0, 0.0], [0.0, -1.0]]


def test_half_precision_features_of_any_size_and_feature_maps() -> None:
    weighting = CenterConfidenceWeighting(2)
    teachers = [300 * torch.ones(2, 3, 2, 2, dtype=torch.float16), torch.zeros(2, 5, dtype=torch.bfloat16)]
    for _ in range(2):
        weights = weighting(
            torch.zeros(2, 2), student=torch.zeros(2, 1), teachers=teachers, targets={"identity": torch.tensor([0, 1])}
        )
        assert torch.isfinite(weights).all()
    assert weighting.get_buffer("centers_0").shape == (2, 12)
    assert weighting.get_buffer("centers_0").dtype == torch.float32
    assert torch.equal(weights, torch.full((2, 2), 0.5))


ONE = torch.ones(1, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"teachers": [torch.ones(1, 4), ONE]},
            ValueError,
            r"teachers\[0\], flattened, .* must be \(b, d\) with d = 3",
        ),
        ({"teachers": [ONE]}, ValueError, "teachers must be k = 2 tensors, got 1"),
        ({"teachers": [ONE, torch.ones(2, 3)]}, ValueError, r"teachers\[1\] must be .* with b = 1, got \(2, 3\)"),
        ({"targets": torch.tensor([7])}, ValueError, "identities must be below num_identities = 3, got 7"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"identities must be \(b,\) with b = 1, got \(2,\)"),
        ({"targets": {"identity": torch.ones(1)}}, TypeError, "identities must be whole numbers, got torch.float32"),
        ({"targets": {"identities": ONE}}, ValueError, "no target named 'identity'; the nearest are 'identities'"),
    ],
)
def test_invalid_inputs_of_the_centers_are_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    weighting = CenterConfidenceWeighting(3)
    call(weighting, ONE, [0])
    rest = {"student": ONE, "teachers": [ONE] * 2, "targets": torch.tensor([0]), **change}
    with pytest.raises(error, match=message):
        weighting(torch.zeros(2, 1), **rest)


def test_invalid_centers_and_arguments_are_errors() -> None:
    weighting = CenterConfidenceWeighting(3)
    for index, error in ((-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="set_centers: k_index must be a whole number and >= 0, got "):
            weighting.set_centers(index, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"set_centers: centers must be \(n, d\) with n = 3, got \(2, 3\)"):
        weighting.set_centers(0, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"set_centers: centers must be finite, got 6 NaN or infinite values of 9"):
        weighting.set_centers(0, torch.eye(3).log() * torch.eye(3))
    with pytest.raises(TypeError, match=r"num_identities must be a whole number and >= 1, got 1\.5"):
        CenterConfidenceWeighting(1.5)
    for name, value in (("temperature", 0), ("momentum", 1.5), ("momentum", -0.1), ("num_identities", 0)):
        with pytest.raises(ValueError, match=f"^CenterConfidenceWeighting: {name} must be"):
            CenterConfidenceWeighting(**{"num_identities": 3, name: value})
