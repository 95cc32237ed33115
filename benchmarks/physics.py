"""Densities, reweighting, guidance, steering and training on energies, measured on systems with exact answers
and on alanine dipeptide.

    python benchmarks/physics.py --json benchmarks/results/physics-DATE.json [--only toys,guidance] [--runs runs]

Finished runs in --runs are read, not repeated (`benchmarks/walk.py` leaves alanine dipeptide's there, too).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.physics_checks import guidance_rows, steering_rows, toy_rows
from benchmarks.physics_learned import mueller_brown_rows
from benchmarks.physics_molecule import ablation_rows, cost_rows, density_rows, molecule_guidance_rows, path_rows
from benchmarks.physics_toys import EXERCISES, rows_of
from benchmarks.rows import Row, note, run_parts

Part = Callable[[Path], list[Row]]


def costed(name: str, part: Part) -> Part:
    """A part with one row more, the CPU time of this process."""

    def rows(runs: Path) -> list[Row]:
        start = time.process_time()
        found = part(runs)
        return [*found, note(f"{name}: whole part", time.process_time() - start, "CPU s")]

    return rows


def energy_alone_rows() -> list[Row]:
    """Toys learned from their energy alone."""
    return [row for exercise in EXERCISES for row in rows_of(exercise)]


TOYS: dict[str, Part] = {
    "toys": lambda runs: toy_rows(),
    "mueller-brown": lambda runs: mueller_brown_rows(),
    "pidp-toys": lambda runs: energy_alone_rows(),
    "guidance": lambda runs: guidance_rows(),
    "steering": lambda runs: steering_rows(),
}
MOLECULES: dict[str, Part] = {
    "ala2-density": density_rows,
    "ala2-guidance": molecule_guidance_rows,
    "ala2-path": path_rows,
    "ala2-cost": cost_rows,
    "ala2-ablation": ablation_rows,
}
"""Parts that train on a molecule's trajectory; most of their work is done by other processes."""
PARTS: dict[str, Part] = {name: costed(name, part) for name, part in TOYS.items()} | MOLECULES


if __name__ == "__main__":
    run_parts(PARTS, __doc__)
