"""Training of a distiller on face batches, with checkpoints, a log and a progress bar."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypedDict

from torch import Tensor

from kdlib import TrainConfig, train
from kdlib.distiller import Distiller
from kdlib.training import read_log
from kdlib_faces.progress import TrainProgress

__all__ = ["Amp", "Batches", "FitResult", "LossCurve", "Optimizer", "fit"]

Amp: TypeAlias = Literal["none", "bfloat16"]
"""Precision of the forward pass: float32, or autocast to bfloat16."""

Optimizer: TypeAlias = Literal["sgd", "adamw"]

Batches: TypeAlias = Iterable[tuple[Tensor, Mapping[str, Tensor]]]
"""Batches `(images, targets)`, such as `FaceBatches`."""


class LossCurve(TypedDict):
    """Losses of the logged steps; `loss` is the weighted total and `terms` holds the unweighted terms."""

    step: list[int]
    loss: list[float]
    terms: dict[str, list[float | None]]


@dataclass(frozen=True)
class FitResult:
    """Loss curve and duration of a training run, both including the time before an interruption.

    Attributes:
        curve: The losses of the logged steps.
        seconds: Duration in seconds.
    """

    curve: LossCurve
    seconds: float


def fit(
    distiller: Distiller,
    batches: Batches,
    folder: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    label: str,
    quiet: bool,
    amp: Amp = "none",
    compile: bool = False,
    optimizer: Optimizer = "sgd",
) -> FitResult:
    """Train a distiller in place and resume from the newest checkpoint in `folder` if there is one.

    Args:
        distiller: Student, teachers and objective.
        batches: The training batches.
        folder: Folder of the run. It receives `checkpoints/` and `log.jsonl`.
        steps: Number of weight updates.
        lr: Peak learning rate of a cosine schedule.
        seed: Seed of dropout and of inferred projections.
        label: Text of the progress bar.
        quiet: Show no progress.
        amp: Precision of the forward pass.
        compile: Run the networks through `torch.compile`.
        optimizer: `"sgd"` for training from scratch: weight decay 5e-4, warm-up over a tenth of the steps, at most 50.
            `"adamw"` for fine-tuning: no weight decay, since L2-SP regularization takes its place, and warm-up over a
            twentieth of the steps.

    Returns:
        The loss curve and the duration.
    """
    fine_tuning = optimizer == "adamw"
    config = TrainConfig(
        max_steps=steps,
        lr=lr,
        optimizer=optimizer,
        weight_decay=0.0 if fine_tuning else 5e-4,
        warmup_steps=max(1, steps // 20) if fine_tuning else min(50, max(1, steps // 10)),
        clip_norm=5.0,
        amp=None if amp == "none" else amp,
        channels_last=True,
        compile=compile,
        seed=seed,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every_seconds=60.0,
        log_path=folder / "log.jsonl",
        log_every=max(1, steps // 100),
    )
    progress = TrainProgress(label, quiet=quiet)
    try:
        result = train(distiller, batches, config, hooks=[progress])
    finally:
        progress.close()
    log = folder / "log.jsonl"
    rows = read_log(log) if log.exists() else []  # the log of a finished run may have been removed
    curve = LossCurve(
        step=[row["step"] for row in rows],
        loss=[row["total"] for row in rows],
        terms={name: [row["terms"][name] for row in rows] for name in (rows[0]["terms"] if rows else ())},
    )
    return FitResult(curve, result.seconds)
