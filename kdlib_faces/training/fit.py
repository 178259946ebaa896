"""Training of a distiller on face batches, with checkpoints, a log and a progress bar."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

import torch
from torch import Tensor

from kdlib import TrainConfig, train
from kdlib.distiller import Distiller
from kdlib.training import read_log
from kdlib_faces.progress import TrainProgress, say
from kdlib_faces.training.settings import TrainingConfig
from kdlib_faces.training.speed import SpeedAdvice, write_tensorboard

__all__ = ["Batches", "FitResult", "LossCurve", "Optimizer", "fit"]

DEFAULTS = TrainingConfig()
Optimizer: TypeAlias = Literal["sgd", "adamw"]

Batches: TypeAlias = Iterable[tuple[Tensor, Mapping[str, Tensor]]]
"""Batches `(images, targets)`, such as `FaceBatches`."""


class LossCurve(TypedDict):
    """Losses of the logged steps.

    Attributes:
        step: Number of each logged step.
        loss: Weighted total at each of them.
        terms: Name of a term to its values without weight; None for a value that is not finite.
    """

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
    settings: TrainingConfig = DEFAULTS,
    optimizer: Optimizer = "sgd",
    prepare_optimizer: Callable[[torch.optim.Optimizer], None] | None = None,
    device: torch.device | None = None,
    tensorboard: bool = False,
    workers: int = 0,
) -> FitResult:
    """Train a distiller in place and resume from the newest checkpoint in `folder` if there is one.

    With `settings.ema_decay`, the student has the averaged weights afterwards. The last line of output names what limits the
    speed and what to change.

    Args:
        distiller: Student, teachers and objective.
        batches: The training batches.
        folder: Folder of the run. It receives `checkpoints/` and `log.jsonl`.
        steps: Number of weight updates.
        lr: Peak learning rate of a cosine schedule.
        seed: Seed of dropout and of inferred projections.
        label: Text of the progress bar.
        quiet: Show no progress.
        settings: Gradient, precision and checkpoints; `steps` and `lr` take the place of its own.
        optimizer: `"sgd"` for training from scratch: weight decay 5e-4, warm-up over a tenth of the steps, at most 50.
            `"adamw"` for fine-tuning: no weight decay, since L2-SP regularization takes its place, and warm-up over a
            twentieth of the steps.
        prepare_optimizer: Called with the optimizer when it is created.
        device: Device to train on; None for that of the student.
        tensorboard: Write losses and speed to `folder/tensorboard`.
        workers: Number of workers of the loader, for the advice.

    Returns:
        The loss curve and the duration.

    Examples:
        >>> import tempfile
        >>> from kdlib_faces.recipes.student import StudentConfig, build_student
        >>> config = StudentConfig(embedding_dim=16, width=0.25, input_size=32)
        >>> distiller = build_student(config, config.build(seed=0), num_identities=2)
        >>> batches = [(torch.randn(2, 3, 32, 32), {"identity": torch.tensor([0, 1])})]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = fit(distiller, batches, Path(folder), steps=2, lr=0.1, seed=0, label="student", quiet=True)
        >>> result.curve["step"], list(result.curve["terms"])
        ([1, 2], ['identity'])
    """
    fine_tuning = optimizer == "adamw"

    def prepared(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        created = torch.optim.AdamW(groups) if fine_tuning else torch.optim.SGD(groups, momentum=0.9)
        if prepare_optimizer is not None:
            prepare_optimizer(created)
        return created

    config = TrainConfig(
        max_steps=steps,
        lr=lr,
        optimizer=optimizer if prepare_optimizer is None else prepared,
        weight_decay=0.0 if fine_tuning else 5e-4,
        warmup_steps=max(1, steps // 20) if fine_tuning else min(50, max(1, steps // 10)),
        accumulate=settings.accumulate,
        clip_norm=settings.clip_norm,
        ema_decay=settings.ema_decay,
        amp=None if settings.amp == "none" else settings.amp,
        channels_last=settings.channels_last,
        compile=settings.compile,
        sync_batch_norm=settings.sync_batch_norm,
        seed=seed,
        device=device,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_every_seconds=settings.checkpoint_seconds,
        keep=settings.keep,
        log_path=folder / "log.jsonl",
        log_every=max(1, steps // 100),
    )
    advice = SpeedAdvice(distiller, settings, workers)
    written = write_tensorboard(folder / "tensorboard" if tensorboard else None)
    with closing(TrainProgress(label, quiet=quiet)) as progress, advice, written as write:
        result = train(distiller, batches, config, hooks=[progress, advice, write])
    say(advice.text, quiet=quiet or not advice.text)
    if result.ema is not None:
        distiller.student.load_state_dict(result.ema)
    log = folder / "log.jsonl"
    rows = read_log(log) if log.exists() else []  # the log of a finished run may have been removed
    curve = LossCurve(
        step=[row["step"] for row in rows],
        loss=[row["total"] for row in rows],
        terms={name: [row["terms"][name] for row in rows] for name in (rows[0]["terms"] if rows else ())},
    )
    return FitResult(curve, result.seconds)
