"""Error of a narrower network before any training: `python benchmarks/bench_compression.py [--steps 300]`.

Trains small networks on synthetic faces, halves their channels with `kdlib.compression.shrink` and with Torch-Pruning
(`pip install torch-pruning`), and compares the embeddings of unseen images with those of the whole network. Both see
the same images. Writes `results/compression.json`.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from bench_overhead import Block
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib.compression import shrink
from kdlib_faces.backbones import MobileFaceNet
from kdlib_faces.data import SyntheticFaces
from kdlib_faces.heads import CosFaceHead

SIZE = 56
IDENTITIES, IMAGES = 100, 16


def residual() -> nn.Module:
    """A residual network of four blocks."""
    widths = [(32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), *(Block(*each) for each in widths),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64),
    )  # fmt: skip


def plain() -> nn.Module:
    """A plain network of five convolutions with a flat tail."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.PReLU(after)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 64))


def mobile() -> nn.Module:
    """MobileFaceNet of half width."""
    return MobileFaceNet(embedding_dim=64, width=0.5, input_size=SIZE)


def load(identities: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1] and identities."""
    faces = SyntheticFaces(identities, IMAGES, SIZE, seed)
    items = [faces[number] for number in range(len(faces))]
    images = torch.stack([item.image for item in items]).float()
    return images / 127.5 - 1 if images.max() > 1 else images, torch.tensor([item.identity for item in items])


def fit(model: nn.Module, images: Tensor, identities: Tensor, steps: int) -> None:
    """Train the network to tell identities apart."""
    head = CosFaceHead(64, IDENTITIES, scale=16.0, margin=0.2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        head(model(images[chosen]), identities[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def pruned(model: nn.Module, images: Tensor, keep: float, recalibrate: bool) -> nn.Module:
    """Torch-Pruning by the magnitude of the weights of each group; optionally with new BatchNorm statistics."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    model = copy.deepcopy(model)
    (last,) = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:] or [
        list(model.modules())[-1]
    ]
    pruner = tp.pruner.MagnitudePruner(
        model, images[:2], importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=1 - keep,
        ignored_layers=[last],
    )  # fmt: skip
    pruner.step()
    if recalibrate:
        norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        with torch.no_grad():
            model.train()
            for batch in images.split(64):
                model(batch)
        model.eval()
    return model


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images, identities = load(IDENTITIES, seed=0)
    unseen, _ = load(40, seed=1)
    rows = []
    for build in (plain, residual, mobile):
        torch.manual_seed(0)
        model = build()
        fit(model, images, identities, options.steps)
        with torch.no_grad():
            expected = model(unseen)
        batches = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(1))].split(100)
        methods: dict[str, Callable[[], nn.Module]] = {
            "kdlib reconstruction": lambda model=model, batches=batches: shrink(model, batches, keep=options.keep),
            "kdlib energy": lambda model=model, batches=batches: shrink(
                model, batches, keep=options.keep, criterion="energy"
            ),
            "torch-pruning": lambda model=model: pruned(model, images, options.keep, False),
            "torch-pruning, new statistics": lambda model=model: pruned(model, images, options.keep, True),
        }
        for name, method in methods.items():
            began = time.perf_counter()
            student = method()
            seconds = time.perf_counter() - began
            with torch.no_grad():
                found = student(unseen)
            error = ((found - expected).square().sum() / (expected - expected.mean(0)).square().sum()).sqrt()
            rows.append({
                "network": build.__name__,
                "method": name,
                "parameters": sum(parameter.numel() for parameter in student.parameters()),
                "of": sum(parameter.numel() for parameter in model.parameters()),
                "error": round(float(error), 4),
                "cosine": round(float(F.cosine_similarity(found, expected).mean()), 4),
                "seconds": round(seconds, 1),
            })  # fmt: skip
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    ours = {row["network"]: row["error"] for row in rows if row["method"] == "kdlib reconstruction"}
    best = {
        network: min(float(row["error"]) for row in rows if row["network"] == network and "torch" in str(row["method"]))
        for network in ours
    }
    for network, error in ours.items():
        print(f"{network}: error {error} against {best[network]}: ratio {float(error) / best[network]:.3f}")
    kept = {"torch": torch.__version__, "torch_pruning": version("torch-pruning"), "steps": options.steps}
    path = Path(__file__).parent / "results" / "compression.json"
    path.write_text(json.dumps(kept | {"keep": options.keep, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
