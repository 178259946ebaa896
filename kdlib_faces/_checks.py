"""The only place on the faces side that words an error.

Everything a user can cause (a missing file, a wrong column, a corrupt graph) is an `InputError`: the command line prints
it as one line and exits with code 2; a library user catches it as the `ValueError` that it is.
"""

__all__ = ["InputError"]


class InputError(ValueError):
    """Something that came from outside is not usable; the message says what, where, and what was expected."""
