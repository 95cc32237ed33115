"""The kernels on a GPU beside their competitors: attention, its memory, bias generation, node feature, training step.

    python kernels/bench/bench_gpu.py --json FILE [--csv FILE] [--only attention,bias,node,memory,step]
                                      [--lengths 128,256,512,1024,2048]
    python kernels/bench/bench_gpu.py --dry-run

16,384 sites, 32 heads of width 24, bf16. How it is measured stands in gpu_timing.py, what in README.md. Every measure is
declared first, so that without a GPU the table is written all the same, "not measured" in every row. What fails is
written as the reason. Files are rewritten as results come in: a run that is cut short keeps what it has.

--dry-run runs every code path once at a tiny size on the processor, the kernels in Triton's interpreter, and gives no
measurement: it says what ran, and fails where a declared measure got no value.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu_declared import PARTS, TEXTS
from bench.gpu_measures import Found, Key, Measure, Value, Values, row_of, table_lines

from benchmarks.rows import publish

if TYPE_CHECKING:
    from bench.gpu_timing import Bench

RUNNERS = {
    "memory": ("bench.gpu_memory", "run"),
    "bias": ("bench.gpu_generation", "run_bias"),
    "node": ("bench.gpu_generation", "run_node"),
    "step": ("bench.gpu_step", "run"),
    "attention": ("bench.gpu_attention", "run"),
}
"""Where the parts are run, in the order they run in: foreign kernels come last."""
LENGTHS = (128, 256, 512, 1024, 2048)
PACKAGES = ("torch", "triton", "numpy", "deepspeed", "cuequivariance-torch")
WRITE_EVERY = 10.0
"""Seconds between writes of unfinished results."""


def main() -> None:
    """Measure, rehearse, or write the table without numbers."""
    given = _arguments()
    parts = [part for part in RUNNERS if part in given.only]
    if given.dry_run:
        # before Triton is imported, which reads it for every kernel
        os.environ["TRITON_INTERPRET"] = "1"
        _rehearse(parts)
        return
    measures = [measure for part in PARTS if part in parts for measure in PARTS[part][0](given.lengths)]
    values, states = _measure(parts, measures, given)
    for part in PARTS:
        print("\n".join(table_lines([m for m in measures if m.key.part == part], values, PARTS[part][1])))
    print()
    publish([row_of(measure, values) for measure in measures if measure.bar is not None], None)
    write(measures, values, states, given)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", type=_parts, default=tuple(PARTS))
    parser.add_argument("--lengths", type=_lengths, default=LENGTHS)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    if given.dry_run and (given.json or given.csv):
        parser.error("a dry run measures nothing: leave out --json and --csv")
    return given


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return names


def _lengths(text: str) -> tuple[int, ...]:
    lengths = tuple(sorted(int(word) for word in text.split(",")))
    if lengths[0] < 1:
        raise argparse.ArgumentTypeError(f"lengths must be positive, found {lengths[0]}")
    return lengths


def _measure(
    parts: Sequence[str], measures: Sequence[Measure], given: argparse.Namespace
) -> tuple[dict[Key, Value], dict[str, str]]:
    """Values, and the state of the device around the parts; nothing of either without a GPU."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU: every row says so")
        return {}, {}
    from bench.gpu_timing import Sizes, device_state, measuring_bench

    bench = measuring_bench(Sizes(lengths=given.lengths))
    values: dict[Key, Value] = {}
    states, written = {"before": device_state()}, time.monotonic()
    for part in parts:
        for key, value in _whatever_happens(part, bench):
            values[key] = value
            if time.monotonic() - written > WRITE_EVERY:
                write(measures, values, states, given)
                written = time.monotonic()
        states = {**states, f"after {part}": device_state()}
    return values, states


def _whatever_happens(part: str, bench: Bench) -> Found:
    """What a part finds; where it breaks off, the reason for all that it leaves out."""
    from bench.gpu_timing import failure_text

    found = set()
    try:
        for key, value in runner(part)(bench):
            found.add(key)
            yield key, value
    except Exception as error:  # a device in a broken state must not take the numbers before it along
        traceback.print_exc()
        left = [measure.key for measure in PARTS[part][0](bench.sizes.lengths) if measure.key not in found]
        yield from ((key, failure_text(error)) for key in left)


def runner(part: str) -> Callable[[Bench], Found]:
    """The function that runs a part."""
    module, name = RUNNERS[part]
    function: Callable[[Bench], Found] = getattr(importlib.import_module(module), name)
    return function


def _rehearse(parts: Sequence[str]) -> None:
    """Every part once at a tiny size; exits with 1 where a declared measure was left without a value or another got one."""
    from bench.gpu_timing import REHEARSAL, rehearsal_bench

    wrong = 0
    for part in parts:
        values = dict(runner(part)(rehearsal_bench(REHEARSAL)))
        wanted = {measure.key for measure in PARTS[part][0](REHEARSAL.lengths)}
        missing, unknown = sorted(wanted - values.keys()), sorted(values.keys() - wanted)
        texts = {key: value for key, value in values.items() if isinstance(value, str) and key.column not in TEXTS}
        print(f"{part}: {len(values) - len(texts)} of {len(wanted)} measures ran through; no number is kept")
        for subject, reason in dict.fromkeys((key.subject, reason) for key, reason in texts.items()):
            print(f"  {subject}: {reason}")
        for problem, keys in (("no value for", missing), ("not declared:", unknown)):
            wrong += len(keys)
            print("".join(f"  {problem} {' | '.join(key)}\n" for key in keys), end="")
    sys.exit(1 if wrong else 0)


def write(measures: Sequence[Measure], values: Values, states: Mapping[str, str], given: argparse.Namespace) -> None:
    """The rows as JSON and CSV, where files are given."""
    rows = [row_of(measure, values) for measure in measures]
    if given.json is not None:
        content = {"machine": {**machine(), "gpu_state": states}, "rows": [asdict(row) for row in rows]}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(content, indent=1) + "\n")
    if given.csv is not None:
        given.csv.parent.mkdir(parents=True, exist_ok=True)
        with given.csv.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow([*Key._fields, "value", "unit", "bar", "met"])
            for measure, row in zip(measures, rows, strict=True):
                table.writerow([*measure.key, row.value, row.unit, row.bar, "" if row.met is None else row.met])


def machine() -> dict[str, Any]:
    """Date, versions of what is installed, and the GPU."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu: dict[str, Any] = {"gpu": None}
    if torch.cuda.is_available():
        known = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {"gpu": known.name, "memory_gb": known.total_memory / 1e9, "multiprocessors": known.multi_processor_count}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, "python": platform.python_version(), "cuda": torch.version.cuda, **gpu, "versions": versions}


if __name__ == "__main__":
    main()
