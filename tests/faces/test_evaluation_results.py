"""The names in the results of every protocol as text: `report.json`, tables of scores and pages are read by them.

After an intended change, `python -m tests.faces.test_evaluation_results` rewrites `result_names.txt`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from kdlib_faces.evaluation import Outcomes, evaluate
from tests.faces.evaluation_calls import PROTOCOLS, ROWS

FILE = Path(__file__).with_name("result_names.txt")


def paths(value: object, prefix: str) -> Iterator[str]:
    """Each path of keys and fields to a value, with the value if it is one word."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from paths(entry, f"{prefix}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in value[:3]:
            yield from paths(entry, f"{prefix}[]")
    else:
        yield f"{prefix}: {value}" if isinstance(value, str) and " " not in value else prefix


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


if __name__ == "__main__":
    FILE.write_text(listing(), "utf-8")
