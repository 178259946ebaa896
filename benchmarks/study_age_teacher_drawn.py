"""The ways to an age-invariant teacher on drawn faces of exact ages: `python benchmarks/study_age_teacher_drawn.py [--seed 0]`.

A general teacher is trained on people whose images lie within 12 years of each other. From it, each way goes on training on those
people, whose ages it is not told, and on others drawn from 2 to 80 years: only some images have ages. "margin alone" sees the same
images without a word of age. Tested on people of neither set: TAR at FAR 1e-2 by years between the images, against impostor
pairs of the same gap, flipped image added; differences to the start with paired intervals over identities. A quarter of an hour on one
core. Writes `results/age_teacher.json`, part `drawn`.
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
from kdlib_faces.demo.stages import embed
from kdlib_faces.evaluation import AgeGapProtocol
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.progress import TrainProgress
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig, build_age_teacher

FAR = 1e-2
SIZE = 40
COMMON: dict[str, Any] = {
    "trained": "all",
    "steady": False,
    "identity_weight": 1.0,
    "margin_scale": 32.0,
    "margin": 0.2,
    "pull": 0.0,
}
WAYS: dict[str, dict[str, Any]] = {
    "margin alone": {"method": "pairs", "pair_weight": 0.0},
    "dal": {"method": "dal", "pair_weight": 0.0},
    "mtlface": {"method": "mtlface", "pair_weight": 0.0, "age_scale": 10.0},
    "pairs": {"method": "pairs", "pair_weight": 1.0},
    "dal and pairs": {"method": "dal", "pair_weight": 1.0},
    "mtlface and pairs": {"method": "mtlface", "pair_weight": 1.0, "age_scale": 10.0},
}


def run(distiller: Distiller, batches: Any, steps: int, lr: float, seed: int, label: str) -> None:
    """Train, with a line of progress."""
    meter = TrainProgress(label, quiet=False)
    config = TrainConfig(
        max_steps=steps, lr=lr, warmup_steps=max(1, steps // 20), clip_norm=5.0, channels_last=True, seed=seed
    )
    try:
        train(distiller, batches, config, hooks=[meter])
    finally:
        meter.close()


def general(people: SyntheticFaces, images: torch.Tensor, steps: int, seed: int) -> Any:
    """The start: identities alone."""
    network = build_backbone("iresnet18", seed=seed, width=0.125, embedding_dim=128, input_size=SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = CosFaceHead(128, people.identities, 32.0, 0.2)
    objective = Objective({"identity": Term(head, student="embedding", target="identity")})
    batches = FaceBatches(images, people.labels, batch_size=64, seed=seed, augment=AugmentConfig())
    distiller = Distiller(StudentAdapter(network, {"embedding": OUTPUT}), {}, objective)
    run(distiller, batches, steps, 0.1, seed, "general teacher")
    return network.eval()


def main() -> None:
    """Draw, train, print, keep."""
    parser = argparse.ArgumentParser(description="Ways to an age-invariant teacher, on drawn faces.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights of the general teacher, made where they are not there")
    parser.add_argument("--start-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--replicates", type=int, default=500)
    asked = parser.parse_args()
    seed = asked.seed
    narrow = SyntheticFaces(300, 12, SIZE, 100 + seed, age_window=12.0)
    wide = SyntheticFaces(400, 8, SIZE, 300 + seed)
    tested = SyntheticFaces(200, 8, SIZE, 200 + seed)
    narrow_images, test_images = narrow.images(), tested.images()
    if asked.start is not None and asked.start.exists():
        start = build_backbone("iresnet18", seed=seed, width=0.125, embedding_dim=128, input_size=SIZE)
        start.load_state_dict(torch.load(asked.start, weights_only=True))
        start.eval()
    else:
        start = general(narrow, narrow_images, asked.start_steps, seed)
        if asked.start is not None:
            torch.save(start.state_dict(), asked.start)
    images = torch.cat([narrow_images, wide.images()])
    people = torch.cat([narrow.labels, wide.labels + narrow.identities])
    ages = torch.cat([torch.full((len(narrow),), float("nan")), wide.ages])
    protocol = AgeGapProtocol(
        tested.labels.numpy(), ages=tested.ages.numpy(), fars=(FAR,), replicates=asked.replicates, seed=1
    )

    def measured(network: Any) -> dict[str, dict[str, np.ndarray]]:
        found = {}
        for entry in protocol.evaluate(embed(network.eval(), test_images)).bins:
            tar = entry.own_tar[FAR]
            if tar.value is not None and tar.replicates is not None:
                found[entry.name] = {"value": np.float64(tar.value), "replicates": tar.replicates}
        return found

    first = measured(start)
    rows: dict[str, Any] = {"start": {"bins": row(first, first)}}
    for name, way in WAYS.items():
        began = time.perf_counter()
        config = AgeTeacherConfig(**COMMON, **way)
        total = narrow.identities + wide.identities
        distiller = build_age_teacher(copy.deepcopy(start), config, num_identities=total, seed=seed)
        batches = FaceBatches(
            images,
            people,
            batch_size=64,
            seed=seed + 1,
            augment=AugmentConfig(),
            ages=ages,
            samples_per_identity=4,
            identity_age="age",
        )
        run(distiller, batches, asked.steps, 0.05, seed, name)
        model: Any = distiller.student.model
        rows[name] = {"seconds": round(time.perf_counter() - began, 1), "bins": row(measured(model.net), first)}
        cells = [
            f"{at} {each['tar']['value']:.3f} ({each['over_start']['value']:+.3f}, {each['over_start']['low']:+.3f} to "
            f"{each['over_start']['high']:+.3f})"
            for at, each in rows[name]["bins"].items()
        ]
        print(f"{name:20} " + "  ".join(cells), flush=True)
        content = {
            "metric": "TAR at FAR 1e-2 against impostor pairs of the same gap, people apart from all training",
            "images": len(tested),
            "identities": tested.identities,
            "steps": asked.steps,
            "replicates": asked.replicates,
            "seed": seed,
            "torch": torch.__version__,
            "ways": rows,
        }
        keep_part("drawn", content)


if __name__ == "__main__":
    main()
