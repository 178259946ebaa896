"""The names in the results of every protocol as text: `report.json`, tables of scores and pages are read by them.

After an intended change, `python -m tests.faces.test_evaluation_results` rewrites `result_names.txt`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest

from kdlib_faces.evaluation import Outcomes, evaluate
from tests.faces.evaluation_calls import CALLS, CODES, PROTOCOLS, ROWS

FILE = Path(__file__).with_name("result_names.txt")


def paths(value: object, prefix: str) -> Iterator[str]:
    """Each path of keys and fields to a value, with the value if it is a short text, true, false or missing."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from paths(entry, f"{prefix}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value[:3]:
            yield from paths(entry, f"{prefix}[]")
    else:
        shown = value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) < 60)
        yield f"{prefix}: {value}" if shown else prefix


def listing() -> str:
    lines = []
    for name, build in PROTOCOLS.items():
        result = evaluate(ROWS, build())
        table = result.score_table(str, str)
        lines += [f"{name} to_dict{path}" for path in dict.fromkeys(paths(result.to_dict(), ""))]
        lines += [f"{name} describe{path}" for path in dict.fromkeys(paths(result.describe(), ""))]
        lines += [f"{name} summary{path}" for path in dict.fromkeys(paths(result.summary(), ""))]
        for key, outcomes in result.outcomes().items():
            verb = f": {outcomes.verb}" if isinstance(outcomes, Outcomes) else ""
            lines.append(f"{name} outcomes {key}{verb}")
        lines += [f"{name} score_table {', '.join(table.columns)}"]
    return "\n".join(lines) + "\n"


def test_names_agree_with_the_file() -> None:
    assert listing() == FILE.read_text("utf-8")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_score_table_has_the_rows_that_it_states(name: str) -> None:
    table = evaluate(ROWS, PROTOCOLS[name]()).score_table(str, str)
    rows = list(table.rows)
    assert len(rows) == table.total
    assert {len(row) for row in rows} == {len(table.columns)}


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if not name.startswith("Template")])
def test_the_hardest_pairs_have_their_kind_and_score_and_occur_once(name: str) -> None:
    pairs = evaluate(ROWS, PROTOCOLS[name]()).hardest(3)
    kinds = [pair.same for pair in pairs]
    assert True in kinds
    assert kinds == sorted(kinds, reverse=True)
    unit, others = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True), ROWS[::3] + 1
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    for pair in pairs:
        assert pair.score == pytest.approx(unit[pair.left] @ (others if pair.right_set else unit)[pair.right])
        assert pair.same == (pair.right_set == 0 and CODES[pair.left] == CODES[pair.right])
    ends = np.arange(32) if name == "PairProtocol" else CODES
    for kind in (True, False):
        probes = [ends[pair.left] for pair in pairs if pair.same == kind]
        assert len(set(probes)) == len(probes)


def intervals(value: object) -> Iterator[tuple[float, float]]:
    """Each interval in a result or a summary."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        if value.get("low") is not None and "value" in value:
            yield value["low"], value["high"]
        for entry in value.values():
            yield from intervals(entry)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value:
            yield from intervals(entry)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_interval_has_the_confidence_of_the_protocol(name: str) -> None:
    build = CALLS[name]
    narrow, wide = (
        evaluate(ROWS, build(lambda x, level=level: {0.5: level, 5: 200}.get(x, x), tuple)) for level in (0.5, 0.99)
    )
    for part in ("to_dict", "summary"):
        pairs = list(zip(*(intervals(getattr(each, part)()) for each in (narrow, wide)), strict=True))
        assert pairs
        for (low, high), (lower, higher) in pairs:
            assert lower <= low
            assert high <= higher
            assert (lower, higher) != (low, high)


if __name__ == "__main__":
    FILE.write_text(listing(), "utf-8")
