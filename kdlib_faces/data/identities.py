"""Names of identities: their comparison, and numbers in the order of their occurrence."""

import re
import unicodedata

from kdlib_faces._checks import InputError

__all__ = ["IdentityNumbers", "identity_key"]

_GENERIC = "class|face|folder|id|identity|image|img|label|name|people|person|sample|subject|user"
# A number, alone or after one letter or a word that stands for any identity: 7, n000007, person_7.
_NUMBERED = re.compile(rf"(?:[^\W\d_](?=\d)|(?:{_GENERIC})s?_*)?\d[\d_]*")


def identity_key(name: str) -> str:
    """Normalize a name for comparison: casefolded, each run of characters other than letters, marks and digits as one `_`.

    Examples:
        >>> identity_key("Halle_Berry") == identity_key("halle berry") == "halle_berry"
        True
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name.strip()).casefold())
    kept = (each if unicodedata.category(each)[0] in "LMN" else "_" for each in folded)
    return re.sub("_+", "_", "".join(kept))


class IdentityNumbers:
    """Numbers identities from 0 in the order in which their names occur.

    Within a list, an identity is one name, up to Unicode normalization. An identity of another list is the same if
    `identity_key` of the names is equal, unless the names only number the identities of their list.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._lists = 0
        self._here: dict[str, int] = {}
        self._spellings: dict[str, str] = {}
        self._before: dict[str, list[int]] = {}
        self._used: set[int] = set()
        self._merged: list[str] = []
        self._apart: list[str] = []
        self._variants: list[str] = []

    def start_list(self) -> None:
        """Start the next list."""
        for name, number in self._here.items():
            self._before.setdefault(identity_key(name), []).append(number)
        self._here, self._spellings, self._used = {}, {}, set[int]()
        self._lists += 1

    def add(self, name: str, where: str) -> int:
        """Return the number of an identity.

        Raises:
            InputError: The name contains no letter and no digit; the message starts with `where`.
        """
        name = unicodedata.normalize("NFC", name.strip())
        if name not in self._here:
            key = identity_key(name)
            if not key.strip("_"):
                raise InputError(f"{where}: identity must contain a letter or a digit, got {name!r}")
            self._here[name] = number = self._number(name, key)
            self._used.add(number)
        return self._here[name]

    def _number(self, name: str, key: str) -> int:
        first = self._spellings.setdefault(key, name)
        if first != name:
            self._variants.append(f"{first!r} and {name!r}")
        known = [number for number in self._before.get(key, []) if number not in self._used]
        if known and not _NUMBERED.fullmatch(key):
            self._merged.append(repr(name))
            return next((number for number in known if self.names[number] == name), known[0])
        if known:
            self._apart.append(repr(name))
            name = f"{name} (list {self._lists})"
        self.names.append(name)
        return len(self.names) - 1

    def notes(self) -> list[str]:
        """Describe the identities that were merged, or kept apart although their names are alike."""
        cases = (
            (self._merged, "are in more than one list and were merged"),
            (self._apart, "are numbers in more than one list and were kept apart; lists joined by '+' share numbers"),
            (self._variants, "differ only in case or punctuation within one list and were kept apart"),
        )
        return [f"identities: {len(found):,} {what}: {', '.join(found[:5])}" for found, what in cases if found]
