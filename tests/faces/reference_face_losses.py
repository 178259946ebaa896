"""Inputs and naive references of the losses for faces, one sample, triplet or pair at a time."""

import math

import numpy as np
import torch
from torch import Tensor

IDENTITIES = torch.tensor([0, 0, 1, 1, 2, 2, 0, 1, 2, 3, 3, 0])
B, D, N = len(IDENTITIES), 6, 4
WEIGHT = torch.tensor([0.5, 2, 0, 1, 1, 0.25, 3, 1, 1, 1, 0, 1.5], dtype=torch.float64)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


STUDENT, TEACHER, CENTERS = random(B, D, seed=1), random(B, D, seed=2), random(N, D, seed=3)


def unit(x: np.ndarray) -> np.ndarray:
    length = math.sqrt(float(sum(value**2 for value in x)))
    return x / length if length else x


def softmax_loss(logits: list[float], own: int) -> float:
    top = max(logits)
    return top + math.log(sum(math.exp(value - top) for value in logits)) - logits[own]


def margin(s, t, w, y, scale, min_margin, max_margin, keep=None):
    keep = range(len(s)) if keep is None else keep
    d = {i: max(float(unit(t[i]) @ unit(w[y[i]])), 0.0) for i in keep}
    top = max(d.values())
    losses = []
    for i in keep:
        margin = (max_margin - min_margin) * d[i] / top + min_margin if top else min_margin
        cosines = [float(unit(s[i]) @ unit(center)) for center in w]
        angle = math.acos(min(1.0, max(-1.0, cosines[y[i]])))
        own = math.cos(angle + margin) if angle <= math.pi - margin else math.cos(angle) + math.cos(margin) - 1
        cosines[y[i]] = own
        losses.append(softmax_loss([scale * value for value in cosines], y[i]))
    return np.array(losses)


def triplets(s, y, distance, mining, w):
    found = []
    for a in range(len(y)):
        for p in range(len(y)):
            others = [n for n in range(len(y)) if y[n] != y[a] and w[n] > 0]
            if a == p or y[a] != y[p] or not others or not w[a] * w[p] > 0:
                continue
            farther = [n for n in others if distance(s[a], s[n]) > distance(s[a], s[p])]
            if mining == "hardest":
                n = min(others, key=lambda n: distance(s[a], s[n]))
            elif farther:
                n = min(farther, key=lambda n: distance(s[a], s[n]))
            else:
                n = max(others, key=lambda n: distance(s[a], s[n]))
            found.append((a, p, n))
    return found


DISTANCES = {
    "squared": lambda a, b: float(((unit(a) - unit(b)) ** 2).sum()),
    "angle": lambda a, b: math.acos(min(1.0, max(-1.0, float(unit(a) @ unit(b))))),
}


def triplet_loss(s, t, triplets, distance, min_margin, max_margin, w):
    gaps = [max(distance(t[a], t[n]) - distance(t[a], t[p]), 0.0) for a, p, n in triplets]
    top = max(gaps, default=0.0)
    total = below = 0.0
    for (a, p, n), gap in zip(triplets, gaps, strict=True):
        margin = (max_margin - min_margin) * gap / top + min_margin if top else min_margin
        counts = w[a] * w[p] * w[n]
        total += counts * max(distance(s[a], s[p]) - distance(s[a], s[n]) + margin, 0.0)
        below += counts
    return total / below if below else 0.0


def weighted_pairs(x, y, w):
    pairs = [(i, j) for i in range(len(y)) for j in range(i + 1, len(y)) if w[i] * w[j] > 0]
    return {(i, j): (float(unit(x[i]) @ unit(x[j])), y[i] == y[j], w[i] * w[j]) for i, j in pairs}


def thresholds(x, y, exponents, w):
    negative = sorted((c for c, same, _ in weighted_pairs(x, y, w).values() if not same), reverse=True)
    return [negative[len(negative) // 10**k] for k in exponents]


def evaluation(s, t, y, tau_s, tau_t, temperature, hardest, w):
    def rank(c, thresholds):
        return sum(1 / (1 + math.exp(-(c - tau) / temperature)) for tau in thresholds)

    of_s, of_t = weighted_pairs(s, y, w), weighted_pairs(t, y, w)
    positive = [pair for pair in of_s if of_s[pair][1]]
    negative = sorted((pair for pair in of_s if not of_s[pair][1]), key=lambda pair: -of_s[pair][0])[:hardest]
    loss = 0.0
    for factor, pairs in ((0.02, positive), (0.01, negative)):
        below = sum(of_s[pair][2] for pair in pairs)
        above = sum(of_s[pair][2] * (rank(of_s[pair][0], tau_s) - rank(of_t[pair][0], tau_t)) ** 2 for pair in pairs)
        loss += factor * above / below if below else 0.0
    return loss


def centers(s, t, w, y, keep=None):
    """The mean of the samples' steps, each from the center before the batch."""

    def clamped(x: float) -> float:
        return min(1.0, max(1e-6, x))

    keep = range(len(s)) if keep is None else keep
    moved = w.copy()
    for identity in set(y):
        steps = []
        for i in keep:
            if y[i] == identity:
                alpha = clamped(float(unit(s[i]) @ unit(t[i])) * clamped(float(unit(w[identity]) @ unit(t[i]))))
                steps.append(alpha * w[identity] + (1 - alpha) * unit(t[i]))
        if steps:
            moved[identity] = sum(steps) / len(steps)
    return moved
