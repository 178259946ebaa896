"""What is each loss worth? `python benchmarks/study_losses.py [--steps 600] [--seeds 0 1 2] [--loss dark_rank]`.

The demo's student learns from the demo's general teacher on the demo's drawn faces: identities, and one loss of `kdlib` beside
them, where that loss belongs: the embedding, the middle stage's map, the pre-activation of the teacher's last block of that stage,
or the logits (cosines to the head's class centers, of the teacher to its mean embedding of each identity). All see the same
batches and start from the same weights; what the teacher says is computed once. Every loss has its defaults, but that `dark_rank`
normalizes its rows.

The rule of the weights, the same for all: on the student that was trained alone, over the first batches, the gradient of the
term with respect to the network's parameters is `--share` times as long as that of the identities. No weight was searched for.

Prints TAR at FAR 1 % over all pairs of people never trained on and over those 30 years and more apart (one threshold for both), with
95 % intervals over identities, and the paired differences to the student alone. Goes on where it was stopped: each loss leaves its
embeddings in `--work`. With all losses asked for it writes `results/losses_drawn.json`. Half an hour on two cores for a seed.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdlib
from kdlib import OUTPUT, Distiller, Objective, StudentAdapter, TeacherAdapter, Term
from kdlib.cache import CachedTeacher
from kdlib.influence import unchanged
from kdlib_faces.backbones import build_backbone
from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.demo.run import DemoConfig
from kdlib_faces.demo.stages import embed
from kdlib_faces.demo.synthetic import drawn_sets
from kdlib_faces.evaluation import AgeGapProtocol, compare
from kdlib_faces.heads import CosFaceHead
from kdlib_faces.progress import say
from kdlib_faces.recipes.liaad import build
from kdlib_faces.teachers import cache_outputs, read_outputs
from kdlib_faces.teachers.open import stage_taps
from kdlib_faces.training import fit

RESULTS = Path(__file__).parent / "results" / "losses_drawn.json"
ALONE, TEACHER, FAR, METRIC = "alone", "general teacher", 1e-2, "tar@0.01"
MEASURED = 8
"""Batches that the weights are measured on."""


@dataclass(frozen=True)
class Way:
    """A loss and the features it compares."""

    loss: Callable[["Faces"], nn.Module]
    student: str
    teacher: str
    project: str | None = None
    target: str | None = None


WAYS: dict[str, Way] = {
    "activation_boundary": Way(lambda _: kdlib.ActivationBoundaryLoss(), "map", "before", "auto"),
    "angular_distill": Way(lambda _: kdlib.AngularDistillLoss(), "embedding", "embedding"),
    "attention_transfer": Way(lambda _: kdlib.AttentionTransferLoss(), "map", "map"),
    "attentive_similarity": Way(lambda _: kdlib.AttentiveSimilarityLoss(), "map", "map", "auto"),
    "contrastive_representation": Way(
        lambda faces: kdlib.ContrastiveRepresentationLoss(*2 * [faces.dim]), "embedding", "embedding", target="identity"
    ),
    "correlation_congruence": Way(lambda _: kdlib.CorrelationCongruenceLoss(), "embedding", "embedding"),
    "dark_rank": Way(lambda _: kdlib.DarkRankLoss(normalize=True), "embedding", "embedding"),
    "decoupled_kd": Way(lambda _: kdlib.DecoupledKDLoss(), "logits", "logits", target="identity"),
    "dist": Way(lambda _: kdlib.DISTLoss(), "logits", "logits"),
    "hierarchical_context": Way(lambda _: kdlib.HierarchicalContextLoss(), "map", "map", "auto"),
    "hint": Way(lambda _: kdlib.HintLoss(), "map", "map", "auto"),
    "nst": Way(lambda _: kdlib.NSTLoss(), "map", "map"),
    "overhaul": Way(lambda faces: kdlib.OverhaulLoss(faces.margin), "map", "before", "auto"),
    "pkt": Way(lambda _: kdlib.PKTLoss(), "embedding", "embedding"),
    "rkd_angle": Way(lambda _: kdlib.RKDAngleLoss(), "embedding", "embedding"),
    "rkd_distance": Way(lambda _: kdlib.RKDDistanceLoss(), "embedding", "embedding"),
    "similarity_preserving": Way(lambda _: kdlib.SimilarityPreservingLoss(), "embedding", "embedding"),
    "soft_target": Way(lambda _: kdlib.SoftTargetLoss(), "logits", "logits"),
    "variational_information": Way(lambda faces: kdlib.VariationalInformationLoss(*faces.channels), "map", "map"),
}


class Classifier(nn.Module):
    """A student's network with its head's class centers: an embedding, and the logits that soft targets read."""

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


class Said(nn.Module):
    """What the teacher has said, one feature of it; its logits are cosines to its own class centers, times the scale."""

    def __init__(self, recorded: CachedTeacher, feature: str, centers: Tensor, scale: float) -> None:
        super().__init__()
        source = "embedding" if feature == "logits" else feature
        self.recorded = CachedTeacher(recorded.cache, features=[source])
        self.feature, self.centers, self.scale = feature, centers, scale
        self.reads = self.recorded.reads

    def forward(self, *targets: Tensor) -> dict[str, Tensor]:
        """The feature of these samples and views."""
        features = self.recorded(*targets)
        if self.feature == "logits":
            return {"logits": self.scale * F.normalize(features["embedding"].float(), dim=1) @ self.centers.T}
        return dict(features)


class Faces:
    """The demo's drawn sets and its general teacher, trained and recorded once for each seed."""

    def __init__(self, config: DemoConfig, work: Path, seed: int) -> None:
        self.config, self.work, self.seed, self.dim = config, work, seed, config.student.embedding_dim
        self.alone: nn.Module | None = None
        general, aged, self.test = drawn_sets(config, seed)
        general_images = general.images()
        self.images = torch.cat([general_images, aged.images()])
        self.identities = torch.cat([general.labels, aged.labels + general.identities])
        self.people = general.identities + aged.identities
        self.test_images = self.test.images()
        self.recipe = replace(config.student, num_identities=self.people, input_size=config.size, seed=seed)
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
            amp="bfloat16",
        )
        last = list(network.get_submodule(taps["map"]).named_children())[-1][0]
        before = f"{taps['map']}.{last}.bn2"
        self.margin = kdlib.overhaul_margin(network.get_submodule(before))
        self.teacher = TeacherAdapter(network, {**taps, "before": before})
        self.recorded = cache_outputs(
            self.teacher, self.images, work / "outputs", label="the teacher's outputs", quiet=False
        )
        said = F.normalize(read_outputs(self.recorded, "embedding", torch.arange(len(self.images))), dim=1)
        sums = torch.zeros(self.people, self.dim).index_add_(0, self.identities, said)
        self.centers = F.normalize(sums, dim=1)
        student = self.student().student(torch.zeros(2, 3, config.size, config.size))
        self.channels = student["map"].shape[1], self.recorded(*torch.zeros(2, 1).long())["map"].shape[1]

    def batches(self, images: Tensor, identities: Tensor) -> FaceBatches:
        """As in the demo."""
        size, seed = self.config.batch_size, self.seed
        return FaceBatches(images, identities, batch_size=size, seed=seed, augment=AugmentConfig())

    def student(self, name: str = ALONE) -> Distiller:
        """The student and its identities, and one loss beside them, of weight 1, its projection made."""
        start = build(self.recipe, teachers={})
        identity, network = start.objective.terms["identity"], start.student.model
        head: Any = identity.loss
        taps: Any = {part: OUTPUT[part] for part in ("embedding", "logits")}
        taps["map"] = f"network.{network.stages[self.recipe.stage]}"
        adapter = StudentAdapter(Classifier(network, head), taps)
        terms, teachers = {"identity": identity}, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 3)
            if name != ALONE:
                way = WAYS[name]
                places = {"student": way.student, "teacher": way.teacher, "target": way.target, "project": way.project}
                terms[name] = Term(way.loss(self), **places)
                teachers = {"general": Said(self.recorded, way.teacher, self.centers, head.scale)}
            distiller = Distiller(adapter, teachers, Objective(terms))
            return distiller.infer(*next(iter(self.batches(self.images, self.identities))))

    def weight(self, name: str, alone: nn.Module, share: float) -> float:
        """The weight of a loss by the rule; `alone` is the student that was trained alone."""
        distiller = self.student(name)
        own: Any = distiller.student
        own.load_state_dict(alone.state_dict())
        parameters = list(own.model.network.parameters())
        lengths: dict[str, list[float]] = {"identity": [], name: []}
        with unchanged(distiller, device=torch.device("cpu")):
            for _, batch in zip(range(MEASURED), self.batches(self.images, self.identities), strict=False):
                for term, value in distiller(*batch).terms.items():
                    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                    squares = [float(each.square().sum()) for each in found if each is not None]
                    lengths[term].append(sum(squares) ** 0.5)
        return share * fmean(lengths["identity"]) / fmean(lengths[name])

    def trained(self, folder: Path, name: str, steps: int, weight: float = 1.0) -> tuple[nn.Module, dict[str, Any]]:
        """A student, and how its training went; from the newest checkpoint in the folder if there is one."""
        distiller = self.student(name)
        if name != ALONE:
            distiller.objective.terms[name].weight = weight
        batches = self.batches(self.images, self.identities)
        settings = {"steps": steps, "lr": self.config.lr, "seed": self.seed, "label": name, "amp": self.config.amp}
        fitted = fit(distiller, batches, folder, quiet=False, **settings)
        last = {term: round(values[-1], 5) for term, values in fitted.curve["terms"].items()}
        return distiller.student.eval(), {"seconds": round(fitted.seconds, 1), "losses": last}

    def told(self, name: str, steps: int, share: float) -> tuple[np.ndarray, dict[str, Any]]:
        """A student's embeddings of the test set, and how they came to be; from `work` if they are there."""
        folder = self.work / (f"{name}_{steps}" if name == ALONE else f"{name}_{steps}_{share:g}")
        done = folder / "done.json"
        if not done.exists():
            told: dict[str, Any] = {}
            if name != ALONE:
                if self.alone is None:
                    self.alone = self.trained(self.work / f"{ALONE}_{steps}", ALONE, steps)[0]
                told = {"student": WAYS[name].student, "teacher": WAYS[name].teacher}
                told["weight"] = self.weight(name, self.alone, share)
            student, went = self.trained(folder, name, steps, told.get("weight", 1.0))
            self.alone = student if name == ALONE else self.alone
            np.save(folder / "embeddings.npy", embed(lambda images: student(images)["embedding"], self.test_images))
            keep(done, {**told, **went})
        return np.load(folder / "embeddings.npy"), json.loads(done.read_text())


def keep(path: Path, content: Any) -> None:
    """Write whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def judged(faces: Faces, steps: int, share: float, names: list[str]) -> dict[str, dict[str, Any]]:
    """Train what is not there yet; a row for each, printed as it comes."""
    test, config = faces.test, faces.config
    protocol = AgeGapProtocol(
        test.labels.numpy(), ages=test.ages.numpy(), bins=(0, 30), fars=(FAR,), replicates=config.replicates
    )
    results, rows = {}, {}
    for name in (TEACHER, ALONE, *names):
        told: dict[str, Any] = {}
        if name == TEACHER:
            embeddings = embed(lambda images: faces.teacher(images)["embedding"], faces.test_images)
        else:
            embeddings, told = faces.told(name, steps, share)
        results[name] = protocol.evaluate(embeddings)
        found = {"all": results[name].all, "30+": results[name].bin("30+")}
        rows[name] = {**told, "tar": {at: rounded(each.tar[FAR].to_dict()) for at, each in found.items()}}
        if name not in (TEACHER, ALONE):
            entries = compare(results, name, ALONE)
            gains = {each["bin"]: each["difference"] for each in entries if each["metric"] == METRIC}
            rows[name]["over_alone"] = {at: rounded(gains[at]) for at in found}
        print(line(name, rows[name]), flush=True)
    return rows


def rounded(estimate: dict[str, Any]) -> dict[str, float]:
    """Value and ends of the interval."""
    return {key: round(estimate[key], 4) for key in ("value", "low", "high")}


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table, in per cent."""

    def cell(of: dict[str, float], sign: str) -> str:
        return f"{100 * of['value']:{sign}5.1f} ({100 * of['low']:{sign}.1f} to {100 * of['high']:{sign}.1f})"

    places = f"{row['student']}, {row['teacher']}" if "student" in row else ""
    weight = f"{row['weight']:9.3g}" if "weight" in row else ""
    cells = [cell(row["tar"][at], "") for at in ("all", "30+")]
    cells += [cell(row["over_alone"][at], "+") for at in ("all", "30+")] if "over_alone" in row else []
    return f"{name:27} {places:22} {weight:9} " + "".join(f"{each:24}" for each in cells).rstrip()


def main() -> None:
    """Train, print, keep."""
    parser = argparse.ArgumentParser(description="One student for each loss, on drawn faces.")
    parser.add_argument("--steps", type=int, default=600, help="of each student")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="other faces, people and weights for each")
    parser.add_argument("--loss", action="append", choices=sorted(WAYS), help="only this one; may be given again")
    parser.add_argument("--share", type=float, default=1.0, help="length of a term's gradient over the identities'")
    parser.add_argument("--teacher-steps", type=int, default=DemoConfig.general_steps)
    parser.add_argument("--work", type=Path, default=Path("runs/losses"), help="what is done lies here")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    config = replace(DemoConfig(), general_steps=asked.teacher_steps)
    names = sorted(asked.loss or WAYS)
    head = f"{'loss':27} {'student, teacher':22} {'weight':9} {'all pairs':23} {'30 years and more':23} "
    runs = []
    for seed in asked.seeds:
        faces = Faces(config, asked.work / f"seed{seed}_{asked.teacher_steps}", seed)
        say(
            f"seed {seed}: TAR at FAR 1 %, and what it is above the student alone, in points\n{head}{'all pairs':23} 30+"
        )
        runs.append({"seed": seed, "rows": judged(faces, asked.steps, asked.share, names)})
    if len(runs) > 1:
        print("mean over the seeds of the points above the student alone: all pairs, 30 years and more")
        for name in names:
            gains = [[run["rows"][name]["over_alone"][at]["value"] for run in runs] for at in ("all", "30+")]
            print(f"{name:27} " + " ".join(f"{100 * fmean(each):+6.1f}" for each in gains))
    if asked.loss is None:
        kept = {"metric": "TAR at FAR 1 %", "steps": asked.steps, "share": asked.share, "batch": config.batch_size}
        kept |= {"teacher_steps": asked.teacher_steps, "images": len(faces.test), "identities": faces.test.identities}
        keep(asked.output, {**kept, "torch": torch.__version__, "runs": runs})


if __name__ == "__main__":
    main()
