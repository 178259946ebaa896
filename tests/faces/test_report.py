"""The report room: the run's shape is checked, files are whole and safe, and the words say what the numbers say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kdlib_faces.report import Picture, attention_picture, pairs_picture

_BINS = ("0-4", "5-9", "10-19", "20-29", "30+")
_PAIRS = (812, 640, 903, 410, 236)
_SKILL = {"general_teacher": 2.5, "age_teacher": 2.75, "student_alone": 1.75, "student_distilled": 2.35}
_FADE = {"general_teacher": 0.32, "age_teacher": 0.16, "student_alone": 0.34, "student_distilled": 0.22}


def _estimate(value: float, spread: float, n: int) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - spread), "high": min(1.0, value + 0.8 * spread), "n": n}


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _bin(name: str, pairs: int, distance: float) -> dict[str, Any]:
    """Rates of two unit normals `distance` apart, with an interval that shrinks with the pairs."""
    spread = 1.6 / math.sqrt(pairs)
    tar = {far: _estimate(_phi(distance - z), spread, pairs) for far, z in (("0.01", 2.326), ("0.001", 3.09))}
    own = {far: _estimate(_phi(distance - z - 0.2), spread, pairs) for far, z in (("0.01", 2.326), ("0.001", 3.09))}
    auc, own_auc = _phi(distance / math.sqrt(2)), _phi((distance - 0.2) / math.sqrt(2))
    return {
        "name": name,
        "genuine": pairs,
        "impostor": 40 * pairs,
        "auc": _estimate(auc, 0.3 * spread, pairs),
        "tar": tar,
        "own_auc": _estimate(own_auc, 0.35 * spread, pairs),
        "own_tar": own,
    }


def _age_gap(model: str, bins: tuple[str, ...], kind: str) -> dict[str, Any]:
    distance = [1.4 * (_SKILL[model] - _FADE[model] * order) for order in range(len(bins))]
    far = [0.0, *np.logspace(-4, 0, 80)]
    edges = np.linspace(-1, 1, 61)
    centres = (edges[1:] + edges[:-1]) / 2
    rng = np.random.default_rng(7)
    genuine = {
        name: rng.poisson(pairs * 0.05 * np.exp(-(((centres - 0.17 * d) / 0.17) ** 2))).tolist()
        for name, pairs, d in zip(bins, _PAIRS, distance, strict=False)
    }

    def curve(d: float) -> dict[str, Any]:
        return {"far": far, "tar": [1 - (1 - f**0.5) ** d if f < 1 else 1.0 for f in far]}

    return {
        "kind": kind,
        "bins": [_bin(name, pairs, d) for name, pairs, d in zip(bins, _PAIRS, distance, strict=False)],
        "all": _bin("all", 3001, float(np.mean(distance))),
        "roc": {"all": curve(3 * float(np.mean(distance))), bins[-1]: curve(3 * distance[-1])},
        "histogram": {
            "edges": edges.tolist(),
            "genuine": genuine,
            "impostor": rng.poisson(9e3 * np.exp(-((centres / 0.2) ** 2))).tolist(),
        },
    }


def _model(name: str, bins: tuple[str, ...], kind: str) -> dict[str, Any]:
    teacher = name.endswith("teacher")
    gap = _age_gap(name, bins, kind)
    return {
        "role": "teacher" if teacher else "student",
        "label": name.replace("_", " ").capitalize(),
        "backbone": "IResNet-18" if teacher else "MobileFaceNet",
        "parameters": 24_025_600 if teacher else 1_003_136,
        "macs": 2_610_000_000 if teacher else 221_000_000,
        "latency_ms": 61.3 if teacher else 8.42,
        "input_size": 112,
        "train_seconds": 118.0 if teacher else 47.2,
        "train_steps": 900 if teacher else 600,
        "protocols": {
            "age_gap": gap,
            "verification": {
                "accuracy": gap["all"]["auc"]["value"] - 0.05,
                "std": 0.012,
                "folds": [0.9] * 10,
                "threshold_rule": "grid",
                "pairs": 3000,
            },
            "leave_one_out": {
                "rank1": _estimate(0.4 + 0.15 * _SKILL[name], 0.03, 600),
                "rank5": _estimate(0.5 + 0.16 * _SKILL[name], 0.03, 600),
                "probes": 600,
            },
        },
    }


def _comparisons(models: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    pair = [models[name]["protocols"]["age_gap"] for name in ("student_distilled", "student_alone")]
    for mine, other in zip(*([*gap["bins"], gap["all"]] for gap in pair), strict=True):
        values = [
            ("auc", mine["auc"], other["auc"]),
            ("own_auc", mine["own_auc"], other["own_auc"]),
            *((f"tar@{far}", mine["tar"][far], other["tar"][far]) for far in mine["tar"]),
        ]
        for metric, a, b in values:
            difference, spread = a["value"] - b["value"], 0.6 * (a["high"] - a["low"])
            rows.append(
                {
                    "a": "student_distilled",
                    "b": "student_alone",
                    "protocol": "age_gap",
                    "bin": mine["name"],
                    "metric": metric,
                    "difference": {
                        "value": difference,
                        "low": difference - spread,
                        "high": difference + spread,
                        "n": a["n"],
                    },
                    "separate": a["low"] > b["high"],
                }
            )
    return rows


def a_run(bins: tuple[str, ...] = _BINS, kind: str = "gap") -> dict[str, Any]:
    """A run as the demo makes it, with made-up numbers that hang together."""
    models = {name: _model(name, bins, kind) for name in _SKILL}
    steps = list(range(0, 600, 5))
    rng = np.random.default_rng(1)

    def losses(start: float, end: float) -> list[float]:
        fall = end + (start - end) * np.exp(-np.array(steps) / 140)
        return (fall * (1 + 0.08 * rng.standard_normal(len(steps)))).tolist()

    terms = {"identity": losses(21, 4), "angular": losses(0.9, 0.12), "attention": losses(0.4, 0.05)}
    return {
        "format": 1,
        "title": "Two teachers, one light student: drawn faces that age",
        "command": "kdlib-faces demo --output runs/demo --seeds 0",
        "created": "2026-03-01T12:00:00Z",
        "version": "0.1.0",
        "seeds": [0],
        "config": {"student": {"backbone": "mobilefacenet", "lr": 0.05, "fars": [0.01, 0.001]}, "size": 64},
        "environment": {"torch": "2.6.0", "python": "3.11.9", "threads": 2, "platform": "x86_64"},
        "data": {
            "name": "synthetic faces",
            "train_images": 6000,
            "train_identities": 500,
            "test_images": 600,
            "test_identities": 60,
            "notes": ["Test identities are in no training set."],
        },
        "models": models,
        "comparisons": _comparisons(models),
        "weights": {
            "angular": {"general_teacher": 0.41, "age_teacher": 0.59},
            "attention": {"general_teacher": 0.0, "age_teacher": 1.0},
        },
        "training": {
            "general_teacher": {"step": steps, "loss": losses(20, 1.5)},
            "age_teacher": {"step": steps, "loss": losses(22, 1.9)},
            "student_alone": {"step": steps, "loss": losses(21, 4.4)},
            "student_distilled": {"step": steps, "loss": losses(24, 5), "terms": terms},
        },
    }


def _face(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    base = rng.integers(90, 220, 3)
    face = np.where(((x / 0.66) ** 2 + (y / 0.86) ** 2 < 1)[..., None], base, 40)
    for eye in (-0.28, 0.28):
        face[(x - eye) ** 2 + (y + 0.2) ** 2 < 0.012] = 20
    return face.astype(np.uint8)


def some_pictures() -> list[Picture]:
    """The pictures that the demo adds."""
    faces = [_face(seed) for seed in range(8)]
    pairs = [(faces[i], faces[i + 1], f"{3 + i} and {34 + i} years\ncosine 0.{i + 1}2") for i in range(6)]
    y, x = np.mgrid[-1:1:7j, -1:1:7j]
    maps = {name: np.stack([np.exp(-((x - 0.1 * i) ** 2 + y**2)) for i in range(8)]) for name in _SKILL}
    return [
        Picture("pairs_missed", "Same person, least alike", "As the student sees them.", pairs_picture(pairs)),
        Picture("attention", "Where each model looks", "Middle stage.", attention_picture(faces, maps)),
    ]
