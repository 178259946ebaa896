"""Configuration of the demo."""

import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from kdlib._checks import check_choice, check_number
from kdlib_faces._hardware import DTYPES, Amp
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig
from kdlib_faces.recipes.liaad import LIAADConfig
from kdlib_faces.recipes.start import StartConfig

__all__ = ["DemoConfig", "faces_config", "start_config", "unused_settings"]


def _age_teacher() -> AgeTeacherConfig:
    """DAL on the whole network with cross-age pairs, see `benchmarks/study_age_teacher_synthetic.py`."""
    return AgeTeacherConfig(
        trainable="all", freeze_batch_norm=False, identity_weight=1.0, margin_scale=32.0, margin=0.2, pair_weight=1.0,
        l2_sp_weight=0.0,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes and lengths of the demo.

    Attributes:
        size: Side of the images in pixels, synthetic and real.
        general_identities: Synthetic identities of the general set, whose images lie within `general_window` years.
        general_images: Images per identity of the general set.
        general_window: Range of ages of an identity in the general set, years.
        age_identities: Synthetic identities of the set with ages, whose images cover a lifetime.
        age_images: Images per identity of the set with ages.
        test_identities: Synthetic identities of the test set, in no training set.
        test_images: Images per identity of the test set.
        teacher_width: Factor on the channels of the teachers of the synthetic set.
        general_steps: Training steps of the general teacher.
        age_steps: Training steps of the age-invariant teacher, which starts from the general one.
        student_steps: Training steps of each student.
        batch_size: Images per step.
        lr: Learning rate of the students.
        teacher_lr: Learning rate of the general teacher; the age-invariant teacher has half of it.
        age_teacher: Recipe of the age-invariant teacher of the synthetic set.
        test_fraction: Share of the real identities with images of different ages that is kept for the test.
        replicates: Bootstrap resamples of the test identities for every interval.
        amp: Precision of the students' forward pass, `"none"`, `"bfloat16"` or `"float16"`.
        compile: Run the students through `torch.compile` in training.
        deployment: What the report states about the exported student: `"none"`, `"quick"`, or `"full"`, which also measures
            `torch.compile` and takes a minute longer.
        start: How students that start from a teacher are made; for real faces only.
        student: The recipe of the students; the demo sets its `num_identities`, `input_size` and `seed`.

    Raises:
        ValueError, TypeError: A value is out of range.

    Examples:
        >>> from kdlib_faces.config import load_config
        >>> config = load_config(DemoConfig, overrides=["student_steps=50", "student.embedding_dim=64"])
        >>> config.student_steps, config.student.embedding_dim, config.student.input_size
        (50, 64, 40)
    """

    size: int = 40
    general_identities: int = 400
    general_images: int = 12
    general_window: float = 8.0
    age_identities: int = 250
    age_images: int = 12
    test_identities: int = 160
    test_images: int = 8
    teacher_width: float = 0.25
    general_steps: int = 700
    age_steps: int = 600
    student_steps: int = 600
    batch_size: int = 64
    lr: float = 0.1
    teacher_lr: float = 0.1
    age_teacher: AgeTeacherConfig = field(default_factory=_age_teacher)
    test_fraction: float = 0.5
    replicates: int = 500
    amp: Amp = "none"
    compile: bool = False
    deployment: Literal["none", "quick", "full"] = "quick"
    start: StartConfig = field(default_factory=StartConfig)
    student: LIAADConfig = field(default_factory=lambda: LIAADConfig(embedding_dim=128, width=0.5, input_size=40))

    def __post_init__(self) -> None:
        check_number("DemoConfig", "size", self.size, min=16, max=512, integer=True)
        for part in ("general", "age", "test"):
            for name, high in ((f"{part}_identities", 1_000_000), (f"{part}_images", 10_000)):
                check_number("DemoConfig", name, getattr(self, name), min=2, max=high, integer=True)
            pixels = 3 * self.size**2 * getattr(self, f"{part}_identities") * getattr(self, f"{part}_images")
            check_number("DemoConfig", f"bytes of the {part} images", pixels, max=8 * 2**30)
        for name in ("general_steps", "age_steps", "student_steps"):
            check_number("DemoConfig", name, getattr(self, name), min=1, max=10**9, integer=True)
        check_number("DemoConfig", "batch_size", self.batch_size, min=1, max=65_536, integer=True)
        check_number("DemoConfig", "replicates", self.replicates, min=0, max=100_000, integer=True)
        check_number("DemoConfig", "test_fraction", self.test_fraction, above=0, max=0.9)
        check_choice("DemoConfig", "amp", self.amp, tuple(DTYPES))
        check_choice("DemoConfig", "deployment", self.deployment, ("none", "quick", "full"))


def faces_config() -> DemoConfig:
    """The defaults for real faces: larger images, embeddings of the teachers' dimension, longer training.

    Examples:
        >>> config = faces_config()
        >>> config.size, config.student.embedding_dim, config.student_steps
        (56, 512, 8000)
    """
    student = LIAADConfig(embedding_dim=512, width=0.5, input_size=56)
    full: Literal["quick", "full"] = "full" if _has_compiler() else "quick"
    return DemoConfig(size=56, student_steps=8000, lr=0.2, deployment=full, student=student)


def start_config(size: int) -> DemoConfig:
    """The defaults for students that start from a teacher on real faces: they learn the joint space of both teachers.

    The learning rate is the one that the study of starts chose; twice that rate gave a lower TAR at FAR 1 %.

    On a CPU with bfloat16 instructions and with a C++ compiler, the students are trained in bfloat16 through `torch.compile`.

    Args:
        size: Side of the images of the teacher, pixels.
    """
    fast = torch.cpu._is_avx512_bf16_supported() and _has_compiler()
    full: Literal["quick", "full"] = "full" if _has_compiler() else "quick"
    student = LIAADConfig(
        target="joint", identity_weight=0.0, map_weight=0.0, attention_weight=0.0, input_size=size
    )  # fmt: skip
    return DemoConfig(
        size=size, student_steps=6000, lr=1.2e-3, amp="bfloat16" if fast else "none", compile=fast, deployment=full,
        student=student,
    )  # fmt: skip


def _has_compiler() -> bool:
    """Whether `torch.compile` finds a C++ compiler and the headers of Python."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.exists()


def unused_settings(*, faces: bool, start: bool) -> Mapping[str, str]:
    """Settings that the demo does not read, each with the reason.

    Args:
        faces: Whether the faces are real.
        start: Whether the students start from a teacher.
    """
    student = {
        "input_size": "the students take images of `size` pixels",
        "num_identities": "the demo counts the identities",
        "all_labeled": "the demo reads lists with identities only",
        "seed": "the seed is that of --seed",
        "general_teacher": "the teachers are those of the demo",
        "age_teacher": "the teachers are those of the demo",
    }
    rest: dict[str, str] = {}
    if start:
        copy = "the student is a narrower copy of a teacher"
        joint = "a student that starts from a teacher learns the joint space of both"
        student |= dict.fromkeys(("backbone", "width", "embedding_dim"), copy)
        student |= dict.fromkeys(("target", "weighting", "temperature"), joint)
        rest["size"] = "the students take the images of the teacher that they start from"
    else:
        scratch = "a student from scratch learns the embedding of each teacher"
        student |= dict.fromkeys(("target", "joint_dim", "both_views", "age_map_weight"), scratch)
        rest["start"] = "the students start from scratch"
    if faces:
        made = ("general_identities", "general_images", "general_window", "age_identities", "age_images", "test_identities", "test_images")  # fmt: skip
        rest |= dict.fromkeys(made, "the faces are those of --faces")
        trained = ("teacher_width", "teacher_lr", "general_steps", "age_steps", "age_teacher")
        rest |= dict.fromkeys(trained, "the teachers are those of --teacher")
    else:
        rest["test_fraction"] = "the synthetic test set has identities of its own"
    return {**rest, **{f"student.{name}": reason for name, reason in student.items()}}
