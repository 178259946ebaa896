"""Naive NumPy references of the logit losses, written from the formulas of the docstrings with loops, in float64."""

import math
from typing import Any

import numpy as np

from tests.core.reference_features import Array


def softmax(row: Array) -> list[float]:
    powers = [math.exp(float(z) - float(row.max())) for z in row]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def standardized(rows: Array) -> Array:
    return np.array([(row - row.mean()) / max(math.sqrt(((row - row.mean()) ** 2).mean()), 1e-300) for row in rows])


def soft_target(student: Array, teacher: Array, *, temperature: float = 4.0, standardize: bool = False) -> Array:
    student, teacher = (standardized(x) if standardize else x for x in (student, teacher))
    pairs = zip(student, teacher, strict=True)
    return np.array([temperature**2 * divergence(softmax(t / temperature), softmax(s / temperature)) for s, t in pairs])


def decoupled_kd(
    student: Array, teacher: Array, target: Any, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Array:
    losses = []
    for s, t, y in zip(student, teacher, target, strict=True):
        p_s, p_t = softmax(s / temperature), softmax(t / temperature)
        two_s, two_t = ([p[y], sum(v for c, v in enumerate(p) if c != y)] for p in (p_s, p_t))
        rest_s, rest_t = ([v / two[1] for c, v in enumerate(p) if c != y] for p, two in ((p_s, two_s), (p_t, two_t)))
        losses.append(temperature**2 * (alpha * divergence(two_t, two_s) + beta * divergence(rest_t, rest_s)))
    return np.array(losses)


def correlation(x: list[float], y: list[float], share: list[float]) -> float:
    x_mean, y_mean = (sum(w * v for w, v in zip(share, z, strict=True)) for z in (x, y))
    both = sum(w * (a - x_mean) * (b - y_mean) for w, a, b in zip(share, x, y, strict=True))
    spread = [sum(w * (v - m) ** 2 for w, v in zip(share, z, strict=True)) for z, m in ((x, x_mean), (y, y_mean))]
    return both / math.sqrt(spread[0] * spread[1])


def dist(
    student: Array, teacher: Array, weight: Array, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> float:
    c = student.shape[1]
    share = [float(w / weight.sum()) for w in weight]
    p_s, p_t = ([softmax(row / temperature) for row in z] for z in (student, teacher))
    classes = sum(w * (1 - correlation(s, t, [1 / c] * c)) for w, s, t in zip(share, p_s, p_t, strict=True))
    columns = [([row[j] for row in p_s], [row[j] for row in p_t]) for j in range(c)]
    samples = sum(1 - correlation(s, t, share) for s, t in columns) / c
    return temperature**2 * (beta * classes + gamma * samples)
