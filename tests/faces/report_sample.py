"""A run with evaluations of several kinds, made of numbers alone, for the tests of the report."""

from __future__ import annotations

from typing import Any

import numpy as np

SKILL = {"general": 3.4, "second": 3.0, "student": 2.2}


def _scores(skill: float, rng: np.random.Generator, genuine: int, impostor: int) -> tuple[Any, Any]:
    return np.tanh(rng.normal(skill, 1.0, genuine) / 6), np.tanh(rng.normal(0, 1.0, impostor) / 6)


def _rate(value: float, n: int, **more: Any) -> dict[str, Any]:
    half = 1.96 * (max(value * (1 - value), 1e-4) / n) ** 0.5
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n, **more}


def _pairs(name: str, rng: np.random.Generator) -> dict[str, Any]:
    genuine, impostor = _scores(SKILL[name], rng, 600, 600)
    edges = np.linspace(-1, 1, 81)
    far = np.unique(np.r_[np.geomspace(1 / 600, 1, 60)])
    limits = np.quantile(impostor, 1 - far)
    tar = [(genuine > limit).mean() for limit in limits]
    return {
        "measures": {
            "accuracy": _rate(float((np.r_[genuine, -impostor] > 0.2).mean()), 1200, note="± 0.61 over folds"),
            "tar_0.01": _rate(float((genuine > np.quantile(impostor, 0.99)).mean()), 600),
            "tar_0.001": _rate(float((genuine > impostor.max()).mean()), 600, resolvable=False),
            "auc": {"value": float((genuine[:, None] > impostor).mean()), "low": 0.95, "high": 0.99, "n": 600},
        },
        "roc": {"far": far.tolist(), "tar": np.maximum.accumulate(tar).tolist()},
        "histogram": {
            "edges": edges.tolist(),
            "genuine": np.histogram(genuine, edges)[0].tolist(),
            "impostor": np.histogram(impostor, edges)[0].tolist(),
            "threshold": float(np.quantile(impostor, 0.99)),
        },
        "bins": {
            "fnmr": [_rate(0.02 * (5 - SKILL[name]) * (1 + at), 100 - 20 * at) if at != 3 else None for at in range(5)]
        },
    }


def a_run_of_protocols() -> dict[str, Any]:
    """Three models; pairs with an age axis, identification with ranks and a search, and groups that have no order."""
    rng = np.random.default_rng(0)
    rank = list(range(1, 21))
    identified = {
        name: {
            "measures": {
                "rank1": _rate(1 - 0.5 / skill, 900),
                "tpir": _rate(0.9 - 0.6 / skill, 900),
                "slope": {"value": -0.002 * skill, "low": -0.01, "high": 0.001, "n": 80},
            },
            "cmc": {"rank": rank, "rate": [1 - 0.5 / skill / k**0.6 for k in rank]},
            "search": {
                "fpir": np.geomspace(1e-3, 1, 40).tolist(),
                "tpir": np.linspace(0.3, 1 - 0.4 / skill, 40).tolist(),
            },
            "bins": {"groups": [_rate(1 - 0.4 / skill / (1 + at), 300) for at in range(3)]},
        }
        for name, skill in SKILL.items()
    }
    pairs = {name: _pairs(name, rng) for name in SKILL}
    names = list(SKILL)
    return {
        "format": 1,
        "title": "Evaluation",
        "command": "kdlib-faces evaluate --model general.onnx --protocol lfw=pairs.txt",
        "level": 0.95,
        "seeds": [0],
        "data": {"name": "made", "notes": ["12 pairs left out, their images are not in the list."]},
        "config": {"flip": True},
        "models": {
            name: {
                "role": "student" if name == "student" else "teacher",
                "label": f"{name}.onnx",
                "backbone": "ONNX",
                "parameters": 1_000_000 * (at + 1),
                "macs": 2e8 * (3 - at),
                "protocols": {},
            }
            for at, name in enumerate(names)
        },
        "evaluations": [
            {
                "name": "lfw",
                "title": "LFW pairs",
                "question": "Do two images show one person?",
                "convention": {
                    "Threshold": "grid of squared distances, chosen on the other nine folds",
                    "Flip": "added",
                },
                "counts": {"genuine pairs": 600, "impostor pairs": 600},
                "notes": ["395 pairs left out."],
                "measures": {
                    "accuracy": {"title": "Accuracy", "unit": "rate", "note": "ten folds"},
                    "tar_0.01": {"title": "TAR, FAR 1 %", "unit": "rate"},
                    "tar_0.001": {"title": "TAR, FAR 0.1 %", "unit": "rate"},
                    "auc": {"title": "AUC", "unit": "auc"},
                },
                "bins": {
                    "fnmr": {
                        "title": "FNMR at FMR 1 %",
                        "axis": "age gap, years",
                        "labels": ["0-4", "5-9", "10-19", "20-29", "30+"],
                        "at": [2, 7, 15, 25, 35],
                        "counts": [100, 80, 60, 0, 20],
                    }
                },
                "models": pairs,
                "differences": [
                    {
                        "a": a,
                        "b": b,
                        "measure": key,
                        "difference": {"value": d, "low": d - 0.02, "high": d + 0.015, "n": 600},
                    }
                    for a, b, d in (
                        ("general", "second", 0.01),
                        ("general", "student", 0.06),
                        ("second", "student", 0.05),
                    )
                    for key in ("accuracy", "tar_0.01", "auc")
                ],
                "difference_rule": "Paired bootstrap over identities, 500 resamples.",
                "scores": {"general": "scores/lfw-general.csv"},
            },
            {
                "name": "ijbc",
                "title": "IJB-C 1:N",
                "question": "Who is it, among the people of a gallery?",
                "convention": {"Pooling": "mean of a medium, sum over media", "Norm": "kept"},
                "counts": {"probe templates": 19593},
                "measures": {
                    "rank1": {"title": "Rank-1", "unit": "rate"},
                    "tpir": {"title": "TPIR, FPIR 1 %", "unit": "rate"},
                    "slope": {"title": "Slope of the genuine score", "unit": "score", "note": "a year"},
                },
                "bins": {
                    "groups": {
                        "title": "Rank-1",
                        "labels": ["adult-adult", "adult-young", "young-young"],
                        "counts": [9, 8, 7],
                    }
                },
                "models": identified,
            },
        ],
    }
