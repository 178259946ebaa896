"""Numbers and layouts in the arguments of losses, weightings and metrics: what is accepted ends where the error says."""

import re
from inspect import Parameter, signature
from typing import Any

import pytest
import torch

import kdlib.evaluation
import kdlib.functional
import kdlib.losses
import kdlib.weighting

WHOLE, ABOVE, FROM = "a whole number and >= 1", "a finite number and > 0", "a finite number and >= 0"
SEED, CHUNK, OPEN = "a whole number and >= 0", "a whole number and >= 1", "a finite number and > 0 and < 1"
ANY = "a whole number"
NUMBERS: dict[str, dict[str, str]] = {
    "ActivationBoundaryLoss": {"margin": FROM},
    "AttentionTransferLoss": {
        "p": "a finite number and >= 1", "prefix_tokens": SEED, "student_prefix_tokens": SEED,
        "teacher_prefix_tokens": SEED,
    },
    "AttentiveSimilarityLoss": {"channel": FROM, "spatial": FROM},
    "CenterConfidenceWeighting": {
        "num_identities": WHOLE, "temperature": ABOVE, "momentum": "a finite number and >= 0 and <= 1",
    },
    "ContrastiveRepresentationLoss": {
        "student_dim": WHOLE, "teacher_dim": WHOLE, "feature_dim": WHOLE, "temperature": ABOVE, "queue_size": SEED,
    },
    "CorrelationCongruenceLoss": {"gamma": ABOVE, "order": WHOLE},
    "DISTLoss": {"beta": FROM, "gamma": FROM, "temperature": ABOVE, "dim": ANY},
    "DarkRankLoss": {"alpha": ABOVE, "beta": ABOVE, "length": "a whole number and >= 2"},
    "DecoupledKDLoss": {"alpha": FROM, "beta": FROM, "temperature": ABOVE, "dim": ANY},
    "FactorTransferLoss": {"student_channels": WHOLE, "teacher_channels": WHOLE, "rate": ABOVE, "p": "1 or 2"},
    "GateWeighting": {
        "student_dim": WHOLE, "num_teachers": WHOLE, "hidden": WHOLE, "temperature": ABOVE,
        "floor": "a finite number and >= 0 and <= 0.5",
    },
    "GradientWeighting": {"max_weight": "a finite number and > 0 and <= 1"},
    "LinearSoftTargetLoss": {"temperature": ABOVE, "skew": OPEN, "chunk_size": CHUNK},
    "LogSumLoss": {"exponent": "a finite number and >= 1 and <= 8"},
    "MaskedGenerativeLoss": {
        "student_channels": WHOLE, "teacher_channels": WHOLE, "mask_ratio": "a finite number and >= 0 and < 1",
        "seed": SEED,
    },
    "OverhaulLoss": {"margin": "a finite number and <= 0"},
    "Paraphraser": {"channels": WHOLE, "rate": ABOVE},
    "RKDAngleLoss": {"chunk_size": CHUNK},
    "RKDDistanceLoss": {"chunk_size": CHUNK},
    "ReviewKDLoss": {"hidden": WHOLE},
    "SemCKDLoss": {"query_dim": WHOLE, "batch_size": WHOLE},
    "SoftTargetLoss": {"temperature": ABOVE, "skew": OPEN, "dim": ANY},
    "UncertaintyWeighting": {"num_teachers": WHOLE},
    "VariationalInformationLoss": {
        "student_channels": WHOLE, "teacher_channels": WHOLE, "hidden": WHOLE,
        "initial_variance": "a finite number and > 1e-05", "min_variance": ABOVE,
    },
    "activation_boundary": {"margin": FROM},
    "attention_map": {"p": "a finite number and >= 1"},
    "attention_transfer": {"p": "a finite number and >= 1"},
    "attentive_similarity": {"channel": FROM, "spatial": FROM},
    "calibration_error": {"bins": WHOLE},
    "contrastive_representation": {"temperature": ABOVE},
    "correlation_congruence": {"gamma": ABOVE, "order": WHOLE},
    "dark_rank": {"alpha": ABOVE, "beta": ABOVE, "length": "a whole number and >= 2"},
    "decoupled_kd": {"alpha": FROM, "beta": FROM, "temperature": ABOVE, "dim": ANY},
    "dist": {"beta": FROM, "gamma": FROM, "temperature": ABOVE, "dim": ANY},
    "factor_transfer": {"p": "1 or 2"},
    "linear_soft_target": {"temperature": ABOVE, "skew": OPEN, "chunk_size": CHUNK},
    "log_sum": {"exponent": "a finite number and >= 1 and <= 8"},
    "overhaul": {"margin": "a finite number and <= 0"},
    "rkd_angle": {"chunk_size": CHUNK},
    "rkd_distance": {"chunk_size": CHUNK},
    "soft_target": {"temperature": ABOVE, "skew": OPEN, "dim": ANY},
    "variational_information": {"variance": ABOVE},
}  # fmt: skip
TOKENS = {"prefix_tokens", "student_prefix_tokens", "teacher_prefix_tokens"}  # limited by the shape: see `test_layouts`
REQUIRED: dict[str, Any] = {
    "student_dim": 3, "teacher_dim": 3, "student_channels": 3, "teacher_channels": 3, "channels": 3, "num_teachers": 2,
    "num_identities": 3, "margin": -0.5, "weights": (1, 1), "norm": torch.nn.BatchNorm2d(3),
    "target": torch.arange(4) % 3,
    **dict.fromkeys(("student", "teacher", "features", "mean", "logits"), torch.ones(4, 3, 2, 2)),
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("calibration_error", "contrastive_representation", "decoupled_kd", "linear_soft_target", "soft_target"), (4, 3)
)
LISTS = {"ReviewKDLoss", "SemCKDLoss"}
PACKAGES = (kdlib.functional, kdlib.losses, kdlib.weighting, kdlib.evaluation)
COMPONENTS = {name: getattr(package, name) for package in PACKAGES for name in package.__all__}


def call(owner: str, **given: Any) -> Any:
    """Call a component with valid arguments where none are given."""
    arguments = {}
    for name, parameter in signature(COMPONENTS[owner]).parameters.items():
        if parameter.default is Parameter.empty and parameter.kind is not Parameter.VAR_KEYWORD:
            needed = REQUIRED.get(name, torch.ones(4, 3))
            wide = isinstance(needed, torch.Tensor) and needed.dim() == 4 and owner in SHAPES
            needed = torch.ones(SHAPES[owner]) if wide else needed
            arguments[name] = (needed,) if owner in LISTS else needed
    return COMPONENTS[owner](**{**arguments, **given})


def numbers_of(owner: str) -> set[str]:
    found = signature(COMPONENTS[owner]).parameters.values()
    kinds = {each.name: re.findall(r"\b(?:int|float)\b", str(each.annotation)) for each in found}
    lists = {each.name for each in found if "Sequence" in str(each.annotation)}
    return {name for name, kind in kinds.items() if kind and name not in lists}


def test_every_number_has_a_row() -> None:
    found = {owner: numbers_of(owner) for owner in COMPONENTS if owner not in LISTS}
    found = {owner: numbers - (TOKENS if owner.islower() else set()) for owner, numbers in found.items()}
    rows = {owner: set(numbers) for owner, numbers in NUMBERS.items() if owner not in LISTS}
    assert {owner: numbers for owner, numbers in found.items() if numbers} == rows


@pytest.mark.parametrize(("owner", "name", "wanted"), [(o, n, w) for o, row in NUMBERS.items() for n, w in row.items()])
def test_numbers_are_accepted_up_to_their_limits(owner: str, name: str, wanted: str) -> None:
    whole = wanted.startswith("a whole")
    step = 1 if whole else 1e-6
    wrong: list[Any] = [
        "1",
        float("nan"),
        float("inf"),
        True if wanted != "1 or 2" else 3,
        [2],
        *([1.5] if whole else []),
    ]
    right: list[Any] = [1, 2] if wanted == "1 or 2" else []
    for sign, text in re.findall(r"([<>]=?) ([-\d.e]+)", wanted):
        limit = int(text) if whole else float(text)
        inside, outside = (limit + step, limit - step) if sign[0] == ">" else (limit - step, limit + step)
        wrong += [outside, *([limit] if len(sign) == 1 else [])]
        right += [inside, *([limit] if len(sign) == 2 else [])]
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"^{owner}: {name} must be {re.escape(wanted)}.*, got "):
            call(owner, **{name: value})
    for value in right:
        other = {"spatial": 1.0} if name == "channel" else {"channel": 1.0} if name == "spatial" else {}
        call(owner, **{name: value, **other})


LAYOUTS = [
    (owner, name)
    for owner in [*kdlib.functional.__all__, *kdlib.losses.__all__]
    for name in signature(COMPONENTS[owner]).parameters
    if name.endswith("layout")
]


@pytest.mark.parametrize(("owner", "name"), LAYOUTS)
def test_layouts_are_one_of_those_stated(owner: str, name: str) -> None:
    names = f"(student_|teacher_)?{name}"  # one layout of both sides is that of the first
    with pytest.raises(ValueError, match=rf"^{owner}: {names} must be one of 'bchw', 'bhwc'.*, got 'chwb'"):
        call(owner, **{name: "chwb"})
    call(owner, **{name: "bchw"})


@pytest.mark.parametrize("owner", sorted(set(kdlib.functional.__all__) | set(kdlib.losses.__all__)))
def test_choices_are_those_stated(owner: str) -> None:
    choices = {"reduction", "divergence", "form", "mask"} & set(signature(COMPONENTS[owner]).parameters)
    for name in choices - ({"mask"} if owner.islower() else set()):
        with pytest.raises(ValueError, match=rf"^{owner}: {name} must be .*, got 'other'"):
            call(owner, **{name: "other"})
        with pytest.raises((TypeError, ValueError), match=rf"^{owner}: {name} must be .*, got 1"):
            call(owner, **{name: 1})


FLAGS = [
    (owner, name)
    for owner in [*kdlib.losses.__all__, *kdlib.weighting.__all__]
    for name, parameter in signature(COMPONENTS[owner]).parameters.items()
    if isinstance(parameter.default, bool)
]


@pytest.mark.parametrize(("owner", "name"), FLAGS)
def test_flags_are_stored_and_shown(owner: str, name: str) -> None:
    default = signature(COMPONENTS[owner]).parameters[name].default
    for value in (default, not default):
        made = call(owner, **{name: value})
        assert getattr(made, name) is value
        assert (f"{name}={value}" in repr(made)) == (f"{name}=" in repr(made))
        assert (repr(made) == repr(call(owner))) == (value is default)


@pytest.mark.parametrize("owner", [name for name in NUMBERS if name[0].isupper()])
def test_arguments_are_stored_and_shown(owner: str) -> None:
    values = {
        "p": 2 if owner == "FactorTransferLoss" else 3,
        "min_variance": 0.5,
        "dim": -1,
        "mask_ratio": 0.25,
        "max_weight": 0.75,
        "momentum": 0.75,
        "skew": 0.75,
        "floor": 0.25,
    }
    for name in NUMBERS[owner]:
        value = -0.75 if name == "margin" and owner == "OverhaulLoss" else values.get(name, 7)
        made = call(owner, **{name: value})
        assert getattr(made, name) == value
        assert repr(made) != repr(call(owner))
        again = eval(repr(made), COMPONENTS)
        assert repr(again) == repr(made)
        assert getattr(again, name) == value
