"""Networks and images that several tests of teachers use."""

import torch

from kdlib_faces.backbones import MobileFaceNet, build_backbone


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_backbone(seed: int = 0) -> MobileFaceNet:
    return build_backbone("mobilefacenet", embedding_dim=16, width=0.25, input_size=32, seed=seed).eval()


IMAGES = torch.randn(4, 3, 32, 32, generator=rng())
