"""What the GPU benchmark measures: every measure is declared before any is taken, so that its table exists without a GPU.

A measure has a key (part, case, subject, column), a unit and perhaps a bar. Its value is a number, or a text where there
is none: "not measured", or why it could not be ("out of memory", "not installed"). Only a number meets or misses a bar.
Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from benchmarks.rows import NOT_MEASURED, Row, at_least, at_most, note

Value = float | str

LABEL, CELL = 36, 22
"""Characters of a table's first column and of the others."""


class Key(NamedTuple):
    """Name of a measure: part of the benchmark, case (L=512), subject (what is measured) and column (what of it)."""

    part: str
    case: str
    subject: str
    column: str


Values = Mapping[Key, Value]
Found = Iterator[tuple[Key, Value]]


@dataclass(frozen=True)
class Bar:
    """A limit that the value must not exceed ("<=") or must reach (">=")."""

    sign: Literal["<=", ">="]
    limit: float


@dataclass(frozen=True)
class Measure:
    """A declared measure."""

    key: Key
    unit: str
    bar: Bar | None = None


def row_of(measure: Measure, values: Values) -> Row:
    """The measure as a row; without a number it is neither met nor missed."""
    name, value, bar = " | ".join(measure.key), values.get(measure.key, NOT_MEASURED), measure.bar
    if bar is None:
        return note(name, value, measure.unit)
    if isinstance(value, str):
        return Row(name, value, measure.unit, f"{bar.sign} {bar.limit:g}", None)
    judge = at_most if bar.sign == "<=" else at_least
    return judge(name, value, measure.unit, bar.limit)


def ratio(values: Values, above: Key, below: Key) -> Value:
    """values[above] / values[below], or why there is none."""
    numbers = []
    for key in (above, below):
        value = values.get(key, NOT_MEASURED)
        if isinstance(value, str):
            return NOT_MEASURED if value == NOT_MEASURED else f"{NOT_MEASURED}: {key.subject}: {value}"
        numbers.append(value)
    return numbers[0] / numbers[1] if numbers[1] else f"{NOT_MEASURED}: {below.subject} took no measurable time"


def smallest(values: Values, keys: Iterable[Key]) -> Key:
    """The key with the smallest number; the first key where none has a number."""
    listed = list(keys)
    numbers = {key: value for key in listed if isinstance(value := values.get(key), float | int)}
    return min(numbers, key=lambda key: numbers[key]) if numbers else listed[0]


def table_lines(measures: Sequence[Measure], values: Values, columns: Sequence[str]) -> list[str]:
    """A table a case: a line a subject, the given columns side by side."""
    lines: list[str] = []
    for part, case in dict.fromkeys((measure.key.part, measure.key.case) for measure in measures):
        here = {(m.key.subject, m.key.column): m for m in measures if (m.key.part, m.key.case) == (part, case)}
        subjects = [s for s in dict.fromkeys(subject for subject, _ in here) if any((s, c) in here for c in columns)]
        if subjects:
            lines += ["", _line(f"{part}, {case}", [_heading(column, here.values()) for column in columns])]
            for subject in subjects:
                found = [here.get((subject, column)) for column in columns]
                lines.append(_line(subject, [_cell(values.get(m.key, NOT_MEASURED)) if m else "" for m in found]))
    return lines


def _heading(column: str, measures: Iterable[Measure]) -> str:
    unit = next((measure.unit for measure in measures if measure.key.column == column), "")
    return f"{column} [{unit}]" if unit else column


def _line(label: str, cells: Sequence[str]) -> str:
    return label.ljust(LABEL) + "".join(f"  {cell:>{CELL}s}" for cell in cells)


def _cell(value: Value) -> str:
    return value[:CELL] if isinstance(value, str) else f"{value:.4g}"
