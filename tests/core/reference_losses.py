"""Naive NumPy references, written from the formulas of the docstrings, one sample at a time, in float64."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cosine(s: Array, t: Array) -> float:
    dot = sum(float(a) * float(b) for a, b in zip(s.ravel(), t.ravel(), strict=True))
    return dot / (math.sqrt(sum(float(a) ** 2 for a in s.ravel())) * math.sqrt(sum(float(b) ** 2 for b in t.ravel())))


def angular_distill(student: Array, teacher: Array, *, form: str = "squared") -> Array:
    losses = []
    for s, t in zip(student, teacher, strict=True):
        cos = min(1.0, max(-1.0, cosine(s, t)))
        unit_s, unit_t = s / np.sqrt((s**2).sum()), t / np.sqrt((t**2).sum())
        losses.append(
            {
                "squared": (1 - cos) ** 2,
                "cosine": 1 - cos,
                "chord": float(((unit_s - unit_t) ** 2).sum()),
                "angle": math.acos(cos),
            }[form]
        )
    return np.array(losses)


def attention_map(features: Array, p: float = 2) -> Array:
    b, c, h, w = features.shape
    out = np.zeros((b, h, w))
    for i in range(b):
        for y in range(h):
            for x in range(w):
                out[i, y, x] = sum(abs(float(features[i, k, y, x])) ** p for k in range(c)) / c
    return out


def pool(plane: Array, height: int, width: int) -> Array:
    """Average over windows that start at floor(i n / m) and end at ceil((i + 1) n / m)."""
    h, w = plane.shape
    out = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            out[i, j] = plane[rows, columns].mean()
    return out


def attention_transfer(student: Array, teacher: Array, *, p: float = 2) -> Array:
    a_s = attention_map(student, p) if student.ndim == 4 else student
    a_t = attention_map(teacher, p) if teacher.ndim == 4 else teacher
    grid = (min(a_s.shape[1], a_t.shape[1]), min(a_s.shape[2], a_t.shape[2]))
    losses = []
    for s, t in zip(a_s, a_t, strict=True):
        s, t = pool(s, *grid), pool(t, *grid)
        losses.append(((s / np.sqrt((s**2).sum()) - t / np.sqrt((t**2).sum())) ** 2).sum())
    return np.array(losses)


def hint(student: Array, teacher: Array) -> Array:
    return np.array([((s - t) ** 2).sum() / s.size for s, t in zip(student, teacher, strict=True)])


def soft_target(student: Array, teacher: Array, *, temperature: float = 4.0) -> Array:
    losses = []
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        p_s, p_t = np.exp(s) / np.exp(s).sum(), np.exp(t) / np.exp(t).sum()
        losses.append(temperature**2 * sum(b * math.log(b / a) for a, b in zip(p_s, p_t, strict=True)))
    return np.array(losses)


def weighted_mean(losses: Array, weight: Array) -> float:
    return float(sum(w * loss for w, loss in zip(weight, losses, strict=True)) / sum(weight))
