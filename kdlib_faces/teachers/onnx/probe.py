"""Test images, and comparison of what a graph makes of them."""

import numpy as np

__all__ = ["cosine_of", "equal", "noise_and_waves"]


def noise_and_waves(channels: int, height: int, width: int) -> np.ndarray:
    """Two images (2, c, h, w) in [-1, 1], float32."""
    noise = np.random.default_rng(0).uniform(-1, 1, (channels, height, width))
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    waves = [np.sin(4.5 * (x + c * y)) / 2 for c in range(channels)]
    return np.stack([noise, np.stack(waves)]).astype(np.float32)


def cosine_of(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays, flattened."""
    a, b = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
    return float(a @ b) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)


def equal(a: np.ndarray, b: np.ndarray, dtype: type[np.generic]) -> bool:
    """Whether two results are equal up to the rounding of another batch size."""
    slack = 2e-2 if dtype is np.float16 else 1e-3
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= slack * np.abs(b).max(initial=0) + 1e-6)
