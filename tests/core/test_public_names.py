"""The public names and signatures as text, so that a commit shows every change of the public interface.

After an intended change, `python tests/core/test_public_names.py` rewrites `public_names.txt`.
"""

import importlib
import inspect
import pickle
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdlib
from kdlib import OUTPUT, FixedWeighting, HintLoss, SoftTargetLoss, Term
from kdlib._checks import check_number

PACKAGES = [
    "kdlib", "kdlib.functional", "kdlib.adapters", "kdlib.cache", "kdlib.projections", "kdlib.losses",
    "kdlib.weighting", "kdlib.objective", "kdlib.influence", "kdlib.distiller", "kdlib.online", "kdlib.training", "kdlib.evaluation",
    "kdlib.testing", "kdlib.types", "kdlib.schedules", "kdlib.compression", "kdlib_faces.data", "kdlib_faces.backbones", "kdlib_faces.heads", "kdlib_faces.losses",
    "kdlib_faces.teachers", "kdlib_faces.evaluation", "kdlib_faces.report", "kdlib_faces.recipes",
]  # fmt: skip
FILE = Path(__file__).with_name("public_names.txt")


def describe(name: str, value: object) -> str:
    """Return the name, with parameters and defaults if it is callable; mypy checks the types."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return name
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return name + re.sub(r"<(\w+)[^<>]*>", r"<\1>", text)


def methods(value: type) -> list[str]:
    """Return the public methods of a class that have a default other than None; subclasses do not repeat them."""
    members = {name: getattr(value, name) for name in sorted(vars(value)) if not name.startswith("_")}
    own = {name: member for name, member in members.items() if inspect.isroutine(member)}
    lines = [describe(f"{value.__name__}.{name}", inspect.unwrap(member)) for name, member in own.items()]
    return [line for line in lines if re.search(r"=(?!None\b)", line)]


def listing() -> str:
    lines, seen = [], set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        names = sorted(name for name in module.__all__ if name != "__version__")
        for name in names:
            value = getattr(module, name)
            lines.append(f"{package}.{describe(name, value)}")
            if inspect.isclass(value) and value not in seen:
                seen.add(value)
                lines += [f"{package}.{line}" for line in methods(value)]
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_agree_with_the_file() -> None:
    assert listing() == FILE.read_text("utf-8")


def test_training_and_caches_are_imported_when_they_are_used() -> None:
    code = (
        "import sys, kdlib; late = ('kdlib.cache', 'kdlib.training', 'torch._dynamo'); "
        "assert not {*late} & {*sys.modules}, sys.modules; "
        "assert kdlib.train is kdlib.training.train; assert kdlib.TeacherCache.__module__ == 'kdlib.cache.store'; "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


CORE = [package for package in PACKAGES if package.split(".")[0] == "kdlib"]


@pytest.mark.parametrize("package", CORE)
def test_a_wrong_keyword_names_the_nearest_argument(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or (inspect.isclass(value) and inspect.isfunction(value.__init__)):
            assert value is pickle.loads(pickle.dumps(value))
            parameters = inspect.signature(value).parameters.values()
            if any(each.kind.name == "VAR_KEYWORD" for each in parameters):
                continue  # a Protocol
            for each in (each for each in parameters if each.kind.name.endswith(("KEYWORD", "KEYWORD_ONLY"))):
                with pytest.raises(TypeError, match=rf"^{name}: no argument named '{each.name}x'; the nearest are '"):
                    value(**{f"{each.name}x": 1})


def test_a_short_keyword_is_completed_and_numbers_of_numpy_become_plain() -> None:
    with pytest.raises(TypeError, match=r"^SoftTargetLoss: no argument named 'T'; the nearest are 'temperature'$"):
        SoftTargetLoss(T=4)  # type: ignore[call-arg]
    for four in (np.float32(4), np.int8(4), np.array(4.0)):
        assert SoftTargetLoss(temperature=four).temperature == 4
        assert type(SoftTargetLoss(temperature=four).temperature) in (int, float)


NUMBERS = [
    3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3),
    3.0, np.float16(3), np.array(3.0), torch.tensor(3.0), Fraction(3),
]  # fmt: skip
OTHERS = [
    True, np.True_, np.array(True), torch.tensor(True), "3", None, 3j, Decimal(3),
    np.nan, np.float32("inf"), torch.tensor(torch.inf), [3], np.array([3]), torch.tensor([3]),
]  # fmt: skip


@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_of_every_library_are_numbers(value: Any) -> None:
    number = check_number("f", "x", value, above=2, max=3)
    assert type(number) in (int, float)
    assert number == 3
    with pytest.raises(ValueError, match="f: x must be a finite number and > 3, got "):
        check_number("f", "x", value, above=3)
    if isinstance(number, int):
        assert type(check_number("f", "x", value, integer=True)) is int
    else:
        with pytest.raises(TypeError, match="f: x must be a whole number, got "):
            check_number("f", "x", value, integer=True)


@pytest.mark.parametrize("value", OTHERS)
def test_other_values_are_no_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="f: x must be a finite number, got "):
        check_number("f", "x", value)


def test_numbers_of_numpy_are_stored_as_plain_numbers() -> None:
    assert FixedWeighting(np.array([3, 1])).weights == (3, 1)
    assert [type(each) for each in FixedWeighting([np.float32(3), 1]).weights] == [float, int]
    assert repr(OUTPUT[np.int64(1)]) == "OUTPUT[1]"
    term = Term(HintLoss(), student="x", teacher="x", weight=[np.float32(0.5)][0])
    assert repr(term).endswith("weight=0.5)")
    for half in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)):
        assert (
            Term(HintLoss(), student="x", teacher="x", weight=lambda step, half=half: half).weight_at(np.int64(1))
            == 0.5
        )
    with pytest.raises(TypeError, match=r"Term: weight\(1\) must be a finite number and >= 0, got True"):
        Term(HintLoss(), student="x", teacher="x", weight=lambda step: True).weight_at(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("AngularLoss", "'AngularLoss'; the nearest are 'AngularDistillLoss'"),
        ("soft_target", r"'soft_target'; functions are in kdlib\.functional: kdlib\.functional\.soft_target"),
    ],
)
def test_an_unknown_name_is_followed_by_the_nearest(name: str, message: str) -> None:
    importlib.import_module("kdlib.functional")
    with pytest.raises(AttributeError, match=f"module 'kdlib' has no attribute {message}"):
        getattr(kdlib, name)


if __name__ == "__main__":
    FILE.write_text(listing(), "utf-8")
