"""Margin heads against pytorch-metric-learning: `python benchmarks/bench_margin_heads.py [--only NAME] [--threads 1]`.

Measures forward and backward of the losses that both have, as `bench_losses.py` does, with the gradient of the centers
(`pip install --no-deps pytorch-metric-learning==2.9.0`, beside scipy and tqdm). Both sides have the same centers. Writes
`results/margin_heads.json`.
"""

import importlib
import math
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from bench_losses import Pair, Row, main
from torch import Tensor

import kdlib.functional as kd
from kdlib_faces.heads import ArcFaceHead, CosFaceHead, SubCenterArcFaceHead

PEER = "pytorch-metric-learning 2.9.0"
BATCH, DIM = 128, 512

try:
    losses: Any = importlib.import_module("pytorch_metric_learning.losses")
except ImportError as error:
    raise SystemExit("pip install --no-deps pytorch-metric-learning==2.9.0") from error


def row(num_identities: int, make_ours: Any, make_theirs: Any, rounds: int = 15) -> Row:
    """Compare a head with a loss of pytorch-metric-learning; a process builds only the sides that it measures."""
    identities = torch.randint(num_identities, (BATCH,), generator=torch.Generator().manual_seed(0))

    @cache
    def ours() -> Any:
        return make_ours(DIM, num_identities, generator=torch.Generator().manual_seed(1))

    @cache
    def theirs() -> Any:
        loss = make_theirs(num_classes=num_identities, embedding_size=DIM)
        loss.W.data = ours().weight.detach().flatten(0, -2).T.contiguous()  # centers are `(d, n)` there
        return loss

    def with_identities(loss: Callable[[], Any]) -> Pair:
        def call(embeddings: Tensor, _: Tensor) -> Tensor:
            value: Tensor = loss()(embeddings, identities[: len(embeddings)])
            return value

        return call

    return Row(with_identities(ours), {PEER: with_identities(theirs)}, (BATCH, DIM), rounds=rounds, fixed=True)


def contrastive_row() -> Row:
    """Compare both directions of InfoNCE, which two of their losses compute if an anchor has one positive."""

    def both_directions(loss: Any) -> Pair:
        one = losses.SelfSupervisedLoss(loss, symmetric=False)
        return lambda student, teacher: (one(student, teacher) + one(teacher, student)) / 2

    peers = {
        f"{PEER}, {name}": both_directions(getattr(losses, name)(temperature=0.07))
        for name in ("NTXentLoss", "SupConLoss")
    }
    return Row(kd.contrastive_representation, peers, (256, DIM), rounds=31)


def rows() -> dict[str, Row]:
    """Return the cases."""
    arcface = partial(losses.ArcFaceLoss, margin=math.degrees(0.5))
    sub_centers = partial(losses.SubCenterArcFaceLoss, margin=math.degrees(0.5), sub_centers=3)
    chunked = partial(ArcFaceHead, chunk_size=8192)
    return {
        "ArcFaceHead, 10,000 identities": row(10_000, ArcFaceHead, arcface),
        "ArcFaceHead, 100,000 identities": row(100_000, ArcFaceHead, arcface, rounds=9),
        "ArcFaceHead(chunk_size=8192), 100,000 identities": row(100_000, chunked, arcface, rounds=9),
        "CosFaceHead, 10,000 identities": row(10_000, partial(CosFaceHead, margin=0.35), losses.CosFaceLoss),
        "CosFaceHead, 100,000 identities": row(
            100_000, partial(CosFaceHead, margin=0.35), losses.CosFaceLoss, rounds=9
        ),
        "SubCenterArcFaceHead, 10,000 identities": row(10_000, SubCenterArcFaceHead, sub_centers),
        "contrastive_representation": contrastive_row(),
    }


if __name__ == "__main__":
    # In the processes that measure memory, freed arrays go back to the system, so that the peak counts all that are used.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    main(rows, "Speed and memory of the margin heads.", "margin_heads.json", threads=1)
