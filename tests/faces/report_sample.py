"""A report with all kinds of results, made of numbers alone."""

import numpy as np

from kdlib_faces.evaluation.summary import (
    Bins,
    CmcCurve,
    Difference,
    Histogram,
    Measure,
    MeasuredValue,
    ModelSummary,
    ProtocolSummary,
    RocCurve,
    SearchCurve,
)
from kdlib_faces.report import DataSummary, ModelEntry, Report, StudentPair, TrainingCurve

SKILL = {"distilled": 3.4, "alone": 2.2, "teacher": 3.8}


def rate(value: float, n: int, *, resolvable: bool = True, note: str = "") -> MeasuredValue:
    half = 1.96 * (max(value * (1 - value), 1e-4) / n) ** 0.5
    return MeasuredValue(value, max(0.0, value - half), min(1.0, value + half), n, resolvable, note)


def _pairs(skill: float, rng: np.random.Generator) -> ModelSummary:
    genuine, impostor = np.tanh(rng.normal(skill, 1.0, 600) / 6), np.tanh(rng.normal(0, 1.0, 600) / 6)
    edges, far = np.linspace(-1, 1, 81), np.geomspace(1 / 600, 1, 60)
    tar = [float((genuine > limit).mean()) for limit in np.quantile(impostor, 1 - far)]
    return ModelSummary(
        measures={
            "accuracy": rate(float((np.r_[genuine, -impostor] > 0.2).mean()), 1200, note="± 0.61 over folds"),
            "tar_0.01": rate(float((genuine > np.quantile(impostor, 0.99)).mean()), 600),
            "tar_0.001": rate(float((genuine > impostor.max()).mean()), 600, resolvable=False),
            "auc": MeasuredValue(float((genuine[:, None] > impostor).mean()), 0.95, 0.99, 600),
        },
        bins={
            "fnmr": [
                rate(0.02 * (5 - skill) * (1 + at), 100 - 20 * at) if at != 3 else MeasuredValue() for at in range(5)
            ]
        },
        roc=RocCurve(far.tolist(), np.maximum.accumulate(tar).tolist()),
        histogram=Histogram(
            edges.tolist(), np.histogram(genuine, edges)[0].tolist(), np.histogram(impostor, edges)[0].tolist(),
            float(np.quantile(impostor, 0.99)),
        ),
    )  # fmt: skip


def _identified(skill: float) -> ModelSummary:
    ranks = list(range(1, 21))
    return ModelSummary(
        measures={
            "rank1": rate(1 - 0.5 / skill, 900),
            "tpir": rate(0.9 - 0.6 / skill, 900),
            "slope": MeasuredValue(-0.002 * skill, -0.01, 0.001, 80),
        },
        bins={"groups": [rate(1 - 0.4 / skill / (1 + at), 300) for at in range(3)]},
        cmc=CmcCurve([*ranks], [1 - 0.5 / skill / rank**0.6 for rank in ranks]),
        search=SearchCurve(np.geomspace(1e-3, 1, 40).tolist(), np.linspace(0.3, 1 - 0.4 / skill, 40).tolist()),
    )


def sample_report() -> Report:
    """Three models; pairs with an axis of ages, and identification with ranks, a search and groups without an order."""
    rng = np.random.default_rng(0)
    differences = [
        Difference(a, b, key, MeasuredValue(value, value - 0.02, value + 0.015, 600))
        for a, b, value in (("distilled", "alone", 0.06), ("distilled", "teacher", -0.01), ("alone", "teacher", -0.05))
        for key in ("accuracy", "tar_0.01", "auc")
    ]
    verification = ProtocolSummary(
        name="lfw",
        title="LFW pairs",
        question="Do two images show one identity?",
        convention={"Threshold": "grid of squared distances, chosen on the other nine folds"},
        counts={"genuine pairs": 600, "impostor pairs": 19593},
        notes=["395 pairs left out."],
        measures={
            "accuracy": Measure("Accuracy", note="ten folds"),
            "tar_0.01": Measure("TAR at FAR 1 %"),
            "tar_0.001": Measure("TAR at FAR 0.1 %"),
            "auc": Measure("AUC", "auc"),
        },
        bins={
            "fnmr": Bins(
                "FNMR at FMR 1 %", ["0-4", "5-9", "10-19", "20-29", "30+"], "age gap, years",
                [2, 7, 15, 25, 35], [100, 80, 60, 0, 20],
            )
        },
        models={name: _pairs(skill, rng) for name, skill in SKILL.items()},
        differences=differences,
        difference_rule="Paired bootstrap over identities, 500 resamples.",
        scores={"distilled": "scores/lfw-distilled.csv"},
    )  # fmt: skip
    identification = ProtocolSummary(
        name="ijbc",
        title="IJB-C 1:N",
        convention={"Pooling": "mean of a medium, sum over media"},
        measures={
            "rank1": Measure("Rank-1"),
            "tpir": Measure("TPIR at FPIR 1 %"),
            "slope": Measure("Slope of the genuine score", "score", "per year", "none"),
        },
        bins={"groups": Bins("Rank-1", ["adult-adult", "adult-young", "young-young"], counts=[9, 8, 7])},
        models={name: _identified(skill) for name, skill in SKILL.items()},
    )
    steps = [float(step) for step in range(0, 600, 5)]
    losses: list[float | None] = [20 * float(np.exp(-step / 140)) + 1 for step in steps]
    return Report(
        title="Distillation of a light student",
        models={
            name: ModelEntry(
                role="teacher" if name == "teacher" else "student",
                label=f"{name}.onnx",
                backbone="MobileFaceNet",
                input_size=112,
                parameters=24_000_000 if name == "teacher" else 1_003_136,
                macs=2.6e9 if name == "teacher" else 2.2e8,
                latency_ms=8.42,
                train_seconds=47.2,
                train_steps=600,
            )
            for name in SKILL
        },
        command="kdlib-faces demo --output runs/demo",
        created="2026-03-01T12:00:00+00:00",
        version="0.1.0",
        seeds=[0],
        config={"student": {"lr": 0.05, "fars": [0.01, 0.001]}},
        environment={"torch": "2.6.0"},
        data=DataSummary("SyntheticFaces", True, 6000, 500, 600, 60, ["12 pairs left out."]),
        evaluations=[verification, identification],
        pair=StudentPair("distilled", "alone"),
        training={
            "alone": TrainingCurve(steps, losses),
            "distilled": TrainingCurve(steps, losses, {"identity": losses, "embedding": losses}),
        },
        weights={"embedding": {"general": 0.41, "age": 0.59}},
    )
