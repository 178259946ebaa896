"""Settings and options of training runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from kdlib._checks import check_choice, check_number, check_type
from kdlib_faces._hardware import DTYPES, Amp, Hardware
from kdlib_faces.data.views import AugmentConfig
from kdlib_faces.teachers.input_options import InputOptions

__all__ = ["RunConfig", "RunOptions", "TrainingConfig"]

Sampler: TypeAlias = Literal["auto", "shuffled", "balanced", "cross_age"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, learning rate, batches, precision and checkpoints of a training run.

    Attributes:
        steps: Number of weight updates; None takes 10,000, or 200 when a pretrained network is fine-tuned.
        lr: Peak learning rate; None takes 0.1 (SGD), or 0.0005 (AdamW) for fine-tuning.
        batch_size: Images per batch of all processes together. With cross-age pairs these are 4 images of each identity.
        sampler: `"shuffled"` images, `"balanced"` identities with several images of each, `"cross_age"` pairs of images of
            different ages; `"auto"` balances the identities for a loss of cross-age pairs, and shuffles otherwise.
        accumulate: Batches per step, whose gradients are averaged.
        clip_norm: Maximum L2 norm of the gradient; None does not clip.
        ema_decay: Decay of a running mean of the weights, which is then the result; None keeps no mean.
        amp: Precision of the forward pass: `"none"`, `"bfloat16"`, or `"float16"` with loss scaling.
        compile: Run the networks through `torch.compile`, which takes half a minute at the start.
        channels_last: Store images and kernels with channels last, which is faster on most devices.
        sync_batch_norm: BatchNorm uses the images of all processes, so that a run does not depend on their number.
        keep: Number of newest checkpoints that are kept.
        checkpoint_seconds: Seconds between checkpoints.

    Raises:
        ValueError, TypeError: A value is out of range.

    Examples:
        >>> TrainingConfig(batch_size=256, accumulate=4, amp="bfloat16").clip_norm
        5.0
        >>> TrainingConfig(amp="half")
        Traceback (most recent call last):
        ValueError: TrainingConfig: amp must be one of 'none', 'bfloat16', 'float16', got 'half'
    """

    steps: int | None = None
    lr: float | None = None
    batch_size: int = 64
    sampler: Sampler = "auto"
    accumulate: int = 1
    clip_norm: float | None = 5.0
    ema_decay: float | None = None
    amp: Amp = "none"
    compile: bool = False
    channels_last: bool = True
    sync_batch_norm: bool = True
    keep: int = 2
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        owner = "TrainingConfig"
        if self.steps is not None:
            check_number(owner, "steps", self.steps, min=1, integer=True)
        for name in ("lr", "clip_norm"):
            if getattr(self, name) is not None:
                check_number(owner, name, getattr(self, name), above=0)
        check_number(owner, "batch_size", self.batch_size, min=2, integer=True)
        if self.ema_decay is not None:
            check_number(owner, "ema_decay", self.ema_decay, min=0, max=1)
        for name in ("accumulate", "keep"):
            check_number(owner, name, getattr(self, name), min=1, integer=True)
        check_number(owner, "checkpoint_seconds", self.checkpoint_seconds, above=0)
        check_choice(owner, "amp", self.amp, tuple(DTYPES))
        check_choice(owner, "sampler", self.sampler, get_args(Sampler))
        for name in ("compile", "channels_last", "sync_batch_norm"):
            check_type(owner, name, getattr(self, name), bool, "true or false")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every recipe has; each recipe adds its own.

    Attributes:
        training: Length, learning rate, batches, precision and checkpoints.
        augment: Views of the training images. Caches of random views replace them.

    Examples:
        >>> from kdlib_faces.config import load_config
        >>> config = load_config(RunConfig, overrides=["training.steps=100", "training.sampler=balanced"])
        >>> config.training.steps, config.training.sampler
        (100, 'balanced')
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Inputs and outputs of a training run.

    Attributes:
        output: Folder of the run.
        data: Training images, entries of `read_faces`.
        teachers: Files of the teachers, in the order of the recipe.
        inputs: Input options of each teacher; empty for those that their files imply.
        seed: Seed of weights, order and views.
        progress: Show progress.
        on_error: What to do about images that cannot be read: `"stop"`, or `"skip"` with a warning; see `FaceBatches`.
        start: `"scratch"`, or `"shrink:FILE"` for a student that starts as a narrower copy of a teacher.
        hardware: Device of the networks, and the processes that share the batches.
        workers: Processes that decode and augment images ahead of the training; None for none where the images fit in
            memory, and otherwise up to 4.
        tensorboard: Write losses and speed to `OUTPUT/tensorboard`.
        expected: Fingerprints of lists and teachers, by name, of the run that is repeated; empty for a run of its own.

    Examples:
        >>> options = RunOptions(output=Path("runs/student"), data=["faces.csv"], seed=1)
        >>> options.start, options.on_error, options.hardware.device
        ('scratch', 'stop', device(type='cpu'))
    """

    output: Path
    data: Sequence[str]
    teachers: Sequence[str] = ()
    inputs: Sequence[InputOptions] = ()
    seed: int = 0
    progress: bool = True
    on_error: Literal["stop", "skip"] = "stop"
    start: str = "scratch"
    hardware: Hardware = field(default_factory=Hardware)
    workers: int | None = None
    tensorboard: bool = False
    expected: Mapping[str, str] = field(default_factory=dict)
