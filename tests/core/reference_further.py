"""Naive NumPy references of the further losses, written from the formulas of the docstrings, in loops and float64."""

import math

import numpy as np

from tests.core.reference_losses import Array, pool


def activation_boundary(student: Array, teacher: Array, *, margin: float = 1.0) -> Array:
    losses = []
    for s, t in zip(student, teacher, strict=True):
        each = [
            max(0.0, margin - float(x)) ** 2 if y > 0 else max(0.0, margin + float(x)) ** 2
            for x, y in zip(np.ravel(s), np.ravel(t), strict=True)
        ]
        losses.append(math.fsum(each) / len(each))
    return np.array(losses)


def overhaul_margin(weight: Array, bias: Array) -> Array:
    """By the trapezoidal rule over the density below zero, not by its closed form."""
    margins = []
    for deviation, mean in zip(np.abs(weight), bias, strict=True):
        below = np.linspace(min(mean - 12 * deviation, -12 * deviation), 0, 400_001)
        density = np.exp(-(((below - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
        probability = np.trapezoid(density, below)
        rare = probability <= 0.001
        margins.append(-3 * deviation if rare else np.trapezoid(below * density, below) / probability)
    return np.array(margins)


def overhaul(student: Array, teacher: Array, *, margin: float | Array) -> Array:
    losses = []
    for s, t in zip(student, teacher, strict=True):
        each = []
        for channel in range(len(s)):
            m = float(margin) if np.ndim(margin) == 0 else float(np.asarray(margin)[channel])
            x, y = np.atleast_2d(s[channel]), np.atleast_2d(t[channel])
            grid = (min(x.shape[0], y.shape[0]), min(x.shape[1], y.shape[1]))
            for a, b in zip(pool(x, *grid).ravel(), pool(y, *grid).ravel(), strict=True):
                target = max(float(b), m)
                each.append(0.0 if float(a) <= target <= 0 else (float(a) - target) ** 2)
        losses.append(math.fsum(each) / len(each))
    return np.array(losses)


def hierarchical_context(student: Array, teacher: Array, *, levels: tuple[int, ...] = (4, 2, 1)) -> Array:
    height, width = student.shape[2:]
    losses = []
    for s, t in zip(student, teacher, strict=True):
        value, part, whole = float(((s - t) ** 2).mean()), 1.0, 1.0
        for level in levels:
            if level >= height and level >= width:
                continue
            grid = (min(level, height), min(level, width))
            part /= 2
            whole += part
            gaps = [pool(x, *grid) - pool(y, *grid) for x, y in zip(s, t, strict=True)]
            value += part * float((np.array(gaps) ** 2).mean())
        losses.append(value / whole)
    return np.array(losses)


def distance(x: Array, i: int, j: int) -> float:
    gap = np.abs(x[i] - x[j])
    largest = float(gap.max(initial=0))
    return largest * math.sqrt(math.fsum(float(g / largest) ** 2 for g in gap)) if largest > 0 else 0.0


def unit_rows(x: Array) -> Array:
    return np.array([row / (distance(np.stack([row, 0 * row]), 0, 1) or 1.0) for row in x])


def log_sum_exp(values: list[float]) -> float:
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


def dark_rank(
    student: Array,
    teacher: Array,
    weight: Array,
    *,
    alpha: float = 3.0,
    beta: float = 3.0,
    length: int = 4,
    normalize: bool = False,
) -> float:
    there = [i for i in range(len(student)) if weight[i] > 0]
    if len(there) < 3:
        return 0.0
    if normalize:
        student, teacher = unit_rows(student), unit_rows(teacher)
    total = 0.0
    for i in there:
        others = sorted((j for j in there if j != i), key=lambda j: float(f"{distance(teacher, i, j):.9e}"))[:length]
        scores = [-min(alpha * min(distance(student, i, j), 1e100) ** beta, 1e30) for j in others]
        total += weight[i] * math.fsum(log_sum_exp(scores[k:]) - scores[k] for k in range(len(scores)))
    return float(total / weight.sum())


def likelihood_of_an_order(scores: Array) -> float:
    """The probability that drawing without replacement, each by its share of exp(score), gives the order 0, 1, 2 ..."""
    left, probability = list(range(len(scores))), 1.0
    for place in range(len(scores)):
        shares = {k: math.exp(scores[k]) for k in left}
        probability *= shares[place] / sum(shares.values())
        left.remove(place)
    return probability
