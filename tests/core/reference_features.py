"""Naive NumPy references of the feature losses, written from the formulas of the docstrings, in loops and float64."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Identities = NDArray[np.int64]


def dot(a: Array, b: Array) -> float:
    return sum(float(x) * float(y) for x, y in zip(a.ravel(), b.ravel(), strict=True))


def unit(a: Array) -> Array:
    length = math.sqrt(dot(a, a))
    return a if length == 0 else a / length


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


def angular_distill(student: Array, teacher: Array, *, form: str = "squared") -> Array:
    losses = []
    for s, t in zip(student, teacher, strict=True):
        cosine = min(1.0, max(-1.0, dot(unit(s), unit(t))))
        chord = float(((unit(s) - unit(t)) ** 2).sum())
        forms = {"squared": (1 - cosine) ** 2, "cosine": 1 - cosine, "chord": chord, "angle": math.acos(cosine)}
        losses.append(forms[form])
    return np.array(losses)


def attention_map(features: Array, p: float = 2) -> Array:
    b, c, h, w = features.shape
    out = np.zeros((b, h, w))
    for i in range(b):
        for y in range(h):
            for x in range(w):
                out[i, y, x] = sum(abs(float(features[i, k, y, x])) ** p for k in range(c)) / c
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


def convolution(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Convolution of `(b, c, h, w)` with stride 1 and zeros around the map."""
    b, _, height, width = x.shape
    out_channels, _, size, _ = weight.shape
    edge = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (edge, edge), (edge, edge)))
    out = np.zeros((b, out_channels, height, width))
    for i in range(b):
        for k in range(out_channels):
            for row in range(height):
                for column in range(width):
                    patch = padded[i, :, row : row + size, column : column + size]
                    out[i, k, row, column] = dot(patch, weight[k]) + (0.0 if bias is None else float(bias[k]))
    return out


def batch_norm(x: Array, scale: Array, shift: Array) -> Array:
    """BatchNorm with the statistics of the batch."""
    out = np.zeros_like(x)
    for k in range(x.shape[1]):
        plane = x[:, k]
        mean = plane.sum() / plane.size
        variance = ((plane - mean) ** 2).sum() / plane.size
        out[:, k] = (plane - mean) / math.sqrt(variance + 1e-5) * scale[k] + shift[k]
    return out


def resize(x: Array, height: int, width: int) -> Array:
    """Nearest neighbors: the value at floor(i n / m)."""
    rows = [i * x.shape[2] // height for i in range(height)]
    columns = [j * x.shape[3] // width for j in range(width)]
    return x[:, :, rows][:, :, :, columns]


def pool_maps(x: Array, height: int, width: int) -> Array:
    return np.array([[pool(plane, height, width) for plane in sample] for sample in x])


def factors_of(x: Array, layers: list[tuple[Array, Array]]) -> Array:
    """Convolutions with bias, each followed by a leaky ReLU of slope 0.1."""
    for weight, bias in layers:
        x = convolution(x, weight, bias)
        x = np.where(x > 0, x, 0.1 * x)
    return x


def factor_transfer(student: Array, teacher: Array, *, p: int = 1) -> Array:
    grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    losses = []
    for s, t in zip(pool_maps(student, *grid), pool_maps(teacher, *grid), strict=True):
        gaps = np.abs(unit(s) - unit(t)).ravel()
        losses.append(math.fsum(gaps) if p == 1 else math.sqrt(math.fsum(gaps**2)))
    return np.array(losses)


def masked_generative(
    student: Array, teacher: Array, mask: Array, align: tuple[Array, Array] | None, *block: tuple[Array, Array]
) -> Array:
    grid = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    x, y = pool_maps(student, *grid), pool_maps(teacher, *grid)
    x = x if align is None else convolution(x, *align)
    (first, first_bias), (second, second_bias) = block
    x = convolution(np.maximum(convolution(x * mask, first, first_bias), 0), second, second_bias)
    return hint(x, y)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def embedding(x: Array, first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """Two linear layers with ReLU between them, and division by the length."""
    x = np.maximum(x @ first[0].T + first[1], 0) @ second[0].T + second[1]
    return np.array([unit(row) for row in x])


def semckd(
    students: list[Array],
    teachers: list[Array],
    described: tuple[list[Array], list[Array]],
    networks: tuple[list[tuple[tuple[Array, Array], tuple[Array, Array]]], ...],
    projections: list[list[list[Array]]],
) -> Array:
    """Projections hold three convolutions and, between them, scale and shift of BatchNorm."""
    queries, keys = (
        [embedding(x, *each) for x, each in zip(side, of, strict=True)]
        for side, of in zip(described, networks, strict=True)
    )
    losses = np.zeros(len(students[0]))
    for i, s in enumerate(students):
        errors = []
        for j, t in enumerate(teachers):
            grid = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
            first, scale, shift, second, other_scale, other_shift, third = projections[i][j]
            x = np.maximum(batch_norm(convolution(pool_maps(s, *grid), first), scale, shift), 0)
            x = np.maximum(batch_norm(convolution(x, second), other_scale, other_shift), 0)
            errors.append(hint(convolution(x, third), pool_maps(t, *grid)))
        for sample in range(len(losses)):
            scores = np.array([dot(queries[i][sample], key[sample]) for key in keys])
            shares = softmax(scores)
            losses[sample] += sum(share * error[sample] for share, error in zip(shares, errors, strict=True))
    return losses / len(students)


def review_kd(students: list[Array], teachers: list[Array], fusions: list[list[Array]]) -> Array:
    """Fusions hold a convolution, scale, shift, the attention's weight and bias, a convolution, scale and shift."""
    total, deeper = np.zeros(len(students[0])), None
    for s, t, fusion in reversed(list(zip(students, teachers, fusions, strict=True))):
        x = batch_norm(convolution(s, fusion[0]), fusion[1], fusion[2])
        if deeper is not None:
            other = resize(deeper, *x.shape[2:])
            scores = convolution(np.concatenate([x, other], axis=1), fusion[3], fusion[4])
            z = 1 / (1 + np.exp(-scores))
            x = x * z[:, :1] + other * z[:, 1:]
        deeper = resize(x, *t.shape[2:])
        total += hierarchical_context(batch_norm(convolution(deeper, fusion[-3]), fusion[-2], fusion[-1]), t)
    return total
