"""Settings of the LIAAD-style recipe."""

from dataclasses import dataclass, field
from typing import Literal

from kdlib._checks import check_choice, check_number
from kdlib_faces.recipes.start import StartConfig
from kdlib_faces.recipes.student import StudentConfig
from kdlib_faces.training import RunConfig

__all__ = ["AGE", "GENERAL", "JOINT", "LIAADConfig", "LIAADRunConfig", "LIAADSettings", "features_read"]

GENERAL, AGE, JOINT = "general", "age", "joint"

AngularForm = Literal["squared", "cosine", "chord", "angle"]


@dataclass(frozen=True, kw_only=True)
class LIAADSettings(StudentConfig):
    """The terms of the LIAAD-style recipe, and the student that they train.

        L = w_id   * margin softmax(f_S, y)                         identity, from labels
          + w_emb  * mean_i sum_k a_ki * ang(f_S, f_Tk)             angular distillation of both embeddings
          + w_map  * mean_i ang(G(F_S), F_T1)                       angular distillation of the general teacher's map
          + w_att  * mean_i ||A(F_S) - A(F_T2)||^2                  attention transfer from the age-invariant teacher

    `f` are embeddings and `F` maps of a middle stage; `ang` is `1 - cos`, `(1 - cos)^2`, the squared chord or the angle; `A` is
    the unit-norm activation map; `G` a 1x1 convolution with BatchNorm on the student's side; `a_ki` the weight of teacher k for
    sample i. Ages are not used: only the age-invariant teacher was trained with them. The published abstract
    (arXiv 2004.05085) names the two teachers and the attentive and angular distillation. Which layer, which transform and
    all numbers here are our definition, since its equations are not public.

    Attributes:
        identity_weight: w_id.
        target: Embeddings that the student learns: `"each"` teacher's own, or the `"joint"` space of both, to which an age
            map brings them (`kdlib_faces.teachers.fit_joint_space`).
        joint_dim: Dimensions of the joint space, and so of the student's embedding.
        both_views: The joint target of an image is the sum over the image and its mirror image, in place of the embedding of
            the one that the student sees.
        age_map_weight: Weight of the distance of the joint space's age map from the identity matrix; 0 fits no map.
        embedding_weight: w_emb; 0 removes the term, as for the next two weights.
        embedding_form: Form of `ang` at the embedding: `"cosine"`, `"squared"`, `"chord"` or `"angle"`.
        embedding_projection: `"none"` where student and teachers share one space, `"linear"` for a learned map to each.
        map_weight: w_map.
        map_form: Form of `ang` at the middle stage.
        attention_weight: w_att.
        stage: Number of the middle stage, 0 to 3.
        weighting: `"uniform"`, or `"center"`: by the cosine of each teacher to its own center of the sample's identity.
        temperature: Temperature of the `"center"` weighting.

    Raises:
        ValueError, TypeError: A value is out of range.
    """

    identity_weight: float = 1.0
    target: Literal["each", "joint"] = "each"
    joint_dim: int = 256
    both_views: bool = False
    age_map_weight: float = 100.0
    embedding_weight: float = 40.0
    embedding_form: AngularForm = "cosine"
    embedding_projection: str = "none"
    map_weight: float = 2.0
    map_form: AngularForm = "cosine"
    attention_weight: float = 2.0
    stage: int = 2
    weighting: str = "center"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        for name in ("identity_weight", "embedding_weight", "map_weight", "attention_weight", "age_map_weight"):
            check_number(owner, name, getattr(self, name), min=0)
        check_number(owner, "temperature", self.temperature, above=0)
        check_number(owner, "stage", self.stage, min=0, max=3, integer=True)
        check_number(owner, "joint_dim", self.joint_dim, min=1, max=65_536, integer=True)
        check_choice(owner, "target", self.target, ("each", "joint"))
        check_choice(owner, "weighting", self.weighting, ("uniform", "center"))
        check_choice(owner, "embedding_projection", self.embedding_projection, ("none", "linear"))
        for name in ("embedding_form", "map_form"):
            check_choice(owner, name, getattr(self, name), ("cosine", "squared", "chord", "angle"))


@dataclass(frozen=True, kw_only=True)
class LIAADConfig(LIAADSettings):
    """Configuration of the LIAAD-style recipe: its settings, and what a run takes from its lists and options.

    Attributes:
        num_identities: Identities of the student's training images.
        all_labeled: Whether the identity of every training image is known.
        general_teacher: A checkpoint or `.onnx` file, or the name of a backbone for an untrained teacher (dry runs).
        age_teacher: Likewise.
        seed: Seed of the initial weights.

    Raises:
        ValueError, TypeError: A value is out of range.

    Examples:
        >>> config = LIAADConfig(num_identities=500, embedding_weight=20.0, attention_weight=0.0)
        >>> config.backbone, config.embedding_weight
        ('mobilefacenet', 20.0)
        >>> LIAADConfig(weighting="gate")
        Traceback (most recent call last):
        ValueError: LIAADConfig: weighting must be one of 'uniform', 'center', got 'gate'
    """

    num_identities: int = 1000
    all_labeled: bool = True
    general_teacher: str = "iresnet18"
    age_teacher: str = "iresnet18"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("LIAADConfig", "num_identities", self.num_identities, min=1, max=10**9, integer=True)
        check_number("LIAADConfig", "seed", self.seed, min=0, integer=True)


@dataclass(frozen=True, kw_only=True)
class LIAADRunConfig(RunConfig):
    """Settings of `kdlib-faces train --recipe liaad`.

    Attributes:
        recipe: The recipe.
        start: Settings of a student that starts as a narrower copy of a teacher, for `--start shrink:FILE`.
    """

    recipe: LIAADSettings = field(default_factory=LIAADSettings)
    start: StartConfig = field(default_factory=StartConfig)


def features_read(config: LIAADConfig) -> dict[str, dict[str, str]]:
    """Return the features of each teacher that the active terms read, each with the setting that removes its term.

    Examples:
        >>> features_read(LIAADConfig(attention_weight=0.0))["age"]
        {'embedding': 'recipe.embedding_weight'}
    """
    weights = {GENERAL: ("embedding_weight", "map_weight"), AGE: ("embedding_weight", "attention_weight")}
    return {
        role: {
            feature: f"recipe.{name}"
            for feature, name in zip(("embedding", "map"), names, strict=True)
            if getattr(config, name)
        }
        for role, names in weights.items()
    }
