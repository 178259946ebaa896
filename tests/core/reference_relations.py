"""Naive NumPy references of the relation losses, written from the formulas of the docstrings, in loops and float64."""

import math

import numpy as np

from tests.core.reference_features import Array


def dot(a: Array, b: Array) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a.ravel(), b.ravel(), strict=True))


def shrunk(x: Array) -> Array:
    """Each row over its largest magnitude, so that a square is a number."""
    return np.array([row / max(np.abs(row).max(), 1e-320) for row in x])


def smooth(u: float) -> float:
    return u * u / 2 if abs(u) < 1 else abs(u) - 0.5


def distances(x: Array) -> Array:
    return np.array([[math.sqrt(dot(a - b, a - b)) for b in x] for a in x])


def rkd_distance(student: Array, teacher: Array, weight: Array) -> float:
    sides = []
    for x in (student, teacher):
        d = distances(x)
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
        total = sum(weight[i] * weight[j] for i, j in pairs)
        mean = sum(weight[i] * weight[j] * d[i, j] for i, j in pairs) / total
        sides.append(d / mean if mean > 0 else d)
    value = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            value += weight[i] * weight[j] * smooth(sides[0][i, j] - sides[1][i, j])
    return float(value / weight.sum() ** 2)


def cosine_at(x: Array, i: int, j: int, k: int) -> float:
    a, b = shrunk(np.array([x[j] - x[i], x[k] - x[i]]))
    length = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / length if length > 0 else 0.0


def rkd_angle(student: Array, teacher: Array, weight: Array) -> float:
    value = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            for k in range(len(student)):
                gap = cosine_at(student, i, j, k) - cosine_at(teacher, i, j, k)
                value += weight[i] * weight[j] * weight[k] * smooth(gap)
    return float(value / weight.sum() ** 3)


def effective(weight: Array) -> float:
    return float(weight.sum() ** 2 / (weight**2).sum())


def similarity_preserving(student: Array, teacher: Array, weight: Array) -> float:
    share = weight / weight.sum()
    sides = []
    for x in (student, teacher):
        g = shrunk(np.array([[dot(a, b) for b in x] for a in shrunk(x)]))
        lengths = [math.sqrt(effective(weight) * sum(p * v * v for p, v in zip(share, row, strict=True))) for row in g]
        sides.append([row / length if length > 0 else row for row, length in zip(g, lengths, strict=True)])
    value = 0.0
    for i, p in enumerate(share):
        for j, q in enumerate(share):
            value += p * q * (sides[0][i][j] - sides[1][i][j]) ** 2
    return float(value)


def cosines(x: Array) -> Array:
    x, out = shrunk(x), np.zeros((len(x), len(x)))
    for i, a in enumerate(x):
        for j, b in enumerate(x):
            length = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
            out[i, j] = dot(a, b) / length if length > 0 else 0.0
    return out


def pkt(student: Array, teacher: Array, weight: Array) -> float:
    share, eps = weight / weight.sum(), 1e-7
    sides = []
    for x in (student, teacher):
        kernel = (1 + cosines(x)) / 2
        sides.append([row / (effective(weight) * sum(row * share)) for row in kernel])
    value = 0.0
    for i, q_i in enumerate(share):
        for j, q_j in enumerate(share):
            s, t = sides[0][i][j], sides[1][i][j]
            value += q_i * q_j * t * math.log((t + eps) / (s + eps))
    return float(value)


def correlation_congruence(
    student: Array, teacher: Array, weight: Array, *, gamma: float = 0.4, order: int | None = 2
) -> float:
    def kernel(cosine: float) -> float:
        if order is None:
            return math.exp(-gamma * (2 - 2 * cosine))
        return math.exp(-2 * gamma) * sum((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))

    share, value = weight / weight.sum(), 0.0
    c_s, c_t = cosines(student), cosines(teacher)
    for i, p in enumerate(share):
        for j, q in enumerate(share):
            value += p * q * (kernel(c_s[i, j]) - kernel(c_t[i, j])) ** 2
    return float(value)


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
