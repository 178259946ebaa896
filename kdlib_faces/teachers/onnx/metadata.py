"""The entry that exported files keep in the metadata of an ONNX graph: input specification, embedding, thresholds."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kdlib_faces._checks import InputError, show_name
from kdlib_faces.backbones import InputSpec

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["METADATA_KEY", "read_metadata", "stated_input", "write_metadata"]

METADATA_KEY = "kdlib_faces"
MAX_BYTES = 1 << 20
FIELDS = {"size", "color", "mean", "scale", "normalized", "assumed"}


def read_metadata(model: "ModelProto") -> dict[str, object]:
    """Return the entry of a graph; empty for a graph without one.

    Raises:
        InputError: The entry is not a JSON object of at most 1 MiB.
    """
    text = next((each.value for each in model.metadata_props if each.key == METADATA_KEY), None)
    if text is None:
        return {}
    try:
        content = json.loads(text) if len(text) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(
            f"the metadata {METADATA_KEY!r} of the graph must be a JSON object of at most {MAX_BYTES:,} bytes"
        )
    return content


def write_metadata(model: "ModelProto", entry: Mapping[str, object]) -> None:
    """Replace the entry of a graph."""
    kept = [(each.key, each.value) for each in model.metadata_props if each.key != METADATA_KEY]
    del model.metadata_props[:]
    for key, value in (*kept, (METADATA_KEY, json.dumps(entry, sort_keys=True))):
        model.metadata_props.add(key=key, value=value)


def stated_input(model: "ModelProto") -> InputSpec | None:
    """Return the input specification in the entry of a graph; None without one.

    Raises:
        InputError: The specification is malformed.
    """
    fields = read_metadata(model).get("input")
    if fields is None:
        return None
    if not isinstance(fields, dict) or not set(fields) <= FIELDS:
        raise InputError(
            f"the metadata {METADATA_KEY!r} of the graph must hold 'input' with {', '.join(sorted(FIELDS))}, got "
            f"{show_name(fields)}"
        )
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return InputSpec(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"the metadata {METADATA_KEY!r} of the graph does not describe its images: {error}") from error
