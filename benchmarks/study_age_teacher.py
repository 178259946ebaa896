"""What makes an age-invariant teacher of few images? `python benchmarks/study_age_teacher.py --faces LIST.csv --start FILE.onnx`.

Every way to adapt a general teacher is trained on some people of the list and tested on the others, in turn, until all have
been tested (5 folds over identities): TAR at FAR 1e-3 of pairs of an adult and a young image, against impostor pairs of an adult and a
young image, and of pairs of two adult images against such; flipped image added. Differences to the start have intervals of
a bootstrap over identities, paired. The network up to its last stage is run once and kept: all ways share it, so that the
whole study takes half an hour on one core. `--second FILE.onnx` adds the fused teachers. The same on drawn faces of exact ages is in
`study_age_teacher_drawn.py`. Writes `results/age_teacher.json`, part `real`: figures alone.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import OUTPUT, StudentAdapter, TrainConfig, train
from kdlib_faces.data.images import load_images, to_float
from kdlib_faces.data.lists import read_faces
from kdlib_faces.evaluation import AgeGapProtocol
from kdlib_faces.progress import progress
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig, build_age_teacher
from kdlib_faces.teachers import AttentiveAgeNet, OnnxTeacher, fit_age_map, fit_fusion, joined, load_start

RESULTS = Path(__file__).parent / "results" / "age_teacher.json"
FAR = 1e-3
FOLDS = 5


@dataclass
class Faces:
    """What was computed once: last maps and embeddings, plain and mirrored."""

    identities: np.ndarray
    maps: Tensor
    embeddings: Tensor
    network: Any
    groups: np.ndarray | None = None
    ages: np.ndarray | None = None
    names: tuple[str, ...] = ()
    second: Tensor | None = None

    vectors: Tensor | None = None

    @torch.no_grad()
    def fed(self, last: bool) -> Tensor:
        """Last maps, or, for what trains the embedding layer alone, the vectors before it."""
        if not last:
            return self.maps
        if self.vectors is None:
            before = nn.Sequential(*cut(self.network)[0]).eval()
            flat = self.maps.flatten(0, 1)
            parts = [before(part.float()).half() for part in torch.split(flat, 128)]
            self.vectors = torch.cat(parts).unflatten(0, self.maps.shape[:2])
        return self.vectors

    def sums(self, rows: np.ndarray) -> Tensor:
        """Unit embeddings of the start, flipped image added."""
        return F.normalize(self.embeddings[0, rows] + self.embeddings[1, rows], dim=1)

    def both(self, rows: np.ndarray) -> Tensor:
        """Unit embeddings of both teachers, joined."""
        assert self.second is not None
        return joined([self.sums(rows), F.normalize(self.second[0, rows] + self.second[1, rows], dim=1)])

    def far(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Ages or groups as `fit_age_map` takes them."""
        if self.ages is not None:
            return {"ages": torch.from_numpy(self.ages[rows])}
        return {"age_groups": torch.from_numpy(np.asarray(self.groups)[rows])}


class Tail(nn.Module):
    """A network behind a cut: what is fed there to embeddings."""

    stages = ("stage",)

    def __init__(self, network: Any, layers: list[nn.Module]) -> None:
        super().__init__()
        self.stage = nn.Identity()
        self.rest = nn.Sequential(*layers)
        self.embedding_dim: int = network.embedding_dim
        self.input_size: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(self.stage(x))
        return out


def cut(network: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """What lies between the last map and the vector before the embedding layer, and what lies behind that."""
    if hasattr(network, "conv_sep"):
        tail = list(network.features.layers)
        return [network.conv_sep, *tail[:2]], tail[2:]
    return [network.bn2, nn.Flatten(1)], [network.fc, network.features]


class MapBatches:
    """Batches of what the network is fed behind its cut: some people, up to four images of each, plain or mirrored."""

    def __init__(self, faces: Faces, fed: Tensor, rows: np.ndarray, *, people: int, seed: int) -> None:
        self.faces, self.fed, self.rows, self.people, self.seed, self.epoch = faces, fed, rows, people, seed, 0
        self.who = np.unique(faces.identities[rows], return_inverse=True)[1]
        self.own = [np.flatnonzero(self.who == person) for person in range(int(self.who.max()) + 1)]

    def __len__(self) -> int:
        return max(1, len(self.own) // self.people)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self.iter_from(0)

    def iter_from(self, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.own))
        for at in range(len(self)):
            chosen = order[at * self.people : (at + 1) * self.people]
            picked = np.concatenate([rng.permutation(self.own[p])[:4] for p in chosen])
            view = torch.from_numpy(rng.integers(0, 2, len(picked)))
            if at < step:
                continue
            rows = self.rows[picked]
            targets = {"identity": torch.from_numpy(self.who[picked])}
            if self.faces.ages is not None:
                targets["age"] = torch.from_numpy(self.faces.ages[rows]).float()
            else:
                targets["age_group"] = torch.from_numpy(np.asarray(self.faces.groups)[rows])
            age = targets["age_group"] if self.faces.ages is None else targets["age"]
            targets["identity_age"] = torch.stack([targets["identity"].double(), age.double()], dim=1)
            yield self.fed[view, torch.from_numpy(rows)].float(), targets


@dataclass(frozen=True)
class Way:
    """One way to adapt: a configuration of the recipe, and how long."""

    config: AgeTeacherConfig
    steps: int = 100
    lr: float = 5e-4
    people: int = 64
    then_map: float | None = field(default=None)


def _way(**options: Any) -> Way:
    own = {name: options.pop(name) for name in ("steps", "lr", "people", "then_map") if name in options}
    return Way(AgeTeacherConfig(**options), **own)


PAIRS: dict[str, Any] = {"identity_weight": 0.0, "pair_weight": 1.0, "pull": 100.0}
SHORT: dict[str, Any] = {"steps": 60, "people": 32}
MARGIN: dict[str, Any] = {"identity_weight": 1.0, "pair_weight": 0.0}
WAYS: dict[str, Way] = {
    "pairs, embedding layer": _way(method="pairs", trained="embedding", **PAIRS),
    "pairs, embedding layer, scale 32": _way(method="pairs", trained="embedding", **{**PAIRS, "pair_scale": 32.0}),
    "pairs, scale 32, then linear map": _way(
        method="pairs", trained="embedding", then_map=100.0, **{**PAIRS, "pair_scale": 32.0}
    ),
    "pairs, tail": _way(method="pairs", trained="tail", **PAIRS, **SHORT),
    "margin, embedding layer": _way(method="pairs", trained="embedding", pull=100.0, **MARGIN),
    "dal, published terms": _way(method="dal", trained="embedding", pull=0.0, **MARGIN),
    "dal, pulled": _way(method="dal", trained="embedding", pull=100.0, **MARGIN),
    "dal and pairs": _way(method="dal", trained="embedding", **PAIRS),
    "mtlface, published terms": _way(method="mtlface", trained="tail", pull=0.0, **MARGIN, **SHORT),
    "mtlface, pulled": _way(method="mtlface", trained="tail", pull=100.0, **MARGIN, **SHORT),
    "mtlface and pairs": _way(method="mtlface", trained="tail", **PAIRS, **SHORT),
    "mtlface and pairs, embedding layer": _way(method="mtlface", trained="embedding", **PAIRS, people=48),
}


@torch.no_grad()
def _embed(network: nn.Module, fed: Tensor, rows: np.ndarray) -> Tensor:
    """Unit embeddings, flipped image added."""
    network.eval()
    parts = []
    for part in np.array_split(rows, max(1, len(rows) // 128)):
        total = torch.zeros(())
        for view in (0, 1):
            total = total + network(fed[view, torch.from_numpy(part)].float())
        parts.append(F.normalize(total, dim=1))
    return torch.cat(parts)


def adapted(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray, way: Way, seed: int) -> Tensor:
    """Train one way on some people, embed the others."""
    between, behind = cut(faces.network)
    last = way.config.settled(loaded=True)["trained"] == "embedding" and way.config.method != "mtlface"
    fed = faces.fed(last)
    start: nn.Module = Tail(faces.network, copy.deepcopy(behind if last else between + behind))
    if way.config.method == "mtlface":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = AttentiveAgeNet(start, channels=fed.shape[2])
    groups = None if faces.ages is not None else len(faces.names)
    count = len(np.unique(faces.identities[train_rows]))
    distiller = build_age_teacher(start, way.config, num_identities=count, groups=groups, seed=seed)
    batches = MapBatches(faces, fed, train_rows, people=min(way.people, count), seed=seed)
    train(
        distiller,
        batches,
        TrainConfig(
            max_steps=way.steps,
            lr=way.lr,
            optimizer="adamw",
            weight_decay=0.0,
            warmup_steps=5,
            clip_norm=5.0,
            seed=seed,
        ),
    )
    network: Any = distiller.student.model.net
    if way.then_map is not None:
        own, other = (_embed(network, fed, rows) for rows in (train_rows, test_rows))
        who = torch.from_numpy(np.unique(faces.identities[train_rows], return_inverse=True)[1])
        return other @ fit_age_map(own, who, **faces.far(train_rows), pull=way.then_map, seed=seed)
    return _embed(network, fed, test_rows)


def whitened(rows: Tensor, who: Tensor, *, shrink: float) -> Tensor:
    """Within-class whitening: the inverse root of the people's own scatter, shrunk towards a multiple of the identity."""
    people = int(who.max()) + 1
    means = torch.zeros(people, rows.shape[1]).index_add_(0, who, rows) / torch.bincount(who)[:, None]
    rest = rows - means[who]
    scatter = (rest.T @ rest / len(rest)).double()
    flat = torch.eye(len(scatter)).double() * scatter.trace() / len(scatter)
    values, vectors = torch.linalg.eigh((1 - shrink) * scatter + shrink * flat)
    return (vectors @ torch.diag(values.rsqrt()) @ vectors.T).float()


Maker = Callable[[Faces, np.ndarray, np.ndarray], Tensor]


def _mapped(rows_of: Callable[[Faces, np.ndarray], Tensor], pull: float) -> Maker:
    def make(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray) -> Tensor:
        who = torch.from_numpy(np.unique(faces.identities[train_rows], return_inverse=True)[1])
        matrix = fit_age_map(rows_of(faces, train_rows), who, **faces.far(train_rows), pull=pull)
        return rows_of(faces, test_rows) @ matrix

    return make


def _white(rows_of: Callable[[Faces, np.ndarray], Tensor], shrink: float) -> Maker:
    def make(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray) -> Tensor:
        who = torch.from_numpy(np.unique(faces.identities[train_rows], return_inverse=True)[1])
        return rows_of(faces, test_rows) @ whitened(rows_of(faces, train_rows), who, shrink=shrink)

    return make


def _fusion(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray) -> Tensor:
    assert faces.second is not None
    seconds = F.normalize(faces.second[0] + faces.second[1], dim=1)
    who = torch.from_numpy(np.unique(faces.identities[train_rows], return_inverse=True)[1])
    matrix = fit_fusion([faces.sums(train_rows), seconds[train_rows]], who, dim=512)
    return faces.both(test_rows) @ matrix


LINEAR: dict[str, Maker] = {
    "start": lambda faces, _, rows: faces.sums(rows),
    "linear map, pull 10": _mapped(Faces.sums, 10.0),
    "linear map, pull 30": _mapped(Faces.sums, 30.0),
    "within-class whitening": _white(Faces.sums, 0.7),
}
FUSED: dict[str, Maker] = {
    "joined": lambda faces, _, rows: faces.both(rows),
    "joined, within-class whitening": _white(Faces.both, 0.7),
    "fused teacher": _fusion,
    "joined, linear map": _mapped(Faces.both, 30.0),
}


def folds(identities: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """For each fold, which rows are its test: people dealt once, all of them tested in the end."""
    people = np.random.default_rng(seed).permutation(np.unique(identities))
    return [np.isin(identities, people[at::count]) for at in range(count)]


def protocol(faces: Faces, rows: np.ndarray, replicates: int) -> AgeGapProtocol:
    """By groups, or by years between the images."""
    by: dict[str, Any] = {"ages": faces.ages[rows]} if faces.ages is not None else {}
    if not by:
        by = {"age_groups": np.asarray(faces.names)[np.asarray(faces.groups)[rows]]}
    return AgeGapProtocol(faces.identities[rows], fars=(FAR,), replicates=replicates, seed=1, **by)


def measured(faces: Faces, make: Maker, replicates: int) -> dict[str, dict[str, np.ndarray]]:
    """By bin, TAR of each fold and its replicates, averaged over folds with the folds' genuine pairs as weights."""
    found: dict[str, list[tuple[float, np.ndarray, int]]] = {}
    for test in folds(faces.identities, FOLDS):
        rows = np.flatnonzero(test)
        result = protocol(faces, rows, replicates).evaluate(make(faces, np.flatnonzero(~test), rows).double().numpy())
        for entry in result.bins:
            estimate = entry.own_tar[FAR]
            if estimate.value is not None and estimate.replicates is not None:
                found.setdefault(entry.name, []).append((estimate.value, estimate.replicates, entry.genuine))
    out = {}
    for name, parts in found.items():
        weight = np.array([genuine for *_, genuine in parts], dtype=float)
        weight /= weight.sum()
        out[name] = {
            "value": sum(w * value for w, (value, *_) in zip(weight, parts, strict=True)),
            "replicates": sum(w * draws for w, (_, draws, _) in zip(weight, parts, strict=True)),
        }
    return out


def row(mine: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """TAR by bin with its interval, and the paired difference to the start with its own."""

    def told(value: float, draws: np.ndarray) -> dict[str, float]:
        low, high = np.nanquantile(draws, (0.025, 0.975))
        return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}

    return {
        name: {
            "tar": told(entry["value"], entry["replicates"]),
            "over_start": told(entry["value"] - start[name]["value"], entry["replicates"] - start[name]["replicates"]),
        }
        for name, entry in mine.items()
    }


def study(
    faces: Faces, replicates: int, only: str, seed: int, done: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Every way whose name holds one of the words of `only` and is not `done`; prints a line and keeps all after each."""
    ways: dict[str, Maker] = dict(LINEAR)
    for name, way in WAYS.items():
        ways[name] = lambda f, a, b, way=way: adapted(f, a, b, way, seed)  # type: ignore[misc]  # one way each
    ways |= FUSED if faces.second is not None else {}
    rows = dict(done)
    start: dict[str, Any] = {}
    for name, make in ways.items():
        if name != "start" and (name in done or not any(word in name for word in only.split(";"))):
            continue
        began = time.perf_counter()
        mine = measured(faces, make, replicates)
        start = start or mine
        rows[name] = {"seconds": round(time.perf_counter() - began, 1), "bins": row(mine, start)}
        cells = [
            f"{at} {each['tar']['value']:.3f} ({each['over_start']['value']:+.3f}, {each['over_start']['low']:+.3f} to "
            f"{each['over_start']['high']:+.3f})"
            for at, each in rows[name]["bins"].items()
        ]
        print(f"{name:34} " + "  ".join(cells) + f"  {rows[name]['seconds']:.0f} s", flush=True)
        keep(rows)


@torch.no_grad()
def seen(network: Any, images: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """Last maps (float16) and embeddings of all images, plain and mirrored: `(2, n, ...)` each."""
    network = network.eval().to(memory_format=torch.channels_last)
    tapped = StudentAdapter(network, {"map": network.stages[-1], "embedding": OUTPUT})
    maps, embeddings = [], []
    for view in (0, 1):
        for part in progress(torch.split(images, 64), f"{label}, view {view}"):
            pixels = to_float(part)
            out = tapped((pixels.flip(3) if view else pixels).contiguous(memory_format=torch.channels_last))
            maps.append(out["map"].half().contiguous())
            embeddings.append(out["embedding"])
    pair = [torch.cat(each).unflatten(0, (2, len(images))) for each in (maps, embeddings)]
    return pair[0], pair[1]


def real(options: argparse.Namespace) -> Faces:
    """The list's people as the start sees them; what was computed is kept in `--cache`."""
    listed = read_faces([options.faces])
    if listed.age_groups is None:
        raise SystemExit("the list must have age groups")
    network = load_start(options.start)
    kept = Path(options.cache) / "seen.pt"
    if kept.exists():
        held = torch.load(kept, weights_only=True)
    else:
        images = load_images(listed, 112)
        maps, embeddings = seen(network, images, "last maps")
        held = {"maps": maps, "embeddings": embeddings}
        if options.second:
            teacher = OnnxTeacher(options.second)
            views = []
            for view in (0, 1):
                parts = progress(torch.split(images, 64), f"second teacher, view {view}")
                views += [teacher(to_float(each).flip(3) if view else to_float(each))["embedding"] for each in parts]
            held["second"] = torch.cat(views).unflatten(0, (2, len(images)))
        torch.save(held, kept)
    return Faces(
        listed.identities,
        held["maps"],
        held["embeddings"],
        network,
        groups=listed.age_groups,
        names=listed.group_names,
        second=held.get("second"),
    )


def keep_part(name: str, content: dict[str, Any]) -> None:
    """Write one part of the results, leave the other as it is."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[name] = content
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description="Ways to an age-invariant teacher, on people kept apart.")
    parser.add_argument("--faces", required=True, help="CSV list with age groups")
    parser.add_argument("--start", required=True, help="the general teacher: .onnx or .pt")
    parser.add_argument("--second", help="another teacher, .onnx, for the fused ones")
    parser.add_argument("--cache", default="", help="folder for what is computed once")
    parser.add_argument("--only", default="", help="ways whose names hold one of these words, by ;")
    parser.add_argument("--go-on", action="store_true", help="leave out the ways whose figures are there already")
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or folder
        faces = real(options)

        def keep(rows: dict[str, Any]) -> None:
            if options.only:
                return
            content = {
                "metric": "TAR at FAR 1e-3 against impostor pairs of the same bin, mean of 5 folds over identities",
                "images": len(faces.identities),
                "identities": len(np.unique(faces.identities)),
                "replicates": options.replicates,
                "seed": options.seed,
                "torch": torch.__version__,
                "ways": rows,
            }
            keep_part("real", content)

        done: dict[str, Any] = {}
        if options.go_on and RESULTS.exists():
            done = json.loads(RESULTS.read_text()).get("real", {}).get("ways", {})
        study(faces, options.replicates, options.only, options.seed, done, keep)


if __name__ == "__main__":
    main()
