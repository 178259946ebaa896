"""Compare methods for an age-invariant teacher on synthetic faces: `python benchmarks/study_age_teacher_synthetic.py [--seed 0]`.

A general teacher is trained on identities whose images are at most 12 years apart. Each method continues from it on these
identities, without their ages, and on others with ages from 2 to 80 years. "margin alone" uses the same images without any ages. The
test identities are in neither set. The metric is TAR at FAR 1e-2 by age gap, against impostor pairs of the same gap, with flip
test; differences from the start have paired bootstrap intervals over identities. The study takes a quarter of an hour on one core. Writes
`results/age_teacher.json`, part `synthetic`.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_age_teacher import keep_part, row

from kdlib import OUTPUT, Distiller, Objective, StudentAdapter, Term, TrainConfig, train
from kdlib_faces.backbones import build_backbone
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.synthetic import SyntheticFaces
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.evaluation import AgeGapProtocol, embed_images
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.progress import TrainProgress
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig, build_age_teacher

FAR = 1e-2
SIZE = 40
COMMON: dict[str, Any] = {
    "trainable": "all",
    "freeze_batch_norm": False,
    "identity_weight": 1.0,
    "margin_scale": 32.0,
    "margin": 0.2,
    "l2_sp_weight": 0.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "margin alone": {"method": "pairs", "pair_weight": 0.0},
    "dal": {"method": "dal", "pair_weight": 0.0},
    "mtlface": {"method": "mtlface", "pair_weight": 0.0, "age_scale": 10.0},
    "pairs": {"method": "pairs", "pair_weight": 1.0},
    "dal and pairs": {"method": "dal", "pair_weight": 1.0},
    "mtlface and pairs": {"method": "mtlface", "pair_weight": 1.0, "age_scale": 10.0},
}


def run(distiller: Distiller, batches: Any, steps: int, lr: float, seed: int, label: str) -> None:
    """Train with a progress bar."""
    progress = TrainProgress(label, quiet=False)
    config = TrainConfig(
        max_steps=steps, lr=lr, warmup_steps=max(1, steps // 20), clip_norm=5.0, channels_last=True, seed=seed
    )
    try:
        train(distiller, batches, config, hooks=[progress])
    finally:
        progress.close()


def general(faces: SyntheticFaces, images: torch.Tensor, steps: int, seed: int) -> Any:
    """Train the general teacher, on identities alone."""
    network = build_backbone("iresnet18", seed=seed, width=0.125, embedding_dim=128, input_size=SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = CosFaceHead(128, faces.identities, 32.0, 0.2)
    objective = Objective({"identity": Term(head, student="embedding", target="identity")})
    batches = FaceBatches(images, faces.labels, batch_size=64, seed=seed, augment=AugmentConfig())
    distiller = Distiller(StudentAdapter(network, {"embedding": OUTPUT}), {}, objective)
    run(distiller, batches, steps, 0.1, seed, "general teacher")
    return network.eval()


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description="Methods for an age-invariant teacher, on synthetic faces.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", type=Path, help="weights of the general teacher; trained and stored there if missing"
    )
    parser.add_argument("--start-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--replicates", type=int, default=500)
    options = parser.parse_args()
    seed = options.seed
    narrow = SyntheticFaces(300, 12, SIZE, 100 + seed, age_window=12.0)
    wide = SyntheticFaces(400, 8, SIZE, 300 + seed)
    test = SyntheticFaces(200, 8, SIZE, 200 + seed)
    narrow_images, test_images = narrow.images(), test.images()
    if options.start is not None and options.start.exists():
        start = build_backbone("iresnet18", seed=seed, width=0.125, embedding_dim=128, input_size=SIZE)
        start.load_state_dict(torch.load(options.start, weights_only=True))
        start.eval()
    else:
        start = general(narrow, narrow_images, options.start_steps, seed)
        if options.start is not None:
            torch.save(start.state_dict(), options.start)
    images = torch.cat([narrow_images, wide.images()])
    identities = torch.cat([narrow.labels, wide.labels + narrow.identities])
    ages = torch.cat([torch.full((len(narrow),), float("nan")), wide.ages])
    protocol = AgeGapProtocol(
        test.labels.numpy(), ages=test.ages.numpy(), fars=(FAR,), replicates=options.replicates, seed=1
    )

    def measured(network: Any) -> dict[str, dict[str, np.ndarray]]:
        bins = {}
        for entry in protocol.evaluate(embed_images(network.eval(), test_images)).bins:
            tar = entry.own_tar[FAR]
            if tar.value is not None and tar.replicates is not None:
                bins[entry.name] = {"value": np.float64(tar.value), "replicates": tar.replicates}
        return bins

    first = measured(start)
    rows: dict[str, Any] = {"start": {"bins": row(first, first)}}
    for name, method in METHODS.items():
        began = time.perf_counter()
        config = AgeTeacherConfig(**COMMON, **method)
        total = narrow.identities + wide.identities
        distiller = build_age_teacher(copy.deepcopy(start), config, num_identities=total, seed=seed)
        batches = FaceBatches(
            images,
            identities,
            batch_size=64,
            seed=seed + 1,
            augment=AugmentConfig(),
            ages=ages,
            samples_per_identity=4,
            identity_age="age",
        )
        run(distiller, batches, options.steps, 0.05, seed, name)
        model: Any = distiller.student.model
        rows[name] = {"seconds": round(time.perf_counter() - began, 1), "bins": row(measured(model.net), first)}
        cells = [
            f"{at} {each['tar']['value']:.3f} ({each['over_start']['value']:+.3f}, {each['over_start']['low']:+.3f} to "
            f"{each['over_start']['high']:+.3f})"
            for at, each in rows[name]["bins"].items()
        ]
        print(f"{name:20} " + "  ".join(cells), flush=True)
        content = {
            "metric": "TAR at FAR 1e-2 against impostor pairs of the same gap, identities apart from all training",
            "images": len(test),
            "identities": test.identities,
            "steps": options.steps,
            "replicates": options.replicates,
            "seed": seed,
            "torch": torch.__version__,
            "methods": rows,
        }
        keep_part("synthetic", content)


if __name__ == "__main__":
    main()
