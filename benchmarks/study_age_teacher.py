"""Compare methods for an age-invariant teacher: `python benchmarks/study_age_teacher.py --faces LIST.csv --start FILE.onnx`.

Each method adapts a general teacher on some identities of the list and is tested on the others, in 5 folds over identities.
The metric is TAR at FAR 1e-3 of pairs of an adult and a young image, and of pairs of two adult images, against impostor pairs of
the same kind, with flip test. Differences from the start have paired bootstrap intervals over identities. The network up to its
last stage is run once for all methods, so that the study takes half an hour on one core. `--second FILE.onnx` adds the fused
teachers. `study_age_teacher_synthetic.py` is the same study on synthetic faces of exact ages. Writes `results/age_teacher.json`, part
`real`, which holds no images.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlib import OUTPUT, StudentAdapter, TrainConfig, train
from kdlib_faces.backbones import MBF, Backbone, InputSpec, IResNet
from kdlib_faces.data.dataset import load_images
from kdlib_faces.data.images import to_float
from kdlib_faces.data.lists import read_faces
from kdlib_faces.evaluation import AgeGapProtocol
from kdlib_faces.progress import progress
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig, build_age_teacher
from kdlib_faces.teachers import AttentiveAgeNet, OnnxTeacher, fit_age_map, fit_fusion, join_embeddings, load_pretrained

RESULTS = Path(__file__).parent / "results" / "age_teacher.json"
FAR = 1e-3
FOLDS = 5


@dataclass
class Faces:
    """Outputs of the start that are computed once: last maps and embeddings, plain and mirrored."""

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
    def inputs(self, last: bool) -> Tensor:
        """Last maps, or the inputs of the embedding layer for methods that train this layer alone."""
        if not last:
            return self.maps
        if self.vectors is None:
            before = nn.Sequential(*cut(self.network)[0]).eval()
            flat = self.maps.flatten(0, 1)
            parts = [before(part.float()).half() for part in torch.split(flat, 128)]
            self.vectors = torch.cat(parts).unflatten(0, self.maps.shape[:2])
        return self.vectors

    def labels(self, rows: np.ndarray) -> Tensor:
        """Identities from 0."""
        return torch.from_numpy(np.unique(self.identities[rows], return_inverse=True)[1])

    def sums(self, rows: np.ndarray) -> Tensor:
        """Unit embeddings of the start, with flip test."""
        return F.normalize(self.embeddings[0, rows] + self.embeddings[1, rows], dim=1)

    def both(self, rows: np.ndarray) -> Tensor:
        """Unit embeddings of both teachers, joined."""
        assert self.second is not None
        return join_embeddings([self.sums(rows), F.normalize(self.second[0, rows] + self.second[1, rows], dim=1)])

    def ages_of(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Ages or groups as arguments of `fit_age_map`."""
        if self.ages is not None:
            return {"ages": torch.from_numpy(self.ages[rows])}
        return {"age_groups": torch.from_numpy(np.asarray(self.groups)[rows])}


class Unchanged(InputSpec):
    """Inputs that are no images and stay as they are."""

    def __call__(self, images: Tensor) -> Tensor:
        return images


class Tail(Backbone):
    """The layers of a network behind a cut: their inputs to embeddings."""

    stages = ("stage",)
    name = "tail"

    def __init__(self, network: Backbone, layers: list[nn.Module]) -> None:
        super().__init__(network.embedding_dim, network.input_size)
        self.input_spec = Unchanged()
        self.stage = nn.Identity()
        self.rest = nn.Sequential(*layers)

    @property
    def arguments(self) -> dict[str, Any]:
        return {}

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.rest(self.stage(images))
        return out


def cut(network: Backbone) -> tuple[list[nn.Module], list[nn.Module]]:
    """The layers between the last map and the embedding layer, and the layers from there on."""
    if isinstance(network, MBF):
        tail = list(network.features.layers)
        return [network.conv_sep, *tail[:2]], tail[2:]
    assert isinstance(network, IResNet)
    return [network.bn2, nn.Flatten(1)], [network.fc, network.features]


class MapBatches:
    """Batches of inputs behind the cut: some identities, up to four images of each, plain or mirrored."""

    def __init__(self, faces: Faces, inputs: Tensor, rows: np.ndarray, *, num_identities: int, seed: int) -> None:
        self.faces, self.inputs, self.rows, self.seed, self.epoch = faces, inputs, rows, seed, 0
        self.num_identities = num_identities
        self.labels = np.unique(faces.identities[rows], return_inverse=True)[1]
        self.own = [np.flatnonzero(self.labels == label) for label in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return max(1, len(self.own) // self.num_identities)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return self.iter_from(0)

    def iter_from(self, step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.own))
        for at in range(len(self)):
            chosen = order[at * self.num_identities : (at + 1) * self.num_identities]
            picked = np.concatenate([rng.permutation(self.own[p])[:4] for p in chosen])
            view = torch.from_numpy(rng.integers(0, 2, len(picked)))
            if at < step:
                continue
            rows = self.rows[picked]
            targets = {"identity": torch.from_numpy(self.labels[picked])}
            if self.faces.ages is not None:
                targets["age"] = torch.from_numpy(self.faces.ages[rows]).float()
            else:
                targets["age_group"] = torch.from_numpy(np.asarray(self.faces.groups)[rows])
            age = targets["age_group"] if self.faces.ages is None else targets["age"]
            targets["identity_age"] = torch.stack([targets["identity"].double(), age.double()], dim=1)
            yield self.inputs[view, torch.from_numpy(rows)].float(), targets


@dataclass(frozen=True)
class Method:
    """A configuration of the recipe, and its length."""

    config: AgeTeacherConfig
    steps: int = 100
    lr: float = 5e-4
    num_identities: int = 64
    map_weight: float | None = None
    """L2-SP weight of a linear map that is fitted afterwards; None fits none."""


def _method(method: str, trainable: str, **options: Any) -> Method:
    own = {name: options.pop(name) for name in ("steps", "lr", "num_identities", "map_weight") if name in options}
    return Method(AgeTeacherConfig(method=method, trainable=trainable, **options), **own)


PAIRS: dict[str, Any] = {"identity_weight": 0.0, "pair_weight": 1.0, "l2_sp_weight": 100.0}
SHORT: dict[str, Any] = {"steps": 60, "num_identities": 32}
MARGIN: dict[str, Any] = {"identity_weight": 1.0, "pair_weight": 0.0}
METHODS: dict[str, Method] = {
    "pairs, embedding layer": _method(method="pairs", trainable="embedding", **PAIRS),
    "pairs, embedding layer, scale 32": _method(method="pairs", trainable="embedding", **{**PAIRS, "pair_scale": 32.0}),
    "pairs, scale 32, then linear map": _method(
        method="pairs", trainable="embedding", map_weight=100.0, **{**PAIRS, "pair_scale": 32.0}
    ),
    "pairs, tail": _method(method="pairs", trainable="tail", **PAIRS, **SHORT),
    "margin, embedding layer": _method(method="pairs", trainable="embedding", l2_sp_weight=100.0, **MARGIN),
    "dal, published terms": _method(method="dal", trainable="embedding", l2_sp_weight=0.0, **MARGIN),
    "dal, L2-SP": _method(method="dal", trainable="embedding", l2_sp_weight=100.0, **MARGIN),
    "dal and pairs": _method(method="dal", trainable="embedding", **PAIRS),
    "mtlface, published terms": _method(method="mtlface", trainable="tail", l2_sp_weight=0.0, **MARGIN, **SHORT),
    "mtlface, L2-SP": _method(method="mtlface", trainable="tail", l2_sp_weight=100.0, **MARGIN, **SHORT),
    "mtlface and pairs": _method(method="mtlface", trainable="tail", **PAIRS, **SHORT),
    "mtlface and pairs, embedding layer": _method(method="mtlface", trainable="embedding", **PAIRS, num_identities=48),
}


@torch.no_grad()
def _embed(network: nn.Module, inputs: Tensor, rows: np.ndarray) -> Tensor:
    """Unit embeddings, with flip test."""
    network.eval()
    parts = []
    for part in np.array_split(rows, max(1, len(rows) // 128)):
        total = torch.zeros(())
        for view in (0, 1):
            total = total + network(inputs[view, torch.from_numpy(part)].float())
        parts.append(F.normalize(total, dim=1))
    return torch.cat(parts)


def adapted(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray, method: Method, seed: int) -> Tensor:
    """Train a method on some identities and embed the others."""
    between, behind = cut(faces.network)
    last = method.config.trainable in (None, "embedding") and method.config.method != "mtlface"
    inputs = faces.inputs(last)
    start: nn.Module = Tail(faces.network, copy.deepcopy(behind if last else between + behind))
    if method.config.method == "mtlface":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start = AttentiveAgeNet(start, channels=inputs.shape[2])
    groups = None if faces.ages is not None else len(faces.names)
    count = len(np.unique(faces.identities[train_rows]))
    distiller = build_age_teacher(start, method.config, num_identities=count, groups=groups, seed=seed)
    batches = MapBatches(faces, inputs, train_rows, num_identities=min(method.num_identities, count), seed=seed)
    train(
        distiller,
        batches,
        TrainConfig(
            max_steps=method.steps,
            lr=method.lr,
            optimizer="adamw",
            weight_decay=0.0,
            warmup_steps=5,
            clip_norm=5.0,
            seed=seed,
        ),
    )
    network: Any = distiller.student.model.net
    if method.map_weight is not None:
        own, other = (_embed(network, inputs, rows) for rows in (train_rows, test_rows))
        labels = faces.labels(train_rows)
        return other @ fit_age_map(own, labels, **faces.ages_of(train_rows), l2_sp_weight=method.map_weight, seed=seed)
    return _embed(network, inputs, test_rows)


def whitened(rows: Tensor, labels: Tensor, *, shrink: float) -> Tensor:
    """Within-class whitening: the inverse root of the within-class scatter, shrunk towards a multiple of the identity."""
    sums = torch.zeros(int(labels.max()) + 1, rows.shape[1]).index_add_(0, labels, rows)
    rest = rows - (sums / torch.bincount(labels)[:, None])[labels]
    scatter = (rest.T @ rest / len(rest)).double()
    flat = torch.eye(len(scatter)).double() * scatter.trace() / len(scatter)
    values, vectors = torch.linalg.eigh((1 - shrink) * scatter + shrink * flat)
    return (vectors @ torch.diag(values.rsqrt()) @ vectors.T).float()


Maker = Callable[[Faces, np.ndarray, np.ndarray], Tensor]


def _mapped(rows_of: Callable[[Faces, np.ndarray], Tensor], l2_sp_weight: float) -> Maker:
    def make(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray) -> Tensor:
        labels = faces.labels(train_rows)
        matrix = fit_age_map(rows_of(faces, train_rows), labels, **faces.ages_of(train_rows), l2_sp_weight=l2_sp_weight)
        return rows_of(faces, test_rows) @ matrix

    return make


def _white(rows_of: Callable[[Faces, np.ndarray], Tensor], shrink: float) -> Maker:
    def make(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray) -> Tensor:
        labels = faces.labels(train_rows)
        return rows_of(faces, test_rows) @ whitened(rows_of(faces, train_rows), labels, shrink=shrink)

    return make


def _fusion(faces: Faces, train_rows: np.ndarray, test_rows: np.ndarray) -> Tensor:
    assert faces.second is not None
    seconds = F.normalize(faces.second[0] + faces.second[1], dim=1)
    labels = faces.labels(train_rows)
    matrix = fit_fusion([faces.sums(train_rows), seconds[train_rows]], labels, dim=512)
    return faces.both(test_rows) @ matrix


LINEAR: dict[str, Maker] = {
    "start": lambda faces, _, rows: faces.sums(rows),
    "linear map, L2-SP 10": _mapped(Faces.sums, 10.0),
    "linear map, L2-SP 30": _mapped(Faces.sums, 30.0),
    "within-class whitening": _white(Faces.sums, 0.7),
}
FUSED: dict[str, Maker] = {
    "joined": lambda faces, _, rows: faces.both(rows),
    "joined, within-class whitening": _white(Faces.both, 0.7),
    "fused teacher": _fusion,
    "joined, linear map": _mapped(Faces.both, 30.0),
}


def folds(identities: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """A mask of the test rows of each fold; every identity is in one test set."""
    order = np.random.default_rng(seed).permutation(np.unique(identities))
    return [np.isin(identities, order[at::count]) for at in range(count)]


def protocol(faces: Faces, rows: np.ndarray, replicates: int) -> AgeGapProtocol:
    """The protocol by age groups, or by age gap in years."""
    by: dict[str, Any] = {"ages": faces.ages[rows]} if faces.ages is not None else {}
    if not by:
        by = {"age_groups": np.asarray(faces.names)[np.asarray(faces.groups)[rows]]}
    return AgeGapProtocol(faces.identities[rows], fars=(FAR,), replicates=replicates, seed=1, **by)


def measured(faces: Faces, make: Maker, replicates: int) -> dict[str, dict[str, np.ndarray]]:
    """TAR and replicates by bin, averaged over the folds weighted by their genuine pairs."""
    estimates: dict[str, list[tuple[float, np.ndarray, int]]] = {}
    for test in folds(faces.identities, FOLDS):
        rows = np.flatnonzero(test)
        result = protocol(faces, rows, replicates).evaluate(make(faces, np.flatnonzero(~test), rows).double().numpy())
        for entry in result.bins:
            estimate = entry.own_tar[FAR]
            if estimate.value is not None and estimate.replicates is not None:
                estimates.setdefault(entry.name, []).append((estimate.value, estimate.replicates, entry.genuine))
    out = {}
    for name, parts in estimates.items():
        weight = np.array([genuine for *_, genuine in parts], dtype=float)
        weight /= weight.sum()
        out[name] = {
            "value": sum(w * value for w, (value, *_) in zip(weight, parts, strict=True)),
            "replicates": sum(w * draws for w, (_, draws, _) in zip(weight, parts, strict=True)),
        }
    return out


def row(mine: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """TAR by bin and its paired difference from the start, with intervals."""

    def interval(value: float, draws: np.ndarray) -> dict[str, float]:
        low, high = np.nanquantile(draws, (0.025, 0.975))
        return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4)}

    return {
        name: {
            "tar": interval(entry["value"], entry["replicates"]),
            "over_start": interval(
                entry["value"] - start[name]["value"], entry["replicates"] - start[name]["replicates"]
            ),
        }
        for name, entry in mine.items()
    }


def study(
    faces: Faces, replicates: int, only: str, seed: int, done: dict[str, Any], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Run each method whose name contains a word of `only` and that is not `done`; print and store the results after each."""
    makers: dict[str, Maker] = dict(LINEAR)
    for name, method in METHODS.items():
        makers[name] = lambda f, a, b, method=method: adapted(f, a, b, method, seed)  # type: ignore[misc]
    makers |= FUSED if faces.second is not None else {}
    rows = dict(done)
    start: dict[str, Any] = {}
    for name, make in makers.items():
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
def outputs(network: Backbone, images: Tensor, label: str) -> tuple[Tensor, Tensor]:
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
    """Outputs of the start for the list, stored in `--cache`."""
    listed = read_faces([options.faces])
    if listed.age_groups is None:
        raise SystemExit("the list must have age groups")
    network = load_pretrained(options.start)
    assert isinstance(network, Backbone)
    stored = Path(options.cache) / "outputs.pt"
    if stored.exists():
        cached = torch.load(stored, weights_only=True)
    else:
        images = load_images(listed, 112)
        maps, embeddings = outputs(network, images, "last maps")
        cached = {"maps": maps, "embeddings": embeddings}
        if options.second:
            teacher = OnnxTeacher(options.second)
            views = []
            for view in (0, 1):
                parts = progress(torch.split(images, 64), f"second teacher, view {view}")
                views += [teacher(to_float(each).flip(3) if view else to_float(each))["embedding"] for each in parts]
            cached["second"] = torch.cat(views).unflatten(0, (2, len(images)))
        torch.save(cached, stored)
    return Faces(
        listed.identities,
        cached["maps"],
        cached["embeddings"],
        network,
        groups=listed.age_groups,
        names=listed.group_names,
        second=cached.get("second"),
    )


def keep_part(name: str, content: dict[str, Any]) -> None:
    """Replace one part of the results."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = content
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description="Methods for an age-invariant teacher, tested on unseen identities.")
    parser.add_argument("--faces", required=True, help="CSV list with age groups")
    parser.add_argument("--start", required=True, help="the general teacher: .onnx or .pt")
    parser.add_argument("--second", help="a second teacher, .onnx, for the fused teachers")
    parser.add_argument("--cache", default="", help="folder for the outputs of the start")
    parser.add_argument("--only", default="", help="run methods whose names contain one of these words, separated by ;")
    parser.add_argument("--resume", action="store_true", help="skip methods that have results")
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
                "methods": rows,
            }
            keep_part("real", content)

        done: dict[str, Any] = {}
        if options.resume and RESULTS.exists():
            done = json.loads(RESULTS.read_text()).get("real", {}).get("methods", {})
        study(faces, options.replicates, options.only, options.seed, done, keep)


if __name__ == "__main__":
    main()
