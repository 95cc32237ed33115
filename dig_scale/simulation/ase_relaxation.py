"""A crystal brought to a minimum of its enthalpy by an ASE calculator: atoms and cell together.

In: elements, positions and a cell in Å, and any ASE calculator with stress. Out: the relaxed places, cell and energy in Å
and eV. The cell moves in the coordinates of its matrix logarithm (ASE's FrechetCellFilter) under LBFGS, which takes half the
evaluations of FIRE on random cells. Knows no files and no search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dig_scale.simulation.engine import SimulationError

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

_RUNAWAY = 8.0
"""Factor of the volume beyond which a structure is falling apart or collapsing."""


@dataclass(frozen=True)
class Relaxation:
    """When a structure counts as relaxed: largest force in eV/Å (stress likewise), within `steps`; pressure in eV/Å³
    (1 GPa is 0.00624151).
    """

    largest_force: float = 0.05
    steps: int = 500
    pressure: float = 0.0


@dataclass(frozen=True)
class Relaxed:
    """positions [N, 3] Å, cell [3, 3] Å, energy of the cell in eV (without the pressure's part), steps taken."""

    positions: np.ndarray
    cell: np.ndarray
    energy: float
    steps: int


def relax_crystal(
    elements: np.ndarray, positions: np.ndarray, cell: np.ndarray, calculator: Calculator, settings: Relaxation
) -> Relaxed:
    """The minimum next to a start; raises SimulationError when it is not reached or the structure falls apart."""
    from ase import Atoms
    from ase.filters import FrechetCellFilter
    from ase.optimize import LBFGS

    atoms = Atoms(numbers=elements, positions=positions, cell=cell, pbc=True)
    atoms.calc = calculator
    start = atoms.get_volume()
    variables = FrechetCellFilter(atoms, scalar_pressure=settings.pressure)
    optimiser = LBFGS(variables, logfile=None)  # type: ignore[arg-type]  # ASE takes both
    converged = False
    for reached in optimiser.irun(fmax=settings.largest_force, steps=settings.steps):
        converged, ratio = bool(reached), atoms.get_volume() / start
        if not 1 / _RUNAWAY < ratio < _RUNAWAY:
            steps = optimiser.nsteps
            raise SimulationError(f"the volume ran from {start:.1f} to {start * ratio:.3g} Å³ in {steps} steps")
    if not converged:
        largest = settings.largest_force
        raise SimulationError(f"forces were not below {largest:g} eV/Å after {settings.steps} steps; give more steps")
    return Relaxed(
        atoms.positions.copy(), atoms.cell.array.copy(), float(atoms.get_potential_energy()), optimiser.nsteps
    )
