"""Taps: which module of a model is read, which of its calls, and which part of its return value."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kdlib.adapters._checks import bad_spelling, check_index, check_taps, indexed_tensor, no_part, no_tensor

__all__ = ["OUTPUT", "Tap", "parse_taps", "pick"]

_SPELLING = re.compile(r"(?P<path>[^#\[\]]+)(?:#(?P<call>\d+))?(?P<index>(?:\[[^\[\]]+\])*)")
_INDEX = re.compile(r"""\[(?:(?P<number>-?\d+)|'(?P<single>[^']+)'|"(?P<double>[^"]+)"|(?P<bare>\w+))\]""")


@dataclass(frozen=True)
class Tap:
    """A place in a model where a feature is read.

    Most taps are written as strings, which `Tap.parse` reads:

    - `"layer3"`: the return value of the module at that path;
    - `"encoder[0]"`, `"encoder['hidden']"`: one part of a tuple, list, mapping or named output;
    - `"block#1"`: the second call (counted from 0) of a module that is called more than once per forward.

    Args:
        path: module path as in `named_modules()`; `None` for the return value of the model itself (`OUTPUT`).
        call: which call of the module, from 0; `None` for a module that is called once.
        index: keys applied one after another to the return value.

    Examples:
        >>> Tap.parse("encoder#1[0]")
        Tap('encoder', call=1)[0]
        >>> OUTPUT["logits"]
        OUTPUT['logits']
    """

    path: str | None
    call: int | None = None
    index: tuple[int | str, ...] = ()

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
        index = tuple(
            int(key["number"]) if key["number"] else (key["single"] or key["double"] or key["bare"]) for key in keys
        )
        return cls(match["path"], int(match["call"]) if match["call"] else None, index)

    def __getitem__(self, key: int | str) -> "Tap":
        return replace(self, index=(*self.index, check_index(key)))

    def __repr__(self) -> str:
        call = "" if self.call is None else f", call={self.call}"
        base = "OUTPUT" if self.path is None else f"Tap({self.path!r}{call})"
        return base + "".join(f"[{key!r}]" for key in self.index)


OUTPUT = Tap(None)
"""The model's return value; `OUTPUT["logits"]` or `OUTPUT[0]` for one part of it."""


def parse_taps(owner: str, taps: Mapping[str, "str | Tap"]) -> dict[str, Tap]:
    """Convert the user's strings and taps to taps."""
    check_taps(owner, taps, (str, Tap))
    return {name: Tap.parse(tap) if isinstance(tap, str) else tap for name, tap in taps.items()}


def pick(owner: str, name: str, tap: Tap, value: Any, mode: str) -> Tensor:
    """Apply `tap.index` to `value`, the return value of a module; the result must be a tensor."""
    for key in tap.index:
        # A tensor can be indexed too, but would silently lose its batch dimension.
        if isinstance(value, Tensor):
            raise indexed_tensor(owner, name, tap, value, key, mode)
        try:
            by_name = isinstance(key, str) and not isinstance(value, Mapping)
            value = getattr(value, str(key)) if by_name else value[key]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise no_part(owner, name, tap, value, key, mode) from error
    if not isinstance(value, Tensor):
        raise no_tensor(owner, name, tap, value, mode)
    return value
