"""Peptides and proteins in explicit water: box, ions, particle-mesh Ewald, and a box size at the recipe's pressure.

In: a System and a recipe with `simulate.explicit_solvent`. Out: a Model whose first particles are the System's atoms and
whose box has the density that a short constant-pressure run gave it; production runs at constant volume, so a PhaseSpace
of positions and velocities is all of a simulation's state. The same recipe gives the same Model on the same platform.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import openmm
from openmm import app

from dig_scale.config import Simulate
from dig_scale.importers.residues import is_peptide
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import mmff_variant
from dig_scale.simulation.openmm_systems import PLATFORM_PROPERTIES, Model, openmm_topology, require_all_atoms
from dig_scale.system import System
from dig_scale.units import ANGSTROM_PER_NM, PS_PER_FS

if TYPE_CHECKING:
    from dig_scale.config import ExplicitSolvent

_WATER_FAMILIES = ("amber14/", "amber19/")
_BOXES = {
    "cube": np.eye(3),
    "dodecahedron": np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, np.sqrt(0.5)]]),
    "octahedron": np.array([[1, 0, 0], [1 / 3, np.sqrt(8) / 3, 0], [-1 / 3, np.sqrt(2) / 3, np.sqrt(6) / 3]]),
}
"""Box vectors as rows for a distance of 1 between nearest images."""
_CUTOFFS_ACROSS = 2.25
"""Two cutoffs must fit across a box, which the pressure makes smaller by some percent."""
_BAROSTAT_STEPS = 25
_SEED = 1


def solvated(system: System, simulate: Simulate, solvent: ExplicitSolvent) -> Model:
    """The System in a box of water and ions, minimised, not yet at pressure; raises SimulationError naming the reason."""
    _require_peptide(system, simulate)
    files = (*simulate.force_field, water_file(simulate, solvent))
    try:
        force_field = app.ForceField(*files)
        modeller = app.Modeller(openmm_topology(system), system.reference_positions / ANGSTROM_PER_NM)
        with _repeatable_random():
            modeller.addSolvent(
                force_field,
                model=solvent.model,
                boxVectors=box_vectors(system, solvent) * openmm.unit.nanometer,
                ionicStrength=solvent.ionic_strength * openmm.unit.molar,
            )
        model = force_field.createSystem(
            modeller.topology,
            nonbondedMethod=app.PME,
            nonbondedCutoff=solvent.cutoff_nm,
            constraints=app.HBonds if simulate.constraints == "h-bonds" else None,
            rigidWater=True,
            hydrogenMass=simulate.hydrogen_mass,
            removeCMMotion=True,
        )
    except (ValueError, OSError) as error:
        raise SimulationError(f"system {system.name!r} in water: force field {list(files)}: {error}") from error
    positions = np.array(modeller.positions.value_in_unit(openmm.unit.nanometer)) * ANGSTROM_PER_NM
    return Model(model, positions, np.arange(system.n_sites))


def at_pressure(
    model: Model, simulate: Simulate, solvent: ExplicitSolvent, platform: str, time_step_fs: float
) -> Model:
    """The model with the box and positions that a constant-pressure run of the recipe's length ends in, without barostat.

    Raises SimulationError when the run breaks down.
    """
    system = openmm.XmlSerializer.clone(model.openmm_system)
    barostat = openmm.MonteCarloBarostat(solvent.pressure_bar, simulate.temperature, _BAROSTAT_STEPS)
    barostat.setRandomNumberSeed(_SEED)
    system.addForce(barostat)
    time_step = time_step_fs * PS_PER_FS
    integrator = openmm.LangevinMiddleIntegrator(simulate.temperature, simulate.friction_per_ps, time_step)
    integrator.setRandomNumberSeed(_SEED)
    context = openmm.Context(
        system, integrator, openmm.Platform.getPlatformByName(platform), PLATFORM_PROPERTIES.get(platform, {})
    )
    context.setPositions(model.positions / ANGSTROM_PER_NM)
    try:
        openmm.LocalEnergyMinimizer.minimize(context)
        context.setVelocitiesToTemperature(simulate.temperature, _SEED)
        integrator.step(round(solvent.pressure_equilibration_ps / time_step))
    except openmm.OpenMMException as error:
        raise SimulationError(f"the run at {solvent.pressure_bar:g} bar broke down: {error}") from error
    state = context.getState(getPositions=True)
    after = openmm.XmlSerializer.clone(model.openmm_system)
    after.setDefaultPeriodicBoxVectors(*state.getPeriodicBoxVectors())
    return Model(after, state.getPositions(asNumpy=True)._value * ANGSTROM_PER_NM, model.solute)


def box_vectors(system: System, solvent: ExplicitSolvent) -> list[openmm.Vec3]:
    """Box vectors in nm: the padding on every side of the sphere around the System, and never too narrow for the cutoff."""
    positions_nm = system.reference_positions / ANGSTROM_PER_NM
    middle = (positions_nm.min(axis=0) + positions_nm.max(axis=0)) / 2
    radius = float(np.linalg.norm(positions_nm - middle, axis=1).max())
    shape = _BOXES[solvent.box]
    narrowest = _CUTOFFS_ACROSS * solvent.cutoff_nm / min(np.diag(shape))
    width = max(2 * (radius + solvent.padding_nm), narrowest)
    return [openmm.Vec3(*row) for row in (width * shape).tolist()]


def water_file(simulate: Simulate, solvent: ExplicitSolvent) -> str:
    """The force-field file of the recipe's water that belongs to the family of its protein force field."""
    family = next((name for name in _WATER_FAMILIES if simulate.force_field[0].startswith(name)), "")
    return f"{family}{solvent.model}.xml"


def _require_peptide(system: System, simulate: Simulate) -> None:
    require_all_atoms(system)
    if mmff_variant(system, simulate) is not None or not is_peptide(system.residue_names):
        raise SimulationError(
            f"system {system.name!r}: explicit water goes with Amber force fields of peptides and proteins; for a molecule "
            f"take simulate.implicit_solvent, or prepare it with a program of your own and give [[systems]] prepared"
        )
    if not system.mobile.all():
        raise SimulationError(f"system {system.name!r}: sites that do not move cannot be kept in a box of water")


@contextmanager
def _repeatable_random() -> Iterator[None]:
    """Modeller picks the waters that become ions with Python's own generator."""
    state = random.getstate()
    random.seed(_SEED)
    try:
        yield
    finally:
        random.setstate(state)
