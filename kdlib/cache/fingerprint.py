"""Cache: one digest for all that decides a teacher's outputs. Reads weights; touches no file."""

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from kdlib.adapters import TeacherAdapter

__all__ = ["model_fingerprint"]


def model_fingerprint(module: nn.Module, *, preprocessing: str = "", data: str = "") -> str:
    """SHA-256 over a model's weights and buffers, its taps and preprocessing, and what the caller says of the data.

    Equal for equal weights, whatever the device. Of the code it sees the class and its `repr` alone. A module with an
    attribute `fingerprint`, a string, answers for itself with that.

    Args:
        module: a `TeacherAdapter`, or any module.
        preprocessing: description of what happens to the inputs before the model, such as `"bgr, 112, -1 to 1"`.
            Needed where the adapter's `preprocess` is a lambda or an object that does not describe itself.
        data: description or digest of the data and its augmentation.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: `preprocess` cannot be told apart from another, and no description is given.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = model_fingerprint(layer)
        >>> len(before), model_fingerprint(layer) == before, model_fingerprint(layer, data="other") == before
        (64, True, False)
    """
    digest = hashlib.sha256(b"kdlib teacher 1")
    for part in (preprocessing, data, *_parts(module, described=bool(preprocessing))):
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _parts(module: nn.Module, *, described: bool) -> Iterator[str | bytes]:
    own = _own(module)
    if isinstance(own, str):
        yield own
        return
    if isinstance(module, TeacherAdapter):
        yield f"{list(module.taps.items())!r} {module.dtype}"
        if module.preprocess is not None:
            yield from _callable_parts(module.preprocess, described=described)
        yield from _parts(module.model, described=described)
        return
    # Addresses in a repr differ from run to run.
    yield f"{type(module).__module__}.{type(module).__qualname__} {re.sub('0x[0-9a-f]+', '', repr(module))}"
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, value in sorted(tensors, key=lambda entry: entry[0]):
        yield f"{name} {value.dtype} {tuple(value.shape)}"
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    # What keeps its weights to itself must be asked.
    for name, child in module.named_modules():
        if child is not module and (isinstance(child, TeacherAdapter) or isinstance(_own(child), str)):
            yield name
            yield from _parts(child, described=described)


def _own(module: nn.Module) -> object:
    return getattr(module, "fingerprint", None)


def _callable_parts(preprocess: Any, *, described: bool) -> Iterator[str | bytes]:
    if isinstance(preprocess, nn.Module):
        yield from _parts(preprocess, described=described)
        return
    if isinstance(preprocess, partial):
        yield f"partial {preprocess.args!r} {sorted(preprocess.keywords.items())!r}"
        yield from _callable_parts(preprocess.func, described=described)
        return
    name = getattr(preprocess, "__qualname__", None)
    shown = f"{preprocess.__module__}.{name}" if name else repr(preprocess)
    if not described and ("<lambda>" in shown or "<locals>" in shown or " at 0x" in shown):
        raise ValueError(
            f"model_fingerprint: preprocess {shown} cannot be told apart from another; describe it by preprocessing="
        )
    yield "described" if described else shown
