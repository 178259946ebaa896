"""Contracts: the checks of what is given to be checked. Words errors in arguments; a failed contract words its own."""

from collections.abc import Collection

from kdlib._checks import check_name

__all__ = ["check_exclude"]


def check_exclude(owner: str, exclude: Collection[str], known: Collection[str]) -> None:
    """A name to leave out must be one of the checks: a misspelt one would leave out nothing."""
    if isinstance(exclude, str):
        raise TypeError(f"{owner}: exclude must be a collection of names, got {exclude!r}")
    for name in exclude:
        check_name(owner, "check", name, known)
