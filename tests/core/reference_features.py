"""Naive NumPy references of the feature losses, written from the formulas of the docstrings, in loops and float64."""

import math

import numpy as np
from numpy.typing import NDArray

from tests.core.reference_losses import Array, attention_map, pool

Identities = NDArray[np.int64]


def dot(a: Array, b: Array) -> float:
    return sum(float(x) * float(y) for x, y in zip(a.ravel(), b.ravel(), strict=True))


def unit(a: Array) -> Array:
    length = math.sqrt(dot(a, a))
    return a if length == 0 else a / length


def nst(student: Array, teacher: Array) -> Array:
    grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    losses = []
    for s, t in zip(student, teacher, strict=True):
        s_maps, t_maps = [unit(pool(channel, *grid)) for channel in s], [unit(pool(channel, *grid)) for channel in t]
        value = 0.0
        for factor, first, second in ((1, t_maps, t_maps), (1, s_maps, s_maps), (-2, s_maps, t_maps)):
            kernel = [dot(a, b) ** 2 for a in first for b in second]
            value += factor * sum(kernel) / len(kernel)
        losses.append(value)
    return np.array(losses)


def channel_attention_map(features: Array) -> Array:
    return np.array([[dot(plane, plane) / plane.size for plane in sample] for sample in features])


def attentive_similarity(student: Array, teacher: Array, *, channel: float = 1.0, spatial: float = 1.0) -> Array:
    grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    places = zip(attention_map(student), attention_map(teacher), strict=True)
    spatial_gap = [1 - dot(unit(pool(a, *grid)), unit(pool(b, *grid))) for a, b in places]
    channel_gap = [0.0] * len(student)
    if channel:
        channels = zip(channel_attention_map(student), channel_attention_map(teacher), strict=True)
        channel_gap = [1 - dot(unit(a), unit(b)) for a, b in channels]
    return np.array([channel * c + spatial * s for c, s in zip(channel_gap, spatial_gap, strict=True)])


def variational_information(mean: Array, teacher: Array, *, variance: float | Array = 1.0) -> Array:
    losses = []
    for m, t in zip(mean, teacher, strict=True):
        each = []
        for c in range(len(m)):
            v = float(variance) if np.ndim(variance) == 0 else float(np.asarray(variance)[c])
            each += [
                ((float(y) - float(x)) ** 2 / v + math.log(v)) / 2
                for x, y in zip(np.ravel(m[c]), np.ravel(t[c]), strict=True)
            ]
        losses.append(sum(each) / len(each))
    return np.array(losses)


def mean_network(student: Array, first: Array, second: Array, third: Array) -> Array:
    """Three maps over the channels `(out, in)`, applied at every place of `(b, c, h, w)` or to `(b, c)`."""
    x = np.moveaxis(student, 1, -1)
    x = np.maximum(x @ first.T, 0)
    x = np.maximum(x @ second.T, 0)
    return np.moveaxis(x @ third.T, -1, 1)


def contrastive_representation(
    student: Array,
    teacher: Array,
    *,
    temperature: float = 0.07,
    negatives: Array | None = None,
    target: Identities | None = None,
    negatives_target: Identities | None = None,
    present: NDArray[np.bool_] | None = None,
) -> Array:
    b = len(student)
    further = [] if negatives is None else list(negatives)
    losses = []
    for i in range(b):
        others = [
            j
            for j in range(b)
            if j != i
            and (target is None or target[j] != target[i])
            and (present is None or (present[i] and present[j]))
        ]
        outside = [
            k
            for k in range(len(further))
            if target is None or negatives_target is None or negatives_target[k] != target[i]
        ]

        def score(x: Array, y: Array) -> float:
            return math.exp(dot(unit(x), unit(y)) / temperature)

        own = score(student[i], teacher[i])
        by_student = own + sum(score(student[i], teacher[j]) for j in others)
        by_student += sum(score(student[i], further[k]) for k in outside)
        by_teacher = own + sum(score(student[j], teacher[i]) for j in others)
        losses.append(-(math.log(own / by_student) + math.log(own / by_teacher)) / 2)
    return np.array(losses)
