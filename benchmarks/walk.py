"""The whole walk, measured: quickstart, full recipe, five beads, sampler cost, data path, kills.

    python benchmarks/walk.py --json benchmarks/results/walk-DATE.json [--only quickstart,full,beads,data,kills] [--runs runs]

Finished runs in --runs are read, not repeated (their times were recorded when they ran). The five-bead data is read from
DIG_SCALE_SHARED (default ../shared); its rows say "not measured" where it is absent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rows import NOT_MEASURED, Row, at_least, at_most, note, run_parts

MINUTE = 60.0
MOST_EVALUATIONS = 50
BEAD_FRAMES_PER_NS = 100


def dig_scale(*words: str | Path) -> None:
    """Run the command line of this checkout; its progress goes to standard error."""
    subprocess.run([sys.executable, "-m", "dig_scale.cli", *map(str, words)], check=True)


def timed(record: Path, work: Callable[[], None]) -> float:
    """Minutes that `work` took, remembered in `record` so that a finished run is not repeated."""
    if record.is_file():
        return float(json.loads(record.read_text())["minutes"])
    begin = time.monotonic()
    work()
    minutes = (time.monotonic() - begin) / MINUTE
    record.write_text(json.dumps({"minutes": minutes}))
    return minutes


def quickstart_rows(runs: Path) -> list[Row]:
    """The quickstart recipe from nothing."""
    out = runs / "quickstart"
    minutes = timed(runs / "quickstart.json", lambda: dig_scale("run", "quickstart", "--out", out))
    report = json.loads((out / "report" / "report.json").read_text())
    return [
        at_most("quickstart: wall time after installation", minutes, "min", 20),
        *distribution_rows("quickstart", report, divergence_bar=0.08, population_bar=2.0),
        at_least("quickstart: L at C-alpha", 100 * stereochemistry(report), "%", 99),
        *cost_rows("quickstart", report),
    ]


def full_rows(runs: Path) -> list[Row]:
    """The full all-atom recipe from nothing."""
    out = runs / "full"
    minutes = timed(runs / "full.json", lambda: dig_scale("run", "full", "--out", out))
    report = json.loads((out / "report" / "report.json").read_text())
    bonds = report["bonds"]
    return [
        at_most("full: wall time", minutes, "min", 120),
        *distribution_rows("full", report, divergence_bar=0.03, population_bar=1.25),
        at_least("full: L at C-alpha", 100 * stereochemistry(report), "%", 99.9),
        at_most("full: largest shift of a bond's mean", bonds["largest_shift"]["model"]["value"], "Å", 0.01),
        at_most("full: samples with a bond off by > 0.2 Å", 100 * bonds["frames_off"]["model"]["value"], "%", 1),
        *cost_rows("full", report),
    ]


def distribution_rows(name: str, report: dict[str, Any], divergence_bar: float, population_bar: float) -> list[Row]:
    """JS of (phi, psi) with its noise floors, and the ratio of populations of phi > 0 (model over MD)."""
    (one,) = report["maps"]
    distance = one["divergence"]
    left = next(basin for basin in one["basins"] if basin["name"] == "φ > 0")
    model, md = (left["population"][key]["value"] for key in ("model", "md"))
    ratio = model / md if md else float("inf")
    return [
        at_most(f"{name}: JS(phi, psi) to all MD", distance["model"], "nat", divergence_bar),
        note(f"{name}: JS of two halves of the MD", distance["halves"], "nat"),
        note(f"{name}: JS of a same-size subsample of the MD", distance["subsample"], "nat"),
        note(f"{name}: P(phi > 0) of the MD", md),
        note(f"{name}: P(phi > 0) of the model", model),
        Row(
            f"{name}: P(phi > 0), model over MD",
            ratio,
            "",
            f"{1 / population_bar:.3g}..{population_bar:g}",
            (1 / population_bar if population_bar == 2 else 2 - population_bar) <= ratio <= population_bar,
        ),
    ]


def stereochemistry(report: dict[str, Any]) -> float:
    """Fraction of samples with every stereocentre as it should be."""
    return float(report["stereo"]["all_correct"]["model"]["value"])


def cost_rows(name: str, report: dict[str, Any]) -> list[Row]:
    """Network evaluations per sample, samples per CPU second, speed-up over MD."""
    cost = report["cost"]
    return [
        at_most(
            f"{name}: network evaluations per sample", cost["network_evaluations_per_sample"], "", MOST_EVALUATIONS
        ),
        note(f"{name}: samples per CPU second", cost["model_samples_per_second"], "1/s"),
        note(f"{name}: speed-up over MD per independent sample", cost["speed_up"] or "not recorded", "x"),
    ]


def beads_rows(runs: Path) -> list[Row]:
    """Five-bead alanine dipeptide as a user would do it: import, pack, train, sample 100,000, compare."""
    data = Path(os.environ.get("DIG_SCALE_SHARED", "../shared")) / "data" / "ala2_cg"
    if not data.is_dir():
        return [Row("beads", f"{NOT_MEASURED}: no data at {data}", "", "", None)]
    out = runs / "beads"
    minutes = timed(runs / "beads.json", lambda: _run_beads(data, out))
    report = json.loads((out / "report" / "report.json").read_text())
    (one,) = report["maps"]
    basins = {basin["name"]: basin["population"] for basin in one["basins"]}
    rows = [
        note("beads: wall time", minutes, "min"),
        at_most("beads: JS(phi, psi) to the training frames, 60 x 60 bins", one["divergence"]["model"], "nat", 0.03),
        note("beads: JS of a same-size subsample", one["divergence"]["subsample"], "nat"),
        note("beads: samples", report["subject"]["samples"]),
    ]
    for name, bar in zip(basins, (0.06, 0.06, 0.02), strict=True):
        model, md = (basins[name][key]["value"] for key in ("model", "md"))
        rows.append(at_most(f"beads: |P({name}) - training frames' {md:.4f}|", abs(model - md), "", bar))
    return rows + cost_rows("beads", report)


def _run_beads(data: Path, out: Path) -> None:
    trajectories, dataset, model, ensemble = (out / name for name in ("trajectories", "dataset", "model", "ensemble"))
    spacing = 1000 / BEAD_FRAMES_PER_NS
    words = ("--sites", "beads", "--unit", "angstrom", "--frame-spacing-ps", spacing, "--temperature", 300)
    dig_scale("import", data / "ala2_cg.pdb", data / "ala2_coordinates.npy", *map(str, words), "--out", trajectories)
    dig_scale("pack", "ala2-beads", trajectories, "--out", dataset)
    dig_scale("train", "ala2-beads", dataset, "--out", model)
    dig_scale("sample", model, "--num", "100000", "--out", ensemble)
    dig_scale("evaluate", ensemble, "--reference", trajectories, "--bins", "60", "--out", out / "report")


def script_rows(script: str) -> Callable[[Path], list[Row]]:
    """Rows of another script of this folder, run in a process of its own, or read where it has run."""

    def rows(runs: Path) -> list[Row]:
        file = runs / f"{Path(script).stem}.rows.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            subprocess.run([sys.executable, str(Path(__file__).parent / script), "--json", str(file)], check=True)
        return [Row(**row) for row in json.loads(file.read_text())["rows"]]

    return rows


def data_rows(runs: Path) -> list[Row]:
    """Reading against training, and generation against bare OpenMM loops."""
    return script_rows("data_path.py")(runs) + script_rows("generation.py")(runs)


PARTS: dict[str, Callable[[Path], list[Row]]] = {
    "quickstart": quickstart_rows,
    "full": full_rows,
    "beads": beads_rows,
    "data": data_rows,
    "kills": script_rows("kills.py"),
}


if __name__ == "__main__":
    run_parts(PARTS, __doc__)
