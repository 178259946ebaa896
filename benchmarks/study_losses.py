"""Compare all losses under equal conditions: `python benchmarks/study_losses.py [--steps 600] [--seeds 0 1 2] [--loss dark_rank]`.

The demo's student learns from the demo's general teacher on the demo's synthetic faces, with the identity loss and one distillation loss; `running_mean`, `self_distillation` and `mutual` learn
from the student's own mean, its deeper stage and a second student instead. Each loss reads
the feature it was designed for: the embedding, the map of the middle stage, the maps of all stages, the pre-activation of the teacher's last block of the
middle stage, or the logits (cosines to class centers: the head's for the student, the mean embedding of each identity for the teacher). All runs use the same batches and the
same initial weights; the teacher's outputs are cached. Every loss has its defaults, except that `dark_rank` normalizes its rows;
the paraphraser of `factor_transfer` is trained on the teacher's maps first.

All weights follow one rule: at the student trained alone, over the first batches, the gradient norm of the term with respect to the network's
parameters is `--share` times that of the identity loss. No weight was tuned.

Prints TAR at FAR 1 % over all pairs of unseen identities and over those with a gap of 30+ years (one threshold for both), with 95 % intervals over
identities, and the paired differences to the student alone. An interrupted study resumes: each loss stores its embeddings in `--work`. A run of all
losses writes `results/losses_synthetic.json`; a run of some adds their rows to the file of `--output`, if its settings and its figures of the teacher and of
the student alone are the same, or begins that file. One seed takes half an hour on two cores.
"""

import argparse
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from loss_setups import LAYERS, SETUPS
from torch import Tensor, nn
from torch.nn import functional as F

import kdlib
from kdlib import OUTPUT, Distiller, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib._atomic import atomic_write
from kdlib._held import unchanged
from kdlib.cache import CachedTeacher
from kdlib.functional import overhaul_margin
from kdlib_faces.backbones import build_backbone
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.demo.run import DemoConfig
from kdlib_faces.demo.synthetic import synthetic_sets
from kdlib_faces.evaluation import AgeGapProtocol, compare, embed_images
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.progress import say
from kdlib_faces.recipes.liaad import build
from kdlib_faces.teachers import cache_outputs, read_outputs
from kdlib_faces.teachers.open import stage_taps
from kdlib_faces.training import TrainingConfig, fit

RESULTS = Path(__file__).parent / "results" / "losses_synthetic.json"
ALONE, TEACHER, FAR, METRIC = "alone", "general teacher", 1e-2, "tar@0.01"
WEIGHT_BATCHES = 8
"""Number of batches on which the weights are measured."""


class Classifier(nn.Module):
    """A student with the class centers of its head; returns the embedding and the logits."""

    def __init__(self, network: nn.Module, head: Any) -> None:
        super().__init__()
        self.network, self.centers, self.scale = network, head.weight, head.scale

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(b, 3, h, w)` to `(b, d)` and `(b, identities)`."""
        embedding = self.network(images)
        return {
            "embedding": embedding,
            "logits": self.scale * F.normalize(embedding, dim=1) @ F.normalize(self.centers, dim=1).T,
        }


class CachedFeature(nn.Module):
    """One cached feature of the teacher, or several; logits are scaled cosines to the teacher's class centers."""

    def __init__(self, cached: CachedTeacher, feature: str | list[str], centers: Tensor, scale: float) -> None:
        super().__init__()
        source = "embedding" if feature == "logits" else feature
        self.cached = CachedTeacher(cached.cache, features=[source] if isinstance(source, str) else source)
        self.feature, self.centers, self.scale = feature, centers, scale
        self.inputs = self.cached.inputs

    def forward(self, *targets: Tensor) -> dict[str, Tensor]:
        """Return the feature for sample ids and views."""
        features = self.cached(*targets)
        if self.feature == "logits":
            return {"logits": self.scale * F.normalize(features["embedding"].float(), dim=1) @ self.centers.T}
        return dict(features)


class Faces:
    """The demo's synthetic sets and its general teacher, whose outputs are cached once per seed."""

    def __init__(self, config: DemoConfig, work: Path, seed: int) -> None:
        self.config, self.work, self.seed, self.dim = config, work, seed, config.student.embedding_dim
        self.alone: nn.Module | None = None
        general, aged, self.test = synthetic_sets(config, seed)
        general_images = general.images()
        self.images = torch.cat([general_images, aged.images()])
        self.identities = torch.cat([general.labels, aged.labels + general.identities])
        self.num_identities = general.identities + aged.identities
        self.test_images = self.test.images()
        self.recipe = replace(config.student, num_identities=self.num_identities, input_size=config.size, seed=seed)
        size = {"width": config.teacher_width, "embedding_dim": self.dim, "input_size": config.size}
        network: Any = build_backbone("iresnet18", seed=seed, **size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)
            head = CosFaceHead(self.dim, general.identities, 32.0, 0.2)
        taps = stage_taps(network, config.student.stage)
        identity = Objective({"identity": Term(head, student="embedding", target="identity")})
        fit(
            Distiller(StudentAdapter(network, taps), {}, identity),
            self.batches(general_images, general.labels),
            work / "teacher",
            steps=config.general_steps,
            lr=config.teacher_lr,
            label=TEACHER,
            seed=seed,
            quiet=False,
            settings=TrainingConfig(amp="bfloat16"),
        )
        last = list(network.get_submodule(taps["map"]).named_children())[-1][0]
        before = f"{taps['map']}.{last}.bn2"
        self.margin = overhaul_margin(network.get_submodule(before))
        self.teacher = TeacherAdapter(network, {**taps, "before": before})
        self.by_layer = TeacherAdapter(network, dict(zip(LAYERS, network.stages, strict=True)))
        self.cached = cache_outputs(
            self.teacher, self.images, work / "outputs", label="the teacher's outputs", quiet=False
        )
        outputs = F.normalize(read_outputs(self.cached, "embedding", torch.arange(len(self.images))), dim=1)
        sums = torch.zeros(self.num_identities, self.dim).index_add_(0, self.identities, outputs)
        self.centers = F.normalize(sums, dim=1)
        student = self.student().student(torch.zeros(2, 3, config.size, config.size))
        self.channels = student["map"].shape[1], self.cached(*torch.zeros(2, 1).long())["map"].shape[1]
        teacher = self.by_layer(torch.zeros(2, 3, config.size, config.size))
        self.layer_channels = [[side[name].shape[1] for name in LAYERS] for side in (student, teacher)]

    @cached_property
    def cached_layers(self) -> CachedTeacher:
        """The teacher's maps of all stages."""
        return cache_outputs(self.by_layer, self.images, self.work / "layers", label="the teacher's maps", quiet=False)

    def factor_transfer(self) -> nn.Module:
        """Return the loss with a paraphraser that is trained on the teacher's maps."""
        loss = kdlib.FactorTransferLoss(*self.channels)

        def maps(batch: Any) -> Tensor:
            return self.cached(batch[1]["sample"], batch[1]["view"])["map"].float()

        loss.paraphraser.fit(self.batches(self.images, self.identities), maps)
        return loss

    def batches(self, images: Tensor, identities: Tensor) -> FaceBatches:
        """Return the training batches of the demo."""
        size, seed = self.config.batch_size, self.seed
        return FaceBatches(images, identities, batch_size=size, seed=seed, augment=AugmentConfig())

    def adapter(self, recipe: Any) -> tuple[StudentAdapter, Term]:
        """Return a student and its identity term."""
        start = build(recipe, teachers={})
        identity, network = start.objective.terms["identity"], start.student.model
        taps: Any = {part: OUTPUT[part] for part in ("embedding", "logits")}
        taps["map"] = f"network.{network.stages[recipe.stage]}"
        taps |= {name: f"network.{stage}" for name, stage in zip(LAYERS, network.stages, strict=True)}
        return StudentAdapter(Classifier(network, identity.loss), taps), identity

    def pair(self, adapter: StudentAdapter, terms: dict[str, Term]) -> Distiller:
        """Return two students that teach each other; the first is the one that is evaluated."""
        other, identity = self.adapter(replace(self.recipe, seed=self.seed + 1000))
        objectives = {"first": Objective(terms), "second": Objective({**terms, "identity": identity})}
        return kdlib.MutualDistiller({"first": adapter, "second": other}, objectives)

    def student(self, name: str = ALONE) -> Distiller:
        """Return the student with the identity loss and one distillation loss of weight 1."""
        adapter, identity = self.adapter(self.recipe)
        scale = adapter.model.scale
        terms, teachers = {"identity": identity}, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 3)
            if name != ALONE:
                setup = SETUPS[name]
                taps_and_target = {
                    "student": setup.student,
                    "teacher": setup.teacher,
                    "target": setup.target,
                    "project": setup.project,
                }
                terms[name] = Term(setup.loss(self), **taps_and_target)
                if setup.source == "cached":
                    cached = self.cached if isinstance(setup.teacher, str) else self.cached_layers
                    teachers = {"general": CachedFeature(cached, setup.teacher, self.centers, scale)}
                elif setup.source == "running mean":
                    teachers = {"mean": kdlib.EMATeacher(adapter)}
                elif setup.source == "self":
                    teachers = {"self": kdlib.SelfTeacher()}
                else:
                    return self.pair(adapter, terms)
            distiller = Distiller(adapter, teachers, Objective(terms))
            return distiller.infer(*next(iter(self.batches(self.images, self.identities))))

    def weight(self, name: str, alone: nn.Module, share: float) -> float:
        """Return the weight of a loss; `alone` is the student trained alone."""
        given = SETUPS[name].weight
        if given is not None:
            return given
        distiller = self.student(name)
        own: Any = distiller.student
        own.load_state_dict(alone.state_dict())
        parameters = list(own.model.network.parameters())
        norms: dict[str, list[float]] = {"identity": [], name: []}
        with unchanged(distiller, device=torch.device("cpu")):
            for _, batch in zip(range(WEIGHT_BATCHES), self.batches(self.images, self.identities), strict=False):
                for term, value in distiller(*batch).terms.items():
                    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                    squares = [float(each.square().sum()) for each in gradients if each is not None]
                    norms[term].append(sum(squares) ** 0.5)
        return share * fmean(norms["identity"]) / fmean(norms[name])

    def trained(self, folder: Path, name: str, steps: int, weight: float = 1.0) -> tuple[nn.Module, dict[str, Any]]:
        """Train a student, resuming from `folder`; return it with its training time and last losses."""
        distiller = self.student(name)
        if name != ALONE and SETUPS[name].weight is None:
            distiller.objective.terms[name].weight = weight
        batches = self.batches(self.images, self.identities)
        settings = {"steps": steps, "lr": self.config.lr, "seed": self.seed, "label": name}
        precision = TrainingConfig(amp=self.config.amp)
        fitted = fit(distiller, batches, folder, quiet=False, settings=precision, **settings)
        last = {term: round(values[-1], 5) for term, values in fitted.curve["terms"].items()}
        student = distiller.students["first"] if isinstance(distiller, kdlib.MutualDistiller) else distiller.student
        return student.eval(), {"seconds": round(fitted.seconds, 1), "losses": last}

    def embeddings(self, name: str, steps: int, share: float) -> tuple[np.ndarray, dict[str, Any]]:
        """Return a student's embeddings of the test set and its training facts; both are stored in `work`."""
        folder = self.work / (f"{name}_{steps}" if name == ALONE else f"{name}_{steps}_{share:g}")
        done = folder / "done.json"
        if not done.exists():
            facts: dict[str, Any] = {}
            if name != ALONE:
                if self.alone is None:
                    self.alone = self.trained(self.work / f"{ALONE}_{steps}", ALONE, steps)[0]
                facts = {"student": SETUPS[name].student, "teacher": SETUPS[name].teacher}
                facts["weight"] = self.weight(name, self.alone, share)
            student, training = self.trained(folder, name, steps, facts.get("weight", 1.0))
            self.alone = student if name == ALONE else self.alone
            np.save(
                folder / "embeddings.npy", embed_images(lambda images: student(images)["embedding"], self.test_images)
            )
            write_json(done, {**facts, **training})
        return np.load(folder / "embeddings.npy"), json.loads(done.read_text())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())


def evaluate_all(faces: Faces, steps: int, share: float, names: list[str]) -> dict[str, dict[str, Any]]:
    """Train what is missing and print one row per loss."""
    test, config = faces.test, faces.config
    protocol = AgeGapProtocol(
        test.labels.numpy(), ages=test.ages.numpy(), bins=(0, 30), fars=(FAR,), replicates=config.replicates
    )
    results, rows = {}, {}
    for name in (TEACHER, ALONE, *names):
        facts: dict[str, Any] = {}
        if name == TEACHER:
            embeddings = embed_images(lambda images: faces.teacher(images)["embedding"], faces.test_images)
        else:
            embeddings, facts = faces.embeddings(name, steps, share)
        results[name] = protocol.evaluate(embeddings)
        bins = {"all": results[name].all, "30+": results[name].bin("30+")}
        rows[name] = {**facts, "tar": {at: rounded(each.tar[FAR].to_dict()) for at, each in bins.items()}}
        if name not in (TEACHER, ALONE):
            entries = compare(results, name, ALONE)
            gains = {each["bin"]: each["difference"] for each in entries if each["metric"] == METRIC}
            rows[name]["over_alone"] = {at: rounded(gains[at]) for at in bins}
        print(line(name, rows[name]), flush=True)
    return rows


def rounded(estimate: dict[str, Any]) -> dict[str, float]:
    """Return the value and its interval, rounded."""
    return {key: round(estimate[key], 4) for key in ("value", "low", "high")}


def line(name: str, row: dict[str, Any]) -> str:
    """Format a row of the table, in per cent."""

    def cell(of: dict[str, float], sign: str) -> str:
        return f"{100 * of['value']:{sign}5.1f} ({100 * of['low']:{sign}.1f} to {100 * of['high']:{sign}.1f})"

    sides = [row.get(side, "") for side in ("student", "teacher")]
    features = ", ".join(side if isinstance(side, str) else "all stages" for side in sides).strip(", ")
    weight = f"{row['weight']:9.3g}" if "weight" in row else ""
    cells = [cell(row["tar"][at], "") for at in ("all", "30+")]
    cells += [cell(row["over_alone"][at], "+") for at in ("all", "30+")] if "over_alone" in row else []
    return f"{name:27} {features:22} {weight:9} " + "".join(f"{each:24}" for each in cells).rstrip()


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description="One student for each loss, on synthetic faces.")
    parser.add_argument("--steps", type=int, default=600, help="training steps of each student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of faces, identities and weights")
    parser.add_argument("--loss", action="append", choices=sorted(SETUPS), help="run only this loss; repeatable")
    parser.add_argument(
        "--share", type=float, default=1.0, help="gradient norm of a term relative to the identity loss"
    )
    parser.add_argument("--teacher-steps", type=int, default=DemoConfig.general_steps)
    parser.add_argument("--work", type=Path, default=Path("runs/losses"), help="folder of intermediate results")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = replace(DemoConfig(), general_steps=options.teacher_steps)
    names = sorted(options.loss or SETUPS)
    head = f"{'loss':27} {'student, teacher':22} {'weight':9} {'all pairs':23} {'30+ years':23} "
    runs = []
    for seed in options.seeds:
        faces = Faces(config, options.work / f"seed{seed}_{options.teacher_steps}", seed)
        say(
            f"seed {seed}: TAR at FAR 1 %, and the difference to the student alone in points\n{head}{'all pairs':23} 30+"
        )
        runs.append({"seed": seed, "rows": evaluate_all(faces, options.steps, options.share, names)})
    if len(runs) > 1:
        print("mean difference to the student alone over the seeds, in points: all pairs, 30+ years")
        for name in names:
            gains = [[run["rows"][name]["over_alone"][at]["value"] for run in runs] for at in ("all", "30+")]
            print(f"{name:27} " + " ".join(f"{100 * fmean(each):+6.1f}" for each in gains))
    settings = {"metric": "TAR at FAR 1 %", "steps": options.steps, "share": options.share, "batch": config.batch_size}
    settings |= {"teacher_steps": options.teacher_steps, "images": len(faces.test)}
    settings |= {"identities": faces.test.identities, "torch": torch.__version__}
    if options.loss is not None:
        runs = added(options.output, settings, runs)
    if runs:
        write_json(options.output, {**settings, "runs": runs})


def added(path: Path, settings: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of a file with the new rows; none if its settings, its teacher or its student alone differ."""
    if not path.exists():
        return runs
    kept = json.loads(path.read_text())
    same = [run["seed"] for run in kept["runs"]] == [run["seed"] for run in runs]
    same = same and {**settings, "runs": kept["runs"]} == kept
    for old, new in zip(kept["runs"], runs, strict=False):
        same = same and all(old["rows"][name]["tar"] == new["rows"][name]["tar"] for name in (TEACHER, ALONE))
    if not same:
        print(f"{path} is unchanged: it has other settings, or other figures of the teacher or of the student alone")
        return []
    for old, new in zip(kept["runs"], runs, strict=True):
        old["rows"] |= {name: row for name, row in new["rows"].items() if name not in (TEACHER, ALONE)}
    return list(kept["runs"])


if __name__ == "__main__":
    main()
