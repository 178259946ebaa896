"""The commands `kdlib-faces cache build`, `verify` and `info`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kdlib_faces._checks import InputError
from kdlib_faces.caching.build import CacheConfig, describe_check, info
from kdlib_faces.caching.build import build as build_cache
from kdlib_faces.caching.build import verify as verify_cache
from kdlib_faces.config import load_config
from kdlib_faces.teachers.input_options import InputOptions

__all__ = ["build", "info", "verify"]


def build(
    *,
    output: Path,
    faces: Sequence[str],
    teacher: Path,
    taps: Sequence[str],
    views: int | None,
    dtype: str | None,
    workers: int,
    seed: int,
    config: Path | None,
    settings: Sequence[str],
    progress: bool,
    stated: str,
    on_error: Literal["stop", "skip"] = "stop",
) -> str:
    """Build a cache with the options of the command line and describe it; see `kdlib_faces.caching.build.build`."""
    if not faces:
        raise InputError("cache build: --faces must be given, a CSV list or a folder")
    options: dict[str, object] = {"view_seed": seed, "views": views, "dtype": dtype}
    for name, value in vars(InputOptions.parse(stated)).items():
        options[f"input.{name}"] = list(value) if isinstance(value, tuple) else value
    values = [f"{name}={value}" for name, value in options.items() if value is not None]
    loaded = load_config(CacheConfig, config, [*values, *settings])
    build_cache(
        loaded, output=output, faces=faces, teacher=teacher, taps=taps, workers=workers, progress=progress, on_error=on_error
    )  # fmt: skip
    return info(output)


def verify(directory: Path, *, faces: Sequence[str], teacher: Path | None, rows: int, progress: bool) -> str:
    """Verify a cache and describe the result; see `kdlib_faces.caching.build.verify`."""
    return describe_check(verify_cache(directory, faces=faces, teacher=teacher, rows=rows, progress=progress))
