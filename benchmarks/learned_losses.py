"""The losses with learned parts for `bench_losses.py`, and the same computations as in public code, with our weights.

Layers of several stages are packed into one tensor `(b, n)`, because `bench_losses.py` measures losses of two tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdlib

Pair = Callable[[Tensor, Tensor], Tensor]
Case = tuple[Pair, dict[str, Pair], tuple[int, ...], float]
"""Our loss, its peers, the shape of both sides, and the ratio of our value to that of the peers."""

BATCH = 32
FACTOR_SHAPE = (BATCH, 128, 14, 14)
MASKED_SHAPE = (BATCH, 128, 14, 14)
STAGES = ((64, 28, 28), (128, 14, 14), (256, 7, 7))
SMALL_STAGES = ((32, 14, 14), (64, 7, 7))


def unpacked(x: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Split `(b, n)` into maps."""
    parts = x.split([c * h * w for c, h, w in shapes], 1)
    return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]


def packed_shape(shapes: Sequence[tuple[int, int, int]]) -> tuple[int, int]:
    """Return the shape of the packed layers."""
    return BATCH, sum(c * h * w for c, h, w in shapes)


def factor_transfer(mid_level: Any) -> Case:
    """Convolutions and leaky ReLU in a row, then the mean absolute difference of unit factors."""
    channels = FACTOR_SHAPE[1]
    loss = kdlib.FactorTransferLoss(channels, channels)
    loss.paraphraser.freeze()

    def chain(layers: Any) -> nn.Sequential:
        return nn.Sequential(*[part for layer in layers for part in (layer, nn.LeakyReLU(0.1))])

    translator, paraphraser = chain(loss.translator), chain(loss.paraphraser.encoder)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = F.normalize(translator(student).flatten(1)), F.normalize(paraphraser(teacher).flatten(1)).detach()
        return F.l1_loss(s, t)

    peers: dict[str, Pair] = {"the formula": formula}
    if mid_level is not None:
        theirs = mid_level.FTLoss()

        def of_torchdistill(student: Tensor, teacher: Tensor) -> Tensor:
            with torch.no_grad():
                factors = paraphraser(teacher)
            value: Tensor = theirs(
                {"translator": {"output": translator(student)}}, {"paraphraser": {"output": factors}}
            )
            return value

        peers["torchdistill 1.1.5"] = of_torchdistill
    return loss, peers, FACTOR_SHAPE, float(loss.paraphraser.factors * FACTOR_SHAPE[2] * FACTOR_SHAPE[3])


def masked_generative(_: Any) -> Case:
    """A random mask, two convolutions and a mean squared error; the mask is ours, so that values are equal."""
    channels = MASKED_SHAPE[1]
    loss = kdlib.MaskedGenerativeLoss(channels, channels).eval()  # in eval mode all calls have one mask
    generation = nn.Sequential(loss.first, nn.ReLU(inplace=True), loss.second)
    given = loss.kept_positions(BATCH, (14, 14)).float()

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        drawn = torch.rand(len(student), 1, 14, 14)
        torch.where(drawn > 1 - loss.mask_ratio, 0, 1)
        value: Tensor = F.mse_loss(generation(student * given[: len(student)]), teacher)
        return value

    return loss, {"the formula": formula}, MASKED_SHAPE, 1.0


def review_kd(mid_level: Any) -> Case:
    """Enlarged features are concatenated for the attention, as in the authors' code and in torchdistill."""
    channels = [c for c, _, _ in STAGES]
    loss = kdlib.ReviewKDLoss(channels, channels)

    def context(student: Tensor, teacher: Tensor) -> Tensor:
        value, part, whole = F.mse_loss(student, teacher), 1.0, 1.0
        for level in (4, 2, 1):
            if level < student.shape[2]:
                part /= 2
                whole += part
                pooled = [F.adaptive_avg_pool2d(x, (level, level)) for x in (student, teacher)]
                value = value + part * F.mse_loss(*pooled)
        return value / whole

    def with_context(compare: Pair) -> Pair:
        def formula(student: Tensor, teacher: Tensor) -> Tensor:
            total, deeper = torch.zeros(()), torch.zeros(())
            stages = zip(loss.fusions, unpacked(student, STAGES), unpacked(teacher, STAGES), strict=True)
            fusion: Any
            for fusion, s, t in reversed([*stages]):
                x = fusion.first_norm(fusion.first(s))
                if fusion.attention is not None:
                    y = F.interpolate(deeper, x.shape[2:], mode="nearest")
                    z = fusion.attention(torch.cat([x, y], 1)).sigmoid()
                    x = x * z[:, 0].unsqueeze(1) + y * z[:, 1].unsqueeze(1)
                deeper = x
                total = total + compare(fusion.second_norm(fusion.second(x)), t)
            return total

        return formula

    peers = {"the formula": with_context(context)}
    if mid_level is not None:
        theirs = mid_level.HierarchicalContextLoss("x", "output", "x", "output")
        peers["torchdistill 1.1.5"] = with_context(
            lambda s, t: theirs({"x": {"output": (s, None)}}, {"x": {"output": t}})
        )

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = loss(unpacked(student, STAGES), unpacked(teacher, STAGES))
        return value

    return ours, peers, packed_shape(STAGES), 1.0


def semckd(_: Any) -> Case:
    """All pairs of layers in turn, with the attention by similarities of the batch, as in the authors' code."""
    channels = [c for c, _, _ in SMALL_STAGES]
    loss = kdlib.SemCKDLoss(channels, channels, query_dim=BATCH // 4, batch_size=BATCH)

    def embedded(networks: Any, layers: list[Tensor]) -> Tensor:
        rows = []
        for network, layer in zip(networks, layers, strict=True):
            x = layer.flatten(1)
            x = F.pad(x @ x.T, (0, BATCH - len(x)))
            rows.append(F.normalize(network.second(network.first(x).relu())))
        return torch.stack(rows, 1)

    def formula(student: Tensor, teacher: Tensor) -> Tensor:
        students, teachers = unpacked(student, SMALL_STAGES), unpacked(teacher, SMALL_STAGES)
        attention = (embedded(loss.queries, students) @ embedded(loss.keys, teachers).mT).softmax(2)
        errors = torch.zeros(len(student), len(students), len(teachers))
        for i, s in enumerate(students):
            for j, t in enumerate(teachers):
                x, y = s, t
                if s.shape[2] > t.shape[2]:
                    x = F.adaptive_avg_pool2d(s, t.shape[2:])
                elif s.shape[2] < t.shape[2]:
                    y = F.adaptive_avg_pool2d(t, s.shape[2:])
                project: Any = loss.projections[i][j]  # type: ignore[index]  # a list of lists
                x = project.first_norm(project.first(x)).relu()
                x = project.third(project.second_norm(project.second(x)).relu())
                errors[:, i, j] = F.mse_loss(x, y, reduction="none").flatten(1).mean(1)
        return (attention * errors).sum() / (len(student) * len(students))

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = loss(unpacked(student, SMALL_STAGES), unpacked(teacher, SMALL_STAGES))
        return value

    return ours, {"the formula": formula}, packed_shape(SMALL_STAGES), 1.0


CASES: dict[str, Callable[[Any], Case]] = {
    "factor_transfer": factor_transfer,
    "masked_generative": masked_generative,
    "review_kd": review_kd,
    "semckd": semckd,
}
"""Name to the function of torchdistill's losses, or None, that returns the case."""


def learned(name: str, mid_level: Any) -> Case:
    """Return a case with the same weights in each process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name](mid_level)
