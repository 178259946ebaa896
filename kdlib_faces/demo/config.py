"""Configuration of the demo."""

from dataclasses import dataclass, field

from kdlib._checks import check_choice, check_number
from kdlib_faces._hardware import DTYPES, Amp
from kdlib_faces.recipes.age_teacher import AgeTeacherConfig
from kdlib_faces.recipes.liaad import LIAADConfig

__all__ = ["DemoConfig", "faces_config"]


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
        student: The recipe of the students; the demo sets its `num_identities`, `input_size` and `seed`.

    Raises:
        ValueError, TypeError: A value is out of range.
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


def faces_config() -> DemoConfig:
    """The defaults for real faces: larger images, embeddings of the teachers' dimension, longer training."""
    student = LIAADConfig(embedding_dim=512, width=0.5, input_size=56)
    return DemoConfig(size=56, student_steps=8000, lr=0.2, student=student)
