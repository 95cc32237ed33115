"""Bond and energy statistics of flexible alanine dipeptide at two time steps: what the step costs in accuracy.

    python benchmarks/time_step.py --json benchmarks/results/time_step-DATE.json [--ns 4]

Langevin dynamics at 300 K with the force field and hydrogen mass of the `full` recipe, one run of --ns at each step, frames every
0.2 ps. Errors are of ten blocks.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rows import Row, note, publish
from dig_scale.importers.protein import system_from_sequence
from dig_scale.recipe_files import load_recipe
from dig_scale.simulation.openmm_engine import OpenMMEngine
from dig_scale.units import thermal_energy

STEPS_FS = (1.0, 2.0)
FRAME_FS, EQUILIBRATION_FS, BLOCKS = 200.0, 20_000.0, 10


def rows_at(step_fs: float, ns: float) -> list[Row]:
    """Mean reduced energy, and the variance of bonds to hydrogen, with their errors."""
    simulate = load_recipe("full").simulate
    assert simulate is not None
    system = system_from_sequence("ala2", "ACE-ALA-NME", simulate)
    at = simulate.model_copy(update={"time_step_fs": step_fs})
    engine = OpenMMEngine(system, at, simulate.temperature, "Reference")
    engine.restore(engine.minimised(3), 5)
    engine.advance(round(EQUILIBRATION_FS / step_fs))
    hydrogens = system.bonds[(system.elements[system.bonds] == 1).any(1)]
    energies, lengths = [], []
    for _ in range(round(ns * 1e6 / FRAME_FS / BLOCKS) * BLOCKS):
        frames = engine.advance(round(FRAME_FS / step_fs))
        assert frames.energy is not None
        first, second = (frames.positions[0][hydrogens[:, side]] for side in (0, 1))
        energies.append(frames.energy[0] / thermal_energy(simulate.temperature))
        lengths.append(np.linalg.norm(first - second, axis=1))
    energy = np.reshape(energies, (BLOCKS, -1)).mean(1)
    variance = 1e6 * np.reshape(lengths, (BLOCKS, -1, len(hydrogens))).var(1).mean(1)
    return [
        row
        for name, values, unit in (
            ("mean energy", energy, "kT"),
            ("variance of bonds to hydrogen", variance, "1e-6 Å²"),
        )
        for row in (
            note(f"{step_fs:g} fs: {name}", float(values.mean()), unit),
            note(f"{step_fs:g} fs: its error", float(values.std(ddof=1) / BLOCKS**0.5), unit),
        )
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ns", type=float, default=4.0)
    arguments = parser.parse_args()
    with ProcessPoolExecutor(len(STEPS_FS)) as pool:
        runs = list(pool.map(rows_at, STEPS_FS, [arguments.ns] * len(STEPS_FS)))
    publish([row for rows in runs for row in rows], arguments.json)
