"""Single-point energies and forces by any ASE calculator; effective medium theory on slabs, many structures at once.

In: a System with atoms and a CalculatorSpec. Out: an EnginePotential. A structure that the calculator cannot do (its field
does not converge, two atoms coincide) is reported in the log and counts as one of infinite energy; a calculator that has no
forces at all is an error. Crystals, whose System has no cell, bring a cell with each structure.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
from ase.calculators.calculator import PropertyNotImplementedError

from dig_scale.config import CalculatorSpec
from dig_scale.simulation.ase_emt import EMTPotential
from dig_scale.simulation.ase_engine import CalculatorPotential, potential_of
from dig_scale.simulation.ase_engine import Potential as CellPotential
from dig_scale.simulation.calculators import method_of
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.potential import EnginePotential
from dig_scale.system import System

logger = logging.getLogger("dig_scale")


def calculator_potential(system: System, temperature: float, spec: CalculatorSpec) -> EnginePotential:
    """The potential of a calculator at a temperature in K; raises SimulationError when it does not know the system."""
    origin = {"engine": "ASE", "calculator": spec.model_dump(mode="json")} | method_of(spec, system).origin
    return EnginePotential(system, temperature, Calculations(system, spec, potential_of(system, spec)), origin)


@dataclass(frozen=True)
class Calculations:
    """A Compute of one calculator: with the system's own cell, or with one cell per structure."""

    system: System
    spec: CalculatorSpec
    potential: CellPotential

    def __call__(self, positions: np.ndarray, cells: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies [B] eV and forces [B, N, 3] eV/Å; raises SimulationError when a cell is missing or forces are."""
        if cells is None and self.system.cell is None and any(self.system.periodic):
            raise SimulationError(
                f"system {self.system.name!r}: its cell varies, so every structure needs one: ask for energy_and_forces "
                f"with cells"
            )
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if cells is None and isinstance(self.potential, EMTPotential):
                return self.potential.energy_and_forces(positions)
            return self._one_by_one(positions, cells)

    def _one_by_one(self, positions: np.ndarray, cells: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        energies, forces = np.full(len(positions), np.inf), np.zeros(positions.shape)
        for number in range(len(positions)):
            potential = self.potential if cells is None else self._in_cell(cells[number])
            try:
                one = potential.energy_and_forces(positions[number : number + 1])
            except (SimulationError, np.linalg.LinAlgError) as error:
                if isinstance(error.__cause__, PropertyNotImplementedError):
                    raise
                logger.warning("structure %d of %d has no energy: %s", number, len(positions), error)
                continue
            energies[number], forces[number] = one[0][0], one[1][0]
        return energies, forces

    def _in_cell(self, cell: np.ndarray) -> CellPotential:
        return CalculatorPotential(replace(self.system, cell=cell), self.spec)
