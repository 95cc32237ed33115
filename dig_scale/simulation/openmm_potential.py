"""Single-point energies and forces by OpenMM, in a pool of contexts: what an OpenMM simulation of a recipe follows.

In: a System with all atoms and config.Simulate. Out: an EnginePotential whose batches are spread over contexts, one per
thread (OpenMM lets go of Python's lock while it computes). Same force field and implicit solvent as the engine's; bonds are
flexible, whatever the recipe constrains: a bond constrained at its rest length has the energy 0 there, so the
energies of constrained frames are the same. Small systems run on the Reference platform, in double precision.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import openmm

from dig_scale.config import Simulate
from dig_scale.simulation.engine import SimulationError
from dig_scale.simulation.force_field import PREPARED
from dig_scale.simulation.openmm_engine import OpenMMEngine, fastest_platform
from dig_scale.simulation.openmm_systems import PLATFORM_PROPERTIES, Model, build_model, stored_or_built
from dig_scale.simulation.potential import EnginePotential, PotentialOptions
from dig_scale.system import System
from dig_scale.units import ANGSTROM_PER_NM, EV_PER_ANGSTROM_PER_KJ_MOL_NM, EV_PER_KJ_MOL

_LARGEST_FOR_DOUBLE = 100
"""Particles up to which the Reference platform keeps up with single precision."""
_ANY_STEP_FS = 1.0
_DESCRIBING = ("engine", "engine_version", "platform", "force_field", "implicit_solvent", "force_field_sha256")


def openmm_potential(system: System, simulate: Simulate, options: PotentialOptions | None = None) -> EnginePotential:
    """The potential of a peptide, protein or molecule without explicit water; raises SimulationError naming the reason."""
    settings = options or PotentialOptions()
    flexible = simulate.model_copy(update={"constraints": "none", "time_step_fs": _ANY_STEP_FS})
    model = _model(system, flexible, settings.prepared)
    platform = settings.platform or _platform(system, flexible, model)
    origin = OpenMMEngine(system, flexible, simulate.temperature, platform, model).origin
    pool = ContextPool(system.name, model, platform, settings.threads or _threads(platform))
    return EnginePotential(
        system, simulate.temperature, pool, {key: origin[key] for key in _DESCRIBING if key in origin}
    )


class ContextPool:
    """A Compute of one Model on contexts that work side by side; a structure's numbers do not depend on which has it."""

    def __init__(self, name: str, model: Model, platform: str, contexts: int) -> None:
        if contexts < 1:
            raise SimulationError(f"system {name!r}: a pool of {contexts} contexts, expected at least one")
        self._name = name
        self._size = contexts
        self._free: SimpleQueue[openmm.Context] = SimpleQueue()
        for _ in range(contexts):
            self._free.put(_context(model, platform))

    def __call__(self, positions: np.ndarray, cells: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Energies [B] eV and forces [B, N, 3] eV/Å at positions [B, N, 3] Å; raises SimulationError for cells."""
        if cells is not None:
            raise SimulationError(
                f"system {self._name!r}: OpenMM computes it without a cell that varies; give no cells"
            )
        parts = np.array_split(positions, min(self._size, len(positions)) or 1)
        if len(parts) == 1:
            return self._computed(positions)
        with ThreadPoolExecutor(len(parts)) as threads:
            energies, forces = zip(*threads.map(self._computed, parts), strict=True)
        return np.concatenate(energies), np.concatenate(forces)

    def _computed(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        energies, forces = np.empty(len(positions)), np.empty(positions.shape)
        context = self._free.get()
        try:
            for number, one in enumerate(positions / ANGSTROM_PER_NM):
                context.setPositions(one)
                state = context.getState(getEnergy=True, getForces=True)
                energies[number] = state.getPotentialEnergy()._value
                forces[number] = state.getForces(asNumpy=True)._value
        finally:
            self._free.put(context)
        return energies * EV_PER_KJ_MOL, forces * EV_PER_ANGSTROM_PER_KJ_MOL_NM


def _context(model: Model, platform: str) -> openmm.Context:
    # a time step is asked for, none is taken
    integrator = openmm.VerletIntegrator(_ANY_STEP_FS)
    chosen = openmm.Platform.getPlatformByName(platform)
    return openmm.Context(model.openmm_system, integrator, chosen, PLATFORM_PROPERTIES.get(platform, {}))


def _model(system: System, flexible: Simulate, folder: Path | None) -> Model:
    if flexible.explicit_solvent is not None:
        raise SimulationError(
            f"system {system.name!r}: with simulate.explicit_solvent its energy is not a function of its atoms alone; "
            f'leave explicit_solvent out and set simulate.implicit_solvent = "obc2"'
        )
    if PREPARED not in system.origin:
        return build_model(system, flexible)
    if folder is None:
        raise SimulationError(
            f"system {system.name!r} was prepared by another program; give the folder of the system in its campaign, "
            f"which holds its force field"
        )
    return _lone_and_flexible(system, stored_or_built(folder, system, flexible))


def _lone_and_flexible(system: System, model: Model) -> Model:
    particles, rigid = model.openmm_system.getNumParticles(), model.openmm_system.getNumConstraints()
    if particles != system.n_sites:
        raise SimulationError(
            f"system {system.name!r}: its force field is that of {particles} particles, of which it is {system.n_sites}: the "
            f"energy is not a function of its atoms alone"
        )
    if rigid:
        raise SimulationError(
            f"system {system.name!r}: {rigid} distances are constrained in its prepared force field, which has no energy for "
            f'them; prepare or simulate it with simulate.constraints = "none"'
        )
    return model


def _platform(system: System, flexible: Simulate, model: Model) -> str:
    if len(model.positions) <= _LARGEST_FOR_DOUBLE:
        return "Reference"
    return fastest_platform(system, flexible, model).platform


def _threads(platform: str) -> int:
    return 1 if platform == "CUDA" else len(os.sched_getaffinity(0))
