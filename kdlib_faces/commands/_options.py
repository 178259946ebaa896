"""Options that several commands turn into settings."""

from argparse import Namespace

__all__ = ["precision"]


def precision(options: Namespace, prefix: str = "") -> list[str]:
    """Return the settings of `--amp` and `--compile`."""
    amp = [] if options.amp is None else [f"{prefix}amp={options.amp}"]
    return [*amp, *([f"{prefix}compile=true"] if options.compile else [])]
