"""Taps: which module of a model is read, which of its calls, and which part of its return value."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, Literal, TypeAlias

from torch import Tensor

from kdlib.adapters._checks import (
    bad_spelling,
    check_index,
    check_taps,
    indexed_tensor,
    no_part,
    no_tensor,
    show_key,
    sliced_structure,
)

__all__ = ["OUTPUT", "Index", "Tap", "TapSpec", "Taps", "parse_taps", "pick", "taps_in"]

Index: TypeAlias = int | str | slice | tuple[int | slice | EllipsisType, ...]
"""One key of a tap: of a tuple, of a mapping, or a slice of a tensor."""

_SPELLING = re.compile(r"(?P<path>[^#\[\]]+)(?:#(?P<call>\d+))?(?P<index>(?:\[[^\[\]]+\])*)")
_ITEM = r"\s*(?:\.\.\.|-?\d+|(?:-?\d+)?:(?:-?\d+)?(?::(?:-?\d+)?)?)\s*"
_INDEX = re.compile(
    rf"""\[(?:(?P<number>-?\d+)|'(?P<single>[^']+)'|"(?P<double>[^"]+)"|(?P<bare>\w+)|(?P<slices>{_ITEM}(?:,{_ITEM})*))\]"""
)


@dataclass(frozen=True)
class Tap:
    """A place in a model where a feature is read.

    Most taps are written as strings, which `Tap.parse` reads:

    - `"layer3"`: the return value of the module at that path;
    - `"encoder[0]"`, `"encoder['hidden']"`: one part of a tuple, list, mapping, named tuple or dataclass;
    - `"norm[:, 0]"`, `"encoder[0][:, 1:]"`: a slice of a tensor, such as the class token or the tokens after it; the
      first index is always `:`, the batch;
    - `"block#1"`: the second call (counted from 0) of a module that is called more than once per forward;
    - `"OUTPUT"`, `"OUTPUT['logits']"`: the return value of the model, as `kdlib.OUTPUT`.

    `str(tap)` is that spelling.

    Args:
        path: module path as in `named_modules()`; `None` for the return value of the model itself (`OUTPUT`).
        call: which call of the module, from 0; `None` for a module that is called once.
        index: keys applied one after another to the return value.

    Raises:
        TypeError: a key is not a whole number, a string or a slice.
        ValueError: a slice does not begin with `:`.

    Examples:
        >>> Tap.parse("encoder#1[0]")
        Tap('encoder', call=1)[0]
        >>> OUTPUT["logits"]
        OUTPUT['logits']
        >>> print(OUTPUT["last_hidden_state"][:, 0], Tap("norm")[:, 1:])
        OUTPUT['last_hidden_state'][:, 0] norm[:, 1:]
    """

    path: str | None
    call: int | None = None
    index: tuple[Index, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", tuple(check_index(key) for key in self.index))

    @classmethod
    def parse(cls, spelling: str) -> "Tap":
        """Read a tap from its string form.

        Raises:
            ValueError: the string is not a tap.
        """
        match = _SPELLING.fullmatch(spelling)
        keys = list(_INDEX.finditer(match["index"])) if match else []
        if match is None or "".join(key[0] for key in keys) != match["index"]:
            raise bad_spelling(spelling)
        path = None if match["path"] == "OUTPUT" else match["path"]
        return cls(path, int(match["call"]) if match["call"] else None, tuple(_key(key) for key in keys))

    def __getitem__(self, key: Index) -> "Tap":
        return replace(self, index=(*self.index, key))

    def __hash__(self) -> int:
        return hash(repr(self))  # slices have no hash before Python 3.12

    def __repr__(self) -> str:
        call = "" if self.call is None else f", call={self.call}"
        return ("OUTPUT" if self.path is None else f"Tap({self.path!r}{call})") + self._keys()

    def __str__(self) -> str:
        call = "" if self.call is None else f"#{self.call}"
        return ("OUTPUT" if self.path is None else self.path) + call + self._keys()

    def _keys(self) -> str:
        return "".join(f"[{show_key(key)}]" for key in self.index)


def _key(match: re.Match[str]) -> Index:
    """Return the key of one pair of brackets."""
    if match["number"]:
        return int(match["number"])
    if not match["slices"]:
        return match["single"] or match["double"] or match["bare"]
    return tuple(_item(item.strip()) for item in match["slices"].split(","))


def _item(text: str) -> int | slice | EllipsisType:
    if text == "...":
        return ...
    ends = [int(end) if end else None for end in text.split(":")]
    return slice(*ends) if len(ends) > 1 else int(text)


OUTPUT = Tap(None)
"""The model's return value; `OUTPUT["logits"]` or `OUTPUT[0]` for one part of it."""

TapSpec: TypeAlias = str | Tap | Mapping[Literal["train", "eval"], str | Tap]
"""A tap, its spelling, or one for each mode of the model."""

Taps: TypeAlias = Mapping[str, Tap | Mapping[str, Tap]]
"""Feature name to tap, or to the taps by mode."""


def parse_taps(owner: str, taps: Mapping[str, TapSpec]) -> dict[str, Tap | Mapping[str, Tap]]:
    """Convert the user's strings and taps to taps."""
    check_taps(owner, taps, (str, Tap))
    return {
        name: {mode: _parsed(each) for mode, each in tap.items()} if isinstance(tap, Mapping) else _parsed(tap)
        for name, tap in taps.items()
    }


def _parsed(tap: str | Tap) -> Tap:
    return Tap.parse(tap) if isinstance(tap, str) else tap


def taps_in(taps: Taps, *, training: bool) -> dict[str, Tap]:
    """Return the taps of one mode; a feature without a tap in it is left out."""
    mode = "train" if training else "eval"
    chosen: dict[str, Tap] = {}
    for name, tap in taps.items():
        if isinstance(tap, Tap):
            chosen[name] = tap
        elif mode in tap:
            chosen[name] = tap[mode]
    return chosen


def pick(owner: str, name: str, tap: Tap, value: Any, *, training: bool) -> Tensor:
    """Apply `tap.index` to `value`, the return value of a module; the result must be a tensor."""
    for key in tap.index:
        tensor, sliced = isinstance(value, Tensor), isinstance(key, tuple)
        # A number would index a tensor too, but take one sample of the batch.
        if tensor and not sliced:
            raise indexed_tensor(owner, name, tap, value, key, training)
        if sliced and not tensor:
            raise sliced_structure(owner, name, tap, value, key, training)
        try:
            by_name = isinstance(key, str) and not isinstance(value, Mapping)
            value = getattr(value, str(key)) if by_name else value[key]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise no_part(owner, name, tap, value, key, training) from error
    if not isinstance(value, Tensor):
        raise no_tensor(owner, name, tap, value, training)
    return value
