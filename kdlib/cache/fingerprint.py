"""Fingerprints of everything that determines a teacher's outputs."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from kdlib._checks import check_type
from kdlib.cache._checks import cache_error, check_argument
from kdlib.types import FrozenModel, HasFingerprint

__all__ = ["Fingerprint", "check_source", "model_fingerprint"]

_PARTS = {"teacher": "the teacher (weights, code or taps)", "preprocessing": "the preprocessing", "data": "the data"}


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint in three parts, so that a mismatch can name the part that differs.

    Attributes:
        teacher: text or digest of weights, code and taps.
        preprocessing: text or digest of the preprocessing before the teacher.
        data: text or digest of the list of samples and the definition of the views.

    Examples:
        >>> one = Fingerprint("weights", "rgb", "list 1")
        >>> one.difference(Fingerprint("weights", "bgr", "list 1").parts)
        'the preprocessing'
        >>> Fingerprint.of(nn.Linear(2, 2)).difference(Fingerprint.of(nn.Linear(2, 2), data="other").parts)
        'the teacher (weights, code or taps) and the data'
    """

    teacher: str
    preprocessing: str
    data: str

    def __post_init__(self) -> None:
        for name, text in self.parts.items():
            check_type("Fingerprint", name, text, str, "a str")

    @classmethod
    def of(cls, module: nn.Module, *, preprocessing: str = "", data: str = "") -> Self:
        """Compute the fingerprint of a module; see `model_fingerprint` for the arguments.

        Raises:
            ValueError: `preprocess` cannot be identified and no description is given.
        """
        check_type("model_fingerprint", "module", module, nn.Module, "a Module")
        for name, text in (("preprocessing", preprocessing), ("data", data)):
            check_type("model_fingerprint", name, text, str, "a str")
        digests = {name: hashlib.sha256() for name in _PARTS}
        given = [("preprocessing", preprocessing), ("data", data)]
        for name, content in chain(given, _parts(module, described=bool(preprocessing))):
            _add(digests[name], content)
        return cls(**{name: digest.hexdigest() for name, digest in digests.items()})

    @property
    def whole(self) -> str:
        """SHA-256 of all three parts."""
        digest = hashlib.sha256()
        for text in self.parts.values():
            _add(digest, text)
        return digest.hexdigest()

    @property
    def parts(self) -> dict[str, str]:
        """Name to text of each part."""
        return {name: getattr(self, name) for name in _PARTS}

    def difference(self, parts: dict[str, str]) -> str:
        """Describe the parts that differ from those of another fingerprint; empty if none is known to differ."""
        return " and ".join(
            text for name, text in _PARTS.items() if name in parts and parts[name] != getattr(self, name)
        )


def check_source(
    path: Path, fingerprint: str, parts: dict[str, str], expected: str | Fingerprint, *, building: bool = False
) -> None:
    """A header must have the expected fingerprint; the error names the parts that differ, if they are known."""
    whole = expected if isinstance(expected, str) else expected.whole
    if fingerprint != whole:
        different = "" if isinstance(expected, str) else expected.difference(parts)
        part = f"the difference is {different}; " if different else ""
        raise cache_error(
            f"{path} {'contains' if building else 'was computed from'} another teacher, preprocessing or data: {part}its "
            f"fingerprint is {fingerprint!r}, expected {whole!r}"
            f"{'; use another path, or delete it' if building else ''}"
        )


def _add(digest: Any, part: str | bytes) -> None:
    content = part.encode() if isinstance(part, str) else part
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def model_fingerprint(module: nn.Module, *, preprocessing: str = "", data: str = "") -> str:
    """Compute a SHA-256 over a model's weights, buffers, taps and preprocessing, and the caller's description of the data.

    The result does not depend on the device. Of the code, only the class and its `repr` are included. The
    text of a module with a `fingerprint` of its own (`HasFingerprint`) is used instead.

    Args:
        module: a `TeacherAdapter`, or any module.
        preprocessing: description of the preprocessing before the model, such as `"bgr, 112, -1 to 1"`. Required if the
            adapter's `preprocess` is a lambda or an object without a descriptive `repr`.
        data: description or digest of the data and its augmentation.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: `preprocess` cannot be identified and no description is given.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = model_fingerprint(layer)
        >>> len(before), model_fingerprint(layer) == before, model_fingerprint(layer, data="other") == before
        (64, True, False)
    """
    return Fingerprint.of(module, preprocessing=preprocessing, data=data).whole


def _parts(module: nn.Module, *, described: bool) -> Iterator[tuple[str, str | bytes]]:
    """Yield the part of the fingerprint, `"teacher"` or `"preprocessing"`, and each text or tensor that belongs to it."""
    if isinstance(module, HasFingerprint):
        yield "teacher", module.fingerprint
        return
    if isinstance(module, FrozenModel):
        yield "teacher", f"{list(module.taps.items())!r} {module.dtype}"
        if module.preprocess is not None:
            for content in _callable_parts(module.preprocess, described=described):
                yield "preprocessing", content
        yield from _parts(module.model, described=described)
        return
    # Memory addresses in a repr differ between runs.
    yield "teacher", f"{type(module).__module__}.{type(module).__qualname__} {re.sub('0x[0-9a-f]+', '', repr(module))}"
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, value in sorted(tensors, key=lambda entry: entry[0]):
        yield "teacher", f"{name} {value.dtype} {tuple(value.shape)}"
        yield "teacher", value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    # Children with a fingerprint of their own do not list their weights as parameters.
    for name, child in module.named_modules():
        separate = isinstance(child, (FrozenModel, HasFingerprint))
        if separate and child is not module:
            yield "teacher", name
            yield from _parts(child, described=described)


def _callable_parts(preprocess: object, *, described: bool) -> Iterator[str | bytes]:
    if isinstance(preprocess, nn.Module):
        yield from (content for _, content in _parts(preprocess, described=described))
        return
    if isinstance(preprocess, partial):
        yield f"partial {preprocess.args!r} {sorted(preprocess.keywords.items())!r}"
        yield from _callable_parts(preprocess.func, described=described)
        return
    name = getattr(preprocess, "__qualname__", None)
    text = f"{preprocess.__module__}.{name}" if name else repr(preprocess)
    check_argument(
        described or not any(unclear in text for unclear in ("<lambda>", "<locals>", " at 0x")),
        f"model_fingerprint: preprocess {text} cannot be identified; describe it by preprocessing=",
    )
    yield "described" if described else text
