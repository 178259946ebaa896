"""Checks of the arguments of the contract checks."""

from collections.abc import Collection

from kdlib._checks import check_name


def check_exclude(owner: str, exclude: Collection[str], known: Collection[str]) -> None:
    """Every excluded name must be a known check: a misspelled name would exclude nothing."""
    if isinstance(exclude, str):
        raise TypeError(f"{owner}: exclude must be a collection of names, got {exclude!r}")
    for name in exclude:
        check_name(owner, "check", name, known)
