"""Margin heads from their formulas, in NumPy with an arc cosine, one sample at a time."""

import math

import numpy as np
import torch

from kdlib_faces.heads import (
    AdaFaceHead,
    ArcFaceHead,
    CombinedMarginHead,
    CosFaceHead,
    CurricularFaceHead,
    ElasticFaceHead,
    MagFaceHead,
    SubCenterArcFaceHead,
)


def continued(theta, shift, factor=1.0):
    """The cosine of `factor * theta + shift`, and its continuations outside of 0 to pi."""
    shifted = factor * theta + shift
    if shifted > np.pi:
        return np.cos(theta) - np.cos((np.pi - shift) / factor) - 1
    return np.cos(shifted) if shifted > 0 else 1.0


def cross_entropy(logits, own):
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[own]


def cosines_of(embedding, centers):
    norms = np.linalg.norm(centers, axis=-1) * np.linalg.norm(embedding)
    return np.clip(np.divide(centers @ embedding, norms, out=np.zeros_like(norms), where=norms > 0), -1, 1)


def arcface(theta, norm, cosines, margin):
    return continued(theta, margin), cosines, 0


def cosface(theta, norm, cosines, margin):
    return np.cos(theta) - margin, cosines, 0


def combined(theta, norm, cosines, margin, cosine_margin=0.2, angle_factor=1.0):
    return continued(theta, margin, angle_factor) - cosine_margin, cosines, 0


def adaface(theta, norm, cosines, margin, norm_mean=20, norm_std=100, concentration=0.333):
    z = np.clip(concentration * (norm - norm_mean) / (norm_std + 0.001), -1, 1)
    return continued(theta, -margin * z) - margin - margin * z, cosines, 0


def magface(theta, norm, cosines, margin, max_margin=0.8, min_norm=10, max_norm=110, norm_weight=35):
    a = min(max(norm, min_norm), max_norm)
    m = margin + (max_margin - margin) * (a - min_norm) / (max_norm - min_norm)
    return continued(theta, m), cosines, norm_weight * (1 / a + a / max_norm**2)


def curricular(theta, norm, cosines, margin, t=0):
    target = continued(theta, margin)
    return target, np.where(cosines > target, cosines * (t + cosines), cosines), 0


TARGETS = {
    ArcFaceHead: arcface, CosFaceHead: cosface, CombinedMarginHead: combined, SubCenterArcFaceHead: arcface,
    AdaFaceHead: adaface, MagFaceHead: magface, CurricularFaceHead: curricular, ElasticFaceHead: arcface,
}  # fmt: skip


def losses(kind, embeddings, centers, identities, scale, margin, **options):
    """The losses `(b,)`; `margin` is a number, or one number for each sample."""
    result = []
    margins = np.broadcast_to(margin, len(embeddings))
    for embedding, own, m in zip(embeddings, identities, margins, strict=True):
        cosines = cosines_of(embedding, centers)
        cosines = cosines.max(1) if cosines.ndim == 2 else cosines
        target, cosines, penalty = TARGETS[kind](
            np.arccos(cosines[own]), np.linalg.norm(embedding), cosines, m, **options
        )
        logits = scale * cosines
        logits[own] = scale * target
        result.append(cross_entropy(logits, own) + penalty)
    return np.array(result)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def at_angle(angle, d=4, length=3.0):
    """An embedding at `angle` from the first of three orthogonal centers, in the plane with an unused axis."""
    embedding = torch.zeros(1, d, dtype=torch.float64)
    embedding[0, 0], embedding[0, 3] = math.cos(angle), math.sin(angle)
    return length * embedding, torch.eye(3, d, dtype=torch.float64)


B, D, N = 40, 3, 7
IDENTITIES = torch.arange(B) % N
EMBEDDINGS = random(B, D) * torch.linspace(0.1, 80, B).unsqueeze(1)
CENTERS = random(N, D, seed=1)
ALL = (EMBEDDINGS, CENTERS, IDENTITIES)
NONE = {"reduction": "none"}


def expected(kind, *, scale=64.0, margin, centers=CENTERS, **options):
    return losses(
        kind, EMBEDDINGS.numpy(), centers.numpy(), IDENTITIES.numpy(), scale, margin, **options
    )  # fmt: skip


def close(loss, values):
    np.testing.assert_allclose(loss.detach().numpy(), values, rtol=1e-9, atol=1e-9)
