"""Train the demo's student alone with other settings: `python benchmarks/study_student_alone.py [--seed 0]`.

The demo trains the student alone with the settings of the distilled one, which is a fair comparison only if no other setting is
much better. This study trains it on the demo's synthetic faces with other learning rates, margins and lengths, and prints TAR
at FAR 1 % by age gap next to the distilled student's of `results/synthetic.json`. It writes `results/student_alone.json` and
takes about ten minutes on two cores. Settings are compared on the test set, which favors the student alone.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdlib_faces.demo import DemoConfig
from kdlib_faces.demo.data import DemoData
from kdlib_faces.demo.run import train_student
from kdlib_faces.demo.synthetic import synthetic_faces
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


def train_alone(data: DemoData, config: DemoConfig, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """TAR at FAR 1 % by age gap of one setting."""
    changes = dict(changes)
    steps = config.student_steps * changes.pop("longer", 1)
    config = replace(config, student_steps=steps, lr=changes.pop("lr", config.lr))
    sizes = {"num_identities": data.num_identities, "input_size": config.size, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        distiller = build(replace(config.student, **sizes, **changes), teachers={})
        model, _, _ = train_student(distiller, data, config, Path(folder), label="alone", seed=seed, quiet=False)
    result = data.age_protocol(replicates=config.replicates).evaluate(model.embed(data.test_images))
    return {
        "steps": steps,
        "seconds": model.entry.train_seconds,
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
    data = synthetic_faces(config, seed)
    rows: dict[str, Any] = {}
    for name, changes in SETTINGS.items():
        rows[name] = train_alone(data, config, seed, changes)
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
