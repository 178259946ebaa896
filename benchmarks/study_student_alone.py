"""How far does the student get alone? `python benchmarks/study_student_alone.py [--seed 0]`, about ten minutes on two cores.

The demo trains its student alone with one setting, that of the distilled one. A comparison is fair only if no other setting
does much better, so this trains the demo's student alone, on the demo's synthetic faces, with other learning rates, margins and
lengths, and prints TAR at FAR 1 % by age gap beside the distilled student's of `results/synthetic.json`. Writes
`results/student_alone.json`. Settings are compared on the very test set: the best of them flatters the student alone.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdlib_faces.demo.run import DemoConfig
from kdlib_faces.demo.stages import DemoData, embed, train_student
from kdlib_faces.demo.synthetic import synthetic_sets
from kdlib_faces.evaluation import evaluate
from kdlib_faces.recipes.liaad import build

RESULTS = Path(__file__).parent / "results"
SETTINGS: dict[str, dict[str, Any]] = {
    "as in the demo": {},
    "lr 0.05": {"lr": 0.05},
    "lr 0.2": {"lr": 0.2},
    "lr 0.4": {"lr": 0.4},
    "CosFace, margin 0.1": {"head_margin": 0.1},
    "CosFace, margin 0.35": {"head_margin": 0.35},
    "CosFace, scale 16": {"head_scale": 16.0},
    "ArcFace, margin 0.3": {"head": "arcface", "head_margin": 0.3},
    "2 times as long": {"longer": 2},
    "4 times as long": {"longer": 4},
    "4 times as long, lr 0.2": {"longer": 4, "lr": 0.2},
}


def material(config: DemoConfig, seed: int) -> DemoData:
    """The demo's training and test faces, without teachers."""
    general, aged, test = synthetic_sets(config, seed)
    identities = torch.cat([general.labels, aged.labels + general.identities]).numpy()
    return DemoData(
        title="",
        train_images=torch.cat([general.images(), aged.images()]),
        train_identities=identities,
        num_identities=general.identities + aged.identities,
        test_images=test.images(),
        test_identities=test.labels.numpy(),
        test_ages=test.ages.numpy(),
        teachers={},
        recorded={},
        data={},
    )


def alone(faces: DemoData, config: DemoConfig, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """TAR at FAR 1 % by age gap of one setting."""
    changes = dict(changes)
    steps = config.student_steps * changes.pop("longer", 1)
    config = replace(config, student_steps=steps, lr=changes.pop("lr", config.lr))
    sizes = {"num_identities": faces.num_identities, "input_size": config.size, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        distiller = build(replace(config.student, **sizes, **changes), teachers={})
        trained = train_student(distiller, faces, config, Path(folder), label="alone", seed=seed, quiet=False)
    result = evaluate(embed(trained.model.embed, faces.test_images), faces.protocol(replicates=config.replicates))
    return {
        "steps": steps,
        "seconds": trained.model.train_seconds,
        "tar": {entry.name: _estimate(entry.tar[0.01].to_dict()) for entry in result.bins},
    }


def _estimate(estimate: dict[str, Any]) -> dict[str, float]:
    return {name: round(estimate[name], 4) for name in ("value", "low", "high")}


def main() -> None:
    """Train each setting, print a row, keep the figures."""
    parser = argparse.ArgumentParser(description="The demo's student alone, with other settings.")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    config = DemoConfig()
    faces = material(config, seed)
    rows: dict[str, Any] = {}
    for name, changes in SETTINGS.items():
        rows[name] = alone(faces, config, seed, changes)
        cells = [f"{bin_name}: {100 * tar['value']:5.1f}" for bin_name, tar in rows[name]["tar"].items()]
        print(f"{name:26} {rows[name]['steps']:5} steps  " + "  ".join(cells), flush=True)
    reference = json.loads((RESULTS / "synthetic.json").read_text())["models"]["student_distilled"]
    bins = reference["protocols"]["age_gap"]["bins"]
    tars = {entry["name"]: _estimate(entry["tar"]["0.01"]) for entry in bins}
    rows["distilled, from synthetic.json"] = {
        "steps": reference["train_steps"],
        "seconds": reference["train_seconds"],
        "tar": tars,
    }
    cells = [f"{bin_name}: {100 * tar['value']:5.1f}" for bin_name, tar in tars.items()]
    print(f"{'distilled':26} {reference['train_steps']:5} steps  " + "  ".join(cells))
    kept = {"seed": seed, "metric": "TAR at FAR 1 %, by years between the images", "settings": rows}
    (RESULTS / "student_alone.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
