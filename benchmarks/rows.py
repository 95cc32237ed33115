"""Rows of a benchmark: {measure, value, unit, bar, met}, printed as a table and kept with date, machine and versions.

`met` is null where nothing was measured; such a row says so in `value`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured"
NOT_INSTALLED = "not installed"
PACKAGES = ("torch", "deepspeed", "ray", "openmm", "numpy")


@dataclass(frozen=True)
class Row:
    """One line of a benchmark table."""

    measure: str
    value: float | str
    unit: str
    bar: str
    met: bool | None


def at_most(measure: str, value: float, unit: str, bar: float) -> Row:
    """A row that is met at or below the bar."""
    return Row(measure, float(value), unit, f"<= {bar:g}", bool(value <= bar))


def at_least(measure: str, value: float, unit: str, bar: float) -> Row:
    """A row that is met at or above the bar."""
    return Row(measure, float(value), unit, f">= {bar:g}", bool(value >= bar))


def note(measure: str, value: float | str, unit: str = "") -> Row:
    """A row without a bar."""
    return Row(measure, value, unit, "", None)


def version_of(package: str) -> str:
    """The installed version of a package, or that it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def machine() -> dict[str, Any]:
    """Where and with what a result was measured."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else ""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_process": os.environ.get("OMP_NUM_THREADS", "as many as cores"),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def run_parts(parts: Mapping[str, Callable[[Path], list[Row]]], description: str | None) -> None:
    """The command line of a benchmark of several parts: run those that are asked for and publish their rows.

    A part is given the folder of finished runs; parts that are left out have a row that says so.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(parts))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    unknown = sorted(set(chosen) - set(parts))
    if unknown:
        parser.error(f"no part {unknown[0]!r}; parts are {', '.join(parts)}")
    arguments.runs.mkdir(parents=True, exist_ok=True)
    rows = [row for part in chosen for row in parts[part](arguments.runs)]
    publish(rows + [Row(part, NOT_MEASURED, "", "", None) for part in parts if part not in chosen], arguments.json)


def publish(rows: Sequence[Row], path: Path | None) -> None:
    """Print the table and, with a path, write it as JSON."""
    width = max((len(row.measure) for row in rows), default=10)
    for row in rows:
        value = f"{row.value:.4g}" if isinstance(row.value, float) else str(row.value)
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"{row.measure:{width}s}  {value:>12s} {row.unit:12s} {row.bar:>10s}  {verdict}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
